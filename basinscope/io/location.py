"""Where a store or another file is: a path of this machine."""

from __future__ import annotations

import errno
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from basinscope.io.durable import settle, settle_tree


def local_path(
    path: str | os.PathLike[str], of: str = "a store", start: Path | None = None
) -> Path:
    """Turn what a user gives into an absolute path, ``~`` expanded.

    What is read later, or in another process, must not depend on the directory that is then the
    working one.

    Parameters
    ----------
    path : path
    of : str
        What is there, for messages.
    start : Path, optional
        Where a relative path starts. Default: the working directory.

    Raises
    ------
    TypeError
        If it is no path.
    ValueError
        If it is empty, or a URL.

    Examples
    --------
    >>> local_path("s.zarr", start=Path("/runs")).as_posix()
    '/runs/s.zarr'
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(
            f"expected the path of {of}, a str or a pathlib.Path; got {type(path).__name__}"
        )
    text = os.fspath(path)
    if not text:
        raise ValueError(f"the path of {of} is empty: give one such as 'runs/first'")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):
        raise ValueError(
            f"{text!r} is a URL: {of} is read and written on this machine's file systems only; "
            "mount the place and give its path"
        )
    return (start or Path()).joinpath(Path(text).expanduser()).absolute()


def require_place(path: Path) -> None:
    """Refuse a path below a file, where nothing can be made, before long work.

    Raises
    ------
    NotADirectoryError
        Naming the file.
    """
    above = next((parent for parent in path.parents if parent.exists()), None)
    if above is not None and not above.is_dir():
        raise NotADirectoryError(
            f"{path} cannot be made, as {above} is no directory: choose another path"
        )


@contextmanager
def made_at_once(path: Path, or_else: Callable[[Path], bool] = Path.exists) -> Iterator[Path]:
    """Give a draft beside a path to fill, then move it into place in one step, on the disk.

    A process that loses a race leaves what the winner put there as it is. A symbolic link stays:
    what it points to is made.

    Parameters
    ----------
    or_else : callable
        Whether what the winner put there will do; if not, losing is an error.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.parent / f".{path.name}.{uuid.uuid4().hex}.partial"
    try:
        yield draft
        settle_tree(draft)
        try:
            draft.rename(path)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY) or not or_else(path):
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    settle(path)
