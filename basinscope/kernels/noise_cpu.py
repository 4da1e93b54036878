"""The normal stream on a CPU, compiled."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from basinscope.kernels import compiled
from basinscope.kernels.threads import for_blocks, worthwhile

_COST = 0.55  # nanoseconds per number on one thread


def fill(flat: Tensor, key: tuple[int, int], param_index: int, step: int, chain: int) -> None:
    """Fill a contiguous float32 vector; `chain` carries the stream in its top byte."""
    work = partial(_fill_range, flat.numpy(), param_index, step, chain, *key)
    threads = worthwhile(_COST * flat.numel(), torch.get_num_threads())
    for_blocks(work, -(-flat.numel() // compiled.BLOCK), threads)


def _fill_range(out, param_index, step, chain, key0, key1, first, last):  # type: ignore[no-untyped-def]
    compiled.normal_blocks(first, last, out, param_index, step, chain, key0, key1)
