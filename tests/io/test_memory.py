"""Memory that is let go of goes back to the system."""

from __future__ import annotations

import subprocess
import sys

import pytest

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
