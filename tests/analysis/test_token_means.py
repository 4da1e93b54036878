"""Averages of standardised traces against plain float64, in both layouts."""

from __future__ import annotations

import numpy as np
import pytest

from basinscope.analysis import token_means


def plainly(traces: np.ndarray, covariance: bool) -> np.ndarray:
    """Do it in the widest floats there are, step by step."""
    wide = traces.astype(np.longdouble)
    wide = wide - wide[..., :1]
    wide -= wide.mean(axis=-1, keepdims=True)
    if covariance:
        wide /= np.sqrt(np.longdouble(traces.shape[-1] - 1))
    else:
        wide /= np.linalg.norm(wide.astype(np.float64), axis=-1, keepdims=True)
    return wide.mean(axis=1).astype(np.float64)


def in_both_layouts(traces: np.ndarray, covariance: bool) -> list[np.ndarray]:
    as_losses = np.ascontiguousarray(traces.swapaxes(1, 2))
    return [
        token_means.of_traces(traces, covariance),
        token_means.of_losses(as_losses, covariance),
    ]


@pytest.mark.parametrize("covariance", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(1, 1, 2), (3, 5, 7), (2, 130, 33)])
@pytest.mark.parametrize("spread", [1.0, 1e-5])
def test_means_are_those_of_plain_float64(
    spread: float, shape: tuple[int, ...], dtype: type, covariance: bool
) -> None:
    rng = np.random.default_rng(0)
    traces = (3 + spread * rng.standard_normal(shape)).astype(dtype)
    expected = plainly(traces, covariance)
    for got in in_both_layouts(traces, covariance):
        # of losses of about 3, scaled, that are added up before their mean is taken off
        scaled = 3 / np.sqrt(shape[-1]) / (1 if covariance else spread)
        np.testing.assert_allclose(got, expected, rtol=0, atol=8 * np.finfo(float).eps * scaled)


@pytest.mark.parametrize("value", [0.1, np.nan, np.inf])
def test_a_trace_without_a_correlation_makes_its_own_sequence_nan_alone(value: float) -> None:
    traces = np.random.default_rng(0).random((3, 4, 6), np.float32)
    traces[1, 2] = value
    for got in in_both_layouts(traces, covariance=False):
        assert np.isnan(got[1]).all()
        assert np.isfinite(got[[0, 2]]).all()


def test_a_constant_trace_moves_with_nothing() -> None:
    traces = np.full((2, 3, 5), 0.1, np.float32)
    for got in in_both_layouts(traces, covariance=True):
        np.testing.assert_allclose(got, 0, atol=1e-17)
