"""Means of losses that are read once, a chunk at a time, and added up in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from dask.delayed import delayed

from basinscope.analysis import sums
from basinscope.analysis.stores import Part, at_hand, chunks_of, streamed

Totals = list[tuple[int, tuple[np.ndarray, np.ndarray]]]  # of a chain: first row, loss_totals


def with_totals(make: Callable[..., Any], parts: list[Part], *others: Any) -> Any:
    """Have every chain's losses added up, a task for each file, and something made of the sums.

    Losses :func:`at_hand` are added up in the task that uses the sums. Reads nothing.

    Parameters
    ----------
    make : callable
        Takes the totals and the shapes of all chains, as :func:`mean_losses` does, and ``others``.
    parts : list of Part
        One for each chain, (1, rows, batch, token_pos); chains may have different numbers of rows.

    Returns
    -------
    Delayed
        Of what ``make`` returns.
    """
    if at_hand(parts):
        return delayed(from_totals)(make, parts, *others)
    add_up = delayed(loss_totals)
    totals = [[(first, add_up(piece)) for first, piece in streamed(part)] for part in parts]
    return delayed(make)(totals, _shapes(parts), *others)


def from_totals(make: Callable[..., Any], parts: list[np.ndarray], *others: Any) -> Any:
    """Do what the tasks of :func:`with_totals` do, at once."""
    return make([[(0, loss_totals(part))] for part in parts], _shapes(parts), *others)


def _shapes(parts: Sequence[Part]) -> list[tuple[int, ...]]:
    return [part.shape for part in parts]


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
    of_rows, of_tokens = np.zeros(part.shape[1]), np.zeros(part.shape[3])
    for (_, row, _, token), values in chunks_of(part):
        over_tokens, over_rows = sums.totals(values[0])
        of_rows[row] += over_tokens
        of_tokens[token] += over_rows
    return of_rows, of_tokens


def weighted_means(parts: list[Any], weights: list[np.ndarray] | None = None) -> np.ndarray:
    """Average (weight times) loss over (chain, row), in one pass.

    Parameters
    ----------
    parts : list of StoredArray or np.ndarray (1, rows, batch, token_pos)
        Of each chain.
    weights : list of np.ndarray (rows,), optional
        Default: all ones.

    Returns
    -------
    np.ndarray (chain, batch, token_pos)
        float64; each chain's part of the average, which is their sum.
    """
    totals = np.zeros((len(parts), *parts[0].shape[2:]))
    for chain, part in enumerate(parts):
        weight = np.ones(part.shape[1]) if weights is None else weights[chain]
        for (_, row, sequence, token), values in chunks_of(part):
            totals[chain, sequence, token] += sums.weighted_totals(values[0], weight[row])
    totals /= sum(part.shape[1] for part in parts)
    return totals


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
