"""Per-token cross-entropy on a CPU: the compiled kernels on torch's memory."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from basinscope.kernels.pointers import name_of
from basinscope.kernels.threads import for_blocks, worthwhile
from basinscope.native import address, function

_COST = 0.3  # nanoseconds per logit on one thread


def forward(rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Losses (A * B,) and levels (2, A * B), float32, for logits (A, B, V)."""
    rows = _in_range(rows)
    loss = torch.empty(targets.shape, dtype=torch.float32)
    level = torch.empty((2, len(loss)), dtype=torch.float32)
    _for_rows("token_losses", rows, targets, loss.data_ptr(), level.data_ptr(), len(loss))
    return loss, level


def backward(rows: Tensor, targets: Tensor, level: Tensor, upstream: Tensor, out: Tensor) -> None:
    """Write the gradient (softmax - one hot) * upstream to ``out``, which may be the rows."""
    used = _in_range(rows)
    direct = out.dtype == used.dtype
    gradient = out if direct else torch.empty_like(used)
    level, upstream = level.contiguous(), upstream.contiguous()
    _for_rows(
        "token_gradients",
        used,
        targets,
        level.data_ptr(),
        len(targets),
        upstream.data_ptr(),
        gradient.data_ptr(),
        *gradient.stride()[:2],
    )
    if not direct:
        out.copy_(gradient)


def _for_rows(kernel: str, rows: Tensor, targets: Tensor, *results: int) -> None:
    compiled = function("basinscope.kernels.compiled_losses", kernel, name_of(rows.dtype))
    _, inner, vocabulary = rows.shape
    arguments = (rows.data_ptr(), *rows.stride()[:2], inner, vocabulary, targets.data_ptr())
    needed = 0 if rows.dtype == torch.float32 else vocabulary

    def work(first: int, last: int) -> None:
        scratch = np.empty(needed, np.float32)
        compiled(first, last, *arguments, *results, address(scratch))

    threads = worthwhile(_COST * rows.numel(), torch.get_num_threads())
    for_blocks(work, targets.numel(), threads)


def _in_range(rows: Tensor) -> Tensor:
    """float64 logits are rounded to float32, the type of the arithmetic."""
    return rows.to(torch.float32) if rows.dtype == torch.float64 else rows
