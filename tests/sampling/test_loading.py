"""Tokens as text: of what stands alone, as it stands in a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models

from basinscope.sampling.loading import load_words

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
