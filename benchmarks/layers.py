"""A linear layer in float32 on a CPU, forward and backward, against torch's own.

    python -m benchmarks.layers [--rounds 15]

All three products of a layer: its output, and the gradients of its input and weight. With all
threads and with one, as chains side by side have. ``ours_error`` and ``peer_error`` are the largest
of the three ‖found - exact‖ / ‖exact‖, exact in float64. ``onednn`` says whether oneDNN takes
layers on this processor; where it does not, both sides are torch's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from basinscope.kernels.linear import linear, uses_onednn
from benchmarks.harness import paired, parser, record

# rows, width, outputs
SHAPES = [(1024, 128, 512), (1024, 512, 512), (1024, 512, 2048), (1024, 2048, 512)]
TOY = [(8, 16, 12)]

Layer = Callable[[Tensor, Tensor, Tensor], Tensor]


def main() -> None:
    options = parser(__doc__, "layers.jsonl")
    asked = options.parse_args()
    for shape in TOY if asked.toy else SHAPES:
        for threads, figures in measure(shape, asked.rounds).items():
            settings = {"shape": list(shape), "threads": threads, "onednn": uses_onednn()}
            record(asked.out, "layers", settings, figures)


def measure(shape: tuple[int, int, int], rounds: int) -> dict[int, dict[str, Any]]:
    """Compare one layer, by number of threads."""
    rows, width, outputs = shape
    torch.manual_seed(0)
    given = [torch.randn(size) for size in ((rows, width), (outputs, width), (outputs,))]
    upstream = torch.randn(rows, outputs)
    exact = products(functional.linear, *(t.double() for t in (*given, upstream)))

    def error(layer: Layer) -> float:
        found = products(layer, *given, upstream)
        apart = [float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]
        return float(f"{max(apart):.3g}")

    ours, theirs = (
        partial(products, layer, *given, upstream) for layer in (linear, functional.linear)
    )
    errors = {"ours_error": error(linear), "peer_error": error(functional.linear)}
    threads = torch.get_num_threads()
    measured = {}
    for count in sorted({1, threads}):
        torch.set_num_threads(count)
        figures = paired(ours, theirs, rounds)
        for who in ("ours", "peer"):
            flops = 3 * 2 * rows * width * outputs
            figures[f"{who}_gflop_per_s"] = round(flops / max(figures[f"{who}_s"], 1e-4) / 1e9)
        measured[count] = figures | errors
    torch.set_num_threads(threads)
    return measured


def products(
    layer: Layer, x: Tensor, weight: Tensor, bias: Tensor, upstream: Tensor
) -> tuple[Tensor, ...]:
    """Output, and gradients of input, weight and bias."""
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    made = layer(*leaves)
    return made.detach(), *torch.autograd.grad(made, leaves, upstream)


if __name__ == "__main__":
    sys.exit(main())
