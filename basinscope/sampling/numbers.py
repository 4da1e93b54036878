"""Lists of numbers as they are written in a shell: one grammar for every option that takes some."""

from __future__ import annotations

from typing import Literal

GRAMMAR = "all, or numbers such as 0,4:8 (0 and 4 to 7)"


def parse_numbers(option: str, text: str) -> list[int] | Literal["all"]:
    """Read "all", or numbers and ranges: each number once, in the order of asking.

    Parameters
    ----------
    option : str
        What to call it where the text is wrong.
    text : str

    Raises
    ------
    ValueError
        If it is something else, or names no number.

    Examples
    --------
    >>> parse_numbers("--layers", "0,4:8"), parse_numbers("--layers", "all")
    ([0, 4, 5, 6, 7], 'all')
    """
    if text == "all":
        return "all"
    found: list[int] = []
    try:
        for part in text.split(","):
            first, colon, end = part.partition(":")
            found += range(int(first), int(end)) if colon else [int(first)]
    except ValueError:
        found = []
    if not found:
        raise ValueError(f"{option} {text!r}: give {GRAMMAR}")
    return list(dict.fromkeys(found))
