"""The command line, ``basinscope --help``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from basinscope import (
    __version__,
    cli_activations,
    cli_analysis,
    cli_attribution,
    cli_check,
    cli_compare,
    cli_extract,
    cli_lens,
)
from basinscope.cli_analysis import refuse_other_kinds
from basinscope.report.console import out, print_json, readable_errors, short_warnings
from basinscope.sampling.numbers import GRAMMAR

if TYPE_CHECKING:
    from basinscope.io.verify import Verification

CHAIN_FAILED = 3  # exit code of a run in which a chain failed
DAMAGED = 4  # exit code where a store is not what was written
MOST_SHOWN = 20  # damaged files

app = typer.Typer(
    help="Measure the loss basin around a trained model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

StorePath = Annotated[Path, typer.Argument(help="A sampling store (a .zarr directory).")]


def main() -> None:
    """Run the command line."""
    app()


def _show_version(asked: bool) -> None:
    if asked:
        out.print(f"basinscope {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """Take options that stand before any command."""


@app.command()
def demo(
    directory: Annotated[
        Path, typer.Option("--out", help="Where the model, the store and the figures go.")
    ] = Path("basinscope-demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Smaller: under 45 seconds.")] = False,
) -> None:
    """Train a small language model on Python's own sources, and measure its basin."""
    with readable_errors():
        from basinscope.demo import run_demo

        run_demo(directory, quick)


@app.command()
def sample(
    config: Annotated[Path, typer.Argument(help="A YAML file; docs/cli.md shows one.")],
    output: Annotated[Path | None, typer.Option("--out", "-o", help="The store to write.")] = None,
    model: cli_check.Model = None,
    restriction: Annotated[
        str | None, typer.Option(help="What may move: l0, l0h1, 'l0 mlp', embed, ...")
    ] = None,
    chains: Annotated[
        str | None, typer.Option(help=f"Only these chains: {GRAMMAR} (for array jobs).")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes that run chains.")] = None,
    chains_at_once: Annotated[
        int | None,
        typer.Option(min=1, help="Chains side by side in threads of one process, on a CPU."),
    ] = None,
    checkpoint_every: Annotated[
        int | None, typer.Option(min=1, help="Draws between checkpoints of a chain.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
    profile: Annotated[
        Path | None, typer.Option(help="Write a torch.profiler trace of some steps here.")
    ] = None,
) -> None:
    """Sample around a model as a YAML file says. The same command continues a stopped run."""
    overrides = {
        "output_path": output,
        "model": model,
        "restriction": restriction,
        "chains": chains,
        "workers": workers,
        "chains_at_once": chains_at_once,
        "checkpoint_every": checkpoint_every,
        "device": device,
        "profile": profile,
    }
    with readable_errors(), short_warnings():
        from basinscope.io.store import FAILED, chain_records
        from basinscope.sampling.run_file import run_from_file

        given = {name: value for name, value in overrides.items() if value is not None}
        tree, path = run_from_file(config, given)
        complete = tree.attrs.get("completed") == 1
        failed = any(record["state"] == FAILED for record in chain_records(tree).values())
        if not complete:
            state = "not complete yet: other chains are to be sampled. Next: basinscope info"
        elif len(tree.attrs.get("failed_chains", ())) == tree.sizes["chain"]:
            state = "complete, but no chain of it can be analysed. See basinscope info"
        else:
            state = "complete. Next: basinscope llc"
        out.print(escape(f"{path} is {state} {path}"), soft_wrap=True)
    if failed:
        raise typer.Exit(CHAIN_FAILED)


app.command()(cli_check.check)
app.command()(cli_analysis.llc)
app.command()(cli_compare.compare)
app.command()(cli_analysis.bif)
app.command()(cli_analysis.reliability)
app.command()(cli_analysis.susceptibilities)
app.command()(cli_extract.extract)
app.command()(cli_lens.lens)
app.add_typer(cli_activations.app, name="activations")
app.add_typer(cli_attribution.app, name="attribute")


@app.command()
def info(store: StorePath) -> None:
    """Show what a store holds, how large it is, and how far each chain is."""
    with readable_errors(), short_warnings():
        from basinscope.io.store import SampleStore, open_store, total_seconds
        from basinscope.report.tables import arrays_table, chains_table, phases_table

        refuse_other_kinds(store)
        tree = open_store(store)
        attributes = tree.attrs
        out.print(
            f"[bold]{escape(str(store))}[/]  {attributes.get('created_by', 'written by devinterp')}"
        )
        config = attributes.get("metadata", {}).get("config", {})
        model = config.get("model")
        if model:
            out.print(f"model: {model['class']}, {model['parameters']:,} parameters")
        settings = config.get("sampler", {})
        shown = ("lr", "n_beta", "localization", "num_chains", "num_draws", "batch_size")
        out.print("  ".join(f"{name}={settings[name]}" for name in shown if name in settings))
        out.print()
        out.print(arrays_table(store))
        if "chains" in tree.children:
            samples = SampleStore(store)
            records = samples.records()
            running = {chain for chain in records if samples.is_locked(chain)}
            out.print()
            out.print(chains_table(records, running))
            if seconds := total_seconds(records):
                out.print()
                out.print(phases_table(seconds))


@app.command()
def verify(
    stores: Annotated[list[Path], typer.Argument(help="Stores of any kind.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Read whole stores and compare every checksum, after a copy or a crash; changes nothing.

    In a sampling store missing files are found too; unfinished chains are no damage.
    Exit code 0: nothing wrong was found. 4: something is damaged or missing.
    """
    with readable_errors():
        from basinscope.io.verify import require_zarr
        from basinscope.io.verify import verify as read_all

        for store in stores:
            require_zarr(store)
        found = []
        for store in stores:
            found.append(read_all(store))
            if not as_json:
                _show_verification(found[-1])
        if as_json:
            print_json([{**asdict(one), "path": str(one.path)} for one in found])
    if any(one.damaged for one in found):
        raise typer.Exit(DAMAGED)


def _show_verification(found: Verification) -> None:
    from dask.utils import format_bytes

    what = f"{found.files:,} files of arrays, {format_bytes(found.bytes_read)}"
    if found.damaged:
        state = f"[red]{len(found.damaged)} damaged or missing[/]"
    elif found.complete and not found.unchecked:
        state = "as they were written"
    else:
        state = "none is damaged"
    if found.unchecked:
        state += f"; {found.unchecked:,} carry no checksum"
    if not found.complete:
        state += "; whether some are missing, a store of this kind does not tell"
    out.print(f"[bold]{escape(str(found.path))}[/]  {what}: {state}", soft_wrap=True)
    for problem in (*found.damaged[:MOST_SHOWN], *found.unfinished):
        out.print(f"  {escape(problem)}", soft_wrap=True, highlight=False)
    if len(found.damaged) > MOST_SHOWN:
        out.print(f"  and {len(found.damaged) - MOST_SHOWN} more: --json lists all")


@app.command()
def report(
    store: StorePath,
    output: Annotated[Path, typer.Option("--out", "-o", help="The HTML file to write.")],
    burn_in: Annotated[int, typer.Option(help="Steps to leave out of every chain.")] = 0,
) -> None:
    """Write a page about a sampling store: its LLC, its chains, where single tokens move."""
    with readable_errors(), short_warnings():
        from basinscope.io.store import open_store
        from basinscope.report.samples_page import samples_page

        refuse_other_kinds(store)
        samples_page(open_store(store), output, str(store), burn_in=burn_in)
        out.print(f"written to {escape(str(output))}", soft_wrap=True)


@app.command()
def doctor(
    bench: Annotated[
        bool, typer.Option("--bench", help="Measure the device, and each kernel against it.")
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="What --bench measures; default: the GPU if there is one.")
    ] = None,
) -> None:
    """Show versions, devices, and which kernel path each would use."""
    with readable_errors():
        from basinscope.report.doctor import report

        report(out)
        if bench:
            from basinscope.report.speed import report_speed
            from basinscope.sampling.job import choose_device

            out.print()
            report_speed(out, choose_device(device))


if __name__ == "__main__":
    main()
