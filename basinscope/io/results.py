"""Results that are written block by block, and continued where they were stopped."""

from __future__ import annotations

import hashlib
import math
import os
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import dask.array as da
import dask.base
import google_crc32c
import numpy as np
import xarray as xr
import zarr
from dask.delayed import Delayed, delayed
from dask.diagnostics.progress import ProgressBar
from zarr.codecs import Crc32cCodec

from basinscope.io.chunked import replace_attributes
from basinscope.io.durable import settle, settle_tree
from basinscope.io.location import local_path, made_at_once, require_place
from basinscope.io.locks import locked
from basinscope.io.store import now, remove_partial_files, require_same_settings
from basinscope.io.stored import CHECKSUM_BYTES


class ResultLockedError(OSError):
    """Another process is computing this result."""


def write_result(
    result: xr.DataTree, path: str | os.PathLike[str], settings: Mapping[str, Any]
) -> xr.DataTree:
    """Compute a lazy result into a Zarr store, one chunk for each block of it.

    A block is written whole or not at all, so the same call after any stop computes those that
    are missing. Every chunk carries a CRC32C.

    Parameters
    ----------
    result : xr.DataTree
        Dask-backed where it is large.
    path : path
    settings : mapping
        What decides the numbers; kept as attribute ``settings``.

    Returns
    -------
    xr.DataTree
        The store, opened lazily.

    Raises
    ------
    ValueError
        If ``path`` holds something else.
    NotADirectoryError
        If it is below a file.
    StoreMismatchError
        If it holds a result of other settings; names each that differs.
    ResultLockedError
        If another process is computing it.
    """
    require_free(path, settings)
    path = local_path(path)
    result = result.map_over_datasets(_storable)
    if not path.exists():
        _create(path, result, settings)
    require_free(path, settings)  # another process may have been first
    if not _is_completed(path):
        held = ResultLockedError(
            f"{path} is being computed by another process: wait for it, then make the same call "
            "again, which returns the result, or continues it if it was stopped"
        )
        with locked(path, held):
            _complete(path, result)
    return xr.open_datatree(path, engine="zarr", consolidated=False, chunks={})


def begun_chunks(path: str | os.PathLike[str], name: str) -> tuple[int, ...] | None:
    """Give the chunks of an array of a result that was begun; None if there is none."""
    array = local_path(path) / name
    if not (array / "zarr.json").is_file():
        return None
    chunks: tuple[int, ...] = zarr.open_array(array, mode="r").chunks
    return chunks


def progress_bar() -> Any:
    """Show progress on a terminal, and nothing in a log."""
    seen = sys.stderr and sys.stderr.isatty()  # None where it is closed
    return ProgressBar(out=sys.stderr, minimum=1.0) if seen else nullcontext()


def digest(values: np.ndarray) -> str:
    """Name an array by its shape and a hash of its values."""
    data = np.ascontiguousarray(values)
    return f"{data.dtype}{data.shape} sha256 {hashlib.sha256(data.tobytes()).hexdigest()[:16]}"


def _storable(dataset: xr.Dataset) -> xr.Dataset:
    """Make all blocks of a variable equally large, but those at the end, as Zarr has them."""
    uneven = {
        str(name): variable.copy(data=variable.data.rechunk(tuple(map(max, variable.data.chunks))))
        for name, variable in dataset.data_vars.items()
        if isinstance(variable.data, da.Array)
        and any(len(set(sizes[:-1])) > 1 or sizes[-1] > sizes[0] for sizes in variable.data.chunks)
    }
    named = {  # text of a fixed length has no place in the Zarr v3 specification
        name: coordinate.astype(object)
        for name, coordinate in dataset.coords.items()
        if coordinate.dtype.kind == "U"
    }
    return dataset.assign(uneven).assign_coords(named)


def require_free(path: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
    """Raise the errors of :func:`write_result` for a place, before what goes there is computed."""
    path = local_path(path)
    require_place(path)
    if not path.exists():
        return
    try:
        stored: dict[str, Any] = zarr.open_group(path, mode="r").attrs.asdict()
    except (FileNotFoundError, ValueError):
        stored = {}
    if "settings" not in stored:
        raise ValueError(
            f"{path} exists and is no result of this kind: it is left as it is; choose another "
            "place"
        )
    require_same_settings(path, stored["settings"], settings)


def _create(path: Path, result: xr.DataTree, settings: Mapping[str, Any]) -> None:
    """Write metadata, coordinates and small variables, then move them into place in one step.

    A process that loses a race leaves the winner's result as it is.
    """
    described = result.copy()
    described.attrs = {**result.attrs, "settings": dict(settings), "computed_at": now()}
    with made_at_once(path) as draft:
        described.to_zarr(
            draft,
            compute=False,
            consolidated=False,
            zarr_format=3,
            encoding={n.path: _encoding(n.to_dataset(inherit=False)) for n in result.subtree},
        )


def _encoding(dataset: xr.Dataset) -> dict[str, dict[str, Any]]:
    """Give every array a checksum, and a chunk for each Dask block."""
    encoding: dict[str, dict[str, Any]] = {}
    for name, variable in dataset.variables.items():
        encoding[str(name)] = {"compressors": [Crc32cCodec()]}
        if isinstance(variable.data, da.Array):
            chunks = tuple(sizes[0] for sizes in variable.data.chunks)
            fill = np.nan if variable.dtype.kind == "f" else 0
            encoding[str(name)] |= {"chunks": chunks, "fill_value": fill}
    return encoding


def _is_completed(path: Path) -> bool:
    return zarr.open_group(path, mode="r").attrs.get("completed") == 1


def _complete(path: Path, result: xr.DataTree) -> None:
    """Compute and write the blocks that are missing.

    The caller holds the lock; workers that write blocks need none.
    """
    if _is_completed(path):  # by the process that held the lock before
        return
    missing = list(_missing_blocks(path, result))
    with progress_bar():
        dask.base.compute(*missing)
    remove_partial_files(path)  # of processes that were killed
    settle_tree(path)  # names of blocks too: one without a file reads as fill values
    attributes = zarr.open_group(path, mode="r").attrs.asdict()
    replace_attributes(path, {**attributes, "completed": 1, "finished_at": now()})


def _missing_blocks(path: Path, result: xr.DataTree) -> Iterator[Delayed]:
    for node in result.subtree:
        for name, variable in node.dataset.data_vars.items():
            if not isinstance(variable.data, da.Array):
                continue
            where = path / node.path.strip("/") / str(name)
            stored = zarr.open_array(where, mode="r").chunks
            data = variable.data
            if tuple(sizes[0] for sizes in data.chunks) != stored:  # begun with other blocks
                data = data.rechunk(stored)
            # optimised one by one, blocks would each compute what they share
            blocks = data.to_delayed(optimize_graph=False)
            size = math.prod(stored) * data.dtype.itemsize + CHECKSUM_BYTES
            for index in product(*map(range, data.numblocks)):
                if not _is_whole(where.joinpath("c", *map(str, index)), size):
                    yield delayed(_write_block)(
                        str(where), index, stored, data.dtype, blocks[index]
                    )


def _is_whole(file: Path, size: int) -> bool:
    """Whether a block is there, and no shorter file that a power cut left of it."""
    try:
        return file.stat().st_size == size
    except OSError:
        return False


def _write_block(
    path: str, index: tuple[int, ...], chunks: tuple[int, ...], dtype: np.dtype[Any], values: Any
) -> None:
    """Write one chunk: its values row by row, then their CRC32C, moved into place in one step.

    Through zarr-python, a block would be in memory five times while it is encoded.
    """
    file = Path(path).joinpath("c", *map(str, index))
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f"{file.name}.{uuid.uuid4().hex}.partial")
    checksum = 0
    try:
        with draft.open("wb") as out:
            for row in _padded_rows(np.asarray(values, dtype.newbyteorder("<")), chunks):
                checksum = google_crc32c.extend(checksum, row)
                out.write(row)
            out.write(checksum.to_bytes(CHECKSUM_BYTES, "little"))
        settle(draft)
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)


def _padded_rows(values: np.ndarray, chunks: tuple[int, ...]) -> Iterator[bytes]:
    """Give the bytes of a chunk, row by row; an edge is filled up to the chunk's extent."""
    if not chunks:
        yield values.tobytes()
        return
    fill = np.nan if values.dtype.kind == "f" else 0
    for place in range(chunks[0]):
        row = np.full(chunks[1:], fill, values.dtype)
        if place < len(values):
            row[tuple(slice(n) for n in values.shape[1:])] = values[place]
        yield row.tobytes()
