"""The LLCs of several runs side by side, and how far the differences between them are real."""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from dask.delayed import delayed

from basinscope.analysis.diagnostics import diagnose_trace
from basinscope.analysis.graphs import arrays_in
from basinscope.analysis.llc import batch_means, counted_steps, plan_llc, sampled_losses
from basinscope.analysis.means import Totals, at_checkpoint, mean_losses, with_totals
from basinscope.analysis.memory import parse_memory_limit
from basinscope.analysis.rise import Batches, drift_of, error_of_rise
from basinscope.analysis.selections import numbers_along
from basinscope.analysis.stores import Samples, open_samples

RUN, OTHER = "run", "other_run"
SETTINGS_OF_BATCHES = (
    "batch_size", "gradient_accumulation_steps", "init_seed", "shuffle",
    "match_sampling_input_ids_across_chains", "num_init_loss_batches",
)  # fmt: skip


def compare_llc(
    runs: Mapping[Any, xr.DataTree | str | os.PathLike[str]],
    *,
    burn_in: int = 0,
    allow_incomplete: bool = False,
    memory_limit: int | str | None = None,
) -> xr.Dataset:
    """Estimate the LLC of several runs, and their differences with an error of their own.

    For the checkpoints of a training, say, or for restrictions of one model. Runs with the same
    settings on the same data see the same batches, and chains of one number have the same noise.
    What that does to both LLCs cancels in their difference, which is therefore known better than
    the LLCs themselves. Its error is the error of the rise of the traces' difference, see
    :func:`basinscope.analysis.rise.error_of_rise`. Runs that did not see the same batches, or have
    other chains or another number of steps, are taken to be independent.

    Parameters
    ----------
    runs : mapping of str, or of numbers, to DataTree or path
        Stores of :func:`basinscope.sample` or of devinterp 2.x, two or more. Names that are
        numbers, such as training steps, make a numbered axis.
    burn_in : int
        Steps to leave out at the start of every chain.
    allow_incomplete : bool
        Take what running or interrupted stores record as written.
    memory_limit : int or str, optional
        Bytes, or such as "2GiB". Default: half of the free memory.

    Returns
    -------
    xr.Dataset
        Lazy; along ``run``, in the order given:

        - ``llc_mean``, ``llc_mcse``, ``rhat``, ``ess_bulk``, ``init_loss`` and ``n_beta``, as
          :func:`basinscope.compute_llc` gives them
        - ``llc_drift``, ``llc_drift_mcse``: LLC of the second half of the steps minus that of the
          first, and its standard error
        - ``difference (run, other_run)``: LLC of one run minus that of another, and
          ``difference_mcse``, its standard error
        - ``paired (run, other_run)``: whether both saw the same batches

    Raises
    ------
    TypeError
        If ``runs`` is no mapping, or its names are neither all texts nor all numbers.
    ValueError
        If there are fewer than two runs, or one of them cannot be analysed; see
        :func:`basinscope.compute_llc`.
    PlanError
        If ``memory_limit`` is too small.

    Warns
    -----
    UserWarning
        If chains are left out; names them.
    """
    if not isinstance(runs, Mapping):
        raise TypeError(
            f"runs must map names to stores, {{'step 100': tree, ...}}; got {type(runs).__name__}"
        )
    _require_names(list(runs))
    if len(runs) < 2:
        raise ValueError(
            f"{', '.join(map(str, runs)) or 'nothing'} is too little to compare: give two runs"
        )
    limit = parse_memory_limit(memory_limit)
    opened = [open_samples(store, allow_incomplete) for store in runs.values()]
    counted = [counted_steps(samples, burn_in) for samples in opened]
    for samples in opened:
        plan_llc(samples, []).validate(limit)
    found = [
        with_totals(
            _trace, steps.parts, samples.init_loss(), samples.init_batch_loss(), samples.n_beta,
            steps.batches,
        )
        for samples, steps in zip(opened, counted, strict=True)
    ]  # fmt: skip
    batches = [steps.batches for steps in counted]
    lengths = [[part.shape[1] for part in steps.parts] for steps in counted]
    paired = np.eye(len(runs), dtype=bool)
    for a, b in combinations(range(len(runs)), 2):
        paired[a, b] = paired[b, a] = lengths[a] == lengths[b] and _see_the_same(
            opened[a], batches[a], opened[b], batches[b]
        )
    sizes = {RUN: len(runs), OTHER: len(runs)}
    members = {
        name: (tuple(sizes[dim] for dim in dim_names), np.float64)
        for name, (dim_names, _, _) in _VARIABLES.items()
    }
    arrays: dict[str, Any] = dict(arrays_in(delayed(_compare)(found, batches, paired), members))
    arrays |= {"paired": paired, "n_beta": np.array([samples.n_beta for samples in opened])}
    variables = {
        name: xr.Variable(dim_names, arrays[name], {"long_name": long_name, "units": units})
        for name, (dim_names, long_name, units) in (_VARIABLES | _KNOWN).items()
    }
    names = list(runs)
    return xr.Dataset(variables, {RUN: names, OTHER: names}, _common_attributes(opened))


def _require_names(names: list[Any]) -> None:
    """Have names that one axis can hold, without two that are the same there."""
    kinds = (str, numbers.Real)
    if any(isinstance(name, bool) for name in names) or not any(
        all(isinstance(name, kind) for name in names) for kind in kinds
    ):
        raise TypeError(f"runs must be called by texts, or by numbers, all of them; got {names}")


_VARIABLES: dict[str, tuple[tuple[str, ...], str, str]] = {
    "llc_mean": ((RUN,), "local learning coefficient, mean over chains", "1"),
    "llc_mcse": ((RUN,), "standard error of llc_mean", "1"),
    "llc_drift": ((RUN,), "LLC of the second half of the steps minus that of the first", "1"),
    "llc_drift_mcse": ((RUN,), "standard error of llc_drift", "1"),
    "rhat": ((RUN,), "split R-hat of the loss traces", "1"),
    "ess_bulk": ((RUN,), "effective number of independent steps", "1"),
    "init_loss": ((RUN,), "mean loss at the checkpoint", "nats"),
    "difference": ((RUN, OTHER), "LLC of a run minus that of the other", "1"),
    "difference_mcse": ((RUN, OTHER), "standard error of difference", "1"),
}
_KNOWN: dict[str, tuple[tuple[str, ...], str, str]] = {
    "paired": ((RUN, OTHER), "whether both runs saw the same batches", "1"),
    "n_beta": ((RUN,), "inverse temperature nβ", "1"),
}


class Trace(NamedTuple):
    """A run's losses.

    Attributes
    ----------
    losses : list of np.ndarray (row,)
        Of each chain, nats.
    init_loss : float
        At the checkpoint, nats.
    of_batches : np.ndarray (1 or chain, init_batch) or None
        Of each batch there, where it is known.
    n_beta : float
    """

    losses: list[np.ndarray]
    init_loss: float
    of_batches: np.ndarray | None
    n_beta: float

    def llc(self) -> float:
        of_chains = [trace.mean() for trace in self.losses]
        return float(self.n_beta * (np.mean(of_chains) - self.init_loss))


def _trace(
    totals: list[Totals],
    shapes: list[tuple[int, ...]],
    init_losses: list[Any],
    init_batch_losses: list[Any] | None,
    n_beta: float,
    batches: Batches | None,
) -> Trace:
    losses, _ = mean_losses(totals, shapes)
    init_loss = float(at_checkpoint(init_losses).mean())
    return Trace(losses, init_loss, batch_means(init_batch_losses, batches), n_beta)


def _compare(
    runs: list[Trace], batches: list[Batches | None], paired: np.ndarray
) -> dict[str, np.ndarray]:
    llc = np.array([run.llc() for run in runs])
    error = np.array([_error(run, seen) for run, seen in zip(runs, batches, strict=True)])
    of_difference = np.zeros(paired.shape)
    for a, b in combinations(range(len(runs)), 2):
        of_difference[a, b] = of_difference[b, a] = (
            _error_of_difference(runs[a], runs[b], batches[a])
            if paired[a, b]
            else math.hypot(error[a], error[b])
        )
    judged = [diagnose_trace(run.losses) for run in runs]
    drifts = np.array(
        [
            run.n_beta * np.array(drift_of(run.losses, seen is None or seen.shared))
            for run, seen in zip(runs, batches, strict=True)
        ]
    )
    return {
        "llc_mean": llc,
        "llc_mcse": error,
        "llc_drift": drifts[:, 0],
        "llc_drift_mcse": drifts[:, 1],
        "rhat": np.array([one["rhat"] for one in judged]),
        "ess_bulk": np.array([one["ess_bulk"] for one in judged]),
        "init_loss": np.array([run.init_loss for run in runs]),
        "difference": llc[:, None] - llc,
        "difference_mcse": of_difference,
    }


def _error(run: Trace, batches: Batches | None) -> float:
    return run.n_beta * error_of_rise(run.losses, batches, run.of_batches)


def _error_of_difference(first: Trace, second: Trace, batches: Batches | None) -> float:
    """Of runs whose chains saw the same batches, pair by pair."""
    losses = [
        first.n_beta * a - second.n_beta * b
        for a, b in zip(first.losses, second.losses, strict=True)
    ]
    of_batches = None
    if first.of_batches is not None and second.of_batches is not None:
        of_batches = first.n_beta * first.of_batches - second.n_beta * second.of_batches
    return error_of_rise(losses, batches, of_batches)


def _see_the_same(
    one: Samples, batches: Batches | None, other: Samples, others: Batches | None
) -> bool:
    """Whether the chains of two runs saw the same batches, step by step; from their settings."""
    if batches is None or others is None or one.chains != other.chains:
        return False
    if not np.array_equal(batches.steps, others.steps):
        return False
    data = [run.config.get("datasets", {}).get("sampling") for run in (one, other)]
    same = (one.sampler.get(name) == other.sampler.get(name) for name in SETTINGS_OF_BATCHES)
    if data[0] is None or data[0] != data[1] or not all(same):
        return False
    seen = [run.dataset.variables[sampled_losses(run)].dims[2:] for run in (one, other)]
    return seen[0] == seen[1] and all(  # the same sequences and tokens of batches, of a selection
        np.array_equal(numbers_along(one.dataset, dim), numbers_along(other.dataset, dim))
        for dim in map(str, seen[0])
    )


def _common_attributes(opened: Sequence[Samples]) -> dict[str, Any]:
    """Settings that all runs have."""
    first, *others = (samples.sampler for samples in opened)
    common = {
        name: value
        for name, value in first.items()
        if all(name in other and other[name] == value for other in others)
    }
    return {"metadata": {"config": {"sampler": common}}}
