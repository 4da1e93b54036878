"""Sums over the losses of one chunk, compiled by numba: in float64, in one pass.

Losses are (line, column), contiguous, of float32 or float64; weights and sums are float64.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from basinscope.jit import FLOAT32, FLOAT64, SUMMING, view

STORAGE = {"float32": FLOAT32, "float64": FLOAT64}
TILE = 4096  # sums that are added to together: 32 KiB, in the first-level cache


def both_margins(dtype: str) -> Any:
    """Define the sums over the columns, and over the lines."""
    storage = STORAGE[dtype]

    def margins(x: Any, lines: Any, columns: Any, sums: Any) -> None:
        """Into `sums`, those of the lines first."""
        _both_margins(
            view(x, 0, (lines, columns), storage),
            view(sums, 0, lines, FLOAT64),
            view(sums, lines, columns, FLOAT64),
        )

    return margins


def margins_of_sum(dtype: str) -> Any:
    """Define the sum of the lines, each a (row, column) of its own, and both margins of that."""
    storage = STORAGE[dtype]

    def margins(x: Any, lines: Any, rows: Any, columns: Any, sums: Any) -> None:
        """Into `sums`, those of the rows first; there is room for the sum and the lines behind."""
        total = view(sums, rows + columns, rows * columns, FLOAT64)
        ones = view(sums, rows + columns + rows * columns, lines, FLOAT64)
        ones[:] = 1
        _weighted_lines(view(x, 0, (lines, rows * columns), storage), ones, total)
        _both_margins(
            view(sums, rows + columns, (rows, columns), FLOAT64),
            view(sums, 0, rows, FLOAT64),
            view(sums, rows, columns, FLOAT64),
        )

    return margins


def weighted_columns(dtype: str) -> Any:
    """Define the sums of weight times loss over the columns."""
    storage = STORAGE[dtype]

    def sums(x: Any, lines: Any, columns: Any, weights: Any, of_lines: Any) -> None:
        _weighted_columns(
            view(x, 0, (lines, columns), storage),
            view(weights, 0, columns, FLOAT64),
            view(of_lines, 0, lines, FLOAT64),
        )

    return sums


def weighted_lines(dtype: str) -> Any:
    """Define the sums of weight times loss over the lines."""
    storage = STORAGE[dtype]

    def sums(x: Any, lines: Any, columns: Any, weights: Any, of_columns: Any) -> None:
        _weighted_lines(
            view(x, 0, (lines, columns), storage),
            view(weights, 0, lines, FLOAT64),
            view(of_columns, 0, columns, FLOAT64),
        )

    return sums


@numba.njit(**SUMMING)
def _both_margins(x: Any, of_lines: Any, of_columns: Any) -> None:
    lines, columns = x.shape
    of_columns[:] = 0
    for i in range(lines):
        line, total = x[i], 0.0
        for j in range(np.uint64(columns)):
            value = np.float64(line[j])
            total += value
            of_columns[j] += value
        of_lines[i] = total


@numba.njit(**SUMMING)
def _weighted_columns(x: Any, weights: Any, sums: Any) -> None:
    """Four lines at a time: weights are loaded less."""
    lines, columns = x.shape
    fours = lines - lines % 4
    for i in range(0, fours, 4):
        a, b, c, d = x[i], x[i + 1], x[i + 2], x[i + 3]
        of_a, of_b, of_c, of_d = 0.0, 0.0, 0.0, 0.0
        for j in range(np.uint64(columns)):
            weight = weights[j]
            of_a += weight * a[j]
            of_b += weight * b[j]
            of_c += weight * c[j]
            of_d += weight * d[j]
        sums[i], sums[i + 1], sums[i + 2], sums[i + 3] = of_a, of_b, of_c, of_d
    for i in range(fours, lines):
        line, total = x[i], 0.0
        for j in range(np.uint64(columns)):
            total += weights[j] * line[j]
        sums[i] = total


@numba.njit(**SUMMING)
def _weighted_lines(x: Any, weights: Any, sums: Any) -> None:
    """Eight lines at a time: sums are loaded less."""
    lines, columns = x.shape
    sums[:] = 0
    for first in range(0, columns, TILE):
        at = slice(first, min(first + TILE, columns))
        tile = sums[at]
        i = 0
        while i + 8 <= lines:
            a, b, c, d = x[i, at], x[i + 1, at], x[i + 2, at], x[i + 3, at]
            e, f, g, h = x[i + 4, at], x[i + 5, at], x[i + 6, at], x[i + 7, at]
            p, q, r, s = weights[i], weights[i + 1], weights[i + 2], weights[i + 3]
            t, u, v, w = weights[i + 4], weights[i + 5], weights[i + 6], weights[i + 7]
            for j in range(np.uint64(tile.size)):
                begun = (p * a[j] + q * b[j]) + (r * c[j] + s * d[j])
                tile[j] += begun + ((t * e[j] + u * f[j]) + (v * g[j] + w * h[j]))
            i += 8
        while i < lines:
            a = x[i, at]
            for j in range(np.uint64(tile.size)):
                tile[j] += weights[i] * a[j]
            i += 1
