"""Extracting activations: what the hooks cost, and how much a streamed data set holds.

    python -m benchmarks.extraction [--rounds 15]

Hooks: the residual stream after every layer, all positions, against a bare forward pass of the same
batch, without gradients: through all of the model ("forward"), and of its layers alone, without
the head ("layers"), which is all that an extraction without logits runs. Memory: the same
activations of a data set, 2 GB of them, streamed to a store by a process of its own; "growth_mib"
is its peak beyond what it held with the model loaded, before any forward pass.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import own_peak_memory, paired, parser, record
from benchmarks.sampling import SIZES, inputs

MIB = 2**20


def main() -> None:
    options = parser(__doc__, "extraction.jsonl")
    options.add_argument("--stream", choices=list(SIZES), help=argparse_help())
    options.add_argument("--gigabytes", type=float, default=2.0)
    options.set_defaults(rounds=15)
    asked = options.parse_args()
    if asked.stream:
        print(stream(asked.stream, asked.gigabytes))
        return
    threads = {"threads": torch.get_num_threads()}
    for size in ["toy"] if asked.toy else ["1M", "27M"]:
        for against in ("forward", "layers"):
            settings = {"size": size, "against": against, **threads}
            record(asked.out, "extraction hooks", settings, hooks(size, against, asked.rounds))
    size, gigabytes = ("toy", 0.01) if asked.toy else ("27M", asked.gigabytes)
    command = [sys.executable, "-m", "benchmarks.extraction"]
    command += ["--stream", size, "--gigabytes", str(gigabytes)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    growth = int(done.stdout.splitlines()[-1]) / MIB
    settings = {"size": size, "gigabytes": gigabytes, **threads}
    record(asked.out, "extraction memory", settings, {"growth_mib": round(growth)})


def argparse_help() -> str:
    return "stream a data set of this model and print the growth in bytes (for its own process)"


def hooks(size: str, against: str, rounds: int) -> dict[str, Any]:
    """Pair an extraction with a bare pass; "cost" is our seconds over the pass's, less one."""
    from basinscope.models.extraction import ExtractionConfig, Extractor

    model, dataset, _ = inputs(size)
    model.eval()
    ids = torch.as_tensor(dataset[: SIZES[size]["batch"]]["input_ids"])
    extractor = Extractor(model, ExtractionConfig(resid_out=True, input_ids=False))
    bare = partial(forward, model if against == "forward" else model.base_model, ids)
    passes = max(1, int(0.1 / seconds(bare)))  # short ones are timed several at a time
    figures = paired(
        lambda: [extractor(ids) for _ in range(passes)],
        lambda: [bare() for _ in range(passes)],
        rounds,
    )
    return {"cost": round(1 / figures["ratio"] - 1, 3), "passes": passes, **figures}


@torch.no_grad()
def forward(module: Any, ids: torch.Tensor) -> Any:
    return module(ids, use_cache=False)


def seconds(work: Any) -> float:
    import time

    work()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def stream(size: str, gigabytes: float) -> int:
    """Stream so many activations; give the growth of this process in bytes."""
    import psutil
    from datasets import Dataset

    from basinscope.extraction import extract_dataset
    from basinscope.models.extraction import ExtractionConfig

    model, dataset, _ = inputs(size)
    ids = torch.as_tensor(dataset[:]["input_ids"])
    per_example = ids.shape[1] * model.config.hidden_size * model.config.num_hidden_layers * 4
    count = max(2, round(gigabytes * 1e9 / per_example))
    data = Dataset.from_dict({"input_ids": ids[torch.arange(count) % len(ids)].numpy()})
    del ids
    before = psutil.Process().memory_info().rss
    with tempfile.TemporaryDirectory(prefix="benchmark-extraction-") as directory:
        extract_dataset(
            model,
            data,
            ExtractionConfig(resid_out=True),
            output=Path(directory) / "activations.zarr",
            batch_size=SIZES[size]["batch"],
            progress=False,
        )
    return own_peak_memory() - before


if __name__ == "__main__":
    sys.exit(main())
