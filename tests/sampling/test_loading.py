"""Tokens as text, as it stands in a sentence; and texts of files as tokens, each a row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from basinscope.sampling.loading import load_texts, load_tokens, load_words

LLAMA = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
PIECES = ["<unk>", "▁the", "▁cat", "s", "▁sat", "<0x0A>", "<0xC3>"]
KINDS: dict[str, tuple[Any, Any]] = {
    "llama": (
        models.BPE({piece: n for n, piece in enumerate(PIECES)}, [], byte_fallback=True),
        decoders.Sequence([*LLAMA, decoders.Strip(" ", 1, 0)]),
    ),
    "metaspace": (
        models.BPE({piece: n for n, piece in enumerate(PIECES)}, []),
        decoders.Metaspace(),
    ),
    "wordpiece": (
        models.WordPiece({"[UNK]": 0, "the": 1, "cat": 2, "##s": 3, "sat": 4}, unk_token="[UNK]"),
        decoders.WordPiece(),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_words_side_by_side_make_the_sentence(kind: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer(KINDS[kind][0])
    tokenizer.decoder = KINDS[kind][1]
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    words = load_words(str(tmp_path))
    sentence = [1, 2, 3, 4, 1, 2]
    assert "".join(map(words, sentence)).lstrip() == "the cats sat the cat"
    assert words(len(PIECES)) == str(len(PIECES))  # not the tokenizer's
    if kind == "llama":
        assert words(5) == "\n"
        assert words(6) == "<0xC3>"  # the first half of a character


TEXTS = ["the cat", "sat", "the cat sat"]
ROWS = [[0, 1, 2], [0, 3], [0, 1, 2, 3]]


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    words = {word: n for n, word in enumerate(["<bos>", "the", "cat", "sat", "<unk>"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    saved = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>")
    saved.save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "folder"])
def test_rows_of_a_column_are_texts(kind: str, tmp_path: Path, tokenizer: str) -> None:
    texts, path = Dataset.from_dict({"words": TEXTS}), tmp_path / f"data.{kind}"
    if kind == "folder":
        texts.save_to_disk(path)
    else:
        {"jsonl": texts.to_json, "csv": texts.to_csv, "parquet": texts.to_parquet}[kind](path)
    assert ids_of(load_texts(path, tokenizer, column="words")) == ROWS
    first = load_texts(path, tokenizer, column="words", rows=2, add_bos_token=False)
    assert ids_of(first) == [row[1:] for row in ROWS[:2]]


def test_lines_of_a_text_file_are_texts(tmp_path: Path, tokenizer: str) -> None:
    path = tmp_path / "data.txt"
    path.write_bytes(b"the cat\r\nsat\n\n  \nthe cat sat")
    with pytest.warns(UserWarning, match=r"blank lines of .* are left out: 2 of 5"):
        assert ids_of(load_texts(path, tokenizer)) == ROWS
    joined = load_tokens(path, tokenizer, max_length=3)
    assert ids_of(joined) == [[0, 1, 2], [0, 3, 1], [0, 2, 3]]


def test_what_holds_no_texts_is_refused(tmp_path: Path, tokenizer: str) -> None:
    empty, ids = tmp_path / "empty.txt", tmp_path / "ids"
    empty.touch()
    with pytest.raises(ValueError, match="is empty: give a file with data"):
        load_texts(empty, tokenizer)
    Dataset.from_dict({"input_ids": [[1, 2]]}).save_to_disk(ids)
    with pytest.raises(ValueError, match=r"holds token ids .*: leave --each-text out"):
        load_texts(ids, tokenizer)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": oops\n', "cannot be read as json: JSON parse error"),
        ("b.csv", b'text\n"unclosed', "cannot be read as csv: Error tokenizing data"),
        ("c.parquet", b"no parquet", "cannot be read as parquet: Parquet magic bytes not found"),
        ("d.txt", b"\xff\xfe\x00", "cannot be read as text: 'utf-8' codec can't decode"),
    ],
)
def test_a_broken_file_is_said_to_be_one(
    name: str, content: bytes, said: str, tmp_path: Path, tokenizer: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}' {said}"):
        load_tokens(tmp_path / name, tokenizer, max_length=3)


def test_several_data_sets_are_refused(tmp_path: Path, tokenizer: str) -> None:
    one = Dataset.from_dict({"input_ids": [[1, 2]]})
    DatasetDict(train=one, test=one).save_to_disk(tmp_path / "both")
    with pytest.raises(ValueError, match=r"several data sets \(train, test\): .*both/train'"):
        load_tokens(tmp_path / "both", tokenizer)
    assert ids_of(load_tokens(tmp_path / "both" / "train", tokenizer).with_format("torch"))


def test_token_ids_are_not_cut(tmp_path: Path, tokenizer: str) -> None:
    Dataset.from_dict({"input_ids": [[1, 2, 3]]}).save_to_disk(tmp_path / "ids")
    assert len(load_tokens(tmp_path / "ids", tokenizer, max_length=3)) == 1
    with pytest.raises(ValueError, match=r"the first row 3 of them, .*: leave max_length=2 out"):
        load_tokens(tmp_path / "ids", tokenizer, max_length=2)


def ids_of(rows: Any) -> list[list[int]]:
    return [row["input_ids"].tolist() for row in rows]
