"""Run a compiled, GIL-free function over a range of blocks with a few threads of our own.

Numba's own threading layers abort the process when two Python threads enter them at once
(workqueue) or after a fork (GNU OpenMP). Plain threads have neither trouble: tasks never wait for
each other, and a child process starts a fresh pool.
"""

from __future__ import annotations

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
        At most so many ranges run at a time; the calling thread works on one of them.
    """
    threads = min(threads, blocks)
    if threads <= 1:
        if blocks:
            work(0, blocks)
        return
    pool = _pools.get(threads) or _pools.setdefault(threads, ThreadPoolExecutor(threads - 1))
    edges = [blocks * t // threads for t in range(threads + 1)]
    others = [pool.submit(work, edges[t], edges[t + 1]) for t in range(1, threads)]
    try:
        work(edges[0], edges[1])
    finally:
        for other in others:
            other.result()


def worthwhile(nanoseconds: float, threads: int) -> int:
    """How many of these threads pay for work that takes so long on one."""
    return threads if nanoseconds > _WAKING else 1


_WAKING = 150_000  # nanoseconds of work; handing out a range costs some 20 microseconds
