"""The usual inverse temperature."""

from __future__ import annotations

import math

import pytest

import basinscope


def test_it_is_n_over_its_logarithm() -> None:
    assert basinscope.default_nbeta(2) == 2 / math.log(2)
    assert basinscope.default_nbeta(16, gradient_accumulation_steps=2) == 32 / math.log(32)


@pytest.mark.peer
@pytest.mark.parametrize(("batch_size", "batches"), [(2, 1), (32, 1), (8, 4)])
def test_it_is_the_peers(batch_size: int, batches: int) -> None:
    from devinterp.utils import default_nbeta

    expected = default_nbeta(batch_size, batches)
    assert basinscope.default_nbeta(batch_size, batches) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("batch_size", [1, 0, -3])
def test_fewer_than_two_sequences_have_none(batch_size: int) -> None:
    with pytest.raises(ValueError, match=f"batch_size={batch_size} .* two sequences or more"):
        basinscope.default_nbeta(batch_size)
