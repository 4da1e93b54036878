"""The logit lens in float64, one vector at a time."""

from __future__ import annotations

from typing import Any

import numpy as np


def logits(x: np.ndarray, unembedding: Any, *, apply_norm: bool = True) -> np.ndarray:
    """Logits (vocab,) of one residual stream (d_model,), read as if it were the last."""
    x = x.astype(np.float64)
    if apply_norm:
        x = _over_its_size(x, x, unembedding)
        if unembedding.norm_bias is not None:
            x = x + unembedding.norm_bias
    z = unembedding.weight.astype(np.float64) @ x
    if unembedding.bias is not None:
        z = z + unembedding.bias
    z = unembedding.scale * z
    return z if unembedding.softcap is None else unembedding.softcap * np.tanh(
        z / unembedding.softcap
    )  # fmt: skip


def share(x: np.ndarray, final: np.ndarray, unembedding: Any) -> np.ndarray:
    """Share (vocab,) in the logits of what `x` (d_model,) adds to the last stream `final`."""
    part = _over_its_size(x.astype(np.float64), final.astype(np.float64), unembedding)
    return unembedding.scale * (unembedding.weight.astype(np.float64) @ part)


def _over_its_size(x: np.ndarray, stream: np.ndarray, unembedding: Any) -> np.ndarray:
    if unembedding.norm == "layer":
        x, stream = x - x.mean(), stream - stream.mean()
    if unembedding.norm != "none":
        x = x / np.sqrt((stream**2).mean() + unembedding.eps)
    return x if unembedding.norm_weight is None else x * unembedding.norm_weight


def probabilities(z: np.ndarray) -> np.ndarray:
    """Softmax of one row of logits."""
    e = np.exp(z - z.max())
    return e / e.sum()


def measures(z: np.ndarray, final: np.ndarray, target: int) -> tuple[float, float, float, int]:
    """Entropy, divergence of `z` from `final`, cross-entropy and rank of the target."""
    p, q = probabilities(z), probabilities(final)
    return (
        float(-(p * np.log(p)).sum()),
        float((q * np.log(q / p)).sum()),
        float(-np.log(p[target])),
        int((z > z[target]).sum()),
    )
