"""Sums over the losses of one chunk, compiled: in float64, one pass, without the interpreter.

A chunk is (rows, batch, token_pos). Stores lay the rows of one token side by side, arrays in memory
the tokens of one row; each function works along what lies side by side.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from basinscope.jit import jit_sum

INLINED = {"../jit.py": "4e539c54d0d96b13"}  # see kernels/compiled.py

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
        by_sequence = _lines(values.transpose(1, 2, 0), tokens * rows)
        over_batch = _weighted_lines(by_sequence, np.ones(batch)).reshape(tokens, rows)
        return over_batch.sum(axis=0), over_batch.sum(axis=1)
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
def _weighted_columns(x: Any, weights: Any) -> Any:
    """Add up weight times (line, column) over the columns."""
    lines, columns = x.shape
    sums = np.empty(lines)
    for i in range(lines):
        line, total = x[i], 0.0
        for j in range(columns):
            total += weights[j] * line[j]
        sums[i] = total
    return sums


@jit_sum
def _weighted_lines(x: Any, weights: Any) -> Any:
    """Add up weight times (line, column) over the lines, four at a time: sums are loaded less."""
    lines, columns = x.shape
    sums = np.zeros(columns)
    for first in range(0, columns, TILE):
        count = min(TILE, columns - first)
        tile = sums[first : first + count]
        i = 0
        while i + 4 <= lines:
            a, b = x[i, first : first + count], x[i + 1, first : first + count]
            c, d = x[i + 2, first : first + count], x[i + 3, first : first + count]
            u, v, w, z = weights[i], weights[i + 1], weights[i + 2], weights[i + 3]
            for j in range(count):
                tile[j] += (u * a[j] + v * b[j]) + (w * c[j] + z * d[j])
            i += 4
        while i < lines:
            a = x[i, first : first + count]
            for j in range(count):
                tile[j] += weights[i] * a[j]
            i += 1
    return sums
