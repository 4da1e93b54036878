"""A linear layer by oneDNN against float64, and wherever it must be torch's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional

from basinscope.kernels import linear as module
from basinscope.kernels.linear import linear, uses_onednn
from basinscope.kernels.linear_cross_entropy import linear_token_cross_entropy

pytestmark = [
    pytest.mark.skipif(
        not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN"
    ),
    pytest.mark.filterwarnings("ignore:TF32"),  # torch's own, from its switch
]
# (leading dimensions, width, outputs)
SHAPES = [((1, 1), 1, 1), ((7, 5), 3, 2), ((3, 65), 70, 33), ((130,), 128, 257), ((2, 3, 4), 9, 9)]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Have oneDNN take layers of any size, whatever the processor; collect shapes that it made."""
    shapes: list[tuple[int, ...]] = []
    product = module._product

    def noted(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        made = product(x, weight, bias)
        shapes.append(tuple(made.shape))
        return made

    monkeypatch.setattr(module, "_mkl_is_held_back", lambda: True)
    monkeypatch.setattr(module, "LEAST", 1)
    monkeypatch.setattr(module, "_product", noted)
    return shapes


def layer(
    leading: tuple[int, ...], width: int, outputs: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(width * outputs)
    shapes = ((*leading, width), (outputs, width), (outputs,))
    x, weight, bias = (torch.randn(s, generator=generator).to(dtype) for s in shapes)
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("leading", "width", "outputs"), SHAPES, ids=str)
def test_values_and_gradients(
    leading: tuple[int, ...], width: int, outputs: int, biased: bool, taken: list[tuple[int, ...]]
) -> None:
    given = layer(leading, width, outputs)[: 3 if biased else 2]
    wide = [t.detach().double().requires_grad_() for t in given]
    made, right = linear(*given), functional.linear(*wide)
    upstream = torch.randn(made.shape)
    gradients = torch.autograd.grad(made, given, upstream)
    expected = torch.autograd.grad(right, wide, upstream.double())
    for ours, exact in zip((made, *gradients), (right, *expected), strict=True):
        assert ours.dtype == torch.float32
        assert ours.shape == exact.shape
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-6 * width + 2e-5)
    rows = given[0].numel() // width
    assert taken == [(rows, outputs), (rows, width), (outputs, width)]


def test_only_gradients_that_are_wanted_are_made(taken: list[tuple[int, ...]]) -> None:
    x, weight, bias = layer((4, 8), 16, 12)
    linear(x.detach(), weight, bias.detach()).sum().backward()
    assert taken == [(32, 12), (12, 16)]
    taken.clear()
    linear(x, weight.detach(), bias.detach()).sum().backward()
    assert taken == [(32, 12), (32, 16)]
    taken.clear()
    with torch.no_grad():
        assert not linear(x, weight, bias).requires_grad
    assert taken == [(32, 12)]


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_room_for_the_result(
    dtype: torch.dtype, biased: bool, taken: list[tuple[int, ...]]
) -> None:
    x, weight, bias = (t.detach() for t in layer((32,), 16, 12, dtype))
    given = (x, weight, bias) if biased else (x, weight)
    room = torch.full((32, 12), torch.nan, dtype=dtype)
    made = linear(*given, room=room)
    torch.testing.assert_close(made, functional.linear(*given), rtol=1e-5, atol=1e-5)
    by_torch = dtype == torch.float64
    assert taken == ([] if by_torch else [(32, 12)])
    assert (made.data_ptr() == room.data_ptr()) == by_torch


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
def test_a_linear_head_takes_its_logits_from_it(biased: bool, taken: list[tuple[int, ...]]) -> None:
    given = layer((40,), 16, 70)[: 3 if biased else 2]
    targets = torch.arange(40)
    bias = given[2] if biased else None
    losses = linear_token_cross_entropy(given[0], given[1], targets, bias=bias, path="cpu")
    assert taken == [(40, 70)]
    wide = [t.detach().double().requires_grad_() for t in given]
    right = functional.cross_entropy(functional.linear(*wide), targets, reduction="none")
    torch.testing.assert_close(losses.double(), right, rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad(losses.mean(), given)
    for ours, exact in zip(found, torch.autograd.grad(right.mean(), wide), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("taken")
def test_a_frozen_layer_keeps_no_input() -> None:
    kept: list[tuple[int, ...]] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    x, weight, bias = layer((4, 8), 16, 12)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        linear(x, weight.detach(), bias.detach())
        assert kept == [(12, 16)]
        linear(x.detach(), weight.detach(), bias)
        assert kept == [(12, 16)]
        linear(x.detach(), weight, bias)
    assert kept == [(12, 16), (32, 16)]


def test_biases_that_broadcast_and_forward_mode_are_left_to_torch(
    taken: list[tuple[int, ...]],
) -> None:
    x, weight, _ = (t.detach() for t in layer((4, 8), 16, 12))
    for bias in (torch.ones(1), torch.tensor(2.0)):
        assert torch.equal(linear(x, weight, bias), functional.linear(x, weight, bias))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        tangent = forward_ad.unpack_dual(linear(dual, weight)).tangent
    torch.testing.assert_close(tangent, functional.linear(torch.ones_like(x), weight))
    assert not taken


@pytest.mark.usefixtures("taken")
def test_many_gradients_at_once() -> None:
    given = layer((4, 8), 16, 12)
    upstream = torch.randn(3, 4, 8, 12)
    found = torch.autograd.grad(linear(*given), given, upstream, is_grads_batched=True)
    for n, one in enumerate(upstream):
        right = torch.autograd.grad(functional.linear(*given), given, one)
        for ours, theirs in zip(found, right, strict=True):
            torch.testing.assert_close(ours[n], theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("taken")
def test_tensors_of_any_strides() -> None:
    x, weight, _ = layer((6, 10), 24, 36)
    strided = x.detach().transpose(0, 1), weight.detach().t().contiguous().t()
    torch.testing.assert_close(linear(*strided), functional.linear(*strided), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("taken")
def test_second_derivatives() -> None:
    def curvature(layer_of: Callable[..., Tensor]) -> list[Tensor]:
        given = layer((3, 4), 5, 6)
        loss = layer_of(*given).pow(3).sum()
        first = torch.autograd.grad(loss, given, create_graph=True)
        return list(torch.autograd.grad(sum(g.pow(2).sum() for g in first), given))

    for ours, theirs in zip(curvature(linear), curvature(functional.linear), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_left_to_torch(dtype: torch.dtype, taken: list[tuple[int, ...]]) -> None:
    given = layer((4, 8), 16, 12, dtype)
    assert torch.equal(linear(*given), functional.linear(*given))
    assert not taken


def test_autocast_is_left_to_torch(taken: list[tuple[int, ...]]) -> None:
    given = layer((4, 8), 16, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(*given).dtype == torch.bfloat16
    assert not taken


def test_function_transforms_are_left_to_torch(taken: list[tuple[int, ...]]) -> None:
    x, weight, bias = (t.detach() for t in layer((4, 8), 16, 12))

    def loss(weight: Tensor, x: Tensor) -> Tensor:
        return linear(x, weight, bias).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weight, x)
    assert not taken
    for row, gradient in zip(x, per_sample, strict=True):
        leaf = weight.clone().requires_grad_()
        loss(leaf, row).backward()
        torch.testing.assert_close(gradient, leaf.grad, rtol=1e-4, atol=1e-4)


def test_errors_are_torchs_own(taken: list[tuple[int, ...]]) -> None:
    x, weight, _ = layer((4, 8), 16, 12)
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        linear(x, weight[:, :5])
    with pytest.raises(RuntimeError, match="same dtype"):
        linear(x, weight.double())
    assert not taken


def test_small_layers_are_left_to_torch(
    taken: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LEAST", 4 * 8 * 16 * 12 + 1)
    given = layer((4, 8), 16, 12)
    assert torch.equal(linear(*given), functional.linear(*given))
    assert not taken


def test_it_can_be_turned_off(taken: list[tuple[int, ...]]) -> None:
    given = layer((4, 8), 16, 12)
    assert uses_onednn()
    with torch.backends.mkldnn.flags(enabled=False):
        assert not uses_onednn()
        linear(*given)
    assert not taken


def test_empty_input(taken: list[tuple[int, ...]]) -> None:
    _, weight, bias = layer((4, 8), 16, 12)
    assert linear(torch.empty(0, 16), weight, bias).shape == (0, 12)
    assert not taken
