"""Per-token cross-entropy and its gradient in float64."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def losses(logits: Array, targets: npt.NDArray[np.int64]) -> Array:
    """logsumexp(logits) - logits[target] over the last axis."""
    top = logits.max(axis=-1, keepdims=True)
    lse = np.log(np.exp(logits - top).sum(axis=-1)) + top[..., 0]
    return lse - np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]


def gradient(logits: Array, targets: npt.NDArray[np.int64], upstream: Array) -> Array:
    """(softmax - one hot) * upstream."""
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    softmax = exponentials / exponentials.sum(axis=-1, keepdims=True)
    one_hot = np.arange(logits.shape[-1]) == targets[..., None]
    return (softmax - one_hot) * upstream[..., None]
