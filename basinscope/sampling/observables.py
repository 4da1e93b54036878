"""Observables: fixed sequences whose losses every draw records, each evaluated once."""

from __future__ import annotations

import numbers
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from basinscope.io.activation_runs import LONGEST
from basinscope.io.dims import BATCH_SAMPLING, observable_batch, observable_id
from basinscope.sampling.data import check_dataset, observable_rows, read_rows

Around = Callable[[torch.nn.Module, int, Tensor], AbstractContextManager[None]]
"""(model, number of a batch, its ids) -> what its evaluation runs inside of."""
LONGEST_ID = LONGEST - len("input_ids_")  # bytes; the store names directories so


@dataclass(frozen=True)
class Observable:
    """One observable's sequences.

    Attributes
    ----------
    name, obs_id : str
        As the caller named it, and as the store does.
    input_ids : ndarray (sequence, token), int64
    rows : list of int
        Their rows in the data set.
    """

    name: str
    obs_id: str
    input_ids: np.ndarray
    rows: list[int]
    batches_per_draw: int

    def describe(self) -> dict[str, Any]:
        """Give what the store's settings say of it."""
        return {
            "obs_id": self.obs_id,
            "name": self.name,
            "batches_per_draw": self.batches_per_draw,
        }


def read_observables(
    observables: Mapping[str, Any],
    *,
    batch_size: int,
    batches_per_draw: int,
    seed: int,
    sequence_length: int,
) -> list[Observable]:
    """Check the observables and read their sequences.

    Parameters
    ----------
    observables : mapping
        Name to data set, or to ``(data set, batches_per_draw)``.

    Raises
    ------
    TypeError, ValueError
        Naming the observable and what is wrong with it.
    """
    if not isinstance(observables, Mapping):
        raise TypeError(
            "observables must be a dict of name to data set, or to (data set, batches_per_draw); "
            f"got {type(observables).__name__}"
        )
    found: dict[str, Observable] = {}
    for name, given in observables.items():
        if not isinstance(name, str) or not name:
            raise TypeError(f"an observable's name must be a non-empty string; got {name!r}")
        obs_id = observable_id(name)
        if len(os.fsencode(obs_id)) > LONGEST_ID:
            raise ValueError(
                f"the observable's name {name[:20]!r}... is too long: it has "
                f"{len(os.fsencode(obs_id))} bytes as part of a directory's name, which takes at "
                f"most {LONGEST_ID}; rename it"
            )
        if observable_batch(obs_id) == BATCH_SAMPLING:
            raise ValueError(
                f"an observable cannot be named {name!r}: {BATCH_SAMPLING} is the dimension of the "
                "sampling batches; rename it"
            )
        label = f"observable {name!r}"
        if isinstance(given, tuple) and len(given) != 2:
            raise ValueError(
                f"{label} must be a data set or (data set, batches_per_draw); "
                f"got a tuple of {len(given)}"
            )
        dataset, batches = given if isinstance(given, tuple) else (given, batches_per_draw)
        if isinstance(batches, bool) or not isinstance(batches, numbers.Integral) or batches < 1:
            raise ValueError(
                f"{label}: batches_per_draw must be a whole number of at least 1; got {batches!r}"
            )
        num_rows, length = check_dataset(dataset, label)
        if length != sequence_length:
            raise ValueError(
                f"{label} has sequences of {length} tokens, the sampling data set of "
                f"{sequence_length}: all must have one length"
            )
        batches = int(batches)
        count = batch_size * batches
        if num_rows < count:
            raise ValueError(
                f"{label} has {num_rows} rows, fewer than batch_size * batches_per_draw = "
                f"{batch_size} * {batches} = {count}: give more rows or fewer batches"
            )
        if obs_id in found:
            raise ValueError(
                f"observables {found[obs_id].name!r} and {name!r} would both be stored as "
                f"'loss_{obs_id}': rename one"
            )
        rows = observable_rows(num_rows, count, seed)
        found[obs_id] = Observable(name, obs_id, read_rows(dataset, rows), rows, batches)
    return list(found.values())


class ObservableEvaluator:
    """Evaluates all observables with as few and as large forwards as their rows allow.

    Sequences that several observables share are evaluated once. A model's own loss takes them in
    groups of about ``per_forward``; a caller's ``loss_fn`` sees batches of ``batch_size``, as it
    would without this class.

    Parameters
    ----------
    observables : list of Observable
    loss_fn : callable
        ``(model, input_ids) -> (batch, token_pos)``.
    batch_size : int
    per_forward : int or None
        Most sequences of a group; None where sequences must stay in their batches.
    around : callable, optional
        What the evaluation of a batch runs inside of.
    """

    def __init__(
        self,
        observables: list[Observable],
        loss_fn: Callable[[torch.nn.Module, Tensor], Tensor],
        *,
        batch_size: int,
        per_forward: int | None,
        device: torch.device,
        around: Around | None = None,
    ) -> None:
        self.loss_fn = loss_fn
        self.around = around
        self.positions: dict[str, Tensor] = {}
        self.batches: list[Tensor] = []
        if not observables:
            return
        everything = np.concatenate([o.input_ids for o in observables])
        unit = 1 if per_forward else batch_size
        kept, positions = _first_occurrences(everything.reshape(len(everything) // unit, -1))
        tokens = everything.shape[1]
        unique = everything.reshape(-1, unit, tokens)[kept].reshape(-1, tokens)
        ids = torch.from_numpy(unique).to(device)
        self.batches = list(
            ids.split(even_size(len(ids), per_forward) if per_forward else batch_size)
        )
        rows = (positions[:, None] * unit + np.arange(unit)).reshape(-1)
        start = 0
        for observable in observables:
            end = start + len(observable.input_ids)
            self.positions[observable.obs_id] = torch.from_numpy(rows[start:end]).to(device)
            start = end

    def __call__(self, model: torch.nn.Module) -> dict[str, Tensor]:
        """Evaluate at the model's weights: obs_id to losses (sequence, token_pos), float32."""
        if not self.batches:
            return {}
        losses = torch.cat([self._losses(model, *batch) for batch in enumerate(self.batches)])
        return {obs_id: losses[rows] for obs_id, rows in self.positions.items()}

    def _losses(self, model: torch.nn.Module, number: int, ids: Tensor) -> Tensor:
        with self.around(model, number, ids) if self.around else nullcontext():
            return self.loss_fn(model, ids).float()


def _first_occurrences(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find distinct rows in order of appearance, and for every row which of them it is."""
    _, first, inverse = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return first[order], rank[inverse.reshape(-1)]


def even_size(count: int, most: int) -> int:
    """Give the size of groups of at most ``most`` that share ``count`` evenly."""
    groups = -(-count // most)
    return -(-count // groups)
