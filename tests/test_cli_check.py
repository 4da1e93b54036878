"""``basinscope check``: what it prints and how it ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
import xarray as xr
import yaml
from datasets import Dataset
from typer.testing import CliRunner, Result

from basinscope.cli_check import FOUND_WARNINGS, check
from basinscope.sampling.run_file import run_from_file
from tests.conftest import token_rows
from tests.models_small import tiny_model

SAMPLER = {"lr": 1e-3, "n_beta": 10, "batch_size": 4, "batches_per_draw": 1}
app = typer.Typer()
app.command()(check)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model that knows its data: the id 7, over and over."""
    model = tiny_model("gpt_neox")
    with torch.no_grad():
        model.gpt_neox.final_layer_norm.bias[:] = 1.0
        model.lm_head.weight[7] += 1.0
    model.save_pretrained(tmp_path / "model")
    Dataset.from_dict({"input_ids": np.full((20, 9), 7)}).save_to_disk(tmp_path / "known")
    token_rows(20, 9, seed=1).save_to_disk(tmp_path / "random")
    return tmp_path


def test_a_sound_run_ends_well(folder: Path) -> None:
    done = invoke(write(folder, dataset="known"))
    assert done.exit_code == 0, done.output
    for word in ("GPTNeoXForCausalLM", "restrictions", "batch", "ok"):
        assert word in done.output
    assert sorted(path.name for path in folder.iterdir()) == [
        "known",
        "model",
        "random",
        "run.yaml",
    ]


def test_warnings_end_with_an_exit_code_of_their_own(folder: Path) -> None:
    done = invoke(write(folder, dataset="random"), "--json", "--batch-size", "4")
    assert done.exit_code == FOUND_WARNINGS, done.output
    report = json.loads(done.stdout)
    levels = {finding["topic"]: finding["level"] for finding in report["findings"]}
    assert report["model"] == "GPTNeoXForCausalLM"
    assert [topic for topic, level in levels.items() if level == "warning"] == ["loss"]


def test_the_files_restriction_is_asked_about(folder: Path) -> None:
    done = invoke(write(folder, dataset="known", restriction=["l0", "l1"]), "--json")
    values = {f["topic"]: f["values"] for f in json.loads(done.stdout)["findings"]}
    assert values["restrictions"]["untouched"] == [
        "gpt_neox.embed_in.weight",
        "gpt_neox.final_layer_norm.weight",
        "gpt_neox.final_layer_norm.bias",
        "lm_head.weight",
    ]


def test_a_wrong_file_is_told_from_a_warning(folder: Path) -> None:
    assert invoke(folder / "nothing.yaml").exit_code == 2
    assert invoke(write(folder, dataset="known", restriction="l9")).exit_code == 2
    assert invoke(write(folder, dataset="known"), "--batch-size", "1").exit_code == 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sampler": {**SAMPLER, "lrr": 1}}, "unknown lrr: did you mean lr?"),
        ({"sampler": {**SAMPLER, "lr": -1e-4}}, "lr (step size ε) must be a finite number above 0"),
        ({"sampler": {**SAMPLER, "chains": "2:9"}}, "chains must name some of 0 to 3"),
        ({"sampler": {**SAMPLER, "rmsprop_eps": 1}}, "it belongs to sampling_method"),
        ({"sampler": {"lr": 1e-3}}, "sampler needs n_beta"),
        ({"observables": {"code": "none"}}, "run.yaml, observables.code: '"),
        ({"observables": ["known"]}, "observables must be a mapping of name to path; got a list"),
    ],
)
def test_what_sampling_would_refuse_is_found_before_the_model_is_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], said: str
) -> None:
    monkeypatch.setattr("basinscope.sampling.run_file.load_model", pytest.fail)
    done = invoke(write(folder, dataset="known", **changes))
    assert done.exit_code == 2
    assert said in " ".join(done.output.split())


def test_a_run_that_would_be_refused_is_a_warning(folder: Path) -> None:
    token_rows(20, 8, seed=1).save_to_disk(folder / "shorter")
    done = invoke(write(folder, dataset="known", observables={"code": "shorter"}), "--json")
    assert done.exit_code == FOUND_WARNINGS, done.output
    found = {f["topic"]: f for f in json.loads(done.stdout)["findings"]}
    assert [topic for topic, f in found.items() if f["level"] == "warning"] == ["run"]
    assert "observable 'code' has sequences of 8 tokens" in found["run"]["text"]


def test_what_a_run_takes_and_what_is_left_of_it(folder: Path) -> None:
    sampler = {**SAMPLER, "num_chains": 2, "num_draws": 3, "num_burnin_steps": 5}
    observables = {"code": "known", "prose": {"path": "random", "batches_per_draw": 2}}
    plan = write(folder, dataset="known", observables=observables, sampler=sampler, output="s.zarr")

    def looked_at() -> dict[str, Any]:
        done = invoke(plan, "--json")
        assert done.exit_code == 0, done.output
        return dict(json.loads(done.stdout)["findings"][-1])

    found = looked_at()
    free = found["values"].pop("free_bytes")
    assert found["values"] == {
        "chains_left": [0, 1],
        "steps": 8,
        "sequences_per_step": 4,
        "sequences_per_draw": 12,
        "losses_bytes": 4 * losses_in(3, 8),
        "refused": "",
    }
    assert free > 0
    assert not (folder / "s.zarr").exists()

    run_from_file(plan, {"chains": [1]})
    found = looked_at()
    assert found["values"]["chains_left"] == [0]
    assert found["values"]["losses_bytes"] == 2 * losses_in(3, 8)
    assert "has some: chains 0 are left" in found["text"]
    run_from_file(plan, {})
    assert looked_at()["values"]["chains_left"] == []
    with xr.open_zarr(folder / "s.zarr", consolidated=False) as store:
        named = [array for name, array in store.data_vars.items() if "loss" in str(name)]
        assert sum(array.size for array in named) == losses_in(3, 8)


def losses_in(draws: int, steps: int) -> int:
    """Of 2 chains, 4 sequences a step and 12 a draw, 8 losses in each; and at the checkpoint.

    There it is those of the observables' sequences, and of 32 batches, a mean each.
    """
    return 2 * 8 * (4 * draws + 4 * steps + 12 * draws + 1) + 8 * 12 + 8 * 32


def test_a_disk_that_cannot_hold_the_losses_is_a_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("basinscope.sampling.rehearsal._free_bytes", lambda _: 1000)
    done = invoke(write(folder, dataset="known", output="s.zarr"), "--json")
    assert done.exit_code == FOUND_WARNINGS
    assert json.loads(done.stdout)["findings"][-1]["values"]["free_bytes"] == 1000


def test_the_device_is_the_runs_own(folder: Path) -> None:
    plan = write(folder, dataset="known", sampler={**SAMPLER, "device": "foo"})
    assert "device='foo' cannot be used here" in " ".join(invoke(plan).output.split())
    assert invoke(plan, "--device", "cpu").exit_code == 0


def write(folder: Path, **changes: Any) -> Path:
    plan = {"model": "model", "sampler": SAMPLER, **changes}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(plan))
    return path


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])
