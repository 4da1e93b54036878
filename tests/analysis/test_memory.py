"""Sizes of memory: what a person may write."""

from __future__ import annotations

import pytest

from basinscope.analysis.memory import parse_memory_limit


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (1000, 1000),
        ("512MB", 512 * 10**6),
        ("2 GiB", 2 * 2**30),
        ("100", 100),
        (2.5e9, 2_500_000_000),
    ],
)
def test_sizes_are_read(given: int | str, found: int) -> None:
    assert parse_memory_limit(given) == found


@pytest.mark.parametrize(
    "given", ["much", "", "12 parsecs", True, 0, -5, "-1GB", [1], float("nan")]
)
def test_what_is_no_size_is_refused(given: object) -> None:
    with pytest.raises(ValueError, match="memory_limit"):
        parse_memory_limit(given)  # type: ignore[arg-type]


def test_by_default_half_of_what_is_free_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("basinscope.analysis.memory.free_memory", lambda: 1001)
    assert parse_memory_limit(None) == 500
