"""The normal stream on a CPU, compiled."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from basinscope.kernels.sgld_cpu import BLOCK
from basinscope.kernels.threads import for_blocks, worthwhile
from basinscope.native import address, function

_COST = 0.55  # nanoseconds per number on one thread


def fill(flat: Tensor, key: tuple[int, int], param_index: int, step: int, chain: int) -> None:
    """Fill a contiguous float32 vector; `chain` carries the stream in its top byte."""
    size = flat.numel()
    numbers = (flat.data_ptr(), size, param_index, step, chain, *key)
    fill_blocks = function("basinscope.kernels.compiled", "normal_blocks")

    def work(first: int, last: int) -> None:
        scratch = np.empty(BLOCK, np.float32)
        fill_blocks(first, last, *numbers, address(scratch))

    threads = worthwhile(_COST * size, torch.get_num_threads())
    for_blocks(work, -(-size // BLOCK), threads)
