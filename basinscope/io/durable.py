"""Onto the disk itself: what a record speaks of must survive the machine, not only the process.

A file that was written and closed may still be in the system's memory alone, and a file system may
put a later one on the disk first. Where the order matters, the earlier one is settled.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import zarr


def settle(path: Path) -> None:
    """Return once a file, or the names in a directory, and its own name are on the disk.

    Raises
    ------
    OSError
        If it cannot be written after all; network file systems say so here that a quota is full.
    """
    _sync(path)
    _sync(path.parent)


def settle_tree(directory: Path) -> None:
    """Settle everything below a directory."""
    for parent, _, names in os.walk(directory):
        for name in names:
            _sync(Path(parent, name))
        _sync(Path(parent))


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # which cannot be opened there
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def written_files(directory: Path, array: zarr.Array, region: Any) -> Iterator[Path]:
    """Name the files that hold a region of an array; one that is only fill values has none.

    Parameters
    ----------
    directory : Path
        Of the array.
    region : int, slice, or tuple of them
        Of the first axes; the others are taken whole.
    """
    bounds = region if isinstance(region, tuple) else (region,)
    bounds += (slice(None),) * (array.ndim - len(bounds))
    cells = []
    for bound, size, extent in zip(bounds, array.shape, array.shards or array.chunks, strict=True):
        first, last, _ = (bound if isinstance(bound, slice) else slice(bound, bound + 1)).indices(
            size
        )
        cells.append(range(first // extent, -(-last // extent)))
    for cell in product(*cells):
        file = directory / array.metadata.encode_chunk_key(cell)
        if file.exists():
            yield file
