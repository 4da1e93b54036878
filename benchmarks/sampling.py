"""sample() against devinterp 2.0.1: the same model, data and settings, store included.

    python -m benchmarks.sampling [--sizes 42k 1M 27M] [--rounds 5]
    python -m benchmarks.sampling --device cuda [--sizes 1M 70M 410M 1.4B]

GPT-NeoX from a config, random weights, random tokens; two observables of 3 and 2 batches on
different data, so that each draw costs five observable batches, and the defaults' 32 batches of
initial loss per 200 draws. A ratio is peer seconds / our seconds for a whole call: copying the
model, initial losses, chains, and a finished store. The floor is the model's own work for the same
steps, and nothing else: forward and backward of the batches, forwards of the observables. Peak
memory is that of a process of its own that makes one such call, imports included: the median of
three processes of each, in turn.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import shutil
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from functools import partial
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
    # the shapes of Pythia
    "70M": {"hidden": 512, "layers": 6, "heads": 8, "vocab": 50304, "tokens": 256, "batch": 16},
    "410M": {"hidden": 1024, "layers": 24, "heads": 16, "vocab": 50304, "tokens": 256, "batch": 16},
    "1.4B": {"hidden": 2048, "layers": 24, "heads": 16, "vocab": 50304, "tokens": 256, "batch": 16},
}
USUAL = {"cpu": ["42k", "1M", "27M"], "cuda": ["1M", "70M", "410M", "1.4B"]}
# chains and draws: as many steps as a call of some tens of seconds has room for
RUNS = {
    **{"toy": (1, 2), "42k": (4, 200), "1M": (4, 25), "27M": (2, 4)},
    **{"70M": (2, 50), "410M": (2, 20), "1.4B": (1, 10)},
}
INIT_BATCHES_PER_DRAW = 32 / 200


def main() -> int:
    options = parser(__doc__, "sampling.jsonl")
    options.add_argument("--sizes", nargs="+", choices=SIZES, help="default: as above")
    options.add_argument("--device", choices=USUAL, default="cpu")
    options.add_argument("--graph", action="store_true", help="ours with cuda_graph=True")
    options.add_argument("--no-memory", action="store_true", help="skip peak memory")
    options.add_argument("--one", nargs=3, metavar=("WHO", "SIZE", "METRICS"), help=_ONE)
    asked = options.parse_args()
    if asked.one:
        who, size, metrics = asked.one
        run(who, size, metrics == "metrics")
        print(own_peak_memory())
        return 0
    extra = {"cuda_graph": True} if asked.graph else {}
    failed = 0
    for size in ["toy"] if asked.toy else asked.sizes or USUAL[asked.device]:
        for metrics in (False, True):
            try:
                compare(asked, size, metrics, extra)
            except Exception:  # the other sizes are worth their time all the same
                failed += 1
                print(f"sampling {size}: failed", flush=True)
                traceback.print_exc()
    return failed


def compare(asked: argparse.Namespace, size: str, metrics: bool, extra: dict[str, Any]) -> None:
    """Time whole calls of one size, and record the result."""
    figures = paired(
        partial(run, "basinscope", size, metrics, asked.device, **extra),
        partial(run, "devinterp", size, metrics, asked.device),
        asked.rounds,
    )
    figures["floor_s"] = round(min(floor_seconds(size, asked.device) for _ in range(2)), 4)
    figures["floor_share"] = round(figures["floor_s"] / figures["ours_s"], 3)
    if not asked.no_memory and asked.device == "cpu":
        figures |= peaks(size, metrics, processes=1 if asked.toy else 3)
    chains, draws = RUNS[size]
    settings = {"size": size, "metrics": metrics, "chains": chains, "draws": draws}
    settings["threads"] = torch.get_num_threads()
    if asked.device == "cuda":
        settings |= {"device": torch.cuda.get_device_name(), **extra}
    record(asked.out, "sampling", settings, figures)


_ONE = "make one call and print this process's peak memory (used by the memory measurement)"


def run(who: str, size: str, metrics: bool, device: str = "cpu", **extra: Any) -> None:
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
                    **settings(size, device),
                    save_metrics=metrics,
                    output_path=directory / "samples.zarr",
                    progress=False,
                    **extra,
                )
            else:
                from devinterp.slt.sampling import sample

                sample(
                    *inputs(size),
                    **settings(size, device),
                    save_metrics=metrics,
                    output_path=directory / "samples.zarr",
                )
    finally:
        shutil.rmtree(directory)


def peaks(size: str, metrics: bool, processes: int) -> dict[str, int]:
    """Give the median peak memory of processes that make one call each, in MiB."""
    found: dict[str, list[int]] = {"ours_peak_mib": [], "peer_peak_mib": []}
    word = "metrics" if metrics else "plain"
    for _ in range(processes):
        for who, peak in zip(("basinscope", "devinterp"), found.values(), strict=True):
            peak.append(peak_memory("benchmarks.sampling", "--one", who, size, word))
    return {key: round(statistics.median(peak) / 2**20) for key, peak in found.items()}


def floor_seconds(size: str, device: str = "cpu") -> float:
    """Time the model's own work for the steps of a run, on all threads."""
    model, dataset, observables = inputs(size)
    model = copy.deepcopy(model).to(device)
    chains, draws = RUNS[size]
    batch = SIZES[size]["batch"]
    ids = dataset[:batch]["input_ids"].to(device)
    observed = [data[i * batch : (i + 1) * batch]["input_ids"].to(device)
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
    if device == "cuda":
        torch.cuda.synchronize()
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


def settings(size: str, device: str) -> dict[str, Any]:
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
        "device": device,
    }


if __name__ == "__main__":
    sys.exit(main())
