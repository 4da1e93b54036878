"""Figures of attributions: who gives most to a component, and how much layers give to layers."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from basinscope.analysis.attribution import Attribution, AttributionStore
from basinscope.analysis.attribution_keys import Key
from basinscope.analysis.attribution_scales import Normalize
from basinscope.io.attributions_layout import OUTPUT, OUTPUT_TOKENS
from basinscope.report.figures import COLOURS, INK
from basinscope.report.lens_figures import FONT, readable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

BLUE, VERMILION = COLOURS[0], COLOURS[4]  # of values over and under zero
NO_EDGE = "#F3F3F3"
MEANING = {
    "attr": "mean over tokens of (∂y/∂x) x",
    "attr_abs": "mean over tokens of (∂|y|/∂x) x",
    "mean_squared_attr": "mean over tokens of ((∂y/∂x) x)²",
}
DIVISORS = {
    "source_importance": "source's mean importance",
    "source_count": "source's share of active tokens",
    "target_rms": "target's RMS",
}
TOKEN_WIDTH = 14  # characters of a token that a label shows
MAX_NUMBERED = 14  # layers of a heat map whose cells carry their numbers
DECADES = 4  # of a heat map's colours


def signed_bars(
    store: AttributionStore,
    key: str,
    *,
    k: int = 12,
    metric: str = "attr",
    normalize: Normalize = None,
) -> Figure:
    """Draw the strongest sources and targets of a component or token, of both signs.

    Parameters
    ----------
    store
    key
        Such as ``"0.mlp.up:5"``; what is no target in the store (as ``embed``) has no sources, and
        what is no source (as ``output``) no targets.
    k
        Bars of each side: the k largest magnitudes.
    metric, normalize
        See :class:`AttributionStore`.

    Returns
    -------
    Figure
        Sources on the left, targets on the right, sorted by value.

    Raises
    ------
    ValueError
        If ``key`` is neither source nor target, or the metric of an output token was not harvested.
    """
    from matplotlib.figure import Figure

    sides = strongest(store, key, k=k, metric=metric, normalize=normalize)
    rows = max(len(entries) for entries in sides.values())
    figure = Figure(figsize=(5.4 * len(sides), 1.7 + 0.27 * max(rows, 3)), layout="constrained")
    text = store.token_text(key)
    name = key if text is None else f"{key} {readable(text, TOKEN_WIDTH)}"
    figure.suptitle(
        name, x=0.01, ha="left", fontweight="bold", fontsize=12, color=INK, parse_math=False
    )
    for axes, (side, entries) in zip(
        figure.subplots(1, len(sides), squeeze=False)[0], sides.items(), strict=True
    ):
        _draw_bars(axes, entries, max(rows, 3))
        axes.set_title(side, loc="left", fontsize=10, color=INK)
    figure.supxlabel(
        _wrapped(axis_label(metric, normalize), 56 * len(sides)), fontsize=9, color=INK
    )
    _signed_legend(figure, [entry.value for entries in sides.values() for entry in entries])
    return figure


def layer_heat_map(summary: xr.DataArray, *, normalize: Normalize = None) -> Figure:
    """Draw how much each layer gives to each other one.

    Parameters
    ----------
    summary
        Of :meth:`AttributionStore.summary`.
    normalize
        What was given to it, for the label.

    Returns
    -------
    Figure
        A cell for each pair of layers, on a logarithmic scale of at most four decades; blank where
        there is no edge. Up to 14 layers, cells carry their numbers.
    """
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    values = summary.transpose("target_layer", "source_layer").to_numpy()
    positive = values[values > 0]
    top = float(positive.max(initial=0.0)) or 1.0
    bottom = max(float(positive.min(initial=top)), top / 10**DECADES)
    bottom = bottom if bottom < top else top / 10
    scale = LogNorm(bottom, top, clip=True)
    colours = colormaps["viridis"].with_extremes(bad=NO_EDGE)
    rows, columns = values.shape
    numbered = max(rows, columns) <= MAX_NUMBERED
    cell = 0.56 if numbered else max(0.16, 0.3 - 0.001 * max(rows, columns))
    size = (3.6 + cell * columns, max(3.2, 1.9 + (0.42 if numbered else cell) * rows))
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle("Attributions between layers", x=0.01, ha="left", fontweight="bold", color=INK)
    axes = figure.subplots()
    shown = np.ma.masked_invalid(np.where(values == 0, bottom, values))
    image = axes.imshow(shown, cmap=colours, norm=scale, aspect="auto")
    if numbered:
        _write_numbers(axes, values, scale)
    small = 9 if numbered else 6
    axes.set_xticks(range(columns), summary["source_layer"].values, rotation=90, fontsize=small)
    axes.set_yticks(range(rows), summary["target_layer"].values, fontsize=small)
    axes.set_xlabel("source layer", color=INK)
    axes.set_ylabel("target layer", color=INK)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xticks(np.arange(columns + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(rows + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1 if numbered else 0.5)
    axes.tick_params(which="minor", length=0)
    bar = figure.colorbar(image, ax=axes, pad=0.02, aspect=25)
    divided = _divided(str(summary.name), normalize).replace(" / ", "\n/ ")
    label = f"sum of |{summary.name}| over both layers{divided}\n(blank: no edge)"
    bar.set_label(label, fontsize=9, color=INK)
    bar.outline.set_visible(False)
    return figure


def strongest(
    store: AttributionStore, key: str, *, k: int, metric: str, normalize: Normalize
) -> dict[str, list[Attribution]]:
    """Find the strongest of both signs, of "sources" and "targets", sorted by value.

    Raises
    ------
    ValueError
        As :func:`signed_bars`.
    """
    signs = ("positive",) if metric == "mean_squared_attr" else ("positive", "negative")
    is_target, is_source = _roles(store, Key.parse(key).layer)
    sides = {}
    if is_target:
        sides["sources"] = [
            entry
            for sign in signs
            for entry in store.top_sources(key, k, sign, metric, normalize=normalize)
        ]
    if is_source:
        sides["targets"] = [
            entry
            for sign in signs
            for entry in store.top_targets(key, k, sign, metric, normalize=normalize)
        ]
    return {
        side: sorted(
            sorted(entries, key=lambda entry: -abs(entry.value))[:k],
            key=lambda entry: -entry.value,
        )
        for side, entries in sides.items()
    }


def _roles(store: AttributionStore, layer: str) -> tuple[bool, bool]:
    """Tell whether a layer's components are targets, and whether they are sources."""
    edges = store.metadata["edges"]
    sources = {source for _, source in edges}
    targets = {OUTPUT if target == OUTPUT_TOKENS else target for target, _ in edges}
    if layer not in sources | targets:
        what = "neither source nor target" if layer in store.layers else "no layer"
        ordered = [[name for name in store.layers if name in role] for role in (sources, targets)]
        close = get_close_matches(layer, sources | targets, n=3)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise ValueError(
            f"{layer!r} is {what} of this store: {hint}its sources are {', '.join(ordered[0])}, "
            f"its targets {', '.join(ordered[1])}"
        )
    return layer in targets, layer in sources


def axis_label(metric: str, normalize: Normalize) -> str:
    """Say what a metric's values are."""
    return f"{metric}: {MEANING[metric]}{_divided(metric, normalize)}"


def _divided(metric: str, normalize: Normalize) -> str:
    measures = [normalize] if isinstance(normalize, str) else list(normalize or ())
    squared = metric == "mean_squared_attr"
    names = {**DIVISORS, "target_rms": "target's mean square"} if squared else DIVISORS
    return "".join(f" / {names[measure]}" for measure in measures)


def _draw_bars(axes: Axes, entries: Sequence[Attribution], rows: int) -> None:
    values = [entry.value for entry in entries]
    places = range(len(entries))
    colours = [BLUE if value > 0 else VERMILION for value in values]
    bars = axes.barh(places, values, color=colours, height=0.72)
    axes.bar_label(bars, [f"{value:.3g}" for value in values], padding=3, fontsize=8, color=INK)
    axes.set_yticks(places, [_label(entry) for entry in entries])
    for label in axes.get_yticklabels():
        label.set(fontfamily=FONT, fontsize=8.5, parse_math=False, color=INK)
    axes.set_ylim(rows - 0.4, -0.6)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.margins(x=0.22)
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.ticklabel_format(axis="x", scilimits=(-3, 4), useMathText=True)
    axes.locator_params(axis="x", nbins=5)
    if not entries:
        axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center", color=INK)


def _label(entry: Attribution) -> str:
    return (
        entry.key if entry.token is None else f"{readable(entry.token, TOKEN_WIDTH)}  {entry.key}"
    )


def _signed_legend(figure: Figure, values: Sequence[float]) -> None:
    from matplotlib.patches import Patch

    signs = {
        "positive": (BLUE, any(value > 0 for value in values)),
        "negative": (VERMILION, any(value < 0 for value in values)),
    }
    handles = [Patch(color=colour, label=sign) for sign, (colour, there) in signs.items() if there]
    figure.legend(handles=handles, loc="upper right", ncols=2, frameon=False, fontsize=9)


def _wrapped(label: str, width: int) -> str:
    """Break a label before its divisors, where it is too long for its figure."""
    return label.replace(" / ", "\n/ ") if len(label) > width else label


def _write_numbers(axes: Axes, values: np.ndarray, scale: LogNorm) -> None:
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            ink = INK if value > 0 and scale(value) > 0.6 else "white"
            axes.text(column, row, _short(value), ha="center", va="center", fontsize=7, color=ink)


def _short(value: float) -> str:
    """Write a number in few characters."""
    return f"{value:.0e}" if value and not 0.01 <= value < 1000 else f"{value:.2g}"
