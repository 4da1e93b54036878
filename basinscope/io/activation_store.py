"""Activations on disk: one Zarr group, filled while a model runs, opened lazily.

A chunk holds a few examples whole: all their positions, all their width. What an array has on disk
are its first chunks, so the files themselves say how far a stopped store is.

bfloat16 is stored as float32, which every reader knows. The 16 zero bits of each value cost
nothing: shuffled and compressed, 1.39 bytes are left of it either way.
"""

from __future__ import annotations

import os
import re
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr
import zarr
from numpy.typing import DTypeLike

from basinscope.io.activation_index import STORE
from basinscope.io.activation_layout import (
    BFLOAT16,
    CHUNK_BYTES,
    CHUNK_EXAMPLES,
    EXAMPLE,
    KIND,
    OWN_ATTRIBUTES,
    WRITE_ALL,
    ActivationSpec,
    create_group,
    dtype_name,
    mark_completed,
    root_attributes,
    rows_per_chunk,
    written_coordinates,
)
from basinscope.io.chunked import read_attributes
from basinscope.io.location import local_path, made_at_once, require_place
from basinscope.io.locks import lock_directory
from basinscope.io.store import (
    _dask_array,
    remove_partial_files,
    require_same_settings,
)
from basinscope.io.stored import open_stored
from basinscope.io.writer import BackgroundWriter, StoreWriteError

PENDING_BYTES = 64 * 2**20  # most bytes in full chunks that wait for the disk
PARTS = 8  # chunks at least, where the length is known: a kill loses what is not a whole one

Variable = tuple[tuple[str, ...], tuple[int, ...], DTypeLike]
"""Dims, ``example`` first; the shape of one example; the type, "bfloat16" among them."""


class ActivationsLockedError(OSError):
    """Another writer has this store open."""


def open_activations(
    path: str | os.PathLike[str], *, allow_incomplete: bool = False
) -> xr.DataTree:
    """Open a store of activations lazily; reads metadata and coordinates only.

    Parameters
    ----------
    path : path
        A store, or the directory of a run as :meth:`basinscope.ActivationSaver.save` returns it.
    allow_incomplete : bool
        Take the examples that an unfinished store has.

    Returns
    -------
    xr.DataTree
        The arrays at its root, Dask-backed, one Dask chunk per file; with the child
        ``unembedding`` where the store has one. An array that was bfloat16 is float32 with the
        attribute ``source_dtype``.

    Raises
    ------
    FileNotFoundError
        If there is nothing at ``path``.
    ValueError
        If what is there is not a store of activations, or is incomplete.
    """
    path = local_path(path)
    path = path / STORE if (path / STORE).is_dir() else path
    attributes = require_activations(path)
    layout = attributes["layout"]
    count = None
    if attributes.get("completed") != 1:
        count = _whole_examples(path, layout)
        if not allow_incomplete:
            total = layout["num_examples"]
            raise ValueError(
                f"{path} is incomplete: it has {count:,} of "
                f"{'an unknown number of' if total is None else f'{total:,}'} examples. Make the "
                "call that writes it again, or open those with allow_incomplete=True"
            )
    tree = xr.DataTree(_read_arrays(path, layout, count))
    if layout["unembedding"]:
        tree["unembedding"] = xr.DataTree(_read_unembedding(path / "unembedding"))
    return tree


def require_activations(path: Path) -> dict[str, Any]:
    """Read the attributes of a store of activations."""
    if not path.exists():
        raise FileNotFoundError(f"no activations at {path}: check the path, or extract some first")
    attributes = read_attributes(path)
    if attributes.get("kind") != KIND:
        raise ValueError(
            f"{path} is not a store of activations (a Zarr v3 group of kind {KIND!r}): pass what "
            "extract_dataset() or ActivationSaver.save() wrote"
        )
    if "layout" not in attributes:
        raise ValueError(
            f"{path} holds a part of a store of activations that xarray saved, without what tells "
            "how they lie: give the store itself, and select from what open_activations() gives"
        )
    return attributes


def _read_arrays(path: Path, layout: Mapping[str, Any], count: int | None) -> xr.Dataset:
    """Open coordinates and arrays, of each the first ``count`` examples or all."""
    for coordinate in written_coordinates(path, layout):
        np.asarray(coordinate)  # a lost file would be zeros to xarray
    # The arrays of a store of unknown length may differ in length while they grow
    dataset = xr.open_dataset(
        path,
        engine="zarr",
        consolidated=False,
        chunks=None,
        drop_variables=list(layout["variables"]),
    ).load()
    del dataset.attrs["layout"]
    if count is not None:
        dataset = dataset.isel({EXAMPLE: slice(count)}, missing_dims="ignore")
    arrays = {}
    for name, spec in layout["variables"].items():
        attributes = {"source_dtype": BFLOAT16} if spec["dtype"] == BFLOAT16 else {}
        data = (
            _lazy(path / name, count)
            if spec["dims"]
            else zarr.open_array(path / name, mode="r")[...]
        )
        arrays[name] = xr.Variable(spec["dims"], data, attributes)
    return dataset.assign(arrays)


def _read_unembedding(path: Path) -> xr.Dataset:
    group = xr.open_dataset(path, engine="zarr", consolidated=False, chunks=None)
    return group.assign(
        {name: of.copy(data=_lazy(path / str(name), None)) for name, of in group.items()}
    )


def _lazy(path: Path, count: int | None) -> da.Array:
    stored = open_stored(path)
    if stored is None:
        raise ValueError(f"{path / 'zarr.json'} is damaged: restore it from a copy")
    return _dask_array((stored if count is None else stored.part(slice(0, count))).written())


class ActivationWriter:
    """Fills a store of activations, a batch of examples at a time.

    Chunks are encoded and written by a thread while the model runs; beyond 64 MiB of them that
    wait, :meth:`append` waits too. The process holds the store's lock until :meth:`finish` or
    :meth:`close`, or until it ends.

    Attributes
    ----------
    path : Path
    num_examples : int or None
        How many there are going to be, if that is known.
    examples_done : int
        Examples on disk when the store was opened, and appended since.
    completed : bool
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        descriptor = lock_directory(
            path,
            ActivationsLockedError(
                f"{path} is being written by another process or another writer of this one: wait "
                "for it, or give another path"
            ),
        )
        try:
            attributes = require_activations(path)
            self.completed = attributes.get("completed") == 1
            self._layout = attributes["layout"]
            self.num_examples: int | None = self._layout["num_examples"]
            self._arrays: dict[str, zarr.Array] = {
                name: zarr.open_array(path / name, mode="r+").with_config(WRITE_ALL)
                for name in self._layout["variables"]
            }
            self.examples_done = self._prepare()
        except BaseException:
            os.close(descriptor)
            raise
        self._writer = _Writer(path, self._arrays, PENDING_BYTES)
        self._release = weakref.finalize(self, _release, self._writer, descriptor)
        self._filling = {
            name: _Filling(array.chunks, array.dtype, self.examples_done, self.num_examples)
            for name, array in self._arrays.items()
        }
        if self.completed:
            self.close()

    def _prepare(self) -> int:
        """Count what is on disk, and clear away what a killed writer left half-done."""
        if self.completed:
            return next(iter(self._arrays.values())).shape[0]
        remove_partial_files(self.path)
        done = _whole_examples(self.path, self._layout)
        if self.num_examples is None:
            _remove_chunks_after(self.path, self._arrays, done)
        return done

    @classmethod
    def create_or_continue(
        cls,
        path: str | os.PathLike[str],
        *,
        variables: Mapping[str, Variable],
        num_examples: int | None,
        attrs: Mapping[str, Any],
        coords: Mapping[str, Any],
        unembedding: Mapping[str, Any] | None = None,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> ActivationWriter:
        """Make a store, or go on with the one that the same call made before.

        Parameters
        ----------
        path : path
            Nothing, an empty directory, or a store that the same call made.
        variables : mapping of str to (dims, shape, dtype)
            For each array: its dims, ``example`` first; the shape of one example, without that
            axis; its type. "bfloat16" is stored as float32.
        num_examples : int or None
            All that are going to be appended; None if that is not known yet.
        attrs : mapping
            JSON. What the package writes itself (``created_by``, ``completed``, ...) is ignored.
        coords : mapping
            As :class:`xarray.Dataset` takes them: arrays for the dims of the same names, or (dim,
            array).
        unembedding : mapping, optional
            Arrays ``weight (vocab, d_model)``, ``bias (vocab)``, ``norm_weight (d_model)``,
            ``norm_bias (d_model)`` as far as there are such; what is no array is an attribute.
        chunk_bytes : int
            About the size of a chunk before compression; at least one example. Smaller where there
            are many arrays, because one chunk of each is in memory.

        Returns
        -------
        ActivationWriter
            Append the examples from its ``examples_done`` on. A store that is completed comes
            back as it is.

        Raises
        ------
        ValueError
            If ``path`` holds something else, or an argument is wrong.
        NotADirectoryError
            If ``path`` is below a file.
        StoreMismatchError
            If the store was made with other arguments; names each that differs.
        ActivationsLockedError
            If another writer has it open.
        """
        path = local_path(path)
        require_place(path)
        arrays = {
            name: _checked_variable(name, variable, num_examples)
            for name, variable in variables.items()
        }
        coordinates = xr.Dataset(coords=coords)
        own = root_attributes(arrays, num_examples, attrs, coordinates, unembedding)
        if not path.exists() or (path.is_dir() and not any(path.iterdir())):
            _create(path, arrays, own, coordinates, unembedding, chunk_bytes)
        stored = read_attributes(path)
        if stored.get("kind") != KIND:
            raise ValueError(
                f"{path} exists and is not a store of activations: it is left as it is; choose "
                "another path"
            )
        require_same_settings(path, _settings(stored), _settings(own))
        return cls(path)

    def append(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take the next examples of every array. They are copied: the caller may change them.

        Parameters
        ----------
        arrays : mapping of str to ndarray
            Every variable, each (examples, ...) with the same number of examples.

        Raises
        ------
        ValueError
            If names, shapes, types or the number of examples are not those of the store; nothing
            is taken then.
        StoreWriteError
            If an earlier write failed.
        """
        given = {name: np.asarray(values) for name, values in arrays.items()}
        count = self._require_fitting(given)
        try:
            for name, values in given.items():
                for start, chunk in self._filling[name].extend(values):
                    self._reserve(start + len(chunk))
                    self._writer.put(name, slice(start, start + len(chunk)), chunk)
            self._writer.check()
        except BaseException:  # some arrays may have taken the examples, and others not
            self.close()
            raise
        self.examples_done += count

    def finish(self) -> None:
        """Write what is left, mark the store completed, and let go of it.

        Raises
        ------
        ValueError
            If examples are missing.
        StoreWriteError
            If a write failed.
        """
        if self.completed:
            return
        self._require_open()
        if self.num_examples is not None and self.examples_done < self.num_examples:
            raise ValueError(
                f"{self.path} has {self.examples_done:,} of {self.num_examples:,} examples: append "
                "the others first"
            )
        try:
            self._writer.drain()
            self._write_rest()
            mark_completed(self.path)
            self.completed = True
        finally:
            self.close()

    def _write_rest(self) -> None:
        if self.num_examples is None:
            # Cut before the last, partial chunks are written: a file is otherwise a whole chunk
            for array in self._arrays.values():
                array.resize((self.examples_done, *array.shape[1:]))
        for name, filling in self._filling.items():
            start, chunk = filling.rest()
            if len(chunk):
                self._writer.put(name, slice(start, start + len(chunk)), chunk)
        self._writer.drain()

    def close(self) -> None:
        """Let go of a store that is not finished; whole chunks are kept, the rest is not."""
        self._release()

    def __enter__(self) -> ActivationWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _require_open(self) -> None:
        if self.completed:
            raise ValueError(f"{self.path} is completed: nothing can be appended to it")
        if not self._release.alive:
            raise ValueError(f"{self.path} was closed: open it again to append to it")

    def _require_fitting(self, arrays: Mapping[str, np.ndarray]) -> int:
        self._require_open()
        if arrays.keys() != self._arrays.keys():
            missing = ", ".join(sorted(self._arrays.keys() - arrays.keys())) or "none"
            unknown = ", ".join(sorted(arrays.keys() - self._arrays.keys())) or "none"
            raise ValueError(
                f"every array of {self.path} is needed: missing {missing}; unknown {unknown}"
            )
        counts = {name: len(values) if values.ndim else None for name, values in arrays.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(f"the arrays have different numbers of examples: {counts}")
        for name, values in arrays.items():
            array = self._arrays[name]
            if values.ndim == 0 or values.shape[1:] != array.shape[1:]:
                raise ValueError(
                    f"{name} has shape {values.shape}, but the store takes (examples, "
                    f"{', '.join(map(str, array.shape[1:]))})"
                )
            if not np.can_cast(values.dtype, array.dtype, "safe"):
                raise ValueError(
                    f"{name} is {values.dtype}, which the store's {array.dtype} does not hold: "
                    "convert it, or declare that type"
                )
        count = len(next(iter(arrays.values())))
        if self.num_examples is not None and self.examples_done + count > self.num_examples:
            raise ValueError(
                f"{count:,} more examples are too many: {self.path} has {self.examples_done:,} of "
                f"{self.num_examples:,}"
            )
        return count

    def _reserve(self, end: int) -> None:
        """Make arrays of unknown length longer, all alike, and seldom; never one shorter.

        A process that was killed may have lengthened some of them only.
        """
        lengths = [array.shape[0] for array in self._arrays.values()]
        if self.num_examples is None and end > min(lengths):
            room = max(end, 2 * min(lengths), *lengths)
            for array in self._arrays.values():
                array.resize((room, *array.shape[1:]))


class _Writer(BackgroundWriter):
    def check(self) -> None:
        if self._error is not None:
            raise StoreWriteError(
                f"writing to {self.path} failed: {self._error}. Make room or repair the cause, "
                "then make the same call again: whole chunks are kept"
            ) from self._error


class _Filling:
    """Cuts the examples of one array into chunks."""

    def __init__(
        self, chunks: tuple[int, ...], dtype: np.dtype[Any], start: int, end: int | None
    ) -> None:
        self.chunks, self.dtype, self.start, self.end = chunks, dtype, start, end
        self.values: np.ndarray | None = None
        self.filled = 0

    def extend(self, values: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Take examples; give every chunk that they fill, with the number of its first example."""
        while len(values):
            if self.values is None:
                room = self.chunks[0]
                if self.end is not None:
                    room = min(room, self.end - self.start)
                self.values = np.empty((room, *values.shape[1:]), self.dtype)
            taken = min(len(values), len(self.values) - self.filled)
            self.values[self.filled : self.filled + taken] = values[:taken]
            self.filled += taken
            values = values[taken:]
            if self.filled == len(self.values):
                yield self.rest()

    def rest(self) -> tuple[int, np.ndarray]:
        """Give what is there of the chunk that is being filled, and begin the next."""
        values = np.empty(0) if self.values is None else self.values[: self.filled]
        start = self.start
        self.start, self.values, self.filled = start + self.filled, None, 0
        return start, values


def _checked_variable(name: str, variable: Variable, num_examples: int | None) -> ActivationSpec:
    dims, shape, dtype = variable
    if not dims or dims[0] != EXAMPLE or len(dims) != len(shape) + 1 or min(shape, default=1) < 1:
        raise ValueError(
            f"{name} has dims {dims} and shape {shape}: give dims that begin with {EXAMPLE!r}, and "
            "the shape of one example, one positive number for each dim behind it"
        )
    return ActivationSpec(tuple(dims), (num_examples or 0, *map(int, shape)), dtype_name(dtype))


def _settings(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if name not in OWN_ATTRIBUTES}


def _create(
    path: Path,
    specs: Mapping[str, ActivationSpec],
    attributes: Mapping[str, Any],
    coordinates: xr.Dataset,
    unembedding: Mapping[str, Any] | None,
    chunk_bytes: int,
) -> None:
    """Write all that is not examples, then move it into place in one step.

    A process that loses a race leaves the winner's store as it is.
    """
    total = attributes["layout"]["num_examples"]
    most_examples = CHUNK_EXAMPLES if total is None else min(CHUNK_EXAMPLES, max(1, total // PARTS))
    rows = rows_per_chunk(specs, chunk_bytes, most_examples)
    with made_at_once(path) as draft:
        create_group(draft, specs, rows, attributes, coordinates, unembedding)


def _whole_examples(path: Path, layout: Mapping[str, Any]) -> int:
    """Count the examples that every array has on disk, from the first, in whole chunks."""
    if any(spec["dims"][:1] != [EXAMPLE] for spec in layout["variables"].values()):
        return 0  # a saved run that is half-written: it is not continued
    arrays = {name: zarr.open_array(path / name, mode="r") for name in layout["variables"]}
    ends = []
    for name, array in arrays.items():
        there = _chunks_there(path / name)
        first_missing = next(i for i in range(len(there) + 1) if i not in there)
        ends.append(min(first_missing * array.chunks[0], array.shape[0]))
    if min(ends) == layout["num_examples"]:
        return min(ends)
    largest = max(array.chunks[0] for array in arrays.values())
    return min(ends) // largest * largest


def _chunks_there(path: Path) -> dict[int, Path]:
    """Find the chunks of an array by their numbers; none is cut short, as each was moved there.

    Files of no bytes, which a power cut can leave, are no chunks.
    """
    found = {}
    for entry in os.scandir(path):
        match = _CHUNK.fullmatch(entry.name)
        if match and entry.stat().st_size:
            found[int(match[1])] = Path(entry.path)
    return found


_CHUNK = re.compile(r"c\.(\d+)(?:\.0)*")


def _remove_chunks_after(path: Path, arrays: Mapping[str, zarr.Array], done: int) -> None:
    """Remove chunks that are going to be written again.

    The last of a store of unknown length may be a part of one, which must not pass for a whole
    chunk once there are more examples.
    """
    for name, array in arrays.items():
        for number, file in _chunks_there(path / name).items():
            if number >= done // array.chunks[0]:
                file.unlink()


def _release(writer: BackgroundWriter, descriptor: int) -> None:
    writer.close()
    os.close(descriptor)
