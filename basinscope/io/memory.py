"""How much memory is free, for a process that a job scheduler may have given a share."""

from __future__ import annotations

from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")


def free_memory(cgroup: Path = CGROUP) -> int:
    """Bytes that are free on this machine, or in the control group that a job scheduler set."""
    free = int(psutil.virtual_memory().available)
    try:
        most = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
    except (OSError, ValueError):  # no control group, or one without a limit
        return free
    return min(free, max(0, most - used))
