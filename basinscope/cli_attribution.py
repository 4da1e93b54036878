"""``basinscope attribute``: harvest attributions, add up parts, list and draw the strongest."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from basinscope.cli_extract import Bos, Column
from basinscope.report.console import (
    out,
    print_json,
    readable_errors,
    require_one_of,
    short_warnings,
)

if TYPE_CHECKING:
    from basinscope.analysis.attribution import Attribution, AttributionStore


class _RunByDefault(TyperGroup):
    """A group whose command ``run`` need not be named."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in {*self.commands, "--help"}:
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_RunByDefault,
    help="What components give to each other over a data set. MODEL DATA -o DIR harvests (run).",
    no_args_is_help=True,
)

StorePath = Annotated[Path, typer.Argument(help="A store of attributions (.zarr).")]
Metric = Annotated[str, typer.Option(help="attr, attr_abs or mean_squared_attr.")]
Normalization = Annotated[
    list[str] | None,
    typer.Option(
        "--normalize",
        help="source_importance or source_count, and target_rms; may be given again.",
    ),
]
TokenizerName = Annotated[
    str | None,
    typer.Option("--tokenizer", help="Folder, tokenizer.json or name, for tokens' text."),
]


@app.command()
def run(
    model: Annotated[str, typer.Argument(help="A Hugging Face causal LM: a directory or a name.")],
    data: Annotated[
        Path, typer.Argument(help="A saved Dataset, or a parquet, JSON, CSV or text file.")
    ],
    output: Annotated[
        Path,
        typer.Option("--out", "-o", help="Where this rank's store goes: a directory, or X.zarr."),
    ],
    batch_size: Annotated[int, typer.Option(help="Sequences per batch.")] = 8,
    n_batches: Annotated[
        int | None, typer.Option(help="Batches over all ranks. Default: all of the data.")
    ] = None,
    rank: Annotated[int, typer.Option(help="Which of the workers this is, from 0.")] = 0,
    world_size: Annotated[int, typer.Option(help="How many workers there are.")] = 1,
    components: Annotated[str, typer.Option(help="neurons or singular (directions).")] = "neurons",
    target: Annotated[
        list[str] | None,
        typer.Option(help="Only this layer, such as 0.mlp.up or output; may be given again."),
    ] = None,
    source: Annotated[
        list[str] | None,
        typer.Option(help="Only from this layer, such as 0.attn.o or embed; may be given again."),
    ] = None,
    output_token: Annotated[
        list[int] | None,
        typer.Option(help="A token id that is a target itself, for all metrics; again for more."),
    ] = None,
    importance_threshold: Annotated[
        float, typer.Option(help="Importance above which a component is active.")
    ] = 0.0,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens in a sequence, where the data is text.")
    ] = None,
    column: Column = "text",
    bos: Bos = True,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
) -> None:
    """Harvest attributions over a data set. The same command continues a stopped run."""
    with readable_errors(), short_warnings():
        require_one_of("--components", components, ("neurons", "singular"))

        from basinscope.attribution.harvest import harvest_attributions
        from basinscope.models.components import singular_directions
        from basinscope.sampling.loading import load_model, load_tokens

        dataset = load_tokens(data, model, max_length=max_length, column=column, add_bos_token=bos)
        loaded = load_model(model, dtype)
        store = harvest_attributions(
            loaded,
            dataset,
            components="neurons" if components == "neurons" else singular_directions(loaded),
            targets=target,
            sources=source,
            output_tokens=output_token or (),
            batch_size=batch_size,
            n_batches=n_batches,
            rank=rank,
            world_size=world_size,
            importance_threshold=importance_threshold,
            output_path=part_path(output, rank, world_size),
            device=device,
        )
        following = (
            f"report {store} -o page.html"
            if world_size == 1
            else f"merge {store.parent}/*.zarr -o all.zarr"
        )
        out.print(f"{store} is complete. Next: basinscope attribute {following}", soft_wrap=True)


def part_path(output: Path, rank: int, world_size: int) -> Path:
    """Name the store of one rank.

    Examples
    --------
    >>> str(part_path(Path("runs"), 3, 16)), str(part_path(Path("all.zarr"), 0, 1))
    ('runs/part-03-of-16.zarr', 'all.zarr')
    """
    if output.suffix == ".zarr":
        return output
    return output / f"part-{rank:0{len(str(world_size))}}-of-{world_size}.zarr"


@app.command()
def merge(
    parts: Annotated[list[Path], typer.Argument(help="Stores of the ranks, or merged ones.")],
    output: Annotated[Path, typer.Option("--out", "-o", help="The store to write.")],
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Take less than all ranks.")
    ] = False,
) -> None:
    """Add up the parts that ranks harvested."""
    with readable_errors(), short_warnings():
        from basinscope.io.attributions_merge import merge_attributions

        store = merge_attributions(parts, output, allow_missing=allow_missing)
        metadata = store.metadata
        out.print(
            f"{output}: {len(metadata['parts'])} of {metadata['parts'][0][1]} ranks, "
            f"{metadata['batches']:,} batches, {metadata['tokens']:,} tokens",
            soft_wrap=True,
        )


@app.command()
def top(
    store: StorePath,
    target: Annotated[
        str | None, typer.Option(help="List the sources of this one, such as output:42.")
    ] = None,
    source: Annotated[
        str | None, typer.Option(help="List the targets of this one, such as 0.mlp.up:5.")
    ] = None,
    k: Annotated[int, typer.Option("-k", help="How many.")] = 10,
    metric: Metric = "attr",
    sign: Annotated[str, typer.Option(help="positive or negative.")] = "positive",
    normalize: Normalization = None,
    outputs: Annotated[bool, typer.Option(help="List output tokens among targets.")] = True,
    tokenizer: TokenizerName = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the strongest sources of a target, or targets of a source."""
    with readable_errors(), short_warnings():
        opened = _opened(store, tokenizer)
        if target is not None and source is None:
            found = opened.top_sources(target, k, sign, metric, normalize=normalize)
            title = f"Sources of {target}"
        elif source is not None and target is None:
            found = opened.top_targets(source, k, sign, metric, outputs, normalize=normalize)
            title = f"Targets of {source}"
        else:
            raise ValueError("give --target KEY for its sources, or --source KEY for its targets")
        if as_json:
            print_json([asdict(entry) for entry in found])
        else:
            out.print(f"{title}: {sign} {metric} per token", soft_wrap=True, highlight=False)
            out.print(_table(found))


@app.command()
def report(
    store: StorePath,
    output: Annotated[Path, typer.Option("--out", "-o", help="The HTML file to write.")],
    component: Annotated[
        list[str] | None,
        typer.Option(help="Show this one, such as 0.mlp.up:5 or output:42; again for more."),
    ] = None,
    k: Annotated[int, typer.Option("-k", help="Sources and targets of each.")] = 12,
    normalize: Normalization = None,
    tokenizer: TokenizerName = None,
) -> None:
    """Write a page with a heat map of layers, and the strongest of some components."""
    with readable_errors(), short_warnings():
        from basinscope.report.attribution_page import attribution_page

        opened = _opened(store, tokenizer)
        attribution_page(opened, output, component or (), k=k, normalize=normalize)
        out.print(f"written to {escape(str(output))}", soft_wrap=True)


def _opened(store: Path, tokenizer: str | None) -> AttributionStore:
    from basinscope.analysis.attribution import AttributionStore
    from basinscope.sampling.loading import load_tokenizer

    return AttributionStore(store, None if tokenizer is None else load_tokenizer(tokenizer))


def _table(entries: list[Attribution]) -> Table:
    table = Table(show_edge=False)
    table.add_column("", justify="right")
    table.add_column("component", no_wrap=True)
    tokens = any(entry.token is not None for entry in entries)
    if tokens:
        table.add_column("token", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    for rank, entry in enumerate(entries, 1):
        text = "" if entry.token is None else escape(repr(entry.token))
        row = [str(rank), entry.key, *([text] if tokens else []), f"{entry.value:+.4g}"]
        table.add_row(*row)
    return table
