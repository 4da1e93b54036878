"""The strongest partners of each query token, found in one pass over the candidates."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from basinscope.analysis.plan import QUERY_PANEL
from basinscope.analysis.products import product
from basinscope.analysis.traces import gather_traces, standardise

DEPTH = 64  # products that are looked at through their largest one first
MERGED_RANKS = 2**12  # of either sign, of each of several blocks, that are merged together


class Partners(NamedTuple):
    """Partners of queries, the strongest first; both signs, (sign, query, rank).

    Attributes
    ----------
    values : np.ndarray, float32
        Influences; NaN where there are fewer partners of that sign.
    sequences, tokens : np.ndarray, int64
        Where the partner stands; -1 where there is none. Tokens count from 1.
    """

    values: np.ndarray
    sequences: np.ndarray
    tokens: np.ndarray


def query_traces(
    tokens: tuple[np.ndarray, np.ndarray], covariance: bool, *block: Any
) -> np.ndarray:
    """Gather the standardised traces of single tokens.

    Parameters
    ----------
    tokens : tuple of np.ndarray
        Sequence (in the block) and token of each query.
    covariance : bool
    *block
        Of :meth:`basinscope.analysis.traces.Traces.block`.

    Returns
    -------
    np.ndarray (queries, samples), float32
    """
    traces = standardise(gather_traces(*block)[tokens], covariance)
    return traces.astype(np.float32, copy=False)


def best_partners(
    queries: np.ndarray,
    places: tuple[np.ndarray, np.ndarray],
    rows: np.ndarray,
    k: int,
    covariance: bool,
    device: str | None,
    *block: Any,
) -> Partners:
    """Find the strongest partners of queries among one block of candidates.

    Parameters
    ----------
    queries : np.ndarray (queries, samples)
        Standardised traces.
    places : tuple of np.ndarray (queries,)
        Sequence and token of each query, which is no partner of itself.
    rows : np.ndarray (sequences,)
        Numbers of the candidates' sequences.
    k : int
        Partners of each sign at most; as many ranks as there are candidates, if these are fewer.
    *block
        Of :meth:`basinscope.analysis.traces.Traces.block`, the candidates.
    """
    traces = standardise(gather_traces(*block), covariance).astype(np.float32, copy=False)
    _, tokens, samples = traces.shape
    candidates = traces.reshape(-1, samples)
    candidates[~_all_finite(candidates)] = 0  # of no variance, or infinite: nobody's partner
    found = _nobody(len(queries), min(k, len(candidates)))
    for first in range(0, len(queries), QUERY_PANEL):
        panel = slice(first, first + QUERY_PANEL)
        products = product(queries[panel], candidates, device)
        for query, (sequence, token) in enumerate(
            zip(places[0][panel], places[1][panel], strict=True)
        ):
            products[query, np.flatnonzero(rows == sequence) * tokens + token] = 0
        together = math.ceil(len(products) / 8)  # each takes several times its products
        for at in range(0, len(products), together):
            some = slice(first + at, first + at + together)
            for row, sign in enumerate((1, -1)):
                values, columns = strongest(
                    products[at : at + together], found.values.shape[2], sign
                )
                absent = columns < 0
                found.values[row, some] = values
                found.sequences[row, some] = np.where(absent, -1, rows[columns // tokens])
                found.tokens[row, some] = np.where(absent, -1, columns % tokens + 1)
    return found


def merge_partners(parts: list[Partners], k: int, padded: bool) -> Partners:
    """Keep the strongest of several blocks' partners; equal ones in the order of their place.

    Parameters
    ----------
    parts : list of Partners
    k : int
        Partners of each sign at most.
    padded : bool
        Whether there are k ranks even where the parts have fewer.
    """
    ranks = sum(part.values.shape[2] for part in parts)
    kept = k if padded else min(k, ranks)
    if len(parts) == 1 and ranks == kept:
        return parts[0]
    queries = parts[0].values.shape[1]
    merged = _nobody(queries, kept)
    together = max(1, len(parts) * MERGED_RANKS // ranks)
    for first in range(0, queries, together):
        some = slice(first, first + together)
        fields = [
            np.concatenate([field[:, some] for field in of_parts], axis=2)
            for of_parts in zip(*parts, strict=True)
        ]
        values, sequences, tokens = fields
        strength = np.where(np.isnan(values), -np.inf, np.abs(values))
        order = np.lexsort((tokens, sequences, -strength), axis=2)[:, :, :k]
        for into, field in zip(merged, fields, strict=True):
            into[:, some, : order.shape[2]] = np.take_along_axis(field, order, axis=2)
    return merged


def _all_finite(rows: np.ndarray) -> np.ndarray:
    """Find the rows without NaN and infinities, without an array of their size."""
    return np.isfinite(rows.max(axis=1)) & np.isfinite(rows.min(axis=1))


def _nobody(queries: int, ranks: int) -> Partners:
    shape = (2, queries, ranks)
    return Partners(np.full(shape, np.nan, np.float32), np.full(shape, -1), np.full(shape, -1))


def strongest(products: np.ndarray, k: int, sign: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the k largest positive entries of each row, or the k lowest negative ones.

    The k largest of a row lie in the k groups with the largest maxima, so most of a row is only
    looked at once, for its groups' maxima.

    Parameters
    ----------
    products : np.ndarray (rows, columns)
    sign : 1 or -1

    Returns
    -------
    values, columns : np.ndarray (rows, k)
        The strongest first; NaN and -1 where a row has fewer of that sign.
    """
    rows, columns = products.shape
    values = np.full((rows, k), np.nan, np.float32)
    at = np.full((rows, k), -1, np.int64)
    width = columns // DEPTH
    everywhere = np.broadcast_to(np.arange(columns), (rows, columns))
    if width <= k:
        _keep_strongest(products, everywhere, sign, values, at)
        return values, at
    grouped = products[:, : DEPTH * width].reshape(rows, DEPTH, width)
    peaks = grouped.max(axis=1) if sign > 0 else -grouped.min(axis=1)
    groups = np.argpartition(peaks, width - k, axis=1)[:, width - k :]
    inside = (groups[:, None, :] + width * np.arange(DEPTH)[None, :, None]).reshape(rows, -1)
    looked_at = np.concatenate([inside, everywhere[:, DEPTH * width :]], axis=1)
    _keep_strongest(products, looked_at, sign, values, at)
    # where more than k groups reach the k-th, equals may stand first in one that was left out
    tied = np.flatnonzero((peaks >= sign * values[:, -1:]).sum(axis=1) > k)
    if len(tied):
        again = values[tied], at[tied]
        _keep_strongest(products[tied], everywhere[: len(tied)], sign, *again)
        values[tied], at[tied] = again
    return values, at


def _keep_strongest(
    products: np.ndarray, looked_at: np.ndarray, sign: int, values: np.ndarray, at: np.ndarray
) -> None:
    """Fill ``values`` and ``at`` with the strongest of the columns that are looked at."""
    k = values.shape[1]
    strength = sign * np.take_along_axis(products, looked_at, axis=1)
    strength = np.where(strength > 0, strength, -np.inf)
    order = np.lexsort((looked_at, -strength), axis=1)[:, :k]
    best = np.take_along_axis(strength, order, axis=1)
    where = np.take_along_axis(looked_at, order, axis=1)
    none = best == -np.inf
    values[:, : best.shape[1]] = np.where(none, np.nan, sign * best)
    at[:, : best.shape[1]] = np.where(none, -1, where)
