"""What the command line prints on, and how it says what is wrong."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape

out = Console()
err = Console(stderr=True)


@contextmanager
def readable_errors() -> Iterator[None]:
    """Say in one paragraph what is wrong with the input; keep tracebacks for everything else."""
    if os.environ.get("BASINSCOPE_TRACEBACK"):
        yield
        return
    try:
        yield
    except (ValueError, TypeError, OSError, FloatingPointError, ModuleNotFoundError) as error:
        err.print(f"[red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        err.print("[dim]BASINSCOPE_TRACEBACK=1 shows where this was raised.[/]")
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        err.print("stopped; the same command continues")
        raise typer.Exit(130) from None


@contextmanager
def short_warnings() -> Iterator[None]:
    """Print warnings without the line of code that raised them."""

    def show(message: object, *_: object, **__: object) -> None:
        err.print(f"[yellow]warning:[/] {escape(str(message))}", soft_wrap=True, highlight=False)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def print_json(value: Any) -> None:
    """Print a value as JSON that every reader takes: what is no finite number is null."""
    print(json.dumps(json.loads(json.dumps(value), parse_constant=lambda _: None)))
