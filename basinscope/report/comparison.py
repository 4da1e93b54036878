"""The LLCs of several runs, as a table, as JSON and as a figure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from rich.markup import escape
from rich.table import Table

from basinscope.analysis.comparison import OTHER, RUN
from basinscope.report.figures import COLOURS, INK, axes_without_frame
from basinscope.report.tables import NO_MINIMUM, SURELY, is_below_zero

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MANY_TIMES = 20  # a range of run numbers that a logarithmic axis shows better


def comparison_table(found: xr.Dataset) -> Table:
    """Show every run with its LLC, and how far that is from the run before it.

    Parameters
    ----------
    found : xr.Dataset
        Of :func:`basinscope.compare_llc`, computed.
    """
    table = Table(title="Local learning coefficients", title_justify="left", show_edge=False)
    table.add_column("run", min_width=6)
    for heading in ("loss (nats)", "LLC", "change", "drift", "R-hat"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in comparison_figures(found):
        changed = "" if row["change"] is None else _with_error(row, "change", "+")
        table.add_row(
            escape(str(row["run"])), f"{row['init_loss']:.4f}", _with_error(row, "llc", ""),
            changed + ("" if row["paired"] in (None, True) else " *"),
            _with_error(row, "drift", "+"), f"{row['rhat']:.3f}",
        )  # fmt: skip
    return table


def comparison_notes(found: xr.Dataset) -> list[str]:
    """Say in plain sentences what the table's figures are, and which of them not to trust.

    Parameters
    ----------
    found : xr.Dataset
        As for :func:`comparison_table`.
    """
    rows = comparison_figures(found)
    notes = [
        "± is the standard error. The loss is at the checkpoint, the change is from the run above, "
        "the drift is the LLC of the second half of the steps minus that of the first."
    ]
    if any(row["paired"] for row in rows):
        notes.append(
            "Of runs that saw the same batches, the noise that both share is in neither the change "
            "nor its error."
        )
    if any(row["paired"] is False for row in rows):
        notes.append(
            "* The two runs did not see the same batches step by step, and count as independent: "
            "the same data, batch_size, init_seed and numbers of steps and chains would pair them."
        )
    if any(is_below_zero(row["llc"], row["llc_error"]) for row in rows):
        notes.append(NO_MINIMUM)
    moving = [str(row["run"]) for row in rows if abs(row["drift"]) > SURELY * row["drift_error"]]
    if moving:
        notes.append(
            f"Chains have not arrived, by their drift: {', '.join(moving)}. Their LLC is too low "
            "or too high; leave more steps out (--burn-in), or take more."
        )
    if any(np.isnan(row[name]) for row in rows for name in ("llc_error", "drift_error")):
        notes.append("? Too few steps for a standard error: it takes four, that of a drift eight.")
    if len(set(found["n_beta"].to_numpy().tolist())) > 1:
        notes.append("Runs differ in n_beta, on which an LLC depends.")
    return notes


def comparison_figures(found: xr.Dataset) -> list[dict[str, Any]]:
    """Give a record of each run, for JSON; parameters as :func:`comparison_table`.

    ``change``, ``change_error`` and ``paired`` are None in the first one.
    """
    records: list[dict[str, Any]] = []
    for number, run in enumerate(found[RUN].values.tolist()):
        own = found.isel({RUN: number})
        change: dict[str, Any] = dict.fromkeys(("change", "change_error", "paired"))
        if number:
            before = own.isel({OTHER: number - 1})
            change = {
                "change": float(before["difference"]),
                "change_error": float(before["difference_mcse"]),
                "paired": bool(before["paired"]),
            }
        records.append(
            {
                "run": run,
                "init_loss": float(own["init_loss"]),
                "llc": float(own["llc_mean"]),
                "llc_error": float(own["llc_mcse"]),
                **change,
                "drift": float(own["llc_drift"]),
                "drift_error": float(own["llc_drift_mcse"]),
                "rhat": float(own["rhat"]),
                "ess_bulk": float(own["ess_bulk"]),
                "n_beta": float(own["n_beta"]),
            }
        )
    return records


def comparison_figure(found: xr.Dataset) -> Figure:
    """Draw the LLC of every run, and below it the loss at its checkpoint.

    Parameters
    ----------
    found : xr.Dataset
        As for :func:`comparison_table`. Runs whose names are numbers lie along them, on a
        logarithmic axis where these span more than a factor of 20.

    Returns
    -------
    Figure
        Bars are standard errors of single LLCs; differences are known better.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 5.2), layout="constrained")
    figure.suptitle(
        "Local learning coefficient (LLC)", x=0.02, ha="left", fontweight="bold", fontsize=12,
        color=INK,
    )  # fmt: skip
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[1.7, 1])
    names = found[RUN].values
    numbered = names.dtype.kind in "iuf"
    places = names.astype(float) if numbered else np.arange(len(names), dtype=float)
    above.errorbar(
        places, found["llc_mean"], yerr=np.nan_to_num(found["llc_mcse"]), color=COLOURS[0],
        marker="o", markersize=4, linewidth=1.6, elinewidth=1.2, capsize=3,
    )  # fmt: skip
    above.set(ylabel="LLC ± standard error")
    below.plot(places, found["init_loss"], color=COLOURS[1], marker="o", markersize=4, gid="loss")
    below.set(ylabel="loss (nats)")
    for axes in (above, below):
        axes_without_frame(axes)
    if numbered:
        below.set_xlabel("run")
        _scale(below, places)
    else:
        labels = [str(name).replace("$", r"\$") for name in names]  # which begin a formula
        below.set_xticks(places, labels, rotation=30, ha="right")
    return figure


def _scale(axes: Axes, places: np.ndarray) -> None:
    positive = places[places > 0]
    if (places < 0).any() or not len(positive) or positive.max() < MANY_TIMES * positive.min():
        return
    if len(positive) == len(places):
        axes.set_xscale("log")
    else:
        axes.set_xscale("symlog", linthresh=positive.min())
    axes.xaxis.set_major_formatter("{x:g}")


def _with_error(row: dict[str, Any], name: str, sign: str) -> str:
    value, error = row[name], row[f"{name}_error"]
    return f"{value:{sign}.2f} ± " + ("?" if np.isnan(error) else f"{error:.2f}")
