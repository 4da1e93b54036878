"""A working copy whose linear layers take their products elsewhere is the same model."""

from __future__ import annotations

import copy
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor, nn

import basinscope
from basinscope.kernels import linear as kernel
from basinscope.models.forward import token_logits
from basinscope.sampling.layers import quick_linears, quicken_linears
from tests.conftest import token_rows
from tests.models_small import VOCABULARY, tiny_model

pytestmark = [
    pytest.mark.skipif(
        not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN"
    ),
    pytest.mark.filterwarnings("ignore:TF32"),  # torch's own, from its switch
]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Have oneDNN take layers of any size, whatever the processor; collect weights it was given."""
    weights: list[tuple[int, ...]] = []
    product = kernel._product

    def noted(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        weights.append(tuple(weight.shape))
        return product(x, weight, bias)

    monkeypatch.setattr(kernel, "_mkl_is_held_back", lambda: True)
    monkeypatch.setattr(kernel, "LEAST", 1)
    monkeypatch.setattr(kernel, "_product", noted)
    return weights


# linear layers of two blocks, and the head (the raw model has a head alone)
@pytest.mark.parametrize(
    ("kind", "layers"),
    [("gpt2", 2 * 4 + 1), ("gpt_neox", 2 * 4 + 1), ("llama", 2 * 7 + 1), ("raw", 1)],
)
def test_logits_and_gradients_are_the_models(
    kind: str, layers: int, made: list[tuple[int, ...]]
) -> None:
    model = tiny_model(kind)
    quick = copy.deepcopy(model)
    quicken_linears(quick)
    quicken_linears(quick)  # a second time changes nothing
    ids = torch.randint(VOCABULARY, (3, 9))
    found = []
    for one in (model, quick):
        logits = token_logits(one, ids)
        logits.square().mean().backward()
        found.append((logits, *(p.grad for p in one.parameters())))
        if one is model:
            assert not made
    assert len(made) == 3 * layers
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-6)


def test_outputs_may_be_changed_in_place(made: list[tuple[int, ...]]) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 4))
    x = torch.randn(2, 5, 6)
    expected = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    quicken_linears(model)
    found = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    assert made
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    model[0](input=x)  # by its name too


@pytest.mark.usefixtures("made")
def test_layers_without_a_weight_of_their_own_stay_as_they_are() -> None:
    bare, lazy = nn.Linear(4, 4), nn.LazyLinear(4)
    bare.weight = None  # type: ignore[assignment]
    quicken_linears(nn.Sequential(bare, lazy))
    assert not any("forward" in vars(module) for module in (bare, lazy))


def test_inside_a_block_only(made: list[tuple[int, ...]]) -> None:
    model = tiny_model("gpt2")
    ids = torch.randint(VOCABULARY, (3, 9))
    with suppress(IndexError), quick_linears(model):
        token_logits(model, ids)
        assert made
        made.clear()
        token_logits(model, torch.full((3, 9), VOCABULARY))  # an unknown id
    assert not any("forward" in vars(module) for module in model.modules())
    token_logits(model, ids)
    assert not made


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.usefixtures("made")
def test_layers_that_do_something_else_stay_as_they_are() -> None:
    replaced = nn.Linear(4, 4)
    replaced.forward = lambda x: x  # type: ignore[method-assign]
    model = nn.Sequential(Doubled(4, 4), nn.Linear(4, 4), replaced)
    x = torch.randn(2, 3, 4)
    before = model(x)
    quicken_linears(model)
    assert ["forward" in vars(module) for module in model] == [False, True, True]
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-6)


def test_nothing_is_replaced_where_torch_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_mkl_is_held_back", lambda: False)
    model = nn.Sequential(nn.Linear(4, 4))
    quicken_linears(model)
    assert "forward" not in vars(model[0])


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox"])
def test_samples_are_the_same(kind: str, made: list[tuple[int, ...]], tmp_path: Path) -> None:
    def run(path: Path) -> xr.DataTree:
        return basinscope.sample(
            tiny_model(kind),
            token_rows(48, 9, seed=1),
            {"first": token_rows(30, 9, seed=2)},
            lr=1e-3,
            n_beta=10.0,
            num_chains=2,
            num_draws=5,
            batch_size=4,
            device="cpu",
            output_path=path,
            progress=False,
        )

    quick = run(tmp_path / "quick.zarr")
    assert made
    with torch.backends.mkldnn.flags(enabled=False):
        plain = run(tmp_path / "plain.zarr")
    assert (quick.attrs["linear_layers"], plain.attrs["linear_layers"]) == ("onednn", "torch")
    for name in plain.data_vars:
        np.testing.assert_allclose(
            quick[name], plain[name], rtol=1e-5, atol=1e-5, err_msg=str(name)
        )
