"""Standardised traces, and their averages over the tokens of a sequence, compiled: in float64.

A trace is shifted by its first sample before its moments are taken: where losses move by little,
sums of their squares would lose the digits that matter, and a constant trace is zero exactly.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from basinscope.jit import OPTIONS, SUMMING, jit

# numba's cache sees changes of this file only; a test compares the digest
INLINED = {"../jit.py": "80004de0e52810cb"}


def standardise(traces: np.ndarray, covariance: bool) -> None:
    """Centre (trace, samples) and scale them, in place; as :func:`of_traces` does."""
    _standardise(traces, covariance)


def of_traces(traces: np.ndarray, covariance: bool) -> np.ndarray:
    """Standardise traces and average them over the tokens of each sequence.

    Parameters
    ----------
    traces : np.ndarray (sequences, token_pos, samples)
        float32 or float64, contiguous, of at least one sample.
    covariance : bool
        Centre traces only, and scale them by 1/sqrt(n - 1); else to unit length. A trace without
        variance has no correlation: it becomes NaN.

    Returns
    -------
    np.ndarray (sequences, samples), float64
    """
    return _of_traces(traces, covariance)


def of_losses(losses: np.ndarray, covariance: bool) -> np.ndarray:
    """Do the same with traces as losses lie in memory: (sequences, samples, token_pos)."""
    return _of_losses(losses, covariance)


@jit
def _standardise(traces: Any, covariance: Any) -> None:
    samples = traces.shape[1]
    shifted = np.empty(samples)
    for trace in traces:
        mean, scale = _shifted_moments(trace, shifted, covariance)
        for n in range(samples):
            trace[n] = scale * (shifted[n] - mean)


@jit
def _of_traces(traces: Any, covariance: Any) -> Any:
    sequences, tokens, samples = traces.shape
    means = np.zeros((sequences, samples))
    shifted = np.empty(samples)
    for s in range(sequences):
        for t in range(tokens):
            mean, scale = _shifted_moments(traces[s, t], shifted, covariance)
            share, of_sequence = scale / tokens, means[s]
            for n in range(samples):
                of_sequence[n] += share * (shifted[n] - mean)
    return means


@jit
def _of_losses(losses: Any, covariance: Any) -> Any:
    sequences, samples, tokens = losses.shape
    means = np.empty((sequences, samples))
    totals, squares, scales = np.empty(tokens), np.empty(tokens), np.empty(tokens)
    for s in range(sequences):
        lines = losses[s]
        totals[:], squares[:] = 0, 0
        for n in range(samples):
            _add_moments(lines[n], lines[0], totals, squares)
        offset = 0.0
        for t in range(tokens):
            mean = totals[t] / samples
            scales[t] = _scale(squares[t] - totals[t] * mean, samples, covariance) / tokens
            offset += scales[t] * (lines[0, t] + mean)
        for n in range(samples):
            means[s, n] = _dot(lines[n], scales) - offset
    return means


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
