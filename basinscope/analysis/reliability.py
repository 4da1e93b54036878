"""How far influences would come out again: the agreement of chains about them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import numpy as np
import xarray as xr
from dask.delayed import delayed

from basinscope.analysis.bif import TRACES, BifOptions, Problem, cuts
from basinscope.analysis.graphs import arrays_in
from basinscope.analysis.memory import parse_memory_limit
from basinscope.analysis.plan import Blocks, Plan, plan_influence, workers
from basinscope.analysis.stores import open_samples

SUMS_AT_ONCE = 3  # of a block: the product, the sum so far, and what is made of both


def bif_reliability(
    samples: xr.DataTree | str | os.PathLike[str],
    *,
    correlation_method: Literal["token", "sequence"] = "token",
    loss_keys: Literal["all"] | Sequence[str] = "all",
    batch_index_range: Literal["all"] | Sequence[int] = "all",
    average_tokenwise_bif: bool = False,
    compute_covariance: bool = False,
    allow_incomplete: bool = False,
    memory_limit: int | str | None = None,
) -> xr.Dataset:
    """Tell how well influences would come out again, from how well chains agree about them.

    An influence over the stacked draws of C chains is a sum of independent shares: one of each
    chain, about its own mean, and C - 1 of directions in which the chains' means differ. m shares
    s_i of a kind differ by noise alone, which over the pairs of different sequences gives their sum
    the variance that would not come again, as in Cronbach's alpha (Cronbach 1951, "Coefficient
    alpha and the internal structure of tests"):

        noise = m / (m - 1) * (sum_i var(s_i) - var(sum_i s_i) / m)
        reliability = 1 - (noise of both kinds) / var(influence)

    Influences from as many other chains would correlate with these by about as much, and k times as
    many chains have the reliability k a / (1 + (k - 1) a), where these have a.

    The influences themselves are not made: it takes one pass over the losses, and for T traces of n
    draws 2 T n² operations.

    Parameters
    ----------
    samples : xr.DataTree or path
        A store of :func:`basinscope.sample` or of devinterp 2.x, of two chains or more.
    correlation_method, loss_keys, average_tokenwise_bif, compute_covariance
        Which influences, as for :func:`basinscope.compute_bif`, of chains that are stacked.
    batch_index_range : "all" or sequence of int
        Sequences, counted over all observables; two or more.
    allow_incomplete : bool
        Take what a running or interrupted store records as written.
    memory_limit : int or str, optional
        Bytes, or such as "2GiB". Default: half of the free memory.

    Returns
    -------
    xr.Dataset
        Lazy.

        - ``reliability``: from 0, noise alone, to 1; chance may take it below 0. NaN for two
          chains, whose means differ in one direction only
        - ``agreement (chain, chain_T)``: correlation of what two chains alone say of the same
          pairs. One that agrees with the others by less than they do is at a place of its own

    Raises
    ------
    ValueError
        If there is one chain or one sequence, or as :func:`basinscope.compute_bif` says.
    PlanError
        If the memory does not suffice; says what would.

    Warns
    -----
    UserWarning
        If chains are left out; names them.
    """
    limit = parse_memory_limit(memory_limit)
    problem = _problem(
        samples, allow_incomplete, correlation_method, loss_keys, batch_index_range,
        average_tokenwise_bif, compute_covariance,
    )  # fmt: skip
    plan, blocks = _planned(problem, limit)
    plan.validate(limit)
    if blocks.copied:
        problem.traces.copy()

    kind, draws = problem.options.kind, _draws(problem)
    parts: list[Any] = [
        delayed(_sums)(kind, compute_covariance, draws, *problem.traces.block(rows))
        for rows in (problem.rows_1[at] for at in cuts(len(problem.rows_1), blocks.output))
    ]
    while len(parts) > 1:
        parts = [delayed(_added)(parts[i : i + 2]) for i in range(0, len(parts), 2)]
    chains = len(draws)
    members = {"reliability": ((), np.float64), "agreement": ((chains, chains), np.float64)}
    found = arrays_in(delayed(_judge)(parts[0], draws), members)
    variables = {
        "reliability": xr.Variable(
            (), found["reliability"], {"long_name": "reliability of influences", "units": "1"}
        ),
        "agreement": xr.Variable(
            ("chain", "chain_T"),
            found["agreement"],
            {"long_name": "correlation of the influences of single chains", "units": "1"},
        ),
    }
    numbers = list(problem.samples.chains)
    return xr.Dataset(variables, {"chain": numbers, "chain_T": numbers}, problem.samples.provenance)


def plan_bif_reliability(
    samples: xr.DataTree | str | os.PathLike[str],
    *,
    correlation_method: Literal["token", "sequence"] = "token",
    loss_keys: Literal["all"] | Sequence[str] = "all",
    batch_index_range: Literal["all"] | Sequence[int] = "all",
    average_tokenwise_bif: bool = False,
    compute_covariance: bool = False,
    allow_incomplete: bool = False,
    memory_limit: int | str | None = None,
) -> Plan:
    """Plan :func:`bif_reliability` with the same arguments; reads metadata only."""
    problem = _problem(
        samples, allow_incomplete, correlation_method, loss_keys, batch_index_range,
        average_tokenwise_bif, compute_covariance,
    )  # fmt: skip
    return _planned(problem, parse_memory_limit(memory_limit))[0]


class Sums(NamedTuple):
    """What the variances of influences are made of, added up over sequences.

    Attributes
    ----------
    products : np.ndarray (place, place)
        Of the places of traces with each other, over all traces; a share has some of the places.
    total : np.ndarray (place,)
        Sum of all traces.
    within : np.ndarray (share, share)
        Products of two shares' influences, over the pairs within sequences.
    total_within : np.ndarray (share,)
        Sum of each share's influences within sequences.
    traces, pairs_within : int
        How many there are; those without variance do not count.
    """

    products: np.ndarray
    total: np.ndarray
    within: np.ndarray
    total_within: np.ndarray
    traces: int
    pairs_within: int


def _problem(
    samples: xr.DataTree | str | os.PathLike[str],
    allow_incomplete: bool,
    correlation_method: str,
    loss_keys: Literal["all"] | Sequence[str],
    rows: Literal["all"] | Sequence[int],
    average: bool,
    covariance: bool,
) -> Problem:
    options = BifOptions(correlation_method, "stack", loss_keys, rows, rows, average, covariance)
    problem = Problem(open_samples(samples, allow_incomplete), options)
    if len(_draws(problem)) < 2:
        raise ValueError(
            f"{problem.samples.name} has one chain, and reliability is how far chains agree: "
            "sample three or more"
        )
    if len(np.unique(problem.rows_1)) < max(2, len(problem.rows_1)):
        raise ValueError(
            "reliability is of influences between different sequences: give two or more, each once"
        )
    return problem


def _draws(problem: Problem) -> list[int]:
    return [part.shape[1] for part in problem.traces.losses[0]]


def _planned(problem: Problem, limit: int) -> tuple[Plan, Blocks]:
    """Plan it as influence that is averaged over tokens, and its sums besides."""
    size = problem.size
    one_pass = replace(size, kind="sequence" if size.kind == "sequence" else "average")
    sums = SUMS_AT_ONCE * workers() * 8 * size.samples**2
    plan, blocks = plan_influence(one_pass, limit - sums, None)
    per_sequence = size.tokens if size.kind == "token" else 1
    return replace(
        plan,
        estimator="the reliability of influences",
        peak_memory=plan.peak_memory + sums,
        least_memory=plan.least_memory + sums,
        output_bytes=8 * (len(problem.samples.chains) ** 2 + 1),
        flops=2 * len(problem.rows_1) * per_sequence * size.samples**2,
    ), blocks


def _sums(kind: str, covariance: bool, draws: list[int], *block: Any) -> Sums:
    traces = TRACES[kind](covariance, *block)
    traces = traces.reshape(len(traces), -1, traces.shape[-1])  # of one token, or of all
    known = np.isfinite(traces).all(axis=-1)
    if not known.all():
        traces = np.where(known[..., None], traces, 0)
    shares = _shares(traces, draws)
    within = np.stack([(own @ own.swapaxes(1, 2)).ravel() for own in shares]).astype(np.float64)
    joined = np.concatenate(shares, axis=-1)
    flat = joined.reshape(-1, joined.shape[-1])
    counts = known.sum(axis=1)
    return Sums(
        products=(flat.T @ flat).astype(np.float64),
        total=flat.sum(axis=0, dtype=np.float64),
        within=within @ within.T,
        total_within=within.sum(axis=1),
        traces=int(counts.sum()),
        pairs_within=int((counts**2).sum()),
    )


def _shares(traces: np.ndarray, draws: list[int]) -> list[np.ndarray]:
    """Turn the draws so that they fall into independent shares of an influence.

    One of each chain, about its own mean; and for the means of C chains, which a mean of all has
    been taken from, C - 1 directions in which they differ. An influence is the sum of the shares'
    products.
    """
    counts = np.array(draws)
    of_chains = np.split(traces, np.cumsum(counts)[:-1], axis=-1)
    means = np.stack([own.mean(axis=-1) for own in of_chains], axis=-1)
    centred = [own - own.mean(axis=-1, keepdims=True) for own in of_chains]
    across = np.linalg.qr(np.column_stack([np.sqrt(counts), np.eye(len(counts))[:, 1:]]))[0][:, 1:]
    between = ((means * np.sqrt(counts)) @ across).astype(traces.dtype)
    return [*centred, *np.split(between, len(counts) - 1, axis=-1)]


def _added(parts: list[Sums]) -> Sums:
    return Sums(*(sum(values[1:], start=values[0]) for values in zip(*parts, strict=True)))


def _judge(sums: Sums, draws: list[int]) -> dict[str, Any]:
    """Take variances and covariances of the shares, over pairs of different sequences.

    The squares of all products of traces add up to those of the draws' products: |Z Z^T| and
    |Z^T Z| are one norm.
    """
    chains = len(draws)
    starts = np.cumsum([0, *draws, *[1] * (chains - 2)])
    squares = np.add.reduceat(np.add.reduceat(sums.products**2, starts, axis=0), starts, axis=1)
    pairs = sums.traces**2 - sums.pairs_within
    with np.errstate(invalid="ignore", divide="ignore"):  # of constant losses: NaN
        means = (np.add.reduceat(sums.total**2, starts) - sums.total_within) / pairs
        covariances = (squares - sums.within) / pairs - np.outer(means, means)
        of_chains, of_means = covariances[:chains, :chains], covariances[chains:, chains:]
        noise = _noise(of_chains) + _noise(of_means)
        own = np.diagonal(of_chains)
        agreement = of_chains / np.sqrt(np.outer(own, own))
        return {
            "reliability": np.float64(1 - noise / covariances.sum()),
            "agreement": agreement,
        }


def _noise(covariances: np.ndarray) -> float:
    """Variance of the sum of shares that does not come again; NaN of a single one."""
    count = len(covariances)
    if count == 1:
        return float("nan")
    own = np.trace(covariances)
    return float(count / (count - 1) * (own - covariances.sum() / count))
