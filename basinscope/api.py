"""Calls that sample first and analyse then, and plans of analyses."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import xarray as xr

from basinscope.analysis.bif import BifOptions, compute_bif, plan_bif
from basinscope.analysis.llc import compute_llc, plan_of_llc
from basinscope.analysis.plan import Plan
from basinscope.analysis.susceptibilities import (
    FULL,
    compute_susceptibilities,
    plan_of_susceptibilities,
)

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


def bif(
    model: nn.Module,
    dataset: Dataset,
    observables: Mapping[str, Dataset | tuple[Dataset, int]],
    *,
    lr: float,
    n_beta: float,
    param_masks: Mapping[str, Tensor | None] | None = None,
    correlation_method: Literal["token", "sequence"] = "token",
    reduce_chain_dimension_method: Literal["stack", "mean"] = "stack",
    average_tokenwise_bif: bool = False,
    compute_covariance: bool = False,
    bif_batch_size: int | None = None,
    bif_device: str | None = None,
    loss_fn: Callable[[nn.Module, Tensor], Tensor] | None = None,
    **sample_kwargs: Any,
) -> xr.Dataset:
    """Sample around a checkpoint and correlate the losses of tokens or sequences.

    Parameters
    ----------
    model, dataset, observables, lr, n_beta, param_masks, loss_fn, **sample_kwargs
        As :func:`basinscope.sample` takes them.
    correlation_method, reduce_chain_dimension_method, average_tokenwise_bif, compute_covariance
        As :func:`basinscope.compute_bif` takes them.
    bif_batch_size, bif_device
        Its ``batch_size`` and ``device``.

    Returns
    -------
    xr.Dataset
        As :func:`basinscope.compute_bif` gives it.
    """
    from basinscope.sampling.sample import sample

    options: dict[str, Any] = {
        "correlation_method": correlation_method,
        "reduce_chain_dimension_method": reduce_chain_dimension_method,
        "average_tokenwise_bif": average_tokenwise_bif,
        "compute_covariance": compute_covariance,
        "batch_size": bif_batch_size,
        "device": bif_device,
    }
    BifOptions(**options)  # wrong ones are refused before anything is sampled
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
    return compute_bif(tree, **options)


def susceptibilities(
    model: nn.Module,
    dataset: Dataset,
    observables: Mapping[str, Dataset | tuple[Dataset, int]],
    weight_restrictions: Mapping[str, Mapping[str, Tensor | None] | None],
    *,
    sampling_task: str,
    lr: float,
    n_beta: float,
    loss_fn: Callable[[nn.Module, Tensor], Tensor] | None = None,
    include_sampling_task: bool = False,
    output_path: str | os.PathLike[str] | None = None,
    **sample_kwargs: Any,
) -> xr.DataTree:
    """Sample under each weight restriction and estimate every token's susceptibility to it.

    Parameters
    ----------
    model, dataset, observables, lr, n_beta, loss_fn, **sample_kwargs
        As :func:`basinscope.sample` takes them.
    weight_restrictions : mapping of str to parameter masks
        What may move under each restriction; "full" must be there (None: all weights).
    sampling_task : str
        The observable on the data that is sampled on.
    include_sampling_task : bool
        Ask about its tokens too.
    output_path : path, optional
        ``runs/s.zarr`` writes ``runs/s_{restriction}.zarr``, a store for each restriction; the
        same call continues what was stopped.

    Returns
    -------
    xr.DataTree
        As :func:`basinscope.compute_susceptibilities` gives it.

    Raises
    ------
    ValueError
        If "full" or the task is missing, nothing is left to ask about, or a restriction's name is
        no file name; before anything is sampled.
    """
    from basinscope.sampling.sample import sample

    paths = _paths_of(weight_restrictions, output_path)
    if sampling_task not in observables:
        raise ValueError(
            f"sampling_task={sampling_task!r} is no observable; there are {', '.join(observables)}"
        )
    if not include_sampling_task and len(observables) == 1:
        raise ValueError(
            f"{sampling_task!r} is the only observable: add another to ask about, or pass "
            "include_sampling_task=True"
        )
    trees = {
        name: sample(
            model,
            dataset,
            observables,
            lr=lr,
            n_beta=n_beta,
            param_masks=masks,
            loss_fn=loss_fn,
            output_path=paths[name],
            **sample_kwargs,
        )
        for name, masks in weight_restrictions.items()
    }
    return compute_susceptibilities(
        trees, sampling_task, include_sampling_task=include_sampling_task
    )


def plan(
    estimator: Literal["llc", "bif", "susceptibilities"], samples: Any, *args: Any, **options: Any
) -> Plan:
    """Say what an analysis would read, hold, compute and write; reads metadata only.

    Parameters
    ----------
    estimator : {"llc", "bif", "susceptibilities"}
    samples, *args, **options
        As :func:`basinscope.compute_llc`, :func:`basinscope.compute_bif` or
        :func:`basinscope.compute_susceptibilities` take them.

    Returns
    -------
    Plan
        ``plan.validate(memory_limit)`` refuses what does not fit.

    Raises
    ------
    ValueError
        If the estimator or an argument is wrong.
    """
    planners: dict[str, Callable[..., Plan]] = {
        "llc": plan_of_llc,
        "bif": plan_bif,
        "susceptibilities": plan_of_susceptibilities,
    }
    if estimator not in planners:
        raise ValueError(f"estimator={estimator!r}: choose one of {', '.join(planners)}")
    return planners[estimator](samples, *args, **options)


def _paths_of(
    restrictions: Mapping[str, object], output_path: str | os.PathLike[str] | None
) -> dict[str, Path | None]:
    """Give each restriction a store beside the others."""
    if FULL not in restrictions:
        raise ValueError(
            f"weight_restrictions lacks {FULL!r} (None for all weights); it has "
            f"{', '.join(restrictions) or 'nothing'}"
        )
    if len(restrictions) == 1:
        raise ValueError(f"weight_restrictions has {FULL!r} only: add one to compare with")
    if output_path is None:
        return dict.fromkeys(restrictions)
    base = Path(output_path)
    for name in restrictions:
        if not name or Path(name).name != name:
            raise ValueError(
                f"restriction {name!r} cannot be part of a file name: rename it, without '/'"
            )
    return {name: base.with_name(f"{base.stem}_{name}{base.suffix}") for name in restrictions}
