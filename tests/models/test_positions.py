"""Positions as they are written in a shell; as they are resolved, see test_extraction."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from basinscope.models.positions import (
    Positions,
    Span,
    described,
    has_no_end,
    parse_positions,
    resolve_positions,
)


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


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ("all", [0, 1, 2, 3, 4, 5]),
        ("last", [3]),
        (-2, [2]),
        (slice(None, -1), [0, 1, 2]),
        (slice(None, None, -1), [3, 2, 1, 0]),
        (slice(-2, None), [2, 3, 4, 5]),
        (slice(-9, None, 3), [0, 3]),
        (slice(4, None), [4, 5]),
        (slice(6, None), []),
        ([0, slice(3, None, 2)], [0, 3, 5]),
        (np.array([0, -1]), [0, 3]),
    ],
)
def test_what_has_no_end_goes_on_over_tokens_that_follow(
    positions: Positions, expected: list[int]
) -> None:
    assert resolve_positions(positions, 4, 6) == expected
    assert Span(4, 6, 4).resolve(positions) == expected


@pytest.mark.parametrize("positions", [4, slice(4, 6), [0, slice(4, None), 5]])
def test_what_ends_is_of_the_sequence_alone(positions: Positions) -> None:
    with pytest.raises(ValueError, match=r"out of range|names no token"):
        resolve_positions(positions, 4, 6)


def test_only_all_and_slices_without_a_stop_have_no_end() -> None:
    for positions in ("all", slice(9, None), [0, slice(None, None, 2)]):
        assert has_no_end(positions)
    for other in ("last", 3, slice(0, 9), slice(None, None, -1), [0, "last"]):
        assert not has_no_end(other)


def test_what_follows_is_no_token_of_a_whole_sequence() -> None:
    with pytest.raises(ValueError, match="names no token of a sequence of 4"):
        Span.whole(4).resolve(slice(4, None))
    with pytest.raises(ValueError, match="names a token twice"):
        resolve_positions([slice(4, None), slice(5, None)], 4, 6)
