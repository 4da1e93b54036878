"""Sums over the losses of one chunk, compiled: in float64, one pass, without the interpreter.

A chunk is (rows, batch, token_pos). Stores lay the rows of one token side by side, arrays in memory
the tokens of one row; each function works along what lies side by side.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from basinscope.jit import jit_sum

# numba's cache sees changes of this file only; a test compares the digest
INLINED = {"../jit.py": "80004de0e52810cb"}

TILE = 4096  # sums that are added to together: 32 KiB, in the first-level cache


def totals(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Add up losses over (batch, token), and over (rows, batch).

    Parameters
    ----------
    values : np.ndarray (rows, batch, token_pos)

    Returns
    -------
    np.ndarray (rows,), np.ndarray (token_pos,)
        float64.
    """
    rows, batch, tokens = values.shape
    if _rows_side_by_side(values):
        of_tokens, of_rows = _margins_of_sum(_lines(values.transpose(1, 2, 0), tokens * rows), rows)
        return of_rows, of_tokens
    over_tokens, of_tokens = _both_margins(_lines(values, tokens))
    return over_tokens.reshape(rows, batch).sum(axis=1), of_tokens


def weighted_totals(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Add up weight times loss over the rows.

    Parameters
    ----------
    values : np.ndarray (rows, batch, token_pos)
    weights : np.ndarray (rows,)
        float64.

    Returns
    -------
    np.ndarray (batch, token_pos)
        float64.
    """
    rows, *of_row = values.shape
    if _rows_side_by_side(values):
        sums = _weighted_columns(_lines(values.transpose(1, 2, 0), rows), weights)
    else:
        sums = _weighted_lines(_lines(values, values[0].size), weights)
    return sums.reshape(of_row)


def _rows_side_by_side(values: np.ndarray) -> bool:
    return values.strides[0] < values.strides[2]


def _lines(values: np.ndarray, length: int) -> np.ndarray:
    """Give values as (line, length), contiguous, of a type that the kernels are compiled for."""
    dtype = np.result_type(values, np.float32)
    lines = np.ascontiguousarray(values, dtype).reshape(-1, length)
    lines.flags.writeable = False  # else compiled once more, for what may be written to
    return lines


@jit_sum
def _both_margins(x: Any) -> Any:
    """Add up (line, column) over the columns, and over the lines."""
    lines, columns = x.shape
    of_lines, of_columns = np.empty(lines), np.zeros(columns)
    for i in range(lines):
        line, total = x[i], 0.0
        for j in range(columns):
            value = np.float64(line[j])
            total += value
            of_columns[j] += value
        of_lines[i] = total
    return of_lines, of_columns


@jit_sum
def _margins_of_sum(x: Any, columns: Any) -> Any:
    """Add up lines, each of which is a (line, column) of its own, and these as above."""
    over_lines = _weighted_lines(x, np.ones(len(x)))
    return _both_margins(over_lines.reshape(-1, columns))


@jit_sum
def _weighted_columns(x: Any, weights: Any) -> Any:
    """Add up weight times (line, column) over the columns, four lines at a time."""
    lines, columns = x.shape
    sums = np.zeros(lines)
    fours = lines - lines % 4
    for i in range(0, fours, 4):
        a, b, c, d = x[i], x[i + 1], x[i + 2], x[i + 3]
        of_a, of_b, of_c, of_d = 0.0, 0.0, 0.0, 0.0
        for j in range(columns):
            weight = weights[j]
            of_a += weight * a[j]
            of_b += weight * b[j]
            of_c += weight * c[j]
            of_d += weight * d[j]
        sums[i], sums[i + 1], sums[i + 2], sums[i + 3] = of_a, of_b, of_c, of_d
    for i in range(fours, lines):
        for j in range(columns):
            sums[i] += weights[j] * x[i, j]
    return sums


@jit_sum
def _weighted_lines(x: Any, weights: Any) -> Any:
    """Add up weight times (line, column) over the lines, eight at a time: sums are loaded less."""
    lines, columns = x.shape
    sums = np.zeros(columns)
    for first in range(0, columns, TILE):
        at = slice(first, min(first + TILE, columns))
        tile = sums[at]
        i = 0
        while i + 8 <= lines:
            a, b, c, d = x[i, at], x[i + 1, at], x[i + 2, at], x[i + 3, at]
            e, f, g, h = x[i + 4, at], x[i + 5, at], x[i + 6, at], x[i + 7, at]
            p, q, r, s = weights[i], weights[i + 1], weights[i + 2], weights[i + 3]
            t, u, v, w = weights[i + 4], weights[i + 5], weights[i + 6], weights[i + 7]
            for j in range(len(tile)):
                begun = (p * a[j] + q * b[j]) + (r * c[j] + s * d[j])
                tile[j] += begun + ((t * e[j] + u * f[j]) + (v * g[j] + w * h[j]))
            i += 8
        while i < lines:
            a = x[i, at]
            for j in range(len(tile)):
                tile[j] += weights[i] * a[j]
            i += 1
    return sums
