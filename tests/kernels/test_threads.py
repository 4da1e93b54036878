"""Ranges of blocks on threads of our own, and the tables that blocks come from."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from basinscope.kernels.pointers import ALL, cut
from basinscope.kernels.threads import _pools, for_blocks


@given(blocks=st.integers(0, 40), threads=st.integers(1, 5))
def test_every_block_is_worked_on_once(blocks: int, threads: int) -> None:
    visits = np.zeros(blocks, dtype=int)

    def work(first: int, last: int) -> None:
        visits[first:last] += 1

    for_blocks(work, blocks, threads)
    assert (visits == 1).all()


def test_an_error_on_any_thread_is_raised() -> None:
    def work(first: int, last: int) -> None:
        if last == 40:
            raise ArithmeticError("the last range fails")

    with pytest.raises(ArithmeticError, match="last range"):
        for_blocks(work, 40, 2)


def test_a_thread_that_is_late_leaves_its_work_to_the_others() -> None:
    """The only other thread of the pool is busy; nobody waits for it."""
    let_go, busy = threading.Event(), threading.Event()
    for_blocks(lambda first, last: None, 9, 2)  # makes the pool

    def block() -> None:
        busy.set()
        let_go.wait(20)

    blocked = _pools[2].submit(block)
    busy.wait(20)
    done: list[int] = []
    for_blocks(lambda first, last: done.extend(range(first, last)), 100, 2)
    assert sorted(done) == list(range(100))
    assert not blocked.done()
    let_go.set()
    blocked.result()


@given(
    masks=st.lists(st.lists(st.booleans(), max_size=50), max_size=8),
    block=st.sampled_from([8, 16]),
    masked=st.booleans(),
    keep_empty=st.booleans(),
)
def test_blocks_cover_every_chosen_element_once(
    masks: list[list[bool]], block: int, masked: bool, keep_empty: bool
) -> None:
    chosen = [np.array(m if masked else [True] * len(m), dtype=bool) for m in masks]
    given = [torch.from_numpy(c) if masked else None for c in chosen]
    blocks = cut([c.size for c in chosen], given, block, keep_empty=keep_empty)
    visits = [np.zeros(c.size, dtype=int) for c in chosen]
    seen = 0
    for tensor, start, bits in zip(blocks.tensor_of, blocks.start_of, blocks.bits_of, strict=True):
        part = visits[tensor][start : start + block]
        seen += part.size
        keep = np.ones(part.size, dtype=bool)
        if bits != ALL:
            stored = blocks.bits[bits : bits + block // 8]
            keep = np.unpackbits(stored, bitorder="little")[: part.size].astype(bool)
        assert keep.any() or keep_empty
        part += keep
    assert all((v == c).all() for v, c in zip(visits, chosen, strict=True))
    if keep_empty or not masked:
        assert seen == sum(map(len, masks))


def test_threads_and_forks_may_use_the_kernels_at_once() -> None:
    """Numba's own threading layers abort in one or the other of these cases."""
    code = """
        import os, torch
        from concurrent.futures import ThreadPoolExecutor
        from basinscope.kernels.noise import fill_normal

        def fill(chain):
            return fill_normal(
                torch.empty(400_000), seed=1, chain=chain, step=0, param_index=0, path="cpu"
            )

        torch.set_num_threads(2)
        expected = [fill(chain) for chain in range(4)]
        with ThreadPoolExecutor(4) as pool:
            assert all(map(torch.equal, pool.map(fill, range(4)), expected))
        child = os.fork()
        if child == 0:
            same = fill(3).numpy().tobytes() == expected[3].numpy().tobytes()
            os._exit(0 if same else 1)
        assert os.waitpid(child, 0)[1] == 0
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
