"""Harvested sums are those of two plain backward passes per target, however they were gathered."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn

from basinscope.analysis.attribution import AttributionStore
from basinscope.attribution import harvest
from basinscope.attribution.backward import BatchAttribution
from basinscope.attribution.harvest import harvest_attributions
from basinscope.io.attributions import AttributionWriter, StoredAttributions, open_attributions
from basinscope.io.attributions_merge import merge_attributions
from basinscope.io.store import StoreMismatchError
from basinscope.models.canonical import weight_of
from basinscope.models.components import Components, neurons, singular_directions
from tests.conftest import token_rows
from tests.models.test_components import built, random_factors
from tests.models_small import RawModel
from tests.reference import attribution as reference
from tests.reference.attribution import METRICS, Attributions, Map

MODELS = ("gpt2", "gpt_neox", "llama")
KINDS = {
    "neurons": neurons,
    "singular": lambda model: singular_directions(model, rank=3),
    "given": random_factors,
}
TOKENS = (3, 39)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_every_entry_is_the_reference_s(name: str, kind: str, tmp_path: Path) -> None:
    """All metrics and kinds of edges; the last of two batches is short."""
    model, dataset = built(name).double(), token_rows(3, 7, seed=1)
    components = KINDS[kind](model)
    store = harvested(model, dataset, tmp_path, components=components, output_tokens=TOKENS)
    expected = total(
        reference.attributions(model, ids, maps_of(model, components), output_tokens=TOKENS)
        for ids in batches(dataset, 2)
    )
    assert_same(store, expected)
    pairs = {("embed" in edge[1], edge[0].partition("_")[0] == "output") for edge in store.edges}
    assert len(pairs) == 4
    assert store.metadata["batches"] == 2
    assert store.metadata["tokens"] == 21


@pytest.mark.parametrize("name", ["phi3, fused", "falcon, new", "opt", "gemma2"])
def test_other_models(name: str, tmp_path: Path) -> None:
    """Fused gates, a group's rows, hidden states without a batch axis, norms after, soft caps."""
    model, dataset = built(name).double(), token_rows(2, 5, seed=1)
    components = singular_directions(model, rank=2)
    store = harvested(model, dataset, tmp_path, components=components)
    (ids,) = batches(dataset, 2)
    assert_same(store, reference.attributions(model, ids, maps_of(model, components)))


def test_importances_weigh_targets_and_sources(tmp_path: Path) -> None:
    """Some components have none in a batch, or none at all; one layer is left out."""
    model, dataset = built("gpt2").double(), token_rows(4, 6, seed=2)
    components = neurons(model)

    def importance(activations: dict[str, Tensor], input_ids: Tensor) -> dict[str, Tensor]:
        assert not torch.is_grad_enabled()
        assert all(found.shape[:2] == input_ids.shape for found in activations.values())
        found = {n: torch.sigmoid(a + input_ids[..., None] / 40) for n, a in activations.items()}
        found["0.mlp.down"] = found["0.mlp.down"] * (activations["0.mlp.down"] > 0.1)
        found["1.attn.o"][..., 3:9] = 0
        del found["1.mlp.up"]
        return found

    store = harvested(
        model, dataset, tmp_path, components=components, importance=importance,
        importance_threshold=0.6,
    )  # fmt: skip
    parts, counted, active = [], np.zeros(16), np.zeros(16)
    for ids in batches(dataset, 2):
        activations = plain_activations(model, components, ids)
        with torch.no_grad():
            given = importance(activations, ids)
        parts.append(
            reference.attributions(model, ids, maps_of(model, components), importances=given)
        )
        counted += given["0.mlp.down"].sum((0, 1)).numpy()
        active += (given["0.mlp.down"] > 0.6).sum((0, 1)).numpy()
    assert_same(store, total(parts))
    assert np.allclose(store.counts("0.mlp.down", "mean_importance_sum"), counted, rtol=1e-12)
    assert np.array_equal(store.counts("0.mlp.down", "active"), active)
    assert 0 < active.sum() < active.size * 24
    assert (store.counts("1.mlp.up", "mean_importance_sum") == 24).all()
    assert "importance " in store.metadata["importance"]  # its name, and a hash


def test_dead_components_get_and_give_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And cost nothing: a layer that is dead needs no backward pass, a live one none more."""
    model, dataset = built("llama").double(), token_rows(2, 6, seed=2)
    components = neurons(model)
    alive = {name: np.zeros(part.size, np.bool_) for name, part in components.items()}
    alive["1.attn.v"][[2, 5]] = True
    alive["0.glu.down"][:] = True
    passes = count_backward_passes(monkeypatch)
    store = harvested(
        model, dataset, tmp_path, components=components, alive=alive, targets_at_once=8,
        targets=list(components),
    )  # fmt: skip
    assert len(passes) - len(components) == 1 + 2  # 2 targets, 16 targets; to find edges, each one
    (ids,) = batches(dataset, 2)
    masks = {name: torch.from_numpy(mask).double().expand(2, 6, -1) for name, mask in alive.items()}
    expected = reference.attributions(
        model, ids, maps_of(model, components), output=False, importances=masks
    )
    assert_same(store, expected)
    assert expected["attr"]["1.attn.v", "0.glu.down"][[2, 5]].all()
    assert (store.counts("0.attn.q", "mean_importance_sum") == 0).all()
    assert store.counts("1.attn.v", "mean_importance_sum").tolist() == [0, 0, 12, 0, 0, 12, 0, 0]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_caller_s_modes_do_not_matter(mode: Any, tmp_path: Path) -> None:
    model, dataset = built("gpt2").double(), token_rows(2, 5, seed=6)
    with mode():
        components = singular_directions(model, rank=2)
        store = harvested(model, dataset, tmp_path, components=components)
    (ids,) = batches(dataset, 2)
    maps = maps_of(model, singular_directions(model, rank=2))
    assert_same(store, reference.attributions(model, ids, maps))


def test_counts(tmp_path: Path) -> None:
    model, dataset = built("gpt_neox").double(), token_rows(5, 4, seed=3)
    components = neurons(model, ["0.mlp.up", "1.mlp.down"])
    store = harvested(model, dataset, tmp_path, components=components)
    activations = [plain_activations(model, components, ids) for ids in batches(dataset, 2)]
    for name in components:
        squares = sum(found[name].square().sum((0, 1)).numpy() for found in activations)
        assert np.allclose(store.counts(name, "square_sum"), squares, rtol=1e-12)
        assert (store.counts(name, "active") == 20).all()
    ids = torch.cat(batches(dataset, 2))
    occurrences = np.bincount(ids.flatten().numpy(), minlength=40)
    assert np.array_equal(store.counts("embed", "occurrences"), occurrences)
    hidden = model.gpt_neox(ids).last_hidden_state.detach()
    squares = hidden.square().sum((0, 1)).numpy()
    assert np.allclose(store.counts("output", "square_sum"), squares, rtol=1e-10)
    assert np.array_equal(np.asarray(store.unembedding), model.lm_head.weight.float().detach())


def test_attr_of_a_token_is_the_residual_s_through_the_unembedding(tmp_path: Path) -> None:
    model, dataset = built("gpt2").double(), token_rows(3, 6, seed=4)
    store = harvested(model, dataset, tmp_path, output_tokens=TOKENS, targets=["output"])
    weight = model.lm_head.weight.detach().numpy()[list(TOKENS)]
    for source in ("embed", "0.attn.o", "1.mlp.down"):
        residual = np.asarray(store.sums("attr", "output", source))
        token = np.asarray(store.sums("attr", "output_tokens", source))
        assert np.allclose(weight @ residual, token, rtol=1e-9, atol=1e-12)
        for metric in METRICS[1:]:
            residual = np.asarray(store.sums(metric, "output", source))
            token = np.asarray(store.sums(metric, "output_tokens", source))
            assert not np.allclose(weight @ residual, token, rtol=0.1)


def test_attr_abs_is_no_flipped_attr_where_attention_mixes_positions(tmp_path: Path) -> None:
    """A target's positions have both signs."""
    model, dataset = built("llama").double(), token_rows(2, 9, seed=5)
    store = harvested(model, dataset, tmp_path, targets=["1.attn.o"])
    signed = np.asarray(store.sums("attr", "1.attn.o", "1.attn.v"))
    absolute = np.asarray(store.sums("attr_abs", "1.attn.o", "1.attn.v"))
    linked = signed != 0
    assert linked.all()
    assert np.isclose(np.abs(signed), np.abs(absolute), rtol=1e-2)[linked].mean() < 0.2


def test_layers_that_are_left_out_let_gradients_through(tmp_path: Path) -> None:
    model, dataset = built("gpt2").double(), token_rows(2, 5, seed=6)
    components = neurons(model, ["0.attn.v", "1.mlp.up"])
    store = harvested(model, dataset, tmp_path, components=components)
    assert ("1.mlp.up", "0.attn.v") in store.edges
    (ids,) = batches(dataset, 2)
    assert_same(store, reference.attributions(model, ids, maps_of(model, components)))


def test_sources_that_are_left_out_stay_cut(tmp_path: Path) -> None:
    """The others get what they had before; a target without a source costs no backward pass."""
    model, dataset = built("gpt2").double(), token_rows(2, 5, seed=6)
    sources = ["0.attn.v", "0.attn.o"]
    store = harvested(model, dataset, tmp_path, sources=sources)
    (ids,) = batches(dataset, 2)
    expected = reference.attributions(model, ids, maps_of(model, neurons(model)))
    assert_same(
        store,
        {m: {e: v for e, v in found.items() if e[1] in sources} for m, found in expected.items()},
    )
    assert ("1.mlp.up", "0.attn.v") not in store.edges
    assert ("0.mlp.up", "0.attn.o") in store.edges
    assert store.counts("embed", "occurrences").sum() == 10
    with pytest.raises(StoreMismatchError, match=r"edges\.0\.attn\.k -> 0\.attn\.o"):
        harvested(model, dataset, tmp_path)


def test_the_unembedding_is_kept_where_it_can_be_asked_for(tmp_path: Path) -> None:
    model, dataset = built("gpt2"), token_rows(2, 5, seed=6)
    store = harvested(model, dataset, tmp_path, targets=["0.mlp.up"], output_tokens=TOKENS)
    assert store.unembedding is None
    queries = AttributionStore(store.path)
    assert queries.attribution("embed:3", "output:39", "attr_abs") is not None
    assert queries.top_sources("output:3", 2)


def test_sequences_of_one_token() -> None:
    """Attention has one key: queries and keys are connected, and give nothing."""
    model = built("llama").double().requires_grad_(False)
    components, ids = neurons(model), torch.tensor([[3], [7], [3]])
    sums = batch_sums(model, components, ids)
    expected = reference.attributions(model, ids, maps_of(model, components))
    assert_equal(sums, expected)
    assert not sums["attr"]["0.attn.o", "0.attn.k"].any()
    assert sums["attr"]["0.attn.o", "0.attn.v"].any()


def test_layers_of_one_component(tmp_path: Path) -> None:
    model, dataset = built("gpt_neox").double(), token_rows(2, 5, seed=7)
    components = singular_directions(model, rank=1)
    store = harvested(model, dataset, tmp_path, components=components, targets_at_once=5)
    (ids,) = batches(dataset, 2)
    assert_same(store, reference.attributions(model, ids, maps_of(model, components)))


def test_tokens_are_as_many_as_the_embedding_has_rows(tmp_path: Path) -> None:
    model, dataset = built("llama"), token_rows(2, 6, seed=8, vocabulary=47)
    model.resize_token_embeddings(47)
    model = model.double()
    components = neurons(model, ["0.attn.v"])
    store = harvested(model, dataset, tmp_path, components=components)
    assert np.asarray(store.sums("attr", "0.attn.v", "embed")).shape == (8, 47)
    (ids,) = batches(dataset, 2)
    assert_same(store, reference.attributions(model, ids, maps_of(model, components)))
    assert store.counts("embed", "occurrences").sum() == 12


@pytest.mark.parametrize("targets_at_once", [1, 3, 64])
def test_how_many_targets_go_at_once_changes_rounding_only(
    targets_at_once: int, tmp_path: Path
) -> None:
    model, dataset = built("gpt2").double(), token_rows(2, 6, seed=9)
    components = neurons(model, ["0.attn.o", "0.mlp.up", "0.mlp.down", "1.attn.q"])
    store = harvested(
        model, dataset, tmp_path, components=components, targets_at_once=targets_at_once
    )
    (ids,) = batches(dataset, 2)
    assert_same(store, reference.attributions(model, ids, maps_of(model, components)))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_models_agree_to_their_own_precision(
    attention: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Relative to the norm of a pair of layers; near 0 the signs of activations are noise."""
    model, dataset = built("gpt2").to(dtype), token_rows(2, 8, seed=10)
    model.set_attn_implementation(attention)
    store = harvested(model, dataset, tmp_path)
    exact = built("gpt2").to(dtype).double()
    (ids,) = batches(dataset, 2)
    expected = reference.attributions(exact, ids, maps_of(exact, neurons(exact)))
    bound = 1e-5 if dtype == torch.float32 else 0.3
    for edge in store.edges:
        for metric in METRICS:
            got, wanted = np.asarray(store.sums(metric, *edge)), expected[metric][edge]
            error = np.linalg.norm(got - wanted) / np.linalg.norm(wanted)
            assert error <= bound, (metric, edge)


@pytest.mark.filterwarnings("ignore:.*lacks the parts of ranks")
def test_parts_of_ranks_add_up_to_one_run(tmp_path: Path) -> None:
    """Seven batches, the last of them short, over three ranks; and a rank that has none."""
    model, dataset = built("gpt2"), token_rows(13, 5, seed=11)
    components = neurons(model, ["0.attn.o", "1.mlp.up"])
    whole = harvested(model, dataset, tmp_path, components=components)
    parts = []
    for rank in range(3):
        (tmp_path / f"{rank}").mkdir()
        parts.append(
            harvested(
                model, dataset, tmp_path / f"{rank}", components=components, rank=rank,
                world_size=3,
            )
        )  # fmt: skip
    assert [part.metadata["batches"] for part in parts] == [3, 2, 2]
    merged = merge_attributions([part.path for part in parts], tmp_path / "merged.zarr")
    assert merged.metadata["tokens"] == whole.metadata["tokens"] == 65
    for edge in whole.edges:
        for metric in METRICS:
            one, other = (np.asarray(store.sums(metric, *edge)) for store in (whole, merged))
            assert np.abs(one - other).max() <= 1e-12 * np.abs(one).max()
    (tmp_path / "none").mkdir()
    empty = harvested(
        model, dataset, tmp_path / "none", components=components, n_batches=2, rank=2, world_size=3
    )
    assert empty.completed
    assert empty.metadata["tokens"] == 0


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, dataset = built("gpt_neox"), token_rows(9, 6, seed=12)
    components = neurons(model, ["0.attn.o", "0.mlp.down", "1.mlp.up"])
    (tmp_path / "whole").mkdir()
    whole = harvested(model, dataset, tmp_path / "whole", components=components)
    asked_at = iter([False, True, False, False, True])
    add = BatchAttribution.add

    def stopped(self: BatchAttribution, *args: Any) -> None:
        add(self, *args)
        if next(asked_at, False):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(BatchAttribution, "add", stopped)
    for batches_done in (2, 5):
        if batches_done == 2:
            with pytest.raises(KeyboardInterrupt):
                harvested(model, dataset, tmp_path, components=components)
            with pytest.warns(UserWarning, match="holds 2 batches"):
                assert not open_attributions(tmp_path / "attributions.zarr").completed
        else:  # the signal came with the last batch: everything is there
            with pytest.raises(KeyboardInterrupt):
                harvested(model, dataset, tmp_path, components=components)
    again = harvested(model, dataset, tmp_path, components=components)
    assert again.metadata["batches"] == 5
    assert_bitwise(again, whole)


def test_a_run_that_failed_goes_on_from_the_last_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a failing batch had added so far is not in what is saved."""
    model, dataset = built("gpt_neox"), token_rows(9, 6, seed=12)
    components = neurons(model, ["0.attn.o", "0.mlp.down", "1.mlp.up"])
    (tmp_path / "whole").mkdir()
    whole = harvested(model, dataset, tmp_path / "whole", components=components)
    monkeypatch.setattr(harvest, "SAVE_SECONDS", 0.0)
    backward, passes = BatchAttribution._backward, []

    def failing(self: BatchAttribution, *args: Any) -> Any:
        passes.append(args)
        if len(passes) == 10:  # of four for each batch
            raise MemoryError("no memory is left")
        return backward(self, *args)

    monkeypatch.setattr(BatchAttribution, "_backward", failing)
    with pytest.raises(MemoryError):
        harvested(model, dataset, tmp_path, components=components)
    stored = StoredAttributions(tmp_path / "attributions.zarr")
    assert 1 <= stored.metadata["batches"] <= 2
    assert_bitwise(harvested(model, dataset, tmp_path, components=components), whole)


def test_a_complete_store_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, dataset = built("gpt2"), token_rows(3, 5, seed=13)
    components = neurons(model, ["0.mlp.up"])
    harvested(model, dataset, tmp_path, components=components)
    monkeypatch.setattr(AttributionWriter, "save", None)
    harvested(model, dataset, tmp_path, components=components)
    for changed in (
        {"components": singular_directions(model, layers=["0.mlp.up"])},
        {"components": components, "n_batches": 1},
        {"components": components, "output_tokens": [1]},
        {"components": components, "alive": {"0.mlp.up": np.arange(64) > 1}},
        {"components": components, "importance": lambda activations, input_ids: {}},
    ):
        with pytest.raises(StoreMismatchError):
            harvested(model, dataset, tmp_path, **changed)  # type: ignore[arg-type]


def test_another_importance_of_the_same_name_is_another_harvest(tmp_path: Path) -> None:
    model, dataset = built("gpt2"), token_rows(4, 6, seed=2)

    def constant(value: float) -> Any:
        return lambda activations, input_ids: {
            name: torch.full_like(found, value) for name, found in activations.items()
        }

    for _ in range(2):  # the same, made anew
        harvested(model, dataset, tmp_path, importance=constant(1.0))
    with pytest.raises(StoreMismatchError, match=r"importance: the store has .*constant"):
        harvested(model, dataset, tmp_path, importance=constant(0.1))


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails: bool, tmp_path: Path) -> None:
    model, dataset = built("gpt2").train(), token_rows(3, 5, seed=14)
    model.transformer.h[0].eval()
    model.transformer.wpe.requires_grad_(False)
    model.transformer.ln_f.weight.grad = torch.ones(16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    training = {name: module.training for name, module in model.named_modules()}

    def importance(activations: dict[str, Tensor], input_ids: Tensor) -> dict[str, Tensor]:
        if fails and len(input_ids) == 1:  # the second batch
            raise RuntimeError("no importances")
        return {}

    if fails:
        with pytest.raises(RuntimeError, match="no importances"):
            harvested(model, dataset, tmp_path, importance=importance, device="cpu")
    else:
        harvested(model, dataset, tmp_path, importance=importance)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert {name: module.training for name, module in model.named_modules()} == training
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == [
        "transformer.wpe.weight"
    ]
    assert [n for n, p in model.named_parameters() if p.grad is not None] == [
        "transformer.ln_f.weight"
    ]
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch_size": 0}, r"batch_size=0 must be a whole number of at least 1"),
        ({"rank": 2, "world_size": 2}, r"rank=2 is none of world_size=2: ranks are 0 to 1"),
        ({"rank": -1}, r"rank=-1 must be"),
        ({"n_batches": 3}, r"n_batches=3, and dataset has 3 rows: 2 batches of batch_size=2"),
        ({"n_batches": 1.5}, r"n_batches=1\.5 must be a whole number"),
        ({"n_batches": True}, r"n_batches=True must be a whole number"),
        ({"targets_at_once": 0}, r"targets_at_once=0"),
        ({"importance_threshold": -0.1}, r"importance_threshold=-0.1"),
        ({"targets": ["0.mlp.upp"]}, r"targets names 0\.mlp\.upp, .* there are 0\.mlp\.up, output"),
        ({"targets": []}, r"nothing to harvest"),
        ({"sources": ["0.mlp"]}, r"sources names 0\.mlp, .* there are embed, 0\.mlp\.up$"),
        ({"sources": []}, r"none of the targets \(0\.mlp\.up, output\) .* sources \(none\)"),
        ({"sources": "0.mlp.up", "targets": "0.mlp.up"}, r"none of the targets \(0\.mlp\.up\)"),
        ({"output_tokens": [40]}, r"different ids from 0 to 39; got \[40\]"),
        ({"output_tokens": [1, 1]}, r"different ids"),
        ({"alive": {"0.mlp.down": [True]}}, r"alive names '0\.mlp\.down', which is none"),
        ({"alive": {"0.mlp.up": [True]}}, r"must be a bool array of shape \(64,\); got"),
        ({"device": "tpu"}, r"device='tpu' cannot be used here"),
        ({"importance": lambda acts, ids: {"0.mlp": 1}}, r"importance gave '0\.mlp', which is"),
        (
            {"importance": lambda acts, ids: {"0.mlp.up": acts["0.mlp.up"][0]}},
            r"importance gave \(5, 64\) for 0\.mlp\.up, whose activations are \(2, 5, 64\)",
        ),
        (
            {"importance": lambda acts, ids: {"0.mlp.up": acts["0.mlp.up"] / 0}},
            r"importance gave numbers for 0\.mlp\.up that are not finite",
        ),
    ],
)
def test_wrong_input_is_refused(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    model, dataset = built("gpt2"), token_rows(3, 5, seed=15)
    settings = {"components": neurons(model, ["0.mlp.up"]), **changed}
    with pytest.raises(ValueError, match=message):
        harvested(model, dataset, tmp_path, **settings)


@pytest.mark.parametrize(
    ("importance", "message"),
    [
        (3, r"importance must be a function \(activations, input_ids\).*; got int"),
        (lambda acts, ids: 3, "importance gave int: it must give a dict of layer to"),
        (
            lambda acts, ids: {"0.mlp.up": 3},
            r"importance gave int for 0\.mlp\.up: it must be a tensor of shape \(2, 5, 64\)",
        ),
    ],
)
def test_importances_are_tensors(importance: Any, message: str, tmp_path: Path) -> None:
    model = built("gpt2")
    with pytest.raises(TypeError, match=message):
        harvested(
            model, token_rows(3, 5, seed=15), tmp_path,
            components=neurons(model, ["0.mlp.up"]), importance=importance,
        )  # fmt: skip


def test_wrong_components_and_data_are_refused(tmp_path: Path) -> None:
    model, dataset = built("gpt2"), token_rows(3, 5, seed=15)
    parts = neurons(model, ["0.mlp.up"])
    wrong: list[tuple[Any, Any, Any, type[Exception], str]] = [
        (model, dataset, "heads", TypeError, "must be 'neurons', or a dict"),
        (model, dataset, {"0.mlp.up": (1, 2)}, TypeError, r"rank_one_factors\(model"),
        (model, dataset, {"0.mlp.down": parts["0.mlp.up"]}, ValueError, r"are those of '0\.mlp"),
        (model, token_rows(3, 17, 1), parts, ValueError, "have 17 tokens, .* at most 16"),
        (model, token_rows(3, 5, 1, 60), parts, ValueError, "token ids from"),
        (model, [[1, 2]], parts, TypeError, r"must be a datasets\.Dataset"),
        (RawModel(), dataset, parts, ValueError, "RawModel is no Hugging Face model"),
        ("gpt2", dataset, parts, TypeError, r"model must be a torch\.nn\.Module; got str"),
    ]
    for of, data, components, kind, message in wrong:
        with pytest.raises(kind, match=message):
            harvested(of, data, tmp_path, components=components)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tokens", ["12", 3, [1.5], [True], None])
def test_output_tokens_are_a_list_of_ids(tokens: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"output_tokens=.* must be a list of token ids"):
        harvested(built("gpt2"), token_rows(3, 5, seed=15), tmp_path, output_tokens=tokens)


def test_sums_larger_than_the_memory_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harvest, "free_memory", lambda: 9999)
    with pytest.raises(ValueError, match=r"the largest, from embed to 0\.mlp\.up, .* fewer"):
        harvested(built("gpt2"), token_rows(3, 5, seed=15), tmp_path)
    assert not list(tmp_path.iterdir())


def test_activations_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = built("gpt2")
    model.transformer.h[1].mlp.c_fc.weight.data[0, 0] = float("inf")
    with pytest.raises(FloatingPointError, match=r"activations of 1\.mlp\.up are infinite or NaN"):
        harvested(model, token_rows(3, 5, 1), tmp_path, components=neurons(model, ["1.mlp.up"]))


def test_attributions_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    """Activations near 1e20 are numbers, and so are their squares' sums, in float64."""
    model = built("gpt2")
    model.transformer.h[1].mlp.c_fc.weight.data *= 1e20
    parts = neurons(model, ["1.mlp.up", "1.mlp.down"])
    with pytest.raises(FloatingPointError, match=r"from 1\.mlp\.up to 1\.mlp\.down are infinite"):
        harvested(model, token_rows(3, 5, 1), tmp_path, components=parts, targets=["1.mlp.down"])
    assert StoredAttributions(tmp_path / "attributions.zarr").metadata["batches"] == 0


def harvested(
    model: nn.Module, dataset: Dataset, directory: Path, **settings: Any
) -> StoredAttributions:
    settings = {"batch_size": 2, "progress": False, **settings}
    path = harvest_attributions(
        model, dataset, output_path=directory / "attributions.zarr", **settings
    )
    return open_attributions(path)


def batch_sums(
    model: Any, components: Mapping[str, Components], ids: Tensor
) -> dict[str, dict[tuple[str, str], np.ndarray]]:
    """Sums of one batch, of rows too short for a data set."""
    embedding, unembedding, head = harvest._ends(model)
    targets = harvest._targets(components, None, (), unembedding, head)
    attribution = BatchAttribution(
        model, components, targets, sources=["embed", *components], embedding=embedding,
        unembedding=unembedding, importance=None, importance_threshold=0.0, alive={},
        targets_at_once=None, input_ids=ids,
    )  # fmt: skip
    sizes = {name: part.size for name, part in targets.items()} | {"embed": 40}
    sums = {m: {e: np.zeros([sizes[n] for n in e]) for e in attribution.edges} for m in METRICS}
    shapes = harvest._count_shapes(components, targets, 40)
    counts = {n: {c: np.zeros(shape) for c, shape in s.items()} for n, s in shapes.items()}
    attribution.add(ids, sums, counts)
    return sums


def maps_of(model: nn.Module, components: Mapping[str, Components]) -> dict[str, Map]:
    """The same components with all their factors and rows written out."""
    maps = {}
    for name, part in components.items():
        d_out, d_in = weight_of(model, part.linear).shape
        V = torch.eye(d_in, dtype=torch.float64) if part.V is None else part.V
        U = torch.eye(d_out, dtype=torch.float64) if part.U is None else part.U
        rows = range(d_out) if part.linear.rows is None else part.linear.rows.tolist()
        maps[name] = Map(part.linear.module, rows, V.double(), U.double())
    return maps


def plain_activations(
    model: nn.Module, components: Mapping[str, Components], ids: Tensor
) -> dict[str, Tensor]:
    maps = maps_of(model, components)
    with reference.replaced(model, maps) as (splits, _, _), torch.no_grad():
        model(ids)
        found = {name: values for split in splits for name, values in split.activations.items()}
    return {name: found[name] for name in components}


def batches(dataset: Dataset, size: int) -> Sequence[Tensor]:
    return torch.as_tensor(np.asarray(dataset["input_ids"])).split(size)


def total(parts: Any) -> Attributions:
    summed: Attributions = {metric: {} for metric in METRICS}
    for part in parts:
        for metric in METRICS:
            for edge, values in part[metric].items():
                summed[metric][edge] = summed[metric].get(edge, 0) + values
    return summed


def assert_same(store: StoredAttributions, expected: Attributions) -> None:
    found = {m: {e: np.asarray(store.sums(m, *e)) for e in store.edges} for m in METRICS}
    assert_equal(found, expected)


def assert_equal(found: Attributions, expected: Attributions) -> None:
    """The same edges, and every entry to 1e-5, but for what cancels to nothing."""
    for metric in METRICS:
        assert set(found[metric]) == set(expected[metric])
        for edge, values in expected[metric].items():
            noise = 1e-9 * np.abs(values).max()
            assert np.allclose(found[metric][edge], values, rtol=1e-5, atol=noise), (metric, edge)


def assert_bitwise(one: StoredAttributions, other: StoredAttributions) -> None:
    assert one.metadata["tokens"] == other.metadata["tokens"]
    for edge in other.edges:
        for metric in METRICS:
            pair = [np.asarray(store.sums(metric, *edge)) for store in (one, other)]
            assert pair[0].tobytes() == pair[1].tobytes(), (metric, edge)
    for layer, names in other.count_names().items():
        for name in names:
            assert np.array_equal(one.counts(layer, name), other.counts(layer, name))


def count_backward_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    passes: list[int] = []
    own = torch.autograd.grad

    def counted(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("allow_unused"):
            passes.append(1)
        return own(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    return passes
