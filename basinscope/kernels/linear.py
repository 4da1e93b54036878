"""A linear layer in float32 on a CPU, by the faster of two libraries that torch brings.

Torch gives float32 products to MKL, and 16-bit ones to oneDNN. On AMD's processors MKL leaves
AVX-512 unused, oneDNN does not, and takes about half the time where AVX-512 is wider than AVX2. It
adds up a row in one go, where MKL adds up parts first, so its rounding errors are about twice as
large.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional
from torch.overrides import has_torch_function

LEAST = 2**24  # multiplications that gain more than a call from Python costs


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, room: Tensor | None = None
) -> Tensor:
    """Give x W^T + b, as ``torch.nn.functional.linear`` does.

    Parameters
    ----------
    x
        Shape (..., D), of any strides.
    weight
        Shape (V, D), of any strides.
    bias
        Shape (V,), or None.
    room
        Memory of shape (N, V) that the result of an x of shape (N, D) may use, where no gradients
        are recorded. Torch's own products take it; oneDNN's cannot.

    Returns
    -------
    Tensor
        Shape (..., V); differentiable. By oneDNN where :func:`uses_onednn` and the layer is a large
        one in float32 on a CPU, else by torch itself: under autocast, ``torch.func``,
        ``torch.compile`` and forward-mode differentiation too.
    """
    if x.numel() * weight.shape[0] < LEAST or not _fits(x, weight, bias):
        if room is None:
            return functional.linear(x, weight, bias)
        if bias is None:
            return torch.mm(x, weight.t(), out=room)
        return torch.addmm(bias, x, weight.t(), out=room)
    rows = x.reshape(-1, x.shape[-1])
    make = _Linear.apply if torch.is_grad_enabled() else _product
    made: Tensor = make(rows, weight, bias)
    # a view that autograd knows of, so that whoever is given it may change it in place
    return made.view(*x.shape[:-1], len(weight))


def uses_onednn() -> bool:
    """Whether oneDNN takes large layers on this machine.

    ``torch.backends.mkldnn.flags(enabled=False)`` keeps it from that.
    """
    return _mkl_is_held_back() and torch._C._get_mkldnn_enabled()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        of_x, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            linear(upstream, weight.t()) if of_x else None,
            linear(upstream.t(), x.t()) if of_weight else None,
            upstream.sum(0) if of_bias else None,
        )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    made: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return made


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    given = (x, weight) if bias is None else (x, weight, bias)
    return (
        uses_onednn()
        and all(t.dtype == torch.float32 and t.device.type == "cpu" for t in given)
        and all(t.layout == torch.strided for t in given)
        and x.ndim > 1
        and weight.ndim == 2
        and x.shape[-1] == weight.shape[1]
        and (bias is None or bias.shape == weight.shape[:1])
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and forward_ad._current_level < 0
        and not torch._C._are_functorch_transforms_active()
        and not has_torch_function(given)
    )


@functools.cache
def _mkl_is_held_back() -> bool:
    if not hasattr(torch.cpu, "get_capabilities"):  # an older torch
        return False
    return (
        str(torch.cpu.get_capabilities().get("cpu_name")).startswith("AMD")
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
