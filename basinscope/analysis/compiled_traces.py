"""Standardised traces, and their averages over the tokens of a sequence, compiled by numba.

Traces are float32 or float64, everything else float64. `covariance` is 0 or 1.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from basinscope.analysis.compiled_sums import STORAGE
from basinscope.jit import FLOAT64, OPTIONS, SUMMING, view


def standardised(dtype: str) -> Any:
    """Define traces (trace, samples) that are standardised in place."""
    storage = STORAGE[dtype]

    def standardise(x: Any, count: Any, samples: Any, covariance: Any, scratch: Any) -> None:
        """With room for one trace in `scratch`."""
        traces, shifted = view(x, 0, (count, samples), storage), view(scratch, 0, samples, FLOAT64)
        for trace in traces:
            mean, scale = _shifted_moments(trace, shifted, covariance)
            for n in range(np.uint64(samples)):
                trace[n] = scale * (shifted[n] - mean)

    return standardise


def means_of_traces(dtype: str) -> Any:
    """Define the means over tokens of traces (sequences, token_pos, samples)."""
    storage = STORAGE[dtype]

    def average(
        x: Any, sequences: Any, tokens: Any, samples: Any, covariance: Any, means: Any,
        scratch: Any,
    ) -> None:  # fmt: skip
        """Into `means` (sequences, samples), with room for one trace in `scratch`."""
        traces = view(x, 0, (sequences, tokens, samples), storage)
        of_all = view(means, 0, (sequences, samples), FLOAT64)
        shifted = view(scratch, 0, samples, FLOAT64)
        for s in range(sequences):
            of_all[s, :] = 0
            for t in range(tokens):
                mean, scale = _shifted_moments(traces[s, t], shifted, covariance)
                _add_scaled(shifted, mean, scale / tokens, of_all[s])

    return average


def means_of_losses(dtype: str) -> Any:
    """Define the same of losses (sequences, samples, token_pos)."""
    storage = STORAGE[dtype]

    def average(
        x: Any, sequences: Any, samples: Any, tokens: Any, covariance: Any, means: Any,
        scratch: Any,
    ) -> None:  # fmt: skip
        """Into `means` (sequences, samples), with room for three numbers a token in `scratch`."""
        losses = view(x, 0, (sequences, samples, tokens), storage)
        of_all = view(means, 0, (sequences, samples), FLOAT64)
        totals, squares = view(scratch, 0, tokens, FLOAT64), view(scratch, tokens, tokens, FLOAT64)
        scales = view(scratch, 2 * tokens, tokens, FLOAT64)
        for s in range(sequences):
            lines = losses[s]
            totals[:] = 0
            squares[:] = 0
            for n in range(samples):
                _add_moments(lines[n], lines[0], totals, squares)
            offset = 0.0
            for t in range(tokens):
                mean = totals[t] / samples
                scales[t] = _scale(squares[t] - totals[t] * mean, samples, covariance) / tokens
                offset += scales[t] * (lines[0, t] + mean)
            for n in range(samples):
                of_all[s, n] = _dot(lines[n], scales) - offset

    return average


@numba.njit(forceinline=True, **OPTIONS)
def _scale(squares: Any, samples: Any, covariance: Any) -> Any:
    if covariance:
        return 1 / np.sqrt(samples - 1)
    return 1 / np.sqrt(squares) if squares > 0 else np.nan


@numba.njit(**OPTIONS)
def _shifted_moments(trace: Any, shifted: Any, covariance: Any) -> Any:
    """Shift a trace by its first sample; give the mean of that, and what scales it."""
    _shift(trace, shifted)
    total, squares = _moments(shifted)
    mean = total / len(trace)
    return mean, _scale(squares - total * mean, len(trace), covariance)


@numba.njit(**OPTIONS)
def _shift(trace: Any, shifted: Any) -> None:
    first = np.float64(trace[0])
    for n in range(len(trace)):
        shifted[n] = np.float64(trace[n]) - first


@numba.njit(**SUMMING)
def _moments(shifted: Any) -> Any:
    total, squares = 0.0, 0.0
    for n in range(len(shifted)):
        total += shifted[n]
        squares += shifted[n] * shifted[n]
    return total, squares


@numba.njit(**OPTIONS)
def _add_scaled(shifted: Any, mean: Any, scale: Any, to: Any) -> None:
    for n in range(np.uint64(to.size)):
        to[n] += scale * (shifted[n] - mean)


@numba.njit(**OPTIONS)
def _add_moments(line: Any, first: Any, totals: Any, squares: Any) -> None:
    for t in range(len(line)):
        shifted = np.float64(line[t]) - np.float64(first[t])
        totals[t] += shifted
        squares[t] += shifted * shifted


@numba.njit(**SUMMING)
def _dot(line: Any, scales: Any) -> Any:
    total = 0.0
    for t in range(len(line)):
        total += scales[t] * line[t]
    return total
