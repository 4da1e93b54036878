"""What a store of activations holds, how it is cut into chunks, and writing one that is at hand."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr
from numpy.typing import DTypeLike
from zarr.codecs import BloscCodec, Crc32cCodec

from basinscope.io import codecs
from basinscope.io.results import digest
from basinscope.io.store import now, provenance, remove_partial_files
from basinscope.io.stored import StoredArray, open_stored

KIND = "activations"
SCHEMA_VERSION = 1
EXAMPLE = "example"
BFLOAT16 = "bfloat16"
CHUNK_BYTES = 8 * 2**20
BUFFER_BYTES = 128 * 2**20  # most bytes in chunks that are being filled, all arrays together
CHUNK_EXAMPLES = 512  # most examples in a chunk
WRITE_ALL: Any = {"write_empty_chunks": True}  # a chunk of zeros is there, too
CHUNK_RATIO = 4  # at most so many times the examples that the largest array has in a chunk

UNEMBEDDING_DIMS = {
    "weight": ("vocab", "d_model"),
    "bias": ("vocab",),
    "norm_weight": ("d_model",),
    "norm_bias": ("d_model",),
}
RESERVED_NAMES = {"unembedding", "zarr.json"}
OWN_ATTRIBUTES = {"created_by", "schema_version", "created_at", "kind", "completed", "finished_at"}
OWN_ATTRIBUTES |= {"coordinates"}  # xarray's: names of those that are no dims


@dataclass(frozen=True)
class ActivationSpec:
    """One array of a store.

    Attributes
    ----------
    dims, shape
        As Zarr stores them.
    dtype : str
        NumPy's name of what the values are, or "bfloat16", which is stored as float32.
    """

    dims: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str

    @property
    def stored(self) -> np.dtype[Any]:
        return np.dtype("float32" if self.dtype == BFLOAT16 else self.dtype)

    @property
    def row_bytes(self) -> int:
        return max(1, math.prod(self.shape[1:]) * self.stored.itemsize)


@dataclass(frozen=True)
class ActivationSource:
    """An array that is somewhere in memory, or is read when it is asked for.

    Attributes
    ----------
    spec : ActivationSpec
    read : callable
        Gives rows ``start`` to ``stop`` of the first axis as an ndarray; all of an array without
        axes.
    """

    spec: ActivationSpec
    read: Callable[[int, int], np.ndarray]


def write_activations(
    path: Path,
    sources: Mapping[str, ActivationSource],
    attrs: Mapping[str, Any],
    coords: Mapping[Any, Any],
    unembedding: Mapping[str, Any] | None = None,
) -> None:
    """Write a whole store. Only a chunk at a time is converted and encoded.

    Parameters
    ----------
    path : Path
        Must not exist. It is written in place: to move it there in one step is up to the caller.
    sources : mapping of str to ActivationSource
        Of any dims; cut into chunks along the first.
    attrs, unembedding : mapping
        As :meth:`ActivationWriter.create_or_continue` takes them.
    coords : mapping
        As :class:`xarray.Dataset` takes them.
    """
    specs = {name: source.spec for name, source in sources.items()}
    coordinates = xr.Dataset(coords=coords).compute()
    attributes = root_attributes(specs, None, attrs, coordinates, unembedding)
    rows = rows_per_chunk(specs, CHUNK_BYTES, CHUNK_EXAMPLES)
    create_group(path, specs, rows, attributes, coordinates, unembedding)
    for name, source in sources.items():
        array = zarr.open_array(path / name, mode="r+").with_config(WRITE_ALL)
        if not array.shape:
            array[...] = source.read(0, 1)
            continue
        for start in range(0, array.shape[0], array.chunks[0]):
            stop = min(start + array.chunks[0], array.shape[0])
            array[start:stop] = source.read(start, stop)
    mark_completed(path)


def root_attributes(
    specs: Mapping[str, ActivationSpec],
    num_examples: int | None,
    attrs: Mapping[str, Any],
    coordinates: xr.Dataset,
    unembedding: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Make the root's attributes; ``layout`` says what the store holds, values by their digest.

    Raises
    ------
    ValueError
        If there is no array, or its name cannot be one.
    TypeError
        If an attribute is not JSON.
    """
    if not specs:
        raise ValueError("there are no activations to store: give at least one array")
    for name in specs:
        if not name or "/" in name or name.startswith(".") or name in RESERVED_NAMES:
            raise ValueError(f"{name!r} cannot be the name of an array: give it another")
        if name in coordinates.coords:
            raise ValueError(f"{name!r} is both an array and a coordinate: name one otherwise")
    layout = {
        "num_examples": num_examples,
        "variables": {
            name: {
                "dims": spec.dims,
                "shape": spec.shape[1:] if spec.dims[:1] == (EXAMPLE,) else spec.shape,
                "dtype": spec.dtype,
            }
            for name, spec in specs.items()
        },
        "coordinates": {
            str(name): digest(values.astype(str) if values.dtype.kind == "O" else values.to_numpy())
            for name, values in coordinates.coords.items()
        },
        "unembedding": {
            name: _fingerprint(value) if isinstance(value, np.ndarray) else value
            for name, value in (unembedding or {}).items()
        },
    }
    given = {name: value for name, value in attrs.items() if name not in OWN_ATTRIBUTES}
    try:
        plain = json.loads(json.dumps({**given, "layout": layout}))
    except TypeError as error:
        raise TypeError(f"attributes are stored as JSON: {error}") from error
    return {**plain, **provenance(), "schema_version": SCHEMA_VERSION, "kind": KIND}


def _fingerprint(values: np.ndarray) -> str:
    """Name a large array by its values, without a copy of them."""
    data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    return f"{values.dtype}{values.shape} sha256 {hashlib.sha256(data.data).hexdigest()[:16]}"


def rows_per_chunk(
    specs: Mapping[str, ActivationSpec], chunk_bytes: int, most_examples: int
) -> dict[str, int]:
    """Choose how many rows (examples) each array has in a chunk: a power of two, or all.

    One number divides the other, so what all arrays have on disk after a kill ends where a chunk
    of each ends.
    """
    wanted = min(chunk_bytes, BUFFER_BYTES // len(specs))
    most = {name: max(1, wanted // spec.row_bytes) for name, spec in specs.items()}
    limit = min(most_examples, CHUNK_RATIO * min(most.values()))
    rows = {name: 1 << (min(n, limit).bit_length() - 1) for name, n in most.items()}
    known = {name: spec.shape[0] for name, spec in specs.items() if spec.shape and spec.shape[0]}
    return {name: min(n, known.get(name, n)) for name, n in rows.items()}


def create_group(
    path: Path,
    specs: Mapping[str, ActivationSpec],
    rows: Mapping[str, int],
    attributes: Mapping[str, Any],
    coordinates: xr.Dataset,
    unembedding: Mapping[str, Any] | None,
) -> None:
    """Write all metadata, the coordinates and the unembedding of a store, in place."""
    _require_one_size(specs, coordinates, unembedding)
    named = {  # text of a fixed length has no place in the Zarr v3 specification
        name: values.astype(object)
        for name, values in coordinates.coords.items()
        if values.dtype.kind == "U"
    }
    coordinates.assign_coords(named).assign_attrs(attributes).to_zarr(
        path,
        mode="w-",
        encoding={str(name): {"compressors": [Crc32cCodec()]} for name in coordinates.coords},
        zarr_format=3,
        consolidated=False,
    )
    root = zarr.open_group(path, mode="r+")
    for name, spec in specs.items():
        _create_array(root, name, spec, rows[name])
    if unembedding:
        _write_unembedding(root, unembedding)


def _require_one_size(
    specs: Mapping[str, ActivationSpec],
    coordinates: xr.Dataset,
    unembedding: Mapping[str, Any] | None,
) -> None:
    """Refuse arrays that xarray could not open together."""
    found = [("the coordinates", str(dim), size) for dim, size in coordinates.sizes.items()]
    for name, spec in specs.items():
        found += [(name, *of) for of in zip(spec.dims, spec.shape, strict=True)]
    for name, values in (unembedding or {}).items():
        if not isinstance(values, np.ndarray):
            continue
        dims = UNEMBEDDING_DIMS.get(name, ())
        if not dims or len(dims) != values.ndim:
            raise ValueError(
                f"unembedding has an array {name} of shape {values.shape}; its arrays are "
                + ", ".join(f"{n} ({', '.join(d)})" for n, d in UNEMBEDDING_DIMS.items())
            )
        found += [(f"unembedding {name}", *of) for of in zip(dims, values.shape, strict=True)]
    sizes: dict[str, tuple[str, int]] = {}
    for where, dim, size in found:
        first, known = sizes.setdefault(dim, (where, size))
        if size != known:
            raise ValueError(
                f"the dimension {dim!r} has {known} entries in {first} and {size} in {where}: give "
                "dimensions of other sizes other names"
            )


def written_coordinates(path: Path, layout: Mapping[str, Any]) -> Iterator[StoredArray]:
    """Open the coordinates of numbers that must have a file; without it, they are an error to read.

    Those of nothing but the fill value have none: their digest tells them apart.
    """
    for name, told in layout["coordinates"].items():
        stored = open_stored(path / name)
        if stored is None or not told.startswith(f"{stored.dtype}("):
            continue
        if told != digest(np.full(stored.shape, stored.fill_value, stored.dtype)):
            yield stored.written()


def _create_array(group: zarr.Group, name: str, spec: ActivationSpec, rows: int) -> zarr.Array:
    dtype = spec.stored
    blosc = BloscCodec(  # level 3 takes 1.2 to 4 times as long, for no fewer bytes
        cname="zstd",
        clevel=1,
        shuffle="shuffle",
        typesize=dtype.itemsize,
        blocksize=codecs.BLOSC_BLOCK,
    )
    return group.create_array(
        name,
        shape=spec.shape,
        dtype=dtype,
        chunks=(rows, *(max(1, n) for n in spec.shape[1:])) if spec.shape else (),
        filters=None,
        compressors=[blosc, Crc32cCodec()],
        fill_value=np.nan if dtype.kind == "f" else 0,
        dimension_names=spec.dims,
        chunk_key_encoding={"name": "default", "separator": "."},  # one directory for all chunks
        attributes={"source_dtype": BFLOAT16} if spec.dtype == BFLOAT16 else {},
        config=WRITE_ALL,
    )


def _write_unembedding(root: zarr.Group, unembedding: Mapping[str, Any]) -> None:
    arrays = {name: v for name, v in unembedding.items() if isinstance(v, np.ndarray)}
    numbers = {name: v for name, v in unembedding.items() if name not in arrays}
    group = root.create_group("unembedding", attributes=numbers)
    for name, values in arrays.items():
        spec = ActivationSpec(UNEMBEDDING_DIMS[name], values.shape, dtype_name(values.dtype))
        rows = max(1, min(len(values), CHUNK_BYTES // spec.row_bytes))
        array = _create_array(group, name, spec, rows)
        for start in range(0, len(values), rows):
            array[start : start + rows] = values[start : start + rows]


def mark_completed(path: Path) -> None:
    """Note in the store's attributes that it is whole."""
    remove_partial_files(path)
    zarr.open_group(path, mode="r+").update_attributes({"completed": 1, "finished_at": now()})


def dtype_name(dtype: DTypeLike) -> str:
    """Name a type of numbers as the store does.

    Examples
    --------
    >>> dtype_name("bfloat16"), dtype_name(np.float16)
    ('bfloat16', 'float16')
    """
    if str(dtype) == BFLOAT16:
        return BFLOAT16
    found = np.dtype(dtype)
    if found.kind not in "fiub" or found.itemsize > 8:
        raise ValueError(f"activations are numbers of at most 64 bits: got {dtype}")
    return found.name
