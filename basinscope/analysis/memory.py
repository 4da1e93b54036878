"""How much memory an analysis may take."""

from __future__ import annotations

from pathlib import Path

import psutil
from dask.utils import parse_bytes

CGROUP = Path("/sys/fs/cgroup")


def parse_memory_limit(limit: int | str | None) -> int:
    """Turn a limit into bytes; None is half of what is free now.

    Parameters
    ----------
    limit : int, str or None
        Bytes, or a string such as "512MB" or "2GiB".

    Raises
    ------
    ValueError
        If it is no size, or not positive.
    """
    if limit is None:
        return free_memory() // 2
    try:
        if isinstance(limit, bool) or not isinstance(limit, (int, float, str)):
            raise TypeError(type(limit).__name__)
        if isinstance(limit, str) and not any(letter.isdigit() for letter in limit):
            raise ValueError("no digit")  # dask takes "MB" for one of them
        found = int(parse_bytes(limit))
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(
            f"memory_limit={limit!r} is no size: give bytes, or such as '512MB' or '2GiB'"
        ) from error
    if found <= 0:
        raise ValueError(f"memory_limit={limit!r} leaves no memory: give a positive size")
    return found


def free_memory(cgroup: Path = CGROUP) -> int:
    """Bytes that are free on this machine, or in the control group that a job scheduler set."""
    free = int(psutil.virtual_memory().available)
    try:
        most = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
    except (OSError, ValueError):  # no control group, or one without a limit
        return free
    return min(free, max(0, most - used))
