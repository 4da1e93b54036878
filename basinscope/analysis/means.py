"""Means of losses that are read once, a chunk at a time, and added up in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
from dask.delayed import Delayed, delayed

from basinscope.analysis.stores import Part, chunks_of, files_of
from basinscope.io.stored import StoredArray

Totals = list[tuple[int, tuple[np.ndarray, np.ndarray]]]  # of a chain: first row, loss_totals


def lazy_totals(parts: list[Part], of_tokens: bool = True) -> list[list[tuple[int, Delayed]]]:
    """Have every chain's losses added up, a task for each file; reads nothing.

    Parameters
    ----------
    parts : list of Part
        One for each chain, (1, rows, batch, token_pos); chains may have different numbers of rows.
    of_tokens : bool
        Whether totals over (rows, batch) are wanted; they stay zero otherwise.

    Returns
    -------
    list of list of (int, Delayed)
        For each chain, what :func:`mean_losses` takes once it is computed.
    """
    return [
        [(first, delayed(loss_totals)(piece, of_tokens)) for first, piece in files_of(part)]
        for part in parts
    ]


def loss_totals(
    part: StoredArray | np.ndarray, of_tokens: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Add up losses over (batch, token), and over (rows, batch), in one pass.

    Parameters
    ----------
    part : StoredArray or np.ndarray (1, rows, batch, token_pos)

    Returns
    -------
    np.ndarray (rows,), np.ndarray (token_pos,)
        float64.
    """
    _, rows, _, tokens = part.shape
    row_sums, token_sums = np.zeros(rows), np.zeros(tokens)
    for (_, row, _, token), values in chunks_of(part):
        if of_tokens:
            over_batch = values[0].sum(axis=1, dtype=np.float64)
            row_sums[row] += over_batch.sum(axis=1)
            token_sums[token] += over_batch.sum(axis=0)
        else:
            row_sums[row] += values[0].sum(axis=(1, 2), dtype=np.float64)
    return row_sums, token_sums


def mean_losses(
    totals: list[Totals], shapes: list[tuple[int, ...]]
) -> tuple[list[np.ndarray], np.ndarray]:
    """Turn totals into means.

    Parameters
    ----------
    totals : list of Totals
        Of each chain.
    shapes : list of tuple of int
        (1, rows, batch, token_pos) of each chain.

    Returns
    -------
    traces : list of np.ndarray (rows,)
        Mean over (batch, token) at every row of each chain.
    of_tokens : np.ndarray (token_pos,)
        Mean over (chain, row, batch).
    """
    traces, over_tokens = [], np.zeros(shapes[0][3])
    for chain, (_, rows, batch, tokens) in zip(totals, shapes, strict=True):
        trace = np.zeros(rows)
        for first, (of_rows, of_tokens) in chain:
            trace[first : first + len(of_rows)] += of_rows
            over_tokens += of_tokens
        traces.append(trace / (batch * tokens))
    return traces, over_tokens / sum(shape[1] * shape[2] for shape in shapes)


def shapes_of(parts: list[Part]) -> list[tuple[Any, ...]]:
    """Shape of each chain's losses."""
    return [part.shape for part in parts]
