"""What a store's record speaks of is on the disk before the record is."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from datasets import Dataset

import basinscope
from basinscope.io.durable import settle, settle_tree, written_files

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
