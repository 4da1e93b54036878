"""Rows and their order: torch's DataLoader and Python's random are the oracles."""

from __future__ import annotations

import hashlib
import random
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset, Features, LargeList, List, Value, concatenate_datasets
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from basinscope.sampling import data as module
from basinscope.sampling.data import (
    batch_order,
    check_dataset,
    check_sequences,
    cycled,
    dataset_digest,
    observable_rows,
    read_rows,
    read_sequences,
)

ROWS = np.random.default_rng(0).integers(0, 50_000, (23, 6))
FEATURES: dict[str, Any] = {
    "list": List(Value("int64")),
    "list of int32": List(Value("int32")),
    "list of uint16": List(Value("uint16")),
    "large list": LargeList(Value("int64")),
    "fixed-size list": List(Value("int64"), length=6),
}


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(1, 200),
    batch_size=st.integers(1, 40),
    seed=st.integers(0, 2**63 - 1),
    shuffle=st.booleans(),
)
def test_batches_come_in_the_order_of_a_data_loader(
    rows: int, batch_size: int, seed: int, shuffle: bool
) -> None:
    assume(batch_size <= rows)
    loader = DataLoader(
        range(rows),  # type: ignore[arg-type]
        batch_size,
        shuffle,
        drop_last=True,
        generator=torch.Generator().manual_seed(seed),
    )
    expected = np.stack([batch.numpy() for batch in loader])
    order = batch_order(rows, batch_size, shuffle, seed)
    assert order.dtype == np.int64
    np.testing.assert_array_equal(order, expected)


def test_the_order_leaves_torch_own_generator_alone() -> None:
    before = torch.get_rng_state()
    batch_order(100, 8, True, 3)
    assert torch.equal(torch.get_rng_state(), before)


@given(batches=st.integers(1, 9), count=st.integers(1, 40))
def test_an_epoch_is_cycled_without_reshuffling(batches: int, count: int) -> None:
    epoch = np.arange(batches * 2).reshape(batches, 2)
    expected = list(islice(cycle(epoch.tolist()), count))
    assert cycled(epoch, count).tolist() == expected


@given(
    rows=st.integers(1, 500), count=st.integers(1, 500), seed=st.integers(0, 2**40), data=st.data()
)
def test_observable_rows_are_those_of_python_random(
    rows: int, count: int, seed: int, data: st.DataObject
) -> None:
    count = min(rows, count)
    chosen = observable_rows(rows, count, seed)
    assert chosen == random.Random(seed).sample(range(rows), count)
    assert len(set(chosen)) == count
    assert set(chosen) <= set(range(rows))


@given(seed=st.integers(0, 10**6), small=st.integers(1, 50), large=st.integers(1, 50))
def test_of_a_large_data_set_a_smaller_choice_starts_a_larger_one(
    seed: int, small: int, large: int
) -> None:
    """Not of every data set: Python chooses from a few rows by another method than from many."""
    small, large = sorted((small, large))
    assert observable_rows(5000, small, seed) == observable_rows(5000, large, seed)[:small]


@pytest.mark.parametrize("kind", FEATURES)
def test_rows_are_read_from_every_kind_of_list(kind: str) -> None:
    dataset = rows_as(kind)
    assert check_dataset(dataset, "dataset") == (23, 6)
    ids = read_rows(dataset, np.array([5, 0, 22, 5]))
    assert ids.dtype == np.int64
    np.testing.assert_array_equal(ids, ROWS[[5, 0, 22, 5]])


@pytest.mark.parametrize("kind", ["list", "large list", "fixed-size list"])
def test_rows_are_read_through_an_indices_mapping(kind: str) -> None:
    shuffled = rows_as(kind).shuffle(seed=4)
    expected = np.asarray(shuffled.with_format("numpy")["input_ids"][:])
    assert not np.array_equal(expected, ROWS)
    np.testing.assert_array_equal(read_rows(shuffled, range(23)), expected)

    selected = rows_as(kind).select([7, 3, 3, 11])
    assert check_dataset(selected, "dataset") == (4, 6)
    np.testing.assert_array_equal(read_rows(selected, [3, 1, 0]), ROWS[[11, 3, 7]])

    sliced = rows_as(kind).select(range(4, 20))
    np.testing.assert_array_equal(read_rows(sliced, [0, 15]), ROWS[[4, 19]])


def test_rows_are_read_from_several_pieces_and_from_disk(tmp_path: Path) -> None:
    joined = concatenate_datasets([rows_as("list"), rows_as("list").select(range(3, 9))])
    assert check_dataset(joined, "dataset") == (29, 6)
    np.testing.assert_array_equal(read_rows(joined, [28, 0, 23]), ROWS[[8, 0, 3]])
    joined.save_to_disk(tmp_path / "d")
    loaded = Dataset.load_from_disk(tmp_path / "d")
    np.testing.assert_array_equal(read_rows(loaded, [28, 0, 23]), ROWS[[8, 0, 3]])


@pytest.mark.parametrize("style", [None, "torch", "numpy", "arrow"])
def test_the_data_set_own_format_does_not_matter(style: str | None) -> None:
    dataset = rows_as("list").with_format(style)
    assert check_dataset(dataset, "dataset") == (23, 6)
    np.testing.assert_array_equal(read_rows(dataset, [1, 2]), ROWS[[1, 2]])
    assert dataset.format["type"] == style


def test_other_columns_do_not_matter() -> None:
    dataset = rows_as("list").add_column("text", ["x"] * 23)
    assert check_dataset(dataset, "dataset") == (23, 6)
    np.testing.assert_array_equal(read_rows(dataset, [1, 2]), ROWS[[1, 2]])


@pytest.mark.parametrize("odd", [0, 4, 5, 12, 22])
def test_the_first_row_of_another_length_is_named(
    odd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LENGTH_CHECK_ROWS", 5)
    rows = [row[:3].tolist() if i == odd else row.tolist() for i, row in enumerate(ROWS)]
    named = 1 if odd == 0 else odd  # row 0 sets the length
    with pytest.raises(ValueError, match=rf"length: row 0 has \d tokens, row {named} has \d\."):
        check_dataset(Dataset.from_dict({"input_ids": rows}), "dataset")


@pytest.mark.parametrize("kind", ["list", "list of uint16", "large list"])
def test_rows_of_several_lengths_are_read_as_they_are(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LENGTH_CHECK_ROWS", 5)
    rows = [row[: 1 + i % 6].tolist() for i, row in enumerate(ROWS)]
    features = Features({"input_ids": FEATURES[kind]})
    dataset = Dataset.from_dict({"input_ids": rows}, features=features)
    assert check_sequences(dataset, "dataset") == [1, 2, 3, 4, 5, 6]
    assert check_sequences(Dataset.from_dict({"input_ids": ROWS}), "dataset") == [6]
    found = read_sequences(dataset, [5, 0, 22])
    assert [ids.tolist() for ids in found] == [rows[5], rows[0], rows[22]]
    assert all(ids.dtype == np.int64 for ids in found)
    with pytest.raises(ValueError, match="row 0 has 1 tokens, row 1 has 2"):
        check_dataset(dataset, "dataset")
    rows[13] = []
    with pytest.raises(ValueError, match="row 13 of dataset has no tokens"):
        check_sequences(Dataset.from_dict({"input_ids": rows}), "dataset")
    rows[13], rows[8] = [1], [7, None, 7]
    with pytest.raises(ValueError, match=r"row 8 of dataset has a missing id \(null\)"):
        check_sequences(Dataset.from_dict({"input_ids": rows}), "dataset")


def test_the_digest_is_that_of_ids_and_lengths() -> None:
    def digest(rows: Any, check: Any = lambda ids: None) -> str:
        return dataset_digest(Dataset.from_dict({"input_ids": rows}), len(rows), check)

    equal = hashlib.sha256(b"23" + b"6" + ROWS.astype(np.int64).tobytes()).hexdigest()
    assert digest(ROWS) == equal, "stores that are continued have this one"
    ids = [[1, 2], [3], [4, 5]], [[1], [2, 3], [4, 5]], [[1, 2], [3, 4], [5]]
    assert len({digest(rows) for rows in ids}) == 3

    def refuse(ids: np.ndarray) -> None:
        if 4 in ids:
            raise ValueError("4 is none")

    with pytest.raises(ValueError, match="row 2: 4 is none"):
        digest(ids[0], refuse)


def test_a_missing_row_is_named() -> None:
    rows = [row.tolist() for row in ROWS]
    table = pa.table({"input_ids": pa.array([*rows[:4], None, *rows[5:]])})
    with pytest.raises(ValueError, match=r"row 4\b"):
        check_dataset(Dataset(table), "dataset")


@pytest.mark.parametrize("kind", FEATURES)
def test_a_missing_id_is_named(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LENGTH_CHECK_ROWS", 5)
    rows = ROWS.tolist()
    rows[7][2] = None
    features = Features({"input_ids": FEATURES[kind]})
    with pytest.raises(ValueError, match=r"row 7 of dataset has a missing id \(null\)"):
        check_dataset(Dataset.from_dict({"input_ids": rows}, features=features), "dataset")


def rows_as(kind: str) -> Dataset:
    features = Features({"input_ids": FEATURES[kind]})
    return Dataset.from_dict({"input_ids": ROWS.tolist()}, features=features)
