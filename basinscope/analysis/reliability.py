"""How far influences would come out again: the agreement of chains about them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import reduce
from typing import Any, Literal, NamedTuple

import numpy as np
import xarray as xr
from dask.delayed import delayed

from basinscope.analysis.bif import TRACES, BifOptions, Problem, cuts
from basinscope.analysis.graphs import arrays_in
from basinscope.analysis.memory import parse_memory_limit
from basinscope.analysis.plan import PAIRS_BYTES, Plan, plan_reliability
from basinscope.analysis.shares import noise_of, shares_of, without_lengths
from basinscope.analysis.stores import open_samples


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
    s_i of a kind, w_i of the draws each, differ by noise alone. Over the pairs of different
    sequences it gives their sum the variance that would not come again, as in Cronbach's alpha
    (Cronbach 1951, "Coefficient alpha and the internal structure of tests"), which has w_i = 1/m:

        noise = var(sum_i s_i) - sum_{i≠j} cov(s_i, s_j) / (1 - sum_i w_i²)
        reliability = 1 - (noise of both kinds) / var(influence)

    A correlation divides by the lengths of both traces, which have the same noise: to first order a
    share is s_i - r (a_i + b_i) / 2, with a_i and b_i its shares of the two squared lengths, and r
    the mean influence. Without it, losses that all rise and fall together would seem unreliable.

    Influences from as many other chains would correlate with these by about as much, and k times as
    many chains have the reliability k a / (1 + (k - 1) a), where these have a. Simulated chains of
    many kinds keep to that within 0.1. Beyond it are: fewer than ten pairs, and losses with rare
    high peaks (too low, by up to 0.2). What chains have in common counts as reliable, though it
    would not come again: the noise of batches that they share, where it moves them as much as their
    own; and the way up from the checkpoint, where draws of it are left in.

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
          chains, whose means differ in one direction only, and for a single pair
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
    kind, draws = problem.options.kind, problem.draws
    plan, blocks = plan_reliability(problem.size, limit, len(draws))
    plan.validate(limit)
    if blocks.copied:
        problem.traces.copy()

    parts: list[Any] = [
        delayed(_sums)(kind, compute_covariance, draws, *problem.traces.block(rows))
        for rows in (problem.rows_1[at] for at in cuts(len(problem.rows_1), blocks.output))
    ]
    total = reduce(delayed(_added), parts)  # one after another, so that few wait
    chains = len(draws)
    members = {"reliability": ((), np.float64), "agreement": ((chains, chains), np.float64)}
    found = arrays_in(delayed(_judge)(total, draws, compute_covariance), members)
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
    limit = parse_memory_limit(memory_limit)
    return plan_reliability(problem.size, limit, len(problem.draws))[0]


class Sums(NamedTuple):
    """What the variances of influences are made of, added up over sequences.

    Attributes
    ----------
    products : np.ndarray (draw, draw)
        Of the draws of traces with each other, over all traces but those without variance.
    weighted : np.ndarray (1 + share, draw)
        Sum of all traces, plain and times each share of their squared length.
    weights : np.ndarray (1 + share, 1 + share)
        Products of 1 and these shares with each other, over all traces.
    within : np.ndarray (1 + 2 share, 1 + 2 share)
        Products of 1, each share of an influence, and each share of the mean squared length of its
        two traces with each other, over the pairs within sequences.
    """

    products: np.ndarray
    weighted: np.ndarray
    weights: np.ndarray
    within: np.ndarray


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
    if len(problem.draws) < 2:
        raise ValueError(
            f"{problem.samples.name} has one chain, and reliability is how far chains agree: "
            "sample three or more"
        )
    if len(np.unique(problem.rows_1)) < max(2, len(problem.rows_1)):
        raise ValueError(
            "reliability is of influences between different sequences: give two or more, each once"
        )
    return problem


def _sums(kind: str, covariance: bool, draws: list[int], *block: Any) -> Sums:
    of_tokens = "sequence" if kind == "sequence" else "token"
    traces = TRACES[of_tokens](covariance, *block)
    traces = traces.reshape(len(traces), -1, traces.shape[-1])  # of one token, or of all
    lengths = [_squared_lengths(traces[at], draws) for at in _groups(traces, draws)]
    norms = np.concatenate(lengths, axis=1)
    if kind == "average":
        traces, norms = traces.mean(axis=1, keepdims=True), norms.mean(axis=2, keepdims=True)
    known = np.isfinite(norms).all(axis=0)
    if not known.all():
        traces[~known], norms[:, ~known] = 0, 0
    weights = np.concatenate([known[None], norms]).astype(traces.dtype)
    flat, flat_weights = traces.reshape(-1, traces.shape[-1]), weights.reshape(len(weights), -1)
    within = sum(_within(traces[at], weights[:, at], draws) for at in _groups(traces, draws))
    sums = (flat.T @ flat, flat_weights @ flat, flat_weights @ flat_weights.T, within)
    return Sums(*(np.asarray(values, np.float64) for values in sums))


def _groups(traces: np.ndarray, draws: list[int]) -> list[slice]:
    """Cut (sequence, trace, draw) so that little is copied, and few pairs are made, at once."""
    pairs = 8 * (4 * len(draws) - 1) * traces.shape[1] ** 2
    return cuts(len(traces), max(1, PAIRS_BYTES // max(pairs, traces[:1].nbytes)))


def _squared_lengths(traces: np.ndarray, draws: list[int]) -> np.ndarray:
    """Give each share of the traces' squared length, (share, sequence, trace)."""
    return np.stack([np.square(own).sum(axis=-1) for own in shares_of(traces, draws)])


def _within(traces: np.ndarray, weights: np.ndarray, draws: list[int]) -> np.ndarray:
    """Multiply all that is known of the pairs within sequences, a few pairs at a time."""
    shares = shares_of(traces, draws)
    count = 1 + 2 * len(shares)
    found = np.zeros((count, count))
    at_once = max(1, PAIRS_BYTES // (8 * count * len(traces) * traces.shape[1]))
    for at in cuts(traces.shape[1], at_once):
        both = weights[0, :, at, None] * weights[0, :, None]
        products = [own[:, at] @ own.swapaxes(1, 2) for own in shares]
        lengths = [(own[:, at, None] + own[:, None]) * both / 2 for own in weights[1:]]
        pairs = np.stack([both, *products, *lengths]).reshape(count, -1).astype(np.float64)
        found += pairs @ pairs.T
    return found


def _added(sums: Sums, others: Sums) -> Sums:
    return Sums(*(mine + other for mine, other in zip(sums, others, strict=True)))


def _judge(sums: Sums, draws: list[int], covariance: bool) -> dict[str, Any]:
    """Take variances and covariances of the shares, over pairs of different sequences."""
    chains, shares = len(draws), 2 * len(draws) - 1
    products = _of_all_pairs(sums, draws) - sums.within
    pairs = products[0, 0]
    with np.errstate(invalid="ignore", divide="ignore"):  # of constant losses, or one pair: NaN
        means = products[0, 1:] / pairs if pairs > 2 else np.full(2 * shares, np.nan)
        moments = products[1:, 1:] / pairs - np.outer(means, means)
        covariances = without_lengths(moments, 0.0 if covariance else means[:shares].sum())
        of_chains = covariances[:chains, :chains]
        own = np.diagonal(of_chains)
        return {
            "reliability": np.float64(1 - noise_of(covariances, draws) / covariances.sum()),
            "agreement": of_chains / np.sqrt(np.outer(own, own)),
        }


def _of_all_pairs(sums: Sums, draws: list[int]) -> np.ndarray:
    """Give what ``Sums.within`` is, over all pairs of traces.

    The squares of all products of traces add up to those of the draws' products: |Z Z^T| and
    |Z^T Z| are one norm.
    """
    weighted = shares_of(sums.weighted, draws)
    total, lengths = sums.weights[0, 0], sums.weights[0, 1:]
    found = np.empty_like(sums.within)
    one, influence, length = np.split(np.arange(len(found)), [1, 1 + len(lengths)])
    found[one, one] = total**2
    found[one, influence] = [np.square(own[0]).sum() for own in weighted]
    found[one, length] = total * lengths
    for a, rows in zip(influence, shares_of(sums.products, draws), strict=True):
        found[a, influence] = [np.square(block).sum() for block in shares_of(rows.T, draws)]
    found[np.ix_(influence, length)] = [own[1:] @ own[0] for own in weighted]
    of_both = total * sums.weights[1:, 1:] + np.outer(lengths, lengths)
    found[np.ix_(length, length)] = of_both / 2
    found[np.ix_(length, influence)] = found[np.ix_(influence, length)].T
    found[1:, 0] = found[0, 1:]
    return found
