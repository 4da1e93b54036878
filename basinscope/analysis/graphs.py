"""Dask arrays of what tasks give, with no more graph around the tasks than that needs."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import dask.array as da
import numpy as np
from dask.delayed import Delayed
from dask.highlevelgraph import HighLevelGraph


def arrays_in(
    made: Delayed, members: Mapping[str, tuple[tuple[int, ...], Any]]
) -> dict[str, da.Array]:
    """Give arrays that one task makes together, all on one graph.

    Parameters
    ----------
    made : Delayed
        Of a mapping of names to arrays.
    members : mapping of str to (shape, dtype)
        What it will hold.

    Returns
    -------
    dict of str to da.Array
        Of one chunk each.
    """
    layers, dependencies = dict(made.dask.layers), dict(made.dask.dependencies)
    names = {member: f"{member}-{made.key}" for member in members}
    for member, (shape, _) in members.items():
        key = (names[member], *(0 for _ in shape))
        layers[names[member]] = {key: (operator.getitem, made.key, member)}
        dependencies[names[member]] = set(made.__dask_layers__())
    graph = HighLevelGraph(layers, dependencies)
    return {
        member: da.Array(graph, names[member], tuple((n,) for n in shape), dtype)
        for member, (shape, dtype) in members.items()
    }


def array_of(
    blocks: Mapping[tuple[int, ...], Delayed], chunks: Sequence[Sequence[int]], dtype: Any
) -> da.Array:
    """Give the array that blocks make, a chunk each, without a task that joins them.

    All tasks are in one layer, without annotations: Dask goes through layers one by one, several
    times.

    Parameters
    ----------
    blocks : mapping of tuple of int to Delayed
        For each place in the grid of chunks a block, of all dimensions and of this dtype.
    chunks : sequence of sequence of int
        Sizes of blocks along every dimension.
    dtype
    """
    name = "array-of-" + str(next(iter(blocks.values())).key)
    layers = {key: layer for block in blocks.values() for key, layer in block.dask.layers.items()}
    tasks: dict[Any, Any] = {key: task for layer in layers.values() for key, task in layer.items()}
    tasks |= {(name, *place): block.key for place, block in blocks.items()}
    graph = HighLevelGraph({name: tasks}, {name: set()})
    return da.Array(graph, name, tuple(map(tuple, chunks)), dtype)


def without_copy(array: da.Array) -> da.Array:
    """Have a single chunk, which its task makes anew each time, be the result as it is.

    Dask gives a copy of it, as it might belong to the graph. That takes as much memory once more,
    and the time to fill it. What is made of the array, by an index or by ``persist()``, is as Dask
    has it; so is an array of several chunks.
    """
    if array.npartitions == 1:
        vars(array)["__dask_postcompute__"] = lambda: (_only_chunk, ())
    return array


def _only_chunk(nested: Any) -> np.ndarray:
    while isinstance(nested, list | tuple):
        (nested,) = nested
    chunk: np.ndarray = nested
    return chunk
