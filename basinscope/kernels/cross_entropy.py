"""Per-token cross-entropy of logits: logsumexp(logits) - logits[target], in float32.

No tensor of the logits' size is made in the forward pass: what is kept for the backward pass is
the logits themselves and each token's level: their maximum, and the logarithm of the sum of
exponentials above it. The two are kept apart, for their sum would round the gradient. A logit that
is not finite shows in its token's loss, so callers need no separate look at the logits.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from basinscope.kernels import paths


def token_cross_entropy(
    logits: Tensor, targets: Tensor, *, reuse_logits: bool = False, path: str = "auto"
) -> Tensor:
    """Negative log-likelihood of each target token, in nats.

    Parameters
    ----------
    logits
        Floating point, shape (..., V), any strides; a contiguous last dimension avoids a copy.
    targets
        Integer, shape (...), in 0 .. V - 1 (checked on a CPU; a loss of NaN on a GPU).
    reuse_logits
        Whether the backward pass may write the gradient over the logits, which saves memory of
        their size and the time to fill it. Only for logits that nobody reads after the loss.
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
    return _losses(_as_rows(logits), targets, reuse_logits, path)


def next_token_cross_entropy(
    logits: Tensor, input_ids: Tensor, *, reuse_logits: bool = False, path: str = "auto"
) -> Tensor:
    """Negative log-likelihood of each token given those before it, in nats.

    Equal to ``token_cross_entropy(logits[:, :-1], input_ids[:, 1:])``, without the passes over
    memory that cutting the last position off costs in the backward pass.

    Parameters
    ----------
    logits
        Shape (batch, token, V), otherwise as in `token_cross_entropy`.
    input_ids
        Shape (batch, token).
    reuse_logits, path
        As in `token_cross_entropy`.

    Returns
    -------
    Tensor
        float32 losses of shape (batch, token - 1).

    Raises
    ------
    ValueError
        As in `token_cross_entropy`, and if there is no second token.
    """
    if logits.ndim != 3 or logits.shape[1] < 2:
        raise ValueError(
            "next-token losses need logits of shape (batch, token, vocabulary) and at least two "
            f"tokens, got {tuple(logits.shape)}"
        )
    _check(logits, input_ids)
    return _losses(_as_rows(logits), input_ids[:, 1:], reuse_logits, path)


def _losses(rows: Tensor, targets: Tensor, reuse: bool, path: str) -> Tensor:
    """Losses of logits (A, B, V) whose first positions along B have targets."""
    kernels = kernels_for(paths.resolve(path, rows.device.type))
    flat = targets.reshape(-1).to(torch.int64).contiguous()
    used = targets.shape[-1] if targets.ndim else 1
    if torch.is_grad_enabled() and rows.requires_grad:
        loss: Tensor = _TokenCrossEntropy.apply(rows, flat, used, kernels, reuse)
    else:
        loss, _ = kernels.forward(rows.detach()[:, :used], flat)
    return loss.view(targets.shape)


class _TokenCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, targets: Tensor, used: int, kernels: ModuleType, reuse: bool
    ) -> Tensor:
        loss, level = kernels.forward(rows.detach()[:, :used], targets)
        ctx.save_for_backward(rows, targets, level)
        shared = any(rows.stride(d) == 0 and rows.shape[d] > 1 for d in range(rows.ndim))
        ctx.used, ctx.kernels, ctx.reuse = used, kernels, reuse and not shared
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None, None]:
        rows, targets, level = ctx.saved_tensors
        gradient = rows.detach() if ctx.reuse else torch.empty_like(rows)
        ctx.kernels.backward(
            rows[:, : ctx.used], targets, level, upstream.contiguous(), gradient[:, : ctx.used]
        )
        gradient[:, ctx.used :].zero_()
        if ctx.reuse:
            torch.autograd.graph.increment_version(rows)
        return gradient, None, None, None, None


def _check(logits: Tensor, targets: Tensor) -> None:
    if not logits.is_floating_point() or logits.ndim == 0:
        raise ValueError(
            f"logits must be floating point of shape (..., vocabulary), got {logits.dtype} "
            f"{tuple(logits.shape)}"
        )
    check_targets(targets, logits.shape[:-1], logits.shape[-1], logits.device)


def check_targets(
    targets: Tensor, shape: tuple[int, ...], vocabulary: int, device: torch.device
) -> None:
    """Refuse targets that are no token ids of the given shape."""
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(f"targets must be integer token ids, got {targets.dtype}")
    if targets.shape != shape:
        raise ValueError(
            f"targets of shape {tuple(targets.shape)} do not fit; expected {tuple(shape)}, "
            "one target per token"
        )
    if targets.device != device:
        raise ValueError(f"targets are on {targets.device}, the rest on {device}; move one of them")
    if targets.device.type == "cpu" and targets.numel():
        low, high = (int(extreme) for extreme in torch.aminmax(targets))
        if low < 0 or high >= vocabulary:
            raise ValueError(
                f"targets must be token ids in 0 .. {vocabulary - 1}, got values from "
                f"{low} to {high}; drop the tokens that have no target first"
            )


def kernels_for(path: str) -> ModuleType:
    """The module of a path: ``forward(rows, targets)`` and ``backward(..., upstream, out)``.

    Rows are logits (A, B, V) with a contiguous last dimension, `targets` int64 (A * B,);
    ``forward`` gives losses (A * B,) and levels (2, A * B), float32: maximum and logarithm of the
    sum of exponentials above it; ``backward`` writes the gradient
    (softmax - one hot) * upstream to `out`, of the rows' shape and dtype, or the rows themselves.
    """
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
