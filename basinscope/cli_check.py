"""The command that looks at a model before it is sampled: ``basinscope check``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from basinscope.report.console import out, print_json, readable_errors

FOUND_WARNINGS = 1  # exit code of a check that found something to change first

Model = Annotated[
    str | None,
    typer.Option(help="Another model than the file's, such as an earlier checkpoint."),
]


def check(
    config: Annotated[Path, typer.Argument(help="A YAML file, as basinscope sample takes it.")],
    batch_size: Annotated[int, typer.Option(help="Sequences per forward pass, at least 2.")] = 4,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, ... Default: the file's.")
    ] = None,
    model: Model = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Look at a run's file, model and data before sampling; samples and writes nothing.

    The last line says what the run takes, and what of it is left, or why it would be refused.
    Exit code 0 without warnings (notes are fine), 1 with some, 2 if the file is wrong. So
    "basinscope check RUN.yaml && basinscope sample RUN.yaml" samples only what is sound.
    """
    with readable_errors():
        from basinscope.sampling.run_file import check_from_file

        report = check_from_file(config, batch_size=batch_size, device=device, model=model)
        if as_json:
            print_json(asdict(report))
        else:
            out.print(report)
    if report.warnings:
        raise typer.Exit(FOUND_WARNINGS)
