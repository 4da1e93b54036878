"""What every estimator needs of a store: open it, leave out chains that are not whole."""

from __future__ import annotations

import os
import warnings

import xarray as xr

from basinscope.io.store import chain_records, describe_gaps, lazy, open_store


def open_samples(samples: xr.DataTree | str | os.PathLike[str]) -> xr.DataTree:
    """Take a store's tree or path; give a tree whose arrays are read when they are needed."""
    if isinstance(samples, xr.DataTree):
        return lazy(samples)
    return open_store(samples)


def finished_chains(tree: xr.DataTree) -> xr.Dataset:
    """Give the root arrays of a store, without the chains that failed or are unfinished.

    Chains keep their numbers as the coordinate ``chain``. The store's record decides, not its
    values: what was not written reads as NaN.

    Raises
    ------
    ValueError
        If no chain is left.

    Warns
    -----
    UserWarning
        Naming the chains that are left out and why.
    """
    dataset = tree.dataset
    gaps = describe_gaps(chain_records(tree))
    kept = [chain for chain in range(dataset.sizes["chain"]) if chain not in gaps]
    if gaps:
        reasons = "; ".join(f"chain {chain} {gap}" for chain, gap in gaps.items())
        if not kept:
            raise ValueError(f"no chain of this store can be analysed: {reasons}")
        warnings.warn(f"left out of this estimate: {reasons}", stacklevel=3)
    return dataset.assign_coords(chain=range(dataset.sizes["chain"])).isel(chain=kept)


def inverse_temperature(tree: xr.DataTree) -> float:
    """Give nβ from a store's settings, which need no array to be read."""
    return float(tree.attrs["metadata"]["config"]["sampler"]["n_beta"])


def provenance(tree: xr.DataTree) -> dict[str, object]:
    """Give the attributes of a store that its estimates carry on."""
    kept = ("created_by", "created_at", "schema_version", "metadata")
    return {name: tree.attrs[name] for name in kept if name in tree.attrs}
