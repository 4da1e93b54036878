"""Exact answers for Langevin sampling of losses whose Gibbs measure is known.

For L = ½ Σ h_i w_i², one step maps w_i to (1 - ε a_i / 2) w_i + ε γ w0_i / 2 + sqrt(ε) σ ξ with
a_i = nβ h_i + γ + λ: an autoregression, stationary for ε a_i < 4 with variance
σ² / (a_i (1 - ε a_i / 4)) around γ w0_i / a_i.
"""

from __future__ import annotations

import numpy as np


def quadratic_mean_loss(
    h: np.ndarray,
    *,
    lr: float,
    n_beta: float,
    localization: float = 0.0,
    weight_decay: float = 0.0,
    noise_level: float = 1.0,
    w0: np.ndarray | float = 0.0,
) -> float:
    """E[L] of the discretised chain's own stationary distribution."""
    a = n_beta * h + localization + weight_decay
    assert (lr * a < 4).all()
    variance = noise_level**2 / (a * (1 - lr * a / 4))
    return float(0.5 * (h * (variance + (localization * w0 / a) ** 2)).sum())


def power_llc(powers: np.ndarray) -> float:
    """nβ E[K] = Σ 1 / p_i for K = Σ c_i |w_i|^p_i, at any nβ and any c > 0."""
    return float((1.0 / powers).sum())
