"""Losses that arrive late change nothing but when a failure is noticed."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from basinscope.io.store import SampleStore
from basinscope.sampling import arrival
from basinscope.sampling.arrival import SAMPLING_LOSS, Arriving, LossWatch, NonFiniteLossError
from basinscope.sampling.losses import next_token_loss
from basinscope.sampling.sample import ChainFailedWarning, sample
from tests.conftest import token_rows
from tests.models_small import tiny_model


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """As from a GPU that is far behind: nothing has arrived until somebody waits."""
    monkeypatch.setattr(Arriving, "ready", lambda self: False)


def test_on_a_cpu_a_loss_has_arrived_at_once() -> None:
    watch = LossWatch()
    watch.see(0, {SAMPLING_LOSS: torch.tensor([1.0, 3.0])})
    assert watch.latest == 2.0
    with pytest.raises(NonFiniteLossError, match="step 1: the sampling loss is not finite"):
        watch.see(1, {SAMPLING_LOSS: torch.tensor([1.0, torch.nan])})


@pytest.mark.usefixtures("late")
def test_the_first_of_several_bad_losses_is_the_one_named() -> None:
    watch = LossWatch()
    for step, value in enumerate([1.0, 2.0, torch.inf, torch.nan]):
        watch.see(step, {"a": torch.tensor([1.0]), "b": torch.tensor([value])})
    assert np.isnan(watch.latest)
    with pytest.raises(NonFiniteLossError, match="step 2: b is not finite"):
        watch.look(wait=True)


@pytest.mark.usefixtures("late")
def test_the_device_is_never_too_far_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrival, "MOST_PENDING", 3)
    watch = LossWatch()
    for step in range(3):
        watch.see(step, {SAMPLING_LOSS: torch.tensor([torch.nan])})
    with pytest.raises(NonFiniteLossError, match="step 0"):
        watch.see(3, {SAMPLING_LOSS: torch.tensor([1.0])})


class Doomed:
    """The model's loss until the weights have moved for some steps; then NaN from there on."""

    def __init__(self, good: int) -> None:
        self.good, self.calls = good, 0

    def __call__(self, model: nn.Module, ids: Tensor) -> Tensor:
        logits = model(ids)
        if torch.is_grad_enabled():
            self.calls += 1
        factor = 1.0 if self.calls <= self.good else torch.nan
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        )
        return factor * losses.view(len(ids), -1)


@pytest.mark.parametrize("checkpoint_every", [None, 2])
def test_a_failure_that_is_noticed_late_leaves_the_same_store(
    checkpoint_every: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of the failed step and those after it are dropped, and no good row is."""

    def run(name: str) -> SampleStore:
        with pytest.warns(ChainFailedWarning, match="chain 0 at step 7"):
            sample(
                tiny_model("raw"), token_rows(24, 9, seed=1), {"a": (token_rows(9, 9, seed=2), 1)},
                lr=1e-4, n_beta=1.0, num_chains=1, num_draws=12, num_burnin_steps=3, batch_size=4,
                num_init_loss_batches=1, loss_fn=Doomed(good=8), output_path=tmp_path / name,
                checkpoint_every=checkpoint_every, progress=False, device="cpu", save_metrics=True,
            )  # fmt: skip
        return SampleStore(tmp_path / name)

    prompt = run("prompt.zarr")
    monkeypatch.setattr(Arriving, "ready", lambda self: False)
    late = run("late.zarr")
    for key in ("failed_step", "steps_written", "draws_written", "reason", "state"):
        assert late.record(0)[key] == prompt.record(0)[key]
    assert late.record(0)["steps_written"] == 7
    for name, array in prompt.arrays.items():
        np.testing.assert_array_equal(late.arrays[name][...], array[...], err_msg=name)
    assert np.isfinite(late.arrays["loss_a"][0, :4]).all()
    assert np.isnan(late.arrays["loss_a"][0, 4:]).all()


class InfiniteOnce:
    """The model's loss, but infinite on the observable after the n-th gradient."""

    def __init__(self, at: int) -> None:
        self.at, self.calls = at, 0

    def __call__(self, model: nn.Module, ids: Tensor) -> Tensor:
        self.calls += torch.is_grad_enabled()
        infinite = self.calls == self.at and not torch.is_grad_enabled()
        return next_token_loss(model, ids) + (math.inf if infinite else 0.0)


@pytest.mark.usefixtures("late")
def test_draws_behind_a_failed_one_are_dropped_though_their_losses_are_numbers(
    tmp_path: Path,
) -> None:
    with pytest.warns(ChainFailedWarning, match="chain 0 at step 7: the loss of observable a"):
        sample(
            tiny_model("raw"), token_rows(24, 9, seed=1), {"a": (token_rows(9, 9, seed=2), 1)},
            lr=1e-4, n_beta=1.0, num_chains=1, num_draws=6, num_burnin_steps=3,
            num_steps_bw_draws=2, batch_size=4, num_init_loss_batches=1, progress=False,
            loss_fn=InfiniteOnce(9), output_path=tmp_path / "s.zarr", device="cpu",
        )  # fmt: skip
    losses = SampleStore(tmp_path / "s.zarr").arrays["loss_a"][0]
    np.testing.assert_array_equal(np.isnan(losses).all((1, 2)), [False] * 2 + [True] * 4)
