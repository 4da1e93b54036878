"""Positions as they are written in a shell; as they are resolved, see test_extraction."""

from __future__ import annotations

from typing import Any

import pytest

from basinscope.models.positions import described, parse_positions, resolve_positions


@pytest.mark.parametrize(
    ("text", "expected"),
    [("all", [0, 1, 2, 3]), ("last", [3]), ("1", [1]), ("0,-1", [0, 3]), ("1:,0", [1, 2, 3, 0])],
)
def test_what_is_written_in_a_shell(text: str, expected: list[int]) -> None:
    assert resolve_positions(parse_positions(text), 4) == expected


@pytest.mark.parametrize("text", ["first", "1,", "1:2:3:4", "a:b", ""])
def test_what_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="all, last, or such as 0,5,-1 or 2:8"):
        parse_positions(text)


@pytest.mark.parametrize("position", [True, False, 1.0, None])
def test_what_is_no_number_is_no_position(position: Any) -> None:
    with pytest.raises(ValueError, match=f"position {position}: it can be a number"):
        resolve_positions([position], 4)


def test_positions_are_written_down_as_json_holds_them() -> None:
    assert described([1, "last", slice(2, None)]) == [1, "last", [2, None, None]]
    assert described("all") == "all"
