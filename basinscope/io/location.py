"""Where a store is: a path of this machine."""

from __future__ import annotations

import os
import re
from pathlib import Path


def local_path(path: str | os.PathLike[str]) -> Path:
    """Turn what a user gives into a path, ``~`` expanded.

    Raises
    ------
    TypeError
        If it is no path.
    ValueError
        If it is empty, or a URL.

    Examples
    --------
    >>> local_path("runs/s.zarr").as_posix()
    'runs/s.zarr'
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"expected the path of a store; got {type(path).__name__}: {path!r:.80}")
    text = os.fspath(path)
    if not text:
        raise ValueError("the path of the store is empty: give one such as 'samples.zarr'")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):
        raise ValueError(
            f"{text!r} is a URL: stores are directories of this machine's file systems; mount the "
            "place and give its path"
        )
    return Path(text).expanduser()
