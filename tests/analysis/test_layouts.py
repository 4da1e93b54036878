"""However losses lie, on disk or in Dask, and in little memory: estimates are the oracles'."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

import basinscope
from basinscope.analysis.diagnostics import diagnose_trace
from basinscope.analysis.rise import Batches, error_of_rise
from tests.analysis.stores_random import random_tree, write_devinterp_tree, write_tree
from tests.reference import analysis as reference

ONE = 2e-6  # some roundings of a float32, for what reaches 1
SUMS = 1e-12  # of float64, for losses below 10
KINDS = [*itertools.product(["token", "average", "sequence"], ["correlation", "covariance"])]
MOST_SEQUENCES = 5

Compute = Callable[[int | None], Any]  # from a memory limit to a lazy estimate


@dataclass(frozen=True)
class Layout:
    """How a tree is kept while it is analysed."""

    storage: str
    chunks: tuple[int, int, int, int]
    in_a_shard: tuple[int, int, int, int]

    @contextmanager
    def keep(self, tree: xr.DataTree) -> Iterator[xr.DataTree | Path]:
        shards = tuple(n * m for n, m in zip(self.chunks, self.in_a_shard, strict=True))
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "samples.zarr"
            if self.storage == "memory":
                yield tree
            elif self.storage == "dask":
                names = {"draw": 1, "step": 1, "token_pos": 3}
                at = {dim: names.get(str(dim), 2) for dim in tree.dataset.dims if dim != "token"}
                chunks = {dim: self.chunks[axis] for dim, axis in (at | {"chain": 0}).items()}
                yield xr.DataTree(tree.dataset.chunk(chunks))
            elif self.storage == "chunks":
                yield write_tree(tree, path, chunks=self.chunks)
            elif self.storage == "shards":
                yield write_tree(tree, path, chunks=self.chunks, shards=shards)
            elif self.storage == "opened by xarray":
                write_tree(tree, path, chunks=self.chunks)
                yield xr.open_datatree(path, engine="zarr", consolidated=False)
            else:
                yield write_devinterp_tree(tree, path)


layouts = st.builds(
    Layout,
    st.sampled_from(["memory", "dask", "chunks", "shards", "opened by xarray", "devinterp"]),
    st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 3), st.integers(1, 4)),
    st.tuples(*[st.integers(1, 3)] * 4),
)
stores = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 99),
        "chains": st.integers(1, 3),
        "draws": st.integers(1, 8),
        "tokens": st.integers(1, 4),
        "dtype": st.sampled_from(["float32", "float32", "float64", "float16"]),
        "fluctuation": st.sampled_from([0.3, 0.01]),
        "observables": st.fixed_dictionaries(
            {"b": st.integers(1, 3), "a": st.integers(1, 2)},
        ),
    }
)
row_choices = st.one_of(st.none(), st.lists(st.integers(0, MOST_SEQUENCES - 1), min_size=1))


@settings(max_examples=30, deadline=None)
@given(stores, layouts, st.integers(1, 9), st.integers(0, 3), st.booleans(), st.booleans())
def test_llc_of_any_layout(
    sizes: dict[str, Any],
    layout: Layout,
    steps: int,
    burn_in: int,
    init_losses: bool,
    tight: bool,
) -> None:
    tree = random_tree(**sizes, steps=steps, init_losses=init_losses)
    if burn_in >= steps:
        with pytest.raises(ValueError, match=f"burn_in={burn_in}"):
            basinscope.compute_llc(tree, burn_in=burn_in)
        return
    got = estimate(tree, layout, tight, basinscope.compute_llc, burn_in=burn_in)
    losses, init = (tree[name].to_numpy() for name in ("sampling_loss_micro", "init_loss"))
    sampled = (losses[:, burn_in:], init, 10.0)
    per_chain = reference.llc_per_chain(*sampled)
    batches = Batches(np.arange(burn_in, steps), 32)
    judged = diagnose_trace(
        list(got["loss_trace"].to_numpy())
    )  # ranks: another rounding is another R-hat
    expected = {
        "loss_trace": reference.loss_trace(sampled[0]),
        "init_loss": init.astype(np.float64).mean(),
        "llc_per_chain": per_chain,
        "llc_mean": per_chain.mean(),
        "llc_std": per_chain.std(),
        "llc_scalar": reference.llc_scalar(*sampled),
        "llc_token": reference.llc_token(*sampled),
        "llc_running": reference.llc_running(*sampled),
        "llc_mcse": 10.0 * error_of_rise(list(got["loss_trace"].to_numpy()), batches),
        "n_beta": 10.0,
    }
    for name in sizes["observables"]:
        observed = tree[f"loss_{name}"].to_numpy()
        before = tree[f"init_loss_{name}"].to_numpy() if init_losses else observed[:, 0]
        kept = observed[:, burn_in:]  # a draw a step
        found = reference.llc_observable(kept, before, 10.0) if kept.size else np.nan
        expected[f"llc_{name}"] = found
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=0, atol=100 * SUMS, err_msg=name)
    for name in ("rhat", "ess_bulk"):
        np.testing.assert_array_equal(got[name], judged[name], err_msg=name)
    assert got["chain"].values.tolist() == list(range(sizes["chains"]))
    assert got["step"].values.tolist() == list(range(burn_in, steps))


@settings(max_examples=25, deadline=None)
@given(stores, layouts, st.sampled_from(["stack", "mean"]), row_choices, row_choices, st.booleans())
def test_influence_of_any_layout(
    sizes: dict[str, Any],
    layout: Layout,
    chains: str,
    choice_1: list[int] | None,
    choice_2: list[int] | None,
    tight: bool,
) -> None:
    tree = random_tree(**sizes)
    options: dict[str, Any] = {"reduce_chain_dimension_method": chains}
    traces = reference.samples(joined(tree), chains)
    if traces.shape[2] < 2:
        with pytest.raises(ValueError, match="two or more"):
            basinscope.compute_bif(tree, **options)
        return
    rows = [selected(choice, len(traces)) for choice in (choice_1, choice_2)]
    for number, choice in enumerate((choice_1, choice_2)):
        if choice is not None:
            options[f"batch_index_range_{number + 1}"] = rows[number]
    got = {
        kind: estimate(tree, layout, tight, basinscope.compute_bif, **options, **arguments(*kind))
        for kind in KINDS
    }
    for kind, influence in got.items():
        expected = ORACLES[kind[0]](traces[rows[0]], traces[rows[1]], kind[1])
        bound = ONE * influence_scale(traces, kind[1])
        np.testing.assert_allclose(influence["influences"], expected, rtol=0, atol=bound)
        assert influence["batch_1"].values.tolist() == rows[0]
        assert influence["batch_2"].values.tolist() == rows[1]
        ids = np.concatenate([tree[f"input_ids_{name}"] for name in "ab"])
        np.testing.assert_array_equal(influence["input_ids"], ids)


@settings(max_examples=30, deadline=None)
@given(
    stores,
    layouts,
    st.sampled_from(["stack", "mean"]),
    st.booleans(),
    row_choices,
    st.one_of(st.none(), st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), min_size=1)),
    st.integers(1, 6),
    st.booleans(),
)
def test_partners_of_any_layout(
    sizes: dict[str, Any],
    layout: Layout,
    chains: str,
    covariance: bool,
    choice: list[int] | None,
    asked: list[tuple[int, int]] | None,
    top_k: int,
    tight: bool,
) -> None:
    tree = random_tree(**{**sizes, "draws": sizes["draws"] + 1})
    traces = reference.samples(joined(tree), chains)
    sequences, tokens, _ = traces.shape
    candidates = list(dict.fromkeys(selected(choice, sequences)))
    queries = [*itertools.product(range(sequences), range(tokens))]
    options: dict[str, Any] = {"top_k": top_k, "compute_covariance": covariance}
    if choice is not None:
        options["batch_index_range_2"] = candidates
    if asked is not None:
        queries = [(sequence % sequences, token % tokens) for sequence, token in asked]
        options["queries"] = [(sequence, token + 1) for sequence, token in queries]
    options["reduce_chain_dimension_method"] = chains
    got = estimate(tree, layout, tight, basinscope.compute_bif, **options)
    require_partners(got, traces, queries, candidates, top_k, covariance)


def test_partners_among_many_candidates() -> None:
    tree = random_tree(3, observables={"a": 50, "b": 20}, tokens=6, draws=10)
    traces = reference.samples(joined(tree), "stack")
    queries = [(60, 0), (0, 5), (33, 2)]
    got = basinscope.compute_bif(
        tree, top_k=3, queries=[(sequence, token + 1) for sequence, token in queries]
    )
    require_partners(got.compute(), traces, queries, list(range(70)), 3, covariance=False)


@settings(max_examples=20, deadline=None)
@given(
    stores,
    st.lists(layouts, min_size=3, max_size=3),
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 6)), min_size=2, max_size=2),
    st.booleans(),
    st.booleans(),
)
def test_susceptibilities_of_any_layout(
    sizes: dict[str, Any],
    chosen: list[Layout],
    restricted: list[tuple[int, int]],
    with_task: bool,
    tight: bool,
) -> None:
    trees = {"full": random_tree(**sizes)}
    for number, (chains, draws) in enumerate(restricted):
        changed = {"seed": sizes["seed"] + 1 + number, "chains": chains, "draws": draws}
        trees[f"l{number}"] = random_tree(**{**sizes, **changed})
    names = ["a", "b"] if with_task else ["a"]
    first, second, third = (
        layout.keep(tree) for layout, tree in zip(chosen, trees.values(), strict=True)
    )
    with first as full, second as l0, third as l1:
        stored = {"full": full, "l0": l0, "l1": l1}
        got = limited(
            lambda limit: basinscope.compute_susceptibilities(
                stored, "b", include_sampling_task=with_task, memory_limit=limit
            ),
            tight,
        )
    sus = got["susceptibilities"]["sus"]
    assert got["susceptibilities"]["wr"].values.tolist() == ["l0", "l1"]
    for column, name in enumerate(["l0", "l1"]):
        expected = [susceptibility(trees["full"], trees[name], "b", obs).ravel() for obs in names]
        np.testing.assert_allclose(
            sus[:, column], np.concatenate(expected), rtol=0, atol=100 * SUMS
        )
    ids = np.concatenate([trees["full"][f"input_ids_{name}"].to_numpy().ravel() for name in names])
    np.testing.assert_array_equal(got["context"]["input_ids"], ids)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("chains", ["stack", "mean"])
@pytest.mark.parametrize("kind", KINDS, ids=" ".join)
def test_a_constant_trace_is_nan_for_itself_only(
    kind: tuple[str, str], chains: str, dtype: str, tmp_path: Path
) -> None:
    tree = tree_with_constants(dtype, chains)
    traces = reference.samples(joined(tree), chains)
    expected = ORACLES[kind[0]](traces, traces, kind[1])
    assert np.isnan(expected).any() == (kind[1] == "correlation")
    assert np.isfinite(expected).any()
    stored = write_tree(tree, tmp_path / "s.zarr", chunks=(1, 4, 2, 3))
    for samples in (tree, stored):
        options = {"reduce_chain_dimension_method": chains, **arguments(*kind)}
        got = basinscope.compute_bif(samples, **options)["influences"].to_numpy()
        bound = ONE * influence_scale(traces, kind[1])
        np.testing.assert_allclose(got, expected, rtol=0, atol=bound)  # NaN where NaN is


@pytest.mark.parametrize("chains", ["stack", "mean"])
def test_a_constant_trace_has_no_partner_and_is_none(chains: str) -> None:
    tree = tree_with_constants("float32", chains)
    traces = reference.samples(joined(tree), chains)
    queries = [*itertools.product(range(len(traces)), range(traces.shape[1]))]
    got = basinscope.compute_bif(tree, top_k=7, reduce_chain_dimension_method=chains).compute()
    require_partners(got, traces, queries, list(range(len(traces))), 7, covariance=False)
    at_constant = (got["query_batch"] == 0) & (got["query_target_position"] == 3)
    assert got["influences"].where(at_constant, drop=True).isnull().all()


@pytest.mark.parametrize("shortened", ["chains", "draws", "tokens", "sequences", "steps", "none"])
def test_one_of_anything_works(shortened: str) -> None:
    sizes: dict[str, Any] = {"chains": 2, "draws": 5, "tokens": 3, "steps": 6}
    sizes["observables"] = {"a": 2}
    if shortened == "sequences":
        sizes |= {"observables": {"a": 1}, "batch": 1}
    elif shortened != "none":
        sizes[shortened] = 1
    tree = random_tree(1, **sizes)
    llc = basinscope.compute_llc(tree).compute()
    assert np.isfinite(llc["llc_mean"])
    traces = reference.samples(joined(tree), "stack")
    for kind in KINDS:
        got = basinscope.compute_bif(tree, **arguments(*kind))["influences"]
        expected = ORACLES[kind[0]](traces, traces, kind[1])
        bound = ONE * influence_scale(traces, kind[1])
        np.testing.assert_allclose(got, expected, rtol=0, atol=bound)
    got = basinscope.compute_susceptibilities(
        {"full": tree, "l0": tree}, "a", include_sampling_task=True
    )
    expected = susceptibility(tree, tree, "a", "a").ravel()
    found = got["susceptibilities"]["sus"].to_numpy()[:, 0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=100 * SUMS)


@pytest.mark.parametrize(("chains", "method"), [(1, "stack"), (1, "mean"), (3, "mean")])
def test_influence_of_one_sample_is_refused(chains: int, method: str) -> None:
    tree = random_tree(1, chains=chains, draws=1)
    for extra in ({}, {"top_k": 1}, *(arguments(*kind) for kind in KINDS)):
        with pytest.raises(ValueError, match="two or more"):
            basinscope.compute_bif(tree, reduce_chain_dimension_method=method, **extra)


def test_a_limit_that_nothing_fits_is_refused_with_one_that_does() -> None:
    tree = random_tree(1)
    computes: list[Compute] = [
        lambda limit: basinscope.compute_llc(tree, memory_limit=limit),
        lambda limit: basinscope.compute_bif(tree, memory_limit=limit),
        lambda limit: basinscope.compute_bif(tree, top_k=2, memory_limit=limit),
        lambda limit: basinscope.compute_susceptibilities(
            {"full": tree, "l0": tree}, "a", memory_limit=limit
        ),
    ]
    for compute in computes:
        with pytest.raises(ValueError, match=r"memory_limit is 1 B: give memory_limit=\d+"):
            compute(1)
        limited(compute, tight=True)


def joined(tree: xr.DataTree) -> np.ndarray:
    """Losses on all observables, sorted: (chain, draw, sequence, token)."""
    names = sorted(str(name) for name in tree.data_vars if str(name).startswith("loss_"))
    return np.concatenate([tree[name].to_numpy() for name in names], axis=2)


def susceptibility(full: xr.DataTree, tree: xr.DataTree, task: str, obs_id: str) -> np.ndarray:
    losses = [run[f"loss_{name}"].to_numpy() for run in (tree, full) for name in (task, obs_id)]
    return reference.susceptibility(*losses, full["init_loss"].to_numpy())


def tree_with_constants(dtype: str, chains: str) -> xr.DataTree:
    """Let token 3 of the first sequence and all of "b" never change, nor differ where stacked."""
    sizes = {"chains": 3, "draws": 7, "tokens": 3, "observables": {"a": 2, "b": 4}}
    tree = random_tree(5, **sizes, dtype=dtype)
    origin = slice(1) if chains == "stack" else slice(None)
    for name, place in (("a", (0, 2)), ("b", (slice(None), slice(None)))):
        losses = tree[f"loss_{name}"].to_numpy().copy()
        losses[(slice(None), slice(None), *place)] = losses[(origin, slice(1), *place)]
        tree[f"loss_{name}"] = tree[f"loss_{name}"].copy(data=losses)
    return tree


ORACLES: Mapping[str, Callable[[np.ndarray, np.ndarray, str], np.ndarray]] = {
    "token": reference.token_blocks,
    "average": reference.averaged_blocks,
    "sequence": reference.sequence_influence,
}


def arguments(level: str, kind: str) -> dict[str, Any]:
    return {
        "correlation_method": "sequence" if level == "sequence" else "token",
        "average_tokenwise_bif": level == "average",
        "compute_covariance": kind == "covariance",
    }


def selected(choice: list[int] | None, sequences: int) -> list[int]:
    return list(range(sequences)) if choice is None else [row % sequences for row in choice]


def influence_scale(traces: np.ndarray, kind: str) -> float:
    """What an influence can reach: a correlation 1, a covariance the largest variance."""
    return 1.0 if kind == "correlation" else float(traces.var(2, ddof=1).max())


def require_partners(
    got: xr.Dataset,
    traces: np.ndarray,
    queries: list[tuple[int, int]],
    candidates: list[int],
    top_k: int,
    covariance: bool,
) -> None:
    """Require the oracle's influences at every rank, at places that have them, each place once."""
    tokens = traces.shape[1]
    kind = "covariance" if covariance else "correlation"
    block = reference.token_blocks(traces[[q[0] for q in queries]], traces[candidates], kind)
    zero = ONE * influence_scale(traces, kind)
    bound: dict[str, Any] = {"rtol": 0, "atol": zero}
    assert got["influences"].dims == ("sign", "query", "rank")
    assert got["influences"].shape == (2, len(queries), top_k)
    assert got["query_batch"].values.tolist() == [sequence for sequence, _ in queries]
    assert got["query_target_position"].values.tolist() == [token + 1 for _, token in queries]
    for number, (sequence, token) in enumerate(queries):
        influences = block[number, :, token].ravel()
        itself = candidates.index(sequence) * tokens + token if sequence in candidates else -1
        for sign, name in ((1, "positive"), (-1, "negative")):
            found = got.sel(sign=name).isel(query=number)
            wanted = reference.top_partners(influences, itself, top_k, sign)
            expected = np.where(wanted < 0, np.nan, influences[wanted])
            # an influence of zero may come out as a rounding of either sign: not compared
            np.testing.assert_allclose(
                *(np.where(np.abs(v) > zero, v, np.nan) for v in (found["influences"], expected)),
                **bound,
            )
            there = ~found["influences"].isnull().to_numpy()
            assert ((found["partner_batch"].to_numpy() >= 0) == there).all()
            assert ((found["partner_target_position"].to_numpy() >= 1) == there).all()
            rows = [candidates.index(row) for row in found["partner_batch"].to_numpy()[there]]
            places = (
                np.array(rows, int) * tokens
                + found["partner_target_position"].to_numpy()[there]
                - 1
            )
            assert len(set(places)) == len(places)
            assert itself not in places
            np.testing.assert_allclose(found["influences"][there], influences[places], **bound)


def estimate(
    tree: xr.DataTree, layout: Layout, tight: bool, compute: Callable[..., Any], **options: Any
) -> Any:
    with layout.keep(tree) as samples:
        return limited(lambda limit: compute(samples, **options, memory_limit=limit), tight)


def limited(compute: Compute, tight: bool) -> Any:
    """Compute under about the smallest memory limit that is not refused, or under none."""
    limit = 256
    while tight:
        try:
            return compute(limit).compute()
        except ValueError as error:
            if "memory_limit" not in str(error):
                raise
            limit = limit * 5 // 4
    return compute(None).compute()
