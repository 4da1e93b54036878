"""``basinscope compare``: the LLCs of several stores side by side."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from basinscope.cli_analysis import (
    AsJson,
    Incomplete,
    MemoryLimit,
    by_name,
    named_stores,
    refuse_other_kinds,
)
from basinscope.report.console import out, print_json, readable_errors, short_warnings


def compare(
    stores: Annotated[
        list[str],
        typer.Argument(
            help="Sampling stores, or NAME=STORE for each. Names that differ in a number, such as "
            "step_100.zarr step_2000.zarr, are put in its order."
        ),
    ],
    burn_in: Annotated[int, typer.Option(help="Steps to leave out of every chain.")] = 0,
    png: Annotated[Path | None, typer.Option(help="Draw them into this file.")] = None,
    as_json: AsJson = False,
    allow_incomplete: Incomplete = False,
    memory_limit: MemoryLimit = None,
) -> None:
    """Compare the LLCs of several runs, such as the checkpoints of a training.

    Differences between runs on the same batches have an error of their own, in which the noise
    that both share does not count.
    """
    with readable_errors(), short_warnings():
        from basinscope.analysis.comparison import compare_llc
        from basinscope.io.results import progress_bar
        from basinscope.report.comparison import (
            comparison_figure,
            comparison_figures,
            comparison_notes,
            comparison_table,
        )
        from basinscope.report.figures import DPI

        runs = parse_runs(stores)
        refuse_other_kinds(*runs.values())
        png = None if png is None else _checked(png)
        lazy = compare_llc(
            runs, burn_in=burn_in, allow_incomplete=allow_incomplete, memory_limit=memory_limit
        )
        with progress_bar():
            found = lazy.compute()
        if png is not None:
            png.parent.mkdir(parents=True, exist_ok=True)
            comparison_figure(found).savefig(png, dpi=DPI)
        if as_json:
            print_json(comparison_figures(found))
            return
        out.print(comparison_table(found))
        out.print()
        for note in comparison_notes(found):
            out.print(note, highlight=False, markup=False)
        if png is not None:
            out.print(f"written to {escape(str(png))}", soft_wrap=True)


def _checked(png: Path) -> Path:
    """Refuse a picture that cannot be drawn, before the stores are read."""
    import matplotlib  # noqa: F401

    from basinscope.report.page import require_new

    if png.suffix != ".png":
        raise ValueError(f"--png {png}: give a name that ends in .png")
    return require_new(png)


def parse_runs(stores: Sequence[str]) -> Mapping[Any, Path]:
    """Give each run a name: its own, the store's, or the number in which stores' names differ.

    Examples
    --------
    >>> parse_runs(["2000=late.zarr", "100=early.zarr"]).keys()
    dict_keys([100, 2000])
    >>> parse_runs(["runs/step_200.zarr", "runs/step_0.zarr"]).keys()
    dict_keys([0, 200])
    >>> parse_runs(["small=a.zarr", "large=b.zarr"]).keys()
    dict_keys(['small', 'large'])
    """
    named = named_stores(stores)
    pairs = [(Path(text).stem, Path(text)) for text in stores] if named is None else named
    runs = by_name(pairs, "run")
    pattern = r"(\D*)(\d+)(\D*)" if named is None else r"()(\d+)()"
    numbered = [re.fullmatch(pattern, name) for name in runs]
    around = {match and (match[1], match[3]) for match in numbered}
    if len(runs) < 2 or len(around) > 1 or None in around:
        return runs
    numbers = [int(match[2]) for match in numbered if match]
    if len(set(numbers)) < len(numbers):  # 1 and 01
        return runs
    return dict(sorted(zip(numbers, runs.values(), strict=True)))
