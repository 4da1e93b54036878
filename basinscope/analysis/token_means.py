"""Standardised traces, and their averages over the tokens of a sequence: compiled, in float64.

A trace is shifted by its first sample before its moments are taken: where losses move by little,
sums of their squares would lose the digits that matter, and a constant trace is zero exactly.
"""

from __future__ import annotations

import numpy as np

from basinscope.analysis.sums import NAMES
from basinscope.native import Function, address, function


def standardise(traces: np.ndarray, covariance: bool) -> None:
    """Centre (trace, samples), contiguous, and scale them, in place; as :func:`of_traces` does."""
    assert traces.flags.c_contiguous
    scratch = np.empty(traces.shape[1])
    standardised = _compiled("standardised", traces)
    standardised(address(traces), *traces.shape, covariance, address(scratch))


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
    sequences, _, samples = traces.shape
    return _means("means_of_traces", traces, covariance, (sequences, samples), scratch=samples)


def of_losses(losses: np.ndarray, covariance: bool) -> np.ndarray:
    """Do the same with traces as losses lie in memory: (sequences, samples, token_pos)."""
    sequences, samples, tokens = losses.shape
    return _means("means_of_losses", losses, covariance, (sequences, samples), scratch=3 * tokens)


def _means(
    name: str, x: np.ndarray, covariance: bool, shape: tuple[int, int], scratch: int
) -> np.ndarray:
    assert x.flags.c_contiguous
    means, room = np.empty(shape), np.empty(scratch)
    _compiled(name, x)(address(x), *x.shape, covariance, address(means), address(room))
    return means


def _compiled(name: str, x: np.ndarray) -> Function:
    return function("basinscope.analysis.compiled_traces", name, NAMES[x.dtype.char])
