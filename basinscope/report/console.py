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

EXTRAS = {
    "sampling": ("torch", "triton", "datasets", "cloudpickle", "pyarrow"),
    "hf": ("transformers", "tokenizers"),
    "report": ("matplotlib",),
    "distributed": ("distributed", "bokeh"),
}
TERMINATED = 143  # exit code after SIGTERM
STOPPED = "stopped; the same command continues"

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
        said = explain_missing(error) if isinstance(error, ModuleNotFoundError) else str(error)
        err.print(f"[red]error:[/] {escape(said)}", soft_wrap=True, highlight=False)
        err.print("[dim]BASINSCOPE_TRACEBACK=1 shows where this was raised.[/]")
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        err.print(STOPPED)
        raise typer.Exit(130) from None
    except SystemExit as end:
        if end.code == TERMINATED:
            err.print(STOPPED)
        raise


def explain_missing(error: ModuleNotFoundError) -> str:
    """Say what installs a module that is missing, where an extra brings it."""
    hint = install_hint(error.name or "")
    return f"{error}: {hint}" if hint and hint not in str(error) else str(error)


def install_hint(module: str) -> str:
    """Give the commands that install a module; empty if no extra brings it.

    Examples
    --------
    >>> install_hint("torch.cuda").partition(",")[0]
    'pip install "basinscope[sampling]"'
    """
    package = module.partition(".")[0]
    for extra, brought in EXTRAS.items():
        if package in brought:
            return (
                f'pip install "basinscope[{extra}]", or from a checkout '
                f'pip install -c constraints.txt ".[{extra}]"; [all] brings every extra'
            )
    return ""


def require_one_of(option: str, given: str, valid: tuple[str, ...]) -> None:
    """Refuse another value of an option, by its name."""
    if given not in valid:
        raise ValueError(f"{option} {given!r}: choose of {', '.join(valid)}")


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
