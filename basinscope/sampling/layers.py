"""Linear layers of a working copy take their products where they are fastest."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

from torch import Tensor, nn

from basinscope.kernels.linear import linear, uses_onednn


def quicken_linears(model: nn.Module) -> None:
    """Let every plain linear layer of a model use `basinscope.kernels.linear`, for good.

    ``nn.Linear`` and the ``Conv1D`` of Hugging Face, on a CPU; layers that do something else,
    subclasses included, stay as they are, as do all where torch's own products are the fastest.
    """
    if not uses_onednn():
        return
    conv = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    for module in model.modules():
        own: dict[str, Any] = vars(module)
        elsewhere = any(p.device.type != "cpu" for p in module.parameters(recurse=False))
        if "forward" in own or elsewhere:
            continue
        if type(module).forward is nn.Linear.forward:
            own["forward"] = partial(_linear, module)
        elif conv is not None and type(module).forward is conv.forward:
            own["forward"] = partial(_transposed, module)


def _linear(module: Any, x: Tensor) -> Tensor:
    return linear(x, module.weight, module.bias)


def _transposed(module: Any, x: Tensor) -> Tensor:
    return linear(x, module.weight.t(), module.bias)
