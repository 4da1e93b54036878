"""Traces of single tokens: gathered from a store's chunks, standardised once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from dask.delayed import Delayed, delayed

from basinscope.analysis import token_means
from basinscope.analysis.plan import Layout
from basinscope.analysis.stores import Part, Samples, chunks_of, cut, files_of
from basinscope.io.copy import TemporaryCopy

GROUP_BYTES = 2**21  # of traces, of losses in memory, that are averaged together


class InCopy(NamedTuple):
    """Losses of some sequences in a temporary copy, which does not exist yet."""

    name: str
    sequences: tuple[int, int]


class Piece(NamedTuple):
    """Where some sequences of a block are found.

    Attributes
    ----------
    chains : list of list of (int, Part or InCopy)
        For each chain its losses, file after file with their first row, of the sequences from the
        first to the last that is wanted.
    take : np.ndarray or None
        Which of these sequences; None for all.
    put : np.ndarray
        Their places in the block.
    """

    chains: list[list[tuple[int, Any]]]
    take: np.ndarray | None
    put: np.ndarray


class Pieces(list[Piece]):
    """The pieces of a block; Dask looks for arrays of its own in lists, and not in this."""


class Traces:
    """The losses on some observables, all their sequences in a row.

    Parameters
    ----------
    samples : Samples
    keys : sequence of str
        Observables, in this order.
    mean_over_chains : bool
        Average chains draw by draw, instead of counting each draw of each chain.
    """

    def __init__(self, samples: Samples, keys: Sequence[str], mean_over_chains: bool) -> None:
        self.losses = [samples.losses(f"loss_{key}") for key in keys]
        if mean_over_chains:  # over the draws that all chains have
            rows = slice(min(samples.draws))
            self.losses = [[cut(part, rows) for part in chains] for chains in self.losses]
        self.layouts = tuple(Layout.of(chains) for chains in self.losses)
        self.mean_over_chains = mean_over_chains
        self.tokens = self.layouts[0].shape[3]
        self.sequences = sum(layout.shape[2] for layout in self.layouts)
        self.samples = self.losses[0][0].shape[1] if mean_over_chains else self.layouts[0].shape[1]
        wide = mean_over_chains or self.losses[0][0].dtype.itemsize > 4
        self.dtype = np.dtype(np.float64 if wide else np.float32)
        self._copy: tuple[Delayed, Delayed] | None = None

    def copy(self) -> None:
        """Have everything read from a temporary copy that the graph makes first."""
        made = delayed(TemporaryCopy)(sum(layout.nbytes for layout in self.layouts))
        written = [
            delayed(_write_copy)(made, _name(observable, chain, first), piece)
            for observable, chains in enumerate(self.losses)
            for chain, part in enumerate(chains)
            for first, piece in files_of(part)
        ]
        self._copy = made, delayed(_all_written)(written)

    def block(self, rows: np.ndarray) -> tuple[Any, ...]:
        """Give the arguments with which :func:`gather_traces` reads some sequences."""
        shape = (len(rows), self.tokens, self.samples)
        return (self.pieces(rows), shape, self.dtype, self.mean_over_chains, *(self._copy or ()))

    def pieces(self, rows: np.ndarray) -> list[Piece]:
        """Find some sequences; reads nothing."""
        pieces = Pieces()
        first = 0
        for observable, (chains, layout) in enumerate(zip(self.losses, self.layouts, strict=True)):
            put = np.flatnonzero((rows >= first) & (rows < first + layout.shape[2]))
            local = rows[put] - first
            for group in _groups(local, layout.chunk[2]):
                low, high = int(local[group].min()), int(local[group].max()) + 1
                take = local[group] - low
                whole = np.array_equal(take, np.arange(high - low))
                found = [
                    self._find(observable, chain, part, low, high)
                    for chain, part in enumerate(chains)
                ]
                pieces.append(Piece(found, None if whole else take, put[group]))
            first += layout.shape[2]
        return pieces

    def _find(
        self, observable: int, chain: int, part: Part, low: int, high: int
    ) -> list[tuple[int, Any]]:
        if self._copy is None:
            return [(0, cut(part, slice(None), slice(low, high)))]
        return [
            (first, InCopy(_name(observable, chain, first), (low, high)))
            for first, _ in files_of(part)
        ]


def _name(observable: int, chain: int, first: int) -> str:
    return f"{observable}-{chain}-{first}"


def _write_copy(copy: TemporaryCopy, name: str, part: Any) -> None:
    copy.write(name, np.asarray(part))


def _all_written(done: list[None]) -> int:
    return len(done)


def _groups(local: np.ndarray, extent: int) -> Iterator[np.ndarray]:
    """Split wanted sequences so that each group is read at once: a run, or a chunk's worth."""
    if not len(local):
        return
    if _is_run(local):
        yield np.arange(len(local))
        return
    columns = local // extent
    for column in np.unique(columns):
        yield np.flatnonzero(columns == column)


def gather_traces(
    pieces: list[Piece],
    shape: tuple[int, int, int],
    dtype: np.dtype[Any],
    mean_over_chains: bool,
    copy: TemporaryCopy | None = None,
    written: int = 0,
) -> np.ndarray:
    """Read the traces of some sequences.

    Parameters
    ----------
    pieces : list of Piece
    shape : tuple of int
        (sequences, token_pos, samples)
    dtype : np.dtype
        Of the traces.
    mean_over_chains : bool
    copy, written
        A temporary copy to read from, and the sign that all of it is there.

    Returns
    -------
    np.ndarray (sequences, token_pos, samples)
    """
    if not mean_over_chains:
        traces = np.empty(shape, dtype)
        for at, draws, tokens, values in _read(pieces, stacked=True, copy=copy):
            traces[at, tokens, draws] = values.transpose(1, 2, 0)
        return traces
    traces = np.zeros(shape, dtype)
    for at, draws, tokens, values in _read(pieces, stacked=False, copy=copy):
        traces[at, tokens, draws] += values.transpose(1, 2, 0)
    traces /= len(pieces[0].chains)
    return traces


def gather_sequence_traces(
    pieces: list[Piece],
    shape: tuple[int, int, int],
    dtype: np.dtype[Any],
    mean_over_chains: bool,
) -> np.ndarray:
    """Read the traces of some sequences, averaged over their tokens.

    Parameters as :func:`gather_traces`. Losses pass by in the order of the store, a chunk at a
    time.

    Returns
    -------
    np.ndarray (sequences, samples), float64
    """
    sequences, tokens, samples = shape
    traces = np.zeros((sequences, samples))
    for at, draws, _, values in _read(pieces, stacked=not mean_over_chains):
        traces[at, draws] += values.sum(axis=2, dtype=np.float64).T
    chains = len(pieces[0].chains) if mean_over_chains else 1
    return traces / (tokens * chains)


def _read(
    pieces: list[Piece], stacked: bool, copy: TemporaryCopy | None = None
) -> Iterator[tuple[Any, slice, slice, np.ndarray]]:
    """Read chunk by chunk what pieces ask for.

    Yields
    ------
    at : slice or np.ndarray
        Places of the sequences in the block.
    draws : slice
        Places among the samples: chains one after another if ``stacked``, else on each other.
    tokens : slice
    values : np.ndarray (draw, sequence, token)
    """
    for chains, take, put in pieces:
        start = 0
        for files in chains:
            end = start
            for first, found in files:
                part = _resolve(found, copy)
                for (_, row, sequence, token), values in chunks_of(part):
                    draws = slice(start + first + row.start, start + first + row.stop)
                    if take is None:
                        yield _as_slice(put[sequence]), draws, token, values[0]
                    else:
                        inside = (take >= sequence.start) & (take < sequence.stop)
                        chosen = values[0][:, take[inside] - sequence.start]
                        yield put[inside], draws, token, chosen
                end = max(end, start + first + part.shape[1])
            start = end if stacked else 0


def _resolve(found: Any, copy: TemporaryCopy | None) -> Any:
    if not isinstance(found, InCopy):
        return found
    assert copy is not None
    return copy.open(found.name).part(slice(None), slice(None), slice(*found.sequences))


def _as_slice(places: np.ndarray) -> Any:
    """Make a run of places a slice, which is copied to faster."""
    return slice(int(places[0]), int(places[-1]) + 1) if _is_run(places) else places


def _is_run(numbers: np.ndarray) -> bool:
    """Whether each number is the one before it plus one."""
    return len(numbers) > 0 and np.array_equal(numbers, numbers[0] + np.arange(len(numbers)))


def standardise(traces: np.ndarray, covariance: bool) -> np.ndarray:
    """Centre traces and scale them, so that plain products of them are what is asked for.

    Correlation: to unit length. Covariance: by 1/sqrt(n - 1). Means and lengths are taken in
    float64. A trace without variance has no correlation: it becomes NaN.

    Parameters
    ----------
    traces : np.ndarray (..., samples)
        float32 or float64; overwritten.

    Returns
    -------
    np.ndarray (..., samples)
        The same array.
    """
    token_means.standardise(traces.reshape(-1, traces.shape[-1]), covariance)
    return traces


def gather_token_means(
    pieces: list[Piece],
    shape: tuple[int, int, int],
    dtype: np.dtype[Any],
    mean_over_chains: bool,
    *copied: Any,
    covariance: bool,
) -> np.ndarray:
    """Read the traces of some sequences, standardise them, and average them over tokens.

    Parameters as :func:`gather_traces`.

    Returns
    -------
    np.ndarray (sequences, samples), float64
    """
    if mean_over_chains or not _in_memory(pieces):
        traces = gather_traces(pieces, shape, dtype, mean_over_chains, *copied)
        return token_means.of_traces(traces, covariance)
    means = np.empty((shape[0], shape[2]))
    _, tokens, samples = shape
    together = max(1, GROUP_BYTES // (dtype.itemsize * tokens * samples))
    slab = np.empty((together, samples, tokens), dtype)  # as losses in memory lie
    for chains, take, put in pieces:
        losses = [part[0] for files in chains for _, part in files]
        for first in range(0, len(put), together):
            at = put[first : first + together]
            some: Any = slice(first, first + len(at)) if take is None else take[first:][: len(at)]
            traces, start = slab[: len(at)], 0
            for own in losses:
                traces[:, start : start + len(own)] = own[:, some].swapaxes(0, 1)
                start += len(own)
            means[at] = token_means.of_losses(traces, covariance)
    return means


def _in_memory(pieces: list[Piece]) -> bool:
    return all(
        isinstance(part, np.ndarray)
        for chains, _, _ in pieces for files in chains for _, part in files
    )  # fmt: skip
