"""Which tokens of a sequence: "all", "last", a number, a slice, or a list of these."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Position = str | int | slice
Positions = Position | Sequence[Position]


def resolve_positions(positions: Positions, length: int) -> list[int]:
    """Give the numbers of the chosen tokens, in the order of asking.

    Parameters
    ----------
    positions : "all", "last", int, slice, or a list or array of these
        Negative numbers count from the end.
    length : int
        Tokens of a sequence.

    Raises
    ------
    ValueError
        If a position is no token of the sequence, is named twice, or none is named.
    """
    positions = plain(positions)
    several = isinstance(positions, Sequence) and not isinstance(positions, str)
    parts: Sequence[Any] = positions if several else [positions]  # type: ignore[assignment]
    found = [number for part in parts for number in _resolve(part, length)]
    if not found:
        raise ValueError(f"positions={positions!r} names no token of a sequence of {length}")
    if len(set(found)) < len(found):
        raise ValueError(
            f"positions={positions!r} names a token twice in a sequence of {length}: {found}"
        )
    return found


def described(positions: Positions) -> Any:
    """Give positions as JSON can hold them; a slice as [start, stop, step]."""
    positions = plain(positions)
    if isinstance(positions, slice):
        return [plain(end) for end in (positions.start, positions.stop, positions.step)]
    if isinstance(positions, Sequence) and not isinstance(positions, str):
        return [described(part) for part in positions]
    return positions


def plain(value: Any) -> Any:
    """Give what NumPy or torch wraps as Python's own numbers and lists; the rest as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def _resolve(part: Any, length: int) -> Sequence[int]:
    part = plain(part)
    if part == "all":
        return range(length)
    if part == "last":
        return [length - 1]
    if isinstance(part, slice):
        if part.step == 0:
            raise ValueError(f"position {part!r} takes no steps: its step must not be 0")
        return range(length)[part]
    if not isinstance(part, int) or isinstance(part, bool):
        raise ValueError(
            f"position {part!r}: it can be a number, a slice, 'all', 'last', or a list of these"
        )
    if not -length <= part < length:
        raise ValueError(
            f"position {part} is out of range: a sequence has {length} tokens, 0 to {length - 1} "
            f"or -{length} to -1"
        )
    return [part % length]


def parse_positions(text: str) -> Positions:
    """Read positions as they are written in a shell.

    Examples
    --------
    >>> parse_positions("last"), parse_positions("0,-1"), parse_positions("2:8")
    ('last', [0, -1], [slice(2, 8, None)])

    Raises
    ------
    ValueError
        If it is none of these.
    """
    if text in ("all", "last"):
        return text
    return [_parse(part.strip()) for part in text.split(",")]


def _parse(part: str) -> Position:
    try:
        if ":" in part:
            ends = [int(end) if end else None for end in part.split(":")]
            return slice(*ends)
        return part if part == "last" else int(part)
    except (ValueError, TypeError) as error:
        raise ValueError(f"positions {part!r}: all, last, or such as 0,5,-1 or 2:8") from error
