"""Means of losses that are read once, a chunk at a time, and added up in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from dask.delayed import delayed

from basinscope.analysis.stores import FILE_BYTES, Part, chunks_of, streamed
from basinscope.io.stored import StoredArray

STACKED = 128  # most rows of a matrix that is multiplied with weights
WIDE = 64  # most rows of a chunk that are added up side by side

Totals = list[tuple[int, tuple[np.ndarray, np.ndarray]]]  # of a chain: first row, loss_totals


def lazy_totals(parts: list[Part], of_tokens: bool = True) -> Any:
    """Have every chain's losses added up, a task for each file; reads nothing.

    Losses in memory that are no larger than a file are one task.

    Parameters
    ----------
    parts : list of Part
        One for each chain, (1, rows, batch, token_pos); chains may have different numbers of rows.
    of_tokens : bool
        Whether totals over (rows, batch) are wanted; they stay zero otherwise.

    Returns
    -------
    Delayed, or list of list of (int, Delayed)
        What :func:`mean_losses` takes once it is computed.
    """
    in_memory = all(isinstance(part, np.ndarray) for part in parts)
    if in_memory and sum(part.nbytes for part in parts) <= FILE_BYTES:
        return delayed(_totals_of_chains)(parts, of_tokens)
    add_up = delayed(loss_totals)
    return [
        [(first, add_up(piece, of_tokens)) for first, piece in streamed(part)] for part in parts
    ]


def _totals_of_chains(parts: list[np.ndarray], of_tokens: bool) -> list[Totals]:
    return [[(0, loss_totals(part, of_tokens))] for part in parts]


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
            row_sums[row] += _sums_of_rows(values[0])
    return row_sums, token_sums


def weighted_mean(parts: list[Any], weights: list[np.ndarray]) -> np.ndarray:
    """Average weight times loss over (chain, row), in one pass.

    Parameters
    ----------
    parts : list of StoredArray or np.ndarray (1, rows, batch, token_pos)
        Of each chain.
    weights : list of np.ndarray (rows,)

    Returns
    -------
    np.ndarray (batch, token_pos)
        float64.
    """
    total = np.zeros(parts[0].shape[2:])
    for part, weight in zip(parts, weights, strict=True):
        for (_, row, sequence, token), values in chunks_of(part):
            total[sequence, token] += _sums_of_tokens(values[0], weight[row])
    return total / sum(map(len, weights))


def _sums_of_rows(values: np.ndarray) -> np.ndarray:
    """Add up (rows, batch, token_pos) over (batch, token_pos), fast however a chunk is laid out."""
    if not _rows_last(values):
        sums = np.empty(len(values))
        for (_, row, _, _), some in chunks_of(values[None]):  # a copy of all may not fit
            sums[row] = some[0].astype(np.float64).sum(axis=(1, 2))
        return sums
    by_token = values.transpose(1, 2, 0).reshape(-1, len(values))
    side = math.gcd(len(by_token), WIDE)  # sums of longer vectors are faster ones
    wide = by_token.reshape(-1, side * len(values)).sum(axis=0, dtype=np.float64)
    return wide.reshape(side, len(values)).sum(axis=0)


def _sums_of_tokens(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Add up weight times (rows, batch, token_pos) over the rows."""
    if not _rows_last(values):
        return np.einsum("d,dbt->bt", weights, values.astype(np.float64))
    by_token = values.transpose(1, 2, 0).reshape(-1, len(values)).astype(np.float64)
    # as a stack of matrices so small that BLAS does not wake its threads for one
    height = math.gcd(len(by_token), STACKED)
    sums = by_token.reshape(-1, height, len(values)) @ weights
    return sums.reshape(values.shape[1:])


def _rows_last(values: np.ndarray) -> bool:
    """Whether the rows of one token stand side by side in memory, as stores lay them out."""
    return values.transpose(1, 2, 0).flags.c_contiguous


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


def at_checkpoint(parts: list[Any]) -> np.ndarray:
    """Join the loss at the checkpoint of every chain: (chain, token_pos), float64."""
    return np.concatenate([np.asarray(part) for part in parts]).astype(np.float64)


def shapes_of(parts: list[Part]) -> list[tuple[Any, ...]]:
    """Shape of each chain's losses."""
    return [part.shape for part in parts]
