"""The error of the rise above the checkpoint, against the spread of repeated runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from basinscope.analysis.diagnostics import diagnose_trace
from basinscope.analysis.rise import Batches, error_of_chains, error_of_rise

RUNS = 200  # give their spread to 5%; an error may be off by a fifth, four times that


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    ("at_init", "left", "new"),
    [(0.5, 1.0, 0.0), (0.5, 0.1, 0.0), (0.1, 1.0, 0.5), (0.5, 0.5, 0.2)],
    ids=["as at the checkpoint", "less than there", "more than there", "other than there"],
)
@pytest.mark.parametrize(
    "sizes",
    [
        {"steps": 100, "init_steps": 100},
        {"steps": 200, "init_steps": 12},
        {"steps": 100, "init_steps": 32, "burn_in": 40, "per_step": 2},
        {"steps": 150, "init_steps": 20, "per_epoch": 60},
        {"steps": 120, "init_steps": 32, "per_epoch": 20},
    ],
    ids=lambda sizes: " ".join(f"{name}={value}" for name, value in sizes.items()),
)
def test_the_error_is_that_of_repeated_runs(
    sizes: dict[str, int], at_init: float, left: float, new: float, shared: bool
) -> None:
    """Also where batches differ by more or less where the chains are than at the checkpoint.

    Chains that see a data set several times, each in its own order, miss less than their traces
    show: nothing of the batches.
    """
    ratio = error_over_spread((at_init, left, new), shared=shared, **sizes)
    assert 0.8 < ratio < (1.6 if "per_epoch" in sizes and not shared else 1.25)


@pytest.mark.parametrize(
    "sizes",
    [
        {"steps": 100, "init_steps": 100},
        {"steps": 100, "init_steps": 25},
        {"steps": 100, "init_steps": 32, "burn_in": 40, "per_step": 2},
        {"steps": 150, "init_steps": 20, "per_epoch": 60},
        {"steps": 300, "init_steps": 30, "memory": 0.95},
    ],
    ids=lambda sizes: " ".join(f"{name}={value}" for name, value in sizes.items()),
)
def test_without_batches_losses_they_differ_as_much_at_the_checkpoint(
    sizes: dict[str, Any],
) -> None:
    assert 0.8 < error_over_spread((0.5, 1.0, 0.0), known=False, **sizes) < 1.25


@pytest.mark.parametrize("chains", [1, 2, 4])
@pytest.mark.parametrize("memory", [0.0, 0.8])
def test_chains_own_noise_is_that_of_repeated_runs(chains: int, memory: float) -> None:
    """Noise with a memory, and for several chains a way up that all of them take."""
    rng = np.random.default_rng(5)
    rows, means, errors = 200, [], []
    way_up = 5 * (1 - np.exp(-np.arange(rows) / 30)) * (chains > 1)
    for _ in range(RUNS):
        noise = rng.standard_normal((chains, rows + 50))
        for row in range(1, rows + 50):
            noise[:, row] += memory * noise[:, row - 1]
        values = way_up + noise[:, 50:]
        means.append(values.mean())
        errors.append(error_of_chains(values))
    ratio = np.sqrt(np.mean(np.square(errors))) / np.std(means)
    assert 0.8 < ratio < 1.25


def test_too_few_rows_have_no_error() -> None:
    assert np.isnan(error_of_chains(np.ones((2, 3))))


def error_over_spread(
    of_batches: tuple[float, float, float], known: bool = True, **settings: Any
) -> float:
    """Divide the error, over many runs, by what they miss; both as root mean squares.

    Parameters
    ----------
    of_batches
        ``at_init``, ``left`` and ``new`` of :func:`run`.
    known
        Whether the error is told the batches' losses at the checkpoint.
    """
    rng = np.random.default_rng(2)
    misses, errors = [], []
    for _ in range(RUNS):
        traces, batches, init_losses, miss = run(rng, *of_batches, **settings)
        misses.append(miss)
        errors.append(error_of_rise(traces, batches, init_losses if known else None))
    return float(np.sqrt(np.mean(np.square(errors)) / np.mean(np.square(misses))))


def run(
    rng: np.random.Generator,
    at_init: float,
    left: float,
    new: float,
    *,
    steps: int,
    init_steps: int,
    burn_in: int = 0,
    per_step: int = 1,
    per_epoch: int | None = None,
    shared: bool = True,
    memory: float = 0.5,
    chains: int = 4,
) -> tuple[list[np.ndarray], Batches, np.ndarray, float]:
    """Make traces of chains that mix slowly, over batches that differ by ``at_init`` at the start.

    Where the chains are, ``left`` of that is left, and batches differ by ``new`` besides.

    Returns
    -------
    traces, batches, init_losses
        As :func:`error_of_rise` takes them.
    miss : float
        Mean of the traces less that at the checkpoint, less what it is without any noise.
    """
    count = per_epoch or 20 * steps * per_step
    at_start = at_init * rng.standard_normal(count)
    where = left * at_start + new * rng.standard_normal(count)
    orders = [rng.permutation(count) for _ in range(1 if shared else chains)]
    first = np.stack([order[np.arange(init_steps * per_step) % count] for order in orders])
    traces = []
    for chain in range(chains):
        order = orders[chain % len(orders)]
        seen = where[order[np.arange(steps * per_step) % count]].reshape(steps, per_step).mean(1)
        own = 0.2 * rng.standard_normal(steps)
        for step in range(1, steps):
            own[step] += memory * own[step - 1]
        traces.append((3 + seen + own)[burn_in:])
    init_losses = at_start[first]
    batches = Batches(np.arange(burn_in, steps), init_steps, per_step, per_epoch, shared)
    rise = np.mean(traces) - init_losses.mean()
    return traces, batches, init_losses, float(rise - (3 + where.mean() - at_start.mean()))


def test_one_chain_alone_and_unknown_batches_have_the_plain_error() -> None:
    traces = list(np.random.default_rng(3).standard_normal((4, 200)))
    plain = diagnose_trace(traces)["mcse_mean"]
    assert error_of_rise(traces, None) == plain
    alone = Batches(np.arange(200), 32)
    assert error_of_rise(traces[:1], alone) == diagnose_trace(traces[:1])["mcse_mean"]
    of_one = np.array([[2.0]])  # the spread of one batch is not known
    assert error_of_rise(traces[:1], Batches(np.arange(200), 1), of_one) == error_of_rise(
        traces[:1], alone
    )


def test_the_way_that_all_chains_go_is_no_noise() -> None:
    """Whether they share batches or not."""
    traces = np.random.default_rng(3).standard_normal((4, 200))
    plain = diagnose_trace(list(traces))["mcse_mean"]
    rising = list(traces + 20 * (1 - np.exp(-np.arange(200) / 30)))
    assert diagnose_trace(rising)["mcse_mean"] > 5 * plain
    for shared in (True, False):
        found = error_of_rise(rising, Batches(np.arange(200), 200, shared=shared))
        assert 0.8 * plain < found < 1.25 * plain
