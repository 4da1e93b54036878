"""Tiny models and data sets that the tests share."""

from __future__ import annotations

import gc
import os
import sys

# Before anything imports triton or torch: without -m gpu, kernels are interpreted, on the CPU
if "-m gpu" in " ".join(sys.argv) or "-mgpu" in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "0")
if os.environ.setdefault("TRITON_INTERPRET", "1") == "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from datasets import Dataset

from basinscope import demo
from tests.models_small import tiny_model

torch.set_num_threads(1)  # tiny models: threads would only wait for each other


def pytest_collection_finish() -> None:
    """Spare garbage collections what imports have made: devinterp asks for four in each call."""
    gc.freeze()


def pytest_unconfigure() -> None:
    """Take them back, so that what is left at the end goes in its order."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def model() -> torch.nn.Module:
    """A GPT-NeoX of 2 layers and 40 token ids."""
    return tiny_model("gpt_neox")


@pytest.fixture
def dataset() -> Dataset:
    """48 rows of 9 token ids below 40."""
    return token_rows(48, 9, seed=1)


@pytest.fixture
def observables() -> dict[str, Dataset]:
    return {"first": token_rows(30, 9, seed=2), "second set": token_rows(25, 9, seed=3)}


@pytest.fixture(scope="session")
def library_texts() -> dict[str, list[str]]:
    """The running Python's standard library, which takes seconds to parse."""
    return demo.standard_library_texts()


def token_rows(rows: int, length: int, seed: int, vocabulary: int = 40) -> Dataset:
    ids = np.random.default_rng(seed).integers(0, vocabulary, (rows, length))
    return Dataset.from_dict({"input_ids": ids}).with_format("torch")
