"""The background writer: bounded, in order, and loud when a write fails."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from basinscope.io.writer import BackgroundWriter, RowBuffer, StoreWriteError

ROWS, ROWS_PER_FILE, WIDTH = 23, 5, 4


def test_values_are_written_where_they_belong(store: Store) -> None:
    writer = store.writer()
    writer.put("a", (0, slice(2, 4)), np.full((2, WIDTH), 7, np.float32))
    writer.put("a", (1, slice(0, 1)), np.full((1, WIDTH), 8, np.float32))
    writer.drain()
    values = store.read("a")
    assert (values[0, 2:4] == 7).all()
    assert (values[1, :1] == 8).all()
    assert np.isnan(values).sum() == values.size - 3 * WIDTH
    assert writer.bytes_taken == 3 * WIDTH * 4
    assert writer.write_seconds[None] > 0


def test_put_waits_while_too_many_bytes_wait(store: Store) -> None:
    gate = store.close_gate()
    row = np.zeros((1, WIDTH), np.float32)
    writer = store.writer(pending_bytes=3 * row.nbytes)
    taken: list[int] = []

    def produce() -> None:
        for step in range(10):
            writer.put("a", (0, slice(step, step + 1)), row)
            taken.append(step)

    producer = threading.Thread(target=produce)
    producer.start()
    wait_until(lambda: len(taken) == 3)
    time.sleep(0.1)
    assert taken == [0, 1, 2], "put must wait once three rows wait"
    assert writer._waiting == 3 * row.nbytes
    gate.set()
    producer.join(timeout=10)
    writer.drain()
    assert len(taken) == 10
    assert (store.read("a")[0, :10] == 0).all()


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(sizes=st.lists(st.integers(1, ROWS), min_size=1, max_size=20), bound=st.integers(1, 600))
def test_bytes_waiting_never_exceed_the_bound_by_more_than_one_write(
    sizes: list[int], bound: int, store: Store
) -> None:
    writer = BackgroundWriter(store.path, store.arrays, pending_bytes=bound)
    try:
        for size in sizes:
            values = np.zeros((size, WIDTH), np.float32)
            writer.put("a", (0, slice(0, size)), values)
            assert writer._waiting < bound + values.nbytes
        writer.drain()
        assert writer._waiting == 0
    finally:
        writer.close()


def test_a_single_write_larger_than_the_bound_passes(store: Store) -> None:
    writer = store.writer(pending_bytes=1)
    writer.put("a", (0, slice(None)), np.ones((ROWS, WIDTH), np.float32))
    writer.drain()
    assert (store.read("a")[0] == 1).all()


def test_waiting_is_counted_as_stall(store: Store) -> None:
    gate = store.close_gate()
    row = np.zeros((1, WIDTH), np.float32)
    writer = store.writer(pending_bytes=1)
    writer.put("a", (0, slice(0, 1)), row)
    assert writer.stall_seconds[None] < 0.1
    threading.Timer(0.3, gate.set).start()
    writer.put("a", (0, slice(1, 2)), row)
    assert writer.stall_seconds[None] >= 0.2
    before = writer.stall_seconds[None]
    gate.clear()
    threading.Timer(0.3, gate.set).start()
    writer.drain()
    assert writer.stall_seconds[None] >= before
    assert writer.write_seconds[None] >= 0.2


def test_a_write_error_surfaces_with_its_cause(store: Store) -> None:
    writer = store.failing_writer()
    writer.put("a", (0, slice(0, 1)), np.zeros((1, WIDTH), np.float32))
    wait_until(lambda: writer._error is not None)
    row = np.zeros((1, WIDTH), np.float32)
    for call in (writer.check, writer.drain, lambda: writer.put("a", (0, slice(1, 2)), row)):
        with pytest.raises(StoreWriteError) as caught:
            call()
        cause = caught.value.__cause__
        assert isinstance(cause, OSError)
        assert cause.errno == errno.ENOSPC
        message = str(caught.value)
        assert str(store.path) in message
        assert "No space left on device" in message
        assert "MiB are free" in message
        assert "same call again" in message


def test_a_file_in_the_way_is_a_write_error(store: Store) -> None:
    """Not a patched method: the array's chunk directory really cannot be made."""
    (store.path / "a" / "c").write_text("a file where a directory should be")
    writer = store.writer()
    writer.put("a", (0, slice(0, 1)), np.zeros((1, WIDTH), np.float32))
    with pytest.raises(StoreWriteError) as caught:
        writer.drain()
    assert isinstance(caught.value.__cause__, OSError)


def test_an_error_ends_a_wait_that_would_never_end(store: Store) -> None:
    gate = store.close_gate(then_fail=True)
    row = np.zeros((1, WIDTH), np.float32)
    writer = store.writer(pending_bytes=1)
    writer.put("a", (0, slice(0, 1)), row)
    threading.Timer(0.1, gate.set).start()
    with pytest.raises(StoreWriteError):
        writer.put("a", (0, slice(1, 2)), row)


def test_nothing_is_written_after_an_error(store: Store) -> None:
    writer = store.failing_writer()
    row = np.ones((1, WIDTH), np.float32)
    done: list[str] = []
    writer.put("a", (0, slice(0, 1)), row)
    writer.then(lambda: done.append("record says done"), otherwise=lambda: done.append("released"))
    writer.then(lambda: done.append("record says done"))
    writer.close()
    assert done == ["released"], "a record must not claim what is not on disk"


def test_then_runs_after_everything_before_it_is_on_disk(store: Store) -> None:
    gate = store.close_gate()
    writer = store.writer()
    seen: list[np.ndarray] = []
    writer.put("a", (0, slice(0, 3)), np.ones((3, WIDTH), np.float32))
    writer.put("a", (0, slice(3, 6)), np.ones((3, WIDTH), np.float32))
    writer.then(lambda: seen.append(store.read("a")[0, :6]))
    writer.put("a", (0, slice(6, 7)), np.ones((1, WIDTH), np.float32))
    assert seen == []
    gate.set()
    writer.drain()
    assert len(seen) == 1
    assert (seen[0] == 1).all()


def test_an_error_of_then_surfaces_too(store: Store) -> None:
    writer = store.writer()
    writer.then(lambda: (_ for _ in ()).throw(OSError(errno.EROFS, "read-only")))
    with pytest.raises(StoreWriteError, match="read-only"):
        writer.drain()


def test_close_finishes_the_queue_and_ends_the_thread(store: Store) -> None:
    writer = store.writer()
    for step in range(ROWS):
        row = np.full((1, WIDTH), step, np.float32)
        writer.put("a", (1, slice(step, step + 1)), row)
    writer.close()
    assert not writer._thread.is_alive()
    np.testing.assert_array_equal(store.read("a")[1, :, 0], np.arange(ROWS))


def test_what_comes_after_close_is_an_error_and_no_wait(store: Store) -> None:
    writer = store.writer()
    writer.close()
    row = np.zeros((1, WIDTH), np.float32)
    with pytest.raises(StoreWriteError, match="stopped before this was written"):
        writer.put("a", (0, slice(0, 1)), row)
    with pytest.raises(StoreWriteError, match="stopped before this was written"):
        writer.drain()


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    first=st.integers(0, ROWS - 1),
    last=st.integers(1, ROWS),
    name=st.sampled_from(["a", "sharded"]),
)
def test_row_buffer_hands_over_whole_files_from_any_first_row(
    first: int, last: int, name: str, store: Store
) -> None:
    last = max(first + 1, last)
    puts: list[slice] = []
    spy = Spy(store.arrays, puts)
    buffer = RowBuffer(spy, name, 1, first, room=room, ready=np.asarray)  # type: ignore[arg-type]
    for row in range(first, last):
        buffer.append(np.full(WIDTH, row, np.float32))
    buffer.flush()
    buffer.flush()

    assert [row for part in puts for row in range(part.start, part.stop)] == [*range(first, last)]
    for part in puts:
        files = {row // ROWS_PER_FILE for row in range(part.start, part.stop)}
        assert len(files) == 1, "one hand-over never touches two files"
    for part in puts[:-1]:
        assert part.stop % ROWS_PER_FILE == 0, "only the last hand-over ends inside a file"
    for part, values in zip(puts, spy.values, strict=True):
        np.testing.assert_array_equal(values[:, 0], np.arange(part.start, part.stop))


@pytest.mark.parametrize(("row", "kept"), [(9, 9), (8, 8), (7, 7), (3, 7)])
def test_rows_that_are_dropped_are_never_handed_over(row: int, kept: int, store: Store) -> None:
    puts: list[slice] = []
    spy = Spy(store.arrays, puts)
    buffer = RowBuffer(spy, "a", 1, 7, room=room, ready=np.asarray)  # type: ignore[arg-type]
    for number in (7, 8):
        buffer.append(np.full(WIDTH, number, np.float32))
    buffer.drop_from(row)
    buffer.flush()
    assert [number for values in spy.values for number in values[:, 0]] == [*range(7, kept)]
    assert puts == ([slice(7, kept)] if kept > 7 else [])


@pytest.mark.parametrize("name", ["a", "sharded"])
@pytest.mark.parametrize("cut", [1, 4, 5, 7, 22])
def test_rows_written_in_two_sittings_are_all_there(name: str, cut: int, store: Store) -> None:
    rows = np.random.default_rng(cut).normal(size=(ROWS, WIDTH)).astype(np.float32)
    for part in (range(cut + 1 if cut < ROWS - 1 else cut), range(cut, ROWS)):
        writer = store.writer()  # the second one overwrites what the first wrote past the cut
        buffer = RowBuffer(writer, name, 0, part.start, room=room, ready=np.asarray)
        for row in part:
            buffer.append(rows[row] if row < cut or part.start else rows[row] + 1)
        buffer.flush()
        writer.drain()
    np.testing.assert_array_equal(store.read(name)[0], rows)


def room(row: np.ndarray, count: int) -> np.ndarray:
    return np.empty((count, *row.shape), row.dtype)


class Store:
    """Two arrays (chain, row, width), one of them sharded, and the writers that a test opened."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path, self.monkeypatch = path, monkeypatch
        root = zarr.open_group(path, mode="w")
        common: dict[str, Any] = {"dtype": "float32", "fill_value": np.nan}
        self.arrays = {
            "a": root.create_array(
                "a", shape=(2, ROWS, WIDTH), chunks=(1, ROWS_PER_FILE, WIDTH), **common
            ),
            "sharded": root.create_array(
                "sharded",
                shape=(2, ROWS, WIDTH),
                chunks=(1, ROWS_PER_FILE, 2),
                shards=(1, ROWS_PER_FILE, WIDTH),
                **common,
            ),
        }
        self.writers: list[BackgroundWriter] = []
        self.gate: threading.Event | None = None

    def writer(self, **options: Any) -> BackgroundWriter:
        self.writers.append(BackgroundWriter(self.path, self.arrays, **options))
        return self.writers[-1]

    def failing_writer(self) -> BackgroundWriter:
        async def fail(self: Any, region: Any, values: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        self.monkeypatch.setattr(zarr.AsyncArray, "setitem", fail)
        return self.writer()

    def close_gate(self, then_fail: bool = False) -> threading.Event:
        """Hold every write until the returned event is set."""
        gate, write = threading.Event(), zarr.AsyncArray.setitem

        async def wait(array: Any, region: Any, values: Any) -> None:
            assert gate.wait(timeout=10)
            if then_fail:
                raise OSError(errno.ENOSPC, "No space left on device")
            await write(array, region, values)

        self.monkeypatch.setattr(zarr.AsyncArray, "setitem", wait)
        self.gate = gate
        return gate

    def read(self, name: str) -> np.ndarray:
        return np.asarray(zarr.open_array(self.path / name, mode="r")[:])


class Spy:
    """Takes what a buffer hands over."""

    def __init__(self, arrays: dict[str, zarr.Array], puts: list[slice]) -> None:
        self.arrays, self.puts, self.values = arrays, puts, []  # type: ignore[var-annotated]

    def put(
        self, name: str, region: tuple[int, slice], values: np.ndarray, counted_for: int
    ) -> None:
        chain, rows = region
        assert chain == counted_for == 1
        self.puts.append(rows)
        self.values.append(values)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    made = Store(tmp_path / "s.zarr", monkeypatch)
    yield made
    if made.gate is not None:
        made.gate.set()
    for writer in made.writers:
        writer.close()


def wait_until(condition: Any, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)
