"""The metadata of runs: turned into JSON, and compared with what a query asks for."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from basinscope.io.activation_index import Run
from basinscope.io.activation_runs import TIME_FOLDER

MOST_VALUES = 10_000  # of an array that is metadata
Filter = Callable[[Run], bool]


def plain(value: Any, name: str) -> Any:
    """Turn a field of metadata into what JSON gives back.

    Raises
    ------
    TypeError
        If it is not JSON, a slice, a dataclass, or an object with ``to_dict()``.
    """
    try:
        return json.loads(json.dumps(value, default=_plainer))
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} is metadata, which is stored as JSON: {error}") from error


def _plainer(value: Any) -> Any:
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if hasattr(value, "tolist"):
        if math.prod(value.shape) > MOST_VALUES:
            raise TypeError(f"an array of {value.shape} belongs to the activations")
        return value.tolist()
    if isinstance(value, slice):  # as an extraction describes its positions
        return [value.start, value.stop, value.step]
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{type(value).__name__} is not JSON")


def name_of_model(model: Any) -> str:
    """Name a model: as it was loaded, or else by its class."""
    return model if isinstance(model, str) else _loaded_as(model) or type(model).__name__


def _loaded_as(model: Any) -> str | None:
    config, hooked = getattr(model, "config", None), getattr(model, "cfg", None)
    for owner, attribute in (
        (model, "name_or_path"),
        (config, "name_or_path"),
        (hooked, "model_name"),
    ):
        found = getattr(owner, attribute, None)
        if isinstance(found, str) and found:
            return found
    return None


def field_filter(name: str, wanted: Any) -> Filter:
    """Compare a field; a function is not asked about a run that lacks it."""
    if callable(wanted):
        return lambda run: name in run.metadata and bool(wanted(run.metadata[name]))
    value = plain(wanted, name)
    return lambda run: bool(run.metadata.get(name) == value)


def model_filter(wanted: Any) -> Filter:
    """Compare the model's name, or that of its directory; a model, which one can call, is named."""
    is_model = _loaded_as(wanted) is not None or hasattr(wanted, "named_parameters")
    if callable(wanted) and not is_model:
        return lambda run: bool(wanted(run.metadata.get("model_name", run.model_dir.name)))
    name = name_of_model(wanted)
    return lambda run: name in (run.metadata.get("model_name"), run.model_dir.name)


def time_filter(wanted: Any) -> Filter:
    """Compare the time, or look whether it lies in a range."""
    if callable(wanted):
        return lambda run: bool(wanted(run.metadata.get("save_time", run.time)))
    pair = wanted if isinstance(wanted, tuple | list) else (wanted, wanted)
    if len(pair) != 2:
        raise ValueError(f"save_time is a time or a pair (from, until): got {wanted!r}")
    first, last = (None if end is None else in_utc(end) for end in pair)

    def fits(run: Run) -> bool:
        try:
            moment = in_utc(run.metadata.get("save_time", run.time))
        except ValueError:  # a directory of another name
            return False
        return (first is None or first <= moment) and (last is None or moment <= last)

    return fits


def in_utc(time: str | datetime) -> datetime:
    """Read a time; without a zone, it is UTC."""
    found = _parsed(time) if isinstance(time, str) else time
    return found.astimezone(UTC) if found.tzinfo else found.replace(tzinfo=UTC)


def _parsed(time: str) -> datetime:
    try:
        return datetime.fromisoformat(time)
    except ValueError:
        pass
    try:
        return datetime.strptime(time, TIME_FOLDER)
    except ValueError:
        raise ValueError(
            f"save_time {time!r} is no time: give one such as 2025-01-31T12:00, in UTC"
        ) from None
