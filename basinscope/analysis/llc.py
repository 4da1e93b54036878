"""The local learning coefficient of a sampled checkpoint."""

from __future__ import annotations

import os

import xarray as xr

from basinscope.analysis.stores import (
    finished_chains,
    inverse_temperature,
    open_samples,
    provenance,
)


def compute_llc(samples: xr.DataTree | str | os.PathLike[str]) -> xr.Dataset:
    """Estimate the local learning coefficient (LLC) from a store of losses.

    LLC = nβ (mean sampled loss - loss at the checkpoint), after Lau et al. (2023), "The local
    learning coefficient", arXiv:2308.12108. Every step counts, burn-in included.

    Parameters
    ----------
    samples : xr.DataTree or path
        A store of :func:`basinscope.sample` or of devinterp 2.x.

    Returns
    -------
    xr.Dataset
        Lazy; nothing but metadata and nβ is read before ``.compute()`` or ``float()``.

        - ``loss_trace (chain, step)``: mean loss of each step's batches, nats; where a store has
          no losses of single steps, ``(chain, draw)``
        - ``init_loss``: mean loss at the checkpoint, nats
        - ``llc_per_chain (chain)``, ``llc_mean``, ``llc_std`` (population, over chains)
        - ``llc_scalar``: from all losses at once
        - ``n_beta``

    Warns
    -----
    UserWarning
        If failed or unfinished chains are left out; names them.
    """
    tree = open_samples(samples)
    losses = finished_chains(tree)
    n_beta = inverse_temperature(tree)
    init_loss = losses["init_loss"].mean(dtype="float64")
    sampled = losses["sampling_loss_micro" if "sampling_loss_micro" in losses else "sampling_loss"]
    trace = sampled.mean(list(sampled.dims[2:]), dtype="float64")
    per_chain = n_beta * (trace.mean([trace.dims[1]]) - init_loss)
    estimate = xr.Dataset(
        {
            "llc_mean": per_chain.mean(),
            "llc_std": per_chain.std(),
            "llc_per_chain": per_chain,
            "llc_scalar": n_beta * (sampled.mean(dtype="float64") - init_loss),
            "loss_trace": trace,
            "init_loss": init_loss,
            "n_beta": n_beta,
        },
        attrs=provenance(tree),
    )
    for name, (long_name, units) in _MEANINGS.items():
        estimate[name].attrs = {"long_name": long_name, "units": units}
    return estimate


_MEANINGS = {
    "llc_mean": ("local learning coefficient, mean over chains", "1"),
    "llc_std": ("its standard deviation over chains", "1"),
    "llc_per_chain": ("local learning coefficient of each chain", "1"),
    "llc_scalar": ("local learning coefficient from all losses at once", "1"),
    "loss_trace": ("mean loss of the sampling batches", "nats"),
    "init_loss": ("mean loss at the checkpoint", "nats"),
    "n_beta": ("inverse temperature nβ", "1"),
}
