"""Lists of numbers, as every command reads them."""

from __future__ import annotations

from typing import Any

import pytest

from basinscope.sampling.numbers import parse_numbers


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("all", "all"),
        ("3", [3]),
        ("0,4:8", [0, 4, 5, 6, 7]),
        ("4, 0:2", [4, 0, 1]),
        ("1:4,2,0:2", [1, 2, 3, 0]),
    ],
)
def test_numbers_and_ranges_each_once_in_the_order_of_asking(text: str, found: Any) -> None:
    assert parse_numbers("--layers", text) == found


@pytest.mark.parametrize("text", ["", "one", "1:", ":3", "1:2:3", "0,", "0,all", "2:2", "5:2"])
def test_other_text_is_refused_with_what_is_valid(text: str) -> None:
    with pytest.raises(ValueError, match=f"^--rows-1 {text!r}: give all, or numbers such as 0,4:8"):
        parse_numbers("--rows-1", text)
