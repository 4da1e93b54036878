"""Attributions as one HTML file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from basinscope.analysis.attribution import Attribution, AttributionStore
from basinscope.analysis.attribution_scales import Normalize
from basinscope.io.attributions_layout import METRICS, missing_ranks
from basinscope.report.attribution_figures import (
    axis_label,
    layer_heat_map,
    signed_bars,
    strongest,
)
from basinscope.report.page import image, require_new, section, table, write_page


def attribution_page(
    store: AttributionStore,
    path: str | os.PathLike[str],
    components: Iterable[str] = (),
    *,
    k: int = 12,
    normalize: Normalize = None,
) -> Path:
    """Write a page with the heat map of layers, and the strongest of some components.

    Parameters
    ----------
    store
    path
        The ``.html`` file.
    components
        Keys such as ``"0.mlp.up:5"``, ``"embed:123"`` or ``"output:42"``.
    k
        Sources and targets of each component.
    normalize
        See :class:`AttributionStore`.

    Returns
    -------
    Path
        The file. Figures are SVG inside it, a switch chooses the metric, and every figure of a
        component has its numbers as a table.

    Raises
    ------
    FileExistsError
        If there is something at ``path``.
    ValueError
        If one of the components is neither source nor target; says what there is.
    """
    require_new(path)
    components = list(components)
    for key in components:
        strongest(store, key, k=1, metric="attr", normalize=normalize)  # raises before long work
    sections = [_by_metric("Between layers", partial(_heat_map, store, normalize=normalize))]
    for key in components:
        text = store.token_text(key)
        name = key if text is None else f"{key} {text!r}"
        sections.append(_by_metric(name, partial(_component, store, key, k=k, normalize=normalize)))
    facts = _facts(store.metadata)
    return write_page(path, "Dataset attribution", facts, sections, ("metric", METRICS))


def _by_metric(heading: str, content: Callable[..., str]) -> str:
    """A section of which the switch shows one metric."""
    parts = [f'<div class="of {metric}">{content(metric=metric)}</div>' for metric in METRICS]
    return section(heading, "\n".join(parts))


def _heat_map(store: AttributionStore, *, metric: str, normalize: Normalize) -> str:
    summary = store.summary(metric, normalize=normalize)
    return image(layer_heat_map(summary, normalize=normalize), f"{metric} between layers")


def _component(
    store: AttributionStore, key: str, *, metric: str, k: int, normalize: Normalize
) -> str:
    options: dict[str, Any] = {"k": k, "metric": metric, "normalize": normalize}
    try:
        sides = strongest(store, key, **options)
    except ValueError as error:  # an output token whose metric was not harvested
        return f"<p>{escape(str(error))}</p>"
    figure = image(signed_bars(store, key, **options), f"{metric} of {key}")
    tables = "".join(_table(side, entries) for side, entries in sides.items())
    label = escape(axis_label(metric, normalize))
    return f"{figure}<details><summary>as numbers ({label})</summary>{tables}</details>"


def _table(side: str, entries: Sequence[Attribution]) -> str:
    return table(
        side,
        (
            (entry.key, "" if entry.token is None else repr(entry.token), f"{entry.value:+.6g}")
            for entry in entries
        ),
    )


def _facts(metadata: dict[str, Any]) -> dict[str, str]:
    parts = metadata["parts"]
    model = metadata["model"]
    facts = {
        "model": ", ".join(f"{name} {value}" for name, value in model.items()),
        "tokens": f"{metadata['tokens']:,} in {metadata['batches']:,} batches",
        "data set": metadata["dataset_fingerprint"],
        "ranks": f"{len(parts)} of {parts[0][1]}",
        "written by": metadata.get("created_by", "unknown"),
    }
    if missing := missing_ranks(parts):
        facts["missing"] = f"ranks {', '.join(map(str, missing))}"
    if metadata["completed"] != 1:
        facts["state"] = "not finished: the harvest was running or had been stopped"
    return facts
