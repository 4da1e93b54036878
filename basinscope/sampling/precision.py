"""What rounding 16-bit weights does to the steps of a chain."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from basinscope.sampling.job import SamplingJob

TOLERATED_LOSS = 0.05  # share of the moved weights that may stand still without a word
TOLERATED_HEAT = 0.1  # noise that rounding may add, in units of the Langevin noise's variance


class WeightRoundingWarning(UserWarning):
    """The weights' dtype is too coarse for the steps that they should take."""


def warn_about_rounding(job: SamplingJob) -> None:
    """Warn if rounding the weights loses a typical step, or drowns it in noise."""
    step = math.sqrt(job.config.lr) * job.config.noise_level
    if step == 0:
        return
    parameters = dict(job.model.named_parameters())
    moved, lost, heat = 0, 0.0, 0.0
    for name, mask in job.masks.items():
        weight = parameters[name].detach()
        chosen = weight.reshape(-1) if mask is None else weight[mask.to(weight.device)]
        moved += chosen.numel()
        if weight.dtype in (torch.bfloat16, torch.float16):
            ratio = step / unit(chosen)
            if job.config.weight_rounding == "nearest":
                lost += float((ratio < 0.5).sum())
            else:
                heat += float(added_noise(ratio).sum(dtype=torch.float64))
    advice = "Use float32 weights, if need be with autocast='bfloat16', or a larger lr"
    if lost > TOLERATED_LOSS * moved:
        warnings.warn(
            f"{lost / moved:.0%} of the weights that move have 16 bits and are so large that a "
            f"typical step, sqrt(lr) noise_level = {step:.1e}, is less than half the distance to "
            "the next such number: most of their steps are lost when they are rounded, and the "
            f"chain explores less than its settings say. {advice}",
            WeightRoundingWarning,
            stacklevel=3,
        )
    if heat > TOLERATED_HEAT * moved:
        warnings.warn(
            f"stochastic rounding adds noise of {heat / moved:.1f} times the variance of the "
            f"Langevin noise (steps of sqrt(lr) noise_level = {step:.1e} are small against the "
            "distance between bfloat16 numbers): the chain is that much hotter than n_beta says. "
            f"{advice}",
            WeightRoundingWarning,
            stacklevel=3,
        )


def unit(weights: Tensor) -> Tensor:
    """Distance from each weight to the next larger number of its dtype, float32.

    Zero and the subnormal numbers lie as close as the smallest normal ones.
    """
    dtype = torch.finfo(weights.dtype)
    _, exponent = torch.frexp(weights.float().abs().clamp_min(dtype.smallest_normal))
    half = torch.full_like(weights, 0.5, dtype=torch.float32)
    return torch.ldexp(half, exponent) * dtype.eps


def added_noise(ratio: Tensor) -> Tensor:
    """Variance that stochastic rounding adds to a normal step, in units of the step's own.

    A point at fraction f between two neighbours a unit apart is rounded with variance f (1 - f).
    A step that is small against a unit leaves a grid point by f = |step|, on average sqrt(2 / pi)
    of its standard deviation; with larger ones f is uniform, and f (1 - f) is 1 / 6 on average.

    Parameters
    ----------
    ratio
        Standard deviation of the step over the unit.
    """
    small = math.sqrt(2 / math.pi) / ratio - 1
    return torch.where(ratio < 0.5, small, 1 / (6 * ratio**2))
