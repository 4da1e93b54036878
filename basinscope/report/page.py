"""A page of figures and tables as one HTML file that needs nothing else: no network, no server."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from basinscope.io.location import local_path, require_place

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_page(
    path: str | os.PathLike[str],
    title: str,
    facts: Mapping[str, object],
    sections: Iterable[str],
    switch: tuple[str, Sequence[str]] | None = None,
) -> Path:
    """Write a page.

    Parameters
    ----------
    path : path
        The ``.html`` file.
    title : str
    facts : mapping of str to object
        What it is about; shown at the top.
    sections : iterable of str
        HTML, see :func:`section`.
    switch : (str, sequence of str), optional
        A name, and the choices under it: of elements of class "of", those are shown whose class is
        the one that the reader chose, the first to begin with.

    Raises
    ------
    FileExistsError
        If there is something at ``path``.
    """
    path = require_new(path)
    name, choices = switch or ("", ())
    listed = "".join(
        f"<dt>{escape(fact)}</dt><dd>{escape(str(value))}</dd>" for fact, value in facts.items()
    )
    page = PAGE.substitute(
        title=escape(title),
        facts=listed,
        sections="\n".join(sections),
        switch=_fieldset(name, choices) if choices else "",
        shown=", ".join(f'body[data-shown="{choice}"] .{choice}' for choice in choices) or "main",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def require_new(path: str | os.PathLike[str]) -> Path:
    """Give the path of a file to be made; refuse one that cannot be, before long work.

    Raises
    ------
    FileExistsError
        If there is something at ``path``.
    NotADirectoryError
        If it is below a file.
    """
    path = local_path(path, "a page or picture")
    if path.exists():
        raise FileExistsError(f"{path} exists and is left as it is: choose another name")
    require_place(path)
    return path


def section(heading: str, content: str) -> str:
    """Put HTML under a heading, which is plain text."""
    return f"<section><h2>{escape(heading)}</h2>\n{content}</section>"


def image(figure: Figure, description: str) -> str:
    """Give a figure as an SVG inside the page, without its own title."""
    figure.suptitle("")  # the page has headings of its own
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    encoded = base64.b64encode(file.getvalue().encode()).decode()
    return f'<img alt="{escape(description)}" src="data:image/svg+xml;base64,{encoded}">'


def table(caption: str, rows: Iterable[Sequence[str]], head: Sequence[str] = ()) -> str:
    """Give a table; its cells are plain text."""
    titles = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    top = f"<tr>{titles}</tr>" if titles else ""
    return f"<table><caption>{escape(caption)}</caption>{top}{lines}</table>"


def _fieldset(name: str, choices: Sequence[str]) -> str:
    labels = "".join(
        f'<label><input type="radio" name="shown" value="{choice}"'
        f"{' checked' if choice == choices[0] else ''}> {choice}</label>"
        for choice in choices
    )
    return f"<fieldset><legend>{escape(name)}</legend>{labels}</fieldset>"


PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #333; margin: 0 auto; max-width: 75rem;
  padding: 0 1.5rem 3rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1rem; font-weight: 500; color: #666; margin: 1rem 0 0; }
.text { font-family: ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  margin: .2rem 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: 0; }
dt { color: #666; } dd { margin: 0; overflow-wrap: anywhere; }
fieldset { position: sticky; top: 0; background: #fff; border: 0; border-bottom: 1px solid #ddd;
  margin: 1.2rem 0 0; padding: .7rem 0; display: flex; flex-wrap: wrap; gap: 1.2rem; z-index: 1; }
legend { float: left; font-weight: 600; padding: 0; margin-right: .4rem; }
label { cursor: pointer; }
img { max-width: 100%; height: auto; display: block; }
.of { display: none; }
$shown { display: block; }
summary { cursor: pointer; color: #0072B2; margin-top: .4rem; }
table { border-collapse: collapse; display: inline-table; vertical-align: top;
  margin: .6rem 3rem 0 0; }
caption { text-align: left; font-weight: 600; }
th { text-align: left; font-weight: 500; color: #666; }
th, td { padding: .1rem .8rem .1rem 0; }
td:last-child, th:last-child { text-align: right; font-variant-numeric: tabular-nums; }
</style>
</head>
<body>
<h1>$title</h1>
<dl>$facts</dl>
$switch
<main>
$sections
</main>
<script>
for (const input of document.querySelectorAll('input[name="shown"]')) {
  input.addEventListener("change", () => { document.body.dataset.shown = input.value; });
  if (input.checked) document.body.dataset.shown = input.value;
}
</script>
</body>
</html>
""")
