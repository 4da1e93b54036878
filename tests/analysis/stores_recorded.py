"""Stores with a record of what was written, as a sampler leaves them: whole, stopped or failed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xarray as xr

from basinscope.io.schema import sampling_arrays
from basinscope.io.store import DONE, PENDING, RUNNING, SampleStore


def recorded_store(
    path: Path, tree: xr.DataTree, written: Sequence[int] | None = None, **config: Any
) -> Path:
    """Write the first rows of each chain of a tree, and record them; the rest stays unwritten.

    Parameters
    ----------
    tree
        Of :func:`tests.analysis.stores_random.random_tree`, with as many steps as draws.
    written
        Draws of each chain: all, some (the chain runs) or none (it is pending).
    **config
        Groups of settings besides those of the tree, or instead of them.
    """
    dataset = tree.dataset
    sizes = dataset.sizes
    chains, draws = sizes["chain"], sizes["draw"]
    names = [str(name) for name in dataset.data_vars]
    observables = [name.removeprefix("loss_") for name in names if name.startswith("loss_")]
    arrays = sampling_arrays(
        num_chains=chains,
        num_draws=draws,
        num_steps=sizes["step"],
        batch_size=sizes["batch"],
        gradient_accumulation_steps=1,
        num_init_loss_batches=1,
        sequence_length=sizes["token_pos"] + 1,
        observables={name: sizes[f"batch_{name}"] for name in observables},
        largest_id=199,
        num_dataset_rows=100,
        shared_batches=True,
        shared_start=True,
        save_metrics=False,
        save_sampling_input_ids=False,
    )
    del arrays["init_batch_loss"]  # as in stores of schema version 1
    settings = {**dataset.attrs["metadata"]["config"], **config}
    attributes = {"metadata": {"config": settings}, "created_at": f"when {path.name} was made"}
    store = SampleStore.create(path, arrays, attributes, chains)
    for name in names:
        variable = dataset[name]
        if variable.ndim == 4:
            for chain, rows in enumerate(written or [draws] * chains):
                store.arrays[name][chain, :rows] = variable[chain, :rows].to_numpy()
        else:
            store.arrays[name][...] = variable.to_numpy()
    for chain, rows in enumerate(written or [draws] * chains):
        state = DONE if rows == draws else RUNNING if rows else PENDING
        store.update_record(chain, state=state, draws_written=rows, steps_written=rows)
    return path


def fail(path: Path, chain: int) -> None:
    """Record that a chain of a store failed."""
    reason = "the loss is not finite"
    SampleStore(path).update_record(chain, state="failed", failed_step=7, reason=reason)
