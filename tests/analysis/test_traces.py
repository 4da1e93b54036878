"""Traces of chosen sequences, from a store and from a temporary copy of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from dask.delayed import delayed

from basinscope.analysis.stores import open_samples
from basinscope.analysis.traces import Traces, gather_traces
from basinscope.io import copy
from tests.analysis.stores_random import random_tree, write_devinterp_tree

ROWS = np.array([9, 3, 14, 6, 3, 0, 7])  # of 12 and 3 sequences
SEQUENCE = 60 * 4 * 4  # bytes


@pytest.mark.parametrize("in_a_chunk", [1, 2, 5])
@pytest.mark.parametrize("mean_over_chains", [False, True])
def test_sequences_in_any_order_are_found_in_a_copy(
    mean_over_chains: bool, in_a_chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copy, "CHUNK_BYTES", in_a_chunk * SEQUENCE)
    tree = random_tree(4, draws=60, observables={"a": 12, "b": 3})
    samples = open_samples(write_devinterp_tree(tree, tmp_path / "s.zarr"))
    traces = Traces(samples, ["a", "b"], mean_over_chains)
    losses = np.concatenate([tree["loss_a"], tree["loss_b"]], axis=2)[:, :, ROWS]
    expected = losses.mean(0, keepdims=True, dtype=np.float64) if mean_over_chains else losses
    expected = np.concatenate([*expected]).transpose(1, 2, 0)
    np.testing.assert_array_equal(gather_traces(*traces.block(ROWS)), expected)
    traces.copy()
    copied = delayed(gather_traces)(*traces.block(ROWS)).compute()
    np.testing.assert_array_equal(copied, expected)
