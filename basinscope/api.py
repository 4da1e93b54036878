"""Calls that sample first and analyse then."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import xarray as xr

from basinscope.analysis.llc import compute_llc

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor, nn


def llc(
    model: nn.Module,
    dataset: Dataset,
    observables: Mapping[str, Dataset | tuple[Dataset, int]],
    *,
    lr: float,
    n_beta: float,
    param_masks: Mapping[str, Tensor | None] | None = None,
    loss_fn: Callable[[nn.Module, Tensor], Tensor] | None = None,
    **sample_kwargs: Any,
) -> xr.Dataset:
    """Sample around a checkpoint and estimate its local learning coefficient.

    Parameters
    ----------
    model, dataset, observables, lr, n_beta, param_masks, loss_fn, **sample_kwargs
        As :func:`basinscope.sample` takes them.

    Returns
    -------
    xr.Dataset
        As :func:`basinscope.compute_llc` gives it.
    """
    from basinscope.sampling.sample import sample

    tree = sample(
        model,
        dataset,
        observables,
        lr=lr,
        n_beta=n_beta,
        param_masks=param_masks,
        loss_fn=loss_fn,
        **sample_kwargs,
    )
    return compute_llc(tree)
