"""Locks on directories, which go with the process, however it ends."""

from __future__ import annotations

import fcntl
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PATIENCE = 0.5  # seconds: whoever only looks whether a directory is locked holds it for less


@contextmanager
def locked(path: Path, held: Exception, patience: float = PATIENCE) -> Iterator[None]:
    """Hold a directory's lock; see :func:`lock_directory`."""
    descriptor = lock_directory(path, held, patience)
    try:
        yield
    finally:
        os.close(descriptor)


def lock_directory(path: Path, held: Exception, patience: float = PATIENCE) -> int:
    """Lock a directory for this process; closing the descriptor that this gives lets go of it.

    Where the file system has no locks, a warning says so.

    Parameters
    ----------
    path : Path
    held : Exception
    patience : float
        Seconds to try for.

    Raises
    ------
    Exception
        `held`, if another process, or another descriptor of this one, holds it all the while.
    """
    descriptor = os.open(path, os.O_RDONLY)
    end = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() >= end:
                os.close(descriptor)
                raise held from error
            time.sleep(PATIENCE / 50)
        except OSError as error:
            warnings.warn(f"{path} cannot be locked ({error})", stacklevel=3)
            return descriptor
        else:
            return descriptor
