"""The loss at the checkpoint, of every batch behind it, and stores that were made without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
import zarr

import basinscope
from basinscope.io.store import SampleStore, replace_attributes
from basinscope.sampling.job import next_token_loss
from tests.conftest import token_rows
from tests.models_small import RawModel, tiny_model

SETTINGS: dict[str, Any] = {
    "lr": 1e-3, "n_beta": 10.0, "num_chains": 2, "num_draws": 4, "batch_size": 4,
    "device": "cpu", "progress": False,
}  # fmt: skip


@pytest.mark.parametrize(
    "settings",
    [
        {"num_init_loss_batches": 5},
        {"num_init_loss_batches": 3, "gradient_accumulation_steps": 2},
        {"num_init_loss_batches": 15},  # of twelve batches
        {"num_init_loss_batches": 5, "match_sampling_input_ids_across_chains": False},
    ],
    ids=lambda settings: " ".join(f"{name}={value}" for name, value in settings.items()),
)
def test_each_batch_has_its_own_loss(settings: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model("raw")
    # as many steps as batches behind the loss at the checkpoint, to read their rows off
    tree = run(tmp_path, model, **settings, num_draws=settings["num_init_loss_batches"])
    rows = tree["sampling_rows"].to_numpy()
    own = not settings.get("match_sampling_input_ids_across_chains", True)
    got = tree["init_batch_loss"]
    assert got.dims == ("chain",) * own + ("init_batch", "token_pos")
    for chain in range(2):
        batches = (rows[chain] if own else rows).reshape(-1, 4)
        with torch.no_grad():
            losses = next_token_loss(model, torch.from_numpy(data()[batches.ravel()]).long())
        expected = losses.double().numpy().reshape(*batches.shape, -1).mean(1)
        found = got[chain] if own else got
        np.testing.assert_allclose(found, expected, atol=2e-6)
        np.testing.assert_allclose(tree["init_loss"][chain], expected.mean(0), atol=2e-6)


def test_chains_that_start_elsewhere_have_losses_of_their_own(tmp_path: Path) -> None:
    tree = run(tmp_path, tiny_model("raw"), init_noise=0.1, num_init_loss_batches=3)
    batches = tree["init_batch_loss"].transpose("chain", "init_batch", "token_pos").to_numpy()
    assert batches.shape == (2, 3, 8)
    assert not np.allclose(batches[0], batches[1], atol=1e-3)
    np.testing.assert_allclose(tree["init_loss"], batches.mean(1), atol=1e-6)


def test_batches_run_in_parts_have_the_losses_of_whole_ones(tmp_path: Path) -> None:
    """A forward pass takes some thousand tokens, which ends within batches."""
    rows = token_rows(40, 701, seed=1)
    model = RawModel()
    sizes = {"num_draws": 1, "num_init_loss_batches": 4, "batch_size": 3, "shuffle": False}
    settings = {**SETTINGS, **sizes}
    tree = basinscope.sample(model, rows, {}, **settings, output_path=tmp_path / "s.zarr")
    ids = torch.from_numpy(np.asarray(rows["input_ids"]))[:12].long()
    with torch.no_grad():
        losses = next_token_loss(model, ids).double().reshape(4, 3, -1).mean(1)
    np.testing.assert_allclose(tree["init_batch_loss"], losses, atol=2e-6)


def test_the_error_of_the_llc_takes_the_batches_from_the_store(tmp_path: Path) -> None:
    """Also of some token positions; without the batches it is another."""
    tree = run(tmp_path, tiny_model("raw"), num_init_loss_batches=3, num_draws=12)
    without = tree.copy()
    without.dataset = tree.to_dataset().drop_vars("init_batch_loss")
    late = [part.isel(token_pos=[5, 6]) for part in (tree, without)]
    some = tree.isel(init_batch=[0, 2])
    errors = [
        float(basinscope.compute_llc(source, observables=[])["llc_mcse"])
        for source in (tree, without, *late, some)
    ]
    assert len(set(errors[:4])) == 4
    assert errors[4] == errors[1]


def test_a_store_without_them_is_resumed_and_whole(tmp_path: Path) -> None:
    """As stores of schema version 1 are."""
    path = tmp_path / "s.zarr"
    expected = run(tmp_path, tiny_model("raw")).compute()
    store = SampleStore(path)
    replace_attributes(path, {**store.attributes, "schema_version": 1, "completed": 0})
    del zarr.open_group(path, mode="r+")["init_batch_loss"]
    store.update_record(1, state="pending", init_loss_written=False)
    got = run(tmp_path, tiny_model("raw"))
    for name in expected.data_vars.keys() - {"init_batch_loss"}:
        xr.testing.assert_equal(got[name], expected[name])
    assert not basinscope.verify(path).damaged
    assert np.isfinite(basinscope.compute_llc(path)["llc_mcse"])


def run(tmp_path: Path, model: torch.nn.Module, **settings: Any) -> xr.DataTree:
    return basinscope.sample(
        model,
        token_rows(48, 9, seed=1),
        {},
        **{**SETTINGS, **settings},
        output_path=tmp_path / "s.zarr",
    )


def data() -> np.ndarray:
    return np.asarray(token_rows(48, 9, seed=1)["input_ids"])
