"""Run a compiled, GIL-free function over a range of blocks with a few threads of our own.

Numba's own threading layers abort the process when two Python threads enter them at once
(workqueue) or after a fork (GNU OpenMP). Plain threads have neither trouble: tasks never wait for
each other, and a child process starts a fresh pool.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

_pools: dict[int, ThreadPoolExecutor] = {}  # by size; a forked child forgets its parent's
os.register_at_fork(after_in_child=_pools.clear)


def for_blocks(work: Callable[[int, int], object], blocks: int, threads: int) -> None:
    """Call ``work(first, last)`` so that the calls cover blocks 0 to ``blocks - 1`` once each.

    Parameters
    ----------
    work
        Function of a half-open range of blocks. It should release the GIL, and its result for a
        block must not depend on the range the block came in.
    blocks
        How many blocks there are.
    threads
        At most so many ranges run at a time; the calling thread works too.
    """
    threads = min(threads, blocks)
    if threads <= 1:
        if blocks:
            work(0, blocks)
        return
    pool = _pools.get(threads) or _pools.setdefault(threads, ThreadPoolExecutor(threads - 1))
    ranges = min(blocks, threads * _RANGES)
    edges = [blocks * r // ranges for r in range(ranges + 1)]
    following = itertools.count()

    def take() -> None:
        while (r := next(following)) < ranges:
            work(edges[r], edges[r + 1])

    others = [pool.submit(take) for _ in range(1, threads)]
    try:
        take()
    finally:
        for other in others:
            if not other.cancel():  # one that has not woken up yet has nothing left to do
                other.result()


def worthwhile(nanoseconds: float, threads: int) -> int:
    """How many of these threads pay for work that takes so long on one."""
    return threads if nanoseconds > _WAKING else 1


_RANGES = 8  # per thread: one that is late, for its core was busy, leaves its share to the others
_WAKING = 150_000  # nanoseconds of work; handing out a range costs some 20 microseconds
