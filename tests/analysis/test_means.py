"""Means of losses to the last digits, however they lie and are split into tasks."""

from __future__ import annotations

import math

import numpy as np
import pytest

from basinscope.analysis import stores
from basinscope.analysis.means import loss_totals, mean_losses, weighted_means, with_totals

SHAPES = [(1, 40, 6, 16), (1, 25, 6, 16)]  # chains of different lengths
EXACT = {"rtol": 1e-14, "atol": 0}


@pytest.fixture(params=["rows first", "rows last"])
def parts(request: pytest.FixtureRequest) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [laid_out(rng.gamma(2.0, 1.5, shape), request.param) for shape in SHAPES]


def laid_out(part: np.ndarray, layout: str) -> np.ndarray:
    part = part.astype(np.float32)
    if layout == "rows first":
        return part
    return np.ascontiguousarray(part.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)


@pytest.mark.parametrize("file_bytes", [2**25, 1])
def test_means_are_those_of_exact_sums(
    parts: list[np.ndarray], file_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "FILE_BYTES", file_bytes)
    computed = with_totals(mean_losses, parts)
    assert (len(dict(computed.__dask_graph__())) == 1) == (file_bytes > 1)
    traces, over_tokens = computed.compute()
    for trace, part in zip(traces, parts, strict=True):
        exact = [math.fsum(row.ravel().tolist()) / row.size for row in part[0]]
        np.testing.assert_allclose(trace, exact, **EXACT)
    joined = np.concatenate([part[0] for part in parts])
    exact = [math.fsum(column.tolist()) for column in joined.reshape(-1, 16).T]
    np.testing.assert_allclose(over_tokens, np.array(exact) / (65 * 6), **EXACT)


@pytest.mark.parametrize("slab_bytes", [2**23, 1000])
def test_a_slab_at_a_time_or_all_at_once_is_the_same(
    parts: list[np.ndarray], slab_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "SLAB_BYTES", slab_bytes)
    for part in parts:
        assert (len([*stores.chunks_of(part)]) > 1) == (slab_bytes == 1000)
        weights = np.random.default_rng(1).standard_normal(part.shape[1])
        wide = part[0].astype(np.float64)
        of_rows, of_tokens = loss_totals(part)
        np.testing.assert_allclose(of_rows, wide.sum(axis=(1, 2)), **EXACT)
        np.testing.assert_allclose(of_tokens, wide.sum(axis=(0, 1)), **EXACT)
        expected = np.einsum("r,rbt->bt", weights, wide) / len(weights)
        got = weighted_means([part], [weights])
        np.testing.assert_allclose(got, expected[None], rtol=0, atol=1e-14)


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_losses_of_nothing_add_up_to_nothing(axis: int) -> None:
    shape = [1, 4, 3, 2]
    shape[axis] = 0
    of_rows, of_tokens = loss_totals(np.empty(shape, np.float32))
    np.testing.assert_array_equal(of_rows, np.zeros(shape[1]))
    np.testing.assert_array_equal(of_tokens, np.zeros(shape[3]))


def test_weighted_means_are_those_of_exact_sums(parts: list[np.ndarray]) -> None:
    rng = np.random.default_rng(1)
    weights = [rng.random(shape[1]) for shape in SHAPES]
    got = weighted_means(parts, weights).sum(axis=0)
    joined, weight = np.concatenate([part[0] for part in parts]), np.concatenate(weights)
    for sequence, token in np.ndindex(got.shape):
        products = (weight * joined[:, sequence, token].astype(np.float64)).tolist()
        np.testing.assert_allclose(got[sequence, token], math.fsum(products) / 65, **EXACT)
