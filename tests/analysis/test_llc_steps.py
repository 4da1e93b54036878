"""Which steps, draws and batches an LLC counts, where draws are several steps apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
import xarray as xr

import basinscope
from basinscope.analysis import llc
from tests.analysis.stores_random import random_tree
from tests.analysis.stores_recorded import recorded_store

SAMPLER = {
    "n_beta": 10.0, "num_draws": 12, "num_burnin_steps": 3, "num_steps_bw_draws": 4,
    "num_init_loss_batches": 7, "gradient_accumulation_steps": 2, "batch_size": 3,
}  # fmt: skip
STEPS = 3 + 12 * 4


def spaced(row: str) -> xr.DataTree:
    """Draw d comes after step 3 + 4 d; the trace is of steps, or of draws."""
    dataset = random_tree(1, draws=12, steps=STEPS).to_dataset()
    if row == "draw":
        dataset = dataset.drop_vars("sampling_loss_micro")
    config = {"sampler": SAMPLER, "datasets": {"sampling": {"rows": 100}}}
    return xr.DataTree(dataset.assign_attrs(metadata={"config": config}))


@pytest.mark.parametrize("row", ["step", "draw"])
@pytest.mark.parametrize(("burn_in", "first"), [(3, 0), (7, 1), (8, 2), (11, 2), (12, 3)])
def test_a_draw_counts_if_its_step_is_not_before_the_burn_ins_end(
    burn_in: int, first: int, row: str
) -> None:
    tree = spaced(row)
    got = basinscope.compute_llc(tree, burn_in=burn_in).compute()
    observed = tree["loss_a"].to_numpy().astype(np.float64)
    expected = 10.0 * (observed[:, first:].mean() - observed[:, 0].mean())
    np.testing.assert_allclose(got["llc_a"], expected, rtol=0, atol=1e-10)
    kept = range(first, 12) if row == "draw" else range(burn_in, STEPS)
    assert got[row].values.tolist() == list(kept)


@pytest.mark.parametrize("row", ["step", "draw"])
def test_the_error_is_told_which_batches_the_trace_saw(
    row: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []

    def noted(traces: list[np.ndarray], batches: Any, *_: Any) -> float:
        told.append(batches)
        return 0.0

    monkeypatch.setattr(llc, "error_of_rise", noted)
    with dask.config.set(scheduler="synchronous"):
        basinscope.compute_llc(spaced(row), burn_in=8)["llc_mcse"].compute()
    (batches,) = told
    steps = range(8, STEPS) if row == "step" else range(11, STEPS, 4)
    assert batches.steps.tolist() == list(steps)
    assert (batches.init_steps, batches.per_step, batches.per_epoch) == (7, 2, 100 // 3)


def test_a_burn_in_longer_than_the_shortest_chain_is_refused(tmp_path: Path) -> None:
    path = recorded_store(tmp_path / "s.zarr", random_tree(1, steps=12), [12, 6])
    with pytest.raises(ValueError, match=r"burn_in=6 leaves nothing .* chains of 6 steps"):
        basinscope.compute_llc(path, burn_in=6, allow_incomplete=True)
    got = basinscope.compute_llc(path, burn_in=5, allow_incomplete=True).compute()
    assert got["loss_trace"].notnull().sum("step").values.tolist() == [7, 1]


@pytest.mark.parametrize("name", ["sampling_loss_micro", "init_loss"])
def test_stores_that_differ_in_their_losses_alone_are_told_apart(name: str, tmp_path: Path) -> None:
    tree = random_tree(1, steps=12)
    changed = xr.DataTree(tree.to_dataset().assign({name: tree[name] + 1}))
    identities = []
    for place, one in {"a": tree, "b": changed}.items():
        path = recorded_store(tmp_path / place / "s.zarr", one)
        identities.append(llc.identity_of_losses(path))
    assert identities[0]["created_at"] == identities[1]["created_at"]
    assert identities[0]["losses"] != identities[1]["losses"]
