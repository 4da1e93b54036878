"""Where a store is: paths of this machine, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import xarray as xr

from basinscope.io.location import local_path, made_at_once, require_place


def test_paths_are_paths_and_homes_are_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert local_path("~/a.zarr") == Path("/home/someone/a.zarr")
    assert local_path("/runs/a:b.zarr") == Path("/runs/a:b.zarr")


def test_a_relative_path_is_of_the_directory_that_was_the_working_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert local_path(Path("runs") / "s.zarr") == tmp_path / "runs" / "s.zarr"
    assert local_path("s.zarr", start=Path("runs")) == tmp_path / "runs" / "s.zarr"
    assert local_path("/s.zarr", start=Path("runs")) == Path("/s.zarr")


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ("s3://bucket/x.zarr", ValueError, "is a URL"),
        (Path("file:///tmp/x.zarr"), ValueError, "is a URL"),
        ("", ValueError, "is empty"),
        (b"x.zarr", TypeError, "got bytes"),
        (None, TypeError, "got NoneType"),
        ({"a": 1}, TypeError, "got dict"),
        (xr.DataTree(), TypeError, r"path of a store, a str or a pathlib\.Path; got DataTree$"),
    ],
)
def test_what_is_no_path_is_refused(given: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        local_path(given)


def test_what_the_path_is_of_is_named() -> None:
    with pytest.raises(TypeError, match="expected the path of a page, a str"):
        local_path(3, "a page")  # type: ignore[arg-type]


def test_nothing_can_be_made_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for below in ("file/a.zarr", "file/runs/a.zarr"):
        with pytest.raises(
            NotADirectoryError, match=r"a\.zarr cannot be made, as .*file is no dir"
        ):
            require_place(tmp_path / below)
    for fine in ("file", "new/runs/a.zarr"):
        require_place(tmp_path / fine)
    require_place(Path("a.zarr"))


@pytest.mark.parametrize("there", [True, False])
def test_a_symbolic_link_stays_and_what_it_points_to_is_made(there: bool, tmp_path: Path) -> None:
    link, place = tmp_path / "link", tmp_path / "scratch" / "s.zarr"
    link.symlink_to(place)
    if there:
        place.mkdir(parents=True)
    with made_at_once(link) as draft:
        draft.mkdir()
        (draft / "file").touch()
    assert link.is_symlink()
    assert [file.name for file in place.iterdir()] == ["file"]
    assert list(place.parent.iterdir()) == [place]
