"""Heads' shares of the attention output, changed where the output projection adds them up.

What a head passes has fewer numbers than the stream, so that not every share can be had by changing
that. The difference between the share it has and the one it should have is added behind the
projection instead: other heads and the projection's bias stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from basinscope.models.forward import evaluating
from basinscope.models.passes import Passes
from basinscope.models.sites import Heads, by_example, head_weights, listening, weights_by_head

Added = dict[int, dict[int, Tensor]]
"""Layer and head to what its share is more than what it passes makes, (example, token, d_model)."""


def change_shares(
    model: nn.Module,
    hooks: ExitStack,
    layer: int,
    heads: Heads,
    changes: Sequence[tuple[str, int, Callable[[Tensor], Tensor]]],
    passes: Passes,
) -> dict[int, Tensor]:
    """Hook a layer's heads and its output projection.

    Parameters
    ----------
    model : nn.Module
    hooks : ExitStack
        Takes them off again.
    layer : int
    heads : Heads
        Those of the layer.
    changes : sequence of (str, int, callable)
        What each is called, its head, and from a share (example, token, d_model), times
        ``heads.scale``, to what it should be; the same tensor if it may stay. Applied in order.
    passes : Passes

    Returns
    -------
    dict of int to Tensor
        See :data:`Added`; filled in every pass.

    Raises
    ------
    ValueError
        If norms stand behind the projection, so that shares depend on each other.
    """
    _require_sum(model, layer, heads, changes[0][0])
    added: dict[int, Tensor] = {}
    projection: nn.Module | None = None  # the one that runs: of the model, or of a copy of it

    def see(module: nn.Module, args: object) -> None:
        nonlocal projection
        projection = module

    def compare(passed: Tensor) -> None:
        added.clear()
        assert projection is not None
        of_heads = weights_by_head(projection, heads)
        for _, head, change in changes:
            weights = of_heads[head].to(passed.dtype)
            share = torch.einsum("bps,sd->bpd", passed[:, :, head], weights)
            before = share + added[head] if head in added else share
            if (after := change(before)) is not before:
                added[head] = after - share

    def add(module: nn.Module, args: object, output: Tensor) -> Tensor:
        if not added:
            return output
        whole = by_example(output, next(iter(added.values())).shape[1])
        return (whole + torch.stack(list(added.values())).sum(0)).view_as(output)

    def length() -> int:
        span = passes.span
        return 1 if span is None else span.length

    adds_up = model.get_submodule(heads.projection.rpartition(".")[0])
    hooks.callback(adds_up.register_forward_pre_hook(see).remove)
    hooks.callback(listening(model, heads.passed, compare, length).remove)
    hooks.callback(adds_up.register_forward_hook(add).remove)
    return added


def _require_sum(model: nn.Module, layer: int, heads: Heads, target: str) -> None:
    """Refuse what does not hand the sum of shares on as it is, as dropout does when it is off."""
    weights = head_weights(model, heads)
    for name in heads.after:
        module = model.get_submodule(name)
        given = torch.linspace(-1, 2, weights.shape[-1]).to(weights)[None, None]
        with torch.no_grad(), evaluating(module):
            same = torch.equal(module.forward(given), given)  # without its hooks
        if not same:
            raise ValueError(
                f"{target!r}: {name} ({type(module).__name__}) stands behind the output "
                "projection, so that what a head adds to the stream depends on the other heads: "
                f"give attn_out_{layer}, or zero the head, or patch it from another example "
                "(source=its number)"
            )
