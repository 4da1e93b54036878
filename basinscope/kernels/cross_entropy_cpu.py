"""Per-token cross-entropy on a CPU: the compiled kernels on torch's memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from basinscope.kernels import compiled_losses
from basinscope.kernels.compiled import storage_of
from basinscope.kernels.threads import for_blocks, worthwhile

_COST = 0.3  # nanoseconds per logit on one thread


def forward(rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Losses (A * B,) and levels (2, A * B), float32, for logits (A, B, V)."""
    rows = _in_range(rows)
    loss = torch.empty(targets.shape, dtype=torch.float32)
    level = torch.empty((2, len(loss)), dtype=torch.float32)
    _for_rows(compiled_losses.token_losses, rows, targets, loss.numpy(), level.numpy())
    return loss, level


def backward(rows: Tensor, targets: Tensor, level: Tensor, upstream: Tensor, out: Tensor) -> None:
    """Write the gradient (softmax - one hot) * upstream to ``out``, which may be the rows."""
    used = _in_range(rows)
    direct = out.dtype == used.dtype
    gradient = out if direct else torch.empty_like(used)
    _for_rows(
        compiled_losses.token_gradients,
        used,
        targets,
        level.contiguous().numpy(),
        upstream.numpy(),
        gradient.data_ptr(),
        np.array(gradient.stride(), dtype=np.int64),
    )
    if not direct:
        out.copy_(gradient)


def _for_rows(kernel: Any, rows: Tensor, targets: Tensor, *results: Any) -> None:
    strides = np.array(rows.stride(), dtype=np.int64)
    _, inner, vocabulary = rows.shape
    arguments = (rows.data_ptr(), strides, inner, vocabulary, *storage_of(rows.dtype))
    ids = targets.numpy()

    threads = worthwhile(_COST * rows.numel(), torch.get_num_threads())

    def work(first: int, last: int) -> None:
        kernel(first, last, *arguments, ids, *results)

    for_blocks(work, targets.numel(), threads)


def _in_range(rows: Tensor) -> Tensor:
    """float64 logits are rounded to float32, the type of the arithmetic."""
    return rows.to(torch.float32) if rows.dtype == torch.float64 else rows
