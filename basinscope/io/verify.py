"""Reading a whole store once, to find out whether it still holds what was written to it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import dask.base
import zarr
from dask.delayed import delayed
from zarr.codecs import Crc32cCodec

from basinscope.io import dims
from basinscope.io.chunked import read_attributes
from basinscope.io.finished import arrays_due
from basinscope.io.location import local_path
from basinscope.io.results import progress_bar
from basinscope.io.schema import sampling_arrays
from basinscope.io.store import describe_gaps, new_record, record_of
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
        What is wrong, a sentence for each file or record.
    unfinished : tuple of str
        Chains that are not done, and why: no damage.
    unchecked : int
        Files that carry no checksum of their own: they could be decoded, no more is known.
    complete : bool
        Whether the store tells which files it must have, so that missing ones are among
        ``damaged``: stores of :func:`basinscope.sample` do, and finished ones of activations and
        attributions (but for attributions written when zeros had no files).
    """

    path: Path
    files: int
    bytes_read: int
    damaged: tuple[str, ...]
    unfinished: tuple[str, ...]
    unchecked: int
    complete: bool


def verify(path: str | os.PathLike[str]) -> Verification:
    """Read and decode every file of a store; changes nothing.

    Checksums are compared wherever there are some. In a store of :func:`basinscope.sample` arrays,
    records, and chunks that a chain's record says were written must be there; in a finished one of
    activations or attributions, all arrays with all their chunks. In others, absent files cannot be
    told from those that were never written. Files are tasks of Dask's scheduler, so they are read
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
    root = local_path(path)
    require_zarr(root)
    damaged: list[str] = []
    config = _config(root)
    records = _records(root, config, damaged) if config else {}
    finished = set(arrays_due(root))
    required = [root / name for name in ("chains", *_names(root, config))] if config else finished
    for directory in sorted(required):
        if not (directory / "zarr.json").is_file():
            gone = directory / "zarr.json" if directory.is_dir() else directory
            damaged.append(f"{gone} is missing")
    tasks = []
    for directory, metadata in _arrays(root, records, damaged):
        stored = open_stored(directory)
        due = records if directory.parent == root else {}
        if stored is None:
            must_exist = directory in finished or _inputs_written(due)
            tasks.append(delayed(_read_by_zarr)(directory, must_exist))
            continue
        stored = stored.written() if directory in finished else stored
        names = tuple(metadata.get("dimension_names") or ())
        of_checkpoint = directory.parent.parent.parent == root / "chains"
        for name, parts in _files(stored, names, due):
            whole = [part.written() for part in parts] if of_checkpoint else parts
            tasks.append(delayed(_read)(name, whole))
    with progress_bar():
        read = dask.base.compute(*tasks)
    return Verification(
        root,
        sum(one.files for one in read),
        sum(one.bytes_read for one in read),
        (*damaged, *(one.problem for one in read if one.problem)),
        tuple(f"chain {chain} {gap}" for chain, gap in describe_gaps(records).items()),
        sum(one.files for one in read if not one.has_checksum),
        bool(config or finished),
    )


class _Read(NamedTuple):
    """What reading one file, or one array, found."""

    files: int
    bytes_read: int
    has_checksum: bool
    problem: str | None


def _config(root: Path) -> dict[str, Any]:
    """Read the settings of a store of :func:`basinscope.sample`; of any other store none."""
    try:
        attributes = read_attributes(root)
        config: dict[str, Any] = attributes["metadata"]["config"]
        # estimates carry the settings on, but not where the chains ran
        ours = {"created_by", "device"} <= attributes.keys() and "num_chains" in config["sampler"]
    except (KeyError, TypeError):
        return {}
    return config if ours else {}


def _names(root: Path, config: Mapping[str, Any]) -> list[str]:
    """Name the arrays that a sampling store of these settings has."""
    arrays = sampling_arrays(  # of any sizes: only the names count
        num_chains=1, num_draws=1, num_steps=1, batch_size=1, gradient_accumulation_steps=1,
        num_init_loss_batches=1, sequence_length=2, largest_id=1, num_dataset_rows=1,
        shared_batches=True, shared_start=True,
        observables={observable["obs_id"]: 1 for observable in config["observables"]},
        save_metrics=config["sampler"]["save_metrics"],
        save_sampling_input_ids=config["sampler"]["save_sampling_input_ids"],
    )  # fmt: skip
    version = read_attributes(root)["schema_version"]
    return [name for name in arrays if version > 1 or name != "init_batch_loss"]


def _records(
    root: Path, config: Mapping[str, Any], damaged: list[str]
) -> dict[int, dict[str, Any]]:
    """Read the records of all chains; add to ``damaged`` those that are absent or no records."""
    records = {}
    for chain in range(int(config["sampler"]["num_chains"])):
        file = root / "chains" / str(chain) / "zarr.json"
        try:
            record = record_of(root, chain)
            if missing := new_record().keys() - record.keys():
                raise ValueError(f"it lacks {', '.join(sorted(missing))}")
            records[chain] = record
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            damaged.append(f"{file} is damaged, the record of chain {chain}: {error!r}")
    return records


def require_zarr(path: Path) -> None:
    """Refuse what is no Zarr v3 store, as :func:`verify` does."""
    if not path.exists():
        raise FileNotFoundError(f"there is no store at {path}")
    if not (path / "zarr.json").is_file():
        raise ValueError(f"{path} is no Zarr v3 store: it has no zarr.json")


def _arrays(
    root: Path, records: Mapping[int, Mapping[str, Any]], damaged: list[str]
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Find all arrays and their metadata; add to ``damaged`` where the latter cannot be read.

    Of a chain's checkpoints, which come and go while it runs, the one that its record names.
    """
    named = {root / "chains" / str(c) / str(r["checkpoint"]) for c, r in records.items()}
    for where, folders, files in os.walk(root):
        directory = Path(where)
        folders[:] = sorted(
            folder
            for folder in folders
            if not folder.startswith("checkpoint_") or directory / folder in named
        )
        file = directory / "zarr.json"
        if "zarr.json" not in files:
            if "c" in folders:
                if not (records and directory.parent == root):  # said already
                    damaged.append(f"{directory} has chunks and no zarr.json")
                folders.clear()
            continue
        try:
            metadata = json.loads(file.read_text())
            is_array = metadata["node_type"] == "array"
        except (OSError, ValueError, KeyError, TypeError) as error:
            if not (records and directory.parent == root / "chains"):  # said already, as a record
                damaged.append(f"{file} is damaged: {error!r}")
            continue
        if is_array:
            folders.clear()
            yield directory, metadata


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
    some = {corner[0]: records[corner[0]]} if of_chain else records
    return None if _inputs_written(some) else 0


def _inputs_written(records: Mapping[int, Mapping[str, Any]]) -> bool:
    return any(record["init_loss_written"] for record in records.values())


def _read(name: str, parts: list[StoredArray]) -> _Read:
    problem = None
    try:
        for part in parts:
            for _ in part.chunks():
                pass
    except (DamagedStoreError, OSError) as error:
        problem = str(error)
    try:
        size = os.stat(name).st_size
    except OSError:
        return _Read(0, 0, True, problem)
    return _Read(1, size, "crc32c" in parts[0].filters, problem)


def _read_by_zarr(directory: Path, due: bool) -> _Read:
    """Read an array of a layout that sampling stores do not use, a file at a time."""
    files = [file for file in directory.rglob("*") if file.is_file() and file.name != "zarr.json"]
    sizes = [file.stat().st_size for file in files]
    problem = f"{directory} lacks its values" if due and not files else None
    checked = False
    try:
        array: Any = zarr.open_array(directory, mode="r")
        checked = any(isinstance(codec, Crc32cCodec) for codec in array.compressors)
        extent = array.shards or array.chunks
        grid = (range(0, size, n) for size, n in zip(array.shape, extent, strict=True))
        for corner in product(*grid):
            array[tuple(slice(a, a + n) for a, n in zip(corner, extent, strict=True))]
    except Exception as error:  # whatever a codec raises on bytes that are not its own
        problem = f"{directory} is damaged: {error!r}"
    return _Read(len(sizes), sum(sizes), checked, problem)
