"""Per-token cross-entropy in plain torch operations, for any device."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Losses (A * B,) and levels (2, A * B), float32, for logits (A, B, V)."""
    values = rows.to(torch.float32).flatten(0, 1)
    top = values.amax(dim=-1, keepdim=True)
    shifted = values - top
    log_total = shifted.exp().sum(dim=-1).log()
    loss = log_total - shifted.gather(-1, targets[:, None]).squeeze(-1)
    return loss, torch.stack([top.squeeze(-1), log_total])


def backward(rows: Tensor, targets: Tensor, level: Tensor, upstream: Tensor, out: Tensor) -> None:
    """Write the gradient (softmax - one hot) * upstream to ``out``, which may be the rows."""
    top, log_total = level[..., None]
    gradient = (rows.to(torch.float32).flatten(0, 1) - top).sub_(log_total).exp_()
    gradient.mul_(upstream[:, None])
    gradient.scatter_add_(-1, targets[:, None], -upstream[:, None])
    out.copy_(gradient.view(rows.shape))
