"""Arithmetic of the logit lens on one block of rows, a panel of the vocabulary at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

ROWS = 256  # of the stream, multiplied with a panel at once
PANEL = 8192  # tokens of the vocabulary; 256 x 8192 logits are 8 MiB
MEASURES = {
    "entropy": ("entropy of the prediction", "nats"),
    "kl_to_final": ("KL divergence of the layer's prediction from the last one's", "nats"),
    "cross_entropy": ("cross-entropy of the next token", "nats"),
    "rank": ("number of tokens with a larger logit than the next one", "1"),
}

Array = npt.NDArray[Any]
Scores = Callable[[Array, slice], Array]  # rows (row, d_model), tokens -> logits (row, token)


def normalized(
    x: Array, norm: str, eps: float, weight: Array | None, mean_square: Array | None = None
) -> Array:
    """Apply a norm without its bias, (..., d_model), in float32.

    Parameters
    ----------
    x : ndarray (..., d_model)
    norm : {"layer", "rms", "none"}
        "layer" takes the mean of `x` away.
    mean_square : ndarray (...,), optional
        What to divide by the root of: the variance ("layer") or the mean square ("rms") of another
        stream. Default: that of `x`.
    """
    x = np.asarray(x, np.float32)
    if norm == "layer":
        x = x - x.mean(-1, keepdims=True, dtype=np.float64).astype(np.float32)
    if norm != "none":
        if mean_square is None:
            mean_square = np.einsum("...d,...d->...", x, x) / np.float32(x.shape[-1])
        root = np.sqrt(np.asarray(mean_square, np.float64) + eps)
        x = x * (1 / root)[..., None].astype(np.float32)
    return x if weight is None else x * weight


def softmax(logits: Array) -> Array:
    """Exponentiate and normalise over the last axis, in place."""
    logits -= logits.max(-1, keepdims=True)
    np.exp(logits, out=logits)
    logits /= logits.sum(-1, keepdims=True, dtype=np.float64).astype(logits.dtype)
    return logits


class RunningSoftmax:
    """Log-sum-exp and entropy of rows of logits that come in panels; sums are float64."""

    def __init__(self, rows: int) -> None:
        self.top = np.full(rows, -np.inf, np.float32)
        self.total = np.zeros(rows)  # of exp(z - top)
        self.weighted = np.zeros(rows)  # of exp(z - top) (z - top)

    def add(self, logits: Array) -> tuple[Array, Array]:
        """Take a panel (row, token).

        Returns
        -------
        exponentials : ndarray (row, token)
            exp(z - top), with the largest logit so far.
        shrink : ndarray (row,)
            What sums of earlier exponentials are to be multiplied with.
        """
        top = np.maximum(self.top, logits.max(1))
        step = np.where(np.isfinite(self.top), self.top - top, 0).astype(np.float64)
        shrink = np.where(np.isfinite(self.top), np.exp(step), 0.0)
        shifted = logits - top[:, None]
        exponentials = np.exp(shifted)
        self.weighted = shrink * (self.weighted + step * self.total)
        self.total = shrink * self.total + exponentials.sum(1, dtype=np.float64)
        shifted *= exponentials
        self.weighted += shifted.sum(1, dtype=np.float64)
        self.top = top
        return exponentials, shrink

    @property
    def log_sum(self) -> Array:
        """Log-sum-exp of each row, in nats."""
        return self.top + np.log(self.total)

    @property
    def entropy(self) -> Array:
        """Entropy of each row's softmax, in nats."""
        return np.log(self.total) - self.weighted / self.total


def row_parts(count: int) -> list[slice]:
    """Cut rows into what is multiplied at once."""
    return [slice(at, at + ROWS) for at in range(0, count, ROWS)]


def panels(vocabulary: int) -> list[slice]:
    """Cut the vocabulary into what is multiplied at once."""
    return [slice(at, min(at + PANEL, vocabulary)) for at in range(0, vocabulary, PANEL)]


def top_tokens(rows: Array, scores: Scores, vocabulary: int, k: int) -> tuple[Array, Array, Array]:
    """Find the k largest logits of each row, and their probabilities.

    Returns
    -------
    tokens, logits, probabilities : ndarray (row, k)
        Largest first; equal ones in the order of their ids.
    """
    count = len(rows)
    ids = np.zeros((count, 0), np.int64)
    best = np.zeros((count, 0), np.float32)
    sums = RunningSoftmax(count)
    for tokens in panels(vocabulary):
        logits = scores(rows, tokens)
        sums.add(logits)
        chosen = _largest(logits, k)
        ids = np.concatenate([ids, chosen + tokens.start], axis=1)
        best = np.concatenate([best, np.take_along_axis(logits, chosen, 1)], axis=1)
        order = np.lexsort((ids, -best))[:, :k]
        ids, best = np.take_along_axis(ids, order, 1), np.take_along_axis(best, order, 1)
    return ids, best, np.exp(best - sums.log_sum[:, None]).astype(np.float32)


def _largest(logits: Array, k: int) -> Array:
    """Places of the k largest of each row; of equal ones at the edge, the first."""
    if k >= logits.shape[1]:
        return np.broadcast_to(np.arange(logits.shape[1]), logits.shape)
    edge = -np.partition(-logits, k - 1, axis=1)[:, k - 1 : k]
    above = logits > edge
    missing = k - above.sum(1, keepdims=True)
    at_edge = logits == edge
    kept = above | (at_edge & (np.cumsum(at_edge, axis=1) <= missing))
    return np.nonzero(kept)[1].reshape(-1, k)


def measures(
    layers: Sequence[Array],
    scores: Scores,
    vocabulary: int,
    final: int | None,
    targets: Array,
    target_logits: Sequence[Array],
) -> Array:
    """Measure the predictions of several layers for the same rows.

    Parameters
    ----------
    layers : sequence of ndarray (row, d_model)
    final : int or None
        Which of the layers the others are compared with.
    targets : ndarray (row,)
        The token that follows; -1 for none.
    target_logits : sequence of ndarray (row,)
        By layer, its logit.

    Returns
    -------
    ndarray (4, row, layer), float64
        Entropy; KL divergence of the layer from the final one, sum p_final (log p_final - log p);
        cross-entropy of the target; how many tokens have a larger logit than it. The first three
        in nats; NaN where there is no final layer, no target.
    """
    count, rows = len(layers), len(targets)
    sums = [RunningSoftmax(rows) for _ in layers]
    gaps = np.zeros((count, rows))  # sum over tokens of exp(z_final - top) (z_final - z)
    above = np.zeros((count, rows))
    order = sorted(range(count), key=lambda layer: layer != final)  # the others need the final one
    for tokens in panels(vocabulary):
        inside = np.flatnonzero((targets >= tokens.start) & (targets < tokens.stop))
        for layer in order:
            logits = scores(layers[layer], tokens)
            larger = logits > target_logits[layer][:, None]
            larger[inside, targets[inside] - tokens.start] = False  # it was rounded otherwise there
            above[layer] += larger.sum(1)
            exponentials, shrink = sums[layer].add(logits)
            if layer == final:
                of_final, weights, shrunk = logits, exponentials, shrink
            elif final is not None:
                gap = (of_final - logits) * weights
                gaps[layer] = shrunk * gaps[layer] + gap.sum(1, dtype=np.float64)
    logs = np.stack([running.log_sum for running in sums])
    divergence = np.full((count, rows), np.nan)
    if final is not None:
        divergence = np.maximum(gaps / sums[final].total - logs[final] + logs, 0)
    known = targets >= 0
    found = [
        np.stack([running.entropy for running in sums]),
        divergence,
        np.where(known, logs - np.stack(list(target_logits)), np.nan),
        np.where(known, above, np.nan),
    ]
    return np.stack(found).swapaxes(1, 2)
