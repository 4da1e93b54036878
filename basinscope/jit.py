"""What functions compiled by numba share: what may be relaxed, and arrays at an address."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

# Products may be contracted with sums, and long sums reordered to vectorise; nothing else is
# relaxed: NaN and infinity keep their meaning, and so do differences that are taken for accuracy.
OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}
SUMMING: dict[str, Any] = {**OPTIONS, "fastmath": {"contract", "reassoc", "nsz"}}

INT64, UINT32, UINT8 = np.int64(0), np.uint32(0), np.uint8(0)  # types, as `view` takes them
FLOAT32, FLOAT64 = np.float32(0), np.float64(0)


@numba.njit(forceinline=True, **OPTIONS)
def at(address: Any, index: Any, storage: Any) -> Any:
    """One element of the array at `address`."""
    return numba.carray(_pointer(address, index, storage), 1)[0]


@numba.njit(forceinline=True, **OPTIONS)
def view(address: Any, start: Any, count: Any, storage: Any) -> Any:
    """The elements from `start` of the array at `address`, as an array without a copy."""
    return numba.carray(_pointer(address, start, storage), count)


@intrinsic
def _pointer(typingctx: Any, address: Any, start: Any, storage: Any) -> Any:
    """Address and element offset to a typed pointer."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], context.get_value_type(types.CPointer(storage)))
        return builder.gep(pointer, [args[1]])

    return types.CPointer(storage)(types.int64, types.int64, storage), codegen
