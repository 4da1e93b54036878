"""Influences fall into independent shares, by which what is noise of them can be told."""

from __future__ import annotations

import numpy as np


def shares_of(traces: np.ndarray, draws: list[int]) -> list[np.ndarray]:
    """Turn the draws of traces so that they fall into independent shares of an influence.

    One of each chain, about its own mean; and for the means of C chains, which a mean of all has
    been taken from, C - 1 directions in which they differ. An influence is the sum of the shares'
    products.

    Parameters
    ----------
    traces : np.ndarray (..., draw)
        Of the stacked draws of all chains.
    draws : list of int
        Of each chain.
    """
    counts = np.array(draws)
    of_chains = np.split(traces, np.cumsum(counts)[:-1], axis=-1)
    means = np.stack([own.mean(axis=-1) for own in of_chains], axis=-1)
    centred = [own - own.mean(axis=-1, keepdims=True) for own in of_chains]
    across = np.linalg.qr(np.column_stack([np.sqrt(counts), np.eye(len(counts))[:, 1:]]))[0][:, 1:]
    between = ((means * np.sqrt(counts)) @ across).astype(traces.dtype)
    return [*centred, *np.split(between, len(counts) - 1, axis=-1)]


def without_lengths(moments: np.ndarray, mean: float) -> np.ndarray:
    """Give covariances of shares of correlations from those of shares of products.

    A correlation is a product divided by the lengths of its traces, which have the same noise: to
    first order a share of r is that of the product less r times that of the mean squared length.

    Parameters
    ----------
    moments : np.ndarray (2 share, 2 share)
        Covariances of the shares of products, and of those of the mean squared length of a pair.
    mean : float
        Of the correlations; 0 for covariances, which nothing is divided by.
    """
    shares = len(moments) // 2
    adjusted = np.hstack([np.eye(shares), -mean * np.eye(shares)])
    return adjusted @ moments @ adjusted.T


def noise_of(covariances: np.ndarray, draws: list[int]) -> float:
    """Variance of the sum of all shares that does not come again; NaN for fewer than three chains.

    Parameters
    ----------
    covariances : np.ndarray (share, share)
        Of the shares of :func:`shares_of`, over pairs of traces.
    draws : list of int
    """
    chains = len(draws)
    of_chains, of_means = covariances[:chains, :chains], covariances[chains:, chains:]
    return _of_a_kind(of_chains, draws) + _of_a_kind(of_means, [1] * (chains - 1))


def _of_a_kind(covariances: np.ndarray, draws: list[int]) -> float:
    """Noise of the sum of shares that differ by nothing else; NaN of a single one.

    Each share has as much of what comes again as it has draws.
    """
    sizes = np.array(draws) / sum(draws)
    alike = covariances.sum() - np.trace(covariances)
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(covariances.sum() - alike / (1 - np.square(sizes).sum()))
