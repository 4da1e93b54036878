"""Every damage is found and named, and nothing else is taken for one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
import zarr
from datasets import Dataset

import basinscope
from basinscope.io.store import FAILED, RUNNING, SampleStore
from basinscope.io.verify import verify
from basinscope.sampling.losses import next_token_loss
from tests.conftest import token_rows
from tests.models_small import tiny_model


def sample(path: Path, observables: dict[str, Any], **changes: Any) -> Path:
    basinscope.sample(
        tiny_model("raw"),
        token_rows(48, 9, seed=1),
        observables,
        **{"lr": 1e-3, "n_beta": 10.0, "num_draws": 70, "batch_size": 4, **changes},
        device="cpu",
        output_path=path,
        progress=False,
    )
    return path


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished store of three chains, two files of 35 draws to a chain."""
    return sample(
        tmp_path_factory.mktemp("verify") / "samples.zarr",
        {"first": token_rows(30, 9, seed=2)},
        num_chains=3,
        save_metrics=True,
        save_sampling_input_ids=True,
    )


@pytest.fixture
def store(sampled: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sampled, tmp_path / "copy.zarr"))


def data_files(store: Path) -> list[Path]:
    return [f for f in sorted(store.rglob("*")) if f.is_file() and f.name != "zarr.json"]


def test_a_whole_store_is_as_it_was_written(store: Path) -> None:
    found = verify(store)
    files = data_files(store)
    assert (found.damaged, found.unfinished, found.unchecked, found.complete) == ((), (), 0, True)
    assert found.files == len(files)
    assert found.bytes_read == sum(file.stat().st_size for file in files)
    assert data_files(store) == files


def test_inputs_are_due_once_one_chain_was_started(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="chain 1 was not started"):
        basinscope.open_store(
            sample(
                tmp_path / "s.zarr", {"a": (token_rows(9, 9, seed=2), 1)}, num_chains=2,
                num_draws=2, chains=[0],
            )
        )  # fmt: skip
    assert verify(tmp_path / "s.zarr").damaged == ()
    gone = tmp_path / "s.zarr" / "input_ids_a" / "c" / "0" / "0"
    gone.unlink()
    (said,) = verify(tmp_path / "s.zarr").damaged
    assert str(gone) in said


def test_zeros_are_written_like_other_numbers(tmp_path: Path) -> None:
    """Token 0 and row 0 alone fill chunks with what missing ones read as."""
    one = Dataset.from_dict({"input_ids": [[0] * 5]}).with_format("torch")
    basinscope.sample(
        tiny_model("raw"), one, {"zeros": (one, 1)}, lr=1e-3, n_beta=10.0, num_chains=1,
        num_draws=2, batch_size=1, save_sampling_input_ids=True, device="cpu", progress=False,
        output_path=tmp_path / "s.zarr",
    )  # fmt: skip
    assert verify(tmp_path / "s.zarr").damaged == ()


def test_every_file_that_is_damaged_or_missing_is_named(store: Path) -> None:
    rng = np.random.default_rng(0)
    for file in data_files(store):
        content = file.read_bytes()
        damaged = bytearray(content)
        damaged[rng.integers(len(damaged))] ^= 1 << int(rng.integers(8))
        for wrong in (bytes(damaged), content[: len(content) // 2], None):
            file.unlink()
            if wrong is not None:
                file.write_bytes(wrong)
            (problem,) = verify(store).damaged
            # what only zarr-python reads is named by its array
            assert str(file) in problem or str(file.parent) in problem, problem
            file.write_bytes(content)
    assert not verify(store).damaged


def test_a_damaged_record_or_metadata_is_named(store: Path) -> None:
    for file in (store / "loss_first" / "zarr.json", store / "chains" / "1" / "zarr.json"):
        content = file.read_text()
        file.write_text(content[:-20])
        assert any(str(file.parent) in problem for problem in verify(store).damaged)
        file.write_text(content)


@pytest.mark.parametrize(
    "gone",
    ["loss_first", "loss_first/zarr.json", "sampling_loss", "init_loss", "metrics_noise",
     "sampling_input_ids_micro", "chains", "chains/0", "chains/0/zarr.json", "chains/zarr.json"],
)  # fmt: skip
def test_whole_parts_that_are_missing_are_named(gone: str, store: Path) -> None:
    path = store / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert any(str(store / gone) in problem for problem in verify(store).damaged)


@pytest.mark.parametrize(
    "content", ["{}", '{"attributes": {}}', "[]", "null", '{"attributes": null}']
)
def test_one_record_that_is_none_hides_no_other_damage(content: str, store: Path) -> None:
    (store / "chains" / "1" / "zarr.json").write_text(content)
    shard = next(f for f in (store / "loss_first" / "c" / "2").rglob("*") if f.is_file())
    shard.unlink()
    record, missing = sorted(verify(store).damaged, key=lambda problem: "record" not in problem)
    assert "the record of chain 1" in record
    assert str(shard) in missing


def test_of_checkpoints_the_one_that_counts_is_read(tmp_path: Path) -> None:
    class StopError(Exception):
        pass

    calls = 0

    def stopping(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls > 60:
            raise StopError
        return next_token_loss(model, ids)

    path = tmp_path / "stopped.zarr"
    with pytest.raises(StopError):
        sample(path, {}, num_chains=1, loss_fn=stopping, checkpoint_every=5)
    named = path / "chains" / "0" / SampleStore(path).record(0)["checkpoint"]
    (other,) = {*(path / "chains" / "0").glob("checkpoint_*")} - {named}
    assert not verify(path).damaged
    for directory, problems in ((other, 0), (named, 1)):
        files = [file for file in directory.rglob("c/*") if file.is_file()]
        assert files
        for file in files:
            content = file.read_bytes()
            file.unlink()
            assert len(verify(path).damaged) == problems
            file.write_bytes(content)


def test_chains_that_are_not_done_are_no_damage(store: Path) -> None:
    """Files behind the last row that is recorded may be absent, those before it may not."""
    samples = SampleStore(store)
    files = sorted((store / "loss_first" / "c" / "1").rglob("*"))
    first, second = (file for file in files if file.is_file())
    samples.update_record(1, state=RUNNING, draws_written=35, steps_written=35)
    second.unlink()
    for name in ("sampling_loss", "sampling_loss_micro"):
        (store / name / "c" / "1" / "1" / "0" / "0").unlink()
    found = verify(store)
    assert not found.damaged
    assert found.unfinished == ("chain 1 is unfinished (35 draws can be resumed)",)
    samples.update_record(1, state=FAILED, failed_step=35, reason="loss is nan")
    assert verify(store).unfinished == ("chain 1 failed at step 35 (loss is nan)",)
    samples.update_record(1, draws_written=36)
    problems = verify(store).damaged  # of loss_first and of sampling_loss
    assert len(problems) == 2
    assert any(str(second) in problem for problem in problems)
    first.unlink()
    assert len(verify(store).damaged) == 3


def test_an_estimate_is_taken_for_no_samples(sampled: Path, tmp_path: Path) -> None:
    basinscope.compute_bif(sampled, output_path=tmp_path / "bif.zarr")
    basinscope.compute_llc(sampled).compute().to_zarr(tmp_path / "llc.zarr", consolidated=False)
    for name in ("bif.zarr", "llc.zarr"):
        found = verify(tmp_path / name)
        assert found.files
        assert (found.damaged, found.complete) == ((), False)


def test_stores_that_keep_no_records(tmp_path: Path) -> None:
    """Results, and what others wrote: checksums alone; absent chunks are fill values."""
    rng = np.random.default_rng(0)
    values = xr.DataArray(rng.standard_normal((6, 5)), dims=("a", "b"))
    datasets = {"/": xr.Dataset({"x": values}), "/deep/er": xr.Dataset({"y": values})}
    tree = xr.DataTree.from_dict(datasets)
    tree.to_zarr(tmp_path / "tree.zarr", consolidated=False, zarr_format=3)
    found = verify(tmp_path / "tree.zarr")
    assert (found.files, found.damaged, found.unchecked, found.complete) == (2, (), 2, False)
    group = zarr.open_group(tmp_path / "packed.zarr", mode="w")
    packed = group.create_array(
        "z", shape=(7, 3), chunks=(2, 3), dtype="float64", compressors=zarr.codecs.GzipCodec()
    )
    packed[:4] = 1.5
    found = verify(tmp_path / "packed.zarr")
    assert (found.files, found.damaged) == (2, ())
    (tmp_path / "packed.zarr" / "z" / "c" / "1" / "0").write_bytes(b"no gzip")
    (problem,) = verify(tmp_path / "packed.zarr").damaged
    assert "packed.zarr/z is damaged" in problem


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no store at"):
        verify(tmp_path / "none.zarr")
    (tmp_path / "notes").mkdir()
    with pytest.raises(ValueError, match="is no Zarr v3 store"):
        verify(tmp_path / "notes")
