"""How functions are compiled by numba: what may be relaxed, and numba's own cache of results."""

from __future__ import annotations

from typing import Any

# Products may be contracted with sums, and long sums reordered to vectorise; nothing else is
# relaxed: NaN and infinity keep their meaning, and so do differences that are taken for accuracy.
OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}
SUMMING: dict[str, Any] = {**OPTIONS, "fastmath": {"contract", "reassoc", "nsz"}}


def jit(function: Any) -> Any:
    """Compile with an on-disk cache, or without one where no directory can hold it."""
    return _cached(function, OPTIONS)


def jit_sum(function: Any) -> Any:
    """Compile as :func:`jit` does, where sums may be taken in any order."""
    return _cached(function, SUMMING)


def _cached(function: Any, options: dict[str, Any]) -> Any:
    import numba

    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:
        return numba.njit(**options)(function)
