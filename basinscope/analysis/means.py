"""Means of losses that are read once, a chunk at a time, and added up in float64.

Only where a row has MANY losses in a chunk are TOGETHER of them added up in float32 first: that
keeps up with the decoder, which float64 from the start does not, and what it rounds off evens out
over so many. Sums over rows, of which susceptibilities take differences that are far smaller, see
float64 alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from dask.delayed import delayed

from basinscope.analysis.stores import FILE_BYTES, Part, chunks_of, streamed
from basinscope.io.stored import StoredArray

MANY = 2**12  # losses of a row, from which on sums begin in float32
TOGETHER = 64  # most losses that are added up in float32
PRODUCT = 2**13  # entries of a matrix so small that BLAS does not wake its threads for it

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
        row_sums[row] += _sums_of_rows(values[0])
        if of_tokens:
            over_rows = _sums_of_tokens(values[0], np.ones(len(values[0])))
            token_sums[token] += over_rows.sum(axis=0, dtype=np.float64)
    return row_sums, token_sums


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


def _sums_of_rows(values: np.ndarray) -> np.ndarray:
    """Add up (rows, batch, token_pos) over (batch, token_pos)."""
    by_row = values.reshape(len(values), -1)
    by_row = by_row.astype(np.result_type(values, np.float32), copy=False)
    width = min(PRODUCT, by_row.shape[1]) // TOGETHER
    if width * TOGETHER < MANY:
        return by_row.sum(axis=1, dtype=np.float64)
    begun, rest = _whole(by_row, width * TOGETHER)
    if _rows_last(values):
        sums = begun.reshape(len(values), -1, TOGETHER, width).sum(axis=2)
    else:  # what stands side by side, a product with ones adds up faster
        ones = np.ones(TOGETHER, by_row.dtype)
        sums = begun.reshape(len(values), -1, width, TOGETHER) @ ones
    return sums.sum(axis=(1, 2), dtype=np.float64) + rest.sum(axis=1, dtype=np.float64)


def _sums_of_tokens(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Add up weight times (rows, batch, token_pos) over the rows."""
    by_row = values.reshape(len(values), -1).astype(np.float64)
    width = 2 ** max(0, (PRODUCT // len(values)).bit_length() - 1)
    begun, rest = _whole(by_row, width)
    sums = (weights @ begun.reshape(len(values), -1, width).swapaxes(0, 1)).ravel()
    if rest.size:
        sums = np.concatenate([sums, weights @ rest])
    return sums.reshape(values.shape[1:])


def _whole(by_row: np.ndarray, extent: int) -> tuple[np.ndarray, np.ndarray]:
    """Split (rows, tokens) behind the last token that fills an extent."""
    whole = by_row.shape[1] - by_row.shape[1] % extent
    return by_row[:, :whole], by_row[:, whole:]


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
