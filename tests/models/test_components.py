"""Components: they add up to their map, and cutting a model at them changes no number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from basinscope.models.canonical import LinearMap, canonical_maps, weight_of
from basinscope.models.components import (
    Components,
    Decomposition,
    neurons,
    rank_one_factors,
    singular_directions,
)
from basinscope.models.forward import token_logits
from basinscope.models.structure import UnknownStructureError
from tests.models.test_canonical import made
from tests.models_small import tiny_model

IDS = torch.arange(18).view(2, 9)
MODELS = ("gpt2", "gpt_neox", "llama")
FUSED_OR_ODD = ("phi3, fused", "falcon, new", "opt", "gemma2", "falcon, plain")


def random_factors(model: nn.Module, count: int = 3) -> dict[str, Components]:
    generator = torch.Generator().manual_seed(5)
    factors = {}
    for name, linear in canonical_maps(model).items():
        d_out, d_in = weight_of(model, linear).shape
        V = torch.randn(d_in, count, generator=generator)
        factors[name] = (V, torch.randn(count, d_out, generator=generator))
    return rank_one_factors(model, factors)


KINDS: dict[str, Callable[[nn.Module], dict[str, Components]]] = {
    "neurons": neurons,
    "singular": singular_directions,
    "few singular": lambda model: singular_directions(model, rank=3),
    "given": random_factors,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*MODELS, *FUSED_OR_ODD])
def test_cutting_changes_no_number(name: str, kind: str) -> None:
    model = built(name)
    plain = token_logits(model, IDS)
    decomposition = Decomposition(model, KINDS[kind](model))
    with decomposition.cut():
        assert torch.allclose(token_logits(model, IDS), plain, rtol=1e-6, atol=1e-6)
    assert torch.equal(token_logits(model, IDS), plain)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_components_bias_and_remainder_add_up_to_what_a_module_makes(name: str, kind: str) -> None:
    model = built(name).double()
    components = KINDS[kind](model)
    decomposition = Decomposition(model, components)
    with decomposition.cut() as record:
        token_logits(model, IDS)
    for module, made_ in record.leaves.items():
        given = record.inputs[module]
        own: Any = model.get_submodule(module)
        total = torch.zeros_like(made_)
        if own.bias is not None:
            total = total + own.bias
        if decomposition.remainders[module] is not None:
            total = total + given @ decomposition.remainders[module]
        for part in components.values():
            if part.linear.module == module:
                rows = slice(None) if part.linear.rows is None else part.linear.rows
                activations = part.activations(given)
                assert activations.shape[-1] == part.size
                total[..., rows] += activations if part.U is None else activations @ part.U
        assert torch.allclose(total, made_, rtol=1e-10, atol=1e-12)


def test_only_what_components_leave_is_a_remainder() -> None:
    model = built("gpt_neox")
    for full in (neurons(model), singular_directions(model)):
        assert set(Decomposition(model, full).remainders.values()) == {None}
    queries = neurons(model, ["0.attn.q"])
    rest = Decomposition(model, queries).remainders["gpt_neox.layers.0.attention.query_key_value"]
    assert rest is not None
    rows = queries["0.attn.q"].linear.rows
    assert not rest[:, rows].any()
    others = np.setdiff1d(np.arange(48), rows)  # type: ignore[arg-type]
    weight: Any = model.get_submodule("gpt_neox.layers.0.attention.query_key_value").weight
    assert torch.equal(rest[:, others], weight.T[:, others])


def test_neurons_are_a_modules_outputs_without_its_bias() -> None:
    model = built("gpt2")
    components = neurons(model)
    up, down = components["1.mlp.up"], components["1.mlp.down"]
    assert (up.size, down.size) == (64, 16)
    with Decomposition(model, components).cut() as record:
        token_logits(model, IDS)
    mlp: Any = model.get_submodule("transformer.h.1.mlp")
    before = up.activations(record.inputs[up.linear.module]) + mlp.c_fc.bias
    after = down.activations(mlp.act(before)) + mlp.c_proj.bias
    assert torch.allclose(record.leaves[down.linear.module], after, atol=1e-6)


def test_gradients_end_at_the_next_components() -> None:
    """A leaf reaches what comes right after it; what is behind other components it does not."""
    model = built("gpt2")
    with Decomposition(model, neurons(model)).cut() as record:
        token_logits(model, IDS)
    up, down = "transformer.h.0.mlp.c_fc", "transformer.h.0.mlp.c_proj"
    later = record.inputs["transformer.h.1.attn.c_attn"]
    leaves = [record.leaves[up], record.leaves[down]]
    found = torch.autograd.grad(later.sum(), leaves, allow_unused=True, retain_graph=True)
    assert found[0] is None
    assert found[1] is not None
    assert torch.autograd.grad(record.inputs[down].sum(), leaves[0])[0].any()


def test_a_remainder_lets_gradients_through() -> None:
    model = built("gpt2")
    with Decomposition(model, singular_directions(model, rank=2)).cut() as record:
        token_logits(model, IDS)
    later = record.inputs["transformer.h.1.attn.c_attn"]
    leaf = record.leaves["transformer.h.0.mlp.c_fc"]
    assert torch.autograd.grad(later.pow(2).sum(), leaf)[0].any()


def test_singular_directions_are_those_of_the_weight() -> None:
    model = built("llama").double()
    part = singular_directions(model, rank=4)["1.attn.k"]
    weight = weight_of(model, part.linear)
    assert part.V is not None
    assert part.U is not None
    values = torch.linalg.svdvals(weight)
    assert torch.allclose(part.V.norm(dim=0), values[:4])
    assert torch.allclose(part.U @ part.U.T, torch.eye(4, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(weight @ part.V, part.U.T * values[:4] ** 2)
    assert (part.U.gather(1, part.U.abs().argmax(1, keepdim=True)) > 0).all()
    assert singular_directions(model, rank=99)["1.attn.k"].size == min(weight.shape)
    few: Any = np.int64(2)
    assert singular_directions(model, rank=few)["1.attn.k"].size == 2


def test_narrow_weights_have_float32_factors() -> None:
    model = built("gpt_neox").bfloat16()
    for components in (neurons(model), singular_directions(model, rank=3)):
        for part in components.values():
            assert all(t is None or t.dtype == torch.float32 for t in (part.V, part.U))
        with Decomposition(model, components).cut() as record:
            logits = token_logits(model, IDS)
        assert logits.dtype == torch.bfloat16
        assert {leaf.dtype for leaf in record.leaves.values()} == {torch.bfloat16}


def test_a_model_is_restored_after_an_error() -> None:
    model = built("gpt2")
    with pytest.raises(KeyboardInterrupt), Decomposition(model, neurons(model)).cut():
        raise KeyboardInterrupt
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_module_that_runs_twice_is_refused() -> None:
    model = built("gpt2")
    with Decomposition(model, neurons(model)).cut():
        token_logits(model, IDS)
        with pytest.raises(UnknownStructureError, match=r"c_attn runs more than once"):
            token_logits(model, IDS)


def test_layers_that_do_not_exist_are_refused() -> None:
    model = built("gpt2")
    for make in (neurons, singular_directions):
        with pytest.raises(ValueError, match=r"has no 2\.mlp\.up, 0\.glu\.up; it has 0\.attn\.q, "):
            make(model, layers=["2.mlp.up", "0.attn.q", "0.glu.up"])
    assert list(neurons(model, "0.attn.q")) == ["0.attn.q"]


@pytest.mark.parametrize("rank", [0, -1, 2.0, True, "all"])
def test_ranks_are_checked(rank: Any) -> None:
    with pytest.raises(ValueError, match="whole number of at least 1, or None"):
        singular_directions(built("gpt2"), rank=rank)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((16, 3), (4, 64)), r"V must be \(16, C\) and U \(C, 64\), with one C"),
        (((16, 0), (0, 64)), r"with one C of at least 1"),
        (((16,), (3, 64)), r"V must be \(16, C\)"),
        (((64, 3), (3, 16)), r"c_fc maps 16 to 64 numbers there: V must be \(16, C\)"),
    ],
)
def test_shapes_of_given_factors_are_checked(shapes: Any, message: str) -> None:
    factors = {"0.mlp.up": (torch.zeros(shapes[0]), torch.zeros(shapes[1]))}
    with pytest.raises(ValueError, match=message):
        rank_one_factors(built("gpt2"), factors)


def test_given_factors_are_checked_for_names_and_numbers() -> None:
    model = built("gpt2")
    with pytest.raises(ValueError, match=r"has no 5\.mlp\.up; it has"):
        rank_one_factors(model, {"5.mlp.up": (np.zeros((16, 1)), np.zeros((1, 64)))})
    with pytest.raises(ValueError, match=r"0\.mlp\.up hold numbers that are not finite"):
        rank_one_factors(model, {"0.mlp.up": (np.full((16, 1), np.nan), np.zeros((1, 64)))})


def test_components_of_another_model_are_refused() -> None:
    parts = neurons(built("gpt2"), ["0.mlp.up"])
    linear = LinearMap("transformer.h.0.mlp.c_proj", None, True)
    wrong = Components("0.mlp.up", linear, 64, parts["0.mlp.up"].V, None, "given")
    with pytest.raises(ValueError, match=r"make a map of shape \(16, 64\)"):
        Decomposition(built("gpt2"), {"0.mlp.up": wrong})


def built(name: str) -> Any:
    """A model whose weights are large enough for its non-linearities to matter."""
    model = tiny_model(name) if name in MODELS else made(name)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                spread: Tensor = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(0.3 * spread)
    return model
