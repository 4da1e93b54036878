"""Chains of 16-bit weights: what rounding does to them, and that it is said."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import basinscope
from basinscope.sampling.precision import WeightRoundingWarning, added_noise, unit
from tests.conftest import token_rows
from tests.models_small import tiny_model


class Weights(nn.Module):
    """A model that is nothing but a vector of bfloat16 weights."""

    def __init__(self, value: float, count: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.full((count,), value, dtype=torch.bfloat16))


def spread(lr: float, rounding: str, tmp_path: Path) -> float:
    """Variance of 4000 bfloat16 weights of 1.5 over their Langevin variance, after 64 free steps.

    The gradient is zero, so weights diffuse: the variance after t steps is t lr. Its estimate from
    4000 weights has a relative standard error of (2 / 4000)^0.5, 2.2%.
    """
    model = Weights(1.5, 4000)
    seen: list[Tensor] = []

    def flat(model: nn.Module, ids: Tensor) -> Tensor:
        seen.append(model.w.detach().clone())  # type: ignore[operator]
        return 1.0 + (0 * model.w.float()).sum() + torch.zeros(len(ids), ids.shape[1] - 1)

    basinscope.sample(
        model, token_rows(4, 3, seed=1), {}, lr=lr, n_beta=1.0, num_chains=1, num_draws=65,
        batch_size=2, num_init_loss_batches=1, weight_rounding=rounding, loss_fn=flat,
        output_path=tmp_path / f"{lr}-{rounding}.zarr", progress=False, device="cpu",
    )  # fmt: skip
    return float((seen[-1].double() - 1.5).var()) / (64 * lr)


def test_small_steps_are_lost_to_the_nearest_and_kept_by_chance(tmp_path: Path) -> None:
    """At 1.5 the unit is 2^-7; steps of a tenth of it vanish, or are heated as predicted."""
    lr = (2**-7 / 10) ** 2
    with pytest.warns(WeightRoundingWarning, match="100% of the weights"):
        assert spread(lr, "nearest", tmp_path) == 0.0
    predicted = 1 + float(added_noise(torch.tensor(0.1)))
    assert predicted == pytest.approx(10 * math.sqrt(2 / math.pi))
    with pytest.warns(WeightRoundingWarning, match=r"adds noise of 7\.0 times the variance"):
        assert spread(lr, "stochastic", tmp_path) == pytest.approx(predicted, rel=0.1)


def test_steps_of_some_units_are_right_either_way(tmp_path: Path) -> None:
    """Within 4 standard errors and the noise of rounding, a sixth and a twelfth over 4^2."""
    lr = (2**-7 * 4) ** 2
    with warnings.catch_warnings():
        warnings.simplefilter("error", WeightRoundingWarning)
        for rounding in ("nearest", "stochastic"):
            assert spread(lr, rounding, tmp_path) == pytest.approx(1.0, abs=0.1 + 1 / 96)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_unit_is_the_distance_to_the_next_number(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).smallest_normal
    weights = torch.tensor([1.0, 1.5, -3.0, 0.011, 100.0, tiny, tiny / 4, 0.0], dtype=dtype)
    following = (weights.view(torch.int16) + 1).view(dtype)
    exact = (following.float() - weights.float()).abs()
    torch.testing.assert_close(unit(weights), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_zero_weights_lose_no_step(rounding: str, tmp_path: Path) -> None:
    """The next number to zero is 9e-41, so that weights that were pruned take any step."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", WeightRoundingWarning)
        basinscope.sample(
            Weights(0.0, 100), token_rows(4, 3, seed=1), {}, lr=1e-8, n_beta=1.0, num_chains=1,
            num_draws=1, batch_size=2, num_init_loss_batches=1, weight_rounding=rounding,
            loss_fn=lambda model, ids: (0 * model.w.float()).sum() + torch.ones(len(ids), 2),
            output_path=tmp_path / "s.zarr", progress=False, device="cpu",
        )  # fmt: skip


def test_float32_weights_are_silent(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        basinscope.sample(
            tiny_model("raw"), token_rows(8, 5, seed=1), {}, lr=1e-12, n_beta=1.0, num_chains=1,
            num_draws=1, batch_size=2, num_init_loss_batches=1, progress=False, device="cpu",
            output_path=tmp_path / "s.zarr",
        )  # fmt: skip


def test_autocast_changes_products_and_nothing_else(tmp_path: Path) -> None:
    """Losses are float32, near those without it, not equal; weights and gradients float32."""
    model = tiny_model("gpt_neox")
    settings = {
        "lr": 1e-5, "n_beta": 1.0, "num_chains": 1, "num_draws": 3, "batch_size": 4,
        "num_init_loss_batches": 1, "progress": False, "device": "cpu",
    }  # fmt: skip
    data = token_rows(24, 9, seed=1)
    trees = [
        basinscope.sample(model, data, {"a": (data, 1)}, autocast=autocast, **settings,
                          output_path=tmp_path / f"{autocast}.zarr")
        for autocast in (None, "bfloat16")
    ]  # fmt: skip
    plain, cast = (tree["loss_a"].to_numpy() for tree in trees)
    assert cast.dtype == np.float32
    assert (plain != cast).mean() > 0.9
    np.testing.assert_allclose(cast, plain, rtol=0.03)
    assert trees[1].attrs["metadata"]["config"]["sampler"]["autocast"] == "bfloat16"
