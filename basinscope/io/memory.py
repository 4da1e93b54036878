"""Memory: how much is free, and giving back what is not used any more."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")


def give_back() -> None:
    """Return to the system what was let go of and is still held for later (with glibc only)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def free_memory(groups: Path = CGROUPS, own: Path = OWN_CGROUP) -> int:
    """Bytes that are free on this machine, or in the control groups that a job scheduler set.

    The latter for a process that has been given a share of the machine. What the system only
    caches counts as free: it is let go of when the room is needed.

    Parameters
    ----------
    groups : Path
        Where Linux shows all control groups (of version 2).
    own : Path
        The file that names this process's.
    """
    free = int(psutil.virtual_memory().available)
    return min([free, *_free_in_groups(groups, own)])


def _free_in_groups(groups: Path, own: Path) -> Iterator[int]:
    """Give the bytes that are left below each limit: of the process's group and those around it."""
    for group in _groups_around(own):
        try:
            most = int((groups / group / "memory.max").read_text())
            used = int((groups / group / "memory.current").read_text())
            lines = (groups / group / "memory.stat").read_text().splitlines()
        except (OSError, ValueError):  # no such group, or one without a limit
            continue
        cached = sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
        yield max(0, most - used + cached)


def _groups_around(own: Path) -> list[Path]:
    """Name the process's control group and all that it lies in, as paths from the root."""
    try:
        lines = own.read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    named = next((line for line in lines if line.startswith("0::/")), "0::/")
    group = Path(named.removeprefix("0::/"))
    return [group, *group.parents]
