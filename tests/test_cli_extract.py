"""``basinscope extract``: from a folder with a model and data to a store."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from basinscope import cli
from basinscope.cli_extract import extract
from basinscope.io.activation_store import open_activations
from basinscope.models.extraction import ExtractionConfig
from basinscope.models.extraction import extract as extract_batch
from tests.conftest import token_rows
from tests.models_small import tiny_model

app = typer.Typer()
app.command()(extract)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model("gpt_neox").save_pretrained(tmp_path / "model")
    token_rows(12, 9, seed=1).save_to_disk(tmp_path / "data")
    return tmp_path


def test_the_store_holds_what_was_asked_for(folder: Path) -> None:
    options = ["--take", "resid_out", "--take", "head_out", "--positions", "0,-1", "--rows", "5"]
    done = invoke(folder, *options)
    assert done.exit_code == 0, done.output
    assert "5 arrays of 5 sequences" in done.output
    tree = open_activations(folder / "a.zarr")
    ids = torch.from_numpy(tree["input_ids"].values)
    assert np.array_equal(ids, token_rows(12, 9, seed=1)[:5]["input_ids"])
    config = ExtractionConfig(resid_out=True, head_out=True, target_token_positions=[0, -1])
    cache = extract_batch(tiny_model("gpt_neox"), ids, config)
    for name in cache:
        np.testing.assert_allclose(tree[name].values, cache[name].numpy(), rtol=1e-5, atol=1e-6)
    assert invoke(folder, *options).exit_code == 0, "the same command gives the same store"


def test_the_usual_store_is_ready_for_a_lens(folder: Path) -> None:
    assert invoke(folder).exit_code == 0
    tree = open_activations(folder / "a.zarr")
    assert {"resid_out_0", "resid_out_1", "last_layernorm_mean", "input_ids"} <= set(tree.data_vars)
    assert "weight" in tree["unembedding"]


@pytest.mark.parametrize(
    ("options", "following"),
    [
        ([], "lens {store}"),
        (["--take", "resid_in"], "lens {store} --stream resid_in"),
        (["--no-unembedding"], "lens {store} --model {model}"),
        (["--take", "head_out", "--take", "logits"], "activations show {store}"),
    ],
)
def test_the_command_that_it_names_next_runs(
    folder: Path, options: list[str], following: str
) -> None:
    command = following.format(store=folder / "a.zarr", model=folder / "model")
    done = " ".join(invoke(folder, *options).output.split())
    assert done.endswith(f"Next: basinscope {command}")
    assert CliRunner().invoke(cli.app, command.split()).exit_code == 0


def test_rows_of_several_lengths_are_stored(folder: Path) -> None:
    rows = [row[: 4 + i % 5] for i, row in enumerate(token_rows(12, 9, seed=1)["input_ids"])]
    lines = [json.dumps({"input_ids": row.tolist()}) for row in rows]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    options = ["-o", folder / "a.zarr", "--position", "-2,-1"]
    done = run(folder / "model", folder / "rows.jsonl", *options)
    assert done.exit_code == 0, done.output
    tree = open_activations(folder / "a.zarr")
    assert tree["from_end"].values.tolist() == [-2, -1]
    assert [row[row >= 0].tolist() for row in tree["input_ids"].values] == [
        row.tolist() for row in rows
    ]
    shown = CliRunner().invoke(cli.app, ["lens", str(folder / "a.zarr"), "--json", "--measures"])
    assert shown.exit_code == 0, shown.output
    figures = json.loads(shown.stdout)
    assert figures["positions"] == ["-2", "-1"]
    assert figures["input_ids"] == rows[0][-2:].tolist()
    for command in (["verify"], ["activations", "show"]):
        told = CliRunner().invoke(cli.app, [*command, str(folder / "a.zarr")])
        assert told.exit_code == 0, told.output
    refused = run(folder / "model", folder / "rows.jsonl", "-o", folder / "b.zarr")
    assert refused.exit_code == 2
    assert "are other ones in each of sequences of 4 to 8 tokens" in " ".join(
        refused.output.split()
    )


@pytest.fixture
def prompts(folder: Path) -> Path:
    """A text file with lines of several lengths, and a tokenizer beside the model."""
    words = {word: n for n, word in enumerate(["<bos>", "<eos>", *"abcdefgh"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>"
    )
    tokenizer.save_pretrained(folder / "model")
    path = folder / "prompts.txt"
    path.write_text("a b c\nd\n\na b c d e f\ng h\n")
    return path


def test_each_text_is_a_sequence(folder: Path, prompts: Path) -> None:
    options = ["-o", folder / "a.zarr", "--each-text", "--position", "-2,-1"]
    done = run(folder / "model", prompts, *options)
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    assert "are left out: 1 of 5; sequences are numbered without them" in said
    assert "arrays of 4 sequences" in said
    tree = open_activations(folder / "a.zarr")
    rows = [[0, 2, 3, 4], [0, 5], [0, 2, 3, 4, 5, 6, 7], [0, 8, 9]]
    assert [row[row >= 0].tolist() for row in tree["input_ids"].values] == rows
    config = ExtractionConfig(resid_out=True, target_token_positions=[-2, -1])
    for number, row in enumerate(rows):
        alone = extract_batch(tiny_model("gpt_neox"), torch.tensor([row]), config)
        np.testing.assert_allclose(
            tree["resid_out_1"].values[number], alone["resid_out_1"][0].numpy(), atol=1e-6
        )
    asked = ["lens", str(folder / "a.zarr"), "--example", "3", "--text", "--json"]
    shown = CliRunner().invoke(cli.app, asked)
    assert shown.exit_code == 0, shown.output
    figures = json.loads(shown.stdout)
    assert (figures["positions"], figures["input_ids"]) == (["-2", "-1"], [8, 9])


def test_each_text_is_as_long_as_the_model_takes(folder: Path, prompts: Path) -> None:
    limit = tiny_model("gpt_neox").config.max_position_embeddings
    long = folder / "long.jsonl"
    lines = [{"prompt": "a b"}, {"prompt": "a " * limit}, {"prompt": "c"}]
    long.write_text("\n".join(map(json.dumps, lines)))
    options = ["-o", folder / "a.zarr", "--each-text", "--position", "last", "--column", "prompt"]
    refused = run(folder / "model", long, *options)
    assert refused.exit_code == 2
    said = " ".join(refused.output.split())
    assert f"than the {limit} that the model is made for: 1 of 3 (text 1 has {limit + 1})" in said
    assert not (folder / "a.zarr").exists()
    cut = run(folder / "model", long, *options, "--max-length", limit, "--no-bos")
    assert cut.exit_code == 0, cut.output
    assert open_activations(folder / "a.zarr")["input_ids"].shape == (3, limit)
    shorter = run(folder / "model", long, *options[2:], "-o", folder / "b.zarr", "--max-length", 3)
    assert "texts with more than 3 tokens: 1 of 3" in " ".join(shorter.output.split())


def test_text_needs_to_be_told_how_to_become_sequences(folder: Path, prompts: Path) -> None:
    plain = run(folder / "model", prompts, "-o", folder / "a.zarr")
    assert plain.exit_code == 2
    said = " ".join(plain.output.split())
    assert "it needs max_length (tokens per row; --max-length in a shell)" in said
    assert said.count("--each-text") == 1
    ids = invoke(folder, "--each-text")
    assert ids.exit_code == 2
    assert "leave --each-text out" in " ".join(ids.output.split())


@pytest.mark.parametrize("options", [("--layers", "0:2"), ("--layer", "1,0:1")])
def test_layers_are_given_as_ranges_too(folder: Path, options: tuple[str, str]) -> None:
    done = invoke(folder, *options, "--position", "1:3,-1")
    assert done.exit_code == 0, done.output
    tree = open_activations(folder / "a.zarr")
    assert {"resid_out_0", "resid_out_1"} <= set(tree.data_vars)
    assert tree["position"].values.tolist() == [1, 2, 8]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--take", "resid"], "--take resid: choose of embed, resid_in"),
        (["--layers", "one"], "--layers 'one': give all, or numbers such as 0,4:8"),
        (["--layers", "1:1"], "--layers '1:1': give all, or numbers such as 0,4:8"),
        (["--layers", "7"], "the model has layers 0 to 1"),
        (["--positions", "first"], "positions 'first'"),
        (["--positions", "9"], "position 9 is out of range"),
        (["--dtype", "int8"], "dtype must be one of"),
        (["--device", "foo"], "error: device='foo' cannot be used here"),
        (["--rows", "0"], "--rows"),
    ],
)
def test_a_wrong_option_is_one_clear_error(folder: Path, options: list[str], message: str) -> None:
    done = invoke(folder, *options)
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())
    assert not (folder / "a.zarr").exists()


def test_a_model_that_is_nowhere_is_named(folder: Path) -> None:
    given = ["nomodel", str(folder / "data"), "-o", str(folder / "a.zarr")]
    said = " ".join(CliRunner().invoke(app, given).output.split())
    assert "no model 'nomodel': there is no such directory here, and from the hub it could" in said


def invoke(folder: Path, *options: str) -> Result:
    return run(folder / "model", folder / "data", "-o", folder / "a.zarr", *options)


def run(*given: object) -> Result:
    return CliRunner().invoke(app, [str(part) for part in given])
