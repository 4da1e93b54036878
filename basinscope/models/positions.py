"""Which tokens of a sequence: "all", "last", a number, a slice, or a list of these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Position = str | int | slice
Positions = Position | Sequence[Position]


@dataclass(frozen=True)
class Span:
    """The tokens of a sequence that one forward pass runs, and where positions are counted in it.

    Attributes
    ----------
    start, stop : int
        From this one up to that one; those before are in a cache.
    prompt : int
        How many the sequence began with. Positions are numbers in these; what follows is generated.
    goes_on : bool
        Whether tokens may follow.
    """

    start: int
    stop: int
    prompt: int
    goes_on: bool = True

    @classmethod
    def whole(cls, length: int) -> Span:
        """Give the span of a sequence that runs at once, and that nothing follows."""
        return cls(0, length, length, goes_on=False)

    @property
    def length(self) -> int:
        """Tokens that run."""
        return self.stop - self.start

    def resolve(self, positions: Positions) -> list[int]:
        """Give the numbers of the chosen tokens among all that there are by now."""
        until = max(self.prompt, self.stop) if self.goes_on else None
        return resolve_positions(positions, self.prompt, until)


def resolve_positions(positions: Positions, length: int, until: int | None = None) -> list[int]:
    """Give the numbers of the chosen tokens, in the order of asking.

    Parameters
    ----------
    positions : "all", "last", int, slice, or a list or array of these
        Negative numbers count from the end.
    length : int
        Tokens of a sequence.
    until : int, optional
        How many there are by now, where some have followed or may. "all" and slices without a stop
        go on up to there; all else counts in the first ``length``.

    Raises
    ------
    ValueError
        If a position is no token of the sequence, is named twice, or none is named, now or later.
    """
    positions = plain(positions)
    found = [number for part in _parts(positions) for number in _resolve(part, length, until)]
    if not found and (until is None or not has_no_end(positions)):
        raise ValueError(f"positions={positions!r} names no token of a sequence of {length}")
    if len(set(found)) < len(found):
        raise ValueError(
            f"positions={positions!r} names a token twice in a sequence of {length}: {found}"
        )
    return found


def has_no_end(positions: Positions) -> bool:
    """Whether tokens that follow a sequence are chosen too: "all", or a slice without a stop."""
    for part in map(plain, _parts(plain(positions))):
        if part == "all":
            return True
        if isinstance(part, slice) and part.stop is None and (part.step is None or part.step > 0):
            return True
    return False


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


def _parts(positions: Any) -> Sequence[Any]:
    several = isinstance(positions, Sequence) and not isinstance(positions, str)
    return positions if several else [positions]


def _resolve(part: Any, length: int, until: int | None) -> Sequence[int]:
    part = plain(part)
    if until is not None and has_no_end(part):
        return _without_end(slice(None) if part == "all" else part, length, until)
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


def _without_end(part: slice, length: int, until: int) -> range:
    """Go on from where a slice starts, which counts in the sequence that the others follow."""
    start = int(part.start or 0)
    return range(max(start + length, 0) if start < 0 else start, until, int(part.step or 1))


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
