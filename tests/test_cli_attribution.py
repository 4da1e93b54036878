"""``basinscope attribute``: harvest, merge, list and report from the shell."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner, Result

from basinscope.analysis.attribution import AttributionStore
from basinscope.cli_attribution import app
from tests.conftest import token_rows
from tests.io.attributions_random import new_writer, random_store, random_sums
from tests.models_small import tiny_model

whole = typer.Typer()
whole.add_typer(app, name="attribute")
whole.command("other")(lambda: None)  # an app of one command would drop its name


def test_ranks_harvested_by_name_or_by_default_merge_to_the_single_run(tmp_path: Path) -> None:
    tiny_model("gpt_neox").save_pretrained(tmp_path / "model")
    token_rows(10, 6, seed=1).save_to_disk(tmp_path / "data")
    given = [tmp_path / "model", tmp_path / "data", "--batch-size", 2, "--output-token", 7]
    given += ["--target", "1.mlp.up", "--target", "output"]
    given += ["--source", "0.mlp.down", "--source", "embed"]
    done = invoke("run", *given, "-o", tmp_path / "one.zarr")
    assert done.exit_code == 0, done.output
    following = f"report {tmp_path / 'one.zarr'} -o page.html"
    assert f"one.zarr is complete. Next: basinscope attribute {following}" in flat(done)
    for rank in range(2):
        options = ["--rank", rank, "--world-size", 2, "-o", tmp_path / "parts"]
        done = invoke(*(options + given if rank else given + options))
        assert done.exit_code == 0, done.output
    parts = sorted((tmp_path / "parts").iterdir())
    assert [part.name for part in parts] == ["part-0-of-2.zarr", "part-1-of-2.zarr"]
    merged = invoke("merge", *parts, "-o", tmp_path / "all.zarr")
    assert merged.exit_code == 0, merged.output
    assert "all.zarr: 2 of 2 ranks, 5 batches, 60 tokens" in flat(merged)
    one, both = (AttributionStore(tmp_path / name) for name in ("one.zarr", "all.zarr"))
    assert one.layers == both.layers
    assert "1.mlp.up" in one.layers
    assert {source for _, source in one.metadata["edges"]} == {"0.mlp.down", "embed"}
    for target, source in one.metadata["edges"]:
        first, second = (store.matrix(target, source).values for store in (one, both))
        np.testing.assert_allclose(first, second, rtol=1e-12, atol=1e-12 * np.abs(first).max())


def test_the_strongest_as_a_table_and_as_json(tmp_path: Path) -> None:
    path = random_store(tmp_path / "s.zarr")
    store = AttributionStore(path)
    shown = invoke("top", path, "--target", "output:5", "-k", 3)
    assert shown.exit_code == 0, shown.output
    assert "Sources of output:5: positive attr per token" in shown.output
    expected = store.top_sources("output:5", 3)
    for entry in expected:
        assert entry.key in shown.output
        assert f"{entry.value:+.4g}" in shown.output
    figures = json.loads(invoke("top", path, "--target", "output:5", "-k", 3, "--json").stdout)
    assert [figure["key"] for figure in figures] == [entry.key for entry in expected]
    assert figures[0]["value"] == expected[0].value
    options = ["--metric", "attr_abs", "--sign", "negative", "--no-outputs", "--json"]
    options += ["--normalize", "source_count", "--normalize", "target_rms"]
    figures = json.loads(invoke("top", path, "--source", "embed:2", *options).stdout)
    wanted = store.top_targets(
        "embed:2", 10, "negative", "attr_abs", False, normalize=("source_count", "target_rms")
    )
    assert [(f["key"], f["value"]) for f in figures] == [(e.key, e.value) for e in wanted]


def test_tokens_are_shown_by_a_tokenizer(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {f"word{token}": token for token in range(11)}
    Tokenizer(WordLevel(words, unk_token="word0")).save(str(tmp_path / "tokenizer.json"))
    path = random_store(tmp_path / "s.zarr")
    for name in (tmp_path, tmp_path / "tokenizer.json"):
        shown = invoke("top", path, "--target", "0.attn.q:1", "--tokenizer", name, "--json")
        assert shown.exit_code == 0, shown.output
        figures = json.loads(shown.stdout)
        assert figures
        assert all(figure["token"] == f"word{figure['index']}" for figure in figures)
        assert "'word" in invoke("top", path, "--source", "embed:1", "--tokenizer", name).output


def test_a_report_is_written_once(tmp_path: Path) -> None:
    path = random_store(tmp_path / "s.zarr")
    page = tmp_path / "page.html"
    done = invoke("report", path, "-o", page, "--component", "1.mlp.up:2")
    assert done.exit_code == 0, done.output
    before = page.read_text()
    assert "1.mlp.up:2" in before
    again = invoke("report", path, "-o", page)
    assert again.exit_code == 2
    assert "exists and is left as it is" in flat(again)
    assert page.read_text() == before


def test_a_harvest_from_one_layer_can_be_reported(tmp_path: Path) -> None:
    tiny_model("gpt_neox").save_pretrained(tmp_path / "model")
    token_rows(4, 6, seed=1).save_to_disk(tmp_path / "data")
    store = tmp_path / "pile.zarr"
    options = ["--batch-size", 4, "--output-token", 3, "--source", "0.mlp.down"]
    done = invoke(tmp_path / "model", tmp_path / "data", "-o", store, *options)
    assert done.exit_code == 0, done.output
    for component in ("1.mlp.up:7", "0.mlp.down:3", "output:3"):
        page = tmp_path / f"{component}.html"
        done = invoke("report", store, "-o", page, "--component", component)
        assert done.exit_code == 0, done.output
        assert component in page.read_text()


def test_what_is_wrong_is_one_clear_error(tmp_path: Path) -> None:
    path = random_store(tmp_path / "s.zarr", world_size=2)
    for arguments, said in (
        (["top", path], "give --target KEY for its sources, or --source KEY"),
        (["top", path, "--target", "output:1", "--source", "embed:1"], "give --target KEY"),
        (["top", path, "--target", "1.mlp:1"], "did you mean 1.mlp.up"),
        (["top", tmp_path / "nothing", "--target", "output:1"], "no store at"),
        (["merge", path, "-o", tmp_path / "all.zarr"], "ranks 1 of 2 are missing"),
        (["merge", path, path, "-o", tmp_path / "all.zarr"], "would count twice"),
        ([tmp_path / "m", tmp_path / "d", "-o", tmp_path / "x"], "must be a directory of Dataset"),
        (["run", "m", "d", "-o", "x", "--components", "atoms"], "choose of neurons, singular"),
    ):
        done = invoke(*arguments)
        assert done.exit_code == 2, done.output
        assert said in flat(done)
        assert "Traceback" not in done.output
    some = invoke("merge", path, "-o", tmp_path / "some.zarr", "--allow-missing")
    assert "1 of 2 ranks" in some.output
    assert "lacks the parts of ranks 1 of 2" in flat(invoke("top", path, "--target", "output:1"))


def test_an_unfinished_store_says_so(tmp_path: Path) -> None:
    with new_writer(tmp_path / "s.zarr") as writer:
        writer.save(*random_sums(np.random.default_rng(0)), tokens=5, batches_done=2)
    shown = invoke("top", tmp_path / "s.zarr", "--target", "output:1")
    assert shown.exit_code == 0
    assert "being harvested or was stopped: it holds 2 batches" in flat(shown)


def test_a_stopped_harvest_shows_in_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from basinscope.attribution import harvest

    tiny_model("gpt_neox").save_pretrained(tmp_path / "model")
    token_rows(4, 6, seed=1).save_to_disk(tmp_path / "data")

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(harvest, "harvest_attributions", stopped)
    done = invoke(tmp_path / "model", tmp_path / "data", "-o", tmp_path / "s.zarr")
    assert done.exit_code == 130
    assert "stopped; the same command continues" in flat(done)


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(whole, ["attribute", *map(str, arguments)])


def flat(result: Result) -> str:
    return result.output.replace("\n", " ")
