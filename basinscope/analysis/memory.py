"""How much memory an analysis may take."""

from __future__ import annotations

import numbers

from dask.utils import parse_bytes

from basinscope.io.memory import free_memory


def parse_memory_limit(limit: int | str | None) -> int:
    """Turn a limit into bytes; None is half of what is free now.

    Parameters
    ----------
    limit : int, str or None
        Bytes, or a string such as "512MB" or "2GiB".

    Raises
    ------
    ValueError
        If it is no size, or not positive.
    """
    if limit is None:
        return free_memory() // 2
    try:
        if isinstance(limit, bool) or not isinstance(limit, (numbers.Real, str)):
            raise TypeError(type(limit).__name__)
        if isinstance(limit, str) and not any(letter.isdigit() for letter in limit):
            raise ValueError("no digit")  # dask takes "MB" for one of them
        found = int(parse_bytes(limit) if isinstance(limit, str) else limit)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(
            f"memory_limit={limit!r} is no size: give bytes, or such as '512MB' or '2GiB'"
        ) from error
    if found <= 0:
        raise ValueError(f"memory_limit={limit!r} leaves no memory: give a positive size")
    return found
