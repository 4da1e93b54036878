"""A sampling store: created whole, filled chain by chain, opened lazily.

Every chain has a group ``chains/{c}`` whose attributes are its record (state, what is written,
why it failed). A record is one small file that is replaced atomically, so processes that sample
different chains of one store never write the same file.
"""

from __future__ import annotations

import json
import os
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr

import basinscope
from basinscope.io import codecs, dims
from basinscope.io.checkpoint import remove_checkpoints
from basinscope.io.chunked import replace_attributes
from basinscope.io.location import local_path, made_at_once
from basinscope.io.locks import PATIENCE, locked
from basinscope.io.schema import SCHEMA_VERSION, ArraySpec
from basinscope.io.stored import StoredArray, open_stored

if TYPE_CHECKING:
    import dask.array as da
    import xarray as xr

PENDING, RUNNING, DONE, FAILED = "pending", "running", "done", "failed"
SCALED = {"scale_factor", "add_offset"}  # encodings under which values are not what is stored
MOST_DIFFERENCES = 8  # of one group of settings that a message lists


class ChainLockedError(OSError):
    """Another process is sampling this chain."""


class StoreMismatchError(ValueError):
    """A store was written with other settings than those asked for."""


def open_store(path: str | os.PathLike[str]) -> xr.DataTree:
    """Open a sampling store lazily; reads metadata only.

    Parameters
    ----------
    path : path
        A store written by :func:`basinscope.sample` or by devinterp 2.x.

    Returns
    -------
    xr.DataTree
        Dask-backed, one Dask chunk per file of the store. Every dimension is numbered: from 0, and
        ``token_pos`` from 1, the position of the token whose loss it is.

    Raises
    ------
    FileNotFoundError
        If there is nothing at ``path``.
    ValueError
        If what is there is not a Zarr store of losses.

    Warns
    -----
    UserWarning
        If chains are unfinished or failed; names them.
    """
    path = require_store(path)
    tree = read_store(path)
    _warn_about_gaps(path, tree)
    return tree


def require_store(path: str | os.PathLike[str]) -> Path:
    """Raise the errors of :func:`open_store` if there is no sampling store at ``path``."""
    path = local_path(path)
    if not path.exists():
        raise FileNotFoundError(f"no store at {path}: check the path, or sample one first")
    if not is_store(path):
        raise ValueError(
            f"{path} is not a sampling store (a Zarr v3 group with an array 'sampling_loss'): "
            "pass the directory that sample() wrote"
        )
    return path


def read_store(path: Path) -> xr.DataTree:
    """Open a store that is known to be one, without a word about its gaps."""
    tree = read_tree(path)
    records = len(tree["chains"].children) if "chains" in tree.children else 0
    tree.dataset = _numbered(tree.dataset, records)
    return tree


def read_tree(path: Path) -> xr.DataTree:
    """Open a Zarr group, its arrays as Dask arrays that read what is needed of a chunk's file."""
    import xarray as xr  # with Dask 25 MiB that are not needed while a store is written

    with _explained(path):
        tree = xr.open_datatree(path, engine="zarr", consolidated=False)
    dataset = tree.dataset
    whole = dataset.attrs.get("completed") == 1 and not dataset.attrs.get("failed_chains")
    read_in_parts = {
        name: variable.copy(data=_dask_array(_recorded(stored, str(name)) if whole else stored))
        for name, variable in dataset.data_vars.items()
        if (stored := stored_at(path / str(name), variable.variable))
    }
    tree.dataset = dataset.assign(read_in_parts)
    return lazy(tree)


def _numbered(dataset: xr.Dataset, records: int) -> xr.Dataset:
    """Number every dimension, so that a selection still knows what it was taken from.

    A selection that was saved has its numbers; chains of which it is unknown have none.
    """
    sizes = {dim: size for dim, size in dataset.sizes.items() if dim not in dataset.coords}
    if records and sizes.get(dims.CHAIN) != records:
        sizes.pop(dims.CHAIN, None)
    return dataset.assign_coords({dim: counted(str(dim), n) for dim, n in sizes.items()})


def counted(dim: str, size: int) -> np.ndarray:
    """Number what a store has along a dimension, from 0; token positions from 1.

    A loss has the position of its token in the sequence, whose first token has none.
    """
    return np.arange(size) + (dim == dims.TOKEN_POS)


def read_root(path: Path) -> xr.Dataset:
    """Open the arrays of a store, and not its chains' groups; reads their metadata only."""
    import xarray as xr

    with _explained(path):
        return xr.open_dataset(path, engine="zarr", consolidated=False, chunks=None)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} has a damaged zarr.json ({error}): restore it from a copy, or sample anew"
        ) from error


def _recorded(stored: StoredArray, name: str) -> StoredArray:
    """Make what a store has of losses once all its chains are done an error where it is missing."""
    is_loss = name.startswith(("loss_", "sampling_loss", "init_"))
    return stored.written() if is_loss else stored


def _dask_array(stored: StoredArray) -> da.Array:
    import dask.array as da

    return da.from_array(
        stored, chunks=stored.file_shape, name=f"{Path(stored.path).name}-{uuid.uuid4().hex}",
        asarray=True, fancy=False, meta=np.empty((0,) * stored.ndim, stored.dtype),
    )  # fmt: skip


def stored_at(path: Path, variable: xr.Variable) -> StoredArray | None:
    """Open the variable that is stored at ``path`` for reading in parts.

    None where its values are not what is stored, or where only zarr-python can read it.
    """
    if SCALED & variable.encoding.keys():
        return None
    stored = open_stored(path)
    return stored if stored is not None and stored.dtype == variable.dtype else None


def stored_array(variable: xr.Variable) -> StoredArray | None:
    """Give what a variable reads from, if it is a store's array as :func:`open_store` gave it.

    A variable that was sliced or changed since is no longer that array: None.
    """
    if variable.chunks is None:  # asking for its data would read it
        return None
    data = variable.data
    origin = data.dask.get(f"original-{data.name}")
    return origin if isinstance(origin, StoredArray) and origin.shape == data.shape else None


def lazy(tree: xr.DataTree) -> xr.DataTree:
    """Give a tree with the same arrays as Dask arrays, one chunk per file of the store."""
    dataset = tree.dataset
    files = {
        str(name): variable.chunk(_file_chunks(variable), token=uuid.uuid4().hex)
        for name, variable in dataset.data_vars.items()
        if variable.ndim and variable.chunks is None
    }
    tree = tree.copy()
    tree.dataset = dataset.assign(files)
    return tree


def sampler_settings(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Give the sampler's settings of a store, or of an estimate that carries them on; may be {}."""
    settings: dict[str, Any] = attributes.get("metadata", {}).get("config", {}).get("sampler", {})
    return settings


def is_store(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is a Zarr v3 group that holds sampling losses."""
    path = local_path(path)
    return (path / "zarr.json").is_file() and (path / "sampling_loss" / "zarr.json").is_file()


def _file_chunks(variable: xr.DataArray) -> dict[Any, int]:
    """One Dask chunk per file: reading a whole store by smaller ones costs about 1.9 times."""
    chunks = variable.encoding.get("shards") or variable.encoding.get("chunks") or ()
    return dict(zip(variable.dims, chunks, strict=False))


def _warn_about_gaps(path: Path, tree: xr.DataTree) -> None:
    problems = [
        f"chain {chain} {problem}" for chain, problem in describe_gaps(chain_records(tree)).items()
    ]
    if problems:
        warnings.warn(f"{path}: {'; '.join(problems)}", stacklevel=3)


def records_of(path: Path) -> dict[int, dict[str, Any]]:
    """Read each chain's record from its file; empty for stores that keep none."""
    groups = path / "chains"
    if not groups.is_dir():
        return {}
    chains = sorted(int(group.name) for group in groups.iterdir() if group.name.isdigit())
    return {chain: record_of(path, chain) for chain in chains}


def record_of(path: Path, chain: int) -> dict[str, Any]:
    """Read one chain's record from its file."""
    group = json.loads((path / "chains" / str(chain) / "zarr.json").read_text())
    record: dict[str, Any] = group["attributes"]
    return record


def chain_records(tree: xr.DataTree) -> dict[int, dict[str, Any]]:
    """Read each chain's record from an open store; empty for stores that keep none."""
    if "chains" not in tree.children:
        return {}
    children = tree["chains"].children
    return {
        int(name): {str(field): value for field, value in children[name].attrs.items()}
        for name in sorted(children, key=int)
    }


def total_seconds(records: Mapping[int, Mapping[str, Any]]) -> dict[str, float]:
    """Add up the seconds per phase of all chains."""
    seconds: dict[str, float] = {}
    for record in records.values():
        for phase, spent in record["seconds"].items():
            seconds[phase] = round(seconds.get(phase, 0.0) + spent, 6)
    return seconds


def describe_gaps(records: Mapping[int, Mapping[str, Any]]) -> dict[int, str]:
    """Say for each chain that is not done what is missing, in words."""
    gaps = {}
    for chain, record in records.items():
        if record["state"] == FAILED:
            gaps[chain] = f"failed at step {record['failed_step']} ({record['reason']})"
        elif record["state"] == RUNNING:
            gaps[chain] = f"is unfinished ({record['draws_written']} draws can be resumed)"
        elif record["state"] == PENDING:
            gaps[chain] = "was not started"
    return gaps


class SampleStore:
    """The writable side of a store.

    Parameters
    ----------
    path : Path
        An existing store; see :meth:`create`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.root = zarr.open_group(path, mode="r+")
        self.arrays: dict[str, zarr.Array] = {
            name: array.with_config({"write_empty_chunks": True})
            for name, array in self.root.arrays()
        }

    @classmethod
    def create(
        cls,
        path: Path,
        arrays: Mapping[str, ArraySpec],
        attributes: Mapping[str, Any],
        num_chains: int,
    ) -> SampleStore:
        """Write all metadata of a new store, then move it into place in one step.

        Nothing half-made is ever visible at ``path``. A process that loses a race opens the
        winner's store.
        """
        with made_at_once(path, or_else=is_store) as draft:
            root = zarr.open_group(draft, mode="w-", attributes=dict(attributes))
            for name, spec in arrays.items():
                _create_array(root, name, spec)
            for chain in range(num_chains):
                root.create_group(f"chains/{chain}", attributes=new_record())
        return cls(path)

    @property
    def attributes(self) -> dict[str, Any]:
        """Root attributes as they are on disk now."""
        return dict(zarr.open_group(self.path, mode="r").attrs)

    @property
    def num_chains(self) -> int:
        return int(self.arrays["init_loss"].shape[0])

    def record(self, chain: int) -> dict[str, Any]:
        """Read one chain's record from disk."""
        return record_of(self.path, chain)

    def records(self) -> dict[int, dict[str, Any]]:
        """Read all chains' records from disk."""
        return records_of(self.path)

    def update_record(self, chain: int, **fields: Any) -> None:
        """Replace some fields of one chain's record, atomically and for good."""
        directory = self.path / "chains" / str(chain)
        replace_attributes(directory, {**self.record(chain), **fields})

    def unfinished(self) -> list[int]:
        """List the chains that are neither done nor failed."""
        return [c for c, r in self.records().items() if r["state"] not in (DONE, FAILED)]

    @contextmanager
    def lock(self, chain: int, patience: float = PATIENCE) -> Iterator[None]:
        """Hold a chain for this process; the lock goes with the process, however it ends.

        Raises
        ------
        ChainLockedError
            If another process holds it.
        """
        directory = self.path / "chains" / str(chain)
        held = ChainLockedError(
            f"chain {chain} of {self.path} is being sampled by another process: wait for it, or "
            "give the two processes different chains"
        )
        with locked(directory, held, patience):
            yield

    def is_locked(self, chain: int) -> bool:
        """Whether some process is sampling the chain right now."""
        try:
            with self.lock(chain, patience=0):
                return False
        except ChainLockedError:
            return True

    def finish(self) -> bool:
        """Mark the store completed if no chain is left; say whether it is.

        Only the process that ends the last chain writes the root's attributes.
        """
        records = self.records()
        if any(record["state"] not in (DONE, FAILED) for record in records.values()):
            return False
        for chain in records:  # a process killed right after its record may have left some
            remove_checkpoints(self.path, chain)
        for name in ("chains", *self.arrays):
            remove_partial_files(self.path / name)
        final = {
            "completed": 1,
            "finished_at": now(),
            "failed_chains": [c for c, r in records.items() if r["state"] == FAILED],
            "seconds": total_seconds(records),
        }
        replace_attributes(self.path, {**self.attributes, **final})
        return True

    def remove_litter(self, chain: int) -> None:
        """Delete temporary files that a killed writer of this chain left behind."""
        for name, array in self.arrays.items():
            if array.ndim and array.metadata.dimension_names[0] == "chain":  # type: ignore[union-attr,index]
                remove_partial_files(self.path / name / "c" / str(chain))
        remove_partial_files(self.path / "chains" / str(chain))


def remove_partial_files(directory: Path) -> None:
    """Delete temporary files that killed writers left behind."""
    for litter in directory.rglob("*.partial"):
        litter.unlink(missing_ok=True)


def _create_array(root: zarr.Group, name: str, spec: ArraySpec) -> zarr.Array:
    item_bytes = np.dtype(spec.dtype).itemsize
    return root.create_array(
        name,
        shape=spec.shape,
        dtype=spec.dtype,
        chunks=spec.chunks,
        shards=spec.shards,
        filters=codecs.draw_last(len(spec.shape)) if spec.draw_last else None,
        compressors=codecs.compressors(item_bytes),
        fill_value=np.nan if spec.dtype.startswith("float") else 0,
        dimension_names=spec.dims,
        attributes=dict(spec.attrs),
    )


def new_record() -> dict[str, Any]:
    """Make the record of a chain that has not been started."""
    return {
        "state": PENDING,
        "steps_written": 0,
        "draws_written": 0,
        "failed_step": None,
        "reason": None,
        "checkpoint": None,
        "init_loss_written": False,
        "seconds": {},
    }


def provenance() -> dict[str, Any]:
    """Make the attributes that every store carries."""
    return {
        "created_by": f"basinscope {basinscope.__version__}",
        "schema_version": SCHEMA_VERSION,
        "created_at": now(),
    }


def now() -> str:
    """Give the time in UTC, to the second, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def require_same_settings(path: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Compare two nested settings field by field.

    Raises
    ------
    StoreMismatchError
        Naming the fields that differ, with both values: of a group of many, the first ones, and
        behind the groups of few.
    """
    ours, theirs = dict(_flatten(wanted)), dict(_flatten(stored))
    groups: dict[str, list[str]] = {}
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key):
            groups.setdefault(key.partition(".")[0], []).append(
                f"  {key}: the store has {theirs.get(key, 'nothing')!r}, "
                f"this call has {ours.get(key, 'nothing')!r}"
            )
    differences: list[str] = []
    for group, lines in sorted(groups.items(), key=lambda item: len(item[1]) > MOST_DIFFERENCES):
        differences += lines[:MOST_DIFFERENCES]
        if len(lines) > MOST_DIFFERENCES:
            differences.append(f"  and {len(lines) - MOST_DIFFERENCES} more of {group}")
    if differences:
        raise StoreMismatchError(
            f"{path} was written with other settings:\n"
            + "\n".join(differences)
            + "\nIt is left as it is: choose another path, or the store's own settings."
        )


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
