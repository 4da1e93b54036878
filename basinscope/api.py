"""Calls that sample first and analyse then, and plans of analyses."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import xarray as xr

from basinscope.analysis.bif import BifOptions, compute_bif, plan_bif
from basinscope.analysis.llc import compute_llc, plan_of_llc
from basinscope.analysis.plan import Plan
from basinscope.analysis.reliability import plan_bif_reliability
from basinscope.analysis.susceptibilities import (
    FULL,
    Baseline,
    compute_susceptibilities,
    plan_of_susceptibilities,
    require_baseline,
)
from basinscope.io.location import local_path

if TYPE_CHECKING:
    from datasets import Dataset
    from distributed import Client
    from torch import Tensor, nn

    from basinscope.sampling.losses import LossFn
    from basinscope.sampling.observables import Observables

    Restrictions = Mapping[str, Mapping[str, Tensor | None] | str | Sequence[str] | None]


def llc(
    model: nn.Module,
    dataset: Dataset,
    observables: Observables,
    *,
    lr: float,
    n_beta: float,
    param_masks: Mapping[str, Tensor | None] | None = None,
    loss_fn: LossFn | None = None,
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
    observables: Observables,
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
    top_k: int | None = None,
    queries: Literal["all"] | Sequence[tuple[int, int]] = "all",
    loss_fn: LossFn | None = None,
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
    top_k, queries
        As :func:`basinscope.compute_bif` takes them.

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
        "top_k": top_k,
        "queries": queries,
    }
    BifOptions(**options)  # wrong ones are refused before anything is sampled
    _require_traces(observables, sample_kwargs)
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
    observables: Observables,
    weight_restrictions: Restrictions | Sequence[str],
    *,
    sampling_task: str,
    lr: float,
    n_beta: float,
    loss_fn: LossFn | None = None,
    include_sampling_task: bool = False,
    baseline: Baseline = "sampling",
    output_path: str | os.PathLike[str] | None = None,
    client: Client | None = None,
    progress: bool | None = None,
    **sample_kwargs: Any,
) -> xr.DataTree:
    """Sample under each weight restriction and estimate every token's susceptibility to it.

    Parameters
    ----------
    model, dataset, observables, lr, n_beta, loss_fn, **sample_kwargs
        As :func:`basinscope.sample` takes them.
    weight_restrictions : mapping of str to masks or restriction, or list of str
        What may move under each name: parameter masks, a restriction or list of them as
        :func:`basinscope.create_param_masks` takes it, or None for all weights. A list names
        restrictions that are called what they are, such as ``["full", "l0h0", "l0h1"]``. "full"
        must be there.
    sampling_task : str
        The observable on the data that is sampled on.
    include_sampling_task : bool
        Ask about its tokens too.
    baseline : {"sampling", "task"}
        As :func:`basinscope.compute_susceptibilities` takes it.
    output_path : path, optional
        ``runs/s.zarr`` writes ``runs/s_{restriction}.zarr``, a store for each restriction; the
        same call continues what was stopped, and restrictions that are complete are not sampled
        again; array jobs may each be given some of them, "full" among them.
    client : distributed.Client, optional
        Sample each restriction as a task on its workers, which see `output_path` too.
    progress : bool, optional
        True: lines on stderr; False: nothing; None: a bar on a terminal, lines elsewhere.

    Returns
    -------
    xr.DataTree
        As :func:`basinscope.compute_susceptibilities` gives it.

    Raises
    ------
    ValueError
        If "full" or the task is missing, nothing is left to ask about, or a restriction's name is
        no file name; before anything is sampled. So if there is a client and no `output_path`.
    """
    from basinscope.sampling.progress import show_count
    from basinscope.sampling.sample import sample

    if "param_masks" in sample_kwargs:
        raise TypeError(
            "susceptibilities() takes masks by name, one run for each: give them in "
            "weight_restrictions, not as param_masks"
        )
    if isinstance(weight_restrictions, str):
        raise TypeError(
            f"weight_restrictions must be a mapping or a list of names, such as "
            f"['full', {weight_restrictions!r}]; got one string"
        )
    if not isinstance(weight_restrictions, Mapping):
        weight_restrictions = {name: name for name in weight_restrictions}
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
    require_baseline(baseline)
    if client is not None and output_path is None:
        raise ValueError("with a client the workers write stores: give output_path")
    reference = weight_restrictions[FULL]
    if isinstance(reference, str) and reference.strip().lower() != FULL:
        raise ValueError(
            f"{FULL!r} is the run that moves every weight; got the restriction {reference!r} for "
            f"it: give that another name, and {FULL!r}: {FULL!r}"
        )
    masks = {name: _masks_of(model, wanted) for name, wanted in weight_restrictions.items()}
    arguments = (model, dataset, observables)
    settings = {"lr": lr, "n_beta": n_beta, "loss_fn": loss_fn, "progress": False, **sample_kwargs}
    each: dict[str, dict[str, Any]] = {
        name: {"param_masks": param_masks, "output_path": paths[name]}
        for name, param_masks in masks.items()
    }
    if client is not None:
        _sample_on(client, (arguments, settings), each, progress)
    trees = {}
    with show_count("restriction", len(each), False if client is not None else progress) as report:
        report(0)
        for name, one in each.items():
            trees[name] = sample(*arguments, **{**settings, **one})
            report(len(trees))
    return compute_susceptibilities(
        trees, sampling_task, include_sampling_task=include_sampling_task, baseline=baseline
    )


def plan(
    estimator: Literal["llc", "bif", "bif_reliability", "susceptibilities"],
    samples: Any,
    *args: Any,
    **options: Any,
) -> Plan:
    """Say what an analysis would read, hold, compute and write; reads metadata only.

    Parameters
    ----------
    estimator : {"llc", "bif", "bif_reliability", "susceptibilities"}
    samples, *args, **options
        As :func:`basinscope.compute_llc`, :func:`basinscope.compute_bif`,
        :func:`basinscope.bif_reliability` or :func:`basinscope.compute_susceptibilities` take them.

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
        "bif_reliability": plan_bif_reliability,
        "susceptibilities": plan_of_susceptibilities,
    }
    if estimator not in planners:
        raise ValueError(f"estimator={estimator!r}: choose one of {', '.join(planners)}")
    return planners[estimator](samples, *args, **options)


def _sample_on(
    client: Client,
    shared: tuple[tuple[Any, ...], Mapping[str, Any]],
    each: Mapping[str, Mapping[str, Any]],
    progress: bool | None,
) -> None:
    """Have a cluster's workers sample stores; an error of one of them is raised."""
    from distributed import as_completed

    from basinscope.sampling.progress import show_count

    sent = client.scatter(_packed(shared), broadcast=True, hash=False)
    tasks = [client.submit(_sample_store, sent, _packed(one), pure=False) for one in each.values()]
    with show_count("restriction", len(tasks), progress) as report:
        report(0)
        for done, task in enumerate(as_completed(tasks), start=1):
            task.result()
            report(done)


def _packed(what: Any) -> bytes:
    """Pickle for a cluster, as for worker processes.

    Distributed's own way with modules spoils the dicts of their hooks, and unties tied weights.
    """
    from basinscope.sampling.workers import pickled

    buffer = io.BytesIO()
    pickled(
        what,
        buffer,
        names="the model, the data or loss_fn",
        elsewhere="a cluster",
        instead="leave client out",
    )
    return buffer.getvalue()


def _sample_store(shared: bytes, own: bytes) -> None:
    import torch

    from basinscope.sampling.sample import sample

    arguments, settings = torch.load(io.BytesIO(shared), weights_only=False)
    sample(*arguments, **{**settings, **torch.load(io.BytesIO(own), weights_only=False)})


def _require_traces(observables: Any, settings: Mapping[str, Any]) -> None:
    """Refuse to sample what no correlation can be computed of."""
    if isinstance(observables, Mapping) and not observables:
        raise ValueError("observables is empty: influence is between the tokens of observables")
    if settings.get("num_chains") == 1 and settings.get("num_draws") == 1:
        raise ValueError(
            "num_chains=1 and num_draws=1 give one sample, and a correlation needs two: draw more"
        )


def _masks_of(model: nn.Module, wanted: Any) -> Mapping[str, Tensor | None] | None:
    """Masks as they are, or those of a restriction; None for all weights."""
    from basinscope.models.restrictions import create_param_masks

    if wanted is None or isinstance(wanted, Mapping):
        return wanted
    if isinstance(wanted, str) and wanted.strip().lower() == FULL:
        return None
    return create_param_masks(model, wanted)


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
    base = local_path(output_path)
    for name in restrictions:
        if not name or Path(name).name != name:
            raise ValueError(
                f"restriction {name!r} cannot be part of a file name: rename it, without '/'"
            )
    return {name: base.with_name(f"{base.stem}_{name}{base.suffix}") for name in restrictions}
