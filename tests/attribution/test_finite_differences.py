"""Harvested sums are what finite differences of the cut model say, without any backward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from basinscope.io.attributions_layout import METRICS
from basinscope.models.canonical import weight_of
from basinscope.models.components import Components, neurons, singular_directions
from tests.attribution.test_harvest import TOKENS, harvested
from tests.conftest import token_rows
from tests.models.test_components import built

STEP = 1e-5
EDGES = [  # into attention, inside it and inside an MLP, between layers, to the end
    ("0.attn.k", "embed"), ("1.attn.o", "1.attn.q"), ("1.attn.o", "1.attn.v"),
    ("0.mlp.down", "0.mlp.up"), ("1.attn.v", "0.mlp.down"), ("1.mlp.up", "0.attn.o"),
    ("output", "embed"), ("output", "1.mlp.down"), ("output_tokens", "0.attn.o"),
]  # fmt: skip


@pytest.mark.parametrize(
    "made", [neurons, lambda model: singular_directions(model, rank=2)], ids=["neurons", "rank 2"]
)
@pytest.mark.parametrize("name", ["gpt_neox", "gpt2"])
def test_one_entry_of_each_kind_of_edge(
    name: str, made: Callable[..., Any], tmp_path: Path
) -> None:
    model, dataset = built(name).double().requires_grad_(False), token_rows(2, 4, seed=1)
    components = made(model)
    store = harvested(model, dataset, tmp_path, components=components, output_tokens=TOKENS)
    ids = torch.as_tensor(np.asarray(dataset["input_ids"]))
    held = Held(model, components, ids)
    for target, source in EDGES:
        index = int(ids[0, 1]) if source == "embed" else 1
        expected = held.attributions(target, 1, source, index)
        for metric, value in zip(METRICS, expected, strict=True):
            got = np.asarray(store.sums(metric, target, source))[1, index]
            assert got == pytest.approx(value, rel=1e-5, abs=1e-9), (metric, target, source)


class Held:
    """A model whose component layers make what they made, plus a shift, plus the remainder's."""

    def __init__(self, model: Any, components: Mapping[str, Components], ids: Tensor) -> None:
        self.model, self.components, self.ids = model, components, ids
        names = {id(module): name for name, module in model.named_modules()}
        self.embedding = names[id(model.get_input_embeddings())]
        self.head = names[id(model.get_output_embeddings())]
        self.rest: dict[str, Tensor] = {}
        for part in components.values():
            module = part.linear.module
            if module not in self.rest:
                self.rest[module] = weight_of(model, whole(part)).T.clone()
            self.rest[module] -= reads(part) @ self.writes(part)
        self.given, self.made = self.run(lambda name, given, made: made)

    def attributions(self, target: str, t: int, source: str, s: int) -> tuple[float, float, float]:
        """Attr, attr_abs and mean_squared_attr: sums over the places of the source."""
        found = []
        for place in np.ndindex(*self.ids.shape):
            if source == "embed":
                if self.ids[place] != s:
                    continue
                direction, size, module = self.made[self.embedding][place], 1.0, self.embedding
            else:
                part = self.components[source]
                module = part.linear.module
                direction = self.writes(part)[s]
                size = float(self.given[module][place] @ reads(part)[:, s])
            ends = []
            for step in (STEP, -STEP):
                shift = torch.zeros_like(self.made[module])
                shift[place] = step * direction
                values = self.activations(target, module, shift)[..., t]
                ends.append((float(values.sum()), float(values.abs().sum())))
            found.append([(up - down) / (2 * STEP) * size for up, down in zip(*ends, strict=True)])
        signed, absolute = np.array(found).T
        return signed.sum(), absolute.sum(), (signed**2).sum()

    def activations(self, target: str, module: str, shift: Tensor) -> Tensor:
        def replaced(name: str, given: Tensor, made: Tensor) -> Tensor:
            if name == self.head:
                return made
            held = self.made[name]
            if name in self.rest:
                held = held + (given - self.given[name]) @ self.rest[name]
            return held + shift if name == module else held

        given, _ = self.run(replaced)
        if target == "output":
            return given[self.head]
        if target == "output_tokens":
            return given[self.head] @ self.model.get_submodule(self.head).weight[list(TOKENS)].T
        part = self.components[target]
        return given[part.linear.module] @ reads(part)

    def run(
        self, replaced: Callable[[str, Tensor, Tensor], Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What modules are given and make, by name."""
        given, made = {}, {}

        def hook(name: str) -> Callable[..., Tensor]:
            def kept(_: Any, args: tuple[Tensor], output: Tensor) -> Tensor:
                given[name], made[name] = args[0], replaced(name, args[0], output)
                return made[name]

            return kept

        names = (self.embedding, *self.rest, self.head)
        hooks = [self.model.get_submodule(n).register_forward_hook(hook(n)) for n in names]
        with torch.no_grad():
            self.model(self.ids, use_cache=False)
        for handle in hooks:
            handle.remove()
        return given, made

    def writes(self, part: Components) -> Tensor:
        """U (C, d_out of the module)."""
        module = part.linear.module
        rows = slice(None) if part.linear.rows is None else torch.from_numpy(part.linear.rows)
        full = torch.zeros(part.size, self.rest[module].shape[1], dtype=torch.float64)
        full[:, rows] = torch.eye(part.size, dtype=torch.float64) if part.U is None else part.U
        return full


def reads(part: Components) -> Tensor:
    assert part.V is not None
    return part.V


def whole(part: Components) -> Any:
    return type(part.linear)(part.linear.module, None, part.linear.transposed)
