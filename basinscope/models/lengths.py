"""Sequences of several lengths: those of one length run together, and nothing is padded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

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
    groups: Sequence[Sequence[int]],
    coords: Mapping[str, np.ndarray],
) -> ActivationCache:
    """Run group after group, and put the examples back in their order.

    Parameters
    ----------
    run : callable
        Takes ids (example, token) of one length.
    sequences : sequence of Tensor (token,)
    groups : list of list of int
        Numbers of sequences of one length each.
    coords : dict of str to np.ndarray
        What to call the positions: see :func:`common_positions`.
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
        name: _padded(sequences, FROM_END in coords).to(cache["input_ids"].device)
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
        of_each = isinstance(source, Tensor) and source.ndim == 3
        if intervention.kind == "mean" or isinstance(source, int) or of_each:
            raise ValueError(
                f"{intervention} takes something from other examples or for each example, and "
                "sequences that do not run together cannot: give sequences of one length, and no "
                "batch_size"
            )


def _padded(sequences: Sequence[Tensor], at_start: bool) -> Tensor:
    """Put ids into one array, with NO_TOKEN before or behind them."""
    width = max(map(len, sequences))
    ids = torch.full((len(sequences), width), NO_TOKEN, dtype=torch.long)
    for row, sequence in zip(ids, sequences, strict=True):
        place = slice(width - len(sequence), None) if at_start else slice(len(sequence))
        row[place] = sequence
    return ids
