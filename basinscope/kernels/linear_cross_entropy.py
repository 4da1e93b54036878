"""Per-token cross-entropy of a linear head, from hidden states, without the logits in memory.

    z = scale (h W^T + b),   l = cap tanh(z / cap)  (without a soft cap l = z)
    loss = logsumexp(l) - l[target]

The loss is exact, and so are all gradients: no token or vocabulary entry is filtered away. What is
held beside inputs, losses and gradients is a stretch of logits, not all of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from basinscope.kernels import paths
from basinscope.kernels.cross_entropy import check_targets, kernels_for

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Of hidden states, weight and bias; None where it was not wanted."""


@dataclass(frozen=True)
class Head:
    """What is between hidden states and logits."""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    scale: float
    softcap: float | None


@dataclass(frozen=True)
class Kept:
    """What the forward pass leaves for the backward pass."""

    level: Tensor  # (2, N) float32: maximum, and log of the sum of exponentials above it
    gradients: Gradients | None = None  # for an upstream gradient of 1 / N, before rounding


class HeadKernels(Protocol):
    """One path: rows are hidden states (N, D), targets int64 (N,)."""

    def forward(
        self, rows: Tensor, head: Head, targets: Tensor, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor, Kept]:
        """Losses (N,), float32; ``wanted`` says which gradients will be asked for."""

    def backward(
        self,
        rows: Tensor,
        head: Head,
        targets: Tensor,
        kept: Kept,
        upstream: Tensor,
        wanted: tuple[bool, bool, bool],
    ) -> Gradients:
        """Gradients of sum(upstream * losses)."""


def linear_token_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    path: str = "auto",
) -> Tensor:
    """Negative log-likelihood of each target under a linear head, in nats.

    Parameters
    ----------
    hidden
        Hidden states, shape (..., D); float32, bfloat16, float16 or float64.
    weight
        The unembedding, shape (V, D), of the hidden states' dtype.
    targets
        Integer, shape (...), in 0 .. V - 1 (checked on a CPU; a loss of NaN on a GPU).
    bias
        Shape (V,), or None.
    scale
        What logits are multiplied by.
    softcap
        Logits are bent to stay inside ±softcap by a hyperbolic tangent; None does not bend.
    path
        "auto", "triton", "cpu" or "reference", see `basinscope.kernels.paths.resolve`.

    Returns
    -------
    Tensor
        float32 losses of shape (...). Differentiable once, in `hidden`, `weight` and `bias`;
        every token's gradient is weighted by its own upstream gradient. Under autocast, hidden
        states and head are cast as `torch.nn.functional.linear` would cast them.

    Raises
    ------
    ValueError
        If shapes, dtypes or devices do not fit, or on a CPU a target is no token.

    Notes
    -----
    Products of 16-bit inputs are summed in float32; float32 inputs are multiplied in TF32 only if
    ``torch.set_float32_matmul_precision`` allows it. Beside inputs and gradients the memory is
    bounded by `basinscope.kernels.linear_cross_entropy_chunked.STRETCH_BYTES`, whatever the
    number of tokens; the CPU path takes 16-bit inputs in float32, with a copy of the weight.
    On a CPU gradients are formed in the forward pass, for the mean of the losses; any other
    upstream gradient is honoured by a second pass.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    _check(hidden, weight, targets, bias, scale, softcap)
    kernels = _kernels_for(paths.resolve(path, device), hidden.dtype)
    rows = hidden.reshape(-1, hidden.shape[-1])
    flat = targets.reshape(-1).to(torch.int64).contiguous()
    loss: Tensor
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (hidden, weight, bias)
    ):
        loss = _LinearTokenCrossEntropy.apply(rows, weight, bias, flat, scale, softcap, kernels)
    else:
        head = Head(weight.detach(), None if bias is None else bias.detach(), scale, softcap)
        loss = kernels.forward(rows.detach(), head, flat, (False, False, False))[0]
    return loss.view(targets.shape)


class _LinearTokenCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: float,
        softcap: float | None,
        kernels: HeadKernels,
    ) -> Tensor:
        wanted = ctx.needs_input_grad[:3]
        head = Head(weight, bias, scale, softcap)
        loss, kept = kernels.forward(rows, head, targets, wanted)
        ctx.save_for_backward(rows, weight, bias, targets)
        ctx.kept, ctx.factors, ctx.kernels, ctx.wanted = kept, (scale, softcap), kernels, wanted
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, bias, targets = ctx.saved_tensors
        head = Head(weight, bias, *ctx.factors)
        kept, ctx.kept = ctx.kept, Kept(ctx.kept.level)  # gradients are handed out once
        gradients = ctx.kernels.backward(
            rows, head, targets, kept, upstream.contiguous(), ctx.wanted
        )
        return (*gradients, None, None, None, None)


def _check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
) -> None:
    if hidden.ndim == 0 or hidden.dtype not in DTYPES:
        raise ValueError(
            "hidden states must be float32, bfloat16, float16 or float64 of shape (..., width), "
            f"got {hidden.dtype} {tuple(hidden.shape)}"
        )
    width = hidden.shape[-1]
    if weight.ndim != 2 or weight.shape[1] != width:
        raise ValueError(
            f"the weight must have shape (vocabulary, {width}) to fit hidden states of width "
            f"{width}, got {tuple(weight.shape)}"
        )
    vocabulary = weight.shape[0]
    if not (width and vocabulary):
        raise ValueError(f"a head of shape {tuple(weight.shape)} makes no logits")
    if bias is not None and bias.shape != (vocabulary,):
        raise ValueError(f"the bias must have shape ({vocabulary},), got {tuple(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and (tensor.dtype, tensor.device) != (hidden.dtype, hidden.device):
            raise ValueError(
                f"the {name} is {tensor.dtype} on {tensor.device}, hidden states are "
                f"{hidden.dtype} on {hidden.device}; they must agree"
            )
    if not (math.isfinite(scale) and scale != 0):
        raise ValueError(f"scale must be finite and not 0, got {scale}")
    if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
        raise ValueError(f"softcap must be positive and finite, or None; got {softcap}")
    check_targets(targets, hidden.shape[:-1], vocabulary, hidden.device)


def _kernels_for(path: str, dtype: torch.dtype) -> HeadKernels:
    """The fused Triton kernels for 16-bit inputs, else stretches around the library's products.

    Triton multiplies float32 exactly only without tensor cores, where the library is faster.
    """
    if path == "triton" and dtype in (torch.bfloat16, torch.float16):
        from basinscope.kernels.linear_cross_entropy_triton import FusedKernels

        return FusedKernels()
    from basinscope.kernels.linear_cross_entropy_chunked import ChunkedKernels

    return ChunkedKernels(kernels_for(path))
