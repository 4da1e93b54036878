"""Without noise, every array of a store equals what devinterp 2.0.1 writes for the same call."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from devinterp.slt.llc import compute_llc
from devinterp.slt.sampling import sample as their_sample

import basinscope
from basinscope.io.schema import METRICS
from tests.conftest import token_rows
from tests.models_small import tiny_model

pytestmark = pytest.mark.peer

TOLERANCE = 1e-4
COMMON: dict[str, Any] = {
    "lr": 1e-3,
    "n_beta": 10.0,
    "noise_level": 0.0,
    "num_chains": 2,
    "num_draws": 6,
    "batch_size": 4,
    "num_init_loss_batches": 3,
    "batches_per_draw": 2,
    "device": "cpu",
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rmsprop": {"sampling_method": "rmsprop_sgld", "rmsprop_eps": 0.05, "rmsprop_alpha": 0.9},
    "localized": {"localization": 50.0},
    "weight decay": {"llc_weight_decay": 20.0, "localization": 5.0},
    "boxed": {"bounding_box_size": 2e-3, "lr": 1e-2},
    "accumulated": {"gradient_accumulation_steps": 3},
    "burn-in": {"num_burnin_steps": 4},
    "spaced": {"num_steps_bw_draws": 3, "num_burnin_steps": 2},
    "unshuffled": {"shuffle": False},
    "own batches": {"match_sampling_input_ids_across_chains": False},
    "seeds": {"init_seed": 7, "obs_seed": 8},
}


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "llama", "raw"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_store_equals_the_peer(kind: str, variant: str, tmp_path: Path) -> None:
    ours, theirs = sample_both(kind, tmp_path, **VARIANTS[variant], save_metrics=kind != "raw")
    compare(ours, theirs)


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "llama", "raw"])
@pytest.mark.parametrize("method", ["sgmcmc_sgld", "rmsprop_sgld"])
def test_masked_store_equals_the_peer(kind: str, method: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    names = [n for n, p in tiny_model(kind).named_parameters() if p.ndim == 2][:3]
    sizes = dict(tiny_model(kind).named_parameters())
    masks: dict[str, Any] = {
        n: torch.rand(sizes[n].shape, generator=generator) < 0.5 for n in names[:2]
    }
    masks[names[2]] = None
    ours, theirs = sample_both(
        kind,
        tmp_path,
        param_masks=masks,
        localization=20.0,
        llc_weight_decay=3.0,
        sampling_method=method,
        save_metrics=True,
    )
    compare(ours, theirs)
    assert ours.attrs["metrics_numel"] == theirs.attrs["metrics_numel"]


def test_custom_loss_equals_the_peer(tmp_path: Path) -> None:
    def squared(model: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids)[:, :-1].square().mean(-1) + 0.1 * input_ids[:, 1:]

    compare(*sample_both("raw", tmp_path, loss_fn=squared))


def test_llc_equals_the_peer(tmp_path: Path) -> None:
    ours, theirs = sample_both("gpt_neox", tmp_path)
    expected = compute_llc(theirs)
    for tree in (ours, theirs):  # their stores open and analyse the same way
        got = basinscope.compute_llc(tree).compute()
        for name in ("llc_mean", "llc_std", "llc_per_chain", "llc_scalar", "init_loss"):
            np.testing.assert_allclose(got[name], expected[name], atol=2e-4, err_msg=name)
        np.testing.assert_allclose(got.loss_trace, expected.loss_trace, atol=1e-4)


def test_their_store_opens_from_its_path(tmp_path: Path) -> None:
    _, theirs = sample_both("raw", tmp_path)
    tree = basinscope.open_store(tmp_path / "theirs.zarr")
    np.testing.assert_array_equal(tree.sampling_loss, theirs.sampling_loss)


def sample_both(kind: str, tmp_path: Path, **changes: Any) -> tuple[xr.DataTree, xr.DataTree]:
    model = tiny_model(kind)
    dataset = token_rows(30, 9, seed=1)
    observables = {
        "first": token_rows(30, 9, seed=2),
        "second set": (token_rows(25, 9, seed=3), 1),
        "3rd": (dataset, 1),
        "fourth": dataset,
    }
    settings = {**COMMON, **changes}
    ours = basinscope.sample(
        model, dataset, observables, **settings, output_path=tmp_path / "ours.zarr", progress=False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = their_sample(
            model, dataset, observables, **settings, output_path=tmp_path / "theirs.zarr"
        )
    return ours, theirs


def compare(ours: xr.DataTree, theirs: xr.DataTree) -> None:
    names = set(map(str, theirs.data_vars)) - {"sampling_input_ids_micro"}
    assert names <= set(map(str, ours.data_vars))
    for name in sorted(names):
        mine, other = ours[name], theirs[name]
        assert mine.dims == other.dims, name
        assert np.isfinite(other).all(), f"the peer left {name} unfinished"
        np.testing.assert_allclose(mine, other, atol=TOLERANCE, rtol=0, err_msg=name)
    metrics = {name.removeprefix("metrics_") for name in names if name.startswith("metrics_")}
    assert metrics in (set(), set(METRICS))
    ids = _sampling_ids(ours)
    np.testing.assert_array_equal(ids, theirs["sampling_input_ids_micro"])


def _sampling_ids(tree: xr.DataTree) -> np.ndarray:
    rows = tree["sampling_rows"].to_numpy()
    ids = np.asarray(token_rows(30, 9, seed=1)["input_ids"])[rows]
    chains = tree.sizes["chain"]
    return ids if rows.ndim == 3 else np.broadcast_to(ids, (chains, *ids.shape))
