"""The logit lens: identities with the models themselves, float64, laziness and memory."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

from basinscope.analysis import logit_lens
from basinscope.io.activation_store import ActivationWriter, open_activations
from basinscope.lens import LogitLens
from basinscope.models.activation_cache import ActivationCache
from basinscope.models.extraction import ExtractionConfig, extract
from basinscope.models.structure import layer_modules
from basinscope.models.unembedding import Unembedding, find_unembedding
from tests.models.models_lens import VOCABULARY, built, some_ids
from tests.reference import logit_lens as reference

KINDS = ["gpt2", "gpt_neox", "llama", "qwen2", "qwen3", "gemma2", "phi", "opt", "granite", "cohere"]
EVERYTHING = ExtractionConfig(
    resid_in=True,
    resid_mid=True,
    resid_out=True,
    attn_out=True,
    mlp_out=True,
    head_out=True,
    last_layernorm=True,
    logits=True,
    embed=True,
)
EXAMPLES, POSITIONS, HEADS, LAST = 3, 9, 4, 1


@cache
def of(kind: str) -> tuple[nn.Module, ActivationCache, LogitLens]:
    model = built(kind)
    return model, extract(model, some_ids(EXAMPLES, POSITIONS), EVERYTHING), lens_of(model)


def lens_of(model: nn.Module) -> LogitLens:
    return LogitLens.from_model(model)


def rows(function: Any, *arrays: np.ndarray) -> np.ndarray:
    """Apply a function to the vectors along the last axis."""
    outer = arrays[0].shape[:-1]
    flat = [np.broadcast_to(a, (*outer, a.shape[-1])).reshape(-1, a.shape[-1]) for a in arrays]
    return np.stack([function(*vectors) for vectors in zip(*flat, strict=True)]).reshape(*outer, -1)


def no_scheduler(*_: Any, **__: Any) -> None:
    raise AssertionError("building reads nothing")


# What it is


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_stream_gives_the_models_own_logits(kind: str) -> None:
    _, cache, lens = of(kind)
    found = lens.compute(cache, f"resid_out_{LAST}")[f"logit_lens_resid_out_{LAST}"]
    assert found.dims == ("example", "position", "vocab")
    assert found.dtype == np.float32
    logits = cache["logits"].numpy()
    np.testing.assert_allclose(found, logits, atol=1e-4 * max(1, np.abs(logits).max()))


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "llama", "gemma2", "phi", "opt"])
def test_an_earlier_stream_gives_the_logits_of_the_model_cut_there(kind: str) -> None:
    """Its own statistics: those of the last stream would give other logits."""
    _, cache, lens = of(kind)
    found = lens.compute(cache, "resid_out_0")["logit_lens_resid_out_0"]
    model = built(kind)
    layers: Any = model.get_submodule(layer_modules(model)[0].rpartition(".")[0])
    del layers[1:]
    with torch.no_grad():
        cut = model(some_ids(EXAMPLES, POSITIONS), use_cache=False).logits.numpy()
    np.testing.assert_allclose(found, cut, atol=1e-4 * max(1, np.abs(cut).max()))
    same = lens.compute(cache, "resid_in_1")["logit_lens_resid_in_1"]
    np.testing.assert_array_equal(found, same)


@pytest.mark.parametrize("kind", KINDS)
def test_shares_and_the_constant_add_up_to_the_logits(kind: str) -> None:
    _, cache, lens = of(kind)
    arrays = {name: array.numpy() for name, array in cache.items()}
    for layer in range(LAST + 1):  # what is left of attention: the output projection's bias
        arrays[f"attn_out_{layer}"] = arrays[f"attn_out_{layer}"] - arrays[f"head_out_{layer}"].sum(
            2
        )
    keys = ("head_out_L{i}H{j}", "attn_out_{i}", "mlp_out_{i}")
    shares = [share for key in keys for share in lens.compute(arrays, key).data_vars.values()]
    assert len(shares) == (LAST + 1) * (HEADS + 2)
    first = lens.compute(arrays, "resid_in_0", statistics="final")["logit_lens_resid_in_0"]
    total = sum(shares, first).to_numpy() + lens.constant
    if lens.softcap is not None:
        total = lens.softcap * np.tanh(total / lens.softcap)
    logits = cache["logits"].numpy()
    np.testing.assert_allclose(total, logits, atol=1e-4 * max(1, np.abs(logits).max()))


@pytest.mark.parametrize("kind", KINDS)
def test_every_reading_agrees_with_float64(kind: str) -> None:
    model, cache, lens = of(kind)
    found = find_unembedding(model)
    final = cache[f"resid_out_{LAST}"].numpy()
    stream = cache["resid_mid_0"].numpy()
    head = cache["head_out_L1H2"].numpy()
    mid = "resid_mid_0"
    expected = {
        (mid, "auto", True): rows(lambda x: reference.logits(x, found), stream),
        (mid, "final", True): rows(lambda x, f: reference.share(x, f, found), stream, final),
        (mid, "auto", False): rows(
            lambda x: reference.logits(x, found, apply_norm=False), stream
        ),
        ("head_out_L1H2", "auto", True): rows(
            lambda x, f: reference.share(x, f, found), head, final
        ),
        ("head_out_L1H2", "own", True): rows(lambda x: reference.share(x, x, found), head),
        ("head_out_L1H2", "auto", False): found.scale * head @ found.weight.T,
    }  # fmt: skip
    for (name, statistics, apply_norm), values in expected.items():
        made = lens.compute(cache, name, apply_norm=apply_norm, statistics=statistics)  # type: ignore[arg-type]
        atol = 1e-5 * max(1, float(np.abs(values).max()))
        np.testing.assert_allclose(made[f"logit_lens_{name}"], values, atol=atol)


def test_all_heads_of_a_layer_at_once() -> None:
    _, cache, lens = of("gpt2")
    whole = lens.compute(cache, "head_out_{i}")["logit_lens_head_out_1"]
    assert whole.dims == ("example", "position", "head", "vocab")
    one = lens.compute(cache, "head_out_L1H{j}")
    for head in range(HEADS):
        expected = one[f"logit_lens_head_out_L1H{head}"]
        np.testing.assert_allclose(whole.isel(head=head), expected, atol=1e-6)


def test_the_usual_formula_for_an_rms_norm_holds_where_it_is_right() -> None:
    """weight x / sqrt(second moment of the final stream + eps), times the unembedding."""
    model, cache, lens = of("llama")
    weight = model.model.norm.weight.detach()  # type: ignore[union-attr]
    root = torch.sqrt(cache["last_layernorm_second_moment"] + 1e-6)[..., None]
    head: Any = model.lm_head
    for key in (f"resid_out_{LAST}", "head_out_L0H1", "head_out_L1H3"):
        usual = (weight * cache[key] / root) @ head.weight.detach().T
        found = lens.compute(cache, key)[f"logit_lens_{key}"]
        np.testing.assert_allclose(found, usual, atol=1e-5)
    usual = (weight * cache["resid_out_0"] / root) @ head.weight.detach().T
    found = lens.compute(cache, "resid_out_0")["logit_lens_resid_out_0"]
    assert np.abs(found - usual.numpy()).max() > 0.1  # statistics of another stream
    shares = lens.compute(cache, "resid_out_0", statistics="final")["logit_lens_resid_out_0"]
    np.testing.assert_allclose(shares, usual, atol=1e-5)


def test_shares_behind_a_layer_norm_are_linear() -> None:
    """Taking the final stream's mean from every share, as is usual, counts it once for each."""
    model, cache, lens = of("gpt2")
    arrays = {n: a.numpy() for n, a in cache.items() if n.startswith("last_layernorm")}
    heads = cache["head_out_1"].numpy()
    together = lens.compute(arrays | {"attn_out_1": heads.sum(2)}, "attn_out_1")
    one_by_one = lens.compute(cache, "head_out_L1H{j}")
    total = sum(one_by_one.data_vars.values()).to_numpy()  # type: ignore[union-attr]
    np.testing.assert_allclose(total, together["logit_lens_attn_out_1"], atol=1e-5)
    found = find_unembedding(model)
    centred = heads - arrays["last_layernorm_mean"][..., None, None]
    root = np.sqrt(arrays["last_layernorm_variance"] + found.eps)[..., None, None]
    usual = (found.norm_weight * centred / root) @ found.weight.T
    assert np.abs(usual.sum(2) - total).max() > 0.1


# Tokens


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "granite", "phi"])
@pytest.mark.parametrize("key", ["resid_out_1", "head_out_L1H2", "head_out_1"])
def test_directions_are_differences_of_logits(kind: str, key: str) -> None:
    _, cache, lens = of(kind)
    logits = lens.compute(cache, key)[f"logit_lens_{key}"].to_numpy()
    for given in ([(3, 7), (0, 39), (5, 5)], np.array([[3, 7], [0, 39], [5, 5]])):
        found = lens.compute(cache, key, given)[f"logit_lens_{key}"].to_numpy()  # type: ignore[arg-type]
        for example, (first, second) in enumerate(given):
            expected = logits[example, ..., first] - logits[example, ..., second]
            np.testing.assert_allclose(found[example], expected, atol=1e-5)
    mixed = lens.compute(cache, key, [3, (0, 39), (7,)])[f"logit_lens_{key}"].to_numpy()  # type: ignore[list-item]
    np.testing.assert_allclose(mixed[0], logits[0, ..., 3], atol=1e-5)
    np.testing.assert_allclose(mixed[1], logits[1, ..., 0] - logits[1, ..., 39], atol=1e-5)
    np.testing.assert_allclose(mixed[2], logits[2, ..., 7], atol=1e-5)


def test_accuracy_is_the_share_of_examples_at_each_position() -> None:
    _, cache, lens = of("gpt2")
    pairs = [(3, 7), (0, 39), (8, 5)]
    logits = lens.compute(cache, "resid_out_1")["logit_lens_resid_out_1"].to_numpy()
    right = np.array([logits[e, :, a] > logits[e, :, b] for e, (a, b) in enumerate(pairs)])
    found = lens.compute(cache, "resid_out_{i}", pairs, metric="accuracy")
    assert found["logit_lens_resid_out_1"].dims == ("position",)
    np.testing.assert_allclose(found["logit_lens_resid_out_1"], right.mean(0))
    assert 0 < right.mean() < 1


def test_accuracy_sees_what_a_soft_cap_hides() -> None:
    weight = np.array([[1.0], [2.0]], np.float32)
    loud = Unembedding(weight, None, "none", None, None, 0.0, 1.0, 1.0)
    arrays = {"resid_out_0": np.full((1, 1, 1), 1e3, np.float32)}
    lens = LogitLens(loud)
    assert lens.compute(arrays, "resid_out_0", [(1, 0)])["logit_lens_resid_out_0"].item() == 0
    found = lens.compute(arrays, "resid_out_0", [(1, 0)], metric="accuracy")
    assert found["logit_lens_resid_out_0"].item() == 1


def test_probabilities() -> None:
    _, cache, lens = of("gpt2")
    logits = lens.compute(cache, "resid_out_0")["logit_lens_resid_out_0"].to_numpy()
    found = lens.compute(cache, "resid_out_0", apply_softmax=True)["logit_lens_resid_out_0"]
    expected = rows(reference.probabilities, logits.astype(np.float64))
    np.testing.assert_allclose(found, expected, atol=1e-6)


class CountedRows:
    """A weight that notes which rows are read."""

    def __init__(self, weight: np.ndarray) -> None:
        self.values, self.shape, self.read = weight, weight.shape, set[int]()

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        self.read |= set(index.tolist())
        return self.values[index]

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise AssertionError("all rows were read")


@pytest.mark.parametrize("metric", ["logit_diff", "accuracy"])
def test_directions_read_their_rows_only_and_make_nothing_wide(metric: Any) -> None:
    """Logits of all tokens would take 256 MB."""
    vocabulary, width, shape = 50_000, 8, (20, 64)
    counted = CountedRows(np.ones((vocabulary, width), np.float32))
    wide = Unembedding(counted, None, "rms", None, None, 1e-6, None, 1.0)  # type: ignore[arg-type]
    arrays = {
        "head_out_L0H0": np.ones((*shape, width), np.float32),
        "last_layernorm_second_moment": np.ones(shape, np.float32),
    }
    pairs = [(7 * e, 49_999 - e) for e in range(20)]
    lens = LogitLens(wide)
    tracemalloc.start()
    lens.compute(arrays, "head_out_L0H0", pairs, metric=metric)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert counted.read == {token for pair in pairs for token in pair}
    assert peak < 4e6


# Top tokens and measures


@pytest.fixture(params=[(256, 8192), (4, 7)], ids=["one block", "many blocks"])
def small_blocks(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("basinscope.analysis.lens_blocks.ROWS", request.param[0])
    monkeypatch.setattr("basinscope.analysis.lens_blocks.PANEL", request.param[1])


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "phi"])
@pytest.mark.parametrize("k", [1, 5, VOCABULARY])
def test_top_tokens_are_those_of_all_logits(kind: str, k: int) -> None:
    _, cache, lens = of(kind)
    found = lens.top_tokens(cache, "resid_out_{i}", k)
    assert found["token"].dims == ("layer", "example", "position", "k")
    assert found["layer"].values.tolist() == [0, 1]
    for layer in range(LAST + 1):
        key = f"resid_out_{layer}"
        logits = lens.compute(cache, key)[f"logit_lens_{key}"].to_numpy()
        part = found.sel(layer=layer)
        np.testing.assert_allclose(part["logit"], -np.sort(-logits)[..., :k], atol=1e-5)
        own = np.take_along_axis(logits, part["token"].to_numpy(), -1)
        np.testing.assert_allclose(own, part["logit"], atol=1e-5)
        shares = rows(reference.probabilities, logits.astype(np.float64))
        expected = np.take_along_axis(shares, part["token"].to_numpy(), -1)
        np.testing.assert_allclose(part["probability"], expected, atol=1e-6)


@pytest.mark.usefixtures("small_blocks")
def test_equal_logits_are_in_the_order_of_their_ids() -> None:
    weight = np.zeros((30, 2), np.float32)
    weight[[4, 11, 12, 25]] = 1
    plain = Unembedding(weight, None, "none", None, None, 0.0, None, 1.0)
    arrays = {"resid_out_0": np.ones((1, 1, 2), np.float32)}
    found = LogitLens(plain).top_tokens(arrays, "resid_out_0", 6)
    assert found["token"].values.ravel().tolist() == [4, 11, 12, 25, 0, 1]


def test_shares_have_top_tokens_but_no_probabilities() -> None:
    _, cache, lens = of("gpt2")
    found = lens.top_tokens(cache, "head_out_L{i}H{j}", 2)
    assert set(found.data_vars) == {"token", "logit"}
    assert found["component"].values.tolist()[:5] == [
        *(f"head_out_L0H{head}" for head in range(HEADS)),
        "head_out_L1H0",
    ]
    logits = lens.compute(cache, "head_out_L1H2")["logit_lens_head_out_L1H2"]
    top = found.sel(component="head_out_L1H2")["token"].isel(k=0)
    np.testing.assert_array_equal(top, logits.argmax("vocab"))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "granite", "phi"])
def test_measures_agree_with_float64(kind: str) -> None:
    model, cache, lens = of(kind)
    unembedding = find_unembedding(model)
    found = lens.measures(cache)
    assert found["entropy"].dims == ("layer", "example", "position")
    assert found["rank"].attrs["units"] == "1"
    ids = some_ids(EXAMPLES, POSITIONS).numpy()
    last = rows(lambda x: reference.logits(x, unembedding), cache["resid_out_1"].numpy())
    layer = rows(lambda x: reference.logits(x, unembedding), cache["resid_out_0"].numpy())
    for example in range(EXAMPLES):
        for position in range(POSITIONS):
            target = ids[example, position + 1] if position + 1 < POSITIONS else 0
            at = (example, position)
            for number, logits in enumerate((layer, last)):
                expected = reference.measures(logits[at], last[at], target)
                part = found.isel(layer=number, example=example, position=position)
                values = [float(part[name]) for name in logit_lens.MEASURES]
                if position + 1 == POSITIONS:
                    assert np.isnan(values[2:]).all()
                    expected, values = expected[:2], values[:2]  # type: ignore[assignment]
                np.testing.assert_allclose(values, expected, atol=2e-5)
    np.testing.assert_array_equal(found["kl_to_final"].sel(layer=1), 0)


def test_the_token_that_follows_is_told_by_the_position() -> None:
    model, cache, lens = of("gpt2")
    ids = some_ids(EXAMPLES, POSITIONS)
    whole = lens.measures(cache)
    config = replace(EVERYTHING, target_token_positions=[2, 8, 5])
    some = lens.measures(extract(model, ids, config))
    np.testing.assert_allclose(
        some["cross_entropy"], whole["cross_entropy"][..., [2, 8, 5]], atol=1e-5
    )
    plain = {n: a.numpy() for n, a in cache.items() if n.startswith("resid_out")}
    given = lens.measures(plain, input_ids=ids.numpy())
    np.testing.assert_allclose(given["rank"], whole["rank"])
    targets = np.full((EXAMPLES, POSITIONS), -1)
    targets[1, 4] = 17
    chosen = lens.measures(plain, targets=targets)["cross_entropy"].sel(layer=0)
    logits = lens.compute(plain, "resid_out_0")["logit_lens_resid_out_0"][1, 4].astype(float)
    expected = -np.log(reference.probabilities(logits.to_numpy())[17])
    assert float(chosen[1, 4]) == pytest.approx(expected, abs=1e-5)
    assert int(chosen.notnull().sum()) == 1
    assert set(lens.measures(plain).data_vars) == {"entropy", "kl_to_final"}
    averaged = extract(model, ids, replace(EVERYTHING, average=True))
    assert lens.measures(averaged)["rank"].isnull().all()


def test_measures_of_other_streams_and_without_the_last() -> None:
    _, cache, lens = of("gpt2")
    before = lens.measures(cache, "resid_in_{i}")
    assert before["layer"].values.tolist() == [0, 1]
    after = lens.measures(cache).sel(layer=0)
    np.testing.assert_allclose(before["kl_to_final"].sel(layer=1), after["kl_to_final"])
    dataset = cache.to_dataset().drop_vars("resid_out_1")
    with pytest.warns(UserWarning, match="kl_to_final is left out: it needs resid_out_1; extract"):
        found = lens.measures(dataset)
    assert set(found.data_vars) == {"entropy", "cross_entropy", "rank"}
    np.testing.assert_allclose(found["entropy"].sel(layer=0), after["entropy"])
    with pytest.raises(ValueError, match="mlp_out_0 is no residual stream"):
        lens.measures(cache, "mlp_out_{i}")


def test_the_last_layer_is_the_models_not_the_highest_that_is_there() -> None:
    model, cache, lens = of("gpt2")
    assert lens.num_layers == find_unembedding(model).num_layers == 2
    whole = lens.measures(cache)["kl_to_final"]
    streams = {name: cache[name].numpy() for name in ("resid_out_0", "resid_out_1")}
    np.testing.assert_allclose(lens.measures(streams)["kl_to_final"], whole, atol=1e-6)
    unnamed = cache.to_dataset()[["resid_out_0"]].drop_attrs()
    for some in ({"resid_out_0": streams["resid_out_0"]}, unnamed):
        with pytest.warns(UserWarning, match="kl_to_final is left out: it needs resid_out_1; extr"):
            assert set(lens.measures(some).data_vars) == {"entropy"}
    unknown = LogitLens(replace(find_unembedding(model), num_layers=None))
    with pytest.warns(UserWarning, match="kl_to_final is left out: .* how many layers the model"):
        assert set(unknown.measures(streams).data_vars) == {"entropy"}
    np.testing.assert_allclose(unknown.measures(cache)["kl_to_final"], whole)


@pytest.mark.parametrize("where", ["beside the unembedding", "beside the activations"])
def test_a_stored_lens_knows_how_many_layers_its_model_has(where: str, tmp_path: Path) -> None:
    found = find_unembedding(of("gpt2")[0])
    unembedding = {name: v for name, v in vars(found).items() if v is not None}
    attrs: dict[str, Any] = {}
    if where == "beside the activations":
        attrs = {"model": {"num_layers": unembedding.pop("num_layers")}}
    stream = np.ones((2, 3, 32), np.float32)
    with ActivationWriter.create_or_continue(
        tmp_path / "s.zarr",
        variables={"resid_out_0": (("example", "position", "d_model"), (3, 32), "float32")},
        num_examples=2,
        attrs=attrs,
        coords={},
        unembedding=unembedding,
    ) as writer:
        writer.append({"resid_out_0": stream})
        writer.finish()
    lens = LogitLens.from_store(tmp_path / "s.zarr")
    assert lens.num_layers == 2
    with pytest.warns(UserWarning, match="it needs resid_out_1; extract it too"):
        assert set(lens.measures({"resid_out_0": stream}).data_vars) == {"entropy"}


def test_what_is_not_finite_stays_where_it_is() -> None:
    _, cache, lens = of("gpt2")
    dataset = cache.to_dataset().copy(deep=True)
    dataset["resid_out_0"][1, 3, 0] = np.nan
    top, measured = lens.top_tokens(dataset, "resid_out_0", 2), lens.measures(dataset)
    assert top["token"].isel(layer=0, example=1, position=3).values.tolist() == [-1, -1]
    good = lens.top_tokens(cache, "resid_out_0", 2)
    assert int((top["token"] != good["token"]).sum()) == 2
    assert measured["entropy"].isnull().sum("layer").sum() == 2  # both layers of that position


@pytest.mark.parametrize("key", ["resid_out_0", "head_out_L0H1", "head_out_0"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("lazy", [False, True])
def test_accuracy_counts_what_is_not_finite_neither_as_right_nor_as_wrong(
    key: str, bad: float, lazy: bool
) -> None:
    _, cache, lens = of("gpt2")
    dataset = cache.to_dataset().copy(deep=True)
    dataset["resid_out_0"][1, 3, 0] = dataset["head_out_0"][1, 3, 1, 0] = bad
    given = dataset.chunk({"example": 1}) if lazy else dataset
    both = [[(3, 7)] * EXAMPLES, [(7, 3)] * EXAMPLES]
    name = f"logit_lens_{key}"
    forth, back = (lens.compute(given, key, p, metric="accuracy")[name].compute() for p in both)
    good = lens.compute(cache, key, both[0], metric="accuracy")[name]
    for found in (forth, back):
        assert found.dtype == np.float32
        assert np.isnan(found.isel(position=3)).sum() == 1
        assert np.isnan(found).sum() == 1
    known = forth.notnull()
    np.testing.assert_array_equal(forth.where(known), good.where(known))
    np.testing.assert_allclose((forth + back).to_numpy()[known], 1)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_shares_of_a_stream_that_is_not_finite_are_not_known(bad: float) -> None:
    _, cache, lens = of("llama")
    dataset = cache.to_dataset().copy(deep=True)
    dataset["last_layernorm_second_moment"][1, 3] = bad
    name = "logit_lens_mlp_out_0"
    shares = lens.compute(dataset, "mlp_out_0")[name]
    assert np.isnan(shares[1, 3]).all()
    assert int(np.isnan(shares).sum()) == VOCABULARY
    right = lens.compute(dataset, "mlp_out_0", [(3, 7)] * EXAMPLES, metric="accuracy")[name]
    assert np.flatnonzero(np.isnan(right)).tolist() == [3]
    assert lens.top_tokens(dataset, "mlp_out_0", 1)["token"][0, 1, 3].item() == -1


# Tuned lenses


def test_translators_are_of_the_stream_that_enters_their_layer() -> None:
    model, cache, _ = of("gpt2")
    rng = np.random.default_rng(0)
    width = 32
    translators = {
        layer: (0.1 * rng.normal(size=(width, width)), rng.normal(size=width)) for layer in (0, 1)
    }
    unembedding = find_unembedding(model)
    tuned = LogitLens(unembedding, translators=translators)
    for key, layer in (("resid_in_0", 0), ("resid_in_1", 1), ("resid_out_0", 1)):
        matrix, offset = translators[layer]
        expected = rows(
            lambda x, a=matrix, b=offset: reference.logits(x + a @ x + b, unembedding),
            cache[key].numpy().astype(float),
        )
        found = tuned.compute(cache, key)[f"logit_lens_{key}"]
        np.testing.assert_allclose(found, expected, atol=1e-4)
    last = tuned.compute(cache, "resid_out_1")["logit_lens_resid_out_1"]
    np.testing.assert_allclose(last, cache["logits"], atol=1e-4)
    np.testing.assert_allclose(tuned.measures(cache)["kl_to_final"].sel(layer=1), 0)
    for key in ("head_out_L0H0", "resid_mid_0", "embed"):
        with pytest.raises(ValueError, match=rf"not {key}: use a lens without translators"):
            tuned.compute(cache, key)
    with pytest.raises(ValueError, match="resid_in_0: use a lens without"):
        tuned.compute(cache, "resid_in_0", statistics="final")


def test_a_tuned_lens_from_its_files(tmp_path: Path) -> None:
    model, cache, lens = of("gpt2")
    zero = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))
    for parameter in zero.parameters():
        nn.init.zeros_(parameter)
    torch.save(zero.state_dict(), tmp_path / "params.pt")
    (tmp_path / "config.json").write_text('{"base_model_name_or_path": "any", "d_model": 32}')
    tuned = LogitLens.from_tuned_lens(tmp_path, model)
    assert "tuned for 2 layers" in repr(tuned)
    xr.testing.assert_allclose(
        tuned.compute(cache, "resid_out_{i}"), lens.compute(cache, "resid_out_{i}")
    )
    (tmp_path / "config.json").write_text('{"base_model_name_or_path": "any", "d_model": 64}')
    with pytest.raises(ValueError, match=r"d_model=64 in config\.json; the model's is 32"):
        LogitLens.from_tuned_lens(tmp_path, model)


# Laziness, memory, stores


def test_building_reads_nothing_and_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    _, cache, lens = of("gpt2")
    monkeypatch.setattr("basinscope.analysis.logit_lens.BLOCK_BYTES", 4 * VOCABULARY * 4)
    lazy = cache.to_dataset().chunk({"example": 2})
    pairs = [(3, 7), (0, 39), (8, 5)]
    calls: list[Any] = [
        lambda a: lens.compute(a, "resid_out_{i}"),
        lambda a: lens.compute(a, "head_out_{i}"),
        lambda a: lens.compute(a, "head_out_L{i}H{j}", pairs),
        lambda a: lens.compute(a, "resid_out_{i}", pairs, metric="accuracy"),
        lambda a: lens.compute(a, "resid_out_0", apply_softmax=True),
        lambda a: lens.top_tokens(a, "mlp_out_{i}", 3),
        lambda a: lens.measures(a),
    ]
    for call in calls:
        with dask.config.set(scheduler=no_scheduler):
            built = call(lazy)
            call(xr.DataTree(lazy))
        assert all(v.chunks is not None for v in built.data_vars.values())
        xr.testing.assert_allclose(built.compute(), call(cache), atol=1e-5)
    logits = lens.compute(lazy, "resid_out_0")["logit_lens_resid_out_0"]
    assert max(logits.chunksizes["example"]) == 1
    assert max(logits.chunksizes["position"]) == 4  # rows in a block, as set above


@pytest.fixture(scope="module")
def wide_store(tmp_path_factory: Any) -> Path:
    """Activations whose logits would take 205 MB a layer, with their unembedding."""
    path = tmp_path_factory.mktemp("wide") / "activations.zarr"
    rng = np.random.default_rng(0)
    examples, positions, width, vocabulary = 32, 32, 8, 50_000
    names = ["resid_out_0", "resid_out_1"]
    hidden = ("example", "position", "d_model")
    with ActivationWriter.create_or_continue(
        path,
        variables={
            **{name: (hidden, (positions, width), "float32") for name in names},
            "input_ids": (("example", "token"), (positions,), "int64"),
        },
        num_examples=examples,
        attrs={"model": {"name_or_path": "wide", "num_layers": 2}},
        coords={"position": np.arange(positions)},
        unembedding={
            "weight": rng.normal(size=(vocabulary, width)).astype(np.float32),
            "norm_weight": rng.normal(size=width).astype(np.float32),
            "norm": "rms",
            "eps": 1e-5,
            "softcap": None,
            "scale": 0.5,
        },
        chunk_bytes=2**13,
    ) as writer:
        values = rng.normal(size=(2, examples, positions, width)).astype(np.float32)
        ids = rng.integers(vocabulary, size=(examples, positions))
        writer.append({**dict(zip(names, values, strict=True)), "input_ids": ids})
        writer.finish()
    return path


def test_a_store_is_read_block_by_block(wide_store: Path) -> None:
    lens = LogitLens.from_store(wide_store)
    assert (lens.vocab_size, lens.d_model, lens.scale) == (50_000, 8, 0.5)
    tracemalloc.start()
    with dask.config.set(scheduler="synchronous"):
        top = lens.top_tokens(wide_store, "resid_out_{i}", 3).compute()
        measured = lens.measures(wide_store).compute()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6e7
    dataset = open_activations(wide_store).to_dataset().isel(example=[5])
    whole = lens.compute(dataset, "resid_out_0")["logit_lens_resid_out_0"].compute()
    np.testing.assert_array_equal(top["token"].sel(layer=0)[5, :, 0], whole.argmax("vocab")[0])
    probability = rows(reference.probabilities, whole.to_numpy().astype(float))
    entropy = -(probability * np.log(probability)).sum(-1)
    np.testing.assert_allclose(measured["entropy"].sel(layer=0)[5], entropy[0], atol=1e-5)


def test_directions_in_a_store_read_few_chunks_of_its_weight(
    wide_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lens = LogitLens.from_store(wide_store)

    def never(lens: LogitLens) -> None:
        raise AssertionError("all rows were read")

    monkeypatch.setattr(logit_lens.LogitLens, "_all_rows", never)
    pairs = [(e, 49_000 + e) for e in range(32)]
    lens.compute(wide_store, "resid_out_0", pairs).compute()
    with pytest.raises(AssertionError, match="all rows"):
        lens.compute(wide_store, "resid_out_0").compute()


def test_a_stored_lens_is_the_models_and_takes_no_torch(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    from basinscope.extraction import extract_dataset

    model, _, lens = of("phi")
    ids = datasets.Dataset.from_dict({"input_ids": some_ids(EXAMPLES, POSITIONS).tolist()})
    path = tmp_path / "phi.zarr"
    extract_dataset(model, ids, EVERYTHING, output=path)
    stored = LogitLens.from_store(path)
    assert open_activations(path)["unembedding"].attrs["num_layers"] == stored.num_layers == 2
    for key in ("resid_out_{i}", "head_out_L{i}H{j}"):
        found = stored.compute(path, key).compute()
        xr.testing.assert_allclose(found, lens.compute(path, key).compute(), atol=1e-6)
    np.testing.assert_allclose(stored.constant, lens.constant)
    code = f"""
import sys
from basinscope.lens import LogitLens
lens = LogitLens.from_store({str(path)!r})
lens.measures({str(path)!r}).compute()
assert not {{"torch", "transformers"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_model_by_its_folder(tmp_path: Path) -> None:
    model, cache, _ = of("llama")
    model.save_pretrained(tmp_path / "small")  # type: ignore[operator]
    lens = LogitLens.from_model_name(tmp_path / "small")
    assert lens.model_name == str(tmp_path / "small")
    lens.model_name = None
    found = lens.compute(cache, "resid_out_1")["logit_lens_resid_out_1"]
    np.testing.assert_allclose(found, cache["logits"], atol=1e-4)


# Errors


def test_keys_that_are_not_there() -> None:
    _, cache, lens = of("gpt2")
    message = r"no activations fit 'resid_outt_\{i\}'; there are .*resid_out_\{i\}.*; did you mean"
    with pytest.raises(KeyError, match=message):
        lens.compute(cache, "resid_outt_{i}")
    with pytest.raises(KeyError, match="fit 'head_out_L1H7'"):
        lens.compute(cache, "head_out_L1H7")
    with pytest.raises(KeyError, match=r"logits has axes \('example', 'position', 'vocab'\)"):
        lens.compute(cache, "logits")


@pytest.mark.parametrize(
    ("directions", "options", "message"),
    [
        ([1, 2], {}, "there are 2 token_directions and 3 examples"),
        ([1, 2, 40], {}, r"token_directions\[2\] has id 40, outside the vocabulary of 40"),
        ([1, (2, -1), 4], {}, r"token_directions\[1\] has id -1, outside"),
        ([1, (2, 3, 4), 4], {}, r"token_directions\[1\] is \(2, 3, 4\): give a token id or a pair"),
        ([1, 2.5, 4], {}, r"token_directions\[1\] is 2.5"),
        ([1, 2, 3], {"metric": "accuracy"}, r"token_directions\[0\] is one token: .* pairs"),
        (5, {}, "token_directions=5: give a token id, or a pair of them, for each example"),
        (None, {"metric": "accuracy"}, "metric='accuracy' needs token_directions: .* pair"),
        ([1, 2, 3], {"metric": "loss"}, "metric='loss': give 'logit_diff' or 'accuracy'"),
        ([1, 2, 3], {"apply_softmax": True}, "apply_softmax needs the logits of all tokens"),
        (None, {"statistics": "mine"}, "statistics='mine': give 'auto', 'own' or 'final'"),
    ],
)
def test_what_cannot_be_asked(directions: Any, options: Any, message: str) -> None:
    _, cache, lens = of("gpt2")
    with pytest.raises(ValueError, match=message):
        lens.compute(cache, "resid_out_{i}", directions, **options)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"input_ids": some_ids()[0]}, r"input_ids are int64 of shape \(9,\): give whole numbers"),
        ({"input_ids": some_ids().float()}, "input_ids are float32 of shape"),
        ({"targets": np.full((3, 9), 1.7)}, "targets are float64 of shape"),
    ],
)
def test_what_are_no_token_ids(given: Any, message: str) -> None:
    _, cache, lens = of("gpt2")
    with pytest.raises(ValueError, match=message):
        lens.measures(cache, **given)


def test_what_does_not_belong_together() -> None:
    _, cache, lens = of("gpt2")
    _, _, other = of("llama")
    arrays = {"resid_out_0": np.zeros((1, 1, 31), np.float32)}
    with pytest.raises(ValueError, match="resid_out_0 is 31 wide, and the unembedding 32"):
        lens.compute(arrays, "resid_out_0")
    dataset = cache.to_dataset().drop_vars(["last_layernorm_variance"])
    with pytest.raises(ValueError, match="last_layernorm_variance is missing: extract"):
        lens.compute(dataset, "head_out_L0H1")
    lens.compute(dataset, "head_out_L0H1", apply_norm=False)
    with pytest.raises(ValueError, match="last_layernorm_second_moment is missing"):
        other.compute({"mlp_out_0": np.zeros((1, 1, 32))}, "mlp_out_0")
    odd = cache.to_dataset().rename(mlp_out_0="attn_in_0")
    with pytest.raises(ValueError, match="attn_in_0 is neither a residual stream nor added to one"):
        lens.compute(odd, "attn_in_{i}")
    shares = lens.compute(odd, "attn_in_0", statistics="final")["logit_lens_attn_in_0"]
    np.testing.assert_array_equal(shares, lens.compute(cache, "mlp_out_0")["logit_lens_mlp_out_0"])
    named = LogitLens(find_unembedding(built("gpt2")), model_name="here/gpt2")
    dataset.attrs["model"] = {"name_or_path": "openai/gpt2"}
    named.compute(dataset, "resid_out_0")
    dataset.attrs["model"] = {"name_or_path": "GPT2LMHeadModel", "class": "GPT2LMHeadModel"}
    named.compute(dataset, "resid_out_0")  # it had no name
    dataset.attrs["model"] = {"name_or_path": "openai/gpt2-large"}
    with pytest.raises(ValueError, match=r"of 'openai/gpt2-large', and the lens is of 'here/gpt2'"):
        named.compute(dataset, "resid_out_0")
    named.model_name = None
    named.compute(dataset, "resid_out_0")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_in_a_dict(dtype: torch.dtype) -> None:
    _, cache, lens = of("gpt2")
    kept = {name: cache[name] for name in ("resid_out_0", "resid_out_1", "input_ids")}
    given = {n: v.to(dtype).requires_grad_() if n != "input_ids" else v for n, v in kept.items()}
    rounded = {name: values.detach() for name, values in given.items()}
    expected = {n: v.float().numpy() if n != "input_ids" else v.numpy() for n, v in rounded.items()}
    xr.testing.assert_identical(
        lens.compute(given, "resid_out_{i}"), lens.compute(expected, "resid_out_{i}")
    )
    xr.testing.assert_identical(lens.measures(given), lens.measures(expected))


def test_a_narrower_embedding_in_a_dict_leaves_the_rest_as_it_is() -> None:
    _, cache, lens = of("gpt2")
    kept = {name: cache[name] for name in ("embed", "resid_out_0", "resid_out_1", "input_ids")}
    narrow = {**kept, "embed": kept["embed"][..., :3]}
    xr.testing.assert_identical(
        lens.compute(narrow, "resid_out_{i}"), lens.compute(kept, "resid_out_{i}")
    )


def test_no_examples_give_no_logits() -> None:
    _, cache, lens = of("gpt2")
    nothing = cache.to_dataset().isel(example=slice(0)).chunk()
    logits = lens.compute(nothing, "resid_out_0").compute()["logit_lens_resid_out_0"]
    assert logits.shape == (0, POSITIONS, VOCABULARY)
    directed = lens.compute(nothing, "head_out_L0H1", token_directions=[]).compute()
    assert directed["logit_lens_head_out_L0H1"].shape == (0, POSITIONS)
    assert lens.top_tokens(nothing, "resid_out_0", 2).compute()["token"].shape[1] == 0
    assert lens.measures(nothing).compute()["entropy"].shape[1] == 0


def test_a_model_in_other_words_is_compared_with_nothing() -> None:
    _, cache, _ = of("gpt2")
    lens = LogitLens(find_unembedding(built("gpt2")), model_name="gpt2")
    dataset = cache.to_dataset().assign_attrs(model="the small one")
    assert lens.compute(dataset, "resid_out_0").sizes["vocab"] == VOCABULARY


def test_other_things_than_activations(tmp_path: Path) -> None:
    _, cache, lens = of("gpt2")
    with pytest.raises(TypeError, match="activations are a list: give an ActivationCache"):
        lens.compute([], "resid_out_0")
    with pytest.raises(ValueError, match=r"resid_out_0 has shape \(3, 32\); its axes must be"):
        lens.compute({"resid_out_0": np.zeros((3, 32))}, "resid_out_0")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        lens.compute(tmp_path / "nowhere", "resid_out_0")
    for count in (41, 2.5, True, "3", None):
        with pytest.raises(ValueError, match=f"k={count!r}: give 1 to 40, a whole number"):
            lens.top_tokens(cache, "resid_out_0", count)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="target_key=3: give the name of an activation such as"):
        lens.top_tokens(cache, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="outside the vocabulary of 40"):
        lens.measures(cache, targets=np.full((EXAMPLES, POSITIONS), 40))
    with pytest.raises(ValueError, match=r"targets have shape \(1, 2\)"):
        lens.measures(cache, targets=[[1, 2]])
    with pytest.raises(ValueError, match="give input_ids or targets, not both"):
        lens.measures(cache, targets=[[1, 2]], input_ids=[[1, 2]])
    with pytest.raises(ValueError, match="input_ids have 1 examples, the activations 3"):
        lens.measures(cache, input_ids=[[1, 2]])
    with pytest.raises(ValueError, match=r"translator of layer 0 has shapes \(2, 2\)"):
        LogitLens(find_unembedding(built("gpt2")), translators={0: (np.eye(2), np.ones(2))})
    with pytest.raises(ValueError, match="it is no stored unembedding"):
        LogitLens(xr.Dataset({"weight": (("vocab", "d_model"), np.ones((2, 2)))}))
