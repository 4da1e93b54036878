"""Means of losses that are read once, a chunk at a time, and added up in float64."""

from __future__ import annotations

from typing import Any

import dask.array as da
import numpy as np
from dask.delayed import delayed

from basinscope.analysis.stores import Part, chunks_of, files_of
from basinscope.io.stored import StoredArray


def loss_traces(parts: list[Part]) -> tuple[list[da.Array], da.Array]:
    """Average losses over (batch, token) per row, and over (chain, row, batch) per token.

    Both come from one pass over the losses.

    Parameters
    ----------
    parts : list of Part
        One for each chain, (1, rows, batch, token_pos); chains may have different numbers of rows.

    Returns
    -------
    traces : list of da.Array (rows,)
        float64, lazy, one for each chain.
    token_means : da.Array (token_pos,)
        float64, lazy.
    """
    totals = [
        [(first, delayed(loss_totals)(piece)) for first, piece in files_of(part)] for part in parts
    ]
    traces = [
        da.from_delayed(delayed(_trace)(total, part.shape), (part.shape[1],), "float64")
        for total, part in zip(totals, parts, strict=True)
    ]
    tokens = parts[0].shape[3]
    entries = sum(part.shape[1] * part.shape[2] for part in parts)
    flat = [pieces for total in totals for _, pieces in total]
    token_means = da.from_delayed(
        delayed(_token_means)(flat, tokens, entries), (tokens,), "float64"
    )
    return traces, token_means


def loss_totals(part: StoredArray | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
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
    of_rows, of_tokens = np.zeros(rows), np.zeros(tokens)
    for (_, row, _, token), values in chunks_of(part):
        over_batch = values[0].sum(axis=1, dtype=np.float64)
        of_rows[row] += over_batch.sum(axis=1)
        of_tokens[token] += over_batch.sum(axis=0)
    return of_rows, of_tokens


def _trace(totals: list[tuple[int, Any]], shape: tuple[int, ...]) -> np.ndarray:
    trace = np.zeros(shape[1])
    for first, (of_rows, _) in totals:
        trace[first : first + len(of_rows)] += of_rows
    return trace / (shape[2] * shape[3])


def _token_means(totals: list[Any], tokens: int, entries: int) -> np.ndarray:
    total = np.zeros(tokens)
    for _, of_tokens in totals:
        total += of_tokens
    return total / entries
