"""Where a store is: paths of this machine, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from basinscope.io.location import local_path


def test_paths_are_paths_and_homes_are_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert local_path("~/a.zarr") == Path("/home/someone/a.zarr")
    assert local_path(Path("runs") / "a:b.zarr") == Path("runs/a:b.zarr")


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ("s3://bucket/x.zarr", ValueError, "is a URL"),
        (Path("file:///tmp/x.zarr"), ValueError, "is a URL"),
        ("", ValueError, "is empty"),
        (b"x.zarr", TypeError, "got bytes"),
        (None, TypeError, "got NoneType"),
        ({"a": 1}, TypeError, "got dict"),
    ],
)
def test_what_is_no_path_is_refused(given: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        local_path(given)
