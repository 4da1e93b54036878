"""What a GPU asks of the host, shown on a machine without one."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import basinscope
from basinscope.models.restrictions import create_param_masks
from basinscope.sampling.chain import cuda_devices
from tests.conftest import token_rows
from tests.models_small import tiny_model

SETTINGS: dict[str, Any] = {
    "lr": 1e-4, "n_beta": 3.0, "num_chains": 1, "batch_size": 4, "num_init_loss_batches": 1,
    "progress": False, "device": "cpu", "chains_at_once": 1,
}  # fmt: skip


def test_the_generator_kept_is_that_of_the_current_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    found = [cuda_devices(torch.device(name)) for name in ("cpu", "cuda", "cuda:0", "cuda:2")]
    assert found == [[], [1], [0], [2]]


def test_steps_upload_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also under a restriction, whose activations are looked up by the rows of the batch."""
    uploads: list[int] = []
    take = torch.from_numpy

    def noted(values: np.ndarray) -> torch.Tensor:
        uploads[-1] += 1
        return take(values)

    monkeypatch.setattr(torch, "from_numpy", noted)
    model, data = tiny_model("gpt_neox"), token_rows(24, 9, seed=1)
    masks = create_param_masks(model, "l1")
    for draws in (3, 9):
        uploads.append(0)
        basinscope.sample(
            model, data, {"a": (data, 1)}, param_masks=masks, num_draws=draws,
            output_path=tmp_path / f"{draws}.zarr", **SETTINGS,
        )  # fmt: skip
    assert uploads[0] == uploads[1]


def test_steps_are_recorded_for_one_chain_at_a_time(tmp_path: Path) -> None:
    data = token_rows(8, 5, seed=1)
    settings = {**SETTINGS, "chains_at_once": 2, "cuda_graph": True}
    with pytest.raises(ValueError, match="use workers=2 in place of chains_at_once"):
        basinscope.sample(
            tiny_model("raw"), data, {}, num_draws=2, output_path=tmp_path / "s.zarr", **settings
        )
    assert not (tmp_path / "s.zarr").exists()


def test_workers_take_what_has_no_place_in_the_usual_settings() -> None:
    """In processes of their own: the first setting cannot be taken back."""
    caller = """
        import json, torch
        from basinscope.sampling.workers import _arithmetic
        usual = _arithmetic()
        torch.backends.cuda.matmul.fp32_precision = 'tf32'
        torch.use_deterministic_algorithms(True, warn_only=True)
        assert sum(usual[name] != value for name, value in _arithmetic().items()) >= 2
        print(json.dumps(_arithmetic()))
    """
    worker = """
        import json, sys, torch
        from basinscope.sampling.workers import _arithmetic, _set_arithmetic
        _set_arithmetic(**json.loads(sys.argv[1]))
        print(json.dumps(_arithmetic()))
    """
    sent = _output_of(caller)
    assert _output_of(worker, sent) == sent


def _output_of(code: str, *arguments: str) -> str:
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
