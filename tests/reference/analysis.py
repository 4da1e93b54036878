"""Every estimate in float64, term by term as specified: plain, slow, and over whole arrays.

Losses are (chain, draw, sequence, token); samples are (sequence, token, sample).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


def loss_trace(losses: Array) -> Array:
    """Mean over sequences and tokens: (chain, step)."""
    return losses.astype(np.float64).mean((2, 3))


def llc_per_chain(losses: Array, init_loss: Array, n_beta: float) -> Array:
    """nβ (mean of the chain's losses - mean init_loss): (chain,)."""
    return n_beta * (loss_trace(losses).mean(1) - init_loss.astype(np.float64).mean())


def llc_scalar(losses: Array, init_loss: Array, n_beta: float) -> float:
    """nβ (mean of all losses - mean init_loss)."""
    return float(n_beta * (losses.astype(np.float64).mean() - init_loss.astype(np.float64).mean()))


def llc_token(losses: Array, init_loss: Array, n_beta: float) -> Array:
    """nβ (mean over chain, step and sequence - mean init_loss over chain): (token,)."""
    sampled = losses.astype(np.float64).mean((0, 1, 2))
    return n_beta * (sampled - init_loss.astype(np.float64).mean(0))


def llc_running(losses: Array, init_loss: Array, n_beta: float) -> Array:
    """nβ (mean of the chain's losses up to and with each step - mean init_loss): (chain, step)."""
    trace = loss_trace(losses)
    running = np.stack([trace[:, : step + 1].mean(1) for step in range(trace.shape[1])], 1)
    return n_beta * (running - init_loss.astype(np.float64).mean())


def llc_observable(losses: Array, before: Array, n_beta: float) -> float:
    """nβ (mean of all losses - mean of the losses ``before``)."""
    return float(n_beta * (losses.astype(np.float64).mean() - before.astype(np.float64).mean()))


def samples(losses: Array, chains: str) -> Array:
    """Chains one behind the other ("stack"), or their mean ("mean"): (sequence, token, sample)."""
    losses = losses.astype(np.float64)
    parts = list(losses) if chains == "stack" else [losses.sum(0) / len(losses)]
    return np.concatenate(parts).transpose(1, 2, 0)


def covariance(a: Array, b: Array) -> Array:
    """Σ (a - mean a) (b - mean b) / (n - 1) for all pairs of rows: (m, n), (k, n) -> (m, k)."""
    return (a - a.mean(1)[:, None]) @ (b - b.mean(1)[:, None]).T / (a.shape[1] - 1)


def correlation(a: Array, b: Array) -> Array:
    """Pearson correlation of all pairs of rows, NaN for a constant one: (m, k)."""
    scale_a, scale_b = (np.where(np.ptp(x, 1) > 0, x.std(1, ddof=1), np.nan) for x in (a, b))
    return covariance(a, b) / scale_a[:, None] / scale_b


def token_blocks(a: Array, b: Array, kind: str) -> Array:
    """Influence between the tokens of every two sequences: (sequence, sequence, token, token)."""
    between = {"correlation": correlation, "covariance": covariance}[kind]
    return np.array([[between(x, y) for y in b] for x in a])


def averaged_blocks(a: Array, b: Array, kind: str) -> Array:
    """Mean of each token block: (sequence, sequence)."""
    return token_blocks(a, b, kind).mean((2, 3))


def sequence_influence(a: Array, b: Array, kind: str) -> Array:
    """Influence between the mean losses of sequences: (sequence, sequence)."""
    between = {"correlation": correlation, "covariance": covariance}[kind]
    return between(a.mean(1), b.mean(1))


def top_partners(influences: Array, itself: int, k: int, sign: int) -> Integers:
    """The k candidates of greatest influence of one sign on a token, strongest first, -1 if none.

    ``influences (candidate)``; ``itself`` is the token's own place among the candidates, or -1.
    """
    order = np.argsort(-sign * influences, kind="stable")
    found = [i for i in order if i != itself and sign * influences[i] > 0][:k]
    return np.array(found + [-1] * (k - len(found)))


def susceptibility(
    task: Array, losses: Array, full_task: Array, full_losses: Array, init_loss: Array
) -> Array:
    """E[φP] - E[φℓ] - E[φ] (mean full_task - E[full ℓ]), P mean task, φ = P - mean init_loss.

    E is over chain and draw; ``init_loss`` is that of the unrestricted run: (sequence, token).
    """
    task, losses = task.astype(np.float64), losses.astype(np.float64)
    full_task, full_losses = full_task.astype(np.float64), full_losses.astype(np.float64)
    pressure = task.mean((2, 3))
    phi = pressure - init_loss.astype(np.float64).mean()
    delta = full_task.mean() - full_losses.mean((0, 1))
    weighted = (phi[:, :, None, None] * losses).mean((0, 1))
    return (phi * pressure).mean() - weighted - phi.mean() * delta
