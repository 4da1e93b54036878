"""Per-token cross-entropy of logits: logsumexp(logits) - logits[target], in float32.

No tensor of the logits' size is made in the forward pass: what is kept for the backward pass is
the logits themselves and one log-sum-exp per token. A logit that is not finite shows in its
token's loss, so callers need no separate look at the logits.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from basinscope.kernels import paths


def token_cross_entropy(logits: Tensor, targets: Tensor, *, path: str = "auto") -> Tensor:
    """Negative log-likelihood of each target token, in nats.

    Parameters
    ----------
    logits
        Floating point, shape (..., V), any strides; a contiguous last dimension avoids a copy.
    targets
        Integer, shape (...), in 0 .. V - 1 (checked on a CPU; undefined behaviour on a GPU).
    path
        "auto", "triton", "cpu" or "reference", see `basinscope.kernels.paths.resolve`.

    Returns
    -------
    Tensor
        float32 losses of shape (...), whatever the logits' dtype. Differentiable once; the
        gradient has the logits' dtype. A token with a NaN or +inf logit, or with -inf at its
        target, has a loss of NaN or inf; -inf elsewhere means a probability of zero.

    Raises
    ------
    ValueError
        If shapes, dtypes or devices do not fit, or on a CPU a target is no token.
    """
    _check(logits, targets)
    kernels = _kernels_for(paths.resolve(path, logits.device.type))
    rows = _as_rows(logits)
    flat = targets.reshape(-1).to(torch.int64)
    if torch.is_grad_enabled() and logits.requires_grad:
        loss: Tensor = _TokenCrossEntropy.apply(rows, flat, kernels)
    else:
        loss, _ = kernels.forward(rows.detach(), flat)
    return loss.view(targets.shape)


class _TokenCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, targets: Tensor, kernels: ModuleType) -> Tensor:
        loss, lse = kernels.forward(rows.detach(), targets)
        ctx.save_for_backward(rows, targets, lse)
        ctx.kernels = kernels
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        rows, targets, lse = ctx.saved_tensors
        return ctx.kernels.backward(rows, targets, lse, upstream.contiguous()), None, None


def _check(logits: Tensor, targets: Tensor) -> None:
    if not logits.is_floating_point() or logits.ndim == 0:
        raise ValueError(
            f"logits must be floating point of shape (..., vocabulary), got {logits.dtype} "
            f"{tuple(logits.shape)}"
        )
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(f"targets must be integer token ids, got {targets.dtype}")
    if targets.shape != logits.shape[:-1]:
        raise ValueError(
            f"targets of shape {tuple(targets.shape)} do not fit logits of shape "
            f"{tuple(logits.shape)}; expected {tuple(logits.shape[:-1])}"
        )
    if targets.device != logits.device:
        raise ValueError(
            f"targets are on {targets.device}, logits on {logits.device}; move one of them"
        )
    if targets.device.type == "cpu" and targets.numel():
        low, high = (int(extreme) for extreme in torch.aminmax(targets))
        vocabulary = logits.shape[-1]
        if low < 0 or high >= vocabulary:
            raise ValueError(
                f"targets must be token ids in 0 .. {vocabulary - 1}, got values from "
                f"{low} to {high}; drop the tokens that have no target first"
            )


def _kernels_for(path: str) -> ModuleType:
    """Module with ``forward(rows, targets) -> (loss, lse)`` and ``backward(..., upstream)``."""
    if path == "cpu":
        from basinscope.kernels import cross_entropy_cpu

        return cross_entropy_cpu
    if path == "triton":
        from basinscope.kernels import cross_entropy_triton

        return cross_entropy_triton
    from basinscope.kernels import cross_entropy_reference

    return cross_entropy_reference


def _as_rows(logits: Tensor) -> Tensor:
    """View logits as (A, B, V) with a contiguous last dimension; copy only if there is no way."""
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        logits = logits.contiguous()
    if logits.ndim == 3:
        return logits
    if logits.ndim < 3:
        return logits[(None,) * (3 - logits.ndim)]
    return logits.flatten(0, -3)
