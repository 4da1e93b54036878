"""Reading parts of a stored array: only the chunks that are needed, in the calling thread.

zarr-python decodes behind one event loop, for which threads that read side by side wait: two of
them read slower than one. Here every thread reads and decodes by itself, so the tasks of a Dask
graph scale with the cores, and one chunk at a time is in memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from copy import copy
from itertools import product
from pathlib import Path
from typing import Any, Protocol

import google_crc32c
import numpy as np
from numcodecs import blosc, zstd

FILTERS = ("blosc", "zstd", "crc32c")  # codecs from bytes to bytes that are undone here
BLOSC_HEADER = 16  # bytes; the last four say how many there are
CHECKSUM_BYTES = 4  # of a CRC32C behind what it covers
NEVER_WRITTEN = np.iinfo(np.uint64).max  # what a shard's index holds for an absent chunk


class DamagedStoreError(ValueError):
    """A store does not hold what was written to it."""


class StoredArray:
    """A part of an array on disk; reads like an array, and can be sent to another process.

    Attributes
    ----------
    path : str
        Directory of the array.
    start, stop : tuple of int
        Bounds of this part in the array.
    file_shape, chunk_shape : tuple of int
        Extent of one file, and of what is decoded at once.
    sharded : bool
        Whether a file is a shard: many chunks and their index.
    dtype, fill_value
        Of the values; a chunk that was never written reads as ``fill_value``.
    order : tuple of int or None
        Axes in the order in which a chunk is laid out, if it is not row-major.
    filters : tuple of str
        ``crc32c``, ``blosc``, ``zstd``: what has to be undone, outermost first.
    separator : str
        Between the numbers in a file's name.
    must_exist : bool
        Whether a chunk that was never written is an error.
    """

    # No dataclass: Dask looks into those, field by field, for every task that takes one.

    def __init__(
        self,
        *,
        path: str,
        start: tuple[int, ...],
        stop: tuple[int, ...],
        file_shape: tuple[int, ...],
        chunk_shape: tuple[int, ...],
        sharded: bool,
        dtype: np.dtype[Any],
        fill_value: Any,
        order: tuple[int, ...] | None,
        filters: tuple[str, ...],
        separator: str,
        must_exist: bool = False,
    ) -> None:
        self.path, self.start, self.stop = path, start, stop
        self.file_shape, self.chunk_shape, self.sharded = file_shape, chunk_shape, sharded
        self.dtype, self.fill_value = dtype, fill_value
        self.order, self.filters, self.separator = order, filters, separator
        self.must_exist = must_exist

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in zip(self.start, self.stop, strict=True))

    @property
    def ndim(self) -> int:
        return len(self.start)

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def part(self, *bounds: slice) -> StoredArray:
        """Narrow to contiguous bounds, one slice for each of the first axes; reads nothing."""
        start, stop = list(self.start), list(self.stop)
        for axis, bound in enumerate(bounds):
            first, last, step = bound.indices(self.shape[axis])
            if step != 1:
                raise ValueError(f"a part has no gaps: got {bound}")
            start[axis], stop[axis] = self.start[axis] + first, self.start[axis] + max(first, last)
        return self._with(start=tuple(start), stop=tuple(stop))

    def file_of(self, index: Sequence[int]) -> str:
        """Name the file at a place of the grid of files."""
        return os.path.join(self.path, self.separator.join(("c", *map(str, index))))

    def written(self) -> StoredArray:
        """Make a chunk that was never written an error instead of a fill value."""
        return self._with(must_exist=True)

    def _with(self, **changes: Any) -> StoredArray:
        other = copy(self)
        other.__dict__.update(changes)
        return other

    def chunks(self) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
        """Decode what this part needs, a chunk at a time, file by file.

        Yields
        ------
        place : tuple of slice
            Where the values stand in this part.
        values : np.ndarray
            Not to be written to, and not always contiguous.

        Raises
        ------
        DamagedStoreError
            If a chunk fails its checksum or cannot be decoded, or is absent and ``must_exist``.
        """
        for file_index in _cells(self.start, self.stop, self.file_shape):
            corner = [i * n for i, n in zip(file_index, self.file_shape, strict=True)]
            first = [max(0, a - o) for a, o in zip(self.start, corner, strict=True)]
            last = [
                min(n, b - o) for b, o, n in zip(self.stop, corner, self.file_shape, strict=True)
            ]
            with _ChunkFile(self, file_index) as file:
                for index in _cells(first, last, self.chunk_shape):
                    values = file.chunk(index)
                    place, inside = [], []
                    for axis, extent in enumerate(self.chunk_shape):
                        low = corner[axis] + index[axis] * extent
                        begin = max(self.start[axis], low)
                        end = min(self.stop[axis], low + extent)
                        place.append(slice(begin - self.start[axis], end - self.start[axis]))
                        inside.append(slice(begin - low, end - low))
                    yield tuple(place), values[tuple(inside)]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return assembled(self, dtype)

    def __getitem__(self, index: Any) -> np.ndarray:
        """Read what a basic index spans; whatever else it asks for is taken from that."""
        index = index if isinstance(index, tuple) else (index,)
        if any(item is Ellipsis or item is None for item in index):
            return np.asarray(self)[index]
        spans = [
            item if isinstance(item, slice) and item.step in (None, 1) else slice(None)
            for item in index
        ]
        rest = [
            slice(None) if isinstance(item, slice) and item.step in (None, 1) else item
            for item in index
        ]
        return np.asarray(self.part(*spans))[tuple(rest)]


class InChunks(Protocol):
    """What is read a chunk at a time."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    def chunks(self) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]: ...


def assembled(array: InChunks, dtype: Any = None) -> np.ndarray:
    """Read all chunks into one array."""
    values = np.empty(array.shape, array.dtype)
    for place, chunk in array.chunks():
        values[place] = chunk
    return values if dtype is None else values.astype(dtype, copy=False)


def open_stored(path: Path) -> StoredArray | None:
    """Open an array for reading in parts; reads its ``zarr.json`` only.

    Returns
    -------
    StoredArray or None
        None where only zarr-python can read it: a layout or a codec that sampling stores do not
        use.
    """
    try:
        metadata = json.loads((path / "zarr.json").read_text())
        return _from_metadata(str(path), metadata)
    except (OSError, KeyError, TypeError, ValueError):
        return None


def _from_metadata(path: str, metadata: dict[str, Any]) -> StoredArray | None:
    grid, keys = metadata["chunk_grid"], metadata["chunk_key_encoding"]
    if metadata["zarr_format"] != 3 or grid["name"] != "regular" or keys["name"] != "default":
        return None
    shape = tuple(metadata["shape"])
    file_shape = chunk_shape = tuple(grid["configuration"]["chunk_shape"])
    codecs = metadata["codecs"]
    sharded = codecs[0]["name"] == "sharding_indexed"
    if sharded:
        shard = codecs[0]["configuration"]
        index = [codec["name"] for codec in shard["index_codecs"]]
        little = _is_little_endian(shard["index_codecs"][0])
        at_end = shard.get("index_location", "end") == "end"
        if len(codecs) > 1 or index != ["bytes", "crc32c"] or not (little and at_end):
            return None
        chunk_shape, codecs = tuple(shard["chunk_shape"]), shard["codecs"]
    order: tuple[int, ...] | None = None
    filters: list[str] = []
    for codec in codecs:
        name, settings = codec["name"], codec.get("configuration", {})
        if name == "transpose" and order is None and not filters:
            order = tuple(settings["order"])
        elif name in FILTERS:
            filters.append(name)
        elif name != "bytes" or not _is_little_endian(codec):
            return None
    dtype = np.dtype(metadata["data_type"])
    if not shape or dtype.kind not in "fiub":
        return None
    return StoredArray(
        path=path,
        start=(0,) * len(shape),
        stop=shape,
        file_shape=file_shape,
        chunk_shape=chunk_shape,
        sharded=sharded,
        dtype=dtype,
        fill_value=np.array(metadata["fill_value"]).astype(dtype)[()],
        order=order,
        filters=tuple(reversed(filters)),
        separator=keys.get("configuration", {}).get("separator", "/"),
    )


def _is_little_endian(codec: dict[str, Any]) -> bool:
    return codec.get("configuration", {}).get("endian", "little") == "little"


def _cells(
    start: Sequence[int], stop: Sequence[int], extent: Sequence[int]
) -> Iterator[tuple[int, ...]]:
    """Number the cells of a regular grid that the box from ``start`` to ``stop`` touches."""
    ranges = [
        range(a // n, -(-b // n)) if b > a else range(0)
        for a, b, n in zip(start, stop, extent, strict=True)
    ]
    return product(*ranges)


class _ChunkFile:
    """One file of an array, open for reading."""

    def __init__(self, array: StoredArray, index: tuple[int, ...]) -> None:
        self.array = array
        self.name = array.file_of(index)
        self.descriptor: int | None = None
        self.size = 0  # bytes
        self.spans: np.ndarray | None = None  # (chunks..., 2): offset and bytes, of a shard

    def __enter__(self) -> _ChunkFile:
        try:
            self.descriptor = os.open(self.name, os.O_RDONLY)
        except FileNotFoundError:
            return self
        try:
            self.size = os.fstat(self.descriptor).st_size
            if self.array.sharded:
                self.spans = self._shard_index()
        except BaseException:
            os.close(self.descriptor)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)

    def chunk(self, index: tuple[int, ...]) -> np.ndarray:
        """Read and decode one chunk, counted from the start of the file."""
        array = self.array
        span = self._span(index)
        if span is None:
            if array.must_exist:
                raise DamagedStoreError(
                    f"{self.name} lacks chunk {index}, although the store records it as written: "
                    "restore the store from a copy, or make it anew"
                )
            return np.broadcast_to(np.asarray(array.fill_value, array.dtype), array.chunk_shape)
        assert self.descriptor is not None
        if sum(span) > self.size:
            raise self._damaged(f"its chunk {index} ends behind the file's {self.size} bytes")
        try:
            return decode(os.pread(self.descriptor, span[1], span[0]), array)
        except (ValueError, RuntimeError) as error:
            raise self._damaged(f"its chunk {index} cannot be decoded: {error}") from error

    def _span(self, index: tuple[int, ...]) -> tuple[int, int] | None:
        if self.descriptor is None:
            return None
        if self.spans is None:
            return 0, self.size
        offset, size = self.spans[index]
        return None if offset == NEVER_WRITTEN else (int(offset), int(size))

    def _shard_index(self) -> np.ndarray:
        assert self.descriptor is not None
        counts = [
            n // m for n, m in zip(self.array.file_shape, self.array.chunk_shape, strict=True)
        ]
        wanted = 16 * int(np.prod(counts)) + CHECKSUM_BYTES
        if self.size < wanted:
            raise self._damaged(f"its {self.size} bytes are fewer than its index takes ({wanted})")
        try:
            index = _without_checksum(os.pread(self.descriptor, wanted, self.size - wanted))
        except ValueError as error:
            raise self._damaged(f"its index cannot be read: {error}") from error
        return np.frombuffer(index, "<u8").reshape(*counts, 2)

    def _damaged(self, what: str) -> DamagedStoreError:
        return DamagedStoreError(
            f"{self.name} is damaged: {what}. Restore the store from a copy, or make it anew"
        )


def decode(encoded: bytes, array: StoredArray) -> np.ndarray:
    """Undo the codecs of one chunk.

    Raises
    ------
    ValueError, RuntimeError
        If the bytes are not what was written.
    """
    data: Any = memoryview(encoded)
    for name in array.filters:
        data = _without_checksum(data) if name == "crc32c" else _decompressed(name, data)
    values = np.frombuffer(data, array.dtype.newbyteorder("<"))
    if array.order is None:
        return values.reshape(array.chunk_shape)
    laid_out = values.reshape([array.chunk_shape[axis] for axis in array.order])
    return laid_out.transpose(np.argsort(array.order))


def _decompressed(name: str, data: memoryview) -> Any:
    if name == "zstd":
        return zstd.decompress(data)
    # Blosc trusts its header, and would read on behind the end of what was cut short
    if len(data) < BLOSC_HEADER or int.from_bytes(data[12:16], "little") != len(data):
        raise ValueError(f"{len(data)} bytes are not what its Blosc header says")
    return blosc.decompress(data)


def _without_checksum(data: Any) -> memoryview:
    data = memoryview(data)
    body, stored = data[:-CHECKSUM_BYTES], data[-CHECKSUM_BYTES:]
    # of an array it makes no copy; of a memoryview it takes none
    if google_crc32c.value(np.frombuffer(body, np.uint8)) != int.from_bytes(stored, "little"):
        raise ValueError("its checksum (CRC32C) differs")
    return body
