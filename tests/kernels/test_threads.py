"""Ranges of blocks on threads of our own, and the tables that blocks come from."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from basinscope.kernels.pointers import cut
from basinscope.kernels.threads import for_blocks


@given(blocks=st.integers(0, 40), threads=st.integers(1, 5))
def test_every_block_is_worked_on_once(blocks: int, threads: int) -> None:
    visits = np.zeros(blocks, dtype=int)

    def work(first: int, last: int) -> None:
        visits[first:last] += 1

    for_blocks(work, blocks, threads)
    assert (visits == 1).all()


def test_an_error_on_another_thread_is_raised() -> None:
    def work(first: int, last: int) -> None:
        if last == 4:
            raise ArithmeticError("the last range fails")

    with pytest.raises(ArithmeticError, match="last range"):
        for_blocks(work, 4, 2)


@given(sizes=st.lists(st.integers(0, 50), max_size=8), block=st.integers(1, 16))
def test_blocks_cover_every_element_once(sizes: list[int], block: int) -> None:
    tensor_of, start_of = cut(sizes, block)
    visits = [np.zeros(size, dtype=int) for size in sizes]
    for tensor, start in zip(tensor_of, start_of, strict=True):
        part = visits[tensor][start : start + block]
        assert part.size > 0
        part += 1
    assert all((v == 1).all() for v in visits)


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
