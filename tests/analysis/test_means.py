"""Means of losses to the last digits, however they lie and are split into tasks."""

from __future__ import annotations

import math

import dask
import numpy as np
import pytest

from basinscope.analysis import means
from basinscope.analysis.means import lazy_totals, mean_losses, weighted_mean

SHAPES = [(1, 40, 6, 16), (1, 25, 6, 16)]  # chains of different lengths
EXACT = {"rtol": 1e-14, "atol": 0}


LAYOUTS = ["rows first", "rows last"]


@pytest.fixture(params=LAYOUTS)
def parts(request: pytest.FixtureRequest) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [laid_out(rng.gamma(2.0, 1.5, shape), request.param) for shape in SHAPES]


def laid_out(part: np.ndarray, layout: str) -> np.ndarray:
    part = part.astype(np.float32)
    if layout == "rows first":
        return part
    return np.ascontiguousarray(part.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)


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


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [1, 14, 200])
def test_many_losses_of_a_row_lose_less_than_storing_one_of_their_mean(
    rows: int, layout: str
) -> None:
    part = laid_out(np.random.default_rng(2).gamma(2.0, 1.5, (1, rows, 9, 511)), layout)
    assert part[0, 0].size >= means.MANY
    sums, _ = means.loss_totals(part, of_tokens=False)
    exact = [math.fsum(row.ravel().tolist()) for row in part[0]]
    np.testing.assert_allclose(sums, exact, rtol=2**-24, atol=0)
    assert not np.array_equal(
        sums, part[0].astype(np.float64).sum(axis=(1, 2))
    )  # float32 took part


def test_weighted_means_are_those_of_exact_sums(parts: list[np.ndarray]) -> None:
    rng = np.random.default_rng(1)
    weights = [rng.random(shape[1]) for shape in SHAPES]
    got = weighted_mean(parts, weights)
    joined, weight = np.concatenate([part[0] for part in parts]), np.concatenate(weights)
    for sequence, token in np.ndindex(got.shape):
        products = (weight * joined[:, sequence, token].astype(np.float64)).tolist()
        np.testing.assert_allclose(got[sequence, token], math.fsum(products) / 65, **EXACT)
