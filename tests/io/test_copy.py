"""Temporary copies: the same bits, for as long as their maker needs them, where there is room."""

from __future__ import annotations

import gc
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import dask
import numpy as np
import pytest

from basinscope.io import copy as copy_module
from basinscope.io.copy import TemporaryCopy
from basinscope.io.stored import DamagedStoreError


@pytest.fixture
def spill(tmp_path: Path) -> Path:
    """The directory for copies, empty."""
    (tmp_path / "spill").mkdir()
    return tmp_path / "spill"


@pytest.fixture(autouse=True)
def _spilling(spill: Path) -> Iterator[None]:
    with dask.config.set({"temporary-directory": str(spill)}):
        yield


@pytest.mark.parametrize("chunk_bytes", [1, 200, 2**19])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_every_bit_comes_back(
    dtype: str, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copy_module, "CHUNK_BYTES", chunk_bytes)
    bits = np.random.default_rng(0).integers(0, 256, (2, 5 * 7 * 3 * np.dtype(dtype).itemsize))
    copy = TemporaryCopy(1000)
    written = [row.astype(np.uint8).view(dtype).reshape(1, 5, 7, 3) for row in bits]
    for name, losses in zip("ab", written, strict=True):
        copy.write(name, losses)
    for name, losses in zip("ab", written, strict=True):
        opened = copy.open(name)
        assert np.asarray(opened).tobytes() == losses.tobytes()
        part = opened.part(slice(None), slice(2, 4), slice(3, 6))
        assert np.asarray(part).tobytes() == losses[:, 2:4, 3:6].tobytes()


def test_a_few_sequences_are_read_without_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy_module, "CHUNK_BYTES", 2 * 50 * 3 * 4)
    copy = TemporaryCopy(1000)
    copy.write("a", np.ones((1, 50, 7, 3), np.float32))
    assert copy.open("a").chunk_shape == (1, 50, 2, 3)


def test_a_copy_takes_about_the_room_that_its_losses_take() -> None:
    copy = TemporaryCopy(1000)
    losses = np.ones((1, 50, 21, 127), np.float32)  # 20 sequences make a chunk
    copy.write("a", losses)
    size = sum(file.stat().st_size for file in Path(copy.path).rglob("*") if file.is_file())
    assert losses.nbytes <= size <= 1.1 * losses.nbytes


def test_a_lost_file_is_an_error_never_nan() -> None:
    copy = TemporaryCopy(1000)
    copy.write("a", np.ones((1, 2, 3, 4), np.float32))
    shutil.rmtree(Path(copy.path) / "a" / "c")
    with pytest.raises(DamagedStoreError, match="lacks chunk"):
        np.asarray(copy.open("a"))


def test_the_directory_lies_where_dask_spills_and_goes_with_its_maker(spill: Path) -> None:
    first, second = TemporaryCopy(1), TemporaryCopy(1)
    first.write("a", np.ones((1, 2, 3, 4), np.float32))
    assert {str(entry) for entry in spill.iterdir()} == {first.path, second.path}
    del first
    gc.collect()
    assert [str(entry) for entry in spill.iterdir()] == [second.path]


def test_the_system_says_where_if_dask_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copy_module.tempfile, "gettempdir", lambda: str(tmp_path))
    with dask.config.set({"temporary-directory": None}):
        assert Path(TemporaryCopy(1).path).parent == tmp_path


def test_a_process_that_ends_leaves_nothing(spill: Path) -> None:
    code = (
        "import sys, dask; from basinscope.io.copy import TemporaryCopy\n"
        "dask.config.set({'temporary-directory': sys.argv[1]})\n"
        "kept = TemporaryCopy(1); print(kept.path); raise SystemExit(3)"
    )
    command = [sys.executable, "-c", code, str(spill)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    assert (done.returncode, Path(done.stdout.strip()).parent) == (3, spill)
    assert list(spill.iterdir()) == []


def test_other_processes_read_and_write_but_never_remove(spill: Path) -> None:
    copy = TemporaryCopy(1)
    elsewhere = pickle.loads(pickle.dumps(copy))
    elsewhere.write("a", losses := np.ones((1, 2, 3, 4), np.float32))
    further = pickle.loads(pickle.dumps(elsewhere))
    np.testing.assert_array_equal(np.asarray(further.open("a")), losses)
    del elsewhere, further
    gc.collect()
    np.testing.assert_array_equal(np.asarray(copy.open("a")), losses)
    del copy
    gc.collect()
    assert list(spill.iterdir()) == []


def test_too_little_room_is_said_with_where_and_what_to_do(
    spill: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def usage(path: object) -> SimpleNamespace:
        asked.append(path)
        return SimpleNamespace(free=12345)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    said = rf"takes 12,346 bytes and {spill} has 12,345: choose .*'temporary-directory'"
    with pytest.raises(OSError, match=said):
        TemporaryCopy(12346)
    assert asked == [str(spill)]
    assert list(spill.iterdir()) == []
    assert Path(TemporaryCopy(12345).path).parent == spill
