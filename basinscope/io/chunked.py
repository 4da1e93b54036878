"""Zarr arrays that are written file by file, for stores of very many of them.

zarr-python takes milliseconds to create an array, and tens of thousands make minutes of that. Here
an array of real numbers is its ``zarr.json`` and one compressed file for each chunk, written by the
calling thread. Every chunk has its file, those of only zeros too, and the fill value is NaN: a file
that was lost is an error, and NaN to other readers, but never zeros.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numcodecs import blosc

from basinscope.io.codecs import BLOSC_BLOCK
from basinscope.io.durable import settle
from basinscope.io.stored import StoredArray, open_stored

LEVEL = 1  # of zstd; sums hold noise in most of their bits, which no level compresses


def write_group(path: Path, attributes: Mapping[str, Any] | None = None) -> None:
    """Write the ``zarr.json`` of a new group."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "zarr.json").write_text(_group(attributes or {}))


def replace_attributes(path: Path, attributes: Mapping[str, Any]) -> None:
    """Give a group other attributes, in one step and for good."""
    draft = path / f"zarr.json.{uuid.uuid4().hex}.partial"
    draft.write_text(_group(attributes))
    settle(draft)
    draft.replace(path / "zarr.json")
    settle(path)


def _group(attributes: Mapping[str, Any]) -> str:
    return json.dumps({"zarr_format": 3, "node_type": "group", "attributes": dict(attributes)})


def read_attributes(path: Path) -> dict[str, Any]:
    """Read a group's attributes; empty where there is no readable Zarr v3 group."""
    try:
        group = json.loads((path / "zarr.json").read_text())
        return dict(group["attributes"]) if group["node_type"] == "group" else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def write_array(path: Path, values: np.ndarray, dims: Sequence[str], most: Sequence[int]) -> None:
    """Write an array whole, in equal chunks of at most ``most`` entries along each dimension."""
    chunks = even_chunks(values.shape, most)
    create_array(path, values.shape, values.dtype, dims, chunks)
    for index, part in chunk_places(values.shape, chunks):
        write_chunk(path, index, values[part], chunks)


def even_chunks(shape: Sequence[int], most: Sequence[int]) -> tuple[int, ...]:
    """Split every extent evenly, into pieces of at most ``most``.

    Examples
    --------
    >>> even_chunks((1030, 5), (512, 512))
    (344, 5)
    """
    return tuple(-(-n // -(-n // limit)) for n, limit in zip(shape, most, strict=True))


def chunk_places(
    shape: Sequence[int], chunks: Sequence[int]
) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...]]]:
    """Give the number of each chunk, and where it stands in the array."""
    for index in product(*(range(-(-n // m)) for n, m in zip(shape, chunks, strict=True))):
        yield (
            index,
            tuple(
                slice(i * m, min(n, (i + 1) * m))
                for i, n, m in zip(index, shape, chunks, strict=True)
            ),
        )


def create_array(
    path: Path,
    shape: Sequence[int],
    dtype: np.dtype[Any],
    dims: Sequence[str],
    chunks: Sequence[int],
) -> None:
    """Write an array's ``zarr.json``; every chunk is still to be written."""
    path.mkdir(parents=True)
    compression = {
        "cname": "zstd", "clevel": LEVEL, "shuffle": "shuffle",
        "typesize": dtype.itemsize, "blocksize": BLOSC_BLOCK,
    }  # fmt: skip
    metadata = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunks)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": "NaN",
        "codecs": [
            {"name": "bytes", "configuration": {"endian": "little"}},
            {"name": "blosc", "configuration": compression},
            {"name": "crc32c"},
        ],
        "attributes": {},
        "dimension_names": list(dims),
    }
    (path / "zarr.json").write_text(json.dumps(metadata))


def write_chunk(
    path: Path, index: Sequence[int], values: np.ndarray, chunks: Sequence[int]
) -> None:
    """Write one chunk of an array; the last ones are filled up."""
    whole = np.zeros(chunks, values.dtype.newbyteorder("<"))
    whole[tuple(slice(n) for n in values.shape)] = values
    encoded = blosc.compress(whole, b"zstd", LEVEL, blosc.SHUFFLE, BLOSC_BLOCK)
    name = ".".join(("c", *map(str, index)))  # no directories: of these there are enough
    with (path / name).open("wb") as out:
        out.write(encoded)
        out.write(google_crc32c.value(encoded).to_bytes(4, "little"))


def open_array(path: Path) -> StoredArray | None:
    """Open an array for reading, one without a file for a chunk as an error.

    Older arrays have the fill value 0, and no files for chunks of only zeros, which are not missed.

    Returns
    -------
    StoredArray or None
        None where there is no array that can be read.
    """
    stored = open_stored(path)
    return stored.written() if stored is not None and has_every_chunk(stored) else stored


def has_every_chunk(stored: StoredArray) -> bool:
    """Whether an array was written with a file for every chunk, so that none is missing."""
    return bool(np.isnan(stored.fill_value))
