"""Sums over the losses of one chunk, in float64: one compiled pass, without the interpreter.

A chunk is (rows, batch, token_pos). Stores lay the rows of one token side by side, arrays in memory
the tokens of one row; each sum goes along what lies side by side.
"""

from __future__ import annotations

import numpy as np

from basinscope.native import Function, address, function

NAMES = {"f": "float32", "d": "float64"}  # a dtype's own name takes numpy two microseconds


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
        x = _lines(values.transpose(1, 2, 0), tokens * rows)
        sums = np.empty(tokens + rows + tokens * rows + batch)
        _compiled("margins_of_sum", x)(address(x), batch, tokens, rows, address(sums))
        return sums[tokens : tokens + rows].copy(), sums[:tokens].copy()
    x = _lines(values, tokens)
    sums = np.empty(rows * batch + tokens)
    _compiled("both_margins", x)(address(x), *x.shape, address(sums))
    return sums[: rows * batch].reshape(rows, batch).sum(axis=1), sums[rows * batch :].copy()


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
        add_up, x = "weighted_columns", _lines(values.transpose(1, 2, 0), rows)
    else:
        add_up, x = "weighted_lines", _lines(values, values[0].size)
    weights, sums = np.ascontiguousarray(weights, np.float64), np.empty(of_row)
    _compiled(add_up, x)(address(x), *x.shape, address(weights), address(sums))
    return sums


def _rows_side_by_side(values: np.ndarray) -> bool:
    return values.strides[0] < values.strides[2]


def _lines(values: np.ndarray, length: int) -> np.ndarray:
    """Give values as (line, length), contiguous, of a type that the sums are compiled for."""
    dtype = np.result_type(values, np.float32)
    return np.ascontiguousarray(values, dtype).reshape(-1, length)


def _compiled(name: str, lines: np.ndarray) -> Function:
    return function("basinscope.analysis.compiled_sums", name, NAMES[lines.dtype.char])
