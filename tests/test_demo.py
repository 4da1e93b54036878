"""The demo's corpus and its training; the whole demo takes minutes and is run by hand."""

from __future__ import annotations

import inspect
import json
import re
import statistics
import sysconfig
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from basinscope import demo
from basinscope.cli import app
from basinscope.demo import QUICK
from basinscope.sampling.loading import load_words
from tests.analysis.stores_random import random_tree, write_tree

TINY = replace(QUICK, row_length=17, hidden_size=16, num_layers=1, train_steps=30)


def array(dataset: datasets.Dataset) -> np.ndarray:
    return np.asarray(dataset.with_format("numpy")[:]["input_ids"], dtype=np.uint8)


def test_texts_are_the_standard_library(library_texts: dict[str, list[str]]) -> None:
    texts = library_texts
    assert inspect.cleandoc(statistics.__doc__ or "") in texts["prose"]
    assert sum("def quantiles(data, *, n=4, method='exclusive'):" in t for t in texts["code"]) == 1
    assert min(map(len, texts["prose"])) >= demo.MIN_PROSE
    assert len(set(texts["prose"])) == len(texts["prose"])
    assert sum(map(len, texts["code"])) > 1e6


def test_code_has_no_docstrings(library_texts: dict[str, list[str]]) -> None:
    (module,) = (text for text in library_texts["code"] if "class NormalDist:" in text)
    assert (statistics.__doc__ or "").strip()[:40] not in module


def test_tests_and_installed_packages_are_not_read(tmp_path: Path) -> None:
    for path in ("b.py", "a/c.py", "test/d.py", "a/tests/e.py", "site-packages/f.py", "a/g.txt"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("")
    assert demo._source_files(tmp_path) == [tmp_path / "a/c.py", tmp_path / "b.py"]


def test_texts_do_not_change(monkeypatch: pytest.MonkeyPatch) -> None:
    part = Path(sysconfig.get_path("stdlib")) / "email"
    monkeypatch.setattr(demo.sysconfig, "get_path", lambda name: str(part))
    texts = demo.standard_library_texts()
    assert len(texts["code"]) > 10
    assert demo.standard_library_texts() == texts


def test_rows_are_the_bytes_and_held_out_texts_are_not_trained_on() -> None:
    parts = {"code": [f"text number {number:03} é" for number in range(40)]}
    train, held_out = demo.corpus(parts, row_length=10)
    assert train["code"].features["input_ids"].feature.dtype == "uint8"
    seen, kept = (array(rows["code"]).tobytes().split(b"\0") for rows in (train, held_out))
    expected = [text.encode() for text in parts["code"]]
    assert kept[:-1] == expected[::10][: len(kept) - 1]
    assert seen[:-1] == [text for text in expected if text not in expected[::10]][: len(seen) - 1]


def test_corpus_of_the_library(library_texts: dict[str, list[str]]) -> None:
    part = {name: texts[::10] for name, texts in library_texts.items()}
    train, held_out = demo.corpus(part, row_length=65)
    for rows in (*train.values(), *held_out.values()):
        assert array(rows).shape == (len(rows), 65)
        assert rows.features["input_ids"].feature.dtype == "uint8"
    joined = demo.balanced(train)
    assert len(joined) == 2 * min(len(train["code"]), len(train["prose"]))


def test_too_little_text_is_an_error() -> None:
    with pytest.raises(ValueError, match="5 bytes of text fill no row of 10"):
        demo.corpus({"code": ["a", "bytes"]}, row_length=10)


def test_training_lowers_the_loss_and_repeats() -> None:
    rows = np.frombuffer(b"the cat sat on a mat. " * 400, dtype=np.uint8)[: 17 * 500]
    rows = rows.reshape(-1, 17)
    runs = []
    for _ in range(2):
        torch.manual_seed(len(runs))  # what happened before does not matter
        model = demo.build_model(TINY)
        before = demo.evaluate(model, rows)
        losses = demo.train_model(model, rows, TINY)
        runs.append((losses, demo.evaluate(model, rows)))
    assert runs[0] == runs[1]
    assert before == pytest.approx(np.log(demo.VOCAB), abs=0.2)
    assert runs[0][1] < 0.75 * before
    assert not model.training


def test_byte_losses_are_next_byte_cross_entropies() -> None:
    model = demo.build_model(TINY).eval()
    rows = np.arange(34, dtype=np.uint8).reshape(2, 17)
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(rows.astype(np.int64))).logits.double()
    log_p = logits.log_softmax(-1).numpy()
    expected = [[-log_p[r, t, rows[r, t + 1]] for t in range(16)] for r in range(2)]
    np.testing.assert_allclose(demo.byte_losses(model, rows), expected, rtol=1e-5)


def test_ids_of_the_tokenizer_are_bytes(tmp_path: Path) -> None:
    tokenizer = demo.byte_tokenizer()
    text = "def f(x):\n\treturn 'é€' # ¡ÿ\0"
    assert tokenizer.encode(text).ids == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    words = load_words(str(tmp_path))
    assert [words(byte) for byte in range(128)] == [chr(byte) for byte in range(128)]
    assert all(words(byte) for byte in range(128, 256))


def test_the_report_agrees_with_the_commands_that_come_next(tmp_path: Path) -> None:
    tree = random_tree(
        1, chains=4, draws=QUICK.num_draws, steps=QUICK.num_draws + QUICK.num_burnin_steps,
        observables={"code": 3, "prose": 2}, init_losses=True,
    )  # fmt: skip
    tree.attrs["metadata"]["config"]["sampler"]["num_burnin_steps"] = QUICK.num_burnin_steps
    store = write_tree(tree, tmp_path / "samples.zarr")
    console = Console(width=100, record=True)
    demo._report(console, tree, QUICK)
    demo._point_onwards(console, tmp_path, QUICK, seconds=1)
    said = console.export_text()
    (command,) = re.findall(r"basinscope (llc .*)", said)
    done = CliRunner().invoke(app, command.split(), env={"COLUMNS": "100"})
    assert done.exit_code == 0, done.output
    printed, _, on_observables = done.output.partition("LLC on observables")
    assert on_observables
    assert f"Leaves out the first {QUICK.num_burnin_steps} steps" in printed
    figures = re.compile(r"[-+\d.]+")
    assert set(figures.findall(printed)) <= set(figures.findall(said))
    assert str(store) in command


def test_a_folder_belongs_to_one_set_of_settings(tmp_path: Path) -> None:
    train = {"code": datasets.Dataset.from_dict({"input_ids": [[1, 2]]})}
    demo._claim(tmp_path / "out", TINY, train)
    demo._claim(tmp_path / "out", TINY, train)
    assert json.loads((tmp_path / "out/demo.json").read_text())["train_steps"] == 30
    with pytest.raises(ValueError, match=r"train_steps is 30 there, 31 here.*another folder"):
        demo._claim(tmp_path / "out", replace(TINY, train_steps=31), train)
