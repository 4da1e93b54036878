"""compare_llc: the LLC of each run as compute_llc has it, and differences with their error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
import torch
import xarray as xr

import basinscope
from basinscope.analysis.plan import PlanError
from basinscope.analysis.rise import Batches, error_of_rise
from basinscope.report.tables import llc_drift
from tests.analysis.stores_random import random_tree
from tests.analysis.stores_recorded import fail
from tests.conftest import token_rows
from tests.models_small import tiny_model

SETTINGS: dict[str, Any] = {
    "lr": 1e-3, "n_beta": 12.0, "num_chains": 3, "num_draws": 20, "num_burnin_steps": 5,
    "batch_size": 4, "num_init_loss_batches": 6,
}  # fmt: skip


def sampled(path: Path, scale: float = 1.0, **changes: Any) -> Path:
    """Sample around a model whose weights are so many times the first one's."""
    model = tiny_model("raw")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    data = token_rows(40, 9, seed=1)
    settings = {**SETTINGS, **changes}
    basinscope.sample(
        model, data, {}, output_path=path, progress=False, device="cpu", **settings
    )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("training")
    return {step: sampled(folder / f"{step}.zarr", 1 - step / 50) for step in (0, 5, 20)}


def test_every_run_has_the_figures_of_its_own_llc(stores: dict[int, Path]) -> None:
    got = basinscope.compare_llc(stores, burn_in=5).compute()
    assert got["run"].values.tolist() == got["other_run"].values.tolist() == [0, 5, 20]
    for step, store in stores.items():
        alone, own = basinscope.compute_llc(store, burn_in=5).compute(), got.sel(run=step)
        for name in ("llc_mean", "llc_mcse", "rhat", "ess_bulk", "init_loss", "n_beta"):
            np.testing.assert_allclose(own[name], alone[name], rtol=1e-12, err_msg=name)
        drift = float(own["llc_drift"]), float(own["llc_drift_mcse"])
        np.testing.assert_allclose(drift, llc_drift(alone), rtol=1e-9)


def test_a_difference_is_the_rise_of_the_difference(stores: dict[int, Path]) -> None:
    """What both runs have in common is in neither the difference nor its error."""
    got = basinscope.compare_llc(stores, burn_in=5).compute()
    assert got["paired"].values.all()
    trees = {step: basinscope.open_store(store) for step, store in stores.items()}
    for a, b in ((0, 5), (20, 0), (5, 20)):
        losses, at_start = (
            trees[a][name].to_numpy().astype(np.float64) - trees[b][name].to_numpy()
            for name in ("sampling_loss_micro", "init_batch_loss")
        )
        trace, start = losses[:, 5:].mean((2, 3)), at_start.mean(-1)
        pair = got.sel(run=a, other_run=b)
        expected = 12.0 * (trace.mean() - start.mean())
        np.testing.assert_allclose(pair["difference"], expected, rtol=0, atol=1e-5)
        error = error_of_rise(list(trace), Batches(np.arange(5, 25), 6, 1, 10), start[None])
        np.testing.assert_allclose(pair["difference_mcse"], 12.0 * error, rtol=1e-5)
    of_both = np.hypot(*got.sel(run=[0, 5])["llc_mcse"].values)  # models that are much alike
    assert got.sel(run=0, other_run=5)["difference_mcse"] < 0.25 * of_both


@pytest.mark.parametrize(
    "changes",
    [
        {"init_seed": 7},
        {"batch_size": 5},
        {"num_draws": 21},
        {"num_chains": 2},
        {"num_init_loss_batches": 5},
        {"gradient_accumulation_steps": 2},
        {"shuffle": False},
        {"match_sampling_input_ids_across_chains": False},
    ],
)
def test_runs_that_saw_other_batches_count_as_independent(
    changes: dict[str, Any], stores: dict[int, Path], tmp_path: Path
) -> None:
    other = sampled(tmp_path / "other.zarr", **changes)
    got = basinscope.compare_llc({"a": stores[0], "b": other}).compute()
    assert got["paired"].values.tolist() == [[True, False], [False, True]]
    apart = np.hypot(*got["llc_mcse"].values)
    assert np.isfinite(apart)
    np.testing.assert_allclose(got["difference_mcse"], [[0, apart], [apart, 0]], rtol=1e-12)


def test_other_step_sizes_and_temperatures_saw_the_same_batches(
    stores: dict[int, Path], tmp_path: Path
) -> None:
    other = sampled(tmp_path / "other.zarr", lr=2e-3, n_beta=24.0)
    got = basinscope.compare_llc({"a": stores[0], "b": other}).compute()
    assert got["paired"].values.all()
    assert got["n_beta"].values.tolist() == [12, 24]
    sampler = got.attrs["metadata"]["config"]["sampler"]
    assert sampler["batch_size"] == 4
    assert not {"lr", "n_beta"} & set(sampler)


@pytest.mark.parametrize("dim", ["batch_sampling", "token_pos"])
def test_selections_of_other_sequences_or_tokens_are_not_paired(
    dim: str, stores: dict[int, Path]
) -> None:
    first, second = (basinscope.open_store(stores[step]) for step in (0, 5))
    same = {"a": first.isel({dim: slice(2)}), "b": second.isel({dim: slice(2)})}
    assert basinscope.compare_llc(same)["paired"].values.all()
    other = {**same, "b": second.isel({dim: slice(2, 4)})}
    assert not basinscope.compare_llc(other)["paired"].values[0, 1]


def test_runs_with_other_chains_left_are_not_paired(
    stores: dict[int, Path], tmp_path: Path
) -> None:
    fail(sampled(tmp_path / "other.zarr"), 1)
    with pytest.warns(UserWarning, match="chain 1"):
        got = basinscope.compare_llc({"a": stores[0], "b": tmp_path / "other.zarr"}).compute()
    assert not got["paired"].values[0, 1]
    with pytest.warns(UserWarning, match="chain 1"):
        alone = basinscope.compute_llc(tmp_path / "other.zarr").compute()
    np.testing.assert_allclose(got["llc_mean"][1], alone["llc_mean"], rtol=1e-12)


def test_trees_without_settings_are_compared_as_independent() -> None:
    """Such as devinterp's, which do not say what data they were sampled on."""
    got = basinscope.compare_llc({"a": random_tree(0), "b": random_tree(1)}).compute()
    assert not got["paired"].values[0, 1]
    assert np.isfinite(got["difference_mcse"]).all()


def test_building_reads_nothing(stores: dict[int, Path]) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a task ran")

    with dask.config.set(scheduler=refuse):
        lazy = basinscope.compare_llc(stores)
    assert isinstance(lazy, xr.Dataset)
    assert all(lazy[name].chunks is not None for name in ("llc_mean", "difference_mcse"))


def test_what_cannot_be_compared_is_said_before_anything_is_read(stores: dict[int, Path]) -> None:
    with pytest.raises(TypeError, match="must map names to stores"):
        basinscope.compare_llc(list(stores.values()))  # type: ignore[arg-type]
    for names in ((0, "a"), (("a", 1), ("b", 2)), (True, 2)):
        with pytest.raises(TypeError, match="by texts, or by numbers, all of them"):
            basinscope.compare_llc(dict(zip(names, stores.values(), strict=False)))
    with pytest.raises(ValueError, match="0 is too little to compare: give two runs"):
        basinscope.compare_llc({0: stores[0]})
    with pytest.raises(ValueError, match="burn_in=25 leaves nothing to average"):
        basinscope.compare_llc(stores, burn_in=25)
    with pytest.raises(PlanError):
        basinscope.compare_llc(stores, memory_limit=1)
