"""How far chains can be trusted: split R-hat, effective sample size, Monte-Carlo error."""

from __future__ import annotations

import xarray as xr


def chain_diagnostics(trace: xr.DataArray) -> xr.Dataset:
    """Judge how well chains agree and mix.

    Rank-normalised split R-hat, bulk effective sample size and the Monte-Carlo standard error of
    the mean after Vehtari et al. (2021), "Rank-normalization, folding, and localization",
    arXiv:1903.08008, as arviz-stats computes them.

    Parameters
    ----------
    trace : xr.DataArray (chain, step) or (chain, draw)
        Such as ``loss_trace`` of :func:`basinscope.compute_llc`.

    Returns
    -------
    xr.Dataset
        Scalars ``rhat`` (1), ``ess_bulk`` (draws) and ``mcse_mean`` (in the trace's unit).

    Raises
    ------
    ModuleNotFoundError
        If arviz-stats is not installed.
    """
    try:
        from arviz_stats.base import array_stats
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "chain diagnostics need arviz-stats: pip install 'basinscope[report]'"
        ) from error
    values = trace.transpose("chain", ...).to_numpy()
    axes = {"chain_axis": 0, "draw_axis": 1}
    return xr.Dataset(
        {
            "rhat": ((), float(array_stats.rhat(values, **axes)), {"units": "1"}),
            "ess_bulk": ((), float(array_stats.ess(values, **axes)), {"units": "draws"}),
            "mcse_mean": (
                (),
                float(array_stats.mcse(values, **axes)),
                {"units": trace.attrs.get("units", "1")},
            ),
        }
    )
