"""Queries to attributions equal plain numpy on the same sums, and errors say what is valid."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import dask
import numpy as np
import pytest

from basinscope.analysis.attribution import Attribution, AttributionStore
from basinscope.io.attributions import METRICS, AttributionWriter
from tests.io.attributions_random import (
    EDGES,
    SIZES,
    VOCABULARY,
    count_shapes,
    metadata_of,
    new_writer,
    random_sums,
    shapes_of,
    unembedding,
    write_part,
)
from tests.reference.attribution_queries import DenseAttributions

TOKENS = 137
NORMALISATIONS = [
    (), ("source_importance",), ("source_count",), ("target_rms",),
    ("source_importance", "target_rms"), ("target_rms", "source_count"),
]  # fmt: skip


class Made(NamedTuple):
    path: Path
    store: AttributionStore
    dense: DenseAttributions


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    path = tmp_path_factory.mktemp("attributions") / "s.zarr"
    sums, counts = random_sums(np.random.default_rng(5), TOKENS)
    counts["0.mlp.up"]["mean_importance_sum"][[1, 4]] = 0.05 * TOKENS  # dead: threshold 0.1
    counts["0.attn.q"]["active"][2] = 0
    sums_of_silent(sums, "0.attn.q", 2)
    write_part(path, sums, counts, TOKENS)
    dense = DenseAttributions(sums, counts, TOKENS, unembedding(), metadata_of())
    return Made(path, AttributionStore(path), dense)


def sums_of_silent(sums: dict, layer: str, index: int) -> None:
    """A component that is never active gives and gets nothing."""
    for arrays in sums.values():
        for (_, source), values in arrays.items():
            if source == layer:
                values[:, index] = 0


@pytest.mark.parametrize("normalize", NORMALISATIONS)
@pytest.mark.parametrize("metric", METRICS)
def test_every_attribution_is_the_plain_one(made: Made, metric: str, normalize: tuple) -> None:
    expected = made.dense.values(metric, normalize)
    assert len(expected) > 350
    for (source, target), value in list(expected.items())[::3]:
        found = made.store.attribution(source, target, metric, normalize=normalize)
        assert found == pytest.approx(value, rel=1e-12, abs=1e-12), (source, target)


@pytest.mark.parametrize("normalize", NORMALISATIONS)
@pytest.mark.parametrize(
    ("metric", "sign"),
    [p for p in itertools.product(METRICS, ("positive", "negative"))
     if p != ("mean_squared_attr", "negative")],
)  # fmt: skip
def test_the_lists_are_the_sorted_values(
    made: Made, metric: str, sign: str, normalize: tuple
) -> None:
    values = made.dense.values(metric, normalize)
    direction = 1 if sign == "positive" else -1
    tokens = ["output:2", "output:9"]
    for target in ("0.attn.q:3", "1.mlp.up:0", "1.mlp.up:6", *tokens):
        ours = made.store.top_sources(target, 8, sign, metric, normalize=normalize)
        rest = {s: v for (s, t), v in values.items() if t == target and not made.dense.dead(s)}
        assert_sorted(ours, rest, direction, 8)
    for source in ("embed:4", "0.mlp.up:2", "0.attn.q:1"):
        ours = made.store.top_targets(source, 9, sign, metric, normalize=normalize)
        rest = {t: v for (s, t), v in values.items() if s == source and not made.dense.dead(t)}
        assert_sorted(ours, rest, direction, 9)
        without = made.store.top_targets(source, 9, sign, metric, False, normalize=normalize)
        rest = {t: v for t, v in rest.items() if not t.startswith("output")}
        assert_sorted(without, rest, direction, 9)


def assert_sorted(ours: list[Attribution], values: dict, direction: int, k: int) -> None:
    signed = {key: value for key, value in values.items() if value * direction > 0}
    order = sorted(signed, key=lambda key: -signed[key] * direction)[:k]
    assert [entry.key for entry in ours] == order
    np.testing.assert_allclose([e.value for e in ours], [signed[key] for key in order], rtol=1e-11)
    for entry in ours:
        assert entry.key == f"{entry.layer}:{entry.index}"


def test_dead_components_are_in_no_list_and_are_not_had(made: Made) -> None:
    assert not made.store.has_source("0.mlp.up:1")
    assert not made.store.has_target("0.mlp.up:4")
    listed = made.store.top_sources("1.mlp.up:0", 100)
    listed += made.store.top_sources("1.mlp.up:0", 100, "negative")
    keys = {entry.key for entry in listed}
    assert keys.isdisjoint({"0.mlp.up:1", "0.mlp.up:4"})
    assert "0.mlp.up:2" in keys
    assert made.store.attribution("0.mlp.up:1", "1.mlp.up:0") != 0  # asked for by name, it is there


def test_a_merged_part_gives_the_same_means_as_its_sums_say(tmp_path: Path) -> None:
    """Twice the sums over twice the tokens is the same mean."""
    sums, counts = random_sums(np.random.default_rng(0), 50)
    once = AttributionStore(write_part(tmp_path / "a.zarr", sums, counts, 50))
    double = {m: {e: 2 * v for e, v in arrays.items()} for m, arrays in sums.items()}
    twice = {k: {n: 2 * v for n, v in arrays.items()} for k, arrays in counts.items()}
    two = AttributionStore(write_part(tmp_path / "b.zarr", double, twice, 100))
    for target in ("1.mlp.up:3", "output:5"):
        for normalize in NORMALISATIONS:
            assert str(once.top_sources(target, normalize=normalize)) == str(
                two.top_sources(target, normalize=normalize)
            )


def test_ties_are_listed_in_the_order_of_the_model(tmp_path: Path) -> None:
    sums, counts = random_sums(np.random.default_rng(0))
    for arrays in sums.values():
        for values in arrays.values():
            values[:] = 3.0
    counts["0.mlp.up"]["mean_importance_sum"][:] = 100.0
    store = AttributionStore(write_part(tmp_path / "s.zarr", sums, counts))
    keys = [entry.key for entry in store.top_sources("1.mlp.up:0", 14)]
    assert keys == [f"embed:{i}" for i in range(11)] + [f"0.mlp.up:{i}" for i in range(3)]


def test_what_exists_is_had_and_nothing_else(made: Made) -> None:
    store = made.store
    assert store.layers == list(SIZES)
    assert store.has_source("embed:10")
    assert not store.has_source("embed:11")
    assert not store.has_source("output:1")
    assert not store.has_source("7.mlp.up:0")
    assert store.has_target("output:9")
    assert not store.has_target(f"output:{VOCABULARY}")
    assert not store.has_target("embed:1")
    assert not store.has_target("output_tokens:0")
    with pytest.raises(ValueError, match="LAYER:INDEX"):
        store.has_source("0.mlp.up")


@pytest.mark.parametrize("normalize", NORMALISATIONS)
@pytest.mark.parametrize("metric", METRICS)
def test_matrices_are_lazy_and_hold_the_same_values(
    made: Made, metric: str, normalize: tuple
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("computed")

    with dask.config.set(scheduler=refuse):
        lazy = {
            (target, source): made.store.matrix(target, source, metric, normalize=normalize)
            for target, source in EDGES
        }
    values = made.dense.values(metric, normalize)
    for (target, source), matrix in lazy.items():
        assert matrix.dims == ("target", "source")
        assert matrix.name == metric
        if target == "output" or (target == "output_tokens" and metric == "attr"):
            continue
        dense = matrix.compute()
        key = str(dense.target.values[1])
        for s in range(SIZES[source]):
            found = float(dense.sel(source=f"{source}:{s}", target=key))
            assert found == pytest.approx(values[f"{source}:{s}", key], rel=1e-12, abs=1e-12)


def test_rows_of_the_residual_times_the_unembedding_are_the_output_tokens(made: Made) -> None:
    residual = made.store.matrix("output", "0.mlp.up").compute().values
    logits = unembedding().astype(float) @ residual
    for token, source in itertools.product(range(VOCABULARY), range(SIZES["0.mlp.up"])):
        found = made.store.attribution(f"0.mlp.up:{source}", f"output:{token}")
        assert found == pytest.approx(logits[token, source], rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("metric", METRICS)
def test_the_summary_adds_up_magnitudes_per_edge(made: Made, metric: str) -> None:
    summary = made.store.summary(metric)
    assert summary.dims == ("target_layer", "source_layer")
    for target, source in itertools.product(
        summary.target_layer.values, summary.source_layer.values
    ):
        found = float(summary.sel(target_layer=target, source_layer=source))
        if (target, source) in EDGES:
            expected = np.abs(made.dense.sums[metric][target, source]).sum() / TOKENS
            assert found == pytest.approx(expected, rel=1e-12)
        else:
            assert np.isnan(found)


def test_tokens_have_their_text(made: Made) -> None:
    class Decodes:
        def decode(self, ids: list[int]) -> str:
            return f"<{ids[0]}>"

    class Converts:
        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return [f"Ġ{ids[0]}"]

    for tokenizer, text in ((Decodes(), "<{}>"), (Converts(), "Ġ{}")):
        store = AttributionStore(made.path, tokenizer)
        for entry in store.top_sources("1.mlp.up:2", 20) + store.top_targets("embed:3", 20):
            token = text.format(entry.index) if entry.layer in ("embed", "output") else None
            assert entry.token == token
    assert str(Attribution("embed:4", "embed", 4, 0.12345, " the")) == "embed:4 ' the' +0.1235"
    assert str(Attribution("0.mlp.up:4", "0.mlp.up", 4, -2.0)) == "0.mlp.up:4 -2"
    assert "10 edges between 5 layers, 137 tokens" in repr(made.store)


def test_a_source_that_pulls_a_target_to_zero_has_a_negative_attr_abs(tmp_path: Path) -> None:
    """Of y = 3 - 1, |y| = 2: the sources give +3 and -1 to it, so attr_abs has a sign."""
    sums, counts = random_sums(np.random.default_rng(0))
    sums["attr_abs"]["1.mlp.up", "embed"][0, :2] = [3.0, -1.0]
    sums["attr_abs"]["1.mlp.up", "embed"][0, 2:] = 0
    sums["attr_abs"]["1.mlp.up", "0.mlp.up"][0] = 0
    store = AttributionStore(write_part(tmp_path / "s.zarr", sums, counts, tokens=1))
    assert str(store.top_sources("1.mlp.up:0", 5, "negative", "attr_abs")) == "[embed:1 -1]"
    assert str(store.top_sources("1.mlp.up:0", 5, "positive", "attr_abs")) == "[embed:0 +3]"


INTO, KEYS = "1.mlp.up:0", "give LAYER:INDEX"
WRONG: list[tuple[Callable[[AttributionStore], object], str]] = [
    (lambda s: s.attribution("embed", INTO), KEYS),
    (lambda s: s.attribution("embed:-1", INTO), KEYS),
    (lambda s: s.attribution("embed:²", INTO), KEYS),
    (lambda s: s.attribution("embed:11", INTO), "out of range: embed has 0 to 10"),
    (lambda s: s.attribution("0.mlp.upp:1", INTO), "no layer of this store: did you mean 0.mlp"),
    (lambda s: s.attribution("output:1", INTO), "'output' is no source.*sources are embed, 0.attn"),
    (lambda s: s.attribution("embed:1", "embed:2"), "no target.*targets are 0.attn.q, 0.mlp"),
    (lambda s: s.attribution("embed:1", "output_tokens:0"), "'output_tokens' is no target"),
    (lambda s: s.attribution("embed:1", "output:10"), "out of range: output has 0 to 9"),
    (lambda s: s.attribution("0.attn.q:1", INTO), "no edge from 0.attn.q to 1.*from embed, 0.mlp"),
    (lambda s: s.attribution("embed:1", "output:3", "attr_abs"),
     r"attr_abs of output:3 was not harvested.*output_tokens=\[3\].*harvested: 2, 9"),
    (lambda s: s.top_sources("output:3", metric="mean_squared_attr"), r"output_tokens=\[3\]"),
    (lambda s: s.top_sources(INTO, metric="atr"), "metric must be one of attr, attr_abs"),
    (lambda s: s.top_sources(INTO, sign="both"), "sign must be one of positive, negative"),
    (lambda s: s.top_sources(INTO, 0), "k=0: give a whole number of at least 1"),
    (lambda s: s.top_sources(3), "3 is no key: give LAYER:INDEX, such as '0.mlp.up:5'"),
    (lambda s: s.top_targets(None), "None is no key: give LAYER:INDEX"),
    (lambda s: s.has_source(3), "3 is no key"),
    (lambda s: s.token_text(3), "3 is no key"),
    (lambda s: s.matrix(3, "embed"), "3 is no layer of this store: its targets are 0.attn.q"),
    (lambda s: s.matrix("output", 4), "4 is no layer of this store: its sources are embed"),
    (lambda s: s.top_sources(INTO, normalize=3), "normalize must be one of source_imp.*; got 3"),
    (lambda s: s.top_targets("embed:0", True), "k=True"),
    (lambda s: s.top_targets("embed:0", 3, "negative", "mean_squared_attr"), "never negative"),
    (lambda s: s.summary("attr", normalize="rms"), "normalize must be one of source_importance"),
    (lambda s: s.summary("attr", normalize=("source_count", "source_importance")), "takes one of"),
    (lambda s: s.matrix("0.attn.q", "0.mlp.up"), "no edge from 0.mlp.up to 0.attn.q"),
    (lambda s: s.matrix("embed", "0.mlp.up"), "'embed' is no target"),
]  # fmt: skip


@pytest.mark.parametrize(("ask", "said"), WRONG)
def test_what_is_wrong_is_said(
    made: Made, ask: Callable[[AttributionStore], object], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        ask(made.store)


def test_the_number_of_lines_may_be_of_numpy(made: Made) -> None:
    few: Any = np.int64(2)
    assert made.store.top_sources(INTO, few) == made.store.top_sources(INTO, 2)


def test_a_name_is_no_tokenizer(made: Made) -> None:
    with pytest.raises(TypeError, match=r"tokenizer='gpt2' must have decode\(\[id\]\) or"):
        AttributionStore(made.path, "gpt2")


def test_an_unfinished_store_says_how_far_it_is_and_answers(tmp_path: Path) -> None:
    sums, counts = random_sums(np.random.default_rng(0))
    with new_writer(tmp_path / "s.zarr") as writer:
        writer.save(sums, counts, tokens=100, batches_done=5)
        with pytest.warns(UserWarning, match=r"being harvested.*5 batches \(100 tokens\), of 12"):
            store = AttributionStore(tmp_path / "s.zarr")
        expected = sums["attr"]["0.mlp.up", "embed"][2, 1] / 100
        assert store.attribution("embed:1", "0.mlp.up:2") == pytest.approx(expected)
        double = {m: {e: 2 * v for e, v in arrays.items()} for m, arrays in sums.items()}
        writer.save(double, counts, tokens=200, batches_done=10)
        with pytest.raises(FileNotFoundError, match=r"saved anew.*open it again"):
            store.attribution("embed:1", "0.mlp.up:2")


def test_a_store_of_zero_tokens_has_only_zeros(tmp_path: Path) -> None:
    with new_writer(tmp_path / "s.zarr") as writer:
        writer.finish()
    store = AttributionStore(tmp_path / "s.zarr")
    for normalize in NORMALISATIONS:
        assert store.attribution("embed:1", "output:2", normalize=normalize) == 0
    assert store.top_sources("output:2") == []


def test_output_tokens_without_the_residual(tmp_path: Path) -> None:
    """Where only single tokens were harvested, they answer for attr too."""
    sizes = {layer: size for layer, size in SIZES.items() if layer != "output"}
    edges = [edge for edge in EDGES if edge[0] != "output"]
    sums, counts = random_sums(np.random.default_rng(0), 100, edges, sizes)
    with AttributionWriter.create_or_continue(
        tmp_path / "s.zarr",
        metadata=metadata_of(sizes=sizes),
        edges=shapes_of(edges, sizes),
        counts=count_shapes(sizes),
    ) as writer:
        writer.save(sums, counts, tokens=100, batches_done=1)
        writer.finish()
    store = AttributionStore(tmp_path / "s.zarr")
    expected = sums["attr"]["output_tokens", "embed"][1] / 100
    assert store.attribution("embed:4", "output:9") == pytest.approx(expected[4])
    best = store.top_sources("output:9", 3)
    assert best[0].value == max(
        expected.max(), sums["attr"]["output_tokens", "1.mlp.up"][1].max() / 100
    )
    assert store.has_target("output:9")
    assert not store.has_target("output:3")
    with pytest.raises(ValueError, match="output:3 is out of range: output has 2, 9"):
        store.attribution("embed:4", "output:3")
    with pytest.raises(ValueError, match="harvest 'output' among the targets"):
        store.attribution("embed:4", "output:9", normalize="target_rms")
