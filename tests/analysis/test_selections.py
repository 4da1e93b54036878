"""Selections of a store still know which chains, draws and steps they hold."""

from __future__ import annotations

import re
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

import basinscope
from basinscope.analysis.bif import plan_bif as plan_of_bif
from basinscope.analysis.selections import in_words
from basinscope.io.store import SampleStore, StoreMismatchError, is_store
from tests.analysis.stores_random import random_tree, write_devinterp_tree
from tests.analysis.stores_recorded import fail, recorded_store

SETTINGS = {"n_beta": 10.0, "num_chains": 4, "num_draws": 40, "num_init_loss_batches": 20}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four chains, the first of which failed."""
    tree = random_tree(1, chains=4, draws=40, steps=40)
    path = recorded_store(tmp_path_factory.mktemp("s") / "s.zarr", tree, sampler=SETTINGS)
    fail(path, 0)
    assert SampleStore(path).finish()
    return path


def opened(path: Path) -> xr.DataTree:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a chain failed
        return basinscope.open_store(path)


def saved(tree: xr.DataTree, path: Path) -> Path:
    tree.to_zarr(path, zarr_format=3, consolidated=False)
    assert is_store(path)
    return path


@pytest.mark.parametrize("by", ["sample", "devinterp"])
def test_a_store_can_be_cut_along_every_dimension(by: str, store: Path, tmp_path: Path) -> None:
    if by == "devinterp":
        store = write_devinterp_tree(random_tree(1), tmp_path / "p.zarr")
    tree = opened(store)
    for dim, size in tree.sizes.items():
        cut = tree.isel({dim: slice(1, None)})
        assert cut.sizes[dim] == size - 1
        first = 2 if dim == "token_pos" else 1  # the first token of a sequence has no loss
        assert cut[str(dim)].values.tolist() == list(range(first, first + size - 1))
        assert set(cut.children) == set(tree.children)


def test_a_selection_keeps_its_chains_when_it_is_saved(store: Path, tmp_path: Path) -> None:
    cut = opened(store).isel(chain=[1, 2, 3])
    path = saved(cut, tmp_path / "cut.zarr")
    whole = opened(store)
    with pytest.warns(UserWarning, match="chain 0 failed"):
        expected = basinscope.compute_llc(whole).compute()
    for source in (cut, path, opened(path)):
        got = basinscope.compute_llc(source).compute()
        xr.testing.assert_identical(got.drop_attrs(), expected.drop_attrs())
        assert got["chain"].values.tolist() == [1, 2, 3]


def test_chains_without_numbers_are_not_guessed(store: Path, tmp_path: Path) -> None:
    cut = opened(store).isel(chain=[1, 2, 3])
    cut.dataset = cut.dataset.drop_vars("chain")
    path = saved(cut, tmp_path / "cut.zarr")
    for source in (path, opened(path), xr.DataTree(cut.dataset)):
        with pytest.raises(ValueError, match=r"3 chains of 4, so that it cannot be told which"):
            basinscope.compute_llc(source)


def test_a_chain_counts_once(store: Path) -> None:
    twice = opened(store).isel(chain=[1, 2, 1])
    with pytest.raises(ValueError, match=r"chains \[1, 2, 1\] of .* are not those of its records"):
        basinscope.compute_llc(twice)


@pytest.mark.parametrize("rows", [slice(0, 5), slice(2, None)])
def test_a_chain_that_failed_stays_out_where_the_records_are_lost(rows: slice, store: Path) -> None:
    tree = opened(store)
    without_records = xr.DataTree(tree.dataset.isel(step=rows, draw=rows))
    with pytest.warns(UserWarning, match="chain 0 failed"):
        got = basinscope.compute_llc(without_records).compute()
    with pytest.warns(UserWarning, match="chain 0 failed"):
        expected = basinscope.compute_llc(tree.isel(step=rows, draw=rows)).compute()
    xr.testing.assert_identical(got.drop_attrs(), expected.drop_attrs())


def test_an_unfinished_store_without_its_records_says_how_to_keep_them(tmp_path: Path) -> None:
    path = recorded_store(tmp_path / "s.zarr", random_tree(1, steps=12), [12, 6])
    dataset = opened(path).dataset.isel(draw=slice(3))
    dataset.attrs["schema_version"] = 1
    with pytest.raises(ValueError, match=r"was not completed.*select with tree\.isel"):
        basinscope.compute_llc(xr.DataTree(dataset))


@pytest.mark.parametrize("positions", [[2, 3, 4], [1, 3], [4, 2]])
def test_token_positions_of_a_selection_are_those_of_the_store(
    positions: list[int], store: Path, tmp_path: Path
) -> None:
    whole = opened(store).isel(chain=[1, 2, 3])
    cut = whole.sel(token_pos=positions)
    path = saved(cut, tmp_path / "cut.zarr")
    of_pairs = {"target_position": positions, "target_position_T": positions}
    between = basinscope.compute_bif(whole).sel(of_pairs).compute()
    of_tokens = basinscope.compute_llc(whole)["llc_token"].sel(token_pos=positions).compute()
    for source in (cut, path, opened(path)):
        got = basinscope.compute_bif(source).compute()
        xr.testing.assert_allclose(got, between, atol=1e-6)
        llc = basinscope.compute_llc(source)["llc_token"].compute()
        xr.testing.assert_allclose(llc, of_tokens)
        queries = [(0, positions[-1]), (4, positions[0])]
        strongest = basinscope.compute_bif(source, top_k=2, queries=queries).compute()
        asked = (
            strongest[f"query_{name}"].values.tolist() for name in ("batch", "target_position")
        )
        assert [*zip(*asked, strict=True)] == queries
        found = between["influences"].sel(
            batch_1=strongest["query_batch"],
            batch_2=strongest["partner_batch"],
            target_position=strongest["query_target_position"],
            target_position_T=strongest["partner_target_position"],
        )
        there = found.transpose(*strongest["influences"].dims)
        np.testing.assert_allclose(strongest["influences"], there, atol=1e-6)
        everyone = basinscope.compute_bif(source, top_k=1)["query_target_position"]
        assert everyone.values.tolist() == positions * 5


def test_a_partner_that_is_missing_has_no_position(store: Path) -> None:
    alone = opened(store).isel(chain=[1, 2, 3], batch_a=[0]).sel(token_pos=[3])
    got = basinscope.compute_bif(alone, loss_keys=["a"], top_k=1).compute()
    assert got["partner_target_position"].values.tolist() == [[[-1]], [[-1]]]


@pytest.mark.parametrize(
    ("positions", "query", "said"),
    [
        ([2, 3, 4], (0, 1), "(0, 1): there are sequences 0 to 4 and positions 2 to 4"),
        ([1, 3], (1, 2), "(1, 2): there are sequences 0 to 4 and positions 1, 3"),
        ([2, 3, 4], (5, 2), "(5, 2): there are sequences 0 to 4 and positions 2 to 4"),
    ],
)
def test_a_query_of_what_was_not_selected_is_refused(
    positions: list[int], query: tuple[int, int], said: str, store: Path
) -> None:
    cut = opened(store).isel(chain=[1, 2, 3]).sel(token_pos=positions)
    with pytest.raises(ValueError, match=re.escape(said)):
        basinscope.compute_bif(cut, top_k=1, queries=[query])


def test_a_message_lists_the_first_of_many_positions() -> None:
    assert in_words(np.arange(1, 40, 3)) == "1, 4, 7, 10, 13, 16, 19, 22, 25, 28, 31, 34 and 1 more"
    assert in_words(np.arange(0)) == "none"


@pytest.mark.parametrize(("tokens", "there"), [(slice(1, None), "1 to 4"), (slice(3), "0 to 2")])
def test_token_ids_that_no_position_finds_are_refused(
    tokens: slice, there: str, store: Path
) -> None:
    cut = opened(store).isel(chain=[1, 2, 3], token=tokens)
    with pytest.raises(ValueError, match=f"losses at positions 1 to 4 and token ids at {there}"):
        basinscope.compute_bif(cut)


def test_token_ids_up_to_the_last_position_suffice(store: Path) -> None:
    tree = opened(store).isel(chain=[1, 2, 3])
    ids = basinscope.compute_bif(tree.isel(token=slice(3), token_pos=slice(2)))["input_ids"]
    np.testing.assert_array_equal(ids[:3], tree["input_ids_a"][:, :3])


def test_positions_without_numbers_are_counted(store: Path) -> None:
    tree = opened(store).isel(chain=[1, 2, 3])
    tree.dataset = tree.dataset.drop_vars(["token_pos", "token", "batch_a", "batch_b"])
    got = basinscope.compute_bif(tree)
    assert got["target_position"].values.tolist() == [1, 2, 3, 4]
    assert basinscope.compute_llc(tree)["token_pos"].values.tolist() == [1, 2, 3, 4]


def test_susceptibilities_of_a_selection_are_numbered_as_in_the_store(tmp_path: Path) -> None:
    paths = {
        name: recorded_store(tmp_path / f"{name}.zarr", random_tree(seed, draws=15, steps=15))
        for seed, name in enumerate(["full", "l0"])
    }
    chosen: dict[str, Any] = {"token_pos": [4, 2], "batch_a": [2, 0]}
    trees = {name: opened(path) for name, path in paths.items()}
    whole = basinscope.compute_susceptibilities(trees, "b").compute()
    cut = {name: tree.sel(chosen) for name, tree in trees.items()}
    kept = {name: saved(tree, tmp_path / f"{name}_cut.zarr") for name, tree in cut.items()}
    names = ["dataset_id", "batch", "target_position"]
    sources: list[dict[str, Any]] = [cut, kept]
    for source in sources:
        got = basinscope.compute_susceptibilities(source, "b").compute()
        sus = got["susceptibilities"].to_dataset()
        places = [*zip(*(sus[name].values.tolist() for name in names), strict=True)]
        assert places == [(0, 2, 4), (0, 2, 2), (0, 0, 4), (0, 0, 2)]
        context = got["context"].to_dataset()
        ids = whole["context"].to_dataset().set_index(ctx_flat=["batch", "position"])["input_ids"]
        assert len(context["batch"]) == 2 * 5
        for batch, position, token in zip(
            *(context[name].values for name in ("batch", "position", "input_ids")), strict=True
        ):
            assert ids.sel(batch=batch, position=position) == token
    other = {"full": cut["full"], "l0": trees["l0"].sel({**chosen, "token_pos": [1, 2]})}
    with pytest.raises(ValueError, match="token positions: 4, 2 in 'full', 1 to 2 in 'l0'"):
        basinscope.compute_susceptibilities(other, "b")


@pytest.mark.parametrize("first", [10, 25])
def test_steps_that_were_cut_off_are_a_burn_in(first: int, store: Path) -> None:
    tree = opened(store).isel(chain=[1, 2, 3])
    expected = basinscope.compute_llc(tree, burn_in=first, observables=[]).compute()
    for source in (tree.isel(step=slice(first, None)), tree.isel(step=slice(5, None))):
        got = basinscope.compute_llc(source, burn_in=first, observables=[]).compute()
        xr.testing.assert_identical(got, expected)
    alone = basinscope.compute_llc(tree.isel(step=slice(first, None)), observables=[]).compute()
    xr.testing.assert_identical(alone, expected)


def test_the_error_of_single_steps_knows_their_batches(store: Path) -> None:
    """Of batches that all chains share, whether they also gave the loss at the checkpoint."""
    tree = opened(store).isel(chain=[1, 2, 3])
    late = tree.isel(step=slice(20, None))
    with_numbers = float(basinscope.compute_llc(late, observables=[])["llc_mcse"])
    late.dataset = late.dataset.drop_vars("step")
    without = float(basinscope.compute_llc(late, observables=[])["llc_mcse"])
    early = tree.isel(step=slice(20))
    in_common = float(basinscope.compute_llc(early, observables=[])["llc_mcse"])
    assert len({with_numbers, without, in_common}) == 3


def test_a_burn_in_of_unknown_steps_is_refused(store: Path) -> None:
    tree = opened(store).isel(chain=[1, 2, 3])
    backwards = tree.isel(step=slice(None, None, -1))
    with pytest.raises(ValueError, match="are a selection in another order"):
        basinscope.compute_llc(backwards, burn_in=3)
    cut = tree.isel(step=slice(4, None))
    cut.dataset = cut.dataset.drop_vars("step")
    with pytest.raises(ValueError, match="are a selection without numbers"):
        basinscope.compute_llc(cut, burn_in=3)


def test_what_was_written_is_counted_in_a_selection(tmp_path: Path) -> None:
    random = random_tree(1, draws=12, steps=12)
    settings = {**SETTINGS, "num_chains": 2, "num_draws": 12}
    tree = opened(recorded_store(tmp_path / "s.zarr", random, [12, 6], sampler=settings))
    cut = tree.isel(draw=slice(4, None, 2), step=slice(4, None))
    got = basinscope.compute_llc(cut, allow_incomplete=True).compute()
    assert got["loss_trace"].notnull().sum("step").values.tolist() == [8, 2]
    assert got["step"].values.tolist() == list(range(4, 12))
    losses = random["sampling_loss_micro"].values.astype(np.float64)
    rise = losses[1, 4:6].mean() - random["init_loss"].values.astype(np.float64).mean()
    np.testing.assert_allclose(got["llc_per_chain"][1], 10 * rise, rtol=1e-6)
    influence = basinscope.compute_bif(
        cut, correlation_method="sequence", loss_keys=["a"], allow_incomplete=True,
        reduce_chain_dimension_method="stack", compute_covariance=True,
    )  # fmt: skip
    written = [random["loss_a"].values[0, 4::2], random["loss_a"].values[1, 4:6:2]]
    traces = np.concatenate(written).astype(np.float64).mean(-1)
    np.testing.assert_allclose(influence["influences"], np.cov(traces.T), rtol=1e-4)

    late = tree.isel(draw=slice(8, None), step=slice(8, None))
    with pytest.warns(UserWarning, match="left out of this estimate of .*: chain 1"):
        assert basinscope.compute_llc(late, allow_incomplete=True)["chain"].values.tolist() == [0]
    with pytest.raises(ValueError, match="behind others that were not: keep draws in their order"):
        basinscope.compute_llc(tree.isel(draw=slice(None, None, -1)), allow_incomplete=True)
    cut.dataset = cut.dataset.drop_vars("draw")
    with pytest.raises(ValueError, match=r"has 4 draws without numbers.* among the 6 that were"):
        basinscope.compute_llc(cut, allow_incomplete=True)


def test_a_result_is_not_that_of_another_selection(store: Path, tmp_path: Path) -> None:
    tree = opened(store).isel(chain=[1, 2, 3])
    options: dict[str, Any] = {"correlation_method": "sequence", "output_path": tmp_path / "o.zarr"}
    first = basinscope.compute_bif(tree.isel(draw=slice(6)), **options)
    for other in (slice(0, 12, 2), slice(7)):
        with pytest.raises(StoreMismatchError, match="losses"):
            basinscope.compute_bif(tree.isel(draw=other), **options)
    again = basinscope.compute_bif(tree.isel(draw=slice(6)), **options)
    xr.testing.assert_identical(first.compute(), again.compute())


def test_sequences_of_a_selection_keep_to_the_memory(tmp_path: Path) -> None:
    random = random_tree(1, observables={"a": 128}, draws=300, steps=1, tokens=64)
    tree = opened(write_devinterp_tree(random, tmp_path / "p.zarr")).isel(draw=slice(1, None))
    options: dict[str, Any] = {"correlation_method": "sequence", "memory_limit": "12MB"}
    assert tree["loss_a"].nbytes > 1.5 * 12e6
    plan = plan_of_bif(tree, **options)
    tracemalloc.start()
    basinscope.compute_bif(tree, **options).compute()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= plan.peak_memory + 2**20
