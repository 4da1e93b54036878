"""Chains whose steps are recorded once and replayed draw the numbers of chains that are not."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

import basinscope
from basinscope.io.store import SampleStore
from basinscope.sampling import replay, sample
from basinscope.sampling.job import SamplingJob
from tests.conftest import token_rows
from tests.models_small import tiny_model

SETTINGS: dict[str, Any] = {
    "lr": 1e-4, "n_beta": 3.0, "localization": 10.0, "num_chains": 2, "num_draws": 5,
    "num_steps_bw_draws": 2, "batch_size": 4, "num_init_loss_batches": 1, "save_metrics": True,
    "save_sampling_input_ids": True, "progress": False, "device": "cpu", "chains_at_once": 1,
}  # fmt: skip


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Stand in for a GPU: a recording does nothing, a replay leaves its results in one place."""
    recordings: list[int] = []

    def record(work: Callable[[], dict[str, Tensor]]) -> tuple[Any, dict[str, Tensor]]:
        number = len(recordings)
        recordings.append(0)
        place: dict[str, Tensor] = {}

        def again() -> None:
            recordings[number] += 1
            for name, made in work().items():
                place[name] = place.setdefault(name, torch.empty_like(made)).copy_(made)

        return again, place

    prepare = sample.prepare_job

    def as_if(*args: Any, **kwargs: Any) -> SamplingJob:
        return replace(prepare(*args, **kwargs), cuda_graph=True)

    monkeypatch.setattr(replay, "record", record)
    monkeypatch.setattr(sample, "prepare_job", as_if)
    monkeypatch.setattr(sample, "replace", _but_not_the_graph)
    return recordings


def _but_not_the_graph(job: SamplingJob, **changes: Any) -> SamplingJob:
    changes.pop("cuda_graph", None)
    return replace(job, **changes)


@pytest.mark.parametrize("method", ["sgmcmc_sgld", "rmsprop_sgld"])
@pytest.mark.parametrize("batches", [1, 2], ids=["one batch", "accumulated"])
def test_replayed_chains_are_the_plain_ones(
    method: str, batches: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    data = token_rows(40, 9, seed=1)
    settings = {
        **SETTINGS, "sampling_method": method, "gradient_accumulation_steps": batches,
    }  # fmt: skip

    def run(name: str) -> SampleStore:
        model = tiny_model("gpt_neox")
        basinscope.sample(model, data, {"a": (data, 1)}, output_path=tmp_path / name, **settings)
        return SampleStore(tmp_path / name)

    plain = run("plain.zarr")
    recordings: list[int] = request.getfixturevalue("recorded")
    replayed = run("replayed.zarr")
    # per chain one recording of the step and one of the observables, after two warm-up calls each
    assert recordings == [8, 3, 8, 3]
    for name, array in plain.arrays.items():
        # gradients are added to zeros, which changes no bit but the sign of a zero
        assert (replayed.arrays[name][...] == array[...]).all(), name


def test_a_graph_needs_a_gpu_and_the_model_s_own_loss(tmp_path: Path) -> None:
    model, data = tiny_model("raw"), token_rows(8, 5, seed=1)
    settings = {**SETTINGS, "output_path": tmp_path / "s.zarr", "cuda_graph": True}
    with pytest.raises(ValueError, match="needs a CUDA device; sampling would run on cpu"):
        basinscope.sample(model, data, {}, **settings)
    with pytest.raises(ValueError, match="without train_mode, loss_fn and profile"):
        basinscope.sample(model, data, {}, train_mode=True, **settings)
    assert not (tmp_path / "s.zarr").exists()


def test_what_runs_on_a_stream_of_its_own_is_waited_for_after_a_failure_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Steps that were queued before the failure was seen still move the weights."""
    waits: list[tuple[str, str]] = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            waits.append((self.name, other.name))

    usual = Stream("usual")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("own"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: usual)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    with pytest.raises(ArithmeticError), replay.own_stream(torch.device("cuda"), True):
        raise ArithmeticError
    assert waits == [("own", "usual"), ("usual", "own")]


def test_other_threads_may_wait_for_the_device_during_a_recording(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: dict[str, Any] = {}

    def graph(recorded: object, **options: Any) -> nullcontext[None]:
        asked.update(options)
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Mock)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "the current one")
    monkeypatch.setattr(torch.cuda, "graph", graph)
    _, results = replay.record(lambda: {"a": torch.ones(1)})
    assert list(results) == ["a"]
    assert asked == {"stream": "the current one", "capture_error_mode": "thread_local"}
