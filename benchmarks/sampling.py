"""sample() against devinterp 2.0.1: the same model, data and settings, store included.

    python -m benchmarks.sampling [--sizes 42k 1M 27M] [--rounds 5]

GPT-NeoX from a config, random weights, random tokens; two observables of 3 and 2 batches on
different data, so that each draw costs five observable batches, and the defaults' 32 batches of
initial loss per 200 draws. A ratio is peer seconds / our seconds for a whole call: copying the
model, initial losses, chains, and a finished store. The floor is the model's own work for the same
steps, and nothing else: forward and backward of the batches, forwards of the observables. Peak
memory is that of a process of its own that makes one such call, imports included.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import own_peak_memory, paired, parser, peak_memory, record

SIZES: dict[str, dict[str, int]] = {
    "toy": {"hidden": 8, "layers": 1, "heads": 1, "vocab": 32, "tokens": 8, "batch": 2},
    "42k": {"hidden": 32, "layers": 2, "heads": 4, "vocab": 256, "tokens": 32, "batch": 16},
    "1M": {"hidden": 128, "layers": 4, "heads": 4, "vocab": 1024, "tokens": 64, "batch": 16},
    "27M": {"hidden": 512, "layers": 6, "heads": 8, "vocab": 8192, "tokens": 128, "batch": 8},
}
# chains and draws: as many steps as a call of some tens of seconds has room for
RUNS = {"toy": (1, 2), "42k": (4, 200), "1M": (4, 25), "27M": (2, 4)}
INIT_BATCHES_PER_DRAW = 32 / 200


def main() -> None:
    options = parser(__doc__, "sampling.jsonl")
    options.add_argument("--sizes", nargs="+", choices=SIZES, default=["42k", "1M", "27M"])
    options.add_argument("--no-memory", action="store_true", help="skip peak memory")
    options.add_argument("--one", nargs=3, metavar=("WHO", "SIZE", "METRICS"), help=_ONE)
    asked = options.parse_args()
    if asked.one:
        who, size, metrics = asked.one
        run(who, size, metrics == "metrics")
        print(own_peak_memory())
        return
    for size in ["toy"] if asked.toy else asked.sizes:
        for metrics in (False, True):
            figures = paired(
                lambda size=size, metrics=metrics: run("basinscope", size, metrics),
                lambda size=size, metrics=metrics: run("devinterp", size, metrics),
                asked.rounds,
            )
            figures["floor_s"] = round(min(floor_seconds(size) for _ in range(2)), 4)
            figures["floor_share"] = round(figures["floor_s"] / figures["ours_s"], 3)
            if not asked.no_memory:
                word = "metrics" if metrics else "plain"
                for key, who in (("ours", "basinscope"), ("peer", "devinterp")):
                    peak = peak_memory("benchmarks.sampling", "--one", who, size, word)
                    figures[f"{key}_peak_mib"] = round(peak / 2**20)
            chains, draws = RUNS[size]
            settings = {"size": size, "metrics": metrics, "chains": chains, "draws": draws}
            settings["threads"] = torch.get_num_threads()
            record(asked.out, "sampling", settings, figures)


_ONE = "make one call and print this process's peak memory (used by the memory measurement)"


def run(who: str, size: str, metrics: bool) -> None:
    """Make one whole call into a fresh store."""
    directory = Path(tempfile.mkdtemp(prefix="benchmark-sampling-"))
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            if who == "basinscope":
                import basinscope

                basinscope.sample(
                    *inputs(size),
                    **settings(size),
                    save_metrics=metrics,
                    output_path=directory / "samples.zarr",
                    progress=False,
                )
            else:
                from devinterp.slt.sampling import sample

                sample(
                    *inputs(size),
                    **settings(size),
                    save_metrics=metrics,
                    output_path=directory / "samples.zarr",
                )
    finally:
        shutil.rmtree(directory)


def floor_seconds(size: str) -> float:
    """Time the model's own work for the steps of a run, on all threads."""
    model, dataset, observables = inputs(size)
    chains, draws = RUNS[size]
    batch = SIZES[size]["batch"]
    ids = dataset[:batch]["input_ids"]
    observed = [data[i * batch : (i + 1) * batch]["input_ids"]
                for data, count in observables.values() for i in range(count)]  # fmt: skip

    def loss(batch_ids: torch.Tensor) -> torch.Tensor:
        logits = model(batch_ids, use_cache=False, return_dict=False)[0][:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch_ids[:, 1:].flatten())

    start = time.perf_counter()
    for _ in range(chains * draws):
        loss(ids).backward()
        model.zero_grad(set_to_none=True)
        with torch.inference_mode():
            for batch_ids in observed:
                loss(batch_ids)
    return time.perf_counter() - start


def inputs(size: str) -> tuple[Any, Any, dict[str, Any]]:
    """Give the model, the sampling data set and the observables, the same for everyone."""
    if size not in _inputs:
        from datasets import Dataset
        from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

        shape = SIZES[size]
        torch.manual_seed(0)
        model = GPTNeoXForCausalLM(
            GPTNeoXConfig(
                vocab_size=shape["vocab"],
                hidden_size=shape["hidden"],
                num_hidden_layers=shape["layers"],
                num_attention_heads=shape["heads"],
                intermediate_size=4 * shape["hidden"],
                max_position_embeddings=2 * shape["tokens"],
            )
        )

        def rows(count: int, seed: int) -> Dataset:
            generator = np.random.default_rng(seed)
            ids = generator.integers(0, shape["vocab"], (count, shape["tokens"]))
            return Dataset.from_dict({"input_ids": ids}).with_format("torch")

        observables = {"first": (rows(100, 1), 3), "second": (rows(100, 2), 2)}
        _inputs[size] = (model, rows(400, 0), observables)
    return _inputs[size]


_inputs: dict[str, Any] = {}


def settings(size: str) -> dict[str, Any]:
    """Give the sampler's settings, the same for everyone."""
    chains, draws = RUNS[size]
    return {
        "lr": 1e-4,
        "n_beta": 10.0,
        "localization": 100.0,
        "num_chains": chains,
        "num_draws": draws,
        "batch_size": SIZES[size]["batch"],
        "num_init_loss_batches": max(1, round(draws * INIT_BATCHES_PER_DRAW)),
        "device": "cpu",
    }


if __name__ == "__main__":
    sys.exit(main())
