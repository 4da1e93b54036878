"""What a store's record speaks of is on the disk before the record is."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

import dask
import numpy as np
import pytest
import torch
import zarr
from datasets import Dataset

import basinscope
from basinscope.io.attributions_merge import merge_attributions
from basinscope.io.chunked import read_attributes, replace_attributes, write_group
from basinscope.io.durable import settle, settle_tree, written_files
from basinscope.io.results import write_result
from tests.io.attributions_random import new_writer, random_store, random_sums
from tests.io.test_results import BLOCKS, SETTINGS, PowerCutError, block_files, lazy_result

Synced = list[tuple[Path, int, str]]


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> Synced:
    """What was synced, in order: the file, when it had changed last, and its text if it has one.

    Drafts go by the names that they are moved to.
    """
    found: Synced = []
    really = os.fsync

    def fsync(descriptor: int) -> None:
        really(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        name = Path(re.sub(r"/\.?([^/]+)\.[0-9a-f]{32}\.partial", r"/\1", str(path)))
        text = path.read_text() if name.suffix == ".json" else ""
        found.append((name, os.fstat(descriptor).st_mtime_ns, text))

    monkeypatch.setattr(os, "fsync", fsync)
    return found


@pytest.fixture
def store(
    tmp_path: Path, model: torch.nn.Module, dataset: Dataset, observables: dict[str, Dataset],
    synced: Synced,
) -> Path:  # fmt: skip
    path = tmp_path / "run.zarr"
    basinscope.sample(
        model, dataset, observables, lr=1e-3, n_beta=10.0, num_chains=2, num_draws=6, batch_size=2,
        checkpoint_every=2, save_metrics=True, output_path=path, progress=False,
    )  # fmt: skip
    return path


def test_every_file_is_on_the_disk_as_it_was_written_last(store: Path, synced: Synced) -> None:
    changed = {path: when for path, when, _ in synced}
    files = [file for file in store.rglob("*") if file.is_file()]
    assert len(files) > 20
    assert {file: file.stat().st_mtime_ns for file in files}.items() <= changed.items()


def test_a_record_follows_what_it_speaks_of(store: Path, synced: Synced) -> None:
    events = [event for event in synced if event[0].is_relative_to(store)]
    for chain in (0, 1):
        records = [
            (place, json.loads(text)["attributes"])
            for place, (path, _, text) in enumerate(events)
            if path == store / "chains" / str(chain) / "zarr.json"
        ]
        done = next(place for place, record in records if record["state"] == "done")
        losses = [
            place
            for place, (path, _, _) in enumerate(events)
            if path.is_relative_to(store / "loss_first" / "c" / str(chain)) and path.is_file()
        ]
        assert losses
        assert max(losses) < done
        named = [(place, record["checkpoint"]) for place, record in records if record["checkpoint"]]
        assert [slot for _, slot in named] == ["checkpoint_a", "checkpoint_b"]
        for place, slot in named:
            before = [path for path, _, _ in events[:place]]
            assert store / "chains" / str(chain) / slot / "weights" / "zarr.json" in before


def test_a_record_and_its_new_name_are_on_the_disk(
    tmp_path: Path, synced: Synced, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_group(tmp_path / "0", {"state": "running"})
    really, moved = Path.replace, list[int]()

    def replace(self: Path, target: Path) -> Path:
        moved.append(len(synced))
        return really(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    replace_attributes(tmp_path / "0", {"state": "done"})
    (place,) = moved
    assert tmp_path / "0" / "zarr.json" in [path for path, _, _ in synced[:place]]
    assert tmp_path / "0" in [path for path, _, _ in synced[place:]]
    assert read_attributes(tmp_path / "0") == {"state": "done"}


def test_a_harvests_record_follows_the_sums_that_it_names(tmp_path: Path, synced: Synced) -> None:
    path = tmp_path / "s.zarr"
    once = random_sums(np.random.default_rng(0))
    with new_writer(path) as writer:
        for batches in (1, 2):
            writer.save(*once, tokens=10 * batches, batches_done=batches)
            generation = path / f"generation-{batches}"
            record = next(
                place
                for place, (file, _, text) in enumerate(synced)
                if file == path / "zarr.json" and generation.name in text
            )
            require_synced([generation, *generation.rglob("*")], synced[:record])
        writer.finish()


def test_a_quota_that_is_full_leaves_the_state_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Network file systems say so only when a file is synced."""

    def full(directory: Path) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    once = random_sums(np.random.default_rng(0))
    with new_writer(tmp_path / "s.zarr") as writer:
        writer.save(*once, tokens=10, batches_done=1)
        before = sorted(tmp_path.rglob("*"))
        monkeypatch.setattr("basinscope.io.attributions.settle_tree", full)
        with pytest.raises(OSError, match="quota"):
            writer.save(*once, tokens=20, batches_done=2)
        assert sorted(tmp_path.rglob("*")) == before
        assert writer.batches_done == 1


@pytest.mark.parametrize("made", ["new", "merged"])
def test_attributions_are_on_the_disk_before_they_appear(
    made: str, tmp_path: Path, synced: Synced, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [random_store(tmp_path / f"{r}.zarr", r, rank=r, world_size=2) for r in range(2)]
    path, really, appeared = tmp_path / "out" / "s.zarr", Path.rename, list[int]()

    def rename(self: Path, target: Path) -> Path:
        appeared.append(len(synced))
        return really(self, target)

    synced.clear()
    monkeypatch.setattr(Path, "rename", rename)
    if made == "new":
        new_writer(path).close()
    else:
        merge_attributions(parts, path)
    (moved,) = appeared
    require_synced([path, *path.rglob("*")], synced[:moved])
    assert path.parent in [file for file, _, _ in synced[moved:]]


def test_blocks_of_a_result_are_on_the_disk_before_they_count(
    tmp_path: Path, synced: Synced, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, really, blocks = tmp_path / "r.zarr", Path.replace, list[Path]()

    def replace(self: Path, target: Path) -> Path:
        if target.is_relative_to(path):  # and no part of the draft, which zarr writes
            assert synced[-2][:2] == (target, self.stat().st_mtime_ns)
            blocks.append(target)
        return really(self, target)

    with monkeypatch.context() as patch, dask.config.set(scheduler="synchronous"):
        patch.setattr(Path, "replace", replace)
        with pytest.raises(PowerCutError):
            write_result(lazy_result(stop_after=6), path, SETTINGS)
    assert 0 < len(blocks) < BLOCKS
    assert sorted(blocks) == sorted(block_files(path))
    write_result(lazy_result(), path, SETTINGS)
    record = next(
        place
        for place, (file, _, text) in enumerate(synced)
        if file == path / "zarr.json" and '"completed"' in text
    )
    require_synced({path, *path.rglob("*")} - {path / "zarr.json"}, synced[:record])


def require_synced(paths: Iterable[Path], synced: Synced) -> None:
    """Require that files were synced as they are now, and directories at all."""
    changed = {path: when for path, when, _ in synced}
    for path in paths:
        assert path in changed, path
        assert path.is_dir() or path.stat().st_mtime_ns == changed[path], path


def test_files_of_a_region(tmp_path: Path) -> None:
    array = zarr.create_array(
        tmp_path / "values", shape=(2, 10, 3), shards=(1, 4, 3), chunks=(1, 2, 3), dtype="f4"
    )
    array[0] = 1.0
    array[1, 4:] = np.ones((6, 3))

    def names(region: object) -> list[str]:
        return [
            str(file.relative_to(tmp_path / "values"))
            for file in written_files(tmp_path / "values", array, region)
        ]

    assert names((0, slice(0, 5))) == ["c/0/0/0", "c/0/1/0"]
    assert names((0, slice(8, 10))) == ["c/0/2/0"]
    assert names(1) == ["c/1/1/0", "c/1/2/0"]  # its first rows were never written
    assert len(names(slice(None))) == 5
    scalar = zarr.create_array(tmp_path / "one", shape=(), dtype="f8")
    scalar[()] = 2.0
    assert list(written_files(tmp_path / "one", scalar, ())) == [tmp_path / "one" / "c"]


def test_settling_reaches_files_and_directories(tmp_path: Path, synced: Synced) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("a/b/one", "a/two"):
        (tmp_path / name).write_text("x")
    settle(tmp_path / "a" / "two")
    assert [path for path, _, _ in synced] == [tmp_path / "a" / "two", tmp_path / "a"]
    synced.clear()
    settle_tree(tmp_path / "a")
    assert {path for path, _, _ in synced} == {
        tmp_path / "a" / "b" / "one", tmp_path / "a" / "two", tmp_path / "a", tmp_path / "a" / "b",
    }  # fmt: skip
