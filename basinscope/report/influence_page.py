"""The strongest partners of query tokens in their text, as one HTML file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from html import escape
from pathlib import Path

import numpy as np
import xarray as xr

from basinscope.report.page import require_new, section, write_page
from basinscope.report.tables import BY_CHANCE
from basinscope.report.words import Words, printable

QUERIES = 100  # at most on a page
PASSAGES = 8  # of a query, each of another sequence
CONTEXT = 40  # tokens on either side of the one that a passage is about
POSITIVE, NEGATIVE = "230, 159, 0", "86, 180, 233"  # red, green, blue: told apart by all readers

BY_CHANCE_IS = "By chance alone the strongest of as many unrelated tokens reaches"
NONE_PASSES = " None of the partners is beyond that."
LEGEND = (
    "Below each query are the sequences with its strongest partners, each about the strongest of "
    "them, as SEQUENCE:POSITION. Orange: its loss rises and falls with the query's; blue: it falls "
    "where that rises; the darker, the stronger. Only the partners that were asked for are "
    "coloured, as far as they are beyond what chance reaches, where that is known; the pointer on "
    "one shows its influence."
)


def influence_page(
    path: str | os.PathLike[str], bif: xr.Dataset, facts: Mapping[str, object], words: Words
) -> Path:
    """Write a page with a section for each query token, for the first 100 of them.

    Parameters
    ----------
    path : path
        The ``.html`` file.
    bif : xr.Dataset
        Of :func:`basinscope.compute_bif` with ``top_k``, computed; with the variables of
        :func:`basinscope.bif_chance` for the same queries, what is reached by chance too.
    facts : mapping
        What the page says of itself at the top.
    words : function of int to str
        From a token id to its text.

    Raises
    ------
    FileExistsError
        If there is something at ``path``.
    """
    require_new(path)
    ids = bif["input_ids"].to_numpy()
    asked, shown = bif.sizes["query"], min(QUERIES, bif.sizes["query"])
    left_out = f" Here are the first {shown} of {asked:,} queries." if shown < asked else ""
    sections = [f"<p>{escape(LEGEND + left_out)}</p>"]
    for query in range(shown):
        one = bif.isel(query=query)
        batch, position = int(one["query_batch"]), int(one["query_target_position"])
        content = [_passage(ids[batch], position, {}, 1.0, words)]
        reached = float(one[BY_CHANCE].fillna(0)) if BY_CHANCE in one else 0.0
        partners = _partners(one, reached)
        if reached:
            none = "" if partners else NONE_PASSES
            content.append(f"<p>{BY_CHANCE_IS} ±{reached:.3f}.{none}</p>")
        strongest = max((abs(v) for found in partners.values() for v in found.values()), default=1)
        for sequence, influences in list(partners.items())[:PASSAGES]:
            about = next(iter(influences))
            content.append(f"<h3>{sequence}:{about} {influences[about]:+.3f}</h3>")
            content.append(_passage(ids[sequence], about, influences, strongest, words))
        sections.append(section(f"Query {batch}:{position}", "\n".join(content)))
    return write_page(path, "Influence between tokens", facts, sections)


def _partners(query: xr.Dataset, reached: float) -> dict[int, dict[int, float]]:
    """Give the influences of a query by sequence and position, the strongest first in both.

    Those that chance reaches, too, are left out.
    """
    fields = ("partner_batch", "partner_target_position", "influences")
    batches, positions, values = (query[name].to_numpy().ravel() for name in fields)
    found: dict[int, dict[int, float]] = {}
    for at in np.argsort(-np.abs(values), kind="stable"):
        if batches[at] >= 0 and abs(values[at]) > reached:
            of_sequence = found.setdefault(int(batches[at]), {})
            of_sequence[int(positions[at])] = float(values[at])
    return found


def _passage(
    ids: np.ndarray, about: int, influences: Mapping[int, float], strongest: float, words: Words
) -> str:
    """Show the tokens around one, which is underlined; those with an influence are coloured."""
    first, last = max(0, about - CONTEXT), min(len(ids), about + CONTEXT + 1)
    tokens = []
    for position in range(first, last):
        text, style, title = escape(printable(words(int(ids[position])), "\n\t")), "", ""
        if position in influences:
            value = influences[position]
            shade = f"{POSITIVE if value > 0 else NEGATIVE}, {abs(value) / strongest:.2f}"
            style, title = f"background: rgba({shade});", f' title="{position}: {value:+.3f}"'
        if position == about:
            style += "text-decoration: underline;"
        if style:  # also of a line break something is to be seen
            text = text.replace("\n", "↵\n")
            text = f'<span style="{style}"{title}>{text}</span>'
        tokens.append(text)
    before, after = ("… " if first else ""), (" …" if last < len(ids) else "")
    return f'<p class="text">{before}{"".join(tokens)}{after}</p>'
