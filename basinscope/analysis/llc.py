"""The local learning coefficient of a sampled checkpoint."""

from __future__ import annotations

import numbers
import os
import warnings
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import dask.array as da
import numpy as np
import xarray as xr
from dask.delayed import delayed

from basinscope.analysis.diagnostics import diagnose_trace
from basinscope.analysis.graphs import arrays_in
from basinscope.analysis.means import (
    Totals,
    at_checkpoint,
    mean_losses,
    with_totals,
)
from basinscope.analysis.memory import parse_memory_limit
from basinscope.analysis.plan import Layout, Plan, plan_means
from basinscope.analysis.rise import Batches, error_of_chains, error_of_rise
from basinscope.analysis.selections import numbers_along, row_numbers
from basinscope.analysis.stores import (
    Part,
    Samples,
    choose_observables,
    cut,
    open_samples,
    unread,
)
from basinscope.io import dims


def compute_llc(
    samples: xr.DataTree | str | os.PathLike[str],
    *,
    burn_in: int = 0,
    observables: Literal["all"] | Sequence[str] = "all",
    allow_incomplete: bool = False,
    memory_limit: int | str | None = None,
) -> xr.Dataset:
    """Estimate the local learning coefficient (LLC) from a store of losses.

    LLC = nβ (mean sampled loss - loss at the checkpoint), after Lau et al. (2023), "The local
    learning coefficient", arXiv:2308.12108. Every step counts, burn-in included, unless
    ``burn_in`` drops some.

    Parameters
    ----------
    samples : xr.DataTree or path
        A store of :func:`basinscope.sample` or of devinterp 2.x.
    burn_in : int
        Steps to leave out at the start of every chain, and the draws of these.
    observables : "all" or sequence of str
        Which observables get an LLC of their own.
    allow_incomplete : bool
        Take what a running or interrupted store records as written.
    memory_limit : int or str, optional
        Bytes, or such as "2GiB". Default: half of the free memory.

    Returns
    -------
    xr.Dataset
        Lazy: nothing but metadata is read before ``.compute()`` or ``float()``, and each variable
        reads only what it needs.

        - ``loss_trace (chain, step)``: mean loss of each step's batches, nats; where a store has
          no losses of single steps, ``(chain, draw)``. NaN past the end of an unfinished chain
        - ``init_loss``: mean loss at the checkpoint, nats
        - ``llc_per_chain (chain)``, ``llc_mean``, ``llc_std`` (population, over chains)
        - ``llc_scalar``: from all losses at once
        - ``llc_token (token_pos)``: of each token position, from 1, by the same formula
        - ``llc_running (chain, step)``: from the steps up to and including this one
        - ``llc_mcse``, ``rhat``, ``ess_bulk``: standard error of ``llc_mean``, split R-hat and
          effective sample size; see :func:`basinscope.analysis.rise.error_of_rise` and
          :func:`basinscope.analysis.diagnostics.diagnose_trace`
        - ``llc_{obs}``: nβ (mean loss on an observable - its mean at the checkpoint). Where a store
          has no ``init_loss_{obs}`` (devinterp writes none), the mean at the first draw stands in,
          which has risen already: attribute ``reference`` says "checkpoint" or "first draw". NaN
          where ``burn_in`` leaves no draw. Named
          ``llc_{obs}_observable`` where ``llc_{obs}`` is the name of another variable
        - ``llc_{obs}_mcse``: its standard error, of the chains' noise alone, as every draw sees the
          sequences of the checkpoint. NaN for fewer than four draws
        - ``n_beta``

    Raises
    ------
    ValueError
        If nothing is left to average, an observable is unknown, or the store is incomplete.
    PlanError
        If ``memory_limit`` is too small.

    Warns
    -----
    UserWarning
        If chains are left out; names them.
    """
    opened = open_samples(samples, allow_incomplete)
    chosen = choose_observables(opened, observables)
    row, skipped, parts, batches = counted_steps(opened, burn_in)
    plan_llc(opened, chosen).validate(parse_memory_limit(memory_limit))

    computed = with_totals(_estimate, parts, opened.init_loss(), opened.n_beta)
    judged = delayed(_judge)(computed["traces"], opened.n_beta, batches, opened.init_batch_loss())
    longest = max(part.shape[1] for part in parts)
    sizes = {"chain": len(parts), "row": longest, "token_pos": parts[0].shape[3]}
    members = {
        name: (tuple(sizes[dim] for dim in dim_names), np.float64)
        for name, (dim_names, _, _) in _VARIABLES.items()
    }
    arrays = arrays_in(computed, {n: m for n, m in members.items() if n not in _JUDGED})
    arrays |= arrays_in(judged, {name: members[name] for name in _JUDGED})
    variables = {}
    for variable, (dim_names, long_name, units) in _VARIABLES.items():
        at = tuple(row if d == "row" else d for d in dim_names)
        attrs = {"long_name": long_name, "units": units}
        variables[variable] = xr.Variable(at, arrays[variable], attrs)
    variables["n_beta"] = xr.Variable(
        (), opened.n_beta, {"long_name": "inverse temperature nβ", "units": "1"}
    )
    taken = {*variables, *(f"llc_{obs_id}_mcse" for obs_id in chosen)}
    for obs_id in chosen:
        name = f"llc_{obs_id}" + ("_observable" if f"llc_{obs_id}" in taken else "")
        known = f"init_loss_{obs_id}" in opened.dataset
        attrs = {
            "long_name": f"local learning coefficient on {obs_id}"
            + ("" if known else ", counted from its first draw"),
            "units": "1",
            "reference": "checkpoint" if known else "first draw",
        }
        found = _of_observable(opened, obs_id, burn_in)
        variables[name] = xr.Variable((), found["llc"], attrs)
        attrs = {"long_name": f"standard error of {name}", "units": "1"}
        variables[f"{name}_mcse"] = xr.Variable((), found["mcse"], attrs)
    known_rows = row_numbers(opened.dataset, row)
    in_store = np.arange(skipped + longest) if known_rows is None else known_rows
    coords = {
        dims.CHAIN: list(opened.chains),
        row: in_store[skipped : skipped + longest],
        dims.TOKEN_POS: numbers_along(opened.dataset, dims.TOKEN_POS),
    }
    return xr.Dataset(variables, coords, opened.provenance)


_VARIABLES: dict[str, tuple[tuple[str, ...], str, str]] = {
    "llc_mean": ((), "local learning coefficient, mean over chains", "1"),
    "llc_std": ((), "its standard deviation over chains", "1"),
    "llc_per_chain": (("chain",), "local learning coefficient of each chain", "1"),
    "llc_scalar": ((), "local learning coefficient from all losses at once", "1"),
    "llc_token": (("token_pos",), "local learning coefficient of each token position", "1"),
    "llc_running": (("chain", "row"), "local learning coefficient from the steps so far", "1"),
    "llc_mcse": ((), "standard error of llc_mean", "1"),
    "rhat": ((), "split R-hat of the loss traces", "1"),
    "ess_bulk": ((), "effective number of independent steps", "1"),
    "loss_trace": (("chain", "row"), "mean loss of the sampling batches", "nats"),
    "init_loss": ((), "mean loss at the checkpoint", "nats"),
}
_JUDGED = ("llc_mcse", "rhat", "ess_bulk")


def _estimate(
    totals: list[Totals], shapes: list[tuple[int, ...]], init_losses: list[Any], n_beta: float
) -> dict[str, Any]:
    """Apply the formula, to chains, tokens, and steps so far."""
    traces, of_tokens = mean_losses(totals, shapes)
    at_init = at_checkpoint(init_losses)
    init_loss = at_init.mean()
    per_chain = n_beta * (np.array([trace.mean() for trace in traces]) - init_loss)
    running = [n_beta * (np.cumsum(t) / np.arange(1, len(t) + 1) - init_loss) for t in traces]
    return {
        "traces": traces,
        "llc_mean": per_chain.mean(),
        "llc_std": per_chain.std(),
        "llc_per_chain": per_chain,
        "llc_scalar": n_beta * (np.concatenate(traces).mean() - init_loss),
        "llc_token": n_beta * (of_tokens - at_init.mean(axis=0)),
        "llc_running": _stacked(running),
        "loss_trace": _stacked(traces),
        "init_loss": init_loss,
    }


def _judge(
    traces: list[np.ndarray],
    n_beta: float,
    batches: Batches | None,
    init_losses: list[Any] | None,
) -> dict[str, float]:
    error = error_of_rise(traces, batches, batch_means(init_losses, batches))
    judged = {**diagnose_trace(traces), "llc_mcse": n_beta * error}
    return {name: np.float64(value) for name, value in judged.items()}  # an array, to be stored


def batch_means(init_losses: list[Any] | None, batches: Batches | None) -> np.ndarray | None:
    """Average the losses at the checkpoint over tokens, (1 or chain, init_batch), float64.

    None where they are not known, or are those of a selection of the batches.
    """
    if batches is None or init_losses is None:
        return None
    losses = [np.asarray(part) for part in init_losses]
    means = np.stack([loss.mean(axis=-1, dtype=np.float64).ravel() for loss in losses])
    return means if means.shape[1] == batches.at_init().size else None


class Counted(NamedTuple):
    """The losses of the steps that an LLC counts.

    Attributes
    ----------
    row : str
        Their dimension: step, or draw where a store has no losses of single steps.
    skipped : int
        Rows before the first of them.
    parts : list of Part
        Of each chain, (1, row, batch, token_pos).
    batches : Batches or None
        What they saw; None if it is not known.
    """

    row: str
    skipped: int
    parts: list[Part]
    batches: Batches | None


def counted_steps(samples: Samples, burn_in: int) -> Counted:
    """Find the losses that count after a burn-in; reads nothing.

    Raises
    ------
    ValueError
        If the burn-in is no number of steps, or leaves none.
    """
    name = sampled_losses(samples)
    row = str(samples.dataset.variables[name].dims[1])
    skipped = checked_burn_in(samples, row, burn_in)
    parts = [cut(part, slice(skipped, None)) for part in samples.losses(name)]
    longest = max(part.shape[1] for part in parts)
    return Counted(row, skipped, parts, _batches(samples, row, skipped, longest))


def _batches(samples: Samples, row: str, first: int, rows: int) -> Batches | None:
    """Find out from the settings which batches the rows of a trace saw."""
    sampler = samples.sampler
    in_store = row_numbers(samples.dataset, row)
    if in_store is None:
        return None
    steps = in_store[first : first + rows]
    if row == dims.DRAW:
        between = int(sampler.get("num_steps_bw_draws", 1))
        steps = int(sampler.get("num_burnin_steps", 0)) + steps * between
    dataset = samples.config.get("datasets", {}).get("sampling", {})
    size = sampler.get("batch_size")
    return Batches(
        steps=steps,
        init_steps=int(sampler.get("num_init_loss_batches", 32)),
        per_step=int(sampler.get("gradient_accumulation_steps", 1)),
        per_epoch=dataset["rows"] // size if "rows" in dataset and size else None,
        shared=bool(sampler.get("match_sampling_input_ids_across_chains", True)),
    )


def _stacked(traces: list[np.ndarray]) -> np.ndarray:
    """Put chains under each other; shorter ones end in NaN."""
    stacked = np.full((len(traces), max(map(len, traces))), np.nan)
    for row, trace in zip(stacked, traces, strict=True):
        row[: len(trace)] = trace
    return stacked


def plan_of_llc(
    samples: xr.DataTree | str | os.PathLike[str],
    *,
    burn_in: int = 0,
    observables: Literal["all"] | Sequence[str] = "all",
    allow_incomplete: bool = False,
    memory_limit: int | str | None = None,
) -> Plan:
    """Plan :func:`compute_llc` with the same arguments; reads metadata only.

    It is the same under any ``memory_limit``, by which ``Plan.validate`` refuses it.
    """
    opened = open_samples(samples, allow_incomplete)
    return plan_llc(opened, choose_observables(opened, observables))


def plan_llc(samples: Samples, observables: Sequence[str]) -> Plan:
    """Plan :func:`compute_llc`, every variable of it."""
    names = [sampled_losses(samples), *(f"loss_{obs_id}" for obs_id in observables)]
    return plan_means("the LLC", [Layout.of(samples.losses(name)) for name in names])


def sampled_losses(samples: Samples) -> str:
    """Name the losses of every step, or those of every draw where a store has no others."""
    has_steps = "sampling_loss_micro" in samples.dataset
    return "sampling_loss_micro" if has_steps else "sampling_loss"


def identity_of_losses(
    store: str | os.PathLike[str], allow_incomplete: bool = False
) -> dict[str, Any]:
    """Tell a store, as far as it is sampled, from any other that an LLC could be taken from."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the estimate says what is left out
        samples = open_samples(store, allow_incomplete)
    return samples.identity([sampled_losses(samples)])


def checked_burn_in(samples: Samples, row: str, burn_in: int) -> int:
    """Turn steps into rows of a trace, or draws, of which some have to be left."""
    if isinstance(burn_in, bool) or not isinstance(burn_in, numbers.Integral) or burn_in < 0:
        raise ValueError(f"burn_in={burn_in!r}: give a number of steps, 0 or more")
    rows = _rows_of_burn_in(samples, row, burn_in)
    count = min(samples.draws if row == dims.DRAW else samples.steps)
    if rows >= count:
        raise ValueError(
            f"burn_in={burn_in} leaves nothing to average: {samples.name} has chains of {count} "
            f"{row}s"
        )
    return rows


def _rows_of_burn_in(samples: Samples, row: str, burn_in: int) -> int:
    """Count the steps before a step, or the draws."""
    first = int(burn_in)
    if row == dims.DRAW:
        after = burn_in - int(samples.sampler.get("num_burnin_steps", 0))
        first = max(0, -(-after // int(samples.sampler.get("num_steps_bw_draws", 1))))
    in_store = row_numbers(samples.dataset, row)
    if first and (in_store is None or (np.diff(in_store) < 0).any()):
        raise ValueError(
            f"burn_in={burn_in}: the {row}s of {samples.name} are a selection "
            + ("without numbers" if in_store is None else "in another order")
            + ", of which the first cannot be told; leave burn_in out"
        )
    return 0 if in_store is None else int(np.searchsorted(in_store, first))


def _of_observable(samples: Samples, obs_id: str, burn_in: int) -> dict[str, da.Array]:
    skipped = _rows_of_burn_in(samples, dims.DRAW, burn_in)
    parts = samples.losses(f"loss_{obs_id}")
    at_init: Any = samples.dataset.variables.get(f"init_loss_{obs_id}")
    at_init = None if at_init is None else unread(at_init)
    found = with_totals(_observable_llc, parts, at_init, samples.n_beta, skipped)
    return arrays_in(found, {name: ((), np.float64) for name in ("llc", "mcse")})


def _observable_llc(
    totals: list[Totals],
    shapes: list[tuple[int, ...]],
    at_init: np.ndarray | None,
    n_beta: float,
    skipped: int,
) -> dict[str, np.float64]:
    traces, _ = mean_losses(totals, shapes)
    if at_init is None:
        first = np.array([trace[0] for trace in traces])
        reference, of_reference = first.mean(), _squared_error(first)
    else:
        reference, of_reference = at_init.mean(dtype=np.float64), 0.0
    kept = [trace[skipped:] for trace in traces]
    rows = min(map(len, kept))
    rise = np.concatenate(kept).mean() - reference if sum(map(len, kept)) else np.nan
    error = error_of_chains(np.stack([trace[:rows] for trace in kept]))
    return {
        "llc": np.float64(n_beta * rise),
        "mcse": np.float64(n_beta * np.sqrt(error**2 + of_reference)),
    }


def _squared_error(values: np.ndarray) -> float:
    """Of their mean; NaN of a single one."""
    return float(values.var(ddof=1) / len(values)) if len(values) > 1 else float("nan")
