"""Memory: how much is free, and giving back what is not used any more."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")


def give_back() -> None:
    """Return to the system what was let go of and is still held for later (with glibc only)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def free_memory(cgroup: Path = CGROUP) -> int:
    """Bytes that are free on this machine, or in the control group that a job scheduler set.

    The latter for a process that has been given a share of the machine.
    """
    free = int(psutil.virtual_memory().available)
    try:
        most = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
    except (OSError, ValueError):  # no control group, or one without a limit
        return free
    return min(free, max(0, most - used))
