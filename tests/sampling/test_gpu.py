"""Chains on a real GPU: ``TRITON_INTERPRET=0 pytest -m gpu tests/sampling``."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import basinscope
from basinscope.io.store import SampleStore
from tests.conftest import token_rows
from tests.models_small import tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="triton is interpreted"),
]

SETTINGS: dict[str, Any] = {
    "lr": 1e-5, "n_beta": 3.0, "localization": 10.0, "num_chains": 2, "num_draws": 8,
    "batch_size": 4, "num_init_loss_batches": 2, "save_metrics": True, "progress": False,
}  # fmt: skip


def run(path: Path, **changes: Any) -> SampleStore:
    data = token_rows(40, 9, seed=1)
    settings = {**SETTINGS, "device": "cuda", **changes}
    basinscope.sample(tiny_model("gpt_neox"), data, {"a": (data, 2)}, output_path=path, **settings)
    return SampleStore(path)


def test_a_chain_is_that_of_the_cpu(tmp_path: Path) -> None:
    """Same noise and batches: losses agree to the rounding that a few steps add up."""
    gpu, cpu = run(tmp_path / "gpu.zarr"), run(tmp_path / "cpu.zarr", device="cpu")
    for name in ("init_loss", "sampling_loss", "loss_a", "metrics_noise", "metrics_distance"):
        np.testing.assert_allclose(
            gpu.arrays[name][...], cpu.arrays[name][...], rtol=2e-3, err_msg=name
        )


def test_a_run_repeats_to_the_last_bit(tmp_path: Path) -> None:
    first, second = run(tmp_path / "1.zarr"), run(tmp_path / "2.zarr")
    for name, array in first.arrays.items():
        np.testing.assert_array_equal(array[...], second.arrays[name][...], err_msg=name)


@pytest.mark.parametrize("method", ["sgmcmc_sgld", "rmsprop_sgld"])
def test_a_replayed_graph_draws_the_same_numbers(method: str, tmp_path: Path) -> None:
    plain = run(tmp_path / "plain.zarr", sampling_method=method)
    graph = run(tmp_path / "graph.zarr", sampling_method=method, cuda_graph=True)
    for name, array in plain.arrays.items():
        np.testing.assert_allclose(
            graph.arrays[name][...], array[...], rtol=1e-5, atol=1e-7, err_msg=name
        )


def test_steps_do_not_wait_for_the_device(tmp_path: Path) -> None:
    """The number of synchronising operations does not grow with the number of steps."""
    counts = []
    for draws in (10, 40):
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                run(tmp_path / f"{draws}.zarr", num_draws=draws, num_chains=1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchroniz" in str(w.message) for w in caught))
    assert counts[1] - counts[0] <= 3, counts
