"""Influence, susceptibilities and LLC of one store equal what devinterp 2.0.1 computes from it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

import basinscope
from tests.analysis.stores_random import random_tree, write_devinterp_tree
from tests.conftest import token_rows
from tests.models_small import tiny_model

pytestmark = pytest.mark.peer

RELATIVE = 1e-5  # of the largest entry: the peer computes in float32
OF_A_CORRELATION = 1e-4
SEQUENCES = {"second_set": 3, "first": 4, "_3rd": 2}  # 9 in all; sorted: _3rd, first, second_set
NAMES = {"second set": 3, "first": 4, "3rd": 2}  # of the same observables, before sampling
SELECTIONS: dict[str, dict[str, Any]] = {
    "everything": {},
    "rows in any order, twice": {"batch_index_range_1": [7, 0, 0, 3], "batch_index_range_2": [5]},
    "rows of one side": {"batch_index_range_2": [8, 2, 2, 1]},
    "one observable": {"loss_keys": ["first"], "batch_index_range_1": range(3)},
    "observables in any order": {
        "loss_keys": ["second_set", "_3rd"],
        "batch_index_range_1": (4, 0),
        "batch_index_range_2": "all",
    },
}
KINDS: dict[str, dict[str, Any]] = {
    "token": {"correlation_method": "token"},
    "averaged": {"correlation_method": "token", "average_tokenwise_bif": True},
    "sequence": {"correlation_method": "sequence"},
}
RESTRICTIONS = {  # chains and draws of the random stores, which may differ
    "z": {"chains": 2, "draws": 7},
    "full": {"chains": 2, "draws": 9},
    "a": {"chains": 3, "draws": 9},
}


@dataclass
class Store:
    """One store as both packages take it."""

    ours: xr.DataTree | Path
    theirs: xr.DataTree


Stores = Mapping[str, Store]  # by restriction


@pytest.fixture(scope="module", params=["in memory", "their layout", "theirs", "ours"])
def stores(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Stores:
    """A random store in memory or on disk, or one sampled by devinterp or by us."""
    directory = tmp_path_factory.mktemp("parity")
    return {
        name: MAKERS[request.param](seed, name, directory / f"{name}.zarr")
        for seed, name in enumerate(RESTRICTIONS)
    }


@pytest.mark.parametrize("covariance", [False, True], ids=["correlation", "covariance"])
@pytest.mark.parametrize("chains", ["stack", "mean"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_influence_equals_the_peer(
    stores: Stores, selection: str, kind: str, chains: str, covariance: bool
) -> None:
    from devinterp.slt.bif import compute_bif

    store, rows = stores["full"], SELECTIONS[selection]
    options = {
        **KINDS[kind],
        "reduce_chain_dimension_method": chains,
        "compute_covariance": covariance,
    }
    got = basinscope.compute_bif(store.ours, **rows, **options)
    expected = compute_bif(store.theirs, **rows, **options, device="cpu")
    bound = OF_A_CORRELATION
    if covariance:  # relative to variances, which the few selected pairs may not reach
        everything = compute_bif(store.theirs, **options, device="cpu")["influences"]
        bound = RELATIVE * float(abs(everything).max())
    compare(got, expected, influences=bound)


def test_a_batch_size_changes_nothing(stores: Stores) -> None:
    got = basinscope.compute_bif(stores["full"].ours, batch_size=2, device="cpu")
    whole = basinscope.compute_bif(stores["full"].ours)
    np.testing.assert_allclose(got["influences"], whole["influences"], atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"include_sampling_task": True},
        {"observable_names": ["second set", "first"]},
        {"observable_names": ["first", "3rd", "second set"], "include_sampling_task": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("task", ["first", "second set"])
def test_susceptibilities_equal_the_peer(
    stores: Stores, task: str, options: dict[str, Any]
) -> None:
    from devinterp.slt.susceptibilities import compute_susceptibilities

    ours = {name: store.ours for name, store in stores.items()}
    theirs = {name: store.theirs for name, store in stores.items()}
    got = basinscope.compute_susceptibilities(ours, task, **options)
    expected = compute_susceptibilities(theirs, task, **options)
    for name in ("susceptibilities", "context"):
        bounds = {"sus": _rounding(stores, task)} if name == "susceptibilities" else {}
        compare(got[name].to_dataset(), expected[name].to_dataset(), **bounds)
    assert got["susceptibilities"]["wr"].values.tolist() == ["z", "a"]


def test_llc_equals_the_peer(stores: Stores) -> None:
    from devinterp.slt.llc import compute_llc

    for store in stores.values():
        got = basinscope.compute_llc(store.ours)
        expected = compute_llc(store.theirs)
        # a small difference of two large numbers: their float32 rounds the large ones
        bound = 10.0 * RELATIVE * float(expected["init_loss"])
        estimates = ("llc_mean", "llc_std", "llc_per_chain", "llc_scalar")
        compare(got, expected, **dict.fromkeys(estimates, bound))


def compare(got: xr.Dataset, expected: xr.Dataset, **bounds: float) -> None:
    """Require all that the peer gives; each value within its bound, or RELATIVE to the largest."""
    for name, theirs in expected.data_vars.items():
        ours = got[name]
        assert ours.dims == theirs.dims, name
        bound = bounds.get(str(name), RELATIVE * float(abs(theirs).max()))
        if not np.issubdtype(theirs.dtype, np.floating):
            bound = 0.0
        np.testing.assert_allclose(ours, theirs, atol=bound, rtol=0, err_msg=str(name))
        assert own_attributes(theirs) <= ours.attrs.items(), name
    for name, theirs in expected.coords.items():
        ours = got.coords[name]
        assert ours.dims == theirs.dims, name
        np.testing.assert_array_equal(ours, theirs, err_msg=str(name))
        assert own_attributes(theirs) <= ours.attrs.items(), name
    assert expected.attrs.items() <= got.attrs.items()


def own_attributes(variable: xr.DataArray) -> AbstractSet[tuple[str, Any]]:
    """Attributes that the peer sets, not those that xarray kept from a store of ours."""
    kept = ("long_name", "units")
    return {name: value for name, value in variable.attrs.items() if name not in kept}.items()


def _rounding(stores: Stores, task: str) -> float:
    """Bound the error of the peer's sum of float32 products E[φ P]."""
    init_loss = float(stores["full"].theirs["init_loss"].mean())
    largest = 0.0
    for store in stores.values():
        losses = store.theirs[f"loss_{task.replace(' ', '_')}"].mean(("draw", "chain"))
        largest = max(largest, float(abs(losses.mean() - init_loss) * losses.mean()))
    return RELATIVE * largest


def _in_memory(seed: int, name: str, _: Path) -> Store:
    tree = random_tree(seed, observables=SEQUENCES, **RESTRICTIONS[name])
    return Store(tree, tree)


def _in_their_layout(seed: int, name: str, path: Path) -> Store:
    write_devinterp_tree(_in_memory(seed, name, path).theirs, path)
    return Store(path, xr.open_datatree(path, engine="zarr", consolidated=False))


def _sampled(sample: Callable[..., xr.DataTree]) -> Callable[..., Store]:
    def make(seed: int, name: str, path: Path) -> Store:
        model = tiny_model("raw")
        parameters = [parameter for parameter, _ in model.named_parameters()]
        moved = parameters if name == "full" else parameters[seed:]
        observables = {
            task: (token_rows(20, 9, seed=number), count)
            for number, (task, count) in enumerate(NAMES.items())
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sample(
                model,
                token_rows(30, 9, seed=9),
                observables,
                lr=2e-3,
                n_beta=10.0,
                param_masks=dict.fromkeys(moved),
                num_chains=2,
                num_draws=9,
                batch_size=1,
                num_init_loss_batches=3,
                device="cpu",
                output_path=path,
            )
        return Store(path, xr.open_datatree(path, engine="zarr", consolidated=False))

    return make


def _theirs(*args: Any) -> Store:
    from devinterp.slt.sampling import sample

    return _sampled(sample)(*args)


def _ours(*args: Any) -> Store:
    return _sampled(basinscope.sample)(*args)


MAKERS: dict[str, Callable[[int, str, Path], Store]] = {
    "in memory": _in_memory,
    "their layout": _in_their_layout,
    "theirs": _theirs,
    "ours": _ours,
}
