"""The command ``basinscope lens``: what each layer would say next, read from stored activations."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from basinscope.report.console import out, print_json, readable_errors, short_warnings
from basinscope.report.words import Words, quoted
from basinscope.sampling.numbers import GRAMMAR, parse_numbers

if TYPE_CHECKING:
    import xarray as xr

    from basinscope.lens import LogitLens

STREAMS = ("resid_in", "resid_mid", "resid_out")
TOKEN_CELLS = 14  # of a terminal, for one token and its probability


def lens(
    store: Annotated[Path, typer.Argument(help="A store of activations (.zarr), or its run.")],
    layer: Annotated[str, typer.Option("--layer", "--layers", help=f"Layers: {GRAMMAR}.")] = "all",
    position: Annotated[
        str,
        typer.Option(
            "--position", "--positions", help=f"Tokens, counted as they are stored: {GRAMMAR}."
        ),
    ] = "all",
    example: Annotated[int, typer.Option(help="Which sequence, from 0.")] = 0,
    top: Annotated[int, typer.Option(help="Tokens of each layer and position.")] = 1,
    stream: Annotated[str, typer.Option(help="resid_in, resid_mid or resid_out.")] = "resid_out",
    text: Annotated[
        bool, typer.Option("--text", help="Show tokens as text: takes the model's tokenizer.")
    ] = False,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Folder, tokenizer.json or name of it, with --text. Default: the model."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Name or folder of the model, for stores without their unembedding."),
    ] = None,
    measures: Annotated[
        bool, typer.Option("--measures", help="Entropy, divergence, cross-entropy and rank.")
    ] = False,
    png: Annotated[Path | None, typer.Option(help="Draw it into this file.")] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write a page with all measures to this file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show the tokens that each layer's residual stream points to, at each position.

    A store that carries its unembedding is read without torch and without its model.
    """
    with readable_errors(), short_warnings():
        from basinscope.analysis.lens_inputs import model_name
        from basinscope.io.activation_store import open_activations
        from basinscope.report.lens_figures import MAX_POSITIONS
        from basinscope.report.page import require_new

        png, html = (None if file is None else require_new(file) for file in (png, html))
        tree = open_activations(store, allow_incomplete=True)
        dataset = tree.to_dataset()
        layers, chosen = _chosen(dataset, stream, layer, position, example)
        if png is not None and chosen.sizes["position"] > MAX_POSITIONS:
            raise ValueError(
                f"--png draws at most {MAX_POSITIONS} positions, not {chosen.sizes['position']}: "
                "choose some with --position"
            )
        words = _words(dataset, tokenizer) if text or tokenizer else str
        reader = _reader(store, tree, model)
        pattern = f"{stream}_{{i}}"
        tokens = reader.top_tokens(chosen, pattern, top).sel(layer=layers).compute()
        measured = None
        if measures or html:
            measured = reader.measures(chosen, pattern).sel(layer=layers).compute()
        read = _read_tokens(chosen)
        if png is not None:
            _draw(png, tokens, words, read, f"Logit lens of {reader.model_name or store.name}")
        if html is not None:
            facts = {
                "store": store,
                "model": model_name(dataset) or "unknown",
                "sequence": example,
                "stream": stream,
            }
            _write_page(html, facts, tokens, measured, words, read)
        found = tokens.isel(example=0)
        measured = None if measured is None else measured.isel(example=0)
        if as_json:
            print_json(_figures(store, example, found, measured, read, words))
            return
        heading = f"{store}, sequence {example}: top tokens of {stream} and their probabilities"
        out.print(escape(heading), soft_wrap=True)
        for table in _token_tables(found, read, words):
            out.print(table)
        if measures and measured is not None:
            out.print(_measures_table(measured))
        for file in filter(None, (png, html)):
            out.print(f"written to {escape(str(file))}", soft_wrap=True)


def _chosen(
    dataset: xr.Dataset, stream: str, layer: str, position: str, example: int
) -> tuple[list[int], xr.Dataset]:
    """Numbers of the layers, and the activations of one example; nothing is read."""
    from basinscope.analysis.lens_inputs import matching_keys, numbers_in

    if stream not in STREAMS:
        raise ValueError(f"--stream {stream!r}: give {', '.join(STREAMS[:-1])} or {STREAMS[-1]}")
    try:
        there = [numbers_in(key)[0] for key in matching_keys(dataset, f"{stream}_{{i}}")]
    except KeyError as error:
        raise ValueError(error.args[0]) from None
    examples, positions = dataset.sizes["example"], dataset.sizes["position"]
    if not 0 <= example < examples:
        raise ValueError(f"--example {example}: the store has sequences 0 to {examples - 1}")
    places = _some_of(range(positions), "--position", position)
    layers = _some_of(there, "--layer", layer)
    # measures read every layer that is there, and compare each with the last
    spare = [f"{stream}_{number}" for number in there if number not in (*layers, max(there))]
    chosen = dataset.drop_vars(spare).isel(example=[example], position=places)
    return layers, chosen.assign_coords(example=[example])


def _some_of(there: Sequence[int], option: str, text: str) -> list[int]:
    """The numbers that an option asks for, of those that there are."""
    asked = parse_numbers(option, text)
    if isinstance(asked, str):
        return list(there)
    absent = [number for number in asked if number not in there]
    if absent:
        raise ValueError(
            f"{option} {text!r}: the store has {min(there)} to {max(there)}, not {absent[0]}"
        )
    return sorted(asked)


def _reader(store: Path, tree: xr.DataTree, model: str | None) -> LogitLens:
    """The lens of the store, or else of its model."""
    from basinscope.analysis.lens_inputs import model_name
    from basinscope.lens import LogitLens
    from basinscope.sampling.loading import load_model

    if "unembedding" in tree.children:
        return LogitLens.from_store(store)
    if model is None:
        raise ValueError(
            f"{store} holds no unembedding: give its model with --model NAME (it says it is of "
            f"{model_name(tree.to_dataset()) or 'no model'})"
        )
    return LogitLens.from_model(load_model(model).eval())


def _words(dataset: xr.Dataset, tokenizer: str | None) -> Words:
    """From a token id to its text; to the id itself, with a warning, where the model has none."""
    from basinscope.analysis.lens_inputs import model_name
    from basinscope.sampling.loading import lacks_tokenizer, load_words

    name = tokenizer or model_name(dataset)
    if name is None:
        raise ValueError("the store does not name its model: give --tokenizer too")
    if tokenizer is None and lacks_tokenizer(name):
        warnings.warn(
            f"no tokenizer was found in the model's folder {name}, so token ids are shown: give "
            "one with --tokenizer",
            stacklevel=2,
        )
        return str
    return load_words(name)


def _read_tokens(chosen: xr.Dataset) -> np.ndarray | None:
    """The token at each position, -1 where that is an average; None where it is not known."""
    from basinscope.analysis.lens_inputs import token_numbers

    if "input_ids" not in chosen:
        return None
    ids = chosen["input_ids"].isel(example=0).to_numpy()
    places = token_numbers(chosen, len(ids))
    return None if places is None else np.where(places >= 0, ids[np.maximum(places, 0)], -1)


def _draw(png: Path, found: xr.Dataset, words: Words, read: np.ndarray | None, title: str) -> None:
    from basinscope.report.figures import DPI
    from basinscope.report.lens_figures import lens_heat_map

    figure = lens_heat_map(found, words=words, input_ids=read, title=title)
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, dpi=DPI)


def _write_page(
    html: Path,
    facts: dict[str, Any],
    found: xr.Dataset,
    measured: xr.Dataset | None,
    words: Words,
    read: np.ndarray | None,
) -> None:
    from basinscope.report.lens_page import lens_page

    assert measured is not None
    lens_page(
        html,
        found,
        measured,
        facts,
        words=words,
        input_ids=None if read is None else read[None],
    )


def _token_tables(found: xr.Dataset, read: np.ndarray | None, words: Words) -> Iterator[Table]:
    """A row for each position and a column for each layer; more tables where they are too wide."""
    from basinscope.analysis.lens_inputs import position_names

    layers = found["layer"].to_numpy().tolist()
    at_once = max(1, (out.width - 2 * TOKEN_CELLS) // (TOKEN_CELLS + 2))
    for start in range(0, len(layers), at_once):
        table = Table(show_edge=False, show_lines=found.sizes["k"] > 1)
        table.add_column("position", justify="right")
        table.add_column("token", no_wrap=True)
        for number in layers[start : start + at_once]:
            table.add_column(f"layer {number}", no_wrap=True)
        for place, name in enumerate(position_names(found)):
            token = "" if read is None or read[place] < 0 else quoted(words(int(read[place])))
            cells = [
                _cell(found.isel(layer=layer, position=place), words)
                for layer in range(start, min(start + at_once, len(layers)))
            ]
            table.add_row(name, Text(token), *cells)
        yield table


def _cell(one: xr.Dataset, words: Words) -> Text:
    """The top tokens of one layer at one position, a line for each."""
    lines = [
        f"{quoted(words(token)) if token >= 0 else 'not finite':<8} {share:.2f}"
        for token, share in zip(
            one["token"].to_numpy().tolist(), one["probability"].to_numpy().tolist(), strict=True
        )
    ]
    return Text("\n".join(lines))


def _measures_table(measured: xr.Dataset) -> Table:
    """Means over the positions, a row for each layer."""
    table = Table(title="Means over the positions", title_justify="left", show_edge=False)
    table.add_column("layer", justify="right")
    for name, values in measured.data_vars.items():
        units = "" if values.attrs["units"] == "1" else f" ({values.attrs['units']})"
        table.add_column(f"{str(name).replace('_', ' ')}{units}", justify="right")
    for number, row in zip(
        measured["layer"].to_numpy(), measured.mean("position").to_dataarray().T.to_numpy(),
        strict=True,
    ):  # fmt: skip
        table.add_row(str(number), *(f"{value:.3f}" for value in row))
    return table


def _figures(
    store: Path,
    example: int,
    found: xr.Dataset,
    measured: xr.Dataset | None,
    read: np.ndarray | None,
    words: Words,
) -> dict[str, Any]:
    """Everything that the tables show, for JSON: lists are (layer, position) or (..., k)."""
    from basinscope.analysis.lens_inputs import position_names

    tokens = found["token"].to_numpy()
    return {
        "store": str(store),
        "example": example,
        "layers": found["layer"].to_numpy().tolist(),
        "positions": position_names(found),
        "input_ids": None if read is None else read.tolist(),
        "tokens": tokens.tolist(),
        "words": _mapped(lambda token: words(token) if token >= 0 else None, tokens.tolist()),
        "probabilities": found["probability"].to_numpy().tolist(),
        "measures": {
            str(name): values.to_numpy().tolist()
            for name, values in (measured.data_vars.items() if measured is not None else ())
        },
    }


def _mapped(change: Callable[[Any], Any], nested: Any) -> Any:
    if isinstance(nested, list):
        return [_mapped(change, inner) for inner in nested]
    return change(nested)
