"""What a selection of a store still is: losses that are a Dask array, rows that have numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import dask.array as da
import dask.base
import dask.core
import numpy as np
import xarray as xr

from basinscope.io import dims
from basinscope.io.store import counted, sampler_settings
from basinscope.io.stored import assembled

MOST_NUMBERS = 12  # that a message lists


class Selected:
    """A Dask array that the task that takes it reads, a Dask chunk at a time.

    Given to a task as it is, a Dask array would all be in memory before the task begins.

    Parameters
    ----------
    array : da.Array
    """

    def __init__(self, array: da.Array) -> None:
        self.array = array

    @property
    def shape(self) -> tuple[int, ...]:
        shape: tuple[int, ...] = self.array.shape
        return shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.array.dtype)

    @property
    def nbytes(self) -> int:
        return int(self.array.nbytes)

    def bounds(self, axis: int) -> list[tuple[int, int]]:
        """Give where Dask chunks begin and end along an axis, those without entries left out."""
        edges = np.cumsum([0, *self.array.chunks[axis]]).tolist()
        return [(a, b) for a, b in pairwise(edges) if b > a]

    def part(self, *bounds: slice) -> Selected:
        """Narrow to bounds, one slice for each of the first axes; reads nothing."""
        return Selected(self.array[bounds])

    def chunks(self) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
        """Compute Dask chunk after Dask chunk, in the calling thread.

        Yields
        ------
        place : tuple of slice
            Where the values stand in the array.
        values : np.ndarray
        """
        edges = [np.cumsum([0, *sizes]) for sizes in self.array.chunks]
        for index in np.ndindex(self.array.numblocks):
            (block,) = dask.base.optimize(self.array.blocks[index])
            # without callbacks: a progress bar outside would count these tasks as its own
            made: Any = dask.core.get(dict(block.__dask_graph__()), block.__dask_keys__())
            while not isinstance(made, np.ndarray):
                (made,) = made
            place = tuple(slice(e[i], e[i + 1]) for e, i in zip(edges, index, strict=True))
            yield place, made

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return assembled(self, dtype)


def row_numbers(dataset: xr.Dataset, row: str) -> np.ndarray | None:
    """Give the numbers that draws or steps have in the store, also those of a selection.

    Returns
    -------
    np.ndarray (row,) or None
        None where rows are missing and have no numbers.
    """
    if row in dataset.coords and dataset[row].dtype.kind in "iu":
        return dataset[row].values
    count = dataset.sizes.get(row, 0)
    return np.arange(count) if count == planned_rows(dataset, row, count) else None


def numbers_along(dataset: xr.Dataset, dim: str) -> np.ndarray:
    """Give the numbers that sequences or token positions have in the store, also in a selection.

    Those that have none are counted as if they were all that the store has.
    """
    if dim in dataset.coords and dataset[dim].dtype.kind in "iu":
        return dataset[dim].values.astype(np.int64)
    return counted(dim, dataset.sizes[dim])


def in_words(numbers: np.ndarray) -> str:
    """Say which numbers there are, for messages: "1 to 32", or the first of them."""
    if not len(numbers):
        return "none"
    first, last = int(numbers[0]), int(numbers[-1])
    if np.array_equal(numbers, np.arange(first, last + 1)):
        return f"{first} to {last}"
    shown = ", ".join(str(number) for number in numbers[:MOST_NUMBERS].tolist())
    left_out = len(numbers) - MOST_NUMBERS
    return f"{shown} and {left_out} more" if left_out > 0 else shown


def count_written(
    dataset: xr.Dataset, row: str, written: Mapping[int, int], name: str
) -> dict[int, int]:
    """Count the draws or steps, of a selection too, that the record of each chain says it has."""
    count = dataset.sizes.get(row, 0)
    numbers = row_numbers(dataset, row)
    if numbers is None:
        planned = planned_rows(dataset, row, count)
        for rows in written.values():
            if rows < planned:
                raise ValueError(
                    f"{name} has {count} {row}s without numbers, so that it cannot be told which "
                    f"of them are among the {rows} that were written: select {row}s of a tree that "
                    "open_store() gave, which are numbered"
                )
        return dict.fromkeys(written, count)
    found = {}
    for chain, rows in written.items():
        there = numbers < rows
        found[chain] = int(np.count_nonzero(there))
        if not there[: found[chain]].all():
            raise ValueError(
                f"{name} has {row}s that were written behind others that were not: keep {row}s in "
                "their order"
            )
    return found


def planned_rows(dataset: xr.Dataset, row: str, unknown: int) -> int:
    """How many draws or steps a whole chain has."""
    sampler = sampler_settings(dataset.attrs)
    draws = int(sampler.get("num_draws", unknown))
    if row == dims.DRAW or "num_draws" not in sampler:
        return draws
    between = int(sampler.get("num_steps_bw_draws", 1))
    return int(sampler.get("num_burnin_steps", 0)) + draws * between
