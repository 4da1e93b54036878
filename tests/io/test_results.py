"""Results that are written block by block: whole, continued, never mixed, never silently wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
import xarray as xr
import zarr

from basinscope.io import results
from basinscope.io.locks import lock_directory
from basinscope.io.results import (
    ResultLockedError,
    begun_chunks,
    digest,
    progress_bar,
    write_result,
)
from basinscope.io.store import StoreMismatchError

SETTINGS = {"kind": "test", "options": {"covariance": False, "rows": [1, 2]}}
ARRAYS = ("even", "sub/numbers")  # whose blocks are counted
BLOCKS = 4 + 6


@pytest.fixture(autouse=True)
def _one_by_one() -> Iterator[None]:
    with dask.config.set(scheduler="synchronous"):
        yield


def test_what_is_written_is_the_result(tmp_path: Path) -> None:
    numbers = np.arange(40.0).reshape(8, 5)
    result = lazy_result()
    result.dataset = result.dataset.assign(
        uneven=(("x", "y"), da.from_array(-numbers, chunks=((1, 3, 2, 1, 1), (2, 3)))),
        growing=(("y", "x"), da.from_array(numbers.T.astype("int16"), chunks=((2, 3), (3, 5)))),
        small=("x", np.arange(8), {"long_name": "in memory"}),
    ).assign_coords(x=np.arange(8) * 3, y=list("abcde"), z=("x", np.linspace(0, 1, 8)))
    expected = result.compute()
    path = tmp_path / "deep" / "r.zarr"
    written = write_result(result, path, SETTINGS)
    assert all(written[name].chunks for name in ("uneven", "growing", *ARRAYS))
    with xr.open_datatree(path, engine="zarr", consolidated=False) as plain:
        for tree in (written, plain):
            for node in expected.subtree:
                found = tree[node.path].to_dataset()
                xr.testing.assert_equal(found, node.to_dataset())
                for name, variable in node.data_vars.items():
                    assert found[name].dtype == variable.dtype
                    assert variable.attrs.items() <= found[name].attrs.items()
                assert node.attrs.items() <= found.attrs.items()
        assert plain.attrs["settings"] == SETTINGS
        assert plain.attrs["completed"] == 1


def test_a_lazy_number_is_written_too(tmp_path: Path) -> None:
    result = xr.DataTree(xr.Dataset({"mean": ((), da.ones(4, chunks=2).mean() + 1)}))
    assert float(write_result(result, tmp_path / "r.zarr", SETTINGS)["mean"]) == 2


@pytest.mark.parametrize("after", [0, 3, BLOCKS - 1])
def test_a_stopped_result_is_continued_with_what_is_missing(after: int, tmp_path: Path) -> None:
    path = tmp_path / "r.zarr"
    with pytest.raises(PowerCutError):
        write_result(lazy_result(stop_after=after), path, SETTINGS)
    there = len(block_files(path))
    assert min(after, 1) <= there <= after
    assert "completed" not in zarr.open_group(path, mode="r").attrs
    calls: list[Any] = []
    written = write_result(lazy_result(calls), path, SETTINGS)
    assert len(calls) == BLOCKS - there
    require_numbers(written)
    write_result(lazy_result(calls), path, SETTINGS)
    assert len(calls) == BLOCKS - there
    assert zarr.open_group(path, mode="r").attrs["completed"] == 1


@pytest.mark.parametrize("chunks", [{"x": 2}, {"x": 8}, {"x": 3, "y": 4}, {"x": (1, 7)}])
def test_a_stopped_result_is_continued_in_other_blocks(
    chunks: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(PowerCutError):
        write_result(lazy_result(stop_after=6), tmp_path / "r.zarr", SETTINGS)
    result = lazy_result()
    result["even"] = result["even"].chunk(chunks)
    result["sub/numbers"] = result["sub/numbers"].chunk({"rank": 1})
    require_numbers(write_result(result, tmp_path / "r.zarr", SETTINGS))


def test_a_block_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(self: Path, target: Any) -> None:
        raise OSError(28, "no space left on device")

    with pytest.raises(PowerCutError):
        write_result(lazy_result(stop_after=5), tmp_path / "r.zarr", SETTINGS)
    there = block_files(tmp_path / "r.zarr")
    monkeypatch.setattr(Path, "replace", no_space)
    with pytest.raises(OSError, match="no space"):
        write_result(lazy_result(), tmp_path / "r.zarr", SETTINGS)
    monkeypatch.undo()
    assert block_files(tmp_path / "r.zarr") == there
    require_numbers(write_result(lazy_result(), tmp_path / "r.zarr", SETTINGS))


@pytest.mark.parametrize("left", [0.0, 0.5], ids=["empty", "half"])
def test_a_block_that_a_power_cut_left_in_part_is_computed_anew(
    left: float, tmp_path: Path
) -> None:
    path, calls = tmp_path / "r.zarr", list[Any]()
    with pytest.raises(PowerCutError):
        write_result(lazy_result(stop_after=BLOCKS - 1), path, SETTINGS)
    there = block_files(path)
    damaged = [there[0], there[-1]]
    assert {file.relative_to(path).parts[0] for file in damaged} == {"even", "sub"}
    for file in damaged:
        os.truncate(file, int(left * file.stat().st_size))
    require_numbers(write_result(lazy_result(calls), path, SETTINGS))
    assert len(calls) == BLOCKS - len(there) + len(damaged)


def test_a_crash_before_the_first_block_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to_zarr = xr.DataTree.to_zarr

    def crash(*args: Any, **options: Any) -> None:
        to_zarr(*args, **options)
        raise PowerCutError

    monkeypatch.setattr(xr.DataTree, "to_zarr", crash)
    with pytest.raises(PowerCutError):
        write_result(lazy_result(), tmp_path / "r.zarr", SETTINGS)
    assert list(tmp_path.iterdir()) == []


def test_what_appears_at_the_path_is_all_there_but_the_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, rename, moved_from = tmp_path / "r.zarr", Path.rename, []

    def spy(self: Path, target: Path) -> Path:
        assert not path.exists()
        moved_from.append(self.parent)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", spy)
    with pytest.raises(PowerCutError):
        write_result(lazy_result(stop_after=0), path, SETTINGS)
    assert moved_from == [tmp_path]  # a move within one file system is one step
    assert [entry.name for entry in tmp_path.iterdir()] == ["r.zarr"]
    with xr.open_datatree(path, engine="zarr", consolidated=False) as tree:
        assert tree.attrs["settings"] == SETTINGS
        assert tree["sub"]["sign"].values.tolist() == ["positive", "negative", "none"]
        assert np.isnan(tree["even"]).all()


@pytest.mark.parametrize("settings", [SETTINGS, {"kind": "other"}])
def test_a_process_that_loses_a_race_takes_the_winners_result_if_it_is_the_same(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, to_zarr, calls = tmp_path / "r.zarr", xr.DataTree.to_zarr, list[Any]()

    def slow(*args: Any, **options: Any) -> None:
        monkeypatch.undo()
        write_result(lazy_result(), path, SETTINGS)  # as another process meanwhile
        to_zarr(*args, **options)

    monkeypatch.setattr(xr.DataTree, "to_zarr", slow)
    if settings == SETTINGS:
        require_numbers(write_result(lazy_result(calls), path, settings))
    else:
        with pytest.raises(StoreMismatchError, match="kind: the store has 'test', this call has"):
            write_result(lazy_result(calls), path, settings)
    assert calls == []
    assert [entry.name for entry in tmp_path.iterdir()] == ["r.zarr"]


def test_a_result_that_appears_before_the_first_look_is_compared_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, storable, calls = tmp_path / "r.zarr", results._storable, list[Any]()

    def slow(dataset: xr.Dataset) -> xr.Dataset:
        monkeypatch.undo()
        write_result(lazy_result(), path, SETTINGS)  # as another process meanwhile
        return storable(dataset)

    monkeypatch.setattr(results, "_storable", slow)
    with pytest.raises(StoreMismatchError, match="kind: the store has 'test', this call has"):
        write_result(lazy_result(calls), path, {"kind": "other"})
    assert calls == []


def test_a_result_that_another_process_computes_is_left_to_it(tmp_path: Path) -> None:
    path = tmp_path / "r.zarr"
    code = f"""
import time
from pathlib import Path
import dask
from basinscope.io import results
from tests.io.test_results import SETTINGS, lazy_result
def slow(values, chunks):
    yield b"half a block"
    print("writing", flush=True)
    time.sleep(60)
results._padded_rows = slow
dask.config.set(scheduler="synchronous")
results.write_result(lazy_result(), Path({str(path)!r}), SETTINGS)
"""
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "writing\n"
        before, calls = set(contents(path)), list[Any]()
        with pytest.raises(ResultLockedError, match=rf"{path} is being computed.*wait for it"):
            write_result(lazy_result(calls), path, SETTINGS)
        assert any(file.suffix == ".partial" for file in before)
        assert (before <= set(contents(path)), calls) == (True, [])
    finally:
        holder.kill()
        holder.communicate()
    require_numbers(write_result(lazy_result(), path, SETTINGS))
    assert not list(path.rglob("*.partial"))


def test_a_finished_result_is_read_whoever_holds_it(tmp_path: Path) -> None:
    path = tmp_path / "r.zarr"
    write_result(lazy_result(), path, SETTINGS)
    descriptor = lock_directory(path, AssertionError("it was not let go of"))
    try:
        require_numbers(write_result(lazy_result(), path, SETTINGS))
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("stopped", [True, False])
def test_other_settings_are_refused_field_by_field(stopped: bool, tmp_path: Path) -> None:
    path = tmp_path / "r.zarr"
    if stopped:
        with pytest.raises(PowerCutError):
            write_result(lazy_result(stop_after=2), path, SETTINGS)
    else:
        write_result(lazy_result(), path, SETTINGS)
    before, calls = contents(path), list[Any]()
    other = {"kind": "test", "options": {"covariance": True, "rows": [1, 2], "top": 3}}
    with pytest.raises(StoreMismatchError) as caught:
        write_result(lazy_result(calls), path, other)
    message = str(caught.value)
    assert "options.covariance: the store has False, this call has True" in message
    assert "options.top: the store has 'nothing', this call has 3" in message
    assert "rows" not in message
    assert "kind" not in message
    assert str(path) in message
    assert (contents(path), calls) == (before, [])


@pytest.mark.parametrize("kind", ["file", "empty directory", "directory", "group", "v2 group"])
def test_a_path_that_holds_something_else_is_refused_and_untouched(
    kind: str, tmp_path: Path
) -> None:
    path = tmp_path / "r.zarr"
    if kind == "file":
        path.write_text("mine")
    elif "group" in kind:
        group = zarr.open_group(path, mode="w", zarr_format=2 if kind == "v2 group" else 3)
        group.create_array("even", data=np.ones(3), chunks=(2,))
    else:
        path.mkdir()
        if kind == "directory":
            (path / "notes").write_text("mine")
    before, calls = contents(tmp_path), list[Any]()
    with pytest.raises(ValueError, match=r"r\.zarr exists and is no result.*choose another"):
        write_result(lazy_result(calls), path, SETTINGS)
    assert (contents(tmp_path), calls) == (before, [])


def test_nothing_is_computed_for_a_path_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    calls = list[Any]()
    with pytest.raises(NotADirectoryError, match="file is no directory: choose another path"):
        write_result(lazy_result(calls), tmp_path / "file" / "r.zarr", SETTINGS)
    assert not calls


def test_a_begun_result_is_found_in_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_result(lazy_result(), tmp_path / "r.zarr", SETTINGS)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert begun_chunks("~/r.zarr", "even") == (4, 3)


@pytest.mark.parametrize("name", [*ARRAYS, "x", "sub/sign", "sub/few"])
def test_a_flipped_bit_of_a_chunk_is_an_error_in_plain_xarray(name: str, tmp_path: Path) -> None:
    path = tmp_path / "r.zarr"
    write_result(lazy_result(), path, SETTINGS)
    random, unnoticed = np.random.default_rng(0), set()
    files = chunk_files(path / name)
    assert files
    for file in files:
        good = file.read_bytes()
        for place in range(0, len(good), 5):
            bad = bytearray(good)
            bad[place] ^= 1 << int(random.integers(8))
            file.write_bytes(bad)
            try:
                xr.open_datatree(path, engine="zarr", consolidated=False)[name].load()
            except (ValueError, RuntimeError):
                continue
            unnoticed.add((file.name, place))
        file.write_bytes(good)
    assert unnoticed == set()
    require_numbers(xr.open_datatree(path, engine="zarr", consolidated=False))


def test_no_progress_is_shown_where_stderr_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    with progress_bar():
        pass


def test_a_digest_names_an_array_by_all_that_it_is() -> None:
    rows = np.array([1, 2, 3, 4])
    same = [rows.copy(), np.array([1, 0, 2, 0, 3, 0, 4, 0])[::2]]
    other = [rows[::-1], rows.reshape(2, 2), rows.astype("int32"), rows[:3], rows + 1]
    assert {digest(array) for array in same} == {digest(rows)}
    assert len({digest(array) for array in [rows, *other]}) == 1 + len(other)


class PowerCutError(Exception):
    """What stops a computation in a test."""


def lazy_result(calls: list[Any] | None = None, stop_after: int | None = None) -> xr.DataTree:
    """Make a result that notes every block it computes, and stops before one too many."""
    seen: list[Any] = [] if calls is None else calls

    def block(values: np.ndarray) -> np.ndarray:
        if len(seen) == stop_after:
            raise PowerCutError
        seen.append(values.shape)
        return values

    def blocks(values: np.ndarray, chunks: tuple[int, int]) -> da.Array:
        nothing = np.empty((0, 0), values.dtype)
        return da.from_array(values, chunks=chunks).map_blocks(block, meta=nothing)

    numbers = np.arange(40.0).reshape(8, 5)
    root = xr.Dataset(
        {"even": (("x", "y"), blocks(numbers.astype("float32"), (4, 3)), {"units": "1"})},
        coords={"x": np.arange(8) * 3},
        attrs={"made_by": "test"},
    )
    sub = xr.Dataset(
        {
            "numbers": (("sign", "rank"), blocks(np.arange(12).reshape(3, 4), (1, 2))),
            "few": ("rank", np.arange(4)),
        },
        coords={"sign": ["positive", "negative", "none"]},
        attrs={"named": [1, 2]},
    )
    return xr.DataTree.from_dict({"/": root, "/sub": sub})


def require_numbers(tree: xr.DataTree) -> None:
    expected = lazy_result()
    for name in (*ARRAYS, "sub/few"):
        np.testing.assert_array_equal(tree[name], expected[name], err_msg=name)


def chunk_files(path: Path) -> list[Path]:
    return sorted(f for f in path.rglob("*") if f.is_file() and f.name != "zarr.json")


def block_files(path: Path) -> list[Path]:
    return [file for name in ARRAYS for file in chunk_files(path / name)]


def contents(path: Path) -> dict[Path, bytes | None]:
    return {f: f.read_bytes() if f.is_file() else None for f in path.rglob("*")}
