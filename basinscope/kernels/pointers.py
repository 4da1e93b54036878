"""One launch for many tensors: their addresses in a table, their elements cut into blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

ALL = -1
"""In place of the position of a block's bits: every element of the block is chosen."""


@dataclass(frozen=True)
class Blocks:
    """Which elements of which tensor each block is, and which of them are chosen.

    Attributes
    ----------
    tensor_of, start_of
        Per block the number of its tensor and the first of its elements.
    bits_of
        Per block the first of its bytes in ``bits``, or ``ALL``.
    bits
        One bit per element of the blocks that are chosen in part, lowest bit first.
    """

    tensor_of: npt.NDArray[np.int64]
    start_of: npt.NDArray[np.int64]
    bits_of: npt.NDArray[np.int64]
    bits: npt.NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.tensor_of)


def addresses(tensors: Sequence[Tensor | None]) -> npt.NDArray[np.int64]:
    """The tensors' data addresses as int64, zero for None."""
    return np.array([0 if t is None else t.data_ptr() for t in tensors], dtype=np.int64)


def name_of(dtype: torch.dtype) -> str:
    """Name a dtype as the compiled kernels do: "float32", "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def cut(
    sizes: Sequence[int], masks: Sequence[Tensor | None], block: int, *, keep_empty: bool
) -> Blocks:
    """Cut tensors into blocks of at most `block` elements.

    Parameters
    ----------
    sizes
        Elements of each tensor; an empty one has no blocks.
    masks
        Per tensor a bool tensor of as many elements, or None for all.
    block
        Elements of a full block, a multiple of 8.
    keep_empty
        Whether blocks without a chosen element are listed too.
    """
    tensor_of, start_of, bits_of = ([np.empty(0, np.int64)] for _ in range(3))
    bits = [np.empty((0, block // 8), np.uint8)]
    used = 0
    for number, (size, mask) in enumerate(zip(sizes, masks, strict=True)):
        starts = np.arange(0, size, block, dtype=np.int64)
        where = np.full(len(starts), ALL, dtype=np.int64)
        if mask is not None:
            chosen = _blocked(mask, block)
            counts = chosen.sum(axis=1)
            partial = counts < np.minimum(block, size - starts)
            if not keep_empty:
                partial &= counts > 0
            bits.append(np.packbits(chosen[partial], axis=1, bitorder="little"))
            where[partial] = (used + np.arange(len(bits[-1]))) * (block // 8)
            used += len(bits[-1])
            listed = (counts > 0) | partial
            starts, where = starts[listed], where[listed]
        tensor_of.append(np.full(len(starts), number, dtype=np.int64))
        start_of.append(starts)
        bits_of.append(where)
    return Blocks(
        np.concatenate(tensor_of),
        np.concatenate(start_of),
        np.concatenate(bits_of),
        np.concatenate(bits).reshape(-1),
    )


def _blocked(mask: Tensor, block: int) -> npt.NDArray[np.bool_]:
    """A mask as rows of a block each, the last one filled up with False."""
    flat = mask.detach().cpu().reshape(-1).numpy()
    rows = np.zeros((-(-flat.size // block), block), dtype=np.bool_)
    rows.reshape(-1)[: flat.size] = flat
    return rows
