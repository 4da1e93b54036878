"""A batch's gradient is taken a part at a time: less is kept at once, the numbers are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

from basinscope.sampling import job
from tests.models_small import tiny_model
from tests.sampling import test_at_once

TOKENS = 9  # of a sequence, in what is run
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rmsprop": {"sampling_method": "rmsprop_sgld", "save_metrics": True},
    "accumulated": {"gradient_accumulation_steps": 3, "batch_size": 2},
    "uneven": {"batch_size": 5},
    "last layer": {"masks": True},
}


def run(path: Path, model: torch.nn.Module, **changes: Any) -> xr.DataTree:
    if changes.pop("masks", False):
        changes["param_masks"] = {n: None for n, _ in model.named_parameters() if "layers.1." in n}
    quiet = {"lr": 1e-2, "noise_level": 0.0, "num_chains": 1, "num_draws": 8, "batch_size": 6}
    quiet["num_init_loss_batches"] = 2  # they have no gradient
    return test_at_once.run(path, model, **{**quiet, **changes})


@pytest.fixture(scope="module", params=VARIANTS)
def variant(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], xr.DataTree]:
    """Settings, and what whole batches give with them."""
    settings, path = VARIANTS[request.param], tmp_path_factory.mktemp("whole") / "whole.zarr"
    return settings, run(path, tiny_model("gpt_neox"), **settings).load()


@pytest.mark.parametrize("sequences", [1, 2, 4])
def test_parts_give_the_numbers_of_the_whole(
    variant: tuple[dict[str, Any], xr.DataTree],
    sequences: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (settings, whole), model = variant, tiny_model("gpt_neox")
    monkeypatch.setattr(job, "GRADIENT_TOKENS", sequences * TOKENS + 1)
    seen = watch_gradients(model)
    parts = run(tmp_path / "parts.zarr", model, **settings)
    assert max(seen) <= sequences
    for name in whole.data_vars:
        np.testing.assert_allclose(parts[name], whole[name], rtol=2e-5, atol=2e-6, err_msg=name)
    shift = np.abs(whole["loss_first"].isel(draw=-1) - whole["loss_first"].isel(draw=0))
    assert shift.max() > 1e-2, "nothing moved: this shows nothing"


def test_dropout_and_a_loss_of_the_callers_see_whole_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "GRADIENT_TOKENS", TOKENS)
    model = tiny_model("gpt_neox")
    seen = watch_gradients(model)
    run(tmp_path / "dropout.zarr", model, train_mode=True)
    looks_first = [1, 1]
    assert seen == [*looks_first, *[6] * 8]
    seen.clear()
    run(tmp_path / "own.zarr", model, loss_fn=logit_size)
    assert set(seen) == {6}


def logit_size(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    size: torch.Tensor = model(ids).logits[:, :-1].square().mean(-1)
    return size


def watch_gradients(model: torch.nn.Module) -> list[int]:
    """Note the sequences of each forward pass whose gradient may be taken."""
    seen: list[int] = []

    def note(module: torch.nn.Module, given: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            ids = kwargs.get("input_ids", given[0] if given else None)
            seen.append(len(ids))  # type: ignore[arg-type]

    model.register_forward_pre_hook(note, with_kwargs=True)
    return seen
