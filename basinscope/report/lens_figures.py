"""The logit lens as a picture: what each layer would say next, at each position."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from basinscope.analysis.lens_inputs import position_names
from basinscope.report.figures import INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

MAX_POSITIONS = 64
AT_ONCE = 16  # positions in a row, so that tokens can be read
TOKEN_WIDTH = 9  # characters of a token that a cell shows
FONT = "DejaVu Sans Mono"  # comes with matplotlib
COLOURS = {
    "probability": "probability of the top token",
    "logit": "logit of the top token",
    "entropy": "entropy (nats)",
    "kl_to_final": "KL divergence from the last layer (nats)",
    "cross_entropy": "cross-entropy of the next token (nats)",
    "rank": "rank of the next token",
}
SHORT_ESCAPES = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}
RANKS = (0, 1, 10, 100, 1_000, 10_000, 100_000)
LUMINANCE = (0.299, 0.587, 0.114)
BOUNDED_BY_ZERO = ("entropy", "kl_to_final", "cross_entropy")


def lens_heat_map(
    top: xr.Dataset,
    *,
    example: int = 0,
    colour: str = "probability",
    measures: xr.Dataset | None = None,
    words: Callable[[int], str] = str,
    input_ids: np.ndarray | None = None,
    title: str = "Logit lens",
) -> Figure:
    """Draw a cell for each layer and position, with the top token in it, 16 positions in a row.

    Parameters
    ----------
    top
        Of :meth:`basinscope.lens.LogitLens.top_tokens`: ``token`` and the like, (layer, example,
        position, k). At most 64 positions: choose some with ``top.isel(position=...)``.
    example
        Which one, by its place.
    colour
        What the colour of a cell says: ``probability`` or ``logit`` of its token; or ``entropy``,
        ``kl_to_final``, ``cross_entropy`` or ``rank``, of `measures`.
    measures
        Of :meth:`basinscope.lens.LogitLens.measures`, for the same layers and positions.
    words
        From a token id to its text; the ids themselves by default.
    input_ids
        (position,) The token that is read at each position, for the axis; -1 for none.
    title

    Returns
    -------
    Figure
        The last layer at the top. Tokens are in one font; what it lacks is escaped, a space is
        shown as "·" and a line break as "\\\\n".

    Raises
    ------
    KeyError
        If there is no such `colour`; lists those there are.
    ValueError
        If there are too many positions, or `measures` or `input_ids` are of others.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    tokens = top["token"].isel(example=example, k=0).transpose("layer", "position").to_numpy()
    layers, positions = tokens.shape
    if positions > MAX_POSITIONS:
        raise ValueError(
            f"{positions} positions are too many to read (at most {MAX_POSITIONS}): choose some "
            "with top.isel(position=...)"
        )
    values = _values(top, measures, colour, example)
    if values.shape != tokens.shape:
        raise ValueError(
            f"measures have (layer, position) {values.shape}, the top tokens {tokens.shape}"
        )
    if input_ids is not None and np.shape(input_ids) != (positions,):
        raise ValueError(f"input_ids have shape {np.shape(input_ids)}, not ({positions},)")
    texts = np.array(
        [["" if token < 0 else readable(words(int(token))) for token in row] for row in tokens]
    )
    labels = _position_labels(top, input_ids, words)
    colours = colormaps["Blues"].with_extremes(bad="#DDDDDD")
    scale = _scale(colour, values)
    inks = _inks(colours(scale(np.ma.masked_invalid(values))))
    rows, across = -(-positions // AT_ONCE), min(positions, AT_ONCE)
    height = max(3.0, 0.5 + rows * (1.0 + 0.3 * layers))
    figure = Figure(figsize=(1.9 + 0.78 * across, height), layout="constrained")
    figure.suptitle(title, x=0.02, ha="left", fontweight="bold", fontsize=12, color=INK)
    panels = figure.subplots(rows, squeeze=False)[:, 0].tolist()
    for row, axes in enumerate(panels):
        part = slice(row * AT_ONCE, (row + 1) * AT_ONCE)
        image = axes.imshow(
            values[:, part], cmap=colours, norm=scale, aspect="auto", origin="lower"
        )
        _write(axes, texts[:, part], inks[:, part])
        _rule(axes, [str(n) for n in top["layer"].to_numpy()], labels[part])
        axes.set_xlim(-0.5, across - 0.5)  # a last row of fewer has cells as wide
    panels[-1].set_xlabel("position")
    bar = figure.colorbar(image, ax=panels, pad=0.01, aspect=25 * rows)
    if colour == "rank":
        bar.set_ticks([n for n in RANKS if n <= (scale.vmax or 0)])
    bar.set_label(COLOURS[colour])
    bar.outline.set_visible(False)
    return figure


def _write(axes: Axes, texts: np.ndarray, inks: np.ndarray) -> None:
    for (layer, position), text in np.ndenumerate(texts):
        axes.text(
            position,
            layer,
            text,
            ha="center",
            va="center",
            color=inks[layer, position],
            fontfamily=FONT,
            fontsize=8,
            parse_math=False,
        )


def _rule(axes: Axes, layers: list[str], positions: list[str]) -> None:
    """Label the cells and draw white lines between them."""
    axes.set_ylabel("layer")
    axes.set_yticks(range(len(layers)), labels=layers)
    axes.set_xticks(range(len(positions)), labels=positions)
    for label in axes.get_xticklabels():
        label.set(fontfamily=FONT, fontsize=8, parse_math=False)
    axes.set_xticks(np.arange(len(positions) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(layers) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)


def readable(text: str, width: int = TOKEN_WIDTH) -> str:
    """Make a token's text fit a cell: visible spaces, escapes for what the font lacks.

    Examples
    --------
    >>> readable(" the"), readable("a\\n"), readable("interpretability")
    ('·the', 'a\\\\n', 'interpre…')
    """
    pieces = [_shown(character) for character in text]
    if sum(map(len, pieces)) <= width:
        return "".join(pieces)
    while sum(map(len, pieces)) > width - 1:  # an escape is left out whole
        pieces.pop()
    return "".join([*pieces, "…"])


def _shown(character: str) -> str:
    if character == " ":
        return "·"
    if character.isprintable() and ord(character) in _characters():
        return character
    return SHORT_ESCAPES.get(character, f"\\u{{{ord(character):x}}}")


@cache
def _characters() -> frozenset[int]:
    """Code points that the font has."""
    from matplotlib.font_manager import findfont
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(findfont(FONT)).get_charmap())


def _values(top: xr.Dataset, measures: xr.Dataset | None, colour: str, example: int) -> np.ndarray:
    """What a cell's colour stands for, (layer, position)."""
    there = {name: top[name].isel(k=0) for name in ("probability", "logit") if name in top}
    if measures is not None:
        there |= {name: measures[name] for name in COLOURS if name in measures}
    if colour not in there:
        raise KeyError(
            f"there is no {colour!r} to colour by; there are {', '.join(there)}"
            + ("" if measures is not None else " (and others, if measures are given)")
        )
    found = there[colour].isel(example=example).transpose("layer", "position")
    return np.asarray(found, dtype=float)


def _scale(colour: str, values: np.ndarray) -> Normalize:
    from matplotlib.colors import FuncNorm, Normalize

    known = values[np.isfinite(values)]
    largest = float(known.max(initial=0.0))
    if colour == "probability":
        return Normalize(0, 1)
    if colour == "rank":
        return FuncNorm((np.log1p, np.expm1), vmin=0, vmax=max(1.0, largest))
    if colour in BOUNDED_BY_ZERO:
        return Normalize(0, largest or 1.0)
    return Normalize(float(known.min(initial=largest)), largest)


def _inks(shades: np.ndarray) -> np.ndarray:
    """Dark or white, whichever is easier to read on each shade (..., 4)."""
    return np.where(shades[..., :3] @ LUMINANCE > 0.55, INK, "white")


def _position_labels(
    top: xr.Dataset, input_ids: np.ndarray | None, words: Callable[[int], str]
) -> list[str]:
    """The number of each position, and its token."""
    numbers = position_names(top)
    if input_ids is None:
        return numbers
    return [
        number if token < 0 else f"{readable(words(int(token)))}\n{number}"
        for token, number in zip(input_ids, numbers, strict=True)
    ]
