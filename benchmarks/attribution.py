"""Attributions of four batches, against a loop with two backward passes for each target component.

    python -m benchmarks.attribution [--rounds 5]

A GPT-2 of 2 layers, all neurons and all directions of the residual stream as targets. The loop is
the oracle of the tests: plain autograd from y and from |y|. Both must give the same sums; neither
writes a store.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from basinscope.attribution.backward import BatchAttribution
from basinscope.attribution.harvest import _count_shapes, _ends, _targets
from basinscope.models.canonical import weight_of
from basinscope.models.components import Components, neurons
from benchmarks.harness import paired, parser, record
from tests.reference.attribution import METRICS, Attributions, Map, attributions

BATCHES = 4
SIZES = {"toy": (16, 1, 2, 8), "tiny": (32, 2, 2, 16)}  # width, layers, sequences, tokens
VOCABULARY = 100


def main() -> None:
    asked = parser(__doc__, "attribution.jsonl").parse_args()
    size = "toy" if asked.toy else "tiny"
    model, input_ids = inputs(*SIZES[size])
    components = neurons(model)
    maps = maps_of(model, components)
    ours, peer = (
        partial(batched, model, components, input_ids),
        partial(loop, model, maps, input_ids),
    )
    require_same(ours(), peer())
    figures = paired(ours, peer, asked.rounds)
    targets = sum(part.size for part in components.values()) + SIZES[size][0]
    record(
        asked.out,
        "attribution",
        {
            "size": size,
            "targets": targets,
            "tokens": input_ids.numel(),
            "threads": torch.get_num_threads(),
        },
        figures,
    )


def inputs(width: int, layers: int, sequences: int, tokens: int) -> tuple[nn.Module, Tensor]:
    """Make a model, and ids (batch, sequence, token)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gpt2", n_embd=width, n_layer=layers, n_head=4, n_positions=tokens, vocab_size=VOCABULARY,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    return model, torch.randint(0, VOCABULARY, (BATCHES, sequences, tokens))


def batched(model: nn.Module, components: Mapping[str, Components], ids: Tensor) -> Attributions:
    """Sums over all batches, preparation included."""
    embedding, unembedding, head = _ends(model)
    targets = _targets(components, None, (), unembedding, head)
    attribution = BatchAttribution(
        model, components, targets, embedding=embedding, unembedding=unembedding, importance=None,
        importance_threshold=0.0, alive={}, targets_at_once=None, input_ids=ids[0],
    )  # fmt: skip
    sizes = {name: part.size for name, part in targets.items()} | {"embed": VOCABULARY}
    sums = {m: {e: np.zeros([sizes[n] for n in e]) for e in attribution.edges} for m in METRICS}
    shapes = _count_shapes(components, targets, VOCABULARY)
    counts = {n: {c: np.zeros(shape) for c, shape in s.items()} for n, s in shapes.items()}
    for batch in ids:
        attribution.add(batch, sums, counts)
    return sums


def loop(model: nn.Module, maps: Mapping[str, Map], ids: Tensor) -> Attributions:
    """The same, two backward passes for each target."""
    parts = [attributions(model, batch, maps) for batch in ids]
    return {m: {e: sum(part[m][e] for part in parts) for e in parts[0][m]} for m in METRICS}


def maps_of(model: nn.Module, components: Mapping[str, Components]) -> dict[str, Map]:
    """Write components out for the loop."""
    maps = {}
    for name, part in components.items():
        d_out, d_in = weight_of(model, part.linear).shape
        V = torch.eye(d_in) if part.V is None else part.V
        U = torch.eye(d_out) if part.U is None else part.U
        rows: Any = range(d_out) if part.linear.rows is None else part.linear.rows.tolist()
        maps[name] = Map(part.linear.module, rows, V, U)
    return maps


def require_same(ours: Attributions, peer: Attributions) -> None:
    """Raise if sums differ by more than rounding, relative to the norm of a pair of layers.

    Where a norm comes right after the only source there is, gradients cancel to nothing: what is
    below a millionth of the largest attribution is rounding.
    """
    for metric in METRICS:
        largest = max(np.abs(values).max() for values in peer[metric].values())
        for edge, values in peer[metric].items():
            error = np.linalg.norm(ours[metric][edge] - values)
            if error > 1e-4 * np.linalg.norm(values) + 1e-6 * largest:
                raise AssertionError(f"{metric} of {edge} differs by {error}")


if __name__ == "__main__":
    sys.exit(main())
