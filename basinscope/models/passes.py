"""What hooks ask while a model runs: which tokens this pass is of, and whether they are to act.

Blocks of interventions that are open around a model are known here, so that what must see it as it
is can have it so, or refuse it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import nn

from basinscope.models.forward import inside_bridge
from basinscope.models.positions import Span


class Passes:
    """Tells hooks which tokens run.

    Parameters
    ----------
    span : Span, optional
        Of every pass; left out, :func:`basinscope.models.following.followed` says it.
    """

    def __init__(self, span: Span | None = None) -> None:
        self._span = span
        self._last: Span | None = None
        self.resting = False  # the model is to run as it is
        self.ran: set[str] = set()

    @property
    def span(self) -> Span | None:
        """Of the pass that runs, or of the one that ``backward`` runs parts of anew."""
        if self._span is None and torch._C._current_graph_task_id() != -1:
            return self._last
        return self._span

    @contextmanager
    def running(self, span: Span) -> Iterator[None]:
        """Have this be the span inside the block."""
        before, self._span = self._span, span
        if torch.is_grad_enabled():
            self._last = span
        self.ran.clear()
        try:
            yield
        finally:
            self._span = before

    def rest(self) -> None:
        """Have the model run as it is from now on."""
        self.resting = True

    def now(self, *targets: str, tokens: int | None = None) -> Span | None:
        """Give the span of the pass that runs, to a hook on `targets`; None where it should rest.

        Raises
        ------
        ValueError
            If no pass was seen, or one of another number of tokens.
        """
        if self.resting:
            return None
        span = self.span
        if span is None or (span.goes_on and tokens not in (None, span.length)):
            if self._span is None and span is not None:
                raise ValueError(
                    f"{targets[0]!r} is reached by backward() for a pass of {tokens} tokens, and "
                    f"the last one with gradients had {span.length}: with gradient checkpointing "
                    "call backward() before you run another length"
                )
            raise ValueError(
                f"{targets[0]!r} is reached outside of the model's own forward pass: inside the "
                "block run the model that was given to it, not a part of it, nor what torch.compile"
                " made of it"
            )
        self.ran.update(targets)
        return span


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Have blocks around this one leave the model as it is; for trying it on a few tokens."""
    resting = _active(model)
    for passes in resting:
        passes.resting = True
    try:
        yield
    finally:
        for passes in resting:
            passes.resting = False


def require_unchanged(model: object, what: str) -> None:
    """Refuse a model inside a block that changes it, for what keeps a record of its own.

    Parameters
    ----------
    model : nn.Module
        Or its bridge, or what ``torch.compile`` made of it.
    what : str
        Which function it was given to.

    Raises
    ------
    ValueError
    """
    if isinstance(model, nn.Module) and _active(inside_bridge(model)):
        raise ValueError(
            f"{what} inside a block of intervened(): its interventions would be in the numbers and "
            "not in the store's record. Give them to extract_dataset(interventions=...), or leave "
            "the block"
        )


def _active(model: nn.Module) -> list[Passes]:
    """Give what blocks around the caller tell hooks by, outermost first."""
    return [block.passes for block in _blocks.get(model, ()) if not block.passes.resting]


@dataclass(eq=False)
class Block:
    """A block that is open, and what closing it undoes."""

    passes: Passes
    undo: ExitStack


def blocks_around(model: nn.Module) -> list[Block]:
    """Give the blocks that are open around a model, outermost first, to be added to."""
    return _blocks.setdefault(model, [])


_blocks: WeakKeyDictionary[nn.Module, list[Block]] = WeakKeyDictionary()
