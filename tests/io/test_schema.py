"""The arrays of a store: the specification's table, and bounds on what a file and a chunk hold."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from basinscope.io.schema import METRICS, ArraySpec, sampling_arrays, smallest_unsigned

BASE: dict[str, Any] = {
    "num_chains": 3,
    "num_draws": 5,
    "num_steps": 12,
    "batch_size": 4,
    "gradient_accumulation_steps": 2,
    "num_init_loss_batches": 7,
    "sequence_length": 9,
    "observables": {"pile": 8, "_2nd": 16},
    "largest_id": 300,
    "num_dataset_rows": 256,
    "shared_batches": True,
    "shared_start": True,
    "save_metrics": False,
    "save_sampling_input_ids": False,
}
ALWAYS = {
    "init_loss": (("chain", "token_pos"), (3, 8), "float32"),
    "n_beta": ((), (), "float64"),
    "init_batch_loss": (("init_batch", "token_pos"), (14, 8), "float32"),
    "sampling_loss": (("chain", "draw", "batch", "token_pos"), (3, 5, 4, 8), "float32"),
    "sampling_loss_micro": (
        ("chain", "step", "batch_sampling", "token_pos"),
        (3, 12, 8, 8),
        "float32",
    ),
    "sampling_rows": (("step", "batch_sampling"), (12, 8), "uint8"),
    "loss_pile": (("chain", "draw", "batch_pile", "token_pos"), (3, 5, 8, 8), "float32"),
    "init_loss_pile": (("batch_pile", "token_pos"), (8, 8), "float32"),
    "input_ids_pile": (("batch_pile", "token"), (8, 9), "uint16"),
    "loss__2nd": (("chain", "draw", "batch__2nd", "token_pos"), (3, 5, 16, 8), "float32"),
    "init_loss__2nd": (("batch__2nd", "token_pos"), (16, 8), "float32"),
    "input_ids__2nd": (("batch__2nd", "token"), (16, 9), "uint16"),
}
OWN_STARTS = {"init_batch_loss": (("chain", "init_batch", "token_pos"), (3, 14, 8), "float32")}
OWN_ROWS = {"sampling_rows": (("chain", "step", "batch_sampling"), (3, 12, 8), "uint8")}
STORED_IDS = {
    "sampling_input_ids_micro": (
        ("chain", "step", "batch_sampling", "token"),
        (3, 12, 8, 9),
        "uint16",
    )
}
NINE_METRICS = {
    f"metrics_{name}": (("chain", "step"), (3, 12), "float32")
    for name in [
        "scaled_grad",
        "unscaled_grad",
        "localization",
        "weight_decay",
        "noise",
        "distance",
        "dot_grad_prior",
        "dot_grad_noise",
        "dot_prior_noise",
    ]
}
MIB = 2**20


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ALWAYS),
        ({"shared_batches": False}, ALWAYS | OWN_ROWS | OWN_STARTS),
        ({"shared_start": False}, ALWAYS | OWN_STARTS),
        ({"save_sampling_input_ids": True}, ALWAYS | STORED_IDS),
        ({"save_metrics": True}, ALWAYS | NINE_METRICS),
        (
            {"save_metrics": True, "save_sampling_input_ids": True, "shared_batches": False},
            ALWAYS | OWN_ROWS | OWN_STARTS | STORED_IDS | NINE_METRICS,
        ),
    ],
)
def test_arrays_are_those_of_the_specification(
    changes: dict[str, Any], expected: dict[str, Any]
) -> None:
    arrays = sampling_arrays(**{**BASE, **changes})
    assert {n: (a.dims, a.shape, a.dtype) for n, a in arrays.items()} == expected


def test_every_array_says_what_it_is_and_in_which_unit() -> None:
    arrays = sampling_arrays(**{**BASE, "save_metrics": True, "save_sampling_input_ids": True})
    for name, spec in arrays.items():
        assert spec.attrs["long_name"], name
        is_loss = name.startswith(("loss_", "sampling_loss", "init_"))
        assert spec.attrs["units"] == ("nats" if is_loss else "1"), name


def test_metrics_keep_the_order_of_the_specification() -> None:
    assert [f"metrics_{name}" for name in METRICS] == list(NINE_METRICS)


def test_no_observables_is_a_store_of_sampling_losses() -> None:
    arrays = sampling_arrays(**{**BASE, "observables": {}})
    assert set(arrays) == {
        n for n in ALWAYS if not n.startswith(("loss_", "init_loss_", "input_ids_"))
    }


@pytest.mark.parametrize(
    ("largest", "dtype"),
    [
        (0, "uint8"),
        (255, "uint8"),
        (256, "uint16"),
        (65535, "uint16"),
        (65536, "uint32"),
        (2**32 - 1, "uint32"),
        (2**32, "uint64"),
    ],
)
def test_ids_take_the_smallest_type_that_holds_them(largest: int, dtype: str) -> None:
    assert smallest_unsigned(largest) == dtype
    arrays = sampling_arrays(**{**BASE, "largest_id": largest, "save_sampling_input_ids": True})
    assert arrays["input_ids_pile"].dtype == arrays["sampling_input_ids_micro"].dtype == dtype
    rows = sampling_arrays(**{**BASE, "num_dataset_rows": largest + 1})["sampling_rows"]
    assert rows.dtype == dtype


sizes = st.fixed_dictionaries(
    {
        "num_chains": st.integers(1, 64),
        "num_draws": st.integers(1, 100_000),
        "num_steps": st.integers(1, 200_000),
        "batch_size": st.integers(1, 5000),
        "gradient_accumulation_steps": st.integers(1, 64),
        "num_init_loss_batches": st.integers(1, 5000),
        "sequence_length": st.integers(2, 10_000),
        "observables": st.dictionaries(st.sampled_from("abc"), st.integers(1, 100_000)),
        "largest_id": st.integers(0, 300_000),
        "num_dataset_rows": st.integers(1, 10**10),
        "shared_batches": st.booleans(),
        "shared_start": st.booleans(),
        "save_metrics": st.booleans(),
        "save_sampling_input_ids": st.booleans(),
    }
)


@settings(max_examples=300, deadline=None)
@given(sizes)
def test_files_and_chunks_stay_within_their_bounds(given_sizes: dict[str, Any]) -> None:
    for name, spec in sampling_arrays(**given_sizes).items():
        assert len(spec.dims) == len(spec.shape) == len(spec.chunks), name
        assert spec.shards is None or len(spec.shards) == len(spec.shape), name
        assert all(chunk >= 1 for chunk in spec.chunks), name
        if spec.shards is not None:
            assert all(s % c == 0 for s, c in zip(spec.shards, spec.chunks, strict=True)), name
        if "loss" in name and not name.startswith("init_"):
            check_loss_array(name, spec)
        if name.startswith(("init_loss_", "init_batch_loss")):
            assert 4 * math.prod(spec.chunks) <= 32 * MIB, name
        if name.startswith("metrics_"):
            assert spec.chunks[0] == 1, name
            assert spec.rows_per_write <= 1000, name


@settings(max_examples=300, deadline=None)
@given(sizes)
def test_stored_ids_are_written_with_their_losses(given_sizes: dict[str, Any]) -> None:
    arrays = sampling_arrays(**{**given_sizes, "save_sampling_input_ids": True})
    ids, losses = arrays["sampling_input_ids_micro"], arrays["sampling_loss_micro"]
    assert ids.rows_per_write == losses.rows_per_write
    assert ids.chunks[0] == 1


def check_loss_array(name: str, spec: ArraySpec) -> None:
    _, rows, sequences, tokens = spec.shape
    row_bytes = 4 * sequences * tokens
    write = spec.rows_per_write
    assert spec.chunks[0] == 1, f"{name}: chains must not share a chunk"
    assert spec.chunks[1] == write, f"{name}: reading all draws of a sequence must be one chunk"
    assert spec.chunks[3] == tokens, name
    assert 1 <= write <= min(50, rows), name
    assert write * row_bytes <= 32 * MIB or write == 1, name

    most = max(1, min(50, 32 * MIB // row_bytes))
    assert math.ceil(rows / write) == math.ceil(rows / most), f"{name}: more files than needed"

    block = spec.chunks[2]
    assert block == sequences or block in (8, 16, 32, 64, 128, 256), name
    if block > 8:
        assert 4 * write * block * tokens <= MIB, name
    file_sequences = (spec.shards or spec.chunks)[2]
    assert sequences <= file_sequences < sequences + block, f"{name}: all sequences in one file"
    assert np.dtype(spec.dtype) == np.float32, name
