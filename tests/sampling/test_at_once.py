"""Chains side by side in threads give the numbers that they give one after another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

import basinscope
from basinscope.io.store import DONE, SampleStore
from basinscope.sampling.phases import PhaseClock, StepProfiler
from tests.conftest import token_rows
from tests.models_small import tiny_model


def run(
    path: Path, model: torch.nn.Module | None = None, kind: str = "gpt_neox", **changes: Any
) -> xr.DataTree:
    return basinscope.sample(
        model or tiny_model(kind),
        token_rows(48, 9, seed=1),
        {"first": token_rows(30, 9, seed=2)},
        **{
            "lr": 1e-3,
            "n_beta": 10.0,
            "num_chains": 5,
            "num_draws": 12,
            "batch_size": 4,
            **changes,
        },
        output_path=path,
        progress=False,
        device="cpu",
    )


@pytest.mark.parametrize("kind", ["gpt_neox", "raw"])
def test_same_bits_with_one_thread_each(kind: str, tmp_path: Path) -> None:
    alone = run(tmp_path / "alone.zarr", kind=kind, chains_at_once=1, save_metrics=True)
    beside = run(tmp_path / "beside.zarr", kind=kind, chains_at_once=3, save_metrics=True)
    for name in alone.data_vars:
        np.testing.assert_array_equal(beside[name], alone[name], err_msg=str(name))
    records = SampleStore(tmp_path / "beside.zarr").records()
    assert [record["state"] for record in records.values()] == [DONE] * 5


def test_threads_and_generators_are_as_before(tmp_path: Path) -> None:
    model = tiny_model("gpt_neox")
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    run(tmp_path / "s.zarr", model, chains_at_once=3)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


def test_an_error_of_one_chain_stops_all_and_loses_nothing(tmp_path: Path) -> None:
    def failing(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
        failing.calls += 1  # type: ignore[attr-defined]
        if failing.calls == 70:  # type: ignore[attr-defined]
            raise ZeroDivisionError("in a loss")
        return model(ids)[:, :-1].square().mean(-1)

    failing.calls = 0  # type: ignore[attr-defined]
    store = tmp_path / "s.zarr"
    with pytest.raises(ZeroDivisionError, match="in a loss"):
        run(store, kind="raw", loss_fn=failing, chains_at_once=2)
    assert failing.calls < 80  # type: ignore[attr-defined]
    failing.calls = 1000  # type: ignore[attr-defined]
    resumed = run(store, kind="raw", loss_fn=failing, chains_at_once=2)
    failing.calls = 1000  # type: ignore[attr-defined]
    whole = run(tmp_path / "whole.zarr", kind="raw", loss_fn=failing, chains_at_once=1)
    for name in whole.data_vars:
        np.testing.assert_array_equal(resumed[name], whole[name], err_msg=str(name))


def test_what_cannot_share_a_process_is_refused(tmp_path: Path) -> None:
    for settings, said in [
        ({"train_mode": True}, "torch's one generator"),
        ({"profile": tmp_path / "trace.json"}, "profile= traces one chain"),
    ]:
        with pytest.raises(ValueError, match=said):
            run(tmp_path / "s.zarr", chains_at_once=2, **settings)
    with pytest.raises(ValueError, match="chains_at_once must be"):
        run(tmp_path / "s.zarr", chains_at_once=0)
    assert not (tmp_path / "s.zarr").exists()


def test_a_profile_names_the_phases(tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    run(tmp_path / "s.zarr", profile=trace, profile_steps=(2, 4), num_init_loss_batches=1)
    text = trace.read_text()
    for phase in ("forward", "backward", "update", "observe"):
        assert text.count(f'"name": "{phase}"') >= 2, phase


def test_a_chain_that_is_resumed_within_the_window_is_profiled_from_there(tmp_path: Path) -> None:
    trace, clock = tmp_path / "trace.json", PhaseClock()
    profiler = StepProfiler(trace, (2, 6), clock)
    for step in (4, 5, 6):
        profiler.before_step(step)
        with clock(f"step {step}"):
            pass
        profiler.after_step(step)
    text = trace.read_text()
    assert [f'"step {step}"' in text for step in (4, 5, 6)] == [True, True, False]


def test_the_time_of_interrupted_runs_is_kept(tmp_path: Path) -> None:
    def loss(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
        loss.calls += 1  # type: ignore[attr-defined]
        if loss.calls == loss.last:  # type: ignore[attr-defined]
            raise ZeroDivisionError
        return model(ids)[:, :-1].square().mean(-1)

    settings = {"kind": "raw", "loss_fn": loss, "num_chains": 1, "checkpoint_every": 3}
    loss.calls, loss.last = 0, 50  # type: ignore[attr-defined]
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "s.zarr", **settings)
    store = SampleStore(tmp_path / "s.zarr")
    before = store.record(0)
    assert before["steps_written"] >= 3
    loss.last = -1  # type: ignore[attr-defined]
    run(tmp_path / "s.zarr", **settings)
    after = store.record(0)["seconds"]
    for phase in ("forward", "backward", "update", "observe", "write (background)"):
        assert after[phase] > before["seconds"][phase] > 0, phase
    assert store.attributes["seconds"]["init_loss"] == after["init_loss"] > 0
