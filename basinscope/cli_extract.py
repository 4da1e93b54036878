"""``basinscope extract``: activations of a data set, from the shell."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from basinscope.report.console import out, readable_errors, short_warnings
from basinscope.sampling.numbers import GRAMMAR, parse_numbers


def extract(
    model: Annotated[str, typer.Argument(help="A Hugging Face causal LM: a directory or a name.")],
    data: Annotated[
        Path, typer.Argument(help="A saved Dataset, or a parquet, JSON, CSV or text file.")
    ],
    output: Annotated[Path, typer.Option("--out", "-o", help="The store to write.")],
    what: Annotated[
        list[str] | None,
        typer.Option(
            "--take",
            help="resid_in, resid_mid, resid_out, attn_in, attn_out, mlp_out, head_out, queries, "
            "keys, values, attn_pattern, embed, last_layernorm, logits; may be given again. "
            "Default: resid_out and last_layernorm.",
        ),
    ] = None,
    layers: Annotated[str, typer.Option("--layers", "--layer", help=f"Layers: {GRAMMAR}.")] = "all",
    positions: Annotated[
        str,
        typer.Option(
            "--positions", "--position", help=f"Tokens: {GRAMMAR}; also last, -1, 2: and :8."
        ),
    ] = "all",
    average: Annotated[bool, typer.Option("--average", help="Average over the tokens.")] = False,
    rows: Annotated[
        int | None, typer.Option(min=1, help="Only the first so many sequences.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences in a forward pass.")] = 8,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens in a sequence, where the data is text.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    unembedding: Annotated[
        bool, typer.Option(help="Store the unembedding too, for basinscope lens.")
    ] = True,
) -> None:
    """Stream activations of a data set to a store. The same command continues a stopped run."""
    with readable_errors(), short_warnings():
        from basinscope.extraction import extract_dataset
        from basinscope.models.extraction import ExtractionConfig
        from basinscope.models.positions import parse_positions
        from basinscope.sampling.job import choose_device
        from basinscope.sampling.loading import load_model, load_tokens

        kinds = what or ["resid_out", "last_layernorm"]
        _refuse_unknown(kinds)
        config = ExtractionConfig(
            **dict.fromkeys(kinds, True),
            layers=parse_numbers("--layers", layers),
            target_token_positions=parse_positions(positions),
            average=average,
        )
        place = choose_device(device)
        dataset = load_tokens(data, model, max_length=max_length)
        if rows is not None:
            dataset = dataset.select(range(min(rows, len(dataset))))
        tree = extract_dataset(
            load_model(model, dtype).to(place),
            dataset,
            config,
            output=output,
            batch_size=batch_size,
            save_unembedding=unembedding,
        )
        gigabytes = tree.nbytes / 1e9
        following = _following(kinds, output, model, unembedding)
        out.print(
            f"{output}: {len(tree.data_vars)} arrays of {len(dataset):,} sequences, "
            f"{gigabytes:,.2f} GB. Next: basinscope {following}",
            soft_wrap=True,
        )


def _following(kinds: list[str], output: Path, model: str, unembedding: bool) -> str:
    """The command that shows what was stored."""
    stream = next((kind for kind in ("resid_out", "resid_mid", "resid_in") if kind in kinds), None)
    if stream is None:
        return f"activations show {output}"
    chosen = "" if stream == "resid_out" else f" --stream {stream}"
    return f"lens {output}{chosen}{'' if unembedding else f' --model {model}'}"


def _refuse_unknown(kinds: list[str]) -> None:
    from basinscope.models.extraction import DIMS

    if unknown := [kind for kind in kinds if kind not in DIMS]:
        raise ValueError(f"--take {', '.join(unknown)}: choose of {', '.join(DIMS)}")
