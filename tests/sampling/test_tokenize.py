"""Rows of tokens against oracles of plain lists, with tokenizers built offline."""

from __future__ import annotations

import warnings
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from basinscope.sampling import tokenize as module
from basinscope.sampling.tokenize import token_counts, tokenize_and_concatenate, tokenize_texts

datasets.disable_progress_bars()

WORDS = ["<unk>", "<bos>", "<eos>", "the", "cat", "sat", "on", "a", "mat", "indivisible" * 20]
ID = {word: i for i, word in enumerate(WORDS)}


def word_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel(vocab=ID, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def tokenizer_with_all() -> PreTrainedTokenizerFast:
    return word_tokenizer(bos_token="<bos>", eos_token="<eos>")


def texts_to_dataset(texts: list[str]) -> datasets.Dataset:
    features = datasets.Features({"text": datasets.Value("string")})
    return datasets.Dataset.from_dict({"text": texts}, features=features)


def oracle(
    texts: list[str], max_length: int, bos: int | None = ID["<bos>"], eos: int | None = ID["<eos>"]
) -> list[list[int]]:
    stream: list[int] = []
    for number, text in enumerate(texts):
        if number and eos is not None:
            stream.append(eos)
        stream += [ID.get(word, ID["<unk>"]) for word in text.split()]
    head = [] if bos is None else [bos]
    rows = []
    while len(stream) >= max_length - len(head):
        rows.append(head + stream[: max_length - len(head)])
        stream = stream[max_length - len(head) :]
    return rows


def rows_of(dataset: Any) -> list[list[int]]:
    return [row["input_ids"].tolist() for row in dataset]


documents = st.lists(
    st.lists(st.sampled_from(["the", "cat", "sat", "mat", "dog"]), max_size=7).map(" ".join),
    min_size=1,
    max_size=12,
)


@settings(max_examples=40, deadline=None)
@given(
    texts=documents,
    max_length=st.integers(2, 6),
    add_bos_token=st.booleans(),
    has_eos=st.booleans(),
    streaming=st.booleans(),
    batch_size=st.sampled_from([1, 2, 5, 1000]),
)
def test_rows_are_the_oracles(
    texts: list[str],
    max_length: int,
    add_bos_token: bool,
    has_eos: bool,
    streaming: bool,
    batch_size: int,
) -> None:
    tokenizer = tokenizer_with_all() if has_eos else word_tokenizer(bos_token="<bos>")
    bos, eos = ID["<bos>"] if add_bos_token else None, ID["<eos>"] if has_eos else None
    expected = oracle(texts, max_length, bos, eos)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "DOCUMENTS_PER_BATCH", batch_size)

        def rows() -> list[list[int]]:
            return rows_of(
                tokenize_and_concatenate(
                    texts_to_dataset(texts),
                    tokenizer,
                    streaming=streaming,
                    max_length=max_length,
                    add_bos_token=add_bos_token,
                )
            )

        if expected:
            assert rows() == expected
        else:
            with pytest.raises(ValueError, match="fewer than"):
                rows()


def test_known_answer_and_format() -> None:
    rows = tokenize_and_concatenate(
        texts_to_dataset(["the cat sat", "on a mat"]), tokenizer_with_all(), max_length=4
    )
    assert rows_of(rows) == [[1, 3, 4, 5], [1, 2, 6, 7]]  # "mat" fills no row
    assert rows.column_names == ["input_ids"]
    assert rows.features["input_ids"] == datasets.List(datasets.Value("int32"), length=4)
    assert tuple(rows[:]["input_ids"].shape) == (2, 4)


def test_other_columns_are_left_out() -> None:
    texts = datasets.Dataset.from_dict({"body": ["the cat sat"], "url": ["a"]})
    rows = tokenize_and_concatenate(texts, tokenizer_with_all(), max_length=4, column_name="body")
    assert rows_of(rows) == [[1, 3, 4, 5]]


def test_processes_do_not_change_the_rows() -> None:
    texts = texts_to_dataset(["the cat sat", "", "on a mat", "the mat"] * 25)
    one, two = (
        tokenize_and_concatenate(texts, tokenizer_with_all(), max_length=7, num_proc=num_proc)
        for num_proc in (1, 2)
    )
    assert rows_of(one) == rows_of(two) == oracle(list(texts["text"]), 7)


def test_long_words_stay_whole() -> None:
    long = WORDS[-1]
    rows = tokenize_and_concatenate(
        texts_to_dataset([f"the {long} sat"]), tokenizer_with_all(), max_length=4
    )
    assert rows_of(rows) == [[1, 3, ID[long], 5]]


def test_a_pad_token_that_is_a_real_token_is_kept() -> None:
    tokenizer = word_tokenizer(bos_token="<bos>", eos_token="<eos>", pad_token="cat")
    rows = tokenize_and_concatenate(
        texts_to_dataset(["cat cat sat", "cat"]), tokenizer, max_length=6
    )
    assert rows_of(rows) == [[1, 4, 4, 5, 2, 4]]


def test_the_tokenizer_is_left_alone() -> None:
    tokenizer = tokenizer_with_all()
    tokenizer.backend_tokenizer.enable_padding(length=9)
    tokenizer.backend_tokenizer.enable_truncation(2)
    before = tokenizer.backend_tokenizer.to_str()
    rows = tokenize_and_concatenate(texts_to_dataset(["the cat sat"]), tokenizer, max_length=4)
    assert rows_of(rows) == [[1, 3, 4, 5]]
    assert tokenizer.backend_tokenizer.to_str() == before
    assert tokenizer.pad_token is None
    assert len(tokenizer) == len(WORDS)


class SlowWords(PreTrainedTokenizer):
    """The word tokenizer in pure Python."""

    @property
    def vocab_size(self) -> int:
        return len(WORDS)

    def get_vocab(self) -> dict[str, int]:
        return dict(ID)

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return text.split()

    def _convert_token_to_id(self, token: str) -> int:
        return ID.get(token, 0)

    def _convert_id_to_token(self, index: int) -> str:
        return WORDS[index]


def test_slow_tokenizers_work() -> None:
    texts = ["the cat", "sat on a mat"]
    tokenizer = SlowWords(bos_token="<bos>", eos_token="<eos>")
    rows = tokenize_and_concatenate(texts_to_dataset(texts), tokenizer, max_length=4)
    assert rows_of(rows) == oracle(texts, 4)


@pytest.mark.parametrize("known_columns", [True, False])
def test_streams_can_be_read_twice(known_columns: bool) -> None:
    texts = ["the cat", "sat on a mat"] * 3
    stream = texts_to_dataset(texts).to_iterable_dataset()
    if not known_columns:
        stream = datasets.IterableDataset.from_generator(lambda: ({"text": text} for text in texts))
    rows = tokenize_and_concatenate(stream, tokenizer_with_all(), max_length=5)
    assert isinstance(rows, datasets.IterableDataset)
    assert rows_of(rows) == rows_of(rows) == oracle(texts, 5)


def test_rows_of_a_stored_dataset_are_cached_beside_it(tmp_path: Any) -> None:
    texts_to_dataset(["the cat sat"] * 9).save_to_disk(tmp_path)
    first, again = (
        tokenize_and_concatenate(
            datasets.load_from_disk(tmp_path), tokenizer_with_all(), max_length=5
        )
        for _ in range(2)
    )
    assert first.cache_files == again.cache_files != []
    np.testing.assert_array_equal(first[:]["input_ids"], again[:]["input_ids"])


@pytest.mark.parametrize(
    ("columns", "arguments", "error", "message"),
    [
        (
            {"text": ["a"]},
            {"column_name": "body"},
            ValueError,
            r"no column 'body'; it has \['text'\].*, or column in a run file",
        ),
        ({"text": [3]}, {}, TypeError, "not strings"),
        ({"text": ["a", None]}, {}, TypeError, "row 1 of column 'text' is None"),
        ({"text": ["a"]}, {"max_length": 1}, ValueError, "max_length=1 is too small"),
        ({"text": ["a"]}, {"max_length": "64"}, TypeError, "max_length must be a whole number"),
        ({"text": ["a cat"]}, {"max_length": 4}, ValueError, "holds 2 tokens, fewer than the 3"),
    ],
)
def test_errors(
    columns: dict[str, list], arguments: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        tokenize_and_concatenate(
            datasets.Dataset.from_dict(columns), tokenizer_with_all(), **arguments
        )


def test_error_without_bos() -> None:
    with pytest.raises(ValueError, match="has no BOS token"):
        tokenize_and_concatenate(texts_to_dataset(["a"]), word_tokenizer())


def test_error_for_a_dict_of_splits_and_for_a_list() -> None:
    splits = datasets.DatasetDict({"train": texts_to_dataset(["a"])})
    with pytest.raises(TypeError, match=r"pick one, such as dataset\['train'\]"):
        tokenize_and_concatenate(splits, tokenizer_with_all())
    with pytest.raises(TypeError, match="dataset is a list"):
        tokenize_and_concatenate(["a"], tokenizer_with_all())


texts_with_words = st.lists(
    st.lists(st.sampled_from(["the", "cat", "sat", "dog"]), min_size=1, max_size=7).map(" ".join),
    min_size=1,
    max_size=12,
)


@settings(max_examples=40, deadline=None)
@given(
    texts=texts_with_words,
    max_length=st.none() | st.integers(2, 9),
    add_bos_token=st.booleans(),
    batch_size=st.sampled_from([1, 2, 5, 1000]),
)
def test_each_text_is_a_row(
    texts: list[str], max_length: int | None, add_bos_token: bool, batch_size: int
) -> None:
    head = [ID["<bos>"]] if add_bos_token else []
    whole = [head + [ID.get(word, ID["<unk>"]) for word in text.split()] for text in texts]
    longer = sum(len(row) > (max_length or 99) for row in whole)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        patch.setattr(module, "DOCUMENTS_PER_BATCH", batch_size)
        rows = tokenize_texts(
            texts_to_dataset(texts),
            tokenizer_with_all(),
            max_length=max_length,
            add_bos_token=add_bos_token,
        )
    assert rows_of(rows) == [row[:max_length] for row in whole]
    assert token_counts(rows).tolist() == [len(row[:max_length]) for row in whole]
    told = [str(warning.message) for warning in said if "texts with more" in str(warning.message)]
    assert [f"tokens: {longer} of {len(texts)}, the longest of" in one for one in told] == (
        [True] if longer else []
    )


def test_rows_of_texts_have_a_known_answer_and_format() -> None:
    texts = datasets.Dataset.from_dict({"body": ["the cat sat", "a"], "url": ["x", "y"]})
    rows = tokenize_texts(texts, tokenizer_with_all(), column_name="body")
    assert rows_of(rows) == [[1, 3, 4, 5], [1, 7]]
    assert rows.features == datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))})


def test_slow_tokenizers_and_processes_give_the_same_rows_of_texts() -> None:
    texts = texts_to_dataset(["the cat sat", "on", "a mat"] * 9)
    slow = SlowWords(bos_token="<bos>", eos_token="<eos>")
    expected = rows_of(tokenize_texts(texts, tokenizer_with_all()))
    assert rows_of(tokenize_texts(texts, slow)) == expected
    assert rows_of(tokenize_texts(texts, tokenizer_with_all(), num_proc=2)) == expected


def test_rows_of_texts_leave_the_tokenizer_alone() -> None:
    tokenizer = tokenizer_with_all()
    tokenizer.backend_tokenizer.enable_padding(length=9)
    tokenizer.backend_tokenizer.enable_truncation(2)
    before = tokenizer.backend_tokenizer.to_str()
    rows = tokenize_texts(texts_to_dataset(["the cat sat", "a"]), tokenizer)
    assert rows_of(rows) == [[1, 3, 4, 5], [1, 7]]
    assert tokenizer.backend_tokenizer.to_str() == before


def test_rows_of_stored_texts_lie_in_files_too(tmp_path: Any) -> None:
    texts_to_dataset(["the cat sat", "a"]).save_to_disk(tmp_path)
    with pytest.warns(UserWarning, match="more than 3 tokens: 1 of 2, the longest of 4"):
        rows = tokenize_texts(datasets.load_from_disk(tmp_path), tokenizer_with_all(), 3)
    assert rows.cache_files
    assert rows_of(rows) == [[1, 3, 4], [1, 7]]


@pytest.mark.parametrize(
    ("columns", "arguments", "error", "message"),
    [
        ({"text": ["a"]}, {"column_name": "body"}, ValueError, "no column 'body'.*--column of"),
        ({"text": ["a", None]}, {}, TypeError, "row 1 of column 'text' is None"),
        ({"text": ["a"]}, {"max_length": 1}, ValueError, "max_length=1 is too small"),
        ({"text": ["a", "", "a", " "]}, {}, ValueError, "tokens: 2 of 4, the first of them in row"),
        ({"text": [""]}, {"add_bos_token": False}, ValueError, "without tokens: 1 of 1"),
        ({"text": []}, {}, ValueError, "dataset has no texts"),
    ],
)
def test_errors_of_rows_of_texts(
    columns: dict[str, list], arguments: dict, error: type[Exception], message: str
) -> None:
    features = datasets.Features({"text": datasets.Value("string")})
    texts = datasets.Dataset.from_dict(columns, features=features)
    with pytest.raises(error, match=message):
        tokenize_texts(texts, tokenizer_with_all(), **arguments)


def test_rows_of_texts_need_one_data_set_and_a_bos_token() -> None:
    texts = texts_to_dataset(["a"])
    with pytest.raises(TypeError, match="an IterableDataset, whose rows"):
        tokenize_texts(texts.to_iterable_dataset(), tokenizer_with_all())
    with pytest.raises(TypeError, match=r"pick one, such as dataset\['train'\]"):
        tokenize_texts(datasets.DatasetDict({"train": texts}), tokenizer_with_all())
    with pytest.raises(ValueError, match=r"no BOS token.*--no-bos"):
        tokenize_texts(texts, word_tokenizer())
