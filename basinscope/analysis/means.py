"""Means of losses that are read once, a chunk at a time, and added up in float64.

Only where a row has MANY losses in a chunk are the losses of TOGETHER sequences added up in float32
first: that keeps up with the decoder, which float64 from the start does not, and what it rounds off
evens out over so many. Weighted means over rows, of which susceptibilities take differences that
are far smaller, see float64 alone.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import Any

import numpy as np
from dask.delayed import delayed

from basinscope.analysis.stores import Part, at_hand, chunks_of, streamed

MANY = 2**10  # losses of a row, from which on sums begin in float32
TOGETHER = 64  # most sequences whose losses are added up in float32
PRODUCT = 2**13  # entries of a matrix so small that BLAS does not wake its threads for it

Totals = list[tuple[int, tuple[np.ndarray, np.ndarray]]]  # of a chain: first row, loss_totals


def with_totals(make: Callable[..., Any], parts: list[Part], *others: Any) -> Any:
    """Have every chain's losses added up, a task for each file, and something made of the sums.

    Losses :func:`at_hand` are added up in the task that uses the sums. Reads nothing.

    Parameters
    ----------
    make : callable
        Takes the totals of all chains, as :func:`mean_losses` does, and ``others``.
    parts : list of Part
        One for each chain, (1, rows, batch, token_pos); chains may have different numbers of rows.

    Returns
    -------
    Delayed
        Of what ``make`` returns.
    """
    if at_hand(parts):
        return delayed(_made_at_once)(make, parts, *others)
    add_up = delayed(loss_totals)
    totals = [[(first, add_up(piece)) for first, piece in streamed(part)] for part in parts]
    return delayed(make)(totals, *others)


def _made_at_once(make: Callable[..., Any], parts: list[np.ndarray], *others: Any) -> Any:
    return make([[(0, loss_totals(part))] for part in parts], *others)


def loss_totals(part: Part) -> tuple[np.ndarray, np.ndarray]:
    """Add up losses over (batch, token), and over (rows, batch), in one pass.

    Parameters
    ----------
    part : StoredArray, Selected or np.ndarray (1, rows, batch, token_pos)

    Returns
    -------
    np.ndarray (rows,), np.ndarray (token_pos,)
        float64.
    """
    _, rows, _, tokens = part.shape
    row_sums, token_sums = np.zeros(rows), np.zeros(tokens)
    for row, chunks in groupby(chunks_of(part), key=_rows_of):
        over_batch = np.zeros((row.stop - row.start, tokens))
        for (_, _, _, token), values in chunks:
            over_batch[:, token] += _sums_over_batch(values[0])
        row_sums[row] += over_batch.sum(axis=1)
        token_sums += over_batch.sum(axis=0)
    return row_sums, token_sums


def _rows_of(chunk: tuple[tuple[slice, ...], np.ndarray]) -> slice:
    return chunk[0][1]


def weighted_mean(parts: list[Any], weights: list[np.ndarray] | None = None) -> np.ndarray:
    """Average (weight times) loss over (chain, row), in one pass.

    Parameters
    ----------
    parts : list of StoredArray or np.ndarray (1, rows, batch, token_pos)
        Of each chain.
    weights : list of np.ndarray (rows,), optional
        Default: all ones.

    Returns
    -------
    np.ndarray (batch, token_pos)
        float64.
    """
    total = np.zeros(parts[0].shape[2:])
    for chain, part in enumerate(parts):
        for (_, row, sequence, token), values in chunks_of(part):
            weight = np.ones(len(values[0])) if weights is None else weights[chain][row]
            total[sequence, token] += _sums_of_tokens(values[0], weight)
    return total / sum(part.shape[1] for part in parts)


def _sums_over_batch(values: np.ndarray) -> np.ndarray:
    """Add up (rows, batch, token_pos) over the batch: (rows, token_pos)."""
    if values[0].size < MANY:
        return values.sum(axis=1, dtype=np.float64)
    values = values.astype(np.result_type(values, np.float32), copy=False)
    if not _rows_last(values):
        return _added(values)
    by_sequence = values.transpose(1, 2, 0)
    sums = _added(by_sequence.reshape(1, len(by_sequence), -1))
    return sums.reshape(by_sequence.shape[1:]).T


def _added(blocks: np.ndarray) -> np.ndarray:
    """Add up (block, batch, column) over the batch, TOGETHER at a time in their own dtype."""
    starts = range(0, blocks.shape[1], TOGETHER)
    sums = [_added_together(blocks[:, first : first + TOGETHER]) for first in starts]
    return sums[0] if len(sums) == 1 else np.asarray(sums, np.float64).sum(axis=0)


def _added_together(blocks: np.ndarray) -> np.ndarray:
    count = blocks.shape[1]
    ones = np.ones(count, blocks.dtype)  # a product adds up faster than a sum
    width = PRODUCT // count
    begun, rest = _whole(blocks, width)
    by_width = begun.reshape(len(blocks), count, -1, width).swapaxes(1, 2)
    sums = (ones @ by_width).reshape(len(blocks), -1)
    return np.concatenate([sums, ones @ rest], axis=1) if rest.size else sums


def _sums_of_tokens(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Add up weight times (rows, batch, token_pos) over the rows."""
    by_row = values.reshape(len(values), -1).astype(np.float64)
    width = 2 ** max(0, (PRODUCT // len(values)).bit_length() - 1)
    begun, rest = _whole(by_row, width)
    sums = (weights @ begun.reshape(len(values), -1, width).swapaxes(0, 1)).ravel()
    if rest.size:
        sums = np.concatenate([sums, weights @ rest])
    return sums.reshape(values.shape[1:])


def _whole(columns: np.ndarray, extent: int) -> tuple[np.ndarray, np.ndarray]:
    """Split (..., columns) behind the last column that fills an extent."""
    whole = columns.shape[-1] - columns.shape[-1] % extent
    return columns[..., :whole], columns[..., whole:]


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
