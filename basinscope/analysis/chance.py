"""How strong the partners of a query token get by chance: the noise of its influences."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from statistics import NormalDist
from typing import Any, Literal, NamedTuple

import numpy as np
import xarray as xr
from dask.delayed import delayed

from basinscope.analysis.bif import TRACES, BifOptions, Problem, cuts, queries_of
from basinscope.analysis.graphs import arrays_in
from basinscope.analysis.memory import parse_memory_limit
from basinscope.analysis.plan import PAIRS_BYTES, plan_influence, workers
from basinscope.analysis.shares import noise_of, shares_of, without_lengths
from basinscope.analysis.stores import open_samples

QUERY_PANEL = 64  # queries whose products with some partners are looked at together
PAIRS_AT_ONCE = 4  # of PAIRS_BYTES, in one task: products, their stack, and the traces behind them
MEMBERS = {
    "reliability": "share of the variance of influences that other chains would repeat",
    "noise": "standard deviation of influences by chance",
    "by_chance": "what the strongest of as many unrelated tokens reaches",
}


def bif_chance(
    samples: xr.DataTree | str | os.PathLike[str],
    queries: Sequence[tuple[int, int]],
    *,
    loss_keys: Literal["all"] | Sequence[str] = "all",
    batch_index_range: Literal["all"] | Sequence[int] = "all",
    compute_covariance: bool = False,
    allow_incomplete: bool = False,
    memory_limit: int | str | None = None,
) -> xr.Dataset:
    """Tell how strong the influences of query tokens get by chance alone.

    The strongest of thousands of influences is far from zero even where none is real. Chains are
    independent, so that what they disagree about is noise, as in
    :func:`basinscope.bif_reliability`; here over the pairs of one query with the tokens of other
    sequences. For N of them the strongest reaches about Φ⁻¹(1 - 1/N) standard deviations of it.

    Parameters
    ----------
    samples : xr.DataTree or path
        A store of :func:`basinscope.sample` or of devinterp 2.x, of three chains or more.
    queries : sequence of (int, int)
        (batch, target_position) of each query token, as for :func:`basinscope.compute_bif`.
    loss_keys, compute_covariance, allow_incomplete, memory_limit
        As for :func:`basinscope.compute_bif`, of chains that are stacked.
    batch_index_range : "all" or sequence of int
        Sequences among which partners are looked for (``batch_index_range_2`` there).

    Returns
    -------
    xr.Dataset
        Lazy; one pass over the losses gives all of it.

        - ``reliability (query)``: by how much the query's influences from as many other chains
          would correlate with these
        - ``noise (query)``: standard deviation that its influences have by chance
        - ``by_chance (query)``: about what the strongest of as many unrelated tokens reaches, on
          either side of zero; more where chains have few effective samples or losses rare peaks.
          Partners well beyond it are real; one below it may be

        NaN where the query's loss never changes, or there are fewer than three chains.

    Raises
    ------
    ValueError
        If there is one chain, or as :func:`basinscope.compute_bif` says.
    PlanError
        If the memory does not suffice; says what would.
    """
    options = BifOptions(
        loss_keys=loss_keys, batch_index_range_2=batch_index_range,
        compute_covariance=compute_covariance, top_k=1, queries=queries,
    )  # fmt: skip
    problem = Problem(open_samples(samples, allow_incomplete), options)
    draws = problem.draws
    if len(draws) < 2:
        raise ValueError(
            f"{problem.samples.name} has one chain, and chance is what chains disagree about: "
            "sample three or more"
        )
    limit = parse_memory_limit(memory_limit)
    sequences, tokens = problem.queries
    products = PAIRS_AT_ONCE * PAIRS_BYTES * workers()
    plan, blocks = plan_influence(problem.size, limit - products, None)
    replace(
        plan,
        estimator="what influences reach by chance",
        peak_memory=plan.peak_memory + products,
        least_memory=plan.least_memory + products,
    ).validate(limit)
    if blocks.copied:
        problem.traces.copy()

    asked = queries_of(problem, sequences, tokens, blocks.output, [])
    parts: list[Any] = [
        delayed(_sums)(asked, sequences, rows, draws, compute_covariance,
                       *problem.traces.block(rows))
        for rows in (problem.rows_2[at] for at in cuts(len(problem.rows_2), blocks.output))
    ]  # fmt: skip
    while len(parts) > 1:
        parts = [delayed(_added)(parts[i : i + 2]) for i in range(0, len(parts), 2)]
    found = arrays_in(
        delayed(_judge)(parts[0], draws, compute_covariance),
        {name: ((len(sequences),), np.float64) for name in MEMBERS},
    )
    units = {"noise": "nats2", "by_chance": "nats2"} if compute_covariance else {}
    variables = {
        name: xr.Variable(
            ("query",), found[name], {"long_name": meaning, "units": units.get(name, "1")}
        )
        for name, meaning in MEMBERS.items()
    }
    coords = {
        "query_batch": ("query", sequences),
        "query_target_position": ("query", problem.positions[tokens]),
    }
    return xr.Dataset(variables, coords, problem.samples.provenance)


class Sums(NamedTuple):
    """What the variances of queries' influences are made of, added up over partners.

    Attributes
    ----------
    squares : np.ndarray (query, 2 share, 2 share)
        Products with each other of the shares of an influence, and of those of half the partner's
        squared length; the query's own is the same for all of its partners.
    shares : np.ndarray (query, 2 share)
        Sums of each.
    partners : np.ndarray (query,)
        How many there are; those without variance do not count.
    """

    squares: np.ndarray
    shares: np.ndarray
    partners: np.ndarray


def _sums(
    asked: np.ndarray,
    sequences: np.ndarray,
    rows: np.ndarray,
    draws: list[int],
    covariance: bool,
    *block: Any,
) -> Sums:
    """Multiply queries with a block of partners, a few pairs at a time.

    A product is centred where one of its sides is, so that partners are taken as they are.
    """
    traces = TRACES["token"](covariance, *block)
    of_queries = [own[0] for own in shares_of(asked[None], draws)]
    of_means = _directions(draws).astype(traces.dtype)
    count, shares = len(asked), len(of_queries)
    squares, sums = np.zeros((count, 2 * shares, 2 * shares)), np.zeros((count, 2 * shares))
    found = Sums(squares, sums, np.zeros(count))
    a_row = 16 * shares * traces.shape[1] * min(count, QUERY_PANEL)
    for at in cuts(len(rows), max(1, PAIRS_BYTES // a_row)):
        partners = traces[at].reshape(-1, traces.shape[-1])
        sequence = np.repeat(rows[at], traces.shape[1])
        known = np.isfinite(partners[:, 0])  # constant losses are NaN at every draw
        if not known.all():
            partners = np.where(known[:, None], partners, 0)
        of_chains = np.split(partners, np.cumsum(draws)[:-1], axis=1)
        between = (partners @ of_means).T[..., None]
        lengths = [*map(_squared_length, of_chains), *np.square(between[..., 0])]
        for panel in cuts(count, QUERY_PANEL):
            counted = known & (sequence != sequences[panel, None])
            sides = zip(of_queries, [*of_chains, *between], strict=True)
            products = [own[panel] @ side.T for own, side in sides]
            halves = [np.broadcast_to(length / 2, counted.shape) for length in lengths]
            together = np.stack([*products, *halves], axis=1) * counted[:, None]
            found.squares[panel] += together @ together.swapaxes(1, 2)
            found.shares[panel] += together.sum(axis=2)
            found.partners[panel] += counted.sum(axis=1)
    return found


def _directions(draws: list[int]) -> np.ndarray:
    """Give what turns traces into the shares of their chains' means, (draw, chain - 1)."""
    of_one_chain = np.repeat(np.eye(len(draws)), draws, axis=1)
    coordinates = np.concatenate(shares_of(of_one_chain, draws)[len(draws) :], axis=-1)
    return np.repeat(coordinates / np.array(draws)[:, None], draws, axis=0)


def _squared_length(traces: np.ndarray) -> np.ndarray:
    """About their means, (trace,)."""
    mean = traces.mean(axis=1)
    return np.einsum("td,td->t", traces, traces) - traces.shape[1] * mean**2


def _added(parts: list[Sums]) -> Sums:
    return Sums(*(sum(values[1:], start=values[0]) for values in zip(*parts, strict=True)))


def _judge(sums: Sums, draws: list[int], covariance: bool) -> dict[str, np.ndarray]:
    found: dict[str, list[float]] = {name: [] for name in MEMBERS}
    shares = 2 * len(draws) - 1
    for squares, totals, count in zip(*sums, strict=True):
        with np.errstate(invalid="ignore", divide="ignore"):
            means = totals / count
            moments = squares / count - np.outer(means, means)
            covariances = without_lengths(moments, 0.0 if covariance else means[:shares].sum())
            noise = noise_of(covariances, draws)
            deviation = np.sqrt(np.maximum(noise, 0.0))
            found["reliability"].append(1 - noise / covariances.sum())
        found["noise"].append(deviation)
        far = NormalDist().inv_cdf(1 - 1 / count) if count > 1 else np.nan
        found["by_chance"].append(deviation * far)
    return {name: np.array(values) for name, values in found.items()}
