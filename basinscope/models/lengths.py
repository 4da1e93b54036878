"""Sequences of several lengths: those of one length run together, and nothing is padded."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from basinscope.models.activation_cache import ActivationCache
from basinscope.models.interventions import Intervention
from basinscope.models.positions import Positions, resolve_positions

FROM_END = "from_end"  # coordinate of positions that count from the end
NO_TOKEN = -1  # where a sequence has none


def by_length(sequences: Sequence[Tensor], at_once: int | None) -> list[list[int]]:
    """Group the numbers of sequences by their length, at most ``at_once`` together."""
    lengths: dict[int, list[int]] = {}
    for number, ids in enumerate(sequences):
        lengths.setdefault(len(ids), []).append(number)
    size = at_once or len(sequences)
    return [of[i : i + size] for of in lengths.values() for i in range(0, len(of), size)]


def run_by_length(
    run: Callable[[Tensor], ActivationCache],
    sequences: Sequence[Tensor],
    groups: Iterable[Sequence[int]],
    coords: Mapping[str, np.ndarray],
    width: int | None = None,
) -> ActivationCache:
    """Run group after group, and put the examples back in their order.

    Parameters
    ----------
    run : callable
        Takes ids (example, token) of one length.
    sequences : sequence of Tensor (token,)
    groups : iterable of list of int
        Numbers of sequences of one length each.
    coords : dict of str to np.ndarray
        What to call the positions: see :func:`common_positions`.
    width : int, optional
        Tokens that ``input_ids`` have room for. Default: those of the longest sequence.
    """
    arrays: dict[str, Tensor] = {}
    for group in groups:
        cache = run(torch.stack([sequences[number] for number in group]))
        for name, array in cache.items():
            if name == "input_ids":
                continue
            whole = arrays.setdefault(name, array.new_empty((len(sequences), *array.shape[1:])))
            whole[torch.as_tensor(group, device=array.device)] = array
    found = {
        name: _padded(sequences, FROM_END in coords, width).to(cache["input_ids"].device)
        if name == "input_ids"
        else arrays[name]
        for name in cache
    }
    return ActivationCache(found, cache.dims, coords, cache.metadata)


def common_positions(
    positions: Positions, average: bool, lengths: Sequence[int]
) -> dict[str, np.ndarray]:
    """Number positions that are the same in sequences of all lengths.

    Returns
    -------
    dict of str to np.ndarray
        ``position``, where they count from the start, and -1 for an average; or ``from_end``,
        negative.

    Raises
    ------
    ValueError
        If a sequence has no such position, or they are others in each.
    """
    found = [np.asarray(resolve_positions(positions, length)) for length in lengths]
    if average:
        return {"position": np.asarray([-1])}
    from_end = [numbers - length for numbers, length in zip(found, lengths, strict=True)]
    for name, numbers in {"position": found, FROM_END: from_end}.items():
        if all(np.array_equal(numbers[0], other) for other in numbers):
            return {name: numbers[0]}
    raise ValueError(
        f"positions {positions!r} are other ones in each of sequences of {min(lengths)} to "
        f"{max(lengths)} tokens: count all of them from the start (0, 1), or from the end (-1, "
        "'last'), or average over them"
    )


def require_no_neighbours(interventions: Sequence[Intervention]) -> None:
    """Refuse interventions that take something from other examples, which may not run together."""
    for intervention in interventions:
        source = intervention.source
        of_others = intervention.kind == "mean" or isinstance(source, int)
        if isinstance(source, Tensor):
            of_others = source.ndim == _axes(intervention) and len(source) > 1
        if of_others:
            raise ValueError(
                f"{intervention} takes something from other examples or for each example, and "
                "sequences that do not run together cannot: give sequences of one length that run "
                "as one batch"
            )


def require_positions(interventions: Sequence[Intervention], lengths: Sequence[int]) -> None:
    """Refuse interventions whose positions, or a tensor for them, do not fit all sequences."""
    for intervention in interventions:
        source, axis = intervention.source, 1 - _axes(intervention)  # that of positions
        given: tuple[int, ...] = source.shape[axis:] if isinstance(source, Tensor) else ()
        for length in lengths:
            count = len(resolve_positions(intervention.positions, length))
            if len(given) == -axis and given[0] != count:
                raise ValueError(
                    f"the source of {intervention.target!r} has {given[0]} positions; "
                    f"{intervention.positions!r} are {count} of a sequence of {length} tokens: "
                    "give positions that are as many in each, or a source without that axis"
                )


def _axes(intervention: Intervention) -> int:
    """How many axes the activation has: (example, position, width), or of all heads one more."""
    return 4 if re.fullmatch(r"(queries|keys|values)_\d+", intervention.target) else 3


def _padded(sequences: Sequence[Tensor], at_start: bool, width: int | None) -> Tensor:
    """Put ids into one array, with NO_TOKEN before or behind them."""
    width = width or max(map(len, sequences))
    ids = torch.full((len(sequences), width), NO_TOKEN, dtype=torch.long)
    for row, sequence in zip(ids, sequences, strict=True):
        place = slice(width - len(sequence), None) if at_start else slice(len(sequence))
        row[place] = sequence
    return ids
