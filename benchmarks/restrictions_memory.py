"""Peak memory of one susceptibilities() call with 64 restrictions, against one with 1.

    python -m benchmarks.restrictions_memory [--restrictions 64] [--draws 10] [--rounds 3]

The demo's model (3 layers of 4 heads, untrained) and settings, on random bytes, with fewer draws.
Every head, layer, attention, MLP and embedding is a restriction, and pairs of heads make up the
rest; "full" comes on top. Each call runs in a process of its own, writes its stores to a temporary
directory and computes its result; the figure is the peak resident memory of that process, imports
included. A ratio is that of neighbours in time, 64 restrictions over one.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import warnings
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import parser, peak_memory, record

ROWS = 512


def main() -> None:
    options = parser(__doc__, "restrictions_memory.jsonl")
    options.add_argument("--restrictions", type=int, default=64)
    options.add_argument("--draws", type=int, default=10)
    options.add_argument("--one", type=int, metavar="COUNT", help="make one call (internal)")
    asked = options.parse_args()
    count, draws = (3, 2) if asked.toy else (asked.restrictions, asked.draws)
    if asked.one is not None:
        run(asked.one, draws, asked.toy)
        return
    pairs = [
        (peak(1, draws, asked.toy), peak(count, draws, asked.toy)) for _ in range(asked.rounds)
    ]
    ratios = [many / one for one, many in pairs]
    figures = {
        "ratio": round(statistics.median(ratios), 3),
        "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
        "one_mib": round(statistics.median(one for one, _ in pairs) / 2**20),
        "many_mib": round(statistics.median(many for _, many in pairs) / 2**20),
        "rounds": asked.rounds,
    }
    settings = {"restrictions": count, "draws": draws, "threads": torch.get_num_threads()}
    record(asked.out, "restrictions_memory", settings, figures)


def peak(count: int, draws: int, toy: bool) -> int:
    """Peak memory in bytes of a process that makes one call with ``count`` restrictions."""
    arguments = ["--one", str(count), "--draws", str(draws), *(["--toy"] if toy else [])]
    return peak_memory("benchmarks.restrictions_memory", *arguments)


def run(count: int, draws: int, toy: bool) -> None:
    """Make one call with ``count`` restrictions and "full", and compute its result."""
    import basinscope
    from basinscope import demo

    scale = demo.QUICK if toy else demo.FULL
    model = demo.build_model(scale)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = basinscope.susceptibilities(
            model,
            random_bytes(scale.row_length, seed=0),
            {"code": random_bytes(scale.row_length, 1), "prose": random_bytes(scale.row_length, 2)},
            {"full": None, **dict(islice(named_restrictions(model).items(), count))},
            sampling_task="code",
            lr=scale.lr,
            n_beta=scale.n_beta,
            localization=scale.localization,
            num_chains=demo.NUM_CHAINS,
            num_draws=draws,
            batch_size=scale.batch_size,
            num_init_loss_batches=draws,
            batches_per_draw=demo.OBSERVED_BATCHES,
            save_metrics=True,
            device="cpu",
            output_path=Path(folder) / "s.zarr",
            progress=False,
        )
        sus = result["susceptibilities"]["sus"].compute()
    assert sus.sizes["wr"] == count, sus.sizes
    assert np.isfinite(sus).all()


def named_restrictions(model: torch.nn.Module) -> dict[str, Any]:
    """Every part of a model, and then the pairs of its heads."""
    import basinscope

    heads = list(basinscope.all_heads(model))
    parts = [name for part in ("", "attn", "mlp") for name in basinscope.all_layers(model, part)]
    pairs = {f"{one}+{other}": [one, other] for one, other in combinations(heads, 2)}
    return {name: name for name in (*heads, *parts, "embed", "unembed")} | pairs


def random_bytes(length: int, seed: int) -> Any:
    """A data set of random bytes."""
    from datasets import Dataset

    ids = np.random.default_rng(seed).integers(0, 256, (ROWS, length))
    return Dataset.from_dict({"input_ids": ids})


if __name__ == "__main__":
    sys.exit(main())
