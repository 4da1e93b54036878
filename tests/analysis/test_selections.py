"""Selections of a store still know which chains, draws and steps they hold."""

from __future__ import annotations

import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

import basinscope
from basinscope.analysis.bif import plan_bif as plan_of_bif
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
        assert cut[str(dim)].values.tolist() == list(range(1, size))
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
    with pytest.warns(UserWarning, match="left out of this estimate: chain 1"):
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
