"""Locks on directories, which go with the process, however it ends."""

from __future__ import annotations

import fcntl
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(path: Path, held: Exception) -> Iterator[None]:
    """Hold a directory's lock; see :func:`lock_directory`."""
    descriptor = lock_directory(path, held)
    try:
        yield
    finally:
        os.close(descriptor)


def lock_directory(path: Path, held: Exception) -> int:
    """Lock a directory for this process; closing the descriptor that this gives lets go of it.

    Where the file system has no locks, a warning says so.

    Raises
    ------
    Exception
        `held`, if another process, or another descriptor of this one, holds it.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise held from error
    except OSError as error:
        warnings.warn(f"{path} cannot be locked ({error})", stacklevel=3)
    return descriptor
