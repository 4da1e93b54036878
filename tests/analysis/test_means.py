"""Means of losses to the last digits of float64, however they lie and are split into tasks."""

from __future__ import annotations

import math

import dask
import numpy as np
import pytest

from basinscope.analysis import means
from basinscope.analysis.means import lazy_totals, mean_losses, weighted_mean

SHAPES = [(1, 40, 6, 16), (1, 25, 6, 16)]  # chains of different lengths
EXACT = {"rtol": 1e-14, "atol": 0}


@pytest.fixture(params=["rows first", "rows last"])
def parts(request: pytest.FixtureRequest) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    drawn = [rng.gamma(2.0, 1.5, shape).astype(np.float32) for shape in SHAPES]
    if request.param == "rows first":
        return drawn
    return [
        np.ascontiguousarray(part.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2) for part in drawn
    ]


@pytest.mark.parametrize("of_tokens", [False, True])
@pytest.mark.parametrize("file_bytes", [2**25, 1])
def test_means_are_those_of_exact_sums(
    parts: list[np.ndarray], file_bytes: int, of_tokens: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(means, "FILE_BYTES", file_bytes)
    totals = lazy_totals(parts, of_tokens)
    assert isinstance(totals, list) == (file_bytes == 1)
    (computed,) = dask.compute(totals)
    traces, over_tokens = mean_losses(computed, SHAPES)
    for trace, part in zip(traces, parts, strict=True):
        exact = [math.fsum(row.ravel().tolist()) / row.size for row in part[0]]
        np.testing.assert_allclose(trace, exact, **EXACT)
    joined = np.concatenate([part[0] for part in parts])
    exact = [math.fsum(column.tolist()) for column in joined.reshape(-1, 16).T]
    expected = np.array(exact) / (65 * 6) if of_tokens else np.zeros(16)
    np.testing.assert_allclose(over_tokens, expected, **EXACT)


def test_weighted_means_are_those_of_exact_sums(parts: list[np.ndarray]) -> None:
    rng = np.random.default_rng(1)
    weights = [rng.random(shape[1]) for shape in SHAPES]
    got = weighted_mean(parts, weights)
    joined, weight = np.concatenate([part[0] for part in parts]), np.concatenate(weights)
    for sequence, token in np.ndindex(got.shape):
        products = (weight * joined[:, sequence, token].astype(np.float64)).tolist()
        np.testing.assert_allclose(got[sequence, token], math.fsum(products) / 65, **EXACT)
