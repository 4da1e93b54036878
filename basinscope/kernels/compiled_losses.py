"""Per-token cross-entropy on a CPU, compiled by numba: one row of logits after the other.

A row is read from memory once: its maximum and its sum of exponentials are taken while it sits in
the cache.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from basinscope.jit import FLOAT32, INT64, OPTIONS, SUMMING, at, view
from basinscope.kernels.compiled import STORAGE, bits_of, float_of, narrow, read

_CHUNK = 4096  # summed in float32; the chunks' sums are added in float64
_LOG2_E = 1.4426950408889634
_LN2_HIGH = 0.693145751953125  # few enough bits that its products with integers are exact
_LN2_LOW = 1.4286068203094172e-06
_ROUND = 12582912.0  # 1.5 * 2^23: adding it rounds to an integer, found in the low bits
_SMALLEST = -87.0  # e to this is the smallest normal float32; below, zero
# exp(r) = 1 + r + r^2 EXP(r) for |r| <= ln(2) / 2, own Chebyshev fit, lowest power first
EXP = (
    0.4999999701976776,
    0.1666666716337204,
    0.04166664555668831,
    0.008333163335919380,
    0.001394050824455917,
    0.00019910001719836146,
)


def token_losses(dtype: str) -> Any:
    """Define the losses of logits of a dtype."""
    storage, half = STORAGE[dtype]

    def losses(
        first: Any, last: Any, logits: Any, outer_stride: Any, inner_stride: Any, inner: Any,
        vocabulary: Any, targets: Any, loss: Any, level: Any, rows: Any, scratch: Any,
    ) -> None:  # fmt: skip
        """Losses and levels of rows ``first`` to ``last - 1`` of logits (A, inner, V).

        A level, of (2, rows), is a row's maximum and the logarithm of the sum of exponentials
        above it. `scratch` has room for a row in float32.
        """
        tops, totals = view(level, 0, rows, FLOAT32), view(level, rows, rows, FLOAT32)
        widened = view(scratch, 0, vocabulary, FLOAT32)
        for row in range(first, last):
            start = row // inner * outer_stride + row % inner * inner_stride
            x = read(logits, start, vocabulary, storage, half, widened)
            top = _maximum(x)
            total = 0.0
            for c in range(0, vocabulary, _CHUNK):
                total += _sum_of_exponentials(x[c : c + _CHUNK], top)
            log_total = np.float32(np.log(total))
            result = view(loss, row, 1, FLOAT32)
            result[0] = log_total - (x[at(targets, row, INT64)] - top)
            tops[row] = top
            totals[row] = log_total

    return losses


def token_gradients(dtype: str) -> Any:
    """Define the gradient with respect to logits of a dtype."""
    storage, half = STORAGE[dtype]

    def gradients(
        first: Any, last: Any, logits: Any, outer_stride: Any, inner_stride: Any, inner: Any,
        vocabulary: Any, targets: Any, level: Any, rows: Any, upstream: Any,
        gradient: Any, outer_stride_out: Any, inner_stride_out: Any, scratch: Any,
    ) -> None:  # fmt: skip
        """(softmax - one hot) * upstream for rows ``first`` to ``last - 1``; may replace logits."""
        widened = view(scratch, 0, vocabulary, FLOAT32)
        for row in range(first, last):
            a, b = row // inner, row % inner
            start = a * outer_stride + b * inner_stride
            start_out = a * outer_stride_out + b * inner_stride_out
            x = read(logits, start, vocabulary, storage, half, widened)
            out = view(gradient, start_out, vocabulary, storage)
            top, log_total = at(level, row, FLOAT32), at(level, rows + row, FLOAT32)
            factor = at(upstream, row, FLOAT32)
            target = at(targets, row, INT64)
            if half is None:
                if logits != gradient or start != start_out:
                    for i in range(np.uint64(vocabulary)):
                        out[i] = x[i]
                _to_scaled_exponentials(out, top, log_total, factor)
                out[target] -= factor
            else:
                _to_scaled_exponentials(x, top, log_total, factor)
                x[target] -= factor
                narrow(x, out, half)

    return gradients


@numba.njit(**OPTIONS)
def _maximum(x: Any) -> Any:
    """The largest element, found among integers of the same order (floats would not vectorise)."""
    top = np.int32(-0x80000000)
    for i in range(np.uint64(x.size)):
        top = max(top, _ordered(bits_of(x[i])))
    return float_of(_ordered(top))


@numba.njit(forceinline=True, **OPTIONS)
def _ordered(bits: Any) -> Any:
    """Bits of a float32 as an integer of the same order; its own inverse."""
    return np.int32(bits ^ np.int32((bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@numba.njit(**SUMMING)
def _sum_of_exponentials(x: Any, top: Any) -> Any:
    total = np.float32(0)
    for i in range(np.uint64(x.size)):
        total += _exp(x[i] - top)
    return total


@numba.njit(**OPTIONS)
def _to_scaled_exponentials(x: Any, top: Any, log_total: Any, factor: Any) -> None:
    """In place: a second array would have to be proven disjoint before the loop vectorises."""
    for i in range(np.uint64(x.size)):
        x[i] = _exp((x[i] - top) - log_total) * factor


@numba.njit(forceinline=True, **OPTIONS)
def _exp(value: Any) -> Any:
    """float32 exponential for arguments up to about 88; NaN stays NaN."""
    shifted = value * np.float32(_LOG2_E) + np.float32(_ROUND)
    k = shifted - np.float32(_ROUND)
    r = value - k * np.float32(_LN2_HIGH) - k * np.float32(_LN2_LOW)
    p = np.float32(EXP[5])
    p = p * r + np.float32(EXP[4])
    p = p * r + np.float32(EXP[3])
    p = p * r + np.float32(EXP[2])
    p = p * r + np.float32(EXP[1])
    p = p * r + np.float32(EXP[0])
    p = p * (r * r) + r + np.float32(1)
    power = np.int32(bits_of(shifted) << np.int32(23))
    scaled = float_of(np.int32(bits_of(p) + power))
    scaled = np.float32(0) if value < np.float32(_SMALLEST) else scaled
    return scaled if value == value else value
