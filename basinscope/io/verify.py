"""Reading a whole store once, to find out whether it still holds what was written to it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import dask.base
import zarr
from dask.delayed import delayed

from basinscope.io import dims
from basinscope.io.results import progress_bar
from basinscope.io.store import describe_gaps, records_of
from basinscope.io.stored import DamagedStoreError, StoredArray, open_stored

WRITTEN_ROWS = {dims.DRAW: "draws_written", dims.STEP: "steps_written"}


@dataclass(frozen=True)
class Verification:
    """What reading a store found.

    Attributes
    ----------
    path : Path
    files : int
        Files of arrays that were read.
    bytes_read : int
        Of them, as they are on disk.
    damaged : tuple of str
        What is wrong, a sentence for each file.
    unfinished : tuple of str
        Chains that are not done, and why: no damage.
    """

    path: Path
    files: int
    bytes_read: int
    damaged: tuple[str, ...]
    unfinished: tuple[str, ...]


def verify(path: str | os.PathLike[str]) -> Verification:
    """Read and decode every file of a store; changes nothing.

    Checksums are compared wherever there are some. In a sampling store a chunk is missing if a
    chain's record says that it was written. Files are tasks of Dask's scheduler, so they are read
    side by side, on a cluster too.

    Parameters
    ----------
    path : path
        A Zarr v3 store: of samples (devinterp's too), activations, attributions or results.

    Returns
    -------
    Verification

    Raises
    ------
    FileNotFoundError
        If there is nothing.
    ValueError
        If it is no Zarr v3 store.
    """
    root = Path(path)
    require_zarr(root)
    damaged: list[str] = []
    records: dict[int, dict[str, Any]] = {}
    try:
        records = records_of(root)
    except (OSError, KeyError, ValueError) as error:
        damaged.append(f"{root / 'chains'}: a chain's record cannot be read: {error}")
    tasks = []
    for directory, metadata in _arrays(root, damaged):
        stored = open_stored(directory)
        if stored is None:
            tasks.append(delayed(_read_by_zarr)(directory))
        else:
            due = records if directory.parent == root else {}
            names = tuple(metadata.get("dimension_names") or ())
            tasks += [delayed(_read)(name, parts) for name, parts in _files(stored, names, due)]
    with progress_bar():
        read = dask.base.compute(*tasks)
    return Verification(
        root,
        sum(files for files, _, _ in read),
        sum(size for _, size, _ in read),
        (*damaged, *(problem for _, _, problem in read if problem)),
        tuple(f"chain {chain} {gap}" for chain, gap in describe_gaps(records).items()),
    )


def require_zarr(path: Path) -> None:
    """Refuse what is no Zarr v3 store, as :func:`verify` does."""
    if not path.exists():
        raise FileNotFoundError(f"there is no store at {path}")
    if not (path / "zarr.json").is_file():
        raise ValueError(f"{path} is no Zarr v3 store: it has no zarr.json")


def _arrays(root: Path, damaged: list[str]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Find all arrays and their metadata; add to ``damaged`` where the latter cannot be read."""
    for directory, folders, files in os.walk(root):
        folders.sort()
        if "zarr.json" not in files:
            continue
        file = Path(directory) / "zarr.json"
        try:
            metadata = json.loads(file.read_text())
            is_array = metadata["node_type"] == "array"
        except (OSError, ValueError, KeyError, TypeError) as error:
            damaged.append(f"{file} is damaged: {error}")
            continue
        if is_array:
            folders.clear()
            yield Path(directory), metadata


def _files(
    stored: StoredArray, names: tuple[str, ...], records: Mapping[int, Mapping[str, Any]]
) -> Iterator[tuple[str, list[StoredArray]]]:
    """Cut an array into its files, and each of them into what must be there and what may be."""
    counts = (
        range(-(-size // extent))
        for size, extent in zip(stored.shape, stored.file_shape, strict=True)
    )
    for index in product(*counts):
        corner = [i * extent for i, extent in zip(index, stored.file_shape, strict=True)]
        bounds = (slice(a, a + n) for a, n in zip(corner, stored.file_shape, strict=True))
        file = stored.part(*bounds)
        rows = _rows_due(stored, names, corner, records)
        name = stored.file_of(index)
        if rows is None:
            yield name, [file.written()]
        elif len(corner) < 2 or rows <= corner[1]:
            yield name, [file]
        else:
            due = slice(rows - corner[1])
            later = file.part(slice(None), slice(due.stop, None))
            yield name, [file.part(slice(None), due).written(), later]


def _rows_due(
    stored: StoredArray,
    names: tuple[str, ...],
    corner: list[int],
    records: Mapping[int, Mapping[str, Any]],
) -> int | None:
    """Up to which row a file must have been written; None for all of it."""
    of_chain = names[:1] == (dims.CHAIN,) and stored.file_shape[0] == 1
    if of_chain and corner[0] not in records:
        return 0
    if of_chain and len(names) > 1 and names[1] in WRITTEN_ROWS:
        return int(records[corner[0]][WRITTEN_ROWS[names[1]]])
    # inputs and the loss at the checkpoint, which come before the first step
    some = [records[corner[0]]] if of_chain else list(records.values())
    return None if any(record["init_loss_written"] for record in some) else 0


def _read(name: str, parts: list[StoredArray]) -> tuple[int, int, str | None]:
    """Read one file: whether it is there, its bytes, and what is wrong with it."""
    problem = None
    try:
        for part in parts:
            for _ in part.chunks():
                pass
    except (DamagedStoreError, OSError) as error:
        problem = str(error)
    try:
        return 1, os.stat(name).st_size, problem
    except OSError:
        return 0, 0, problem


def _read_by_zarr(directory: Path) -> tuple[int, int, str | None]:
    """Read an array of a layout that sampling stores do not use, a file at a time."""
    files = [file for file in directory.rglob("*") if file.is_file() and file.name != "zarr.json"]
    sizes = [file.stat().st_size for file in files]
    try:
        array: Any = zarr.open_array(directory, mode="r")
        extent = array.shards or array.chunks
        grid = (range(0, size, n) for size, n in zip(array.shape, extent, strict=True))
        for corner in product(*grid):
            array[tuple(slice(a, a + n) for a, n in zip(corner, extent, strict=True))]
    except Exception as error:  # whatever a codec raises on bytes that are not its own
        return len(sizes), sum(sizes), f"{directory} is damaged: {error}"
    return len(sizes), sum(sizes), None
