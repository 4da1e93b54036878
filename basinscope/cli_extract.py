"""``basinscope extract``: activations of a data set, from the shell."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from basinscope.report.console import out, readable_errors, short_warnings
from basinscope.sampling.numbers import GRAMMAR, parse_numbers

if TYPE_CHECKING:
    from datasets import Dataset

Column = Annotated[str, typer.Option(help="Where the text is.")]
Bos = Annotated[
    bool, typer.Option(help="Begin each sequence of text with the tokenizer's BOS token.")
]


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
            "--positions",
            "--position",
            help=f"Tokens: {GRAMMAR}; also last, -1, 2: and :8. Where sequences have several "
            "lengths, all from the start or all from the end.",
        ),
    ] = "all",
    average: Annotated[bool, typer.Option("--average", help="Average over the tokens.")] = False,
    rows: Annotated[
        int | None, typer.Option(min=1, help="Only the first so many sequences.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences in a forward pass.")] = 8,
    max_length: Annotated[
        int | None,
        typer.Option(
            help="Of text: tokens in a sequence; with --each-text the most, longer texts keep "
            "their first ones."
        ),
    ] = None,
    each_text: Annotated[
        bool,
        typer.Option(
            "--each-text",
            help="Make each text a sequence of its own (a row of the text column, a line of a text "
            "file), of as many tokens as it has.",
        ),
    ] = False,
    column: Column = "text",
    bos: Bos = True,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    unembedding: Annotated[
        bool, typer.Option(help="Store the unembedding too, for basinscope lens.")
    ] = True,
) -> None:
    """Stream activations of a data set to a store. The same command continues a stopped run.

    Token ids (a column input_ids) are taken as they are. Text is tokenized, joined and cut into
    sequences of --max-length tokens; or with --each-text, each text is a sequence.
    """
    with readable_errors(), short_warnings():
        from basinscope.extraction import extract_dataset
        from basinscope.models.extraction import ExtractionConfig
        from basinscope.models.positions import parse_positions
        from basinscope.sampling.job import choose_device
        from basinscope.sampling.loading import load_model, load_texts, load_tokens

        kinds = what or ["resid_out", "last_layernorm"]
        _refuse_unknown(kinds)
        config = ExtractionConfig(
            **dict.fromkeys(kinds, True),
            layers=parse_numbers("--layers", layers),
            target_token_positions=parse_positions(positions),
            average=average,
        )
        place = choose_device(device)
        text: dict[str, Any] = {"max_length": max_length, "column": column, "add_bos_token": bos}
        if each_text:
            dataset = load_texts(data, model, rows=rows, **text)
        else:
            dataset = load_tokens(data, model, **text)
            if rows is not None:
                dataset = dataset.select(range(min(rows, len(dataset))))
        loaded = load_model(model, dtype).to(place)
        if each_text:
            _refuse_long(dataset, loaded, max_length)
        tree = extract_dataset(
            loaded,
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


def _refuse_long(texts: Dataset, model: Any, max_length: int | None) -> None:
    """Refuse texts that are longer than what the model was made for.

    Where a length was asked for, only those for which it has no positions.
    """
    from basinscope.models.forward import max_sequence_length, trained_length
    from basinscope.sampling.tokenize import token_counts

    limit = trained_length(model) if max_length is None else max_sequence_length(model)
    if limit is None:
        return
    counts = token_counts(texts)
    longer = np.flatnonzero(counts > limit)
    if longer.size:
        raise ValueError(
            f"texts with more tokens than the {limit} that the model is made for: {longer.size} of "
            f"{len(texts)} (text {longer[0]} has {counts[longer[0]]}). Leave them out, or give "
            f"--max-length {limit}, which keeps the first {limit} tokens of each"
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
