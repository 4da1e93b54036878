"""A temporary copy of losses, cut so that a few sequences can be read over all their draws."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from pathlib import Path

import dask
import numpy as np
import zarr
from zarr.codecs import Crc32cCodec

from basinscope.io import codecs
from basinscope.io.stored import StoredArray, open_stored

CHUNK_BYTES = 2**19


class Copy:
    """Arrays in a directory, which goes when the :class:`TemporaryCopy` that made it does.

    Parameters
    ----------
    path : str
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def write(self, name: str, losses: np.ndarray) -> None:
        """Write (1, rows, batch, token_pos) as an array of its own."""
        _write(Path(self.path) / name, losses)

    def open(self, name: str) -> StoredArray:
        """Open what :meth:`write` wrote."""
        stored = open_stored(Path(self.path) / name)
        assert stored is not None
        return stored.written()


class TemporaryCopy(Copy):
    """A copy whose directory goes when the process that made it no longer needs it.

    It lies where Dask spills, ``dask.config`` ``temporary-directory``, or else in the system's
    directory for temporary files. Other processes get the path; only the maker removes it.

    Parameters
    ----------
    nbytes : int
        Bytes that are going to be written.

    Raises
    ------
    OSError
        If the disk has less room; says where and how to choose another place.
    """

    def __init__(self, nbytes: int) -> None:
        parent = dask.config.get("temporary-directory", None) or tempfile.gettempdir()
        free = shutil.disk_usage(parent).free
        if free < nbytes:
            raise OSError(
                f"a temporary copy takes {nbytes:,} bytes and {parent} has {free:,}: choose "
                "another place with dask.config.set({'temporary-directory': ...})"
            )
        super().__init__(tempfile.mkdtemp(prefix="basinscope-copy-", dir=parent))
        self._remove = weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)

    def __reduce__(self) -> tuple[object, ...]:
        return Copy, (self.path,)


def chunk_sequences(rows: int, batch: int, tokens: int, itemsize: int) -> int:
    """Sequences in one chunk of a copy: about CHUNK_BYTES, and all chunks about equally large."""
    most = max(1, CHUNK_BYTES // (rows * tokens * itemsize))
    return -(-batch // -(-batch // most))


def _write(path: Path, losses: np.ndarray) -> None:
    _, rows, batch, tokens = losses.shape
    block = chunk_sequences(rows, batch, tokens, losses.itemsize)
    array = zarr.create_array(
        path,
        shape=losses.shape,
        dtype=losses.dtype,
        chunks=(1, rows, block, tokens),
        shards=(1, rows, -(-batch // block) * block, tokens),
        filters=codecs.draw_last(4),
        compressors=[Crc32cCodec()],
        fill_value=np.nan,
        config={"write_empty_chunks": True},
    )
    array[...] = losses
