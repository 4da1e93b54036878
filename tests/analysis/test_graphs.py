"""Dask arrays of what tasks give: each task runs once, only where it is needed, and in place."""

from __future__ import annotations

from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
import xarray as xr
from dask.delayed import delayed

from basinscope.analysis.graphs import array_of, arrays_in, without_copy

VALUES = {"scalar": np.float64(3.0), "table": np.arange(6.0).reshape(2, 3)}


def test_arrays_that_are_made_together_are_made_once() -> None:
    calls = []

    def make(given: float) -> dict[str, Any]:
        calls.append(given)
        return VALUES

    members = {name: (np.shape(value), np.float64) for name, value in VALUES.items()}
    arrays = arrays_in(delayed(make)(delayed(float)("2")), members)
    assert {name: array.shape for name, array in arrays.items()} == {"scalar": (), "table": (2, 3)}
    assert calls == []
    derived = (arrays["table"] * arrays["scalar"])[:, 1:]
    found = dask.compute(arrays["scalar"], arrays["table"], derived)
    for got, expected in zip(
        found, (3.0, VALUES["table"], 3 * VALUES["table"][:, 1:]), strict=True
    ):
        np.testing.assert_array_equal(got, expected)
    assert calls == [2.0]


def test_blocks_lie_where_they_belong_and_others_are_not_made() -> None:
    whole = np.arange(20.0).reshape(5, 4)
    cuts = {(0, 0): np.s_[:2, :3], (0, 1): np.s_[:2, 3:], (1, 0): np.s_[2:, :3]}

    def cut(place: tuple[int, int]) -> np.ndarray:
        return whole[cuts[place]]

    places = [(1, 1), (1, 0), (0, 1), (0, 0)]  # in any order
    array = array_of({at: delayed(cut)(at) for at in places}, [[2, 3], [3, 1]], np.float64)
    assert array.chunks == ((2, 3), (3, 1))
    np.testing.assert_array_equal(array[:2].compute(), whole[:2])
    np.testing.assert_array_equal((array[:, :3] + 1).sum(axis=0), (whole[:, :3] + 1).sum(axis=0))
    with pytest.raises(KeyError):
        array.compute()  # of the block that cannot be cut


def test_a_single_chunk_is_the_result_itself() -> None:
    made: list[np.ndarray] = []

    def make() -> np.ndarray:
        made.append(np.arange(6.0).reshape(2, 3).T)
        return made[-1]

    array = without_copy(da.from_delayed(delayed(make)(), (3, 2), np.float64))
    assert array.compute() is made[0]
    assert array.compute() is made[1]
    dataset = xr.Dataset({"values": (("x", "y"), array)}).compute()
    assert np.shares_memory(dataset["values"], made[2])
    np.testing.assert_array_equal((array[1:] + 1).T, (made[0][1:] + 1).T)


def test_a_chunk_that_is_kept_is_not_given_away() -> None:
    array = without_copy(da.from_delayed(delayed(np.ones)((3, 2)), (3, 2), np.float64))
    kept = array.persist()
    kept.compute()[:] = 7.0
    np.testing.assert_array_equal(kept, np.ones((3, 2)))
    several = da.ones((4, 2), chunks=(2, 2))
    assert without_copy(several) is several
