"""Cross-entropy of a linear head and its gradients in float64."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tests.reference import cross_entropy
from tests.reference.cross_entropy import Array


class Gradients(NamedTuple):
    """Of sum(upstream * losses); ``slopes`` (N, V) is that of h W^T + b."""

    hidden: Array
    weight: Array
    bias: Array
    slopes: Array


def logits(
    hidden: Array,
    weight: Array,
    bias: Array | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Array:
    """cap tanh(z / cap) of z = scale (h W^T + b), for hidden (N, D) and weight (V, D)."""
    z = scale * (hidden @ weight.T + (0.0 if bias is None else bias))
    return z if softcap is None else softcap * np.tanh(z / softcap)


def losses(
    hidden: Array,
    weight: Array,
    targets: npt.NDArray[np.int64],
    bias: Array | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Array:
    """logsumexp(l) - l[target], (N,)."""
    return cross_entropy.losses(logits(hidden, weight, bias, scale, softcap), targets)


def gradients(
    hidden: Array,
    weight: Array,
    targets: npt.NDArray[np.int64],
    upstream: Array,
    bias: Array | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Gradients:
    """By the chain rule, with one upstream gradient per token."""
    values = logits(hidden, weight, bias, scale, softcap)
    slopes = cross_entropy.gradient(values, targets, upstream)
    if softcap is not None:
        slopes = slopes * (1 - (values / softcap) ** 2)
    slopes = slopes * scale
    return Gradients(slopes @ weight, slopes.T @ hidden, slopes.sum(0), slopes)
