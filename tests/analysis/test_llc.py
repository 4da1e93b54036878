"""compute_llc against the formulas, lazily, and without chains that are not whole."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
import xarray as xr

import basinscope
from basinscope.analysis.diagnostics import chain_diagnostics
from basinscope.io.store import SampleStore
from tests.conftest import token_rows
from tests.models_small import tiny_model

SETTINGS: dict[str, Any] = {
    "lr": 1e-3,
    "n_beta": 12.0,
    "num_chains": 3,
    "num_draws": 20,
    "num_burnin_steps": 5,
    "batch_size": 4,
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llc") / "samples.zarr"
    basinscope.sample(
        tiny_model("raw"),
        token_rows(40, 9, seed=1),
        {"a": token_rows(30, 9, seed=2)},
        **SETTINGS,
        output_path=path,
        progress=False,
        device="cpu",
    )
    return path


def test_every_variable_is_its_formula(store: Path) -> None:
    got = basinscope.compute_llc(store).compute()
    raw = xr.open_datatree(store, engine="zarr", consolidated=False)
    losses = raw["sampling_loss_micro"].to_numpy().astype(np.float64)
    init = raw["init_loss"].to_numpy().astype(np.float64).mean()
    trace = losses.mean((2, 3))
    per_chain = 12.0 * (trace.mean(1) - init)
    expected = {
        "loss_trace": trace,
        "init_loss": init,
        "llc_per_chain": per_chain,
        "llc_mean": per_chain.mean(),
        "llc_std": per_chain.std(),
        "llc_scalar": 12.0 * (losses.mean() - init),
        "n_beta": 12.0,
    }
    assert set(got.data_vars) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-12, err_msg=name)
    assert got["loss_trace"].attrs["units"] == "nats"


def test_nothing_is_computed_before_it_is_asked_for(store: Path) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something was computed")

    with dask.config.set(scheduler=refuse):
        lazy = basinscope.compute_llc(store)
        with pytest.raises(AssertionError, match="something was computed"):
            float(lazy["llc_mean"])


def test_without_losses_of_steps_the_trace_is_that_of_draws(store: Path) -> None:
    raw = xr.open_datatree(store, engine="zarr", consolidated=False)
    raw.dataset = raw.dataset.drop_vars("sampling_loss_micro")
    got = basinscope.compute_llc(raw).compute()
    assert got["loss_trace"].dims == ("chain", "draw")
    np.testing.assert_allclose(
        got["loss_trace"], raw["sampling_loss"].mean(("batch", "token_pos")), rtol=1e-5
    )


def test_a_chain_that_is_not_done_is_left_out_and_named(store: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(store, tmp_path / "s.zarr")
    changed = SampleStore(tmp_path / "s.zarr")
    changed.update_record(1, state="failed", failed_step=7, reason="the loss is not finite")
    with pytest.warns(UserWarning, match=r"chain 1 failed at step 7 \(the loss is not finite\)"):
        got = basinscope.compute_llc(tmp_path / "s.zarr").compute()
    whole = basinscope.compute_llc(store).compute()
    assert got["chain"].values.tolist() == [0, 2]
    np.testing.assert_allclose(got["llc_mean"], whole["llc_per_chain"].isel(chain=[0, 2]).mean())

    for chain in (0, 2):
        changed.update_record(chain, state="pending")
    with (
        pytest.warns(UserWarning, match="was not started"),
        pytest.raises(ValueError, match="no chain of this store can be analysed"),
    ):
        basinscope.compute_llc(tmp_path / "s.zarr")


def test_llc_samples_and_computes(tmp_path: Path, store: Path) -> None:
    estimate = basinscope.llc(
        tiny_model("raw"),
        token_rows(40, 9, seed=1),
        {"a": token_rows(30, 9, seed=2)},
        **SETTINGS,
        output_path=tmp_path / "again.zarr",
        progress=False,
        device="cpu",
    )
    np.testing.assert_array_equal(
        estimate["llc_mean"], basinscope.compute_llc(store)["llc_mean"].compute()
    )


def test_diagnostics_know_good_chains_from_bad() -> None:
    rng = np.random.default_rng(0)
    good = xr.DataArray(rng.standard_normal((4, 500)), dims=("chain", "step"))
    found = chain_diagnostics(good)
    assert abs(float(found["rhat"]) - 1) < 0.01
    assert 1000 < float(found["ess_bulk"]) < 3000
    assert abs(float(found["mcse_mean"]) - 1 / np.sqrt(2000)) < 0.01
    apart = good + xr.DataArray([0.0, 0.0, 0.0, 3.0], dims="chain")
    assert float(chain_diagnostics(apart)["rhat"]) > 1.2


def test_analysis_never_imports_torch(store: Path) -> None:
    code = (
        "import sys, basinscope; basinscope.compute_llc(sys.argv[1]).compute();"
        "assert 'torch' not in sys.modules and 'datasets' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(store)], check=True)
