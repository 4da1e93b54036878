"""How far chains can be trusted: split R-hat, effective sample size, Monte-Carlo error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    return {name: _judged(judge, values) for name, judge in judges.items()}


def _judged(judge: str, values: np.ndarray) -> float:
    """Ask arviz-stats about (chain, row)."""
    from arviz_stats.base import array_stats

    with np.errstate(invalid="ignore", divide="ignore"):  # a constant trace has no R-hat: NaN
        return float(getattr(array_stats, judge)(values, chain_axis=0, draw_axis=1))


@dataclass(frozen=True)
class SharedBatches:
    """Which batches all chains saw, and on which the loss at the checkpoint was taken.

    Attributes
    ----------
    steps : np.ndarray
        Step of each row of the traces.
    init_steps : int
        Steps' worth of batches, from the first on, behind the loss at the checkpoint.
    per_step : int
        Batches of one step (gradient accumulation).
    per_epoch : int or None
        Batches after which they come again; None if that is not known.
    """

    steps: np.ndarray
    init_steps: int
    per_step: int = 1
    per_epoch: int | None = None

    def spread(self, rows: int) -> float:
        """Variance of (mean over the first rows - mean at the checkpoint), of a batch's being 1."""
        seen = self._weights(self.steps[:rows])
        before = self._weights(np.arange(self.init_steps))
        length = max(len(seen), len(before))
        seen, before = (np.pad(w, (0, length - len(w))) for w in (seen, before))
        return float(np.square(seen - before).sum())

    def _weights(self, steps: np.ndarray) -> np.ndarray:
        batches = (steps[:, None] * self.per_step + np.arange(self.per_step)).ravel()
        if self.per_epoch:
            batches = batches % self.per_epoch
        return np.bincount(batches) / len(batches)


def error_of_rise(traces: Sequence[np.ndarray], batches: SharedBatches | None) -> float:
    """Standard error of the mean of traces above the loss at the checkpoint.

    Chains that see the same batches have two kinds of noise. Each chain's own, which is what is
    left of a trace once the mean over chains is taken off, averages out over chains and rows. The
    batches' noise is the same in all chains, and in the loss at the checkpoint as far as that was
    taken on the same batches: the variance of one batch, from neighbouring steps of the mean over
    chains, times the squared differences of the weights that batches have in either mean.

    Parameters
    ----------
    traces : sequence of np.ndarray (rows,)
    batches : SharedBatches or None
        None if chains see batches of their own.

    Returns
    -------
    float
        In the traces' unit. Of one chain alone, and of chains with batches of their own, the
        Monte-Carlo error of the mean.
    """
    rows = min(len(trace) for trace in traces)
    if rows < FEWEST_ROWS:
        return float("nan")
    values = np.stack([trace[:rows] for trace in traces])
    if batches is None or len(values) == 1:
        return _judged("mcse", values)
    mean = values.mean(axis=0)
    chains = len(values)
    own = _judged("mcse", values - mean) * np.sqrt(chains / (chains - 1))
    own_of_one_row = (values - mean).var() / (chains - 1)
    of_one_step = max(0.0, np.square(np.diff(mean)).mean() / 2 - own_of_one_row)
    shared = of_one_step * batches.per_step * batches.spread(rows)
    return float(np.sqrt(own**2 + shared))
