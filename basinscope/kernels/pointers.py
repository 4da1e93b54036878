"""One launch for many tensors: their addresses in a table, their elements cut into blocks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor


def addresses(tensors: Sequence[Tensor | None]) -> npt.NDArray[np.int64]:
    """The tensors' data addresses as int64, zero for None."""
    return np.array([0 if t is None else t.data_ptr() for t in tensors], dtype=np.int64)


def cut(sizes: Sequence[int], block: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Cut tensors into blocks of at most `block` elements.

    Parameters
    ----------
    sizes
        Elements of each tensor; an empty one has no blocks.
    block
        Elements of a full block.

    Returns
    -------
    tensor_of, start_of
        Per block the number of its tensor and the first of its elements.
    """
    counts = [-(-size // block) for size in sizes]
    tensor_of = np.repeat(np.arange(len(sizes), dtype=np.int64), counts)
    starts = [np.arange(count, dtype=np.int64) * block for count in counts]
    return tensor_of, np.concatenate([*starts, np.empty(0, np.int64)])
