"""The local learning coefficient of a sampled checkpoint."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal

import dask.array as da
import numpy as np
import xarray as xr
from dask.delayed import delayed

from basinscope.analysis.diagnostics import diagnose_trace
from basinscope.analysis.means import loss_traces
from basinscope.analysis.memory import parse_memory_limit
from basinscope.analysis.plan import Layout, Plan, plan_means
from basinscope.analysis.stores import Samples, cut, open_samples
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
        Steps to leave out at the start of every chain.
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
        - ``llc_token (token_pos)``: of each token position, by the same formula
        - ``llc_running (chain, step)``: from the steps up to and including this one
        - ``llc_mcse``, ``rhat``, ``ess_bulk``: Monte-Carlo standard error of ``llc_mean``, split
          R-hat and effective sample size; see
          :func:`basinscope.analysis.diagnostics.diagnose_trace`
        - ``llc_{obs}``: nβ (mean loss on an observable - its mean at the checkpoint, or at the
          first draw where the store does not have the former). Named ``llc_{obs}_observable``
          where ``llc_{obs}`` is one of the above
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
    name = sampled_losses(opened)
    row = str(opened.tree.dataset[name].dims[1])
    skipped = _rows_of_burn_in(opened, row, burn_in)
    plan_llc(opened, chosen).validate(parse_memory_limit(memory_limit))

    n_beta = opened.n_beta
    parts = [cut(part, slice(skipped, None)) for part in opened.losses(name)]
    traces, token_means = loss_traces(parts)
    lengths = np.array([len(trace) for trace in traces])
    at_init = opened.init_loss()
    init_loss = da.mean(at_init, dtype="float64")
    per_chain = n_beta * (da.stack([trace.mean() for trace in traces]) - init_loss)
    sums = da.stack([trace.sum() for trace in traces])
    running = [n_beta * (da.cumsum(t, 0) / np.arange(1, len(t) + 1) - init_loss) for t in traces]
    judged = delayed(diagnose_trace)(traces)
    values: dict[str, tuple[tuple[str, ...], object]] = {
        "llc_mean": ((), per_chain.mean()),
        "llc_std": ((), per_chain.std()),
        "llc_per_chain": ((dims.CHAIN,), per_chain),
        "llc_scalar": ((), n_beta * (sums.sum() / int(lengths.sum()) - init_loss)),
        "llc_token": (
            (dims.TOKEN_POS,),
            n_beta * (token_means - da.mean(at_init, axis=0, dtype="float64")),
        ),
        "llc_running": ((dims.CHAIN, row), _stacked(running)),
        "llc_mcse": ((), n_beta * da.from_delayed(judged["mcse_mean"], (), "float64")),
        "rhat": ((), da.from_delayed(judged["rhat"], (), "float64")),
        "ess_bulk": ((), da.from_delayed(judged["ess_bulk"], (), "float64")),
        "loss_trace": ((dims.CHAIN, row), _stacked(traces)),
        "init_loss": ((), init_loss),
        "n_beta": ((), n_beta),
    }
    variables = {
        name: xr.Variable(at, data, {"long_name": _MEANINGS[name][0], "units": _MEANINGS[name][1]})
        for name, (at, data) in values.items()
    }
    for obs_id in chosen:
        taken = f"llc_{obs_id}" in variables
        variables[f"llc_{obs_id}_observable" if taken else f"llc_{obs_id}"] = xr.Variable(
            (),
            n_beta * _rise(opened, obs_id),
            {"long_name": f"local learning coefficient on {obs_id}", "units": "1"},
        )
    coords = {
        dims.CHAIN: list(opened.chains),
        row: np.arange(skipped, skipped + lengths.max()),
    }
    return xr.Dataset(variables, coords, opened.provenance)


_MEANINGS = {
    "llc_mean": ("local learning coefficient, mean over chains", "1"),
    "llc_std": ("its standard deviation over chains", "1"),
    "llc_per_chain": ("local learning coefficient of each chain", "1"),
    "llc_scalar": ("local learning coefficient from all losses at once", "1"),
    "llc_token": ("local learning coefficient of each token position", "1"),
    "llc_running": ("local learning coefficient from the steps so far", "1"),
    "llc_mcse": ("Monte-Carlo standard error of llc_mean", "1"),
    "rhat": ("split R-hat of the loss traces", "1"),
    "ess_bulk": ("effective number of independent steps", "1"),
    "loss_trace": ("mean loss of the sampling batches", "nats"),
    "init_loss": ("mean loss at the checkpoint", "nats"),
    "n_beta": ("inverse temperature nβ", "1"),
}


def plan_llc(samples: Samples, observables: Sequence[str]) -> Plan:
    """Plan :func:`compute_llc`, every variable of it."""
    names = [sampled_losses(samples), *(f"loss_{obs_id}" for obs_id in observables)]
    return plan_means("the LLC", [Layout.of(samples.losses(name)) for name in names])


def choose_observables(samples: Samples, wanted: Literal["all"] | Sequence[str]) -> list[str]:
    """Check names of observables against a store; "all" gives them sorted.

    Raises
    ------
    ValueError
        Naming those that the store does not have, and those that it has.
    """
    known = samples.observables
    if isinstance(wanted, str):
        wanted = sorted(known) if wanted == "all" else [wanted]
    missing = [name for name in wanted if name not in known]
    if missing:
        raise ValueError(
            f"{samples.name} has no observable {', '.join(map(repr, missing))}; it has "
            f"{', '.join(sorted(known)) or 'none'}"
        )
    return list(wanted)


def sampled_losses(samples: Samples) -> str:
    """Name the losses of every step, or those of every draw where a store has no others."""
    has_steps = "sampling_loss_micro" in samples.tree.dataset
    return "sampling_loss_micro" if has_steps else "sampling_loss"


def _rows_of_burn_in(samples: Samples, row: str, burn_in: int) -> int:
    """Turn steps into rows of the trace: steps, or the draws that come before that step."""
    if isinstance(burn_in, bool) or not isinstance(burn_in, int) or burn_in < 0:
        raise ValueError(f"burn_in={burn_in!r}: give a number of steps, 0 or more")
    rows, counts = burn_in, samples.steps
    if row == dims.DRAW:
        counts = samples.draws
        after = burn_in - int(samples.sampler.get("num_burnin_steps", 0))
        rows = max(0, -(-after // int(samples.sampler.get("num_steps_bw_draws", 1))))
    if rows >= min(counts):
        raise ValueError(
            f"burn_in={burn_in} leaves nothing to average: {samples.name} has chains of "
            f"{min(counts)} {row}s"
        )
    return rows


def _rise(samples: Samples, obs_id: str) -> da.Array:
    """Mean loss on an observable, above that at the checkpoint or at the first draw."""
    traces, _ = loss_traces(samples.losses(f"loss_{obs_id}"))
    initial = samples.tree.dataset.get(f"init_loss_{obs_id}")
    if initial is None:
        reference = da.stack([trace[0] for trace in traces]).mean()
    else:
        values = da.asarray(unread(initial))
        if dims.CHAIN in initial.dims:
            values = values[list(samples.chains)]
        reference = da.mean(values, dtype="float64")
    total = da.stack([trace.sum() for trace in traces]).sum()
    return total / sum(len(trace) for trace in traces) - reference


def _stacked(traces: list[da.Array]) -> da.Array:
    """Put chains under each other; shorter ones end in NaN."""
    longest = max(len(trace) for trace in traces)
    return da.stack(
        [
            da.concatenate([trace, da.full(longest - len(trace), np.nan)])
            if len(trace) < longest
            else trace
            for trace in traces
        ]
    )
