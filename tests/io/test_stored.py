"""Reading parts of a stored array: what zarr-python reads, from no more chunks than are needed."""

from __future__ import annotations

import math
import pickle
import re
import struct
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import google_crc32c
import numpy as np
import pytest
import xarray as xr
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from zarr.codecs import (
    BloscCodec,
    BytesCodec,
    Crc32cCodec,
    GzipCodec,
    ShardingCodec,
    TransposeCodec,
    ZstdCodec,
)

from basinscope.io import codecs, stored
from basinscope.io.store import open_store, stored_array
from basinscope.io.stored import DamagedStoreError, StoredArray, open_stored
from tests.analysis.stores_random import random_tree, write_tree

COMPRESSORS: dict[str, list[Any]] = {
    "none": [],
    "checksum": [Crc32cCodec()],
    "blosc": [BloscCodec(cname="zstd", clevel=1, shuffle="shuffle")],
    "zstd": [ZstdCodec(level=0)],
    "zstd, checksum": [ZstdCodec(level=3, checksum=True), Crc32cCodec()],
    "blosc, checksum": codecs.compressors(4),
}
FILL_VALUES: dict[str, list[Any]] = {
    "float32": [np.nan, 0.0, 1e-45, -np.inf, np.inf],
    "float64": [np.nan, 0.1],
    "float16": [np.nan, 6e4],
    "uint8": [0, 255],
    "uint16": [0, 65535],
    "int64": [0, -(2**63), 2**53 + 1],
    "uint64": [2**64 - 1],
    "bool": [False, True],
}
DRAWS_LAST: dict[str, Any] = {"filters": codecs.draw_last(4)}
CHECKSUMMED: dict[str, dict[str, Any]] = {
    "a shard of blosc": {
        "compressors": codecs.compressors(4),
        "shards": (1, 4, 6, 2),
        **DRAWS_LAST,
    },
    "a chunk of blosc": {"compressors": codecs.compressors(4)},
    "a shard as it is": {"compressors": [Crc32cCodec()], "shards": (1, 4, 6, 2), **DRAWS_LAST},
    "a chunk as it is": {"compressors": [Crc32cCodec()]},
}
SHARDED = [name for name in CHECKSUMMED if "shard" in name]
SHAPE, CHUNKS = (2, 4, 5, 2), (1, 4, 2, 2)
INDEX_ENTRIES = 3  # chunks in a shard of (1, 4, 6, 2)


@st.composite
def arrays(draw: st.DrawFn) -> dict[str, Any]:
    """Any layout that a store may have."""
    shape = draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    chunks = tuple(draw(st.integers(1, n + 1)) for n in shape)
    inside = draw(st.none() | st.tuples(*[st.integers(1, 3) for _ in shape]))
    order = draw(st.none() | st.permutations(range(len(shape))))
    dtype = draw(st.sampled_from(sorted(FILL_VALUES)))
    return {
        "shape": tuple(shape),
        "chunks": chunks,
        "shards": inside and tuple(n * m for n, m in zip(chunks, inside, strict=True)),
        "dtype": dtype,
        "filters": [] if order is None else [TransposeCodec(order=order)],
        "compressors": COMPRESSORS[draw(st.sampled_from(sorted(COMPRESSORS)))],
        "chunk_key_encoding": {"name": "default", "separator": draw(st.sampled_from("/."))},
        "fill_value": draw(st.sampled_from(FILL_VALUES[dtype])),
    }


@settings(max_examples=150, deadline=None)
@given(arrays(), st.data())
def test_any_part_of_any_layout_is_what_zarr_reads(
    layout: dict[str, Any], data: st.DataObject
) -> None:
    box = st.tuples(*[st.builds(span, *[st.integers(0, n)] * 2) for n in layout["shape"]])
    with tempfile.TemporaryDirectory() as directory:
        array = zarr.create_array(Path(directory) / "a", **layout)
        written = data.draw(box, "written")  # the rest is a fill value
        size = tuple(side.stop - side.start for side in written)
        array[written] = np.random.default_rng(0).uniform(0, 9, size).astype(layout["dtype"])
        opened = whole(Path(directory) / "a")
        wanted = data.draw(box, "part")
        found, expected = np.asarray(opened.part(*wanted)), np.asarray(array[wanted])
        assert (found.dtype, opened.part(*wanted).nbytes) == (expected.dtype, expected.nbytes)
        np.testing.assert_array_equal(found, expected)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_part_is_indexed_like_an_array(data: st.DataObject) -> None:
    bound = st.none() | st.integers(-6, 6)
    first, second = (data.draw(st.tuples(*[st.builds(slice, bound, bound)] * 3)) for _ in range(2))
    with tempfile.TemporaryDirectory() as directory:
        values = random_values((3, 5, 4))
        zarr.create_array(Path(directory) / "a", data=values, chunks=(1, 2, 3))
        part = whole(Path(directory) / "a").part(*first).part(*second[:2])
        values = values[first][second[:2]]
        assert (part.shape, part.ndim) == (values.shape, 3)
        np.testing.assert_array_equal(np.asarray(part), values)
        index = data.draw(st_numpy.basic_indices(values.shape, allow_newaxis=True))
        np.testing.assert_array_equal(part[index], values[index])


def test_a_part_with_gaps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no gaps: got slice\(None, None, 2\)"):
        make(tmp_path / "a").part(slice(None), slice(None, None, 2))


@pytest.mark.parametrize("layout", CHECKSUMMED)
@pytest.mark.parametrize(
    "part",
    [
        (slice(None),) * 4,
        (slice(1, 2), slice(1, 3), slice(1, 4)),
        (slice(None), slice(None), slice(4, 5), slice(1, 2)),
        (slice(None), slice(2, 2)),
    ],
)
def test_chunks_decode_what_the_part_touches_once(
    layout: str, part: tuple[slice, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = make(tmp_path / "a", **CHECKSUMMED[layout])
    touched = np.indices(SHAPE) // np.reshape(CHUNKS, (4, 1, 1, 1, 1))
    touched = touched[:, *part].reshape(4, -1)
    decoded = count_decodes(monkeypatch)
    times = np.zeros(opened.part(*part).shape, int)
    for place, values in opened.part(*part).chunks():
        np.testing.assert_array_equal(values, random_values(SHAPE)[part][place])
        times[place] += 1
    assert (times == 1).all()
    assert len(decoded) == len(set(map(tuple, touched.T)))


@pytest.mark.parametrize("layout", CHECKSUMMED)
def test_a_chunk_never_written_is_a_fill_value_or_an_error(layout: str, tmp_path: Path) -> None:
    opened = make(tmp_path / "a", **CHECKSUMMED[layout], write=False)
    array = zarr.open_array(tmp_path / "a", mode="r+")
    array[0, :, 2:4] = values = random_values(SHAPE)[0, :, 2:4]
    found = np.asarray(opened)
    np.testing.assert_array_equal(found[0, :, 2:4], values)
    assert np.isnan(found).sum() == math.prod(SHAPE) - values.size
    there = opened.written().part(slice(0, 1), slice(None), slice(2, 4))
    np.testing.assert_array_equal(np.asarray(there)[0], values)
    missing = r"c.0.0.0.0 lacks chunk \(0, 0, 0, 0\)"
    for part, name in ((slice(0, 1), missing), (slice(1, 2), "c.1.0.0.0")):
        with pytest.raises(DamagedStoreError, match=name):
            np.asarray(opened.written().part(part))


@pytest.mark.parametrize("layout", CHECKSUMMED)
def test_a_flipped_bit_in_any_byte_is_an_error_that_names_the_file(
    layout: str, tmp_path: Path
) -> None:
    opened = make(tmp_path / "a", **CHECKSUMMED[layout])
    random = np.random.default_rng(0)
    for file, good in files(opened):
        for place in range(len(good)):
            bad = bytearray(good)
            bad[place] ^= 1 << int(random.integers(8))
            file.write_bytes(bad)
            with pytest.raises(DamagedStoreError, match=re.escape(str(file))):
                np.asarray(opened)
        file.write_bytes(good)
    np.testing.assert_array_equal(np.asarray(opened), random_values(SHAPE))


@pytest.mark.parametrize("layout", [*CHECKSUMMED, *COMPRESSORS])
def test_a_cut_or_an_empty_file_is_an_error_that_names_the_file(
    layout: str, tmp_path: Path
) -> None:
    options = CHECKSUMMED.get(layout) or {"compressors": COMPRESSORS[layout]}
    opened = make(tmp_path / "a", **options)
    file, good = next(files(opened))
    for length in range(len(good)):
        file.write_bytes(good[:length])
        with pytest.raises(DamagedStoreError, match=re.escape(str(file))):
            np.asarray(opened)


@pytest.mark.parametrize("layout", SHARDED)
@pytest.mark.parametrize(
    "span",
    [(10**6, 100), (0, 10**6), (0, 0), (2**62, 8), (0, 2**62), (2**64 - 2, 8), (8, 2**63), (8, 2)],
)
def test_a_shard_index_that_points_elsewhere_is_an_error_that_names_the_file(
    span: tuple[int, int], layout: str, tmp_path: Path
) -> None:
    opened = make(tmp_path / "a", **CHECKSUMMED[layout])
    file, good = next(files(opened))
    start = len(good) - 16 * INDEX_ENTRIES - 4
    index = struct.pack("<QQ", *span) + good[start + 16 : -4]
    checksum = google_crc32c.value(index).to_bytes(4, "little")
    file.write_bytes(good[:start] + index + checksum)
    with pytest.raises(DamagedStoreError, match=re.escape(str(file))):
        np.asarray(opened)


def test_a_part_goes_to_other_processes(tmp_path: Path) -> None:
    part = make(tmp_path / "a").part(slice(1, 2)).written()
    sent = pickle.loads(pickle.dumps(part))
    np.testing.assert_array_equal(np.asarray(sent), random_values(SHAPE)[1:])
    (tmp_path / "a" / "c" / "1" / "0" / "0" / "0").unlink()
    with pytest.raises(DamagedStoreError):
        np.asarray(sent)


@pytest.mark.parametrize("layout", CHECKSUMMED)
def test_eight_threads_read_at_once(layout: str, tmp_path: Path) -> None:
    opened, values = make(tmp_path / "a", **CHECKSUMMED[layout]), random_values(SHAPE)
    together = Barrier(8)

    def read(thread: int) -> bool:
        together.wait(10)
        parts = [(slice(None), slice(None), slice(n % 5, 5)) for n in range(thread, thread + 40)]
        return all(np.array_equal(np.asarray(opened.part(*part)), values[part]) for part in parts)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(8)))


def _two_transposes(path: Path) -> None:
    turns = [TransposeCodec(order=(1, 2, 3, 0)), TransposeCodec(order=(0, 2, 1, 3))]
    zarr.create_array(path, data=random_values(SHAPE), chunks=(2, 2, 2, 2), filters=turns)


def _with(**options: Any) -> Callable[[Path], Any]:
    return lambda path: zarr.create_array(path, data=random_values(SHAPE), chunks=CHUNKS, **options)


def _in_shards(**options: Any) -> Callable[[Path], Any]:
    inner = {"chunk_shape": CHUNKS, "codecs": [BytesCodec(endian="little")]}
    sharding = ShardingCodec(**{**inner, **options})  # type: ignore[arg-type]

    def write(path: Path) -> None:
        array = zarr.create(  # the only call that takes a codec as it is
            store=path,
            shape=SHAPE,
            chunks=(1, 4, 6, 2),
            dtype="f4",
            zarr_format=3,
            codecs=[sharding],
        )
        array[...] = random_values(SHAPE)

    return write


FOREIGN: dict[str, Callable[[Path], Any]] = {
    "gzip": _with(compressors=[GzipCodec()]),
    "big-endian": _with(serializer=BytesCodec(endian="big")),
    "big-endian in shards": _in_shards(codecs=[BytesCodec(endian="big")]),
    "names of files as of v2": _with(chunk_key_encoding={"name": "v2", "separator": "."}),
    "v2": _with(zarr_format=2),
    "index at the start": _in_shards(index_location="start"),
    "index without a checksum": _in_shards(index_codecs=[BytesCodec(endian="little")]),
    "big-endian index": _in_shards(index_codecs=[BytesCodec(endian="big"), Crc32cCodec()]),
    "shards in shards": _in_shards(
        codecs=[ShardingCodec(chunk_shape=(1, 2, 1, 1), codecs=[BytesCodec(endian="little")])]
    ),
    "two transposes": _two_transposes,
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_stores_do_not_use_is_left_to_zarr(kind: str, tmp_path: Path) -> None:
    FOREIGN[kind](tmp_path / "a")
    values = np.asarray(zarr.open_array(tmp_path / "a", mode="r")[...])
    np.testing.assert_array_equal(values, random_values(SHAPE))
    assert open_stored(tmp_path / "a") is None


def test_text_and_scalars_are_left_to_zarr(tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "text", data=np.array(["a", "bc"], "T"), chunks=(1,))
    zarr.create_array(tmp_path / "scalar", data=np.float64(3))
    assert open_stored(tmp_path / "text") is None
    assert open_stored(tmp_path / "scalar") is None


@pytest.mark.parametrize("shards", [None, (1, 12, 4, 4)])
def test_variables_of_an_open_store_are_read_through_it(
    shards: tuple[int, int, int, int] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = random_tree(0)
    tree = open_store(write_tree(expected, tmp_path / "s", chunks=(1, 4, 1, 4), shards=shards))
    names = [name for name, variable in tree.data_vars.items() if variable.ndim]
    assert "loss_a" in names
    assert all(stored_array(tree[name].variable) is not None for name in names)
    decoded = count_decodes(monkeypatch)
    for name in names:
        before = len(decoded)
        np.testing.assert_array_equal(tree[name], expected[name])
        assert len(decoded) > before, name


@pytest.mark.parametrize(
    "change",
    [
        lambda losses: losses.isel(draw=slice(1, None)),
        lambda losses: losses.isel(chain=[1, 0]),
        lambda losses: losses + 1,
        lambda losses: losses.transpose("draw", "chain", ...),
        lambda losses: losses.astype("float64"),
        lambda losses: losses.compute(),
    ],
)
def test_a_changed_variable_is_no_longer_the_stored_array(
    change: Callable[[xr.DataArray], xr.DataArray], tmp_path: Path
) -> None:
    expected = random_tree(0)
    losses = open_store(write_tree(expected, tmp_path / "s"))["loss_a"]
    assert stored_array(change(losses).variable) is None
    np.testing.assert_array_equal(change(losses), change(expected["loss_a"]))


@pytest.mark.parametrize(
    "encoding",
    [
        {"compressors": [GzipCodec()]},
        {"serializer": BytesCodec(endian="big")},
        {"scale_factor": 0.5, "dtype": "float32"},
    ],
    ids=["gzip", "big-endian", "scaled"],
)
def test_a_store_that_it_cannot_read_opens_through_xarray(
    encoding: dict[str, Any], tmp_path: Path
) -> None:
    expected = random_tree(0)
    coded = {name: encoding for name in ("sampling_loss", "loss_a")}
    expected.dataset.to_zarr(tmp_path / "s", encoding=coded, zarr_format=3, consolidated=False)
    tree = open_store(tmp_path / "s")
    assert stored_array(tree["loss_a"].variable) is None
    assert stored_array(tree["loss_b"].variable) is not None
    assert tree["loss_a"].chunks is not None
    np.testing.assert_array_equal(tree["loss_a"], expected["loss_a"])


def span(a: int, b: int) -> slice:
    return slice(min(a, b), max(a, b))


def random_values(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(3).standard_normal(shape).astype(np.float32)


def whole(path: Path) -> StoredArray:
    opened = open_stored(path)
    assert opened is not None
    return opened


def make(path: Path, *, write: bool = True, **options: Any) -> StoredArray:
    array = zarr.create_array(
        path, shape=SHAPE, dtype="float32", chunks=CHUNKS, fill_value=np.nan, **options
    )
    if write:
        array[...] = random_values(SHAPE)
    return whole(path)


def files(opened: StoredArray) -> Iterator[tuple[Path, bytes]]:
    for file in sorted(Path(opened.path, "c").rglob("*")):
        if file.is_file():
            yield file, file.read_bytes()


def count_decodes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    decoded: list[int] = []
    decode = stored.decode

    def counting(encoded: bytes, array: StoredArray) -> np.ndarray:
        values = decode(encoded, array)
        decoded.append(values.nbytes)
        return values

    monkeypatch.setattr(stored, "decode", counting)
    return decoded
