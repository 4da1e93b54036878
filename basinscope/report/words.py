"""Tokens as text in tables."""

from __future__ import annotations

from collections.abc import Callable

Words = Callable[[int], str]  # from a token id to its text


def quoted(word: str) -> str:
    """Give a word with its spaces to be seen, at most eight characters of it."""
    shown = printable(word).replace(" ", "·")
    return shown if len(shown) <= 8 else f"{shown[:7]}…"


def printable(word: str, besides: str = "") -> str:
    """Give a word with names for what cannot be printed, such as \\n; some may be kept."""
    return "".join(c if c.isprintable() or c in besides else repr(c)[1:-1] for c in word)
