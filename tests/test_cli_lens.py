"""``basinscope lens``: what it prints and draws of a store of activations."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from basinscope import cli_lens
from basinscope.extraction import extract_dataset
from basinscope.io.activation_store import open_activations
from basinscope.io.activations import ActivationSaver
from basinscope.lens import LogitLens
from basinscope.models.extraction import ExtractionConfig
from tests.models.models_lens import VOCABULARY, built, some_ids

ROWS, POSITIONS = 3, 9
CONFIG = ExtractionConfig(resid_in=True, resid_out=True, last_layernorm=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    """Activations with and without their unembedding, the model, and a tokenizer."""
    path = tmp_path_factory.mktemp("lens")
    model = built("gpt2")
    model.save_pretrained(path / "model")  # type: ignore[operator]
    rows = Dataset.from_dict({"input_ids": some_ids(ROWS, POSITIONS).tolist()})
    extract_dataset(model, rows, CONFIG, output=path / "full.zarr")
    extract_dataset(model, rows, CONFIG, output=path / "bare.zarr", save_unembedding=False)
    words = {f"word{i}" if i else "\n [b]": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="word1"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def invoke(*arguments: object) -> Result:
    app = typer.Typer()
    app.command()(cli_lens.lens)
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "120"})


def expected(path: Path) -> Any:
    return LogitLens.from_store(path).top_tokens(path, "resid_out_{i}", 2).compute()


def test_the_table_has_the_top_tokens(folder: Path) -> None:
    store = folder / "full.zarr"
    shown = invoke(store, "--example", 1)
    assert shown.exit_code == 0, shown.output
    assert "layer 1" in shown.output
    top = expected(store).isel(example=1, k=0)
    lines = [line for line in shown.output.splitlines() if line.split("│")[0].strip().isdigit()]
    assert len(lines) == POSITIONS
    for position, line in enumerate(lines):
        place, read, *cells = (cell.split() for cell in line.split("│"))
        assert (place, read) == ([str(position)], [str(int(some_ids()[1, position]))])
        for layer, (token, share) in enumerate(cells):
            one = top.isel(layer=layer, position=position)
            assert token == str(int(one["token"]))
            assert float(share) == pytest.approx(float(one["probability"]), abs=0.0051)


def test_json_has_all_of_it(folder: Path) -> None:
    store = folder / "full.zarr"
    shown = invoke(store, "--example", 2, "--top", 2, "--measures", "--position", "1,7:9",
                   "--layer", 1, "--json")  # fmt: skip
    assert shown.exit_code == 0, shown.output
    figures = json.loads(shown.stdout)
    top = expected(store).isel(example=2, position=[1, 7, 8], layer=[1])
    assert figures["layers"] == [1]
    assert figures["positions"] == ["1", "7", "8"]
    assert figures["input_ids"] == some_ids()[2, [1, 7, 8]].tolist()
    np.testing.assert_array_equal(figures["tokens"], top["token"])
    np.testing.assert_allclose(figures["probabilities"], top["probability"], rtol=1e-6)
    measured = LogitLens.from_store(store).measures(store).compute().sel(layer=[1])
    ranks = figures["measures"]["rank"]
    assert ranks[0][:2] == measured["rank"][0, 2, [1, 7]].values.tolist()
    assert ranks[0][2] is None  # nothing follows the last token
    assert set(figures["measures"]) == {"entropy", "kl_to_final", "cross_entropy", "rank"}


@pytest.mark.parametrize("tokenizer", ["tokenizer.json", ""])
def test_tokens_as_text(folder: Path, tokenizer: str) -> None:
    store = folder / "full.zarr"
    shown = invoke(store, "--text", "--tokenizer", folder / tokenizer, "--top", 3, "--json")
    figures = json.loads(shown.stdout)
    texts = dict(zip(np.ravel(figures["tokens"]), np.ravel(figures["words"]), strict=True))
    words = {token: f" word{token}" if token else " \n [b]" for token in texts}  # in a sentence
    assert texts == words
    table = invoke(store, "--text", "--tokenizer", folder / tokenizer, "--top", 40)
    assert "word17" in table.output
    assert "\\n·[b]" in table.output  # not taken for a style of the terminal


def test_a_name_that_is_nowhere_is_said(folder: Path) -> None:
    for store, option, what in (("full", "--tokenizer", "tokenizer"), ("bare", "--model", "model")):
        refused = invoke(folder / f"{store}.zarr", option, "nope")
        assert refused.exit_code == 2
        said = " ".join(refused.output.split())
        assert f"no {what} 'nope': there is no such directory here, and from the hub" in said


def test_a_model_without_a_tokenizer_is_said_so_and_ids_are_shown(
    folder: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    rows = Dataset.from_dict({"input_ids": some_ids(ROWS, POSITIONS).tolist()})
    store = tmp_path / "s.zarr"
    extract_dataset(model, rows, CONFIG, output=store)
    shown = invoke(store, "--text", "--json")
    assert shown.exit_code == 0, shown.output
    (said,) = shown.stderr.splitlines()
    assert f"no tokenizer was found in the model's folder {folder / 'model'}" in said
    assert "token ids are shown" in said
    figures = json.loads(shown.stdout)
    assert np.ravel(figures["words"]).tolist() == [str(t) for t in np.ravel(figures["tokens"])]
    asked = invoke(store, "--text", "--tokenizer", folder / "model")
    assert asked.exit_code == 2
    assert "no tokenizer was found in" in " ".join(asked.output.split())


def test_options_have_the_names_that_extract_has(folder: Path) -> None:
    given = ["--example", 1, "--json"]
    one = invoke(folder / "full.zarr", "--layer", "0:2", "--position", "2:4,0", *given)
    other = invoke(folder / "full.zarr", "--layers", "1,0", "--positions", "0,2,3", *given)
    assert one.exit_code == other.exit_code == 0, one.output + other.output
    assert json.loads(one.stdout) == json.loads(other.stdout)


def test_measures_and_the_picture(folder: Path, tmp_path: Path) -> None:
    png = tmp_path / "pictures" / "lens.png"
    shown = invoke(folder / "full.zarr", "--measures", "--png", png, "--stream", "resid_in")
    assert shown.exit_code == 0, shown.output
    assert "Means over the positions" in shown.output
    assert "kl to final (nats)" in shown.output
    assert png.read_bytes().startswith(b"\x89PNG")
    store = folder / "full.zarr"
    measured = LogitLens.from_store(store).measures(store, "resid_in_{i}").compute()
    for value in measured["entropy"].isel(example=0).mean("position").values:
        assert f"{value:.3f}" in shown.output


def test_a_picture_of_too_many_positions_is_refused_before_it_is_made(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("basinscope.report.lens_figures.MAX_POSITIONS", 4)
    monkeypatch.setattr(LogitLens, "top_tokens", pytest.fail)
    shown = invoke(folder / "full.zarr", "--png", tmp_path / "lens.png")
    assert shown.exit_code == 2
    assert "at most 4 positions, not 9: choose some with --position" in shown.output


def test_layers_that_are_not_asked_for_are_not_read(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "full.zarr", tmp_path / "full.zarr")
    whole = invoke(tmp_path / "full.zarr", "--measures", "--json")
    for file in (tmp_path / "full.zarr" / "resid_out_0").glob("c.*"):
        file.write_bytes(b"damaged")
    shown = invoke(tmp_path / "full.zarr", "--layer", 1, "--measures", "--json")
    assert shown.exit_code == 0, shown.output
    for name, values in json.loads(whole.output)["measures"].items():
        assert json.loads(shown.output)["measures"][name] == [values[1]]


def test_many_layers_take_several_tables(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_lens, "TOKEN_CELLS", 30)
    shown = invoke(folder / "full.zarr")
    assert shown.output.count("position") > invoke(folder / "full.zarr", "--layer", 0).output.count(
        "position"
    )


def test_a_store_without_its_unembedding_takes_the_model(folder: Path) -> None:
    store = folder / "bare.zarr"
    refused = invoke(store)
    assert refused.exit_code == 2
    assert "holds no unembedding: give its model with --model" in " ".join(refused.output.split())
    shown = invoke(store, "--model", folder / "model", "--json")
    assert shown.exit_code == 0, shown.output
    tokens = expected(folder / "full.zarr")["token"].isel(example=0, k=[0])
    np.testing.assert_array_equal(json.loads(shown.stdout)["tokens"], tokens)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layer", "7"], "--layer '7': the store has 0 to 1, not 7"),
        (["--layer", "one"], "--layer 'one': give all, or numbers such as 0,4:8"),
        (["--layer", "1:1"], "--layer '1:1': give all, or numbers such as 0,4:8"),
        (["--layers", "0:3"], "--layer '0:3': the store has 0 to 1, not 2"),
        (["--position", "3:20"], "--position '3:20': the store has 0 to 8, not 9"),
        (["--example", "3"], "--example 3: the store has sequences 0 to 2"),
        (["--stream", "attn"], "--stream 'attn': give resid_in, resid_mid or resid_out"),
        (["--stream", "resid_mid"], "no activations fit 'resid_mid_{i}'; there are"),
        (["--top", "0"], "k=0: give 1 to 40"),
    ],
)
def test_what_is_not_there(folder: Path, arguments: list[str], message: str) -> None:
    shown = invoke(folder / "full.zarr", *arguments)
    assert shown.exit_code == 2
    assert message in " ".join(shown.output.split())


def test_no_torch_is_needed(folder: Path) -> None:
    code = f"""
import sys, typer
sys.modules["torch"] = sys.modules["transformers"] = None
from basinscope.cli_lens import lens
from pathlib import Path
lens(Path({str(folder / "full.zarr")!r}), tokenizer={str(folder)!r}, measures=True)
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_page_is_written(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "lens.html"
    done = invoke(folder / "full.zarr", "--html", page)
    assert done.exit_code == 0, done.output
    assert f"written to {page}" in "".join(done.output.split("\n"))
    assert "Means over the positions" not in done.output
    assert page.read_text().count("<img") == 6
    for option in ("--html", "--png"):
        refused = invoke(folder / "full.zarr", option, page)
        assert refused.exit_code == 2
        assert "exists and is left as it is" in " ".join(refused.output.split())
    assert page.read_text().count("<img") == 6


def test_a_page_names_the_sequence_that_was_asked_for(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "lens.html"
    done = invoke(folder / "full.zarr", "--example", 2, "--layer", 0, "--html", page)
    assert done.exit_code == 0, done.output
    assert "<h2>Sequence 2</h2>" in page.read_text()
    assert "Sequence 0" not in page.read_text()


def test_examples_may_have_names(folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "runs"
    tree = open_activations(folder / "full.zarr")
    tree.dataset = tree.to_dataset().assign_coords(example=[70, 80, 90])
    run = ActivationSaver(store).save(tree, "tiny", "all", [], {})
    shown = invoke(run, "--example", 1, "--measures", "--json")
    assert shown.exit_code == 0, shown.output
    expected_figures = invoke(folder / "full.zarr", "--example", 1, "--measures", "--json")
    assert json.loads(shown.stdout)["tokens"] == json.loads(expected_figures.stdout)["tokens"]
