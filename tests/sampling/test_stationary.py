"""Chains reach the distribution that the update's equation has, through the whole of sample().

Each test compares a mean with its exact value at 3 Monte-Carlo standard errors: a correct sampler
fails one of them with probability 0.27%, and the seeds are fixed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor, nn

import basinscope
from tests.conftest import token_rows
from tests.reference.langevin import power_llc, quadratic_mean_loss

STEPS, WEIGHTS = 600, 120  # their product gives the tests their power, and steps cost more


class Weights(nn.Module):
    """A model that is nothing but a vector of weights."""

    def __init__(self, w0: np.ndarray) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w0, dtype=torch.float32))


CASES: dict[str, dict[str, Any]] = {
    "n_beta": {"n_beta": 40.0},
    "localization": {"n_beta": 20.0, "localization": 60.0},
    "weight decay": {"n_beta": 20.0, "localization": 10.0, "llc_weight_decay": 30.0},
    "noise level": {"n_beta": 40.0, "noise_level": 0.6},
    "coarse step": {"n_beta": 40.0, "lr": 1.5e-2},
}


@pytest.mark.parametrize("case", CASES)
def test_quadratic_loss(case: str, tmp_path: Path) -> None:
    settings = {"lr": 6e-3, **CASES[case]}
    h = np.linspace(0.5, 4.0, WEIGHTS)
    tree = run(Weights(np.zeros(WEIGHTS)), quadratic(h), tmp_path, **settings)
    settings["weight_decay"] = settings.pop("llc_weight_decay", 0.0)
    assert_mean(tree, quadratic_mean_loss(h, **settings))


def test_quadratic_loss_away_from_the_minimum(tmp_path: Path) -> None:
    h, w0 = np.linspace(0.5, 4.0, WEIGHTS), np.linspace(-1, 1, WEIGHTS)
    settings = {"lr": 6e-3, "n_beta": 20.0, "localization": 40.0}
    tree = run(Weights(w0), quadratic(h), tmp_path, **settings)
    assert_mean(tree, quadratic_mean_loss(h, w0=w0, **settings))


def test_only_masked_weights_count(tmp_path: Path) -> None:
    h = np.linspace(0.5, 4.0, WEIGHTS)
    mask = np.arange(WEIGHTS) % 3 == 0
    settings = {"lr": 6e-3, "n_beta": 30.0, "localization": 15.0}
    masks = {"w": torch.from_numpy(mask)}
    tree = run(Weights(np.zeros(WEIGHTS)), quadratic(h), tmp_path, param_masks=masks, **settings)
    assert_mean(tree, quadratic_mean_loss(h[mask], **settings))


def test_llc_of_powers(tmp_path: Path) -> None:
    """LLC of K = Σ c_i w_i^p_i is Σ 1/p_i; a quarter of it would be lost with p = 2 alone."""
    powers = np.repeat([2, 4], 225)
    scale = torch.from_numpy(np.tile([0.7, 1.0, 1.6], 150)).float()
    exponents = torch.from_numpy(powers)

    def loss(model: nn.Module, input_ids: Tensor) -> Tensor:
        return spread((scale * model.w.abs() ** exponents).sum(), input_ids)

    tree = run(Weights(np.zeros(450)), loss, tmp_path, lr=1e-3, n_beta=30.0, steps=2010)
    assert_mean(tree, power_llc(powers) / 30.0, discretisation=0.004)


def run(
    model: nn.Module, loss: Any, path: Path, steps: int = STEPS, **settings: Any
) -> xr.DataTree:
    return basinscope.sample(
        model,
        token_rows(2, 2, seed=0),
        {},
        num_chains=4,
        num_draws=steps,
        num_burnin_steps=steps // 5,
        batch_size=2,
        num_init_loss_batches=1,
        loss_fn=loss,
        output_path=path / "samples.zarr",
        progress=False,
        device="cpu",
        **settings,
    )


def quadratic(h: np.ndarray) -> Any:
    curvature = torch.from_numpy(h).float()

    def loss(model: nn.Module, input_ids: Tensor) -> Tensor:
        return spread(0.5 * (curvature * model.w**2).sum(), input_ids)

    return loss


def spread(value: Tensor, input_ids: Tensor) -> Tensor:
    return value.expand(input_ids.shape[0], input_ids.shape[1] - 1)


def assert_mean(tree: xr.DataTree, expected: float, discretisation: float = 0.0) -> None:
    """Compare at 3 standard errors from means of blocks longer than the chains remember.

    ``discretisation`` is the relative bias of a finite step that the exact value leaves out.
    """
    losses = tree["sampling_loss"].to_numpy()[:, :, 0, 0]
    blocks = losses.reshape(4, 15, -1).mean(2).reshape(-1)
    error = blocks.std(ddof=1) / np.sqrt(blocks.size)
    assert error < 0.02 * expected, "the test has no power"
    assert abs(blocks.mean() - expected) < 3 * error + discretisation * expected
