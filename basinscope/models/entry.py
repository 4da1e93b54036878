"""Entering a model's forward pass at a layer, with what the layers before it would have given.

The model runs as always, but the layers before the entry hand on what they are given, and the entry
layer takes the hidden states from outside. Positions, masks and whatever else the model prepares
stay its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from basinscope.models.forward import replaced_forward, token_logits
from basinscope.models.structure import UnknownStructureError, layer_modules


class NoEntryError(ValueError):
    """The model's forward pass cannot be entered at a layer."""


@dataclass(frozen=True)
class Entry:
    """Where a forward pass is entered.

    Attributes
    ----------
    layers : tuple of str
        Names of the layers' modules, in order.
    first : int
        The layer that is entered.
    tuples : tuple of bool
        Whether each layer before it returns a tuple.
    token_bytes : int
        Size of one token's hidden state there.
    """

    layers: tuple[str, ...]
    first: int
    tuples: tuple[bool, ...]
    token_bytes: int


def find_entry(model: nn.Module, input_ids: Tensor) -> Entry | None:
    """Find the last layer whose input does not depend on a weight that requires a gradient.

    Parameters
    ----------
    model : nn.Module
        Only what moves requires a gradient.
    input_ids : Tensor (batch, token)
        A small batch to try it on.

    Returns
    -------
    Entry or None
        None if that is the first layer: there is nothing to save.

    Raises
    ------
    NoEntryError
        With the reason, if layers cannot be left out of this model's forward pass.
    """
    try:
        names = layer_modules(model)
    except UnknownStructureError as error:
        raise NoEntryError(str(error)) from error
    inputs: list[Tensor] = []
    tuples: list[bool] = []

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        inputs.append(_hidden(args, kwargs))
        tuples.append(isinstance(output, tuple))

    with ExitStack() as hooks:
        for name in names:
            module = model.get_submodule(name)
            hooks.callback(module.register_forward_hook(note, with_kwargs=True).remove)
        with torch.enable_grad():
            plain = token_logits(model, input_ids)
    if len(inputs) != len(names):
        raise NoEntryError(f"{len(names)} layers run {len(inputs)} times in a forward pass")
    fixed = [not hidden.requires_grad for hidden in inputs]
    first = fixed.index(False) - 1 if False in fixed else len(fixed) - 1
    if first < 1:
        return None
    given = inputs[first].detach()
    entry = Entry(tuple(names), first, tuple(tuples[:first]), given[0, 0].nbytes)
    try:
        with torch.no_grad():
            token_logits(model, input_ids.flip(-1))  # whatever layers keep is of other tokens now
            with entered(model, entry, given):
                again = token_logits(model, input_ids)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise NoEntryError(
            f"it fails when layers before layer {first} are left out ({reason})"
        ) from error
    if not torch.allclose(again, plain, rtol=1e-4, atol=1e-5 * float(plain.detach().abs().max())):
        raise NoEntryError(f"its logits change when layers before layer {first} are left out")
    return entry


@torch.no_grad()
def hidden_states_at(model: nn.Module, entry: Entry, input_ids: Tensor) -> Tensor:
    """Run a model's layers before the entry.

    Returns
    -------
    Tensor (batch, token, width)
        What the entry layer is given.
    """
    seen: list[Tensor] = []

    def stop(*args: Any, **kwargs: Any) -> Any:
        seen.append(_hidden(args, kwargs))
        raise _ReachedError

    try:
        with replaced_forward(model.get_submodule(entry.layers[entry.first]), stop):
            token_logits(model, input_ids)
    except _ReachedError:
        pass
    return seen[0]


@contextmanager
def entered(model: nn.Module, entry: Entry, hidden: Tensor) -> Iterator[None]:
    """Start the forward passes inside the block at the entry, with these hidden states."""
    target = model.get_submodule(entry.layers[entry.first])
    forward = target.forward

    def with_hidden(*args: Any, **kwargs: Any) -> Any:
        if args:
            return forward(hidden, *args[1:], **kwargs)
        return forward(**{**kwargs, _HIDDEN: hidden})

    with ExitStack() as replaced:
        for name, as_tuple in zip(entry.layers, entry.tuples, strict=False):
            hand_on = _hand_on_in_tuple if as_tuple else _hidden_of
            replaced.enter_context(replaced_forward(model.get_submodule(name), hand_on))
        replaced.enter_context(replaced_forward(target, with_hidden))
        yield


_HIDDEN = "hidden_states"


class _ReachedError(Exception):
    """The layer whose input is wanted has been reached."""


def _hidden(args: Any, kwargs: Any) -> Tensor:
    hidden = args[0] if args else kwargs.get(_HIDDEN)
    if not isinstance(hidden, Tensor):
        raise NoEntryError("its layers are not given hidden states as their first argument")
    return hidden


def _hidden_of(*args: Any, **kwargs: Any) -> Tensor:
    return _hidden(args, kwargs)


def _hand_on_in_tuple(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    return _hidden(args, kwargs), None
