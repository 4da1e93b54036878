"""Memory: what is free, in a share of the machine too, and what is let go of goes back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from basinscope.io.memory import free_memory

NOWHERE = Path("/nowhere")
FRAGMENTED = """
import psutil
from basinscope.io.memory import give_back

rss = psutil.Process().memory_info().rss
blocks = [bytes(2000) for _ in range(100_000)]
last = bytes(2000)  # lies behind them all
del blocks
held = psutil.Process().memory_info().rss
give_back()
left = psutil.Process().memory_info().rss
print(held - rss, left - rss)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_memory_that_was_let_go_of_is_given_back() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FRAGMENTED], check=True, capture_output=True, text=True
    )
    held, left = map(int, done.stdout.split())
    assert held > 100 * 2**20, "nothing was held: this shows nothing"
    assert left < 20 * 2**20


def test_without_a_limit_the_machines_memory_is_free(tmp_path: Path) -> None:
    free = psutil.virtual_memory().available
    assert free_memory(NOWHERE, NOWHERE) == pytest.approx(free, rel=0.5)
    own = control_group(tmp_path, limit="max", used=400_000)
    assert free_memory(tmp_path, own) == pytest.approx(free, rel=0.5)


def test_what_the_system_only_caches_is_free(tmp_path: Path) -> None:
    """A job that has read a large file is charged for it, until it needs the room."""
    own = control_group(tmp_path, limit=1_000_000, used=400_000)
    assert free_memory(tmp_path, own) == 600_000
    control_group(tmp_path, limit=1_000_000, used=990_000, cached=700_000)
    assert free_memory(tmp_path, own) == 710_000
    control_group(tmp_path, limit=1_000_000, used=1_300_000, cached=100_000)  # lowered since
    assert free_memory(tmp_path, own) == 0


@pytest.mark.parametrize("tightest", ["", "slurm", "slurm/job_7", "slurm/job_7/step_0"])
def test_every_control_group_around_a_process_bounds_what_is_free(
    tightest: str, tmp_path: Path
) -> None:
    groups = ["", "slurm", "slurm/job_7", "slurm/job_7/step_0"]
    for group in groups:
        limit = 1_000_000 if group == tightest else 2_000_000
        own = control_group(tmp_path, group, limit=limit, used=400_000, cached=100_000)
    control_group(tmp_path / "slurm/job_8", limit=1000, used=0)  # another's
    assert free_memory(tmp_path, own) == 700_000
    (tmp_path / tightest / "memory.max").write_text("max\n")
    assert free_memory(tmp_path, own) == 1_700_000


def test_a_control_group_that_is_named_from_outside_a_container(tmp_path: Path) -> None:
    """There the root of what is mounted is the container's own group."""
    control_group(tmp_path, limit=1_000_000, used=400_000)
    own = tmp_path / "cgroup"
    for named in ("0::/system.slice/container.scope\n", "0::/../../other\n", "4:memory:/a\n"):
        own.write_text(named)
        assert free_memory(tmp_path, own) == 600_000


def control_group(
    root: Path, group: str = "", *, limit: object, used: int, cached: int = 0
) -> Path:
    """Write what Linux shows of a control group; give the file that names it as a process's."""
    place = root / group
    place.mkdir(parents=True, exist_ok=True)
    (place / "memory.max").write_text(f"{limit}\n")
    (place / "memory.current").write_text(f"{used}\n")
    (place / "memory.stat").write_text(
        f"anon {used - cached}\nfile {cached}\ninactive_file {cached}\nactive_file 0\n"
    )
    named = root / "cgroup"
    named.write_text(f"1:name=systemd:/elsewhere\n0::/{group}\n")
    return named
