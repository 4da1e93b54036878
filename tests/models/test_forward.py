"""What the helpers of the forward pass do to a module, and that it is gone afterwards."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from basinscope.models.forward import replaced_forward


class HandsOn(nn.Module):
    """A wrapper that sets attributes on what it wraps, as TransformerLens's bridges do."""

    def __init__(self, wrapped: nn.Module) -> None:
        super().__init__()
        self.add_module("wrapped", wrapped)

    def __setattr__(self, name: str, value: Any) -> None:
        if "wrapped" in self.__dict__.get("_modules", {}):
            setattr(self.wrapped, name, value)
        else:
            super().__setattr__(name, value)

    def forward(self, given: Tensor) -> Tensor:
        return self.wrapped(given)


def test_a_replaced_forward_is_restored() -> None:
    given = torch.ones(2, 3)
    inner = nn.Linear(3, 3)
    for module in (inner, HandsOn(inner)):
        expected = module(given)
        with replaced_forward(module, lambda given: 2 * given):
            assert torch.equal(module(given), 2 * given)
        assert torch.equal(module(given), expected)
        assert "forward" not in vars(module) | vars(inner)


def test_a_forward_of_its_own_comes_back() -> None:
    module = nn.Linear(3, 3)
    module.forward = lambda given: given + 1  # type: ignore[method-assign]
    with replaced_forward(module, lambda given: 2 * given):
        assert float(module(torch.ones(1))) == 2
    assert float(module(torch.ones(1))) == 2
    with replaced_forward(module, lambda given: 5 * given):
        assert float(module(torch.ones(1))) == 5
    assert float(module(torch.zeros(1))) == 1
