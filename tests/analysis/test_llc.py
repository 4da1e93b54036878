"""compute_llc against the formulas, lazily, and without chains that are not whole."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
import xarray as xr
import zarr

import basinscope
from basinscope.analysis.diagnostics import diagnose_trace
from basinscope.analysis.plan import PlanError
from basinscope.analysis.rise import Batches, error_of_chains, error_of_rise
from basinscope.io.store import SampleStore
from tests.analysis.stores_random import random_tree
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
    init = raw["init_loss"].to_numpy().astype(np.float64)
    observed = raw["loss_a"].to_numpy().astype(np.float64)
    trace = losses.mean((2, 3))
    per_chain = 12.0 * (trace.mean(1) - init.mean())
    judged = diagnose_trace(list(trace))
    at_start = raw["init_batch_loss"].mean("token_pos", dtype=np.float64).to_numpy()[None]
    error = error_of_rise(list(trace), Batches(np.arange(25), 32, 1, 10), at_start)
    expected = {
        "loss_trace": trace,
        "init_loss": init.mean(),
        "llc_per_chain": per_chain,
        "llc_mean": per_chain.mean(),
        "llc_std": per_chain.std(),
        "llc_scalar": 12.0 * (losses.mean() - init.mean()),
        "n_beta": 12.0,
        "llc_token": 12.0 * (losses.mean((0, 1, 2)) - init.mean(0)),
        "llc_running": 12.0 * (trace.cumsum(1) / np.arange(1, 26) - init.mean()),
        "llc_a": 12.0 * (observed.mean() - raw["init_loss_a"].to_numpy().mean(dtype=np.float64)),
        "llc_a_mcse": 12.0 * error_of_chains(observed.mean((2, 3))),
        "llc_mcse": 12.0 * error,
        "rhat": judged["rhat"],
        "ess_bulk": judged["ess_bulk"],
    }
    assert set(got.data_vars) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-9, err_msg=name)
        assert {"long_name", "units"} <= set(got[name].attrs), name
    assert got["loss_trace"].attrs["units"] == "nats"
    assert got.attrs["metadata"] == raw.attrs["metadata"]


def test_burn_in_drops_steps(store: Path) -> None:
    whole = basinscope.compute_llc(store).compute()
    got = basinscope.compute_llc(store, burn_in=7, observables=[]).compute()
    assert got["step"].values.tolist() == list(range(7, 25))
    np.testing.assert_allclose(got["loss_trace"], whole["loss_trace"][:, 7:])
    rise = whole["loss_trace"][:, 7:].mean("step") - whole["init_loss"]
    np.testing.assert_allclose(got["llc_per_chain"], 12.0 * rise)
    assert "llc_a" not in got
    for wrong in (25, -1, 2.5, True):
        with pytest.raises(ValueError, match="burn_in"):
            basinscope.compute_llc(store, burn_in=wrong)  # type: ignore[arg-type]


def test_burn_in_of_draws_counts_their_steps(store: Path) -> None:
    raw = xr.open_datatree(store, engine="zarr", consolidated=False)
    raw.dataset = raw.dataset.drop_vars("sampling_loss_micro")
    got = basinscope.compute_llc(raw, burn_in=8).compute()  # draw 0 is step 5
    assert got["draw"].values.tolist() == list(range(3, 20))


def test_an_observable_is_measured_from_its_loss_at_the_checkpoint_where_it_is_stored(
    store: Path,
) -> None:
    raw = xr.open_datatree(store, engine="zarr", consolidated=False)
    losses = raw["loss_a"].to_numpy().astype(np.float64)
    raw.dataset = raw.dataset.assign(init_loss_a=raw["init_loss"] * 0 + 2.0)
    got = basinscope.compute_llc(raw)
    np.testing.assert_allclose(got["llc_a"], 12.0 * (losses.mean() - 2.0), rtol=1e-9)
    assert got["llc_a"].attrs["reference"] == "checkpoint"
    raw.dataset = raw.dataset.drop_vars("init_loss_a")
    got = basinscope.compute_llc(raw)
    first = losses[:, 0].mean()
    np.testing.assert_allclose(got["llc_a"], 12.0 * (losses.mean() - first), rtol=1e-9)
    assert got["llc_a"].attrs["reference"] == "first draw"


def test_an_observable_named_like_a_variable_takes_nothing_away(store: Path) -> None:
    raw = xr.open_datatree(store, engine="zarr", consolidated=False)
    raw.dataset = raw.dataset.rename(
        loss_a="loss_mean", init_loss_a="init_loss_mean", input_ids_a="input_ids_mean"
    )
    got = basinscope.compute_llc(raw)
    whole = basinscope.compute_llc(store)
    np.testing.assert_allclose(got["llc_mean"], whole["llc_mean"])
    np.testing.assert_allclose(got["llc_mean_observable"], whole["llc_a"])


def test_the_error_of_an_observable_is_that_of_its_draws(store: Path) -> None:
    """Whatever the noise of the sampling batches is, every draw sees the observable's sequences."""
    raw = xr.open_datatree(store, engine="zarr", consolidated=False)
    traces = raw["loss_a"].mean(["batch_a", "token_pos"], dtype=np.float64).to_numpy()
    got = basinscope.compute_llc(raw)
    assert got["llc_a"].attrs["reference"] == "checkpoint"
    np.testing.assert_allclose(got["llc_a_mcse"], 12.0 * error_of_chains(traces), rtol=1e-6)
    late = basinscope.compute_llc(raw, burn_in=8)  # draw 3 is step 8
    np.testing.assert_allclose(late["llc_a_mcse"], 12.0 * error_of_chains(traces[:, 3:]), rtol=1e-6)

    raw.dataset = raw.dataset.drop_vars("init_loss_a")
    first = traces[:, 0].std(ddof=1) / np.sqrt(3)
    of_both = np.hypot(error_of_chains(traces), first)
    np.testing.assert_allclose(basinscope.compute_llc(raw)["llc_a_mcse"], 12.0 * of_both, rtol=1e-6)
    tree = basinscope.open_store(store)
    tree.dataset = tree.dataset.drop_vars("init_loss_a").isel(chain=[0])
    alone = basinscope.compute_llc(tree)["llc_a_mcse"]
    assert np.isnan(alone), "one chain's first draw has no spread"
    assert np.isnan(basinscope.compute_llc(store, burn_in=22)["llc_a_mcse"]), "three draws are left"
    assert np.isnan(basinscope.compute_llc(store, burn_in=25 - 1)["llc_a_mcse"])


def test_observables_named_like_errors_keep_their_own(store: Path) -> None:
    raw = xr.open_datatree(store, engine="zarr", consolidated=False)
    twice = raw["loss_a"] * 2
    raw.dataset = raw.dataset.assign(
        loss_a_mcse=twice.rename({"batch_a": "batch_a_mcse"}),
        init_loss_a_mcse=raw["init_loss_a"].rename({"batch_a": "batch_a_mcse"}) * 2,
        input_ids_a_mcse=raw["input_ids_a"].rename({"batch_a": "batch_a_mcse"}),
    )
    got, whole = basinscope.compute_llc(raw), basinscope.compute_llc(store)
    for suffix in ("", "_mcse"):
        np.testing.assert_allclose(got[f"llc_a{suffix}"], whole[f"llc_a{suffix}"])
        doubled = got[f"llc_a_mcse_observable{suffix}"]
        np.testing.assert_allclose(doubled, 2 * whole[f"llc_a{suffix}"], rtol=1e-5)


def test_an_unknown_observable_is_named_with_those_there_are(store: Path) -> None:
    with pytest.raises(ValueError, match=r"no observable 'b'; it has a"):
        basinscope.compute_llc(store, observables=["b"])


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


def test_a_chain_that_failed_is_left_out_and_named(store: Path, tmp_path: Path) -> None:
    shutil.copytree(store, tmp_path / "s.zarr")
    changed = SampleStore(tmp_path / "s.zarr")
    changed.update_record(1, state="failed", failed_step=7, reason="the loss is not finite")
    with pytest.warns(UserWarning, match=r"chain 1 failed at step 7 \(the loss is not finite\)"):
        got = basinscope.compute_llc(tmp_path / "s.zarr").compute()
    whole = basinscope.compute_llc(store).compute()
    assert got["chain"].values.tolist() == [0, 2]
    np.testing.assert_allclose(got["llc_mean"], whole["llc_per_chain"].isel(chain=[0, 2]).mean())

    for chain in (0, 2):
        changed.update_record(chain, state="failed", failed_step=0, reason="the loss is not finite")
    with pytest.raises(ValueError, match=r"no chain of .* can be analysed"):
        basinscope.compute_llc(tmp_path / "s.zarr")


def test_an_unfinished_store_is_taken_as_far_as_it_is_written(store: Path, tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    shutil.copytree(store, path)
    changed = SampleStore(path)
    changed.update_record(1, state="running", steps_written=13, draws_written=8)
    changed.update_record(2, state="pending", steps_written=0, draws_written=0)
    with pytest.raises(ValueError, match=r"chain 1 is unfinished \(8 draws.*allow_incomplete=True"):
        basinscope.compute_llc(path)
    with pytest.warns(UserWarning, match="chain 2 was not started"):
        got = basinscope.compute_llc(path, allow_incomplete=True).compute()
    whole = basinscope.compute_llc(store).compute()
    assert got["chain"].values.tolist() == [0, 1]
    np.testing.assert_allclose(got["loss_trace"][1, :13], whole["loss_trace"][1, :13])
    assert np.isnan(got["loss_trace"][1, 13:]).all()
    assert np.isnan(got["llc_running"][1, 13:]).all()
    rise = whole["loss_trace"][1, :13].mean() - got["init_loss"]
    np.testing.assert_allclose(got["llc_per_chain"][1], 12.0 * rise)
    both = np.concatenate([whole["loss_trace"][0], whole["loss_trace"][1, :13]]).mean()
    np.testing.assert_allclose(got["llc_scalar"], 12.0 * (both - got["init_loss"]))
    raw = xr.open_datatree(store, engine="zarr", consolidated=False)["loss_a"].to_numpy()
    written = np.concatenate([raw[0], raw[1, :8]]).mean(dtype=np.float64)
    start = xr.open_datatree(store, engine="zarr", consolidated=False)["init_loss_a"].to_numpy()
    rise = written - start.mean(dtype=np.float64)
    np.testing.assert_allclose(got["llc_a"], 12.0 * rise, rtol=1e-9)


def test_a_nan_that_was_written_is_not_skipped(store: Path) -> None:
    raw = xr.open_datatree(store, engine="zarr", consolidated=False).load()
    raw["sampling_loss_micro"][1, 3, 0, 0] = np.nan
    got = basinscope.compute_llc(raw).compute()
    assert np.isnan(got["llc_per_chain"]).values.tolist() == [False, True, False]
    assert np.isnan(got["llc_mean"])


def test_a_file_that_the_record_knows_and_the_disk_does_not_is_an_error(
    store: Path, tmp_path: Path
) -> None:
    path = tmp_path / "s.zarr"
    shutil.copytree(store, path)
    next((path / "sampling_loss_micro" / "c" / "1").rglob("*/0/0")).unlink()
    with pytest.raises(ValueError, match="although the store records it as written"):
        basinscope.compute_llc(path).compute()


def test_a_store_without_any_record_has_to_be_complete(store: Path, tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    shutil.copytree(store, path)
    shutil.rmtree(path / "chains")
    root = zarr.open_group(path, mode="r+")
    del root.attrs["completed"]
    with pytest.raises(ValueError, match="was not completed, and keeps no record"):
        basinscope.compute_llc(path, allow_incomplete=True)


def test_too_little_memory_is_refused_with_what_would_do(store: Path) -> None:
    with pytest.raises(PlanError, match=r"the LLC needs .* memory_limit is 100 B: give memory"):
        basinscope.compute_llc(store, memory_limit=100)
    with pytest.raises(ValueError, match="is no size"):
        basinscope.compute_llc(store, memory_limit="much")


def test_one_chain_of_one_step_has_an_llc_and_no_error(store: Path) -> None:
    raw = xr.open_datatree(store, engine="zarr", consolidated=False)
    one = raw.dataset.isel(chain=[0], step=[0], draw=[0], token_pos=[0], batch_a=[0])
    got = basinscope.compute_llc(xr.DataTree(one)).compute()
    assert np.isfinite(got["llc_mean"])
    assert np.isnan(got["llc_mcse"])


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
    good = rng.standard_normal((4, 500))
    found = diagnose_trace(list(good))
    assert abs(found["rhat"] - 1) < 0.01
    assert 1000 < found["ess_bulk"] < 3000
    assert abs(found["mcse_mean"] - 1 / np.sqrt(2000)) < 0.01
    apart = good + np.array([[0.0], [0.0], [0.0], [3.0]])
    assert diagnose_trace(list(apart))["rhat"] > 1.2


def test_analysis_never_imports_torch(store: Path) -> None:
    code = (
        "import sys, basinscope; basinscope.compute_llc(sys.argv[1]).compute();"
        "basinscope.compute_bif(sys.argv[1], average_tokenwise_bif=True).compute();"
        "assert 'torch' not in sys.modules and 'datasets' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(store)], check=True)


def test_an_estimate_that_was_not_computed_can_be_written(store: Path, tmp_path: Path) -> None:
    lazy = basinscope.compute_llc(store, burn_in=np.int64(2))
    lazy.drop_attrs().to_zarr(tmp_path / "llc.zarr")
    xr.testing.assert_equal(xr.open_zarr(tmp_path / "llc.zarr").compute(), lazy.compute())


def test_observables_go_by_their_names_too() -> None:
    tree = random_tree(0, observables={"pile_github": 2, "_2nd": 1})
    by_name = basinscope.compute_llc(tree, observables=["pile/github", "2nd"])
    assert {"llc_pile_github", "llc__2nd"} <= set(by_name.data_vars)
    got = basinscope.compute_bif(tree, loss_keys=["pile/github"])
    xr.testing.assert_equal(got, basinscope.compute_bif(tree, loss_keys=["pile_github"]))
    for unknown, shown in {"c/d": "'c_d'", "": "''", 3: "3"}.items():
        with pytest.raises(ValueError, match=f"no observable {shown}; it has _2nd, pile_github"):
            basinscope.compute_llc(tree, observables=[unknown])  # type: ignore[list-item]
