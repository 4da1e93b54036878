"""Commands for stored activations: ``basinscope activations list | show | rm``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from basinscope.report.console import err, out, print_json, readable_errors, short_warnings

if TYPE_CHECKING:
    from basinscope.io.activation_index import Run
    from basinscope.io.activations import QueryResult

app = typer.Typer(help="Find, show and remove stored activations.", no_args_is_help=True)

NUMBERS = {"ignore_unknown_options": True}  # so that -1 is a run, and no option

Store = Annotated[
    Path, typer.Argument(help="A base directory of experiments, or one store or run.")
]
Experiment = Annotated[str, typer.Option(help="Only this experiment. Default: all.")]
Model = Annotated[str | None, typer.Option(help="Only runs of this model.")]
Tag = Annotated[str | None, typer.Option(help="Only runs with this tag.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
RunName = Annotated[
    str | None, typer.Argument(help="A run: its number in the list, or its time. Default: -1.")
]


@app.command("list")
def list_runs(
    store: Store,
    experiment: Experiment = "*",
    model: Model = None,
    tag: Tag = None,
    as_json: AsJson = False,
) -> None:
    """List the runs under a base directory, the oldest first."""
    with readable_errors(), short_warnings():
        if _is_one(store):
            raise ValueError(f"{store} is one run: see it with basinscope activations show {store}")
        found = _query(store, experiment, model, tag)
        if as_json:
            print_json([_described(run) for run in found])
        else:
            out.print(_table(found))
        for path, why in found.not_whole.items():
            err.print(f"[yellow]{escape(str(path))}[/]: {escape(why)}", soft_wrap=True)


@app.command(context_settings=NUMBERS)
def show(
    store: Store,
    run: RunName = None,
    experiment: Experiment = "*",
    model: Model = None,
    tag: Tag = None,
    as_json: AsJson = False,
) -> None:
    """Show the metadata and the arrays of one run, or of one store."""
    with readable_errors(), short_warnings():
        from basinscope.io.activation_store import open_activations

        if _is_one(store):
            path = store
        else:
            with _plain_errors():
                path = _query(store, experiment, model, tag).find(_identifier(run or "-1")).path
        tree = open_activations(path, allow_incomplete=True)
        arrays = {
            str(name): {
                "dims": list(map(str, values.dims)),
                "shape": list(values.shape),
                "dtype": values.attrs.get("source_dtype", str(values.dtype)),
            }
            for name, values in tree.data_vars.items()
        }
        groups = sorted(tree.children)
        attributes = {str(name): value for name, value in tree.attrs.items()}
        if as_json:
            shown = {"path": str(path), "metadata": attributes, "arrays": arrays, "groups": groups}
            print_json(shown)
            return
        out.print(f"[bold]{escape(str(path))}[/]", soft_wrap=True)
        if attributes.get("completed") != 1:
            out.print("[yellow]incomplete: the call that writes it continues it[/]")
        for name, value in attributes.items():
            out.print(escape(f"{name}: {json.dumps(value)}"), soft_wrap=True, highlight=False)
        table = Table("array", "dims", "shape", "type", box=None)
        for name, of in arrays.items():
            shape = ", ".join(map(str, of["shape"]))
            table.add_row(escape(name), ", ".join(of["dims"]), shape, of["dtype"])
        out.print(table)
        if groups:
            out.print(f"with {', '.join(groups)}")


@app.command(context_settings=NUMBERS)
def rm(
    store: Store,
    run: Annotated[str, typer.Argument(help="A run: its number in the list, or its time.")],
    experiment: Experiment = "*",
    model: Model = None,
    tag: Tag = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Delete a run of a base directory, or what is left of one that was stopped."""
    with readable_errors(), short_warnings():
        if _is_one(store):
            raise ValueError(f"{store} is one run: give its base directory, and its time")
        found = _query(store, experiment, model, tag)
        identifier = _identifier(run)
        with _plain_errors():
            path = found.path_of(identifier)
        if not yes:
            typer.confirm(f"Delete {path} and all in it?", abort=True)
        with _plain_errors():
            found.remove(identifier)
        out.print(f"{path} is deleted", soft_wrap=True)


def _is_one(store: Path) -> bool:
    from basinscope.io.activation_index import STORE

    return (store / "zarr.json").is_file() or (store / STORE).is_dir()


def _query(store: Path, experiment: str, model: str | None, tag: str | None) -> QueryResult:
    from basinscope.io.activations import ActivationLoader

    return ActivationLoader(store).query(experiment, model_name=model, tag=tag)


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Say in words that there is no such run."""
    try:
        yield
    except (IndexError, KeyError, RuntimeError) as error:
        raise ValueError(error.args[0]) from error


def _identifier(name: str) -> int | str:
    return int(name) if re.fullmatch(r"-?\d+", name) else name


def _described(run: Run) -> dict[str, Any]:
    return {
        "experiment": run.experiment_name,
        "model": run.metadata.get("model_name", run.model_dir.name),
        "time": run.time,
        "tag": run.metadata.get("tag"),
        "path": str(run.path),
        "arrays": run.metadata.get("arrays", ""),
    }


def _table(found: QueryResult) -> Table:
    table = Table(box=None)
    table.add_column(no_wrap=True)
    table.add_column("experiment")
    table.add_column("model")
    table.add_column("time", no_wrap=True)
    table.add_column("tag")
    table.add_column("arrays", overflow="fold")
    for number, run in enumerate(found):
        of = _described(run)
        words = [of[field] for field in ("experiment", "model", "time", "tag", "arrays")]
        table.add_row(str(number), *("" if word is None else escape(str(word)) for word in words))
    return table
