"""A logit lens as one HTML file."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import xarray as xr

from basinscope.report.lens_figures import AT_ONCE, COLOURS, lens_heat_map
from basinscope.report.page import image, section, write_page

OF_TOKENS = ("probability", "logit")


def lens_page(
    path: str | os.PathLike[str],
    top: xr.Dataset,
    measures: xr.Dataset,
    facts: Mapping[str, object],
    *,
    words: Callable[[int], str] = str,
    input_ids: np.ndarray | None = None,
) -> Path:
    """Write a page with the layers' top tokens, coloured by a measure that the reader chooses.

    Parameters
    ----------
    path : path
        The ``.html`` file.
    top : xr.Dataset
        Of ``LogitLens.top_tokens``; a section for each of its examples.
    measures : xr.Dataset
        Of ``LogitLens.measures``, for the same layers, examples and positions.
    facts : mapping
        What the page says of itself at the top.
    words : callable
        From a token id to its text.
    input_ids : ndarray (example, position), optional
        The tokens that are read; -1 for none.

    Raises
    ------
    FileExistsError
        If there is something at ``path``.
    """
    choices = [name for name in COLOURS if name in OF_TOKENS or name in measures]
    sections = []
    for example, name in enumerate(_names(top)):
        parts = []
        for choice in choices:
            rows = []
            for start in range(0, top.sizes["position"], AT_ONCE):
                part = {"position": slice(start, start + AT_ONCE)}
                figure = lens_heat_map(
                    top.isel(part),
                    example=example,
                    colour=choice,
                    measures=None if choice in OF_TOKENS else measures.isel(part),
                    words=words,
                    input_ids=None if input_ids is None else input_ids[example][part["position"]],
                    title="",
                )
                rows.append(image(figure, f"{choice} of sequence {name}, from {start}"))
            parts.append(f'<div class="of {choice}">{"".join(rows)}</div>')
        sections.append(section(f"Sequence {name}", "\n".join(parts)))
    return write_page(path, "Logit lens", facts, sections, ("colour", choices))


def _names(top: xr.Dataset) -> list[object]:
    """What to call the examples."""
    if "example" in top.coords:
        found: list[object] = top["example"].to_numpy().tolist()
        return found
    return list(range(top.sizes["example"]))
