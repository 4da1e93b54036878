"""Adding the parts that ranks harvested, block by block."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from basinscope.io.attributions import StoredAttributions
from basinscope.io.attributions_layout import (
    CHUNK,
    METRICS,
    SCHEMA_VERSION,
    counts_of,
    missing_ranks,
    settings_of,
    sums_path,
    unembedding_chunk,
    write_count,
    write_groups,
)
from basinscope.io.chunked import (
    chunk_places,
    create_array,
    even_chunks,
    write_chunk,
    write_group,
)
from basinscope.io.location import local_path, made_at_once, require_place
from basinscope.io.store import now, provenance
from basinscope.io.stored import StoredArray

SHOWN = 8  # differences between two parts that an error lists


def merge_attributions(
    paths: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    allow_missing: bool = False,
) -> StoredAttributions:
    """Add the parts of several ranks, or what was merged of them before.

    Sums, counts, tokens and batches are added in float64. Every value of ``n`` batches is then a
    sum of ``n`` numbers in some order, so any split, order and nesting gives the same to within
    ``n`` roundings (2.2e-16 each) of the sum of their magnitudes. The order of ``paths`` does not
    matter at all: parts are added in the order of their ranks.

    One block of each array is in memory at a time, of one part at a time.

    Parameters
    ----------
    paths : sequence of path
        Completed stores of one harvest with distinct ranks.
    output : path
        Where nothing is yet. What is written appears there when it is whole.
    allow_missing : bool
        Take less than all ranks; the result can be merged with the others later.

    Returns
    -------
    StoredAttributions
        The result, opened; its ``parts`` lists every rank in it.

    Raises
    ------
    FileExistsError
        If there is something at ``output``.
    FileNotFoundError
        If there is nothing at one of ``paths``.
    TypeError
        If ``paths`` is no list of paths.
    ValueError
        If one of them is no store of attributions or not completed; if two do not belong together
        (naming what differs) or hold the same rank; if ranks are missing.
    """
    if isinstance(paths, str | os.PathLike):
        raise TypeError(
            f"paths={os.fspath(paths)!r} is a single path: give a list of paths, those of all ranks"
        )
    if isinstance(paths, Mapping) or not isinstance(paths, Iterable):
        raise TypeError(
            f"paths must be a list of paths, those of all ranks; got {type(paths).__name__}"
        )
    output = local_path(output)
    if output.exists():
        raise FileExistsError(f"{output} exists and is left as it is: choose another output")
    require_place(output)
    if not paths:
        raise ValueError("there are no parts to merge: give the stores that the ranks wrote")
    stores = [StoredAttributions(path) for path in paths]
    stores.sort(key=lambda store: store.metadata["parts"])
    attributes = _attributes_of_all(stores, allow_missing)
    with made_at_once(output, or_else=lambda _: False) as draft:
        write_group(draft, attributes)
        _copy_unembedding(stores, draft)
        _add_sums(stores, draft)
    return StoredAttributions(output)


def _attributes_of_all(stores: Sequence[StoredAttributions], allow_missing: bool) -> dict[str, Any]:
    """Make the result's attributes, once the stores are known to belong together."""
    for store in stores:
        if not store.completed:
            raise ValueError(f"{store.path} {store.describe_gap()}: merge it when it is done")
        _require_same_harvest(stores[0], store)
    parts = _parts_of_all(stores)
    missing = missing_ranks(parts)
    if missing and not allow_missing:
        raise ValueError(
            f"the parts of ranks {', '.join(map(str, missing))} of {parts[0][1]} are missing: give "
            "them too, or take less with allow_missing=True (--allow-missing)"
        )
    first = stores[0].metadata
    return {
        **first,
        **provenance(),
        "schema_version": SCHEMA_VERSION,
        "finished_at": now(),
        "parts": parts,
        "batches": sum(store.metadata["batches"] for store in stores),
        "tokens": sum(store.metadata["tokens"] for store in stores),
    }


def _require_same_harvest(first: StoredAttributions, other: StoredAttributions) -> None:
    mine, theirs = (
        {**settings_of(s.metadata), "parts": None, "world size": s.metadata["parts"][0][1]}
        for s in (first, other)
    )
    found = [
        f"  {field}: {one!r} in {first.path}, {two!r} in {other.path}"
        for field, one, two in _differences(mine, theirs)
    ]
    if found:
        more = [f"  and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
        raise ValueError(
            "these parts are of different harvests:\n" + "\n".join(found[:SHOWN] + more)
        )


def _differences(
    mine: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    for field in sorted(mine.keys() | theirs.keys()):
        one, other = mine.get(field), theirs.get(field)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from _differences(one, other, f"{prefix}{field}.")
        elif one != other:
            yield f"{prefix}{field}", one, other


def _parts_of_all(stores: Sequence[StoredAttributions]) -> list[list[int]]:
    holder: dict[int, Path] = {}
    for store in stores:
        for rank, world in store.metadata["parts"]:
            if rank in holder:
                raise ValueError(
                    f"rank {rank} of {world} is in {holder[rank]} and in {store.path}: it would "
                    "count twice"
                )
            holder[rank] = store.path
    world = stores[0].metadata["parts"][0][1]
    return [[rank, world] for rank in sorted(holder)]


def _add_sums(stores: Sequence[StoredAttributions], draft: Path) -> None:
    layers = stores[0].metadata["layers"]
    write_groups(draft, stores[0].edges, layers)
    for metric in METRICS:
        for edge in stores[0].edges:
            path = sums_path(draft, metric, edge)
            _add_matrix([store.sums(metric, *edge) for store in stores], path)
    for layer in layers:
        for name in counts_of(layer):
            total = sum(store.counts(layer, name) for store in stores)
            write_count(draft, layer, name, np.asarray(total))


def _add_matrix(parts: Sequence[StoredArray], path: Path) -> None:
    shape = parts[0].shape
    chunks = even_chunks(shape, CHUNK)
    create_array(path, shape, np.dtype(np.float64), ("target", "source"), chunks)
    for index, place in chunk_places(shape, chunks):
        total = np.zeros([bound.stop - bound.start for bound in place])
        for part in parts:
            for inside, values in part.part(*place).chunks():
                total[inside] += values
        write_chunk(path, index, total, chunks)


def _copy_unembedding(stores: Sequence[StoredAttributions], draft: Path) -> None:
    """Copy the one unembedding that all parts have, if they have one."""
    weights = [store.unembedding for store in stores]
    shapes = [None if weight is None else weight.shape for weight in weights]
    for store, shape in zip(stores, shapes, strict=True):
        if shape != shapes[0]:
            raise ValueError(
                f"the unembedding is {shapes[0]} in {stores[0].path}, {shape} in {store.path}"
            )
    first, *others = weights
    if first is None:
        return
    chunks = even_chunks(first.shape, unembedding_chunk(first.shape))
    write_group(draft / "unembedding")
    path = draft / "unembedding" / "weight"
    create_array(path, first.shape, first.dtype, ("vocab", "d_model"), chunks)
    for index, place in chunk_places(first.shape, chunks):
        values = np.asarray(first.part(*place))
        for store, other in zip(stores[1:], others, strict=True):
            if other is None or not np.array_equal(values, other.part(*place)):
                raise ValueError(
                    f"the unembeddings in {stores[0].path} and {store.path} differ: they were "
                    "harvested from different models"
                )
        write_chunk(path, index, values, chunks)
