"""What the helpers of the forward pass do to a module, and that it is gone afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from basinscope.models.forward import replaced_forward, token_logits
from tests.models_small import tiny_model


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


class Reads(TorchDispatchMode):
    """Counts what would wait for a GPU: values that the host reads."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["gpt_neox", "gpt2", "llama"])
def test_a_forward_pass_reads_nothing_back(kind: str) -> None:
    model, ids = tiny_model(kind), torch.randint(40, (3, 9))
    plain = model(ids, use_cache=False).logits
    with Reads() as reads:
        logits = token_logits(model, ids)
    assert reads.count == 0
    assert torch.equal(logits, plain)


def test_packed_rows_are_still_found_elsewhere() -> None:
    """Also where rows share their positions."""
    model, ids = tiny_model("llama"), torch.randint(40, (3, 9))
    token_logits(model, ids)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    packed = model(ids, position_ids=positions, use_cache=False).logits
    second = model(ids[:, 4:], use_cache=False).logits
    torch.testing.assert_close(packed[:, 4:], second)


def test_packed_rows_are_found_where_a_class_of_one_s_own_packs_all_rows_alike() -> None:
    class Packed(type(tiny_model("llama"))):  # type: ignore[misc]
        def forward(self, input_ids: Tensor, **options: Any) -> Any:
            positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
            return super().forward(input_ids, position_ids=positions, **options)

    whole, ids = tiny_model("llama"), torch.randint(40, (3, 9))
    packed = Packed(whole.config).eval()
    packed.load_state_dict(whole.state_dict())
    second = token_logits(whole, ids[:, 4:])
    torch.testing.assert_close(token_logits(packed, ids)[:, 4:], second)
