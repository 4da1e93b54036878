"""Write rows in the background: sampling fills buffers, one thread encodes and writes them."""

from __future__ import annotations

import asyncio
import queue
import shutil
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import zarr

from basinscope.io.durable import settle, written_files

PENDING_BYTES = 256 * 2**20  # most bytes that wait for the disk before put() waits too


class StoreWriteError(OSError):
    """The store could not be written; the cause is chained."""


_Job = tuple[int, Callable[[], None], Callable[[], None] | None]
"""Bytes, what to do, and what to do instead after an error."""


class Values(Protocol):
    """An array, or what will be one when it is asked for."""

    @property
    def nbytes(self) -> int: ...

    def __array__(self) -> np.ndarray: ...


class BackgroundWriter:
    """A bounded queue in front of one writing thread.

    Parameters
    ----------
    path : Path
        The store, for messages.
    arrays : dict of str to zarr.Array
        Where to write.
    pending_bytes : int
        Bytes that may wait; beyond them :meth:`put` blocks (back-pressure).

    Attributes
    ----------
    write_seconds, stall_seconds : dict of chain to float
        Time the thread spent writing, and time callers spent waiting for it; under None what
        belongs to no chain.
    bytes_taken : int
        Bytes handed over, before encoding.
    """

    def __init__(
        self, path: Path, arrays: dict[str, zarr.Array], pending_bytes: int = PENDING_BYTES
    ) -> None:
        self.path = path
        self.arrays = arrays
        self.pending_bytes = pending_bytes
        self.write_seconds: defaultdict[int | None, float] = defaultdict(float)
        self.stall_seconds: defaultdict[int | None, float] = defaultdict(float)
        self.bytes_taken = 0
        self._waiting = 0
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._loop = asyncio.new_event_loop()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="basinscope-writer", daemon=True)
        self._thread.start()

    def put(self, name: str, region: Any, values: Values, chain: int | None = None) -> None:
        """Write ``values`` to ``region`` of an array soon. The caller must not change them.

        What is not an array yet becomes one on the writing thread, which may have to wait for it.

        ``chain`` is whom the time is counted for.

        Raises
        ------
        StoreWriteError
            If this or an earlier write failed.
        """
        start = time.perf_counter()
        with self._changed:
            self._changed.wait_for(
                lambda: self._error or not self._waiting or self._waiting < self.pending_bytes
            )
            self._waiting += values.nbytes
            self.bytes_taken += values.nbytes
            self.stall_seconds[chain] += time.perf_counter() - start
        self.check()
        self._jobs.put((values.nbytes, lambda: self._write(name, region, values, chain), None))

    def then(self, action: Callable[[], None], otherwise: Callable[[], None] | None = None) -> None:
        """Run ``action`` on the writing thread once everything handed over so far is on disk.

        If a write failed before that, ``otherwise`` runs instead.
        """
        with self._changed:
            self._waiting += 1
        self._jobs.put((1, action, otherwise))

    def check(self) -> None:
        """Raise the error of an earlier write, if there was one."""
        if self._error is not None:
            raise write_error(self.path, self._error) from self._error

    def drain(self, chain: int | None = None) -> None:
        """Wait until everything handed over is on disk; raises what :meth:`put` raises."""
        start = time.perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: self._error or not self._waiting)
            self.stall_seconds[chain] += time.perf_counter() - start
        self.check()

    def close(self) -> None:
        """Finish the queue and end the thread, without raising; whatever comes later is an error.

        A chain's thread that outlives a second signal must not wait for a thread that has ended.
        """
        self._jobs.put(None)
        self._thread.join()
        with self._changed:
            self._error = self._error or ValueError("it was stopped before this was written")
            self._changed.notify_all()

    def _work(self) -> None:
        # zarr's own loop and threads are for many readers: encoding in each of those would leave
        # each with memory of its own
        self._loop.set_default_executor(ThreadPoolExecutor(1, "basinscope-encoder"))
        try:
            self._take_jobs()
        finally:
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()

    def _take_jobs(self) -> None:
        while (job := self._jobs.get()) is not None:
            waiting, work, otherwise = job
            try:
                if self._error is None:
                    work()
                elif otherwise is not None:
                    otherwise()
            except BaseException as error:
                self._error = self._error or error
            finally:
                with self._changed:
                    self._waiting -= waiting
                    self._changed.notify_all()

    def _write(self, name: str, region: Any, values: Values, chain: int | None) -> None:
        ready = np.asarray(values)
        start = time.perf_counter()
        self._loop.run_until_complete(self.arrays[name].async_array.setitem(region, ready))
        for file in written_files(self.path / name, self.arrays[name], region):
            settle(file)
        self.write_seconds[chain] += time.perf_counter() - start


def write_error(path: Path, cause: BaseException) -> StoreWriteError:
    """Say why a store could not be written, and what to do."""
    free = shutil.disk_usage(path).free if path.exists() else 0
    return StoreWriteError(
        f"writing to {path} failed: {cause} ({free / 2**20:.0f} MiB are free there). Sampling "
        "stopped; make room or repair the cause, then make the same call again: finished chains "
        "are kept."
    )


class RowBuffer:
    """Collects the rows of one array and one chain, and hands over a file's worth at a time.

    Rows are copied side by side as they come. Kept where they were made, they would lie between
    what each step makes and lets go, which could then not be used again whole.

    Parameters
    ----------
    writer : BackgroundWriter
    name : str
        The array; its dimensions are (chain, row, ...).
    chain : int
    first_row : int
        Row that the next :meth:`append` is.
    room : callable
        Makes room for so many rows like a given one: ``(row, count)`` to an array (count, ...).
    ready : callable
        Turns collected rows, an array (row, ...), into what is written.
    """

    def __init__(
        self,
        writer: BackgroundWriter,
        name: str,
        chain: int,
        first_row: int,
        *,
        room: Callable[[Any, int], Any],
        ready: Callable[[Any], Values],
    ) -> None:
        array = writer.arrays[name]
        self.writer, self.name, self.chain, self.room, self.ready = writer, name, chain, room, ready
        self.rows_per_file = (array.shards or array.chunks)[1]
        self.last_row = array.shape[1]
        self.start, self.count = first_row, 0
        self.rows: Any = None

    @property
    def next_fills(self) -> bool:
        """Whether the next row completes a file, which is then handed over."""
        return (self.start + self.count + 1) % self.rows_per_file == 0

    def append(self, row: Any) -> None:
        """Take one row; hands over when a file is full."""
        full = self.next_fills
        if self.rows is None:
            end_of_file = self.start - self.start % self.rows_per_file + self.rows_per_file
            self.rows = self.room(row, min(end_of_file, self.last_row) - self.start)
        self.rows[self.count] = row
        self.count += 1
        if full:
            self.flush()

    def drop_from(self, row: int) -> None:
        """Forget a row that was not handed over yet, and those after it."""
        self.count = min(self.count, max(0, row - self.start))

    def flush(self) -> None:
        """Hand over what has been collected, a full file or not."""
        if not self.count:
            return
        end = self.start + self.count
        region = (self.chain, slice(self.start, end))
        self.writer.put(self.name, region, self.ready(self.rows[: self.count]), self.chain)
        self.start, self.count, self.rows = end, 0, None
