"""Linear layers of a model take their products where they are fastest."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from basinscope.kernels import linear as kernel

TOKENS = 1024  # of a usual forward pass on a CPU; a layer that is small then is left alone


@contextmanager
def quick_linears(model: nn.Module) -> Iterator[None]:
    """Have a model's linear layers quickened inside the block, and as they were after it."""
    replaced = quicken_linears(model)
    try:
        yield
    finally:
        for module in replaced:
            del vars(module)["forward"]


def quicken_linears(model: nn.Module) -> list[nn.Module]:
    """Let every plain linear layer of a model use `basinscope.kernels.linear`.

    ``nn.Linear`` and the ``Conv1D`` of Hugging Face, in float32 on a CPU. Small layers and those
    that do something else, subclasses included, stay as they are, as do all where torch's own
    products are the fastest.

    Returns
    -------
    list of nn.Module
        The layers whose ``forward`` was replaced now.
    """
    replaced: list[nn.Module] = []
    if not kernel.uses_onednn():
        return replaced
    quick: dict[Any, Callable[..., Tensor]] = {nn.Linear.forward: _linear}
    if (pytorch_utils := sys.modules.get("transformers.pytorch_utils")) is not None:
        quick[pytorch_utils.Conv1D.forward] = _transposed
    for module in model.modules():
        forward = quick.get(type(module).forward)
        own: dict[str, Any] = vars(module)
        if forward is not None and "forward" not in own and _gains(module.weight):
            own["forward"] = partial(forward, module)
            replaced.append(module)
    return replaced


def _gains(weight: Any) -> bool:
    if not isinstance(weight, Tensor) or is_lazy(weight):  # not there, or not yet
        return False
    large = weight.numel() * TOKENS >= kernel.LEAST
    return large and weight.device.type == "cpu" and weight.dtype == torch.float32


def _linear(module: Any, input: Tensor) -> Tensor:  # as nn.Linear calls it
    return kernel.linear(input, module.weight, module.bias)


def _transposed(module: Any, x: Tensor) -> Tensor:
    return kernel.linear(x, module.weight.t(), module.bias)
