"""Attributions of 16 batches, against a loop with two backward passes for each target component.

    python -m benchmarks.attribution [--rounds 5]

A GPT-2 of 2 layers, all neurons and all directions of the residual stream as targets. The loop cuts
the model in the same way, runs it once for a batch, and calls autograd for y and for |y| of each
target, over all of its sources. Both must give the same sums; neither writes a store. The smaller
the model, the more of a pass is overhead that targets share here: on a CPU, the ratio falls with
size.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from basinscope.attribution.backward import BatchAttribution
from basinscope.attribution.harvest import _count_shapes, _ends, _targets
from basinscope.io.attributions_layout import METRICS
from basinscope.models.components import Components, Cut, Decomposition, cut_at, neurons
from basinscope.models.forward import replaced_forward, token_logits
from benchmarks.harness import paired, parser, record

Attributions = Mapping[str, Mapping[tuple[str, str], np.ndarray]]

BATCHES = 16
SIZES = {  # width, layers, sequences, tokens
    "toy": (16, 1, 2, 8), "tiny": (32, 2, 2, 16), "small": (64, 2, 4, 32),
}  # fmt: skip
VOCABULARY = 100


def main() -> None:
    asked = parser(__doc__, "attribution.jsonl").parse_args()
    for size in ("toy",) if asked.toy else ("tiny", "small"):
        compare(size, asked.rounds, asked.out)


def compare(size: str, rounds: int, out: Path) -> None:
    """Time both on a model of one size."""
    model, input_ids = inputs(*SIZES[size])
    components = neurons(model)
    ours, peer = (partial(run, model, components, input_ids) for run in (batched, loop))
    require_same(ours(), peer())
    figures = paired(ours, peer, rounds)
    targets = sum(part.size for part in components.values()) + SIZES[size][0]
    record(
        out,
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
        model, components, targets, sources=["embed", *components], embedding=embedding,
        unembedding=unembedding, importance=None, importance_threshold=0.0, alive={},
        targets_at_once=None, input_ids=ids[0],
    )  # fmt: skip
    sizes = {name: part.size for name, part in targets.items()} | {"embed": VOCABULARY}
    sums = {m: {e: np.zeros([sizes[n] for n in e]) for e in attribution.edges} for m in METRICS}
    shapes = _count_shapes(components, targets, VOCABULARY)
    counts = {n: {c: np.zeros(shape) for c, shape in s.items()} for n, s in shapes.items()}
    for batch in ids:
        attribution.add(batch, sums, counts)
    return sums


def loop(model: nn.Module, components: Mapping[str, Components], ids: Tensor) -> Attributions:
    """The same, as one would write it by hand: two backward passes for each target component."""
    embedding, unembedding, _ = _ends(model)
    module = {name: part.linear.module for name, part in components.items()} | {"embed": embedding}
    decomposition = Decomposition(model, components)
    total: dict[Any, list[Tensor]] = {}
    for batch in ids:
        with decomposition.cut() as record, contextlib.ExitStack() as cut:
            cut.enter_context(cut_at(model.get_submodule(embedding), embedding, record))
            head = model.get_submodule(unembedding)
            cut.enter_context(replaced_forward(head, lambda hidden: hidden))
            residual = token_logits(model, batch)
        values = {name: part.activations(record.inputs[module[name]])
                  for name, part in components.items()}  # fmt: skip
        kept = {name: found.detach() for name, found in values.items()}
        kept["embed"] = record.leaves[embedding].detach()
        for target, of_target in {**values, "output": residual}.items():
            sources = _direct_sources(of_target, record, module)
            modules = list(dict.fromkeys(module[source] for source in sources))
            leaves = [record.leaves[name] for name in modules]
            for source in sources:
                width = VOCABULARY if source == "embed" else components[source].size
                if (target, source) not in total:
                    shape = (of_target.shape[-1], width)
                    total[target, source] = [torch.zeros(shape) for _ in METRICS]
            for index in range(of_target.shape[-1]):
                chosen = of_target[..., index]
                found = [
                    dict(
                        zip(modules, torch.autograd.grad(y, leaves, retain_graph=True), strict=True)
                    )
                    for y in (chosen.sum(), chosen.abs().sum())
                ]
                for source in sources:
                    slope, slope_abs = (gradients[module[source]] for gradients in found)
                    rows = None if source == "embed" else components[source].linear.rows
                    if rows is not None:  # of GPT-2 they are one block
                        slope, slope_abs = (
                            g[..., rows[0] : rows[-1] + 1] for g in (slope, slope_abs)
                        )
                    a, a_abs = slope * kept[source], slope_abs * kept[source]
                    sums = [out[index] for out in total[target, source]]
                    if source == "embed":
                        a, a_abs = a.sum(-1).flatten(), a_abs.sum(-1).flatten()
                        for out, part in zip(sums, (a, a_abs, a * a), strict=True):
                            out.index_add_(0, batch.flatten(), part)
                    else:
                        for out, part in zip(sums, (a, a_abs, a * a), strict=True):
                            out += part.sum((0, 1))
    return {
        metric: {edge: sums[number].double().numpy() for edge, sums in total.items()}
        for number, metric in enumerate(METRICS)
    }


def _direct_sources(values: Tensor, record: Cut, module: Mapping[str, str]) -> list[str]:
    leaves = list(record.leaves.values())
    found = torch.autograd.grad(values.sum(), leaves, retain_graph=True, allow_unused=True)
    reached = {name for name, g in zip(record.leaves, found, strict=True) if g is not None}
    return [source for source, name in module.items() if name in reached]


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
