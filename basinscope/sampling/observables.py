"""Observables: fixed sequences whose losses every draw records, each evaluated once."""

from __future__ import annotations

import numbers
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from basinscope.io.activation_runs import LONGEST
from basinscope.io.dims import BATCH_SAMPLING, observable_batch, observable_id
from basinscope.sampling.data import check_dataset, observable_rows, read_rows
from basinscope.sampling.identity import describe_function
from basinscope.sampling.losses import LossFn

if TYPE_CHECKING:
    from datasets import Dataset

    Observables = Mapping[str, Dataset | tuple[Dataset, int] | tuple[Dataset, int, LossFn]]

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
    loss_fn : callable or None
        What a draw records of them, in place of the run's loss.
    """

    name: str
    obs_id: str
    input_ids: np.ndarray
    rows: list[int]
    batches_per_draw: int
    loss_fn: LossFn | None = None

    def describe(self) -> dict[str, Any]:
        """Give what the store's settings say of it."""
        own = {} if self.loss_fn is None else {"loss_fn": describe_function(self.loss_fn)}
        return {
            "obs_id": self.obs_id,
            "name": self.name,
            "batches_per_draw": self.batches_per_draw,
            **own,
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
        Name to data set, to ``(data set, batches_per_draw)``, or to
        ``(data set, batches_per_draw, loss_fn)``.

    Raises
    ------
    TypeError, ValueError
        Naming the observable and what is wrong with it.
    """
    if not isinstance(observables, Mapping):
        raise TypeError(
            "observables must be a dict of name to data set, to (data set, batches_per_draw), or "
            f"to (data set, batches_per_draw, loss_fn); got {type(observables).__name__}"
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
        if isinstance(given, tuple) and len(given) not in (2, 3):
            raise ValueError(
                f"{label} must be a data set, (data set, batches_per_draw) or (data set, "
                f"batches_per_draw, loss_fn); got a tuple of {len(given)}"
            )
        dataset, batches, *own = given if isinstance(given, tuple) else (given, batches_per_draw)
        loss_fn = own[0] if own else None
        if loss_fn is not None and not callable(loss_fn):
            raise TypeError(
                f"{label}: loss_fn must be a function (model, input_ids) -> (batch, token - 1); "
                f"got {type(loss_fn).__name__}"
            )
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
        found[obs_id] = Observable(name, obs_id, read_rows(dataset, rows), rows, batches, loss_fn)
    return list(found.values())


class ObservableEvaluator:
    """Evaluates all observables with as few and as large forwards as their rows allow.

    Sequences that several observables share are evaluated once. A model's own loss takes them in
    groups of about ``per_forward``; a caller's ``loss_fn``, the run's or an observable's, sees
    batches of ``batch_size``, as it would without this class.

    Parameters
    ----------
    observables : list of Observable
    loss_of : callable
        From an observable's ``loss_fn`` to ``(model, input_ids) -> (batch, token_pos)``.
    batch_size : int
    per_forward : int or None
        Most sequences of a group; None where sequences must stay in their batches.
    around : callable, optional
        What the evaluation of a batch by the run's loss runs inside of.
    """

    def __init__(
        self,
        observables: list[Observable],
        loss_of: Callable[[LossFn | None], LossFn],
        *,
        batch_size: int,
        per_forward: int | None,
        device: torch.device,
        around: Around | None = None,
    ) -> None:
        self.positions = {o.obs_id: torch.empty(0) for o in observables}
        self.batches: list[tuple[Tensor, LossFn, Around | None]] = []
        first = 0
        for members in _by_loss(observables):
            own = members[0].loss_fn
            most = per_forward if own is None else None
            unique, positions = _distinct(members, 1 if most else batch_size)
            for observable, rows in zip(members, positions, strict=True):
                self.positions[observable.obs_id] = torch.from_numpy(first + rows).to(device)
            first += len(unique)
            loss = loss_of(own)
            size = even_size(len(unique), most) if most else batch_size
            for ids in torch.from_numpy(unique).to(device).split(size):
                self.batches.append((ids, loss, around if own is None else None))

    def __call__(self, model: torch.nn.Module) -> dict[str, Tensor]:
        """Evaluate at the model's weights: obs_id to losses (sequence, token_pos), float32."""
        if not self.batches:
            return {}
        found = []
        for number, (ids, loss, around) in enumerate(self.batches):
            with around(model, number, ids) if around else nullcontext():
                values = loss(model, ids.clone())  # a caller's function may write there
            found.append(values.detach().to(ids.device, torch.float32))
        losses = torch.cat(found)
        return {obs_id: losses[rows] for obs_id, rows in self.positions.items()}


@contextmanager
def left_as_found(model: torch.nn.Module) -> Iterator[None]:
    """Give a model back the modes, gradients and places of its weights after a caller's function.

    Another's next step would otherwise add to gradients that are left there, or never reach weights
    that are kept elsewhere.
    """
    modes = [(module, module.training) for module in model.modules()]
    weights = [(p, p.data, p.grad, p.requires_grad) for p in model.parameters()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, data, gradient, required in weights:
            parameter.data = data
            parameter.requires_grad_(required).grad = gradient


def _by_loss(observables: list[Observable]) -> list[list[Observable]]:
    """Group observables that are evaluated by the same function, in order of appearance."""
    groups: dict[int, list[Observable]] = {}
    for observable in observables:
        groups.setdefault(id(observable.loss_fn), []).append(observable)
    return list(groups.values())


def _distinct(members: list[Observable], unit: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Find distinct units of neighbouring sequences, and where each observable's sequences are."""
    everything = np.concatenate([o.input_ids for o in members])
    tokens = everything.shape[1]
    kept, positions = _first_occurrences(everything.reshape(len(everything) // unit, -1))
    unique = everything.reshape(-1, unit, tokens)[kept].reshape(-1, tokens)
    rows = (positions[:, None] * unit + np.arange(unit)).reshape(-1)
    return unique, np.split(rows, np.cumsum([len(o.input_ids) for o in members])[:-1])


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
