"""Attributions of one batch, many targets per backward pass.

A batch runs forward once, side by side in as many copies as one backward pass takes gradients: two
for each target, of y and of |y|. The pass starts at the input of a target's map, with V[:, t] times
the weights of its positions, and ends at the outputs of the sources' modules. Copies are used for
all that a module may do: on a CPU, a vectorised backward pass of attention takes ten times as long.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from basinscope.io.attributions_layout import EMBED, METRICS, Counts, Edge, Sums
from basinscope.models.components import Components, Cut, Decomposition, cut_at
from basinscope.models.forward import replaced_forward, token_logits

WIDEST_BYTES = {"cpu": 2**22, "cuda": 2**26}  # of a pass's widest tensor; a CPU's must stay cached
MOST_AT_ONCE = {"cpu": 16, "cuda": 64}  # targets; with more, layers of few leave copies unused
SHORT = 32  # tokens
KEPT_TARGETS = 64  # whose attributions wait to be added to the sums at once

Importance = Callable[[dict[str, Tensor], Tensor], Mapping[str, Tensor]]
Columns = Tensor | None
"""Which components; None for all."""


@dataclass(frozen=True)
class _Active:
    """The components of one layer in one batch, whose n positions stand in one row.

    Attributes
    ----------
    activations : Tensor (n, C)
    importance : Tensor (n, C) or None
        None is 1 everywhere.
    live : Tensor (k,) or None
        The components that are of any importance; None for all.
    """

    activations: Tensor
    importance: Tensor | None
    live: Columns

    @cached_property
    def weighted(self) -> Tensor:
        """Activations times importance of what is live, (n, k)."""
        chosen = _columns(self.activations, self.live)
        return chosen if self.importance is None else chosen * _columns(self.importance, self.live)


class BatchAttribution:
    """Adds up the attributions of batches.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode, no parameter requiring a gradient.
    components : mapping of str to Components
        By canonical name; the forward pass is cut at them, and at the embedding.
    targets : mapping of str to Components
        Some of them, and what is read at the unembedding.
    sources : collection of str
        Which of the components, and "embed", attributions are computed for.
    embedding, unembedding : str
        Names of these modules.
    importance, importance_threshold, alive, targets_at_once
        As in :func:`basinscope.attribution.harvest.harvest_attributions`.
    input_ids : Tensor (batch, token)
        A batch to find out on which sources a target depends, and how large its tensors are.

    Attributes
    ----------
    edges : list of (target, source)
    targets_at_once : int
    """

    def __init__(
        self,
        model: nn.Module,
        components: Mapping[str, Components],
        targets: Mapping[str, Components],
        *,
        sources: Collection[str],
        embedding: str,
        unembedding: str,
        importance: Importance | None,
        importance_threshold: float,
        alive: Mapping[str, Tensor],
        targets_at_once: int | None,
        input_ids: Tensor,
    ) -> None:
        self.decomposition = Decomposition(model, components)
        self.components = dict(components)
        self.targets, self.sources = dict(targets), set(sources)
        self.embedding, self.unembedding = embedding, unembedding
        self.importance, self.threshold = importance, importance_threshold
        self.alive = dict(alive)
        self.edges, bytes_each = self._find_edges(input_ids)
        kind = "cpu" if input_ids.device.type == "cpu" else "cuda"
        fitting = min(MOST_AT_ONCE[kind], WIDEST_BYTES[kind] // (2 * bytes_each))
        self.targets_at_once = max(1, fitting) if targets_at_once is None else targets_at_once

    def add(self, input_ids: Tensor, sums: Sums, counts: Counts) -> None:
        """Add a batch, (batch, token), to sums and counts in place."""
        copies = 2 * self.targets_at_once
        with self._cut() as record, _attention(input_ids):
            token_logits(self.decomposition.model, input_ids.repeat(copies, 1))
        with torch.no_grad():
            active = self._activations(record, input_ids, copies)
            self._count(active, input_ids, counts)
        tokens = _Tokens(input_ids)
        for name in self.targets:
            self._add_target(name, record, active, tokens, sums)

    def _add_target(
        self,
        name: str,
        record: Cut,
        active: Mapping[str, _Active],
        tokens: _Tokens,
        sums: Sums,
    ) -> None:
        """Add what one layer of targets has from a batch."""
        sources = [source for to, source in self.edges if to == name]
        if not sources:
            return
        blocks: list[tuple[np.ndarray, dict[str, tuple[Columns, Tensor]]]] = []
        for indices, gradients in self._backward(self.targets[name], active[name], record, sources):
            shape = (2, self.targets_at_once, len(tokens.place), -1)
            reached = {}
            for source in sources:
                gradient = gradients[self._module_of(source)]
                if gradient is not None:
                    reached[source] = gradient.reshape(shape)[:, : len(indices)]
            blocks.append((indices, self._attributions(reached, record, active, tokens)))
            if sum(len(done) for done, _ in blocks) >= KEPT_TARGETS:
                _add_blocks(name, blocks, sums)
                blocks = []
        _add_blocks(name, blocks, sums)

    @torch.no_grad()
    def _attributions(
        self,
        gradients: Mapping[str, Tensor],
        record: Cut,
        active: Mapping[str, _Active],
        tokens: _Tokens,
    ) -> dict[str, tuple[Columns, Tensor]]:
        """From gradients (2, target, position, width) of sources' modules, which get what.

        Sums over positions, (metric, target, source): of a, of a with |y|, and of a².
        """
        found: dict[str, tuple[Columns, Tensor]] = {}
        alike: dict[tuple[int, int], list[str]] = {}
        for source, gradient in gradients.items():
            if source == EMBED:
                embedded = record.leaves[self.embedding].reshape(-1, *gradient.shape[2:])[0]
                found[source] = tokens.ids, _by_token(gradient, embedded, tokens)
            elif self._writes_features(source, active[source]):
                alike.setdefault((gradient.data_ptr(), gradient.shape[-1]), []).append(source)
            else:
                part = _by_component(gradient, self.components[source], active[source])
                found[source] = active[source].live, part
        for sources in alike.values():
            weighted = torch.stack([active[source].weighted for source in sources])
            parts = _by_feature(gradients[sources[0]], weighted)
            found |= {source: (None, part) for source, part in zip(sources, parts, strict=True)}
        return found

    def _writes_features(self, source: str, seen: _Active) -> bool:
        """Whether its components are its module's output features, all of them and in order."""
        part = self.components[source]
        return part.U is None and part.linear.rows is None and seen.live is None

    def _module_of(self, source: str) -> str:
        return self.embedding if source == EMBED else self.components[source].linear.module

    @contextmanager
    def _cut(self) -> Iterator[Cut]:
        """Cut the next forward pass at components and embedding, and end it before logits."""
        model = self.decomposition.model

        def keep(hidden: Tensor) -> Tensor:
            record.inputs[self.unembedding] = hidden.clone()
            return hidden.detach().clone()  # in place of logits, which would be large

        embedding = model.get_submodule(self.embedding)
        head = model.get_submodule(self.unembedding)
        with (
            self.decomposition.cut() as record,
            cut_at(embedding, self.embedding, record),
            replaced_forward(head, keep),
        ):
            yield record

    def _find_edges(self, input_ids: Tensor) -> tuple[list[Edge], int]:
        """See what targets depend on, and how many bytes the widest tensor of a batch takes."""
        with self._cut() as record:
            token_logits(self.decomposition.model, input_ids)
        self._check_shapes(record, input_ids)
        edges: list[Edge] = []
        for name, target in self.targets.items():
            given = record.inputs[target.linear.module]
            if not given.requires_grad:
                continue
            found = torch.autograd.grad(
                given,
                list(record.leaves.values()),
                torch.ones_like(given),
                retain_graph=True,
                allow_unused=True,
            )
            reached = {m for m, g in zip(record.leaves, found, strict=True) if g is not None}
            edges += [
                (name, source)
                for source in (EMBED, *self.components)
                if source in self.sources and self._module_of(source) in reached
            ]
        sizes = [4 * part.size * input_ids.numel() for part in self.components.values()]
        return edges, max(*(leaf.nbytes for leaf in record.leaves.values()), *sizes)

    def _check_shapes(self, record: Cut, input_ids: Tensor) -> None:
        modules = [part.linear.module for part in self.components.values()]
        for module in (self.embedding, *modules, self.unembedding):
            seen = record.leaves.get(module, record.inputs.get(module))
            if seen is None or seen.numel() // seen.shape[-1] != input_ids.numel():
                raise ValueError(
                    f"{module} runs on {'nothing' if seen is None else tuple(seen.shape)} for "
                    f"input_ids of shape {tuple(input_ids.shape)}: components need one activation "
                    "per token. Leave its layer out"
                )

    def _activations(self, record: Cut, ids: Tensor, copies: int) -> dict[str, _Active]:
        """Activations and importances of all components and targets; copies are all alike."""
        found = {}
        for name, part in {**self.targets, **self.components}.items():
            given = record.inputs[part.linear.module].detach()
            found[name] = part.activations(given.reshape(copies, ids.numel(), -1)[0])
        importances = self._importances({name: found[name] for name in self.components}, ids)
        active = {}
        for name, activations in found.items():
            importance = importances.get(name)
            if name in self.alive:
                one = torch.ones_like(activations) if importance is None else importance
                importance = one * self.alive[name].to(activations)
            live = None if importance is None else (importance != 0).any(0).nonzero()[:, 0]
            if live is not None and len(live) == activations.shape[1]:
                live = None
            active[name] = _Active(activations, importance, live)
        return active

    def _importances(self, activations: dict[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
        if self.importance is None:
            return {}
        shaped = {name: found.view(*ids.shape, -1) for name, found in activations.items()}
        given: Any = self.importance(shaped, ids)
        if not isinstance(given, Mapping):
            raise TypeError(
                f"importance gave {type(given).__name__}: it must give a dict of layer to "
                "a tensor of importances (batch, token, C)"
            )
        checked = {}
        for name, importance in given.items():
            if name not in activations:
                raise ValueError(
                    f"importance gave {name!r}, which is none of {', '.join(activations)}"
                )
            if not isinstance(importance, Tensor):
                raise TypeError(
                    f"importance gave {type(importance).__name__} for {name}: it must be a tensor "
                    f"of shape {tuple(shaped[name].shape)}, as its activations"
                )
            if importance.shape != shaped[name].shape:
                raise ValueError(
                    f"importance gave {tuple(importance.shape)} for {name}, whose activations are "
                    f"{tuple(shaped[name].shape)}"
                )
            checked[name] = importance.detach().to(activations[name]).view_as(activations[name])
            if not torch.isfinite(checked[name]).all():
                raise ValueError(f"importance gave numbers for {name} that are not finite")
        return checked

    def _count(self, active: dict[str, _Active], ids: Tensor, counts: Counts) -> None:
        for name, seen in active.items():
            if name not in counts:
                continue
            squares = seen.activations.double().square().sum(0)
            if not torch.isfinite(squares).all():
                raise _not_finite(f"activations of {name}")
            counts[name]["square_sum"] += squares.cpu().numpy()
            if "active" not in counts[name]:
                continue
            if seen.importance is None:
                counts[name]["mean_importance_sum"] += ids.numel()
                counts[name]["active"] += ids.numel() * (self.threshold < 1)
            else:
                total = seen.importance.double().sum(0)
                counts[name]["mean_importance_sum"] += total.cpu().numpy()
                above = (seen.importance > self.threshold).sum(0)
                counts[name]["active"] += above.cpu().numpy()
        occurrences = counts[EMBED]["occurrences"]
        occurrences += np.bincount(ids.cpu().numpy().reshape(-1), minlength=len(occurrences))

    def _backward(
        self, target: Components, seen: _Active, record: Cut, sources: Sequence[str]
    ) -> Iterator[tuple[np.ndarray, dict[str, Tensor | None]]]:
        """Give indices of targets, and by module the gradients of all copies, y before |y|."""
        given = record.inputs[target.linear.module]
        modules = list(dict.fromkeys(self._module_of(source) for source in sources))
        leaves = [record.leaves[module] for module in modules]
        live = _live(target, seen)
        with torch.no_grad():
            reads, weights = _reads(target, live), _weights(seen)
        for start in range(0, len(live), self.targets_at_once):
            part = slice(start, start + self.targets_at_once)
            with torch.no_grad():
                upstream = weights[:, part, :, None] * reads[part, None, :]  # (2, k, n, d_in)
                if unused := self.targets_at_once - upstream.shape[1]:
                    upstream = nn.functional.pad(upstream, (0, 0, 0, 0, 0, unused))
                upstream = upstream.to(given.dtype).reshape(given.shape)
            found = torch.autograd.grad(
                given, leaves, upstream, retain_graph=True, allow_unused=True
            )
            yield live[part].cpu().numpy(), dict(zip(modules, found, strict=True))


def _reads(target: Components, live: Tensor) -> Tensor:
    """What live targets read of their map's input, (live target, d_in)."""
    if target.V is None:
        return nn.functional.one_hot(live, target.size)
    return target.V[:, live].T.contiguous()


def _weights(seen: _Active) -> Tensor:
    """Of each position in y and in |y|, (2, live target, n)."""
    activations = _columns(seen.activations, seen.live)
    weight = torch.ones_like(activations)
    if seen.importance is not None:
        weight = _columns(seen.importance, seen.live)
    return torch.stack([weight.T, (weight * activations.sign()).T])


def _attention(input_ids: Tensor) -> AbstractContextManager[None]:
    """On a CPU, short sequences go back through plain attention in a third of the time."""
    if input_ids.device.type == "cpu" and input_ids.shape[1] <= SHORT:
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


def _not_finite(what: str) -> FloatingPointError:
    return FloatingPointError(
        f"{what} are infinite or NaN, and so would be all sums: load the model in a wider dtype"
    )


def _live(target: Components, seen: _Active) -> Tensor:
    if seen.live is not None:
        return seen.live
    return torch.arange(target.size, device=seen.activations.device)


def _columns(values: Tensor, columns: Columns) -> Tensor:
    return values if columns is None else values[:, columns]


def _by_component(gradients: Tensor, part: Components, seen: _Active) -> Tensor:
    rows = part.linear.rows
    if rows is not None and len(rows) == rows[-1] - rows[0] + 1:
        gradients = gradients[..., rows[0] : rows[-1] + 1]
    elif rows is not None:
        gradients = gradients[..., torch.from_numpy(rows).to(gradients.device)]
    slopes = part.slopes(gradients, seen.live).to(seen.activations.dtype)
    weighted = seen.weighted
    attributions = slopes * weighted if part.U is None else slopes.mul_(weighted)  # else a gradient
    return _summed(attributions)


def _summed(attributions: Tensor) -> Tensor:
    """The three sums over positions; takes the memory of what it is given."""
    signed, absolute = attributions.sum(2)
    return torch.stack([signed, absolute, attributions[0].square_().sum(1)])


class _Tokens:
    """The ids of a batch that occur, and which of them each position has."""

    def __init__(self, input_ids: Tensor) -> None:
        self.ids, self.place = input_ids.cpu().reshape(-1).unique(return_inverse=True)


def _by_feature(gradients: Tensor, weighted: Tensor) -> Tensor:
    """The same sums, (source, metric, target, feature), of sources that share a gradient.

    What layers write to the residual stream does, and a product per feature takes all of them, from
    ``weighted`` (source, position, feature).
    """
    gradients = gradients.to(weighted.dtype)
    if len(weighted) == 1:
        return _summed(gradients * weighted)[None]
    count = gradients.shape[1]
    by_feature = gradients.flatten(0, 1).permute(2, 0, 1).contiguous()  # (feature, 2 target, n)
    given = weighted.permute(2, 1, 0).contiguous()
    sums = by_feature @ given
    squares = by_feature[:, :count].square() @ given.square()
    return torch.cat([sums, squares], 1).permute(2, 1, 0).unflatten(1, (3, count))


def _by_token(gradients: Tensor, embedded: Tensor, tokens: _Tokens) -> Tensor:
    """The same sums for the ids that occur, over the positions of each."""
    wide = torch.promote_types(embedded.dtype, torch.float32)
    found = (gradients.to(wide) * embedded.to(wide)).sum(-1)
    found = found.cpu().double()  # on a GPU, index_add has no fixed order
    attributions = torch.stack([found[0], found[1], found[0].square()])
    empty = found.new_zeros(*attributions.shape[:2], len(tokens.ids))
    return empty.index_add_(2, tokens.place, attributions)


def _add_blocks(
    target: str, blocks: list[tuple[np.ndarray, dict[str, tuple[Columns, Tensor]]]], sums: Sums
) -> None:
    """Add what some targets of a layer have, by source, to the sums."""
    if not blocks:
        return
    indices = np.concatenate([indices for indices, _ in blocks])
    for source, (columns, _) in blocks[0][1].items():
        found = torch.cat([parts[source][1] for _, parts in blocks], 1)
        values_of = found.double().cpu().numpy()
        if not np.isfinite(values_of.sum()):
            raise _not_finite(f"attributions from {source} to {target}")
        for metric, values in zip(METRICS, values_of, strict=True):
            _add(sums[metric][target, source], indices, columns, values)


def _add(total: np.ndarray, rows: np.ndarray, columns: Columns, part: np.ndarray) -> None:
    if columns is None and len(rows) == rows[-1] - rows[0] + 1:
        total[rows[0] : rows[-1] + 1] += part
    elif columns is None:
        total[rows] += part
    else:
        total[np.ix_(rows, columns.cpu().numpy())] += part
