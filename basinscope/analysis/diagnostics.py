"""How far chains can be trusted: split R-hat, effective sample size, Monte-Carlo error."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

FEWEST_ROWS = 4  # of a chain; fewer cannot be split and compared


def diagnose_trace(traces: Sequence[np.ndarray]) -> dict[str, float]:
    """Judge traces of chains, over as many rows as all of them have.

    Rank-normalised split R-hat, bulk effective sample size and the Monte-Carlo standard error of
    the mean after Vehtari et al. (2021), "Rank-normalization, folding, and localization",
    arXiv:1903.08008, as arviz-stats computes them, for chains that are independent.

    Returns
    -------
    dict
        ``rhat``, ``ess_bulk``, ``mcse_mean``; NaN where chains are shorter than four rows.
    """
    shortest = min(len(trace) for trace in traces)
    if shortest < FEWEST_ROWS:
        return dict.fromkeys(("rhat", "ess_bulk", "mcse_mean"), float("nan"))
    values = np.stack([trace[:shortest] for trace in traces])
    judges = {"rhat": "rhat", "ess_bulk": "ess", "mcse_mean": "mcse"}
    return {name: judged(judge, values) for name, judge in judges.items()}


def judged(judge: str, values: np.ndarray) -> float:
    """Ask arviz-stats for the "rhat", "ess" or "mcse" of (chain, row)."""
    from arviz_stats.base import array_stats

    with np.errstate(invalid="ignore", divide="ignore"):  # a constant trace has no R-hat: NaN
        return float(getattr(array_stats, judge)(values, chain_axis=0, draw_axis=1))
