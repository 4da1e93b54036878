"""How far chains can be trusted: split R-hat, effective sample size, Monte-Carlo error."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr

FEWEST_ROWS = 4  # of a chain; fewer cannot be split and compared


def chain_diagnostics(trace: xr.DataArray) -> xr.Dataset:
    """Judge how well chains agree and mix.

    Parameters
    ----------
    trace : xr.DataArray (chain, step) or (chain, draw)
        Such as ``loss_trace`` of :func:`basinscope.compute_llc`. NaN at the end of a chain (an
        unfinished one) is left out.

    Returns
    -------
    xr.Dataset
        Scalars ``rhat`` (1), ``ess_bulk`` (rows) and ``mcse_mean`` (in the trace's unit); see
        :func:`diagnose_trace`.
    """
    values = trace.transpose("chain", ...).to_numpy()
    written = np.cumsum(~np.isnan(values)[:, ::-1], axis=1)[:, ::-1] > 0
    found = diagnose_trace([row[kept] for row, kept in zip(values, written, strict=True)])
    units = {"rhat": "1", "ess_bulk": "rows", "mcse_mean": trace.attrs.get("units", "1")}
    return xr.Dataset({name: ((), found[name], {"units": units[name]}) for name in units})


def diagnose_trace(traces: Sequence[np.ndarray]) -> dict[str, float]:
    """Judge traces of chains, over as many rows as all of them have.

    Rank-normalised split R-hat, bulk effective sample size and the Monte-Carlo standard error of
    the mean after Vehtari et al. (2021), "Rank-normalization, folding, and localization",
    arXiv:1903.08008, as arviz-stats computes them. These take chains for independent. Chains that
    see the same batches share the batches' noise, which is not: so the error is the larger of
    that over all chains and that of the chains' mean taken as one chain.

    Returns
    -------
    dict
        ``rhat``, ``ess_bulk``, ``mcse_mean``; NaN where chains are shorter than four rows.
    """
    shortest = min(len(trace) for trace in traces)
    if shortest < FEWEST_ROWS:
        return dict.fromkeys(("rhat", "ess_bulk", "mcse_mean"), float("nan"))
    from arviz_stats.base import array_stats

    values = np.stack([trace[:shortest] for trace in traces])
    axes = {"chain_axis": 0, "draw_axis": 1}
    with np.errstate(invalid="ignore", divide="ignore"):  # a constant trace has no R-hat: NaN
        errors = [array_stats.mcse(v, **axes) for v in (values, values.mean(axis=0)[None])]
        return {
            "rhat": float(array_stats.rhat(values, **axes)),
            "ess_bulk": float(array_stats.ess(values, **axes)),
            "mcse_mean": float(max(errors)),
        }
