"""Figures of a store: the chains' losses, the LLC as it settles, where single tokens move.

Every function returns a `matplotlib.figure.Figure` of its own; no global state, no display.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 144
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")  # Okabe and Ito's
INK = "#333333"
SMOOTHED_SHARE = 1 / 10  # of a trace, averaged for the thick line
MAX_BINS = 80


def save_figures(tree: xr.DataTree, out: Path, *, burn_in: int = 0) -> list[Path]:
    """Draw every figure of a store and write them as PNG files.

    Parameters
    ----------
    tree
        A store of `basinscope.sample`, opened.
    out
        Folder for the files; made when missing.
    burn_in
        Steps to leave out at the start of every chain.

    Returns
    -------
    list of Path
        The files, in the order loss traces, running LLC, token loss shift (where the store has
        observables).
    """
    from basinscope.analysis.llc import compute_llc

    llc = compute_llc(tree, burn_in=burn_in).compute()
    figures = {"loss_traces": loss_traces(llc), "running_llc": running_llc(llc)}
    if observables_of(tree):
        figures["token_loss_shift"] = token_loss_shift(tree, burn_in=burn_in)
    out.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(out / f"{name}.png", dpi=DPI)
    return [out / f"{name}.png" for name in figures]


def loss_traces(llc: xr.Dataset) -> Figure:
    """Draw each chain's loss over its steps, with the checkpoint's loss as a line.

    Parameters
    ----------
    llc
        As `basinscope.compute_llc` returns it: ``loss_trace (chain, step)`` and ``init_loss``, in
        nats per token.

    Returns
    -------
    Figure
        Thin lines are the losses, thick ones their running mean (one tenth of the trace wide).
    """
    figure, (axes,) = _canvas("Loss along the chains")
    trace = _trace(llc)
    steps = 1 + _numbers(llc)
    width = max(1, round(trace.shape[1] * SMOOTHED_SHARE))
    for chain, colour, losses in _by_chain(llc, trace):
        smoothed = np.convolve(losses, np.full(width, 1 / width), mode="valid")
        axes.plot(steps, losses, color=colour, alpha=0.3, linewidth=0.8, gid=f"loss {chain}")
        axes.plot(
            steps[width - 1 :],
            smoothed,
            color=colour,
            linewidth=1.8,
            label=f"chain {chain}",
            gid=f"smoothed {chain}",
        )
    axes.axhline(
        float(llc.init_loss), color=INK, linestyle="--", linewidth=1.2, label="at the checkpoint"
    )
    axes.set(
        xlabel=llc.loss_trace.dims[1],
        ylabel="loss (nats per token)",
        xlim=(steps[0], max(steps[0] + 1, steps[-1])),
    )
    axes.set_title(f"thin: each step; thick: mean of {width} steps", loc="left", fontsize=10)
    _legend_below(figure, axes)
    return figure


def running_llc(llc: xr.Dataset) -> Figure:
    """Draw the LLC estimate from the first steps alone, as their number grows.

    Parameters
    ----------
    llc
        As `basinscope.compute_llc` returns it: ``loss_trace (chain, step)``, ``init_loss`` and
        ``n_beta``.

    Returns
    -------
    Figure
        A line per chain, their mean, and a band of one standard deviation over chains: their
        spread, which is not the standard error. The last points are ``llc_per_chain``, ``llc_mean``
        and ``llc_mean`` ± ``llc_std``.
    """
    figure, (axes,) = _canvas("Local learning coefficient (LLC)")
    trace = _trace(llc)
    steps = np.arange(1, trace.shape[1] + 1)
    estimates = float(llc.n_beta) * (np.cumsum(trace, axis=1) / steps - float(llc.init_loss))
    mean, spread = estimates.mean(axis=0), estimates.std(axis=0)
    axes.fill_between(steps, mean - spread, mean + spread, color=INK, alpha=0.12, linewidth=0)
    for chain, colour, estimate in _by_chain(llc, estimates):
        axes.plot(
            steps, estimate, color=colour, linewidth=1.2, label=f"chain {chain}", gid=f"llc {chain}"
        )
    axes.plot(steps, mean, color=INK, linewidth=2, label=f"mean: {mean[-1]:.1f}")
    axes.axhline(0, color=INK, linewidth=0.6)
    axes.set_title(
        f"band: spread between chains (std {spread[-1]:.1f} at the end)", loc="left", fontsize=10
    )
    name, before = llc.loss_trace.dims[1], int(_numbers(llc)[0])
    skipped = f", after the first {before}" if before else ""
    axes.set(
        xlabel=f"{name}s averaged{skipped}", ylabel="LLC estimate", xlim=(1, max(2, len(steps)))
    )
    _legend_below(figure, axes)
    return figure


def token_loss_shift(
    tree: xr.DataTree,
    observable: str | Iterable[str] | None = None,
    *,
    burn_in: int = 0,
) -> Figure:
    """Draw how far the losses of single tokens lie from where they started, per observable.

    Parameters
    ----------
    tree
        A store with ``loss_{observable} (chain, draw, batch_{observable}, token_pos)``. It is read
        once, by Dask where it is lazy; only means over chains and draws are held. An observable
        without ``init_loss_{observable}`` is compared with its first draw, the mean over chains.
    observable
        One name or several; None for all.
    burn_in
        Steps to leave out at the start of every chain: the draws of these. The first draw stays
        what an observable without ``init_loss_{observable}`` is compared with.

    Returns
    -------
    Figure
        A row per observable: the shift (mean over chains and draws, minus the start) at each token
        position, as mean and middle half of the sequences, and its histogram over all tokens.

    Raises
    ------
    KeyError
        If the store has no such observable; lists those it has.
    ValueError
        If ``burn_in`` leaves no draw.
    """
    names = _chosen(tree, observable)
    figure, panels = _canvas("Shift of single tokens' losses", rows=len(names))
    draws = f"draws after step {burn_in}" if burn_in else "draws"
    for row, name in enumerate(names):
        shift, start = _shift(tree, name, burn_in)
        by_position, histogram = panels[2 * row : 2 * row + 2]
        _draw_positions(by_position, shift, COLOURS[row % len(COLOURS)])
        _draw_histogram(histogram, shift, COLOURS[row % len(COLOURS)])
        by_position.set_title(f"{name}: mean of the {draws} minus {start}", loc="left", fontsize=10)
    panels[-2].set_xlabel("token position")
    panels[-1].set_xlabel("shift (nats per token)")
    return figure


def observables_of(tree: xr.DataTree) -> list[str]:
    """Names of a store's observables."""
    return sorted(str(name)[5:] for name in tree.data_vars if str(name).startswith("loss_"))


def _chosen(tree: xr.DataTree, observable: str | Iterable[str] | None) -> list[str]:
    available = observables_of(tree)
    wanted = [observable] if isinstance(observable, str) else list(observable or available)
    missing = [name for name in wanted if name not in available]
    if missing or not wanted:
        raise KeyError(
            f"this store has no observable {', '.join(map(repr, missing)) or 'at all'}; "
            f"it has {available}. Name one of them, or sample with observables={{...}}."
        )
    return wanted


def _shift(tree: xr.DataTree, name: str, burn_in: int) -> tuple[np.ndarray, str]:
    """Shift per (batch, token_pos) in nats, and what it is measured from."""
    from basinscope.analysis.llc import checked_burn_in
    from basinscope.analysis.stores import open_samples

    opened = open_samples(tree)
    kept = slice(checked_burn_in(opened, "draw", burn_in), None)
    losses = opened.dataset[f"loss_{name}"].isel(chain=list(opened.places))
    if f"init_loss_{name}" in opened.dataset:
        start, called = opened.dataset[f"init_loss_{name}"].astype("float64"), "the checkpoint"
    else:
        start, called = losses.isel(draw=0).mean("chain", dtype="float64"), "the first draw"
    mean = losses.isel(draw=kept).mean(["chain", "draw"], dtype="float64")
    means = xr.Dataset({"draws": mean, "start": start}).compute()
    return means["draws"].values - means["start"].values, called


def _draw_positions(axes: Axes, shift: np.ndarray, colour: str) -> None:
    positions = np.arange(1, shift.shape[1] + 1)
    low, high = np.quantile(shift, [0.25, 0.75], axis=0)
    axes.fill_between(positions, low, high, color=colour, alpha=0.25, linewidth=0)
    axes.plot(positions, shift.mean(axis=0), color=colour, linewidth=1.6, gid="shift")
    axes.axhline(0, color=INK, linewidth=0.6)
    axes.set(ylabel="shift (nats per token)", xlim=(1, max(2, shift.shape[1])))


def _draw_histogram(axes: Axes, shift: np.ndarray, colour: str) -> None:
    bins = int(np.clip(np.sqrt(shift.size), 10, MAX_BINS))
    axes.hist(shift.ravel(), bins=bins, color=colour, alpha=0.8)
    axes.axvline(0, color=INK, linewidth=0.6)
    axes.axvline(shift.mean(), color=INK, linestyle="--", linewidth=1.2)
    axes.set_ylabel("tokens")
    axes.set_title(f"mean {shift.mean():+.3f}", loc="right", fontsize=10)


def _canvas(title: str, rows: int = 0) -> tuple[Figure, list[Axes]]:
    """A figure with one panel, or with `rows` rows of a wide and a narrow one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2.6 * rows + 0.6) if rows else (7.2, 4.2), layout="constrained")
    figure.suptitle(title, x=0.02, ha="left", fontweight="bold", fontsize=12, color=INK)
    if rows:
        grid = figure.subplots(
            rows, 2, squeeze=False, sharex="col", sharey="col", width_ratios=[1.6, 1]
        )
        panels = list(grid.ravel())
    else:
        panels = [figure.subplots()]
    for axes in panels:
        axes_without_frame(axes)
    return figure, panels


def axes_without_frame(axes: Axes) -> None:
    """Have the left and the lower axis alone, and pale lines across."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)


def _trace(llc: xr.Dataset) -> np.ndarray:
    return np.asarray(llc.loss_trace.transpose("chain", ...), dtype=float)


def _by_chain(llc: xr.Dataset, lines: np.ndarray) -> Iterable[tuple[int, str, np.ndarray]]:
    colours = (COLOURS[row % len(COLOURS)] for row in range(len(lines)))
    return zip(llc["chain"].values.tolist(), colours, lines, strict=True)


def _numbers(llc: xr.Dataset) -> np.ndarray:
    """The numbers of a trace's steps or draws in the store, from 0."""
    return np.asarray(llc[llc.loss_trace.dims[1]])


def _legend_below(figure: Figure, axes: Axes) -> None:
    """A legend outside the panel, so that it covers no data."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(5, len(labels)), frameon=False
    )
