"""Attribution between components, plainly: two backward passes for each target, all in autograd.

Every module that holds components is replaced by one that writes out = b + x R + Σ (x V) U, with
x V cut out of the graph where it goes on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

METRICS = ("attr", "attr_abs", "mean_squared_attr")
Attributions = dict[str, dict[tuple[str, str], np.ndarray]]


@dataclass(frozen=True)
class Map:
    """Components of some rows of a module: V (d_in, C), U (C, len(rows))."""

    module: str
    rows: Sequence[int]
    V: Tensor
    U: Tensor


class Split(nn.Module):
    """A linear map (d_in, d_out) and bias, written with components."""

    def __init__(self, weight: Tensor, bias: Tensor | None, maps: Mapping[str, Map]) -> None:
        super().__init__()
        self.maps, self.bias, self.rest = dict(maps), bias, weight.clone()
        self.writes: dict[str, Tensor] = {}
        for name, part in maps.items():
            self.writes[name] = weight.new_zeros(part.U.shape[0], weight.shape[1])
            self.writes[name][:, list(part.rows)] = part.U
            self.rest -= part.V @ self.writes[name]
        self.activations: dict[str, Tensor] = {}
        self.leaves: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        out = x.new_zeros(*x.shape[:-1], self.rest.shape[1])
        if self.rest.abs().max() > 1e-12:  # else the components are all of the map
            out = out + x @ self.rest
        if self.bias is not None:
            out = out + self.bias
        for name, part in self.maps.items():
            self.activations[name] = x @ part.V
            self.leaves[name] = self.activations[name].detach().requires_grad_()
            out = out + self.leaves[name] @ self.writes[name]
        return out


class Embedding(nn.Module):
    """A token embedding whose output is cut out of the graph."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.own, self.weight = own, own.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        self.leaf = self.own(input_ids).detach().requires_grad_()
        return self.leaf * 1


class Residual(nn.Module):
    """Keeps what the unembedding would multiply."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.own, self.weight = own, own.weight

    def forward(self, hidden: Tensor) -> Tensor:
        self.given = hidden
        return self.own(hidden)


def attributions(
    model: nn.Module,
    input_ids: Tensor,
    maps: Mapping[str, Map],
    *,
    output: bool = True,
    output_tokens: Sequence[int] = (),
    importances: Mapping[str, Tensor] | None = None,
) -> Attributions:
    """Sum attributions over one batch, by metric and (target, source), each (target, source).

    A pair of layers that the graph does not connect is left out. ``importances`` (batch, token, C)
    are 1 for layers that are not there.
    """
    given = importances or {}
    total: Attributions = {metric: {} for metric in METRICS}
    with replaced(model, maps) as (splits, embedding, residual):
        model(input_ids, use_cache=False)
        activations = {n: split.activations[n] for split in splits for n in split.maps}
        leaves = {n: split.leaves[n] for split in splits for n in split.maps}
        targets = {name: activations[name] for name in maps}
        if output:
            targets["output"] = residual.given
        if output_tokens:
            targets["output_tokens"] = residual.given @ residual.weight[list(output_tokens)].T
        sources = {"embed": embedding.leaf, **leaves}
        for name, values in targets.items():
            weight = given.get(name, torch.ones_like(values))
            for index in range(values.shape[-1]):
                chosen = values[..., index]
                y = (chosen * weight[..., index]).sum()
                y_abs = (chosen.abs() * weight[..., index]).sum()
                slopes = gradients(y, sources)
                slopes_abs = gradients(y_abs, sources)
                for source, leaf in sources.items():
                    if slopes[source] is None:
                        continue
                    a, a_abs = slopes[source] * leaf.detach(), slopes_abs[source] * leaf.detach()
                    if source == "embed":
                        rows = embedding.weight.shape[0]
                        parts = [
                            tokens(a.sum(-1), input_ids, rows),
                            tokens(a_abs.sum(-1), input_ids, rows),
                            tokens(a.sum(-1) ** 2, input_ids, rows),
                        ]
                    else:
                        if source in given:
                            a, a_abs = a * given[source], a_abs * given[source]
                        positions = tuple(range(a.ndim - 1))
                        parts = [part.sum(positions) for part in (a, a_abs, a**2)]
                    for metric, part in zip(METRICS, parts, strict=True):
                        shape = (values.shape[-1], len(part))
                        sums = total[metric].setdefault((name, source), np.zeros(shape))
                        sums[index] += part.numpy()
    return total


def gradients(y: Tensor, sources: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    if not y.requires_grad:
        return dict.fromkeys(sources)
    found = torch.autograd.grad(y, list(sources.values()), retain_graph=True, allow_unused=True)
    return dict(zip(sources, found, strict=True))


def tokens(values: Tensor, input_ids: Tensor, rows: int) -> Tensor:
    """What belongs to each token id."""
    return values.new_zeros(rows).index_add_(0, input_ids.reshape(-1), values.reshape(-1))


@contextmanager
def replaced(
    model: nn.Module, maps: Mapping[str, Map]
) -> Iterator[tuple[list[Split], Embedding, Residual]]:
    """Put the modules above into a model, for a while."""
    kept: dict[str, nn.Module] = {}
    frozen = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    splits = []
    embedding = Embedding(model.get_input_embeddings())
    residual = Residual(model.get_output_embeddings())
    for parameter, _ in frozen:
        parameter.requires_grad_(False)
    for module in dict.fromkeys(part.module for part in maps.values()):
        own = model.get_submodule(module)
        weight = own.weight.detach()
        weight = weight if type(own).__name__ == "Conv1D" else weight.T
        inside = {name: part for name, part in maps.items() if part.module == module}
        splits.append(Split(weight, own.bias, inside))
        kept[module] = own
        put(model, module, splits[-1])
    for own, new in ((embedding.own, embedding), (residual.own, residual)):
        name = next(name for name, found in model.named_modules() if found is own)
        kept[name] = own
        put(model, name, new)
    try:
        yield splits, embedding, residual
    finally:
        for name, own in kept.items():
            put(model, name, own)
        for parameter, was in frozen:
            parameter.requires_grad_(was)


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
