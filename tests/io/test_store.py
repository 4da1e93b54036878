"""Stores: created whole, read bit for bit, damaged never silently, one process per chain."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr

from basinscope.io import store as store_module
from basinscope.io.checkpoint import read_checkpoint, remove_checkpoints, write_checkpoint
from basinscope.io.schema import sampling_arrays
from basinscope.io.store import (
    DONE,
    FAILED,
    MOST_DIFFERENCES,
    RUNNING,
    ChainLockedError,
    SampleStore,
    StoreMismatchError,
    open_store,
    require_same_settings,
)

ARRAYS = sampling_arrays(
    num_chains=2,
    num_draws=6,
    num_steps=60,
    batch_size=3,
    gradient_accumulation_steps=2,
    num_init_loss_batches=4,
    sequence_length=5,
    observables={"wide": 300},  # more than one block of sequences: a shard with an index
    largest_id=1000,
    num_dataset_rows=100,
    shared_batches=True,
    shared_start=True,
    save_metrics=True,
    save_sampling_input_ids=True,
)


def test_the_arrays_cover_files_with_and_without_shards() -> None:
    assert ARRAYS["loss_wide"].shards is not None
    assert ARRAYS["sampling_loss"].shards is None
    assert ARRAYS["sampling_loss_micro"].rows_per_write < 60


@pytest.mark.parametrize("stage", [1, 4, len(ARRAYS)])
def test_a_crash_in_create_leaves_nothing(
    stage: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, calls = store_module._create_array, []

    def crash(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == stage:
            raise RuntimeError("the power went out")
        return whole(*args)

    monkeypatch.setattr(store_module, "_create_array", crash)
    with pytest.raises(RuntimeError, match="power"):
        new_store(tmp_path / "s.zarr")
    assert list(tmp_path.iterdir()) == []


def test_a_kill_in_create_leaves_nothing_at_the_path(tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    code = f"""
import os
from tests.io.test_store import new_store, store_module
whole, calls = store_module._create_array, []
def crash(*args):
    calls.append(args)
    if len(calls) == 5:
        os.kill(os.getpid(), {signal.SIGKILL:d})
    return whole(*args)
store_module._create_array = crash
new_store({str(path)!r})
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert not path.exists()
    assert new_store(path).num_chains == 2


def test_create_makes_the_directories_above_and_takes_an_empty_one(tmp_path: Path) -> None:
    assert new_store(tmp_path / "a" / "b" / "s.zarr").num_chains == 2
    (tmp_path / "empty.zarr").mkdir()
    assert new_store(tmp_path / "empty.zarr").num_chains == 2


def test_create_never_replaces_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine too")
    for name in ("file", "full"):
        with pytest.raises(OSError, match=name):
            new_store(tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine"
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["notes"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "full"]


def test_two_processes_racing_in_create_end_with_one_store(tmp_path: Path) -> None:
    code = """
import sys
from tests.io.test_store import new_store
print("ready", flush=True)
for line in sys.stdin:
    store = new_store(line.split()[0], made_by=sys.argv[1])
    print(store.attributes["made_by"], flush=True)
"""
    racers = [start(code, name) for name in ("one", "two")]
    try:
        assert [line(r) for r in racers] == ["ready", "ready"]
        for lap in range(8):
            for racer in racers:
                racer.stdin.write(f"{tmp_path / f'{lap}.zarr'}\n")
                racer.stdin.flush()
            seen = [line(r) for r in racers]
            assert seen[0] == seen[1], "the loser must open the winner's store"
            assert SampleStore(tmp_path / f"{lap}.zarr").num_chains == 2
    finally:
        for racer in racers:
            racer.kill()
            racer.communicate()
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{lap}.zarr" for lap in range(8)]


def test_plain_xarray_reads_every_bit_without_a_warning(filled: Filled) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with xr.open_datatree(filled.path, engine="zarr", consolidated=False) as tree:
            assert set(map(str, tree.data_vars)) == set(ARRAYS)
            for name, values in filled.values.items():
                assert tree[name].dims == ARRAYS[name].dims, name
                assert tree[name].dtype == ARRAYS[name].dtype, name
                assert tree[name].to_numpy().tobytes() == values.tobytes(), name


def test_open_store_reads_every_bit(filled: Filled) -> None:
    for chain in range(2):
        SampleStore(filled.path).update_record(chain, state=DONE)
    tree = open_store(filled.path)
    for name, values in filled.values.items():
        assert tree[name].to_numpy().tobytes() == values.tobytes(), name


def test_every_float_survives(tmp_path: Path) -> None:
    """Any bit pattern: NaNs with payloads, infinities, zeros of both signs, subnormals."""
    store = new_store(tmp_path / "s.zarr")
    bits = np.random.default_rng(0).integers(0, 2**32, ARRAYS["loss_wide"].shape, np.uint32)
    bits.reshape(-1)[:6] = [0, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC12345, 1]
    store.arrays["loss_wide"][:] = bits.view(np.float32)
    read = np.asarray(zarr.open_array(tmp_path / "s.zarr" / "loss_wide", mode="r")[:])
    np.testing.assert_array_equal(read.view(np.uint32), bits)


def test_what_was_not_written_reads_as_nan(tmp_path: Path) -> None:
    store = new_store(tmp_path / "s.zarr")
    store.arrays["sampling_loss"][0, :3] = 1.0
    read = np.asarray(SampleStore(tmp_path / "s.zarr").arrays["sampling_loss"][:])
    assert (read[0, :3] == 1).all()
    assert np.isnan(read[0, 3:]).all()
    assert np.isnan(read[1]).all()


@pytest.mark.parametrize("name", ARRAYS)
def test_a_flipped_bit_is_an_error_never_a_number(name: str, filled: Filled) -> None:
    files = chunk_files(filled.path, name)
    assert files
    random = np.random.default_rng(len(name))
    for file in files:
        good = file.read_bytes()
        places = {0, len(good) - 1, *random.integers(0, len(good), 6).tolist()}
        for place in places:
            bad = bytearray(good)
            bad[place] ^= 1 << int(random.integers(8))
            file.write_bytes(bad)
            with pytest.raises((ValueError, RuntimeError)):
                read(filled.path, name)
        file.write_bytes(good)
    np.testing.assert_array_equal(read(filled.path, name), filled.values[name])


@pytest.mark.parametrize("name", ARRAYS)
def test_a_cut_file_is_an_error_never_a_number(name: str, filled: Filled) -> None:
    for file in chunk_files(filled.path, name):
        good = file.read_bytes()
        for length in (1, len(good) // 2, len(good) - 1):
            file.write_bytes(good[:length])
            with pytest.raises((ValueError, RuntimeError)):
                read(filled.path, name)
        file.write_bytes(good)


def test_an_empty_file_is_an_error_or_missing_never_a_number(filled: Filled) -> None:
    """Zarr takes a shard of no bytes, as a power cut may leave it, for one never written."""
    for name in ("sampling_loss", "loss_wide"):
        chunk_files(filled.path, name)[0].write_bytes(b"")
    with pytest.raises((ValueError, RuntimeError)):
        read(filled.path, "sampling_loss")
    values = read(filled.path, "loss_wide")
    assert np.isnan(values[0]).all()
    np.testing.assert_array_equal(values[1], filled.values["loss_wide"][1])


def test_a_second_process_is_told_that_a_chain_is_taken(tmp_path: Path) -> None:
    store = new_store(tmp_path / "s.zarr")
    holder = hold_chain_0(store.path)
    try:
        said = r"chain 0 of .*s\.zarr.*another process"
        with pytest.raises(ChainLockedError, match=said), store.lock(0):
            pytest.fail("two processes hold one chain")
        assert store.is_locked(0)
        assert not store.is_locked(1)
        with store.lock(1):
            pass
    finally:
        holder.kill()
        holder.communicate()


def test_who_only_looks_whether_a_chain_is_taken_stops_nobody(tmp_path: Path) -> None:
    """`basinscope info` holds each chain for a moment."""
    store = new_store(tmp_path / "s.zarr")
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            store.is_locked(0)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        for _ in range(300):
            with store.lock(0):
                pass
    finally:
        stop.set()
        looking.join()


def test_a_lock_goes_with_a_killed_holder(tmp_path: Path) -> None:
    store = new_store(tmp_path / "s.zarr")
    holder = hold_chain_0(store.path)
    assert store.is_locked(0)
    holder.kill()
    holder.communicate()
    with store.lock(0):
        assert store.is_locked(0)
    assert not store.is_locked(0)


def test_a_lock_goes_with_an_exception(tmp_path: Path) -> None:
    store = new_store(tmp_path / "s.zarr")
    with pytest.raises(ZeroDivisionError), store.lock(0):
        raise ZeroDivisionError
    assert not store.is_locked(0)


def test_a_record_is_replaced_never_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = new_store(tmp_path / "s.zarr")
    store.update_record(0, state=RUNNING, steps_written=7)
    monkeypatch.setattr(Path, "replace", fail_to_replace)
    with pytest.raises(OSError, match="no space"):
        store.update_record(0, state=DONE)
    record = store.record(0)
    assert (record["state"], record["steps_written"]) == (RUNNING, 7)


def test_open_store_says_that_there_is_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no store at .*missing\.zarr"):
        open_store(tmp_path / "missing.zarr")


@pytest.mark.parametrize("kind", ["empty directory", "file", "other group", "zarr v2"])
def test_open_store_says_that_it_is_no_store(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    if kind == "file":
        path.write_text("hello")
    elif kind == "empty directory":
        path.mkdir()
    else:
        group = zarr.open_group(path, mode="w", zarr_format=2 if kind == "zarr v2" else 3)
        group.create_array("something", shape=(2,), dtype="float32")
    with pytest.raises(ValueError, match=r"s\.zarr is not a sampling store.*sampling_loss"):
        open_store(path)


def test_open_store_names_chains_that_are_not_whole(tmp_path: Path) -> None:
    store = new_store(tmp_path / "s.zarr", num_chains=4)
    store.update_record(0, state=DONE)
    store.update_record(1, state=FAILED, failed_step=17, reason="the loss is not finite")
    store.update_record(2, state=RUNNING, draws_written=3)
    with pytest.warns(UserWarning, match="chain") as caught:
        open_store(tmp_path / "s.zarr")
    (message,) = [str(w.message) for w in caught]
    assert "s.zarr" in message
    assert "chain 1 failed at step 17 (the loss is not finite)" in message
    assert "chain 2 is unfinished (3 draws" in message
    assert "chain 3 was not started" in message
    assert "chain 0" not in message


def test_open_store_is_lazy_and_quiet_about_a_whole_store(filled: Filled) -> None:
    store = SampleStore(filled.path)
    for chain in range(2):
        store.update_record(chain, state=DONE)
    for name in ARRAYS:
        for file in chunk_files(filled.path, name):
            if name != "n_beta":
                file.write_bytes(b"damaged: reading it is an error")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tree = open_store(filled.path)
    files = ARRAYS["loss_wide"].shards
    assert files is not None
    assert tree["loss_wide"].chunks[1] == (files[1],)
    with pytest.raises((ValueError, RuntimeError)):
        tree["loss_wide"].mean().compute()


def test_a_store_is_complete_once_no_chain_is_left(tmp_path: Path) -> None:
    store = new_store(tmp_path / "s.zarr")
    store.update_record(0, state=DONE, seconds={"forward": 1.0, "write": 0.5})
    assert store.unfinished() == [1]
    assert not store.finish()
    assert "completed" not in store.attributes
    store.update_record(1, state=FAILED, failed_step=2, reason="x", seconds={"forward": 2.0})
    assert store.finish()
    attributes = store.attributes
    assert attributes["completed"] == 1
    assert attributes["failed_chains"] == [1]
    assert attributes["seconds"] == {"forward": 3.0, "write": 0.5}
    assert attributes["made_by"] == "test"


def test_finishing_removes_what_killed_processes_left(filled: Filled) -> None:
    store = SampleStore(filled.path)
    slot = write_checkpoint(filled.path, 0, None, {"weights": random_bytes(10, 1)})
    litter = [
        filled.path / "n_beta" / "c.abc.partial",
        filled.path / "input_ids_wide" / "c" / "0" / "0.abc.partial",
        filled.path / "chains" / "1" / "zarr.abc.partial",
    ]
    for file in litter:
        file.write_bytes(b"half")
    store.update_record(0, state=DONE)
    assert not store.finish()
    assert all(file.exists() for file in litter)
    store.update_record(1, state=DONE)
    assert store.finish()
    assert not any(file.exists() for file in litter)
    assert not (filled.path / "chains" / "0" / slot).exists()
    for name, values in filled.values.items():
        np.testing.assert_array_equal(read(filled.path, name), values)


def test_other_settings_are_named_with_both_values(tmp_path: Path) -> None:
    stored = {"sampler": {"lr": 1e-3, "shuffle": True, "old": 4}, "model": {"class": "A"}}
    wanted = {"sampler": {"lr": 2e-3, "shuffle": True, "new": 5}, "model": {"class": "B"}}
    with pytest.raises(StoreMismatchError) as caught:
        require_same_settings(tmp_path, stored, wanted)
    message = str(caught.value)
    for line_ in (
        "sampler.lr: the store has 0.001, this call has 0.002",
        "sampler.old: the store has 4, this call has 'nothing'",
        "sampler.new: the store has 'nothing', this call has 5",
        "model.class: the store has 'A', this call has 'B'",
    ):
        assert line_ in message
    assert "shuffle" not in message
    require_same_settings(tmp_path, stored, stored)


def test_a_group_of_many_differences_does_not_hide_the_others(tmp_path: Path) -> None:
    edges = {f"edge {i}": True for i in range(MOST_DIFFERENCES + 5)}
    with pytest.raises(StoreMismatchError) as caught:
        require_same_settings(tmp_path, {"edges": {}, "seed": 1}, {"edges": edges, "seed": 2})
    lines = str(caught.value).splitlines()
    assert lines[1] == "  seed: the store has 1, this call has 2"
    assert lines[2] == "  edges.edge 0: the store has 'nothing', this call has True"
    assert lines[2 + MOST_DIFFERENCES] == "  and 5 more of edges"
    assert len(lines) == 4 + MOST_DIFFERENCES


def test_litter_of_a_killed_writer_is_removed_for_its_chain_only(filled: Filled) -> None:
    theirs = filled.path / "sampling_loss" / "c" / "1" / "0" / "0" / ".0.abc.partial"
    ours = [
        filled.path / "sampling_loss" / "c" / "0" / "0" / "0" / "0.abc.partial",
        filled.path / "chains" / "0" / "zarr.abc.partial",
    ]
    for file in (theirs, *ours):
        file.write_bytes(b"half")
    SampleStore(filled.path).remove_litter(0)
    assert theirs.exists()
    assert not any(file.exists() for file in ours)
    for name, values in filled.values.items():
        np.testing.assert_array_equal(read(filled.path, name), values)


def test_checkpoints_alternate_and_come_back_bit_for_bit(tmp_path: Path) -> None:
    path = new_store(tmp_path / "s.zarr").path
    first = {"weights": random_bytes(1000, 1), "square_avg": random_bytes(0, 2)}
    second = {"weights": random_bytes(1000, 3), "square_avg": random_bytes(0, 4)}
    slot = write_checkpoint(path, 0, None, first)
    other = write_checkpoint(path, 0, slot, second)
    assert slot != other
    assert write_checkpoint(path, 0, other, second) == slot
    for state in (read_checkpoint(path, 0, other), read_checkpoint(path, 0, slot)):
        assert {k: v.tobytes() for k, v in state.items()} == {
            k: v.tobytes() for k, v in second.items()
        }
    remove_checkpoints(path, 0)
    assert {p.name for p in (path / "chains" / "0").iterdir()} == {"zarr.json"}


def test_a_flipped_bit_in_a_checkpoint_is_an_error(tmp_path: Path) -> None:
    path = new_store(tmp_path / "s.zarr").path
    slot = write_checkpoint(path, 0, None, {"weights": random_bytes(1000, 1)})
    (file,) = chunk_files(path / "chains" / "0" / slot, "weights")
    good = file.read_bytes()
    for place in (0, 500, len(good) - 1):
        bad = bytearray(good)
        bad[place] ^= 4
        file.write_bytes(bad)
        with pytest.raises((ValueError, RuntimeError)):
            read_checkpoint(path, 0, slot)


class Filled:
    """A store whose every array holds random values."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values: dict[str, np.ndarray] = {}
        store, random = new_store(path), np.random.default_rng(7)
        for name, spec in ARRAYS.items():
            if spec.dtype.startswith("float"):
                values = np.asarray(random.normal(size=spec.shape), spec.dtype)
            else:
                values = random.integers(0, 100, spec.shape).astype(spec.dtype)
            store.arrays[name][...] = values
            self.values[name] = values


@pytest.fixture
def filled(tmp_path: Path) -> Filled:
    return Filled(tmp_path / "s.zarr")


def new_store(path: str | Path, *, num_chains: int = 2, made_by: str = "test") -> SampleStore:
    return SampleStore.create(Path(path), ARRAYS, {"made_by": made_by}, num_chains)


def read(path: Path, name: str) -> np.ndarray:
    return np.asarray(zarr.open_array(path / name, mode="r")[...])


def chunk_files(path: Path, name: str) -> list[Path]:
    return sorted(f for f in (path / name).rglob("*") if f.is_file() and f.name != "zarr.json")


def random_bytes(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, count).astype(np.uint8)


def fail_to_replace(self: Path, target: Any) -> None:
    raise OSError(28, "no space left on device")


def start(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return re.sub(r"\s+$", "", process.stdout.readline())


def hold_chain_0(path: Path) -> subprocess.Popen[str]:
    code = f"""
import time
from pathlib import Path
from basinscope.io.store import SampleStore
with SampleStore(Path({str(path)!r})).lock(0):
    print("held", flush=True)
    time.sleep(60)
"""
    holder = start(code)
    assert line(holder) == "held"
    return holder
