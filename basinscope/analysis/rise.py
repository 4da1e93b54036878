"""The standard error of how far the losses of chains have risen above that at the checkpoint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from basinscope.analysis.diagnostics import FEWEST_ROWS, judged


@dataclass(frozen=True)
class Batches:
    """Which batches the rows of traces saw, and on which the loss at the checkpoint was taken.

    A batch goes by its place in the order in which a chain sees batches.

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
    shared : bool
        Whether all chains see the same ones.
    """

    steps: np.ndarray
    init_steps: int
    per_step: int = 1
    per_epoch: int | None = None
    shared: bool = True

    def seen(self, rows: int) -> np.ndarray:
        """Give the batches of the first rows, (row, per_step)."""
        return self._of_steps(self.steps[:rows])

    def at_init(self) -> np.ndarray:
        """Give the batches behind the loss at the checkpoint, (init_steps, per_step)."""
        return self._of_steps(np.arange(self.init_steps))

    def weights(self, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Give each batch's share of the mean of the first rows, and of that at the checkpoint."""
        seen, at_init = self.seen(rows).ravel(), self.at_init().ravel()
        most = 1 + max(int(places.max(initial=0)) for places in (seen, at_init))
        of_rows = np.bincount(seen, minlength=most) / len(seen)
        of_start = np.bincount(at_init, minlength=most) / max(1, len(at_init))
        return of_rows, of_start

    def _of_steps(self, steps: np.ndarray) -> np.ndarray:
        batches = steps[:, None] * self.per_step + np.arange(self.per_step)
        return batches % self.per_epoch if self.per_epoch else batches


def error_of_rise(
    traces: Sequence[np.ndarray],
    batches: Batches | None,
    init_losses: np.ndarray | None = None,
) -> float:
    """Standard error of the mean of traces above the loss at the checkpoint.

    Each chain's own noise averages out over chains and rows. So does the noise of batches where
    chains see batches of their own. Where they see the same ones, it is what neighbouring rows of
    the mean over chains differ by, beyond what the chains' own noise makes.

    The loss at the checkpoint has noise of batches too. It cancels as far as rows saw the same
    batches, and these differ by as much there as where the chains are: β times as much, which is
    the slope of the traces' differences between neighbouring rows in those at the checkpoint. With
    u and v, the shares of batches in the mean of the rows and in that at the checkpoint, the
    differences f at the checkpoint bring in the variance of Σ (β u - v) f; what batches differ by
    where the chains are, beyond β f, that of Σ u times it. Batches are drawn from an epoch without
    replacement.

    Parameters
    ----------
    traces : sequence of np.ndarray (rows,)
    batches : Batches or None
        None if it is not known which ones the rows saw.
    init_losses : np.ndarray (1 or chain, init_batch), optional
        Loss of each batch behind the loss at the checkpoint, in all chains or in each. Without it,
        batches that chains share are taken to differ by as much at the checkpoint as where the
        chains are; otherwise the error is only that of the mean of the traces.

    Returns
    -------
    float
        In the traces' unit; NaN where chains are shorter than four rows.
    """
    rows = min(len(trace) for trace in traces)
    if rows < FEWEST_ROWS:
        return float("nan")
    values = np.stack([trace[:rows] for trace in traces])
    if batches is None:
        return judged("mcse", values)
    of_rows, of_start = batches.weights(rows)
    known = of_start > 0
    if init_losses is None or known.sum() < 2:
        own, of_one_batch = _noise(values, batches)
        return float(np.sqrt(own**2 + of_one_batch * np.square(of_rows - of_start).sum()))

    effects = np.zeros((len(init_losses), len(known)))
    effects[:, batches.at_init().ravel()] = init_losses
    effects[:, known] -= effects[:, known].mean()
    if batches.shared:
        effects = effects.mean(axis=0, keepdims=True)
    at_start = effects[:, known].var(axis=1, ddof=1).mean()
    seen = batches.seen(rows)
    explained = effects[:, seen].mean(axis=-1)
    slope = _slope(values, explained)
    own, of_one_batch = _noise(values - slope * explained, batches)
    if not batches.shared or len(values) == 1:
        kept = np.where(known, slope * of_rows - of_start, 0.0)  # what others bring in is in `own`
        at_start *= _spread(kept, batches.per_epoch) / len(values)
        return float(np.sqrt(own**2 + at_start))

    if not known[seen].any() and at_start:
        slope = np.sqrt(of_one_batch / at_start)  # as much of it as there can be
    of_others = (1 - known[seen].mean()) * slope**2 * at_start
    new = max(0.0, of_one_batch - of_others) * _spread(of_rows, batches.per_epoch)
    at_start *= _spread(slope * of_rows - of_start, batches.per_epoch)
    return float(np.sqrt(own**2 + new + at_start))


def drift_of(traces: Sequence[np.ndarray], shared: bool) -> tuple[float, float]:
    """Mean of the second half of traces minus that of the first, and its standard error.

    Over the rows that all chains have. The error is the drift's own: noise of batches that cancels
    between the chains and the loss at the checkpoint does not cancel between the halves.

    Parameters
    ----------
    traces : sequence of np.ndarray (rows,)
    shared : bool
        Whether all chains see the same batches.

    Returns
    -------
    tuple of float
        In the traces' unit; NaN where there are too few rows.
    """
    rows = min(map(len, traces))
    middle = -(-rows // 2)
    if middle == rows:
        return float("nan"), float("nan")
    values = np.stack([trace[:rows] for trace in traces])
    halves = values[:, :middle], values[:, middle:]
    errors = [error_of_mean(list(half), shared) for half in halves]
    return float(halves[1].mean() - halves[0].mean()), math.hypot(*errors)


def error_of_mean(traces: Sequence[np.ndarray], shared: bool) -> float:
    """Standard error of the mean of traces, whatever the loss at the checkpoint."""
    batches = Batches(np.arange(min(map(len, traces))), init_steps=0, shared=shared)
    return error_of_rise(traces, batches)


def _noise(values: np.ndarray, batches: Batches) -> tuple[float, float]:
    """Give the error that chains' own noise makes, and one batch's variance if they share it.

    Noise of batches that chains do not share is their own.
    """
    own = error_of_chains(values)
    if not batches.shared or len(values) == 1:
        return own, 0.0
    mean = values.mean(axis=0)
    own_of_one_row = np.square(np.diff(values - mean)).mean() / 2 / (len(values) - 1)
    of_one_row = max(0.0, np.square(np.diff(mean)).mean() / 2 - own_of_one_row)
    return own, of_one_row * batches.per_step


def error_of_chains(values: np.ndarray) -> float:
    """Standard error of the mean of (chain, row), as far as it is each chain's own noise.

    That is all of it where every row is of the same sequences, as an observable's are. NaN where
    there are fewer than four rows.
    """
    chains, rows = values.shape
    if rows < FEWEST_ROWS:
        return float("nan")
    if chains == 1:
        return judged("mcse", values)
    mean = values.mean(axis=0)  # the way up from the checkpoint too, which is no noise
    return judged("mcse", values - mean) * float(np.sqrt(chains / (chains - 1)))


def _slope(values: np.ndarray, explained: np.ndarray) -> float:
    """Regress differences of neighbouring rows, (chain, row) and (1 or chain, row)."""
    change, by = np.diff(values), np.diff(explained)
    of_both = np.broadcast_to(by, change.shape)
    return float((change * of_both).sum() / (np.square(of_both).sum() or 1.0))


def _spread(weights: np.ndarray, per_epoch: int | None) -> float:
    """Variance of a weighted sum over batches, drawn without replacement, of one's being 1."""
    of_all = weights.sum() ** 2 / per_epoch if per_epoch else 0.0
    return max(0.0, float(np.square(weights).sum() - of_all))
