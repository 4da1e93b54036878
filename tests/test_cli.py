"""The commands a person types: what they print, what they write, how they end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

import basinscope
from basinscope.cli import CHAIN_FAILED, app
from basinscope.io.store import SampleStore
from basinscope.sampling.run_file import parse_chains
from tests.conftest import token_rows
from tests.models_small import tiny_model

SAMPLER = {"lr": 1e-3, "n_beta": 10, "num_chains": 3, "num_draws": 6, "batch_size": 4,
           "num_init_loss_batches": 2}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model("gpt_neox").save_pretrained(tmp_path / "model")
    token_rows(40, 9, seed=1).save_to_disk(tmp_path / "data")
    token_rows(30, 9, seed=2).to_parquet(tmp_path / "observed.parquet")
    return tmp_path


def test_sample_llc_and_info_work_together(folder: Path) -> None:
    store = folder / "runs" / "samples.zarr"
    done = invoke("sample", write_plan(folder))
    assert done.exit_code == 0, done.output
    assert "is complete" in done.output
    assert set(basinscope.open_store(store).data_vars) >= {"loss_first", "loss_second"}

    shown = invoke("llc", store, "--json")
    figures = json.loads(shown.stdout)
    expected = basinscope.compute_llc(store).compute()
    assert figures["llc_mean"] == pytest.approx(float(expected["llc_mean"]))
    assert len(figures["llc_per_chain"]) == 3
    assert {"rhat", "ess_bulk", "llc_error"} <= set(figures)
    table = invoke("llc", store).output
    assert f"{figures['llc_mean']:.2f} ± {figures['llc_error']:.2f}" in table

    info = invoke("info", store).output
    assert "GPTNeoXForCausalLM" in info
    for word in ("loss_second", "init_loss", "done", "backward", "write (background)"):
        assert word in info


def test_chains_of_an_array_job_make_one_store(folder: Path) -> None:
    plan = write_plan(folder)
    store = folder / "runs" / "samples.zarr"
    first = invoke("sample", plan, "--chains", "0:2")
    assert first.exit_code == 0, first.output
    assert "not complete yet" in first.output
    states = [record["state"] for record in SampleStore(store).records().values()]
    assert states == ["done", "done", "pending"]
    assert "pending" in invoke("info", store).output
    assert "is complete" in invoke("sample", plan, "--chains", "2").output


def test_a_failed_chain_shows_in_exit_code_and_summary(folder: Path) -> None:
    plan = write_plan(folder, sampler={**SAMPLER, "lr": 1e12})
    done = invoke("sample", plan, "--out", folder / "wild.zarr")
    assert done.exit_code == CHAIN_FAILED
    assert "3 of 3 chains failed" in done.output.replace("\n", " ")
    assert "failed" in invoke("info", folder / "wild.zarr").output
    llc = invoke("llc", folder / "wild.zarr")
    assert llc.exit_code == 2
    assert "wild.zarr can be analysed: chain 0 failed" in llc.output.replace("\n", " ")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sampler": {"n_beta": 10}}, "sampler needs lr"),
        ({"sampler": {**SAMPLER, "lrr": 1}}, "unknown lrr"),
        ({"sampler": {**SAMPLER, "batch_size": 0}}, "batch_size"),
        ({"colour": "red"}, "unknown colour"),
        ({"dtype": "int4"}, "dtype must be one of"),
        ({"dataset": "nowhere"}, "dataset.path="),
        ({"dataset": {"max_length": 5}}, "dataset needs a path"),
        ({"observables": {"a": {"path": "data", "rows": 3}}}, "unknown rows"),
    ],
)
def test_a_bad_file_is_one_clear_error(folder: Path, changes: dict, said: str) -> None:
    done = invoke("sample", write_plan(folder, **changes))
    assert done.exit_code == 2
    assert said in done.output.replace("\n", " ")
    assert "Traceback" not in done.output
    assert not (folder / "runs").exists()


def test_what_is_no_store_is_said_so(tmp_path: Path) -> None:
    for command in ("llc", "info"):
        missing = invoke(command, tmp_path / "none.zarr")
        assert missing.exit_code == 2
        assert "no store at" in missing.output
        other = invoke(command, tmp_path)
        assert other.exit_code == 2
        assert "is not a sampling store" in other.output


def test_help_names_every_command_and_doctor_the_paths() -> None:
    shown = invoke("--help").output
    for command in ("demo", "sample", "llc", "info", "doctor"):
        assert command in shown
        assert invoke(command, "--help").exit_code == 0
    doctor = invoke("doctor").output
    for word in ("torch", "numba", "cpu", "kernel path"):
        assert word in doctor


def test_chains_are_read_from_text() -> None:
    assert parse_chains("0:3") == [0, 1, 2]
    assert parse_chains("5") == [5]
    with pytest.raises(ValueError, match="FIRST:END"):
        parse_chains("a:b")


def write_plan(folder: Path, **changes: object) -> Path:
    plan = {
        "model": "model",
        "dataset": "data",
        "observables": {
            "first": {"path": "observed.parquet", "batches_per_draw": 2},
            "second": "data",
        },
        "sampler": SAMPLER,
        "output": "runs/samples.zarr",
        **changes,
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(plan))
    return path


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(
        app, [str(argument) for argument in arguments], env={"COLUMNS": "160"}
    )
