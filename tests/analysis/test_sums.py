"""Compiled sums against exact ones, for every layout, size and type they may meet."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from basinscope.analysis import sums

EXACT = {"rtol": 2e-15, "atol": 0}


def rows_first(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values)


def rows_last(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values.transpose(1, 2, 0)).transpose(2, 0, 1)


def of_a_larger(layout: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    """Lay out as a part that is narrowed along every axis."""

    def narrowed(values: np.ndarray) -> np.ndarray:
        return layout(np.pad(values, 1, constant_values=np.nan))[1:-1, 1:-1, 1:-1]

    return narrowed


LAYOUTS = {
    "rows first": rows_first,
    "rows last": rows_last,
    "part, rows first": of_a_larger(rows_first),
    "part, rows last": of_a_larger(rows_last),
}
SHAPES = [
    (1, 1, 1), (1, 5, 3), (3, 1, 9), (7, 6, 1), (40, 6, 16), (5, 150, 70), (19, 4, 1100),
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_sums_are_exact_to_the_last_digits(shape: tuple[int, ...], layout: str) -> None:
    rng = np.random.default_rng(0)
    losses = rng.gamma(2.0, 1.5, shape).astype(np.float32)
    weights = rng.standard_normal(shape[0])
    values = LAYOUTS[layout](losses)
    of_rows, of_tokens = sums.totals(values)
    exact = [math.fsum(row.ravel().tolist()) for row in losses]
    np.testing.assert_allclose(of_rows, exact, **EXACT)
    exact = [math.fsum(token.ravel().tolist()) for token in losses.transpose(2, 0, 1)]
    np.testing.assert_allclose(of_tokens, exact, **EXACT)
    weighted = sums.weighted_totals(values, weights)
    for place in np.ndindex(weighted.shape):
        products = weights * losses[:, *place].astype(np.float64)
        size = math.fsum(abs(products).tolist())
        exact = math.fsum(products.tolist())
        np.testing.assert_allclose(weighted[place], exact, rtol=0, atol=EXACT["rtol"] * size)


@pytest.mark.parametrize("layout", ["rows first", "rows last"])
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4", "i4"])
def test_losses_of_any_type_are_added_up(dtype: str, layout: str) -> None:
    losses = np.random.default_rng(0).integers(-9, 9, (6, 4, 10))  # which float16 holds exactly
    values = LAYOUTS[layout](losses.astype(dtype))
    of_rows, of_tokens = sums.totals(values)
    np.testing.assert_array_equal(of_rows, losses.sum((1, 2)))
    np.testing.assert_array_equal(of_tokens, losses.sum((0, 1)))
    weights = np.arange(6.0)
    expected = np.einsum("r,rbt->bt", weights, losses)
    np.testing.assert_array_equal(sums.weighted_totals(values, weights), expected)
    assert values.flags.writeable, "the caller's array is as it was"


@pytest.mark.parametrize("layout", ["rows first", "rows last"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_reaches_its_own_sums_alone(value: float, layout: str) -> None:
    losses = np.ones((6, 4, 10), np.float32)
    losses[2, 1, 7] = value
    values = LAYOUTS[layout](losses)
    of_rows, of_tokens = sums.totals(values)
    assert np.flatnonzero(~np.isfinite(of_rows)).tolist() == [2]
    assert np.flatnonzero(~np.isfinite(of_tokens)).tolist() == [7]
    weighted = sums.weighted_totals(values, np.ones(6))
    assert np.argwhere(~np.isfinite(weighted)).tolist() == [[1, 7]]
    np.testing.assert_equal(weighted[1, 7], value)
