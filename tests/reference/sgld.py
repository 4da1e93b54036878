"""One SGLD update of one tensor and the nine metrics, in float64, term by term as specified."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclass
class Settings:
    lr: float
    n_beta: float
    localization: float = 0.0
    weight_decay: float = 0.0
    noise_level: float = 1.0
    bounding_box_size: float | None = None
    alpha: float | None = None
    eps: float | None = None


@dataclass
class Terms:
    """The terms of the update of one tensor, flattened: what the metrics are made of."""

    scaled_grad: Array
    unscaled_grad: Array
    localization: Array
    weight_decay: Array
    noise: Array
    distance: Array


def update(
    w: Array, g: Array, w0: Array, mask: Array, v: Array, xi: Array, s: Settings
) -> tuple[Array, Array, Terms]:
    """New weights, new second moment, and the terms. `mask` is 0 or 1; `xi` standard normal."""
    gain = np.ones_like(w)
    if s.alpha is not None and s.eps is not None:
        v = s.alpha * v + (1 - s.alpha) * g**2
        gain = 1 / (np.sqrt(v) + s.eps)
    half = s.lr / 2
    terms = Terms(
        scaled_grad=half * mask * gain * s.n_beta * g,
        unscaled_grad=half * s.n_beta * g,
        localization=half * mask * gain * s.localization * (w - w0),
        weight_decay=half * mask * gain * s.weight_decay * w,
        noise=np.sqrt(s.lr) * np.sqrt(gain) * mask * s.noise_level * xi,
        distance=w - w0,
    )
    new = w - terms.scaled_grad - terms.localization - terms.weight_decay + terms.noise
    if s.bounding_box_size is not None:
        boxed = np.clip(new, w0 - s.bounding_box_size, w0 + s.bounding_box_size)
        new = np.where(mask, boxed, w)
    return new, v, terms


def metrics(terms: list[Terms]) -> Array:
    """The nine diagnostics over all tensors."""

    def joined(name: str) -> Array:
        return np.concatenate([getattr(t, name).ravel() for t in terms] or [np.zeros(0)])

    norms = [
        np.sqrt(np.sum(joined(name) ** 2))
        for name in (
            "scaled_grad",
            "unscaled_grad",
            "localization",
            "weight_decay",
            "noise",
            "distance",
        )
    ]
    gradient, noise = joined("scaled_grad"), joined("noise")
    prior = joined("localization") + joined("weight_decay")
    return np.array([*norms, gradient @ prior, gradient @ noise, prior @ noise])
