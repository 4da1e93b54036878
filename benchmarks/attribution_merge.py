"""Peak memory and rate of merging parts of a dataset attribution.

    python -m benchmarks.attribution_merge                     # eight parts of 500 MB
    python -m benchmarks.attribution_merge --parts 3 --megabytes 60

The merge runs in a process of its own, whose peak resident memory beyond that after the imports is
measured. ``share_of_copy`` is the time of a plain copy of all parts' files over that of the merge.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import parser, record

LIMIT = 400 * 10**6  # bytes beyond the interpreter's own
LAYERS = 3


def main() -> int:
    options = parser(__doc__, "attribution.jsonl")
    options.add_argument("--parts", type=int, default=8)
    options.add_argument("--megabytes", type=int, default=500, help="of sums in each part")
    options.add_argument("--in-process", nargs="+", metavar="PATH", help="internal")
    asked = options.parse_args()
    if asked.in_process:
        print(json.dumps(peak_growth(asked.in_process[:-1], asked.in_process[-1])))
        return 0
    settings = {"parts": 3, "megabytes": 20} if asked.toy else vars(asked)
    settings = {name: settings[name] for name in ("parts", "megabytes")}
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), **settings)
    record(asked.out, "attribution merge", settings, figures)
    return 0 if figures["within"] else 1


def measure(folder: Path, parts: int, megabytes: int) -> dict[str, Any]:
    """Write parts of random sums and merge them in another process."""
    paths = [folder / f"{rank}.zarr" for rank in range(parts)]
    for rank, path in enumerate(paths):
        write_part(path, rank, parts, megabytes)
    command = [sys.executable, "-m", "benchmarks.attribution_merge", "--in-process"]
    done = subprocess.run(
        [*command, *map(str, paths), str(folder / "merged.zarr")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    sizes = [sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) for path in paths]
    start = time.perf_counter()
    for path in paths:
        shutil.copytree(path, folder / "copy" / path.name)
    copied = time.perf_counter() - start
    return {
        **figures,
        "within": figures["peak_growth_mib"] * 2**20 <= LIMIT,
        "part_mib": round(sizes[0] / 2**20, 1),
        "mb_per_s": round(sum(sizes) / 1e6 / figures["seconds"], 1),
        "share_of_copy": round(copied / figures["seconds"], 3),
    }


def write_part(path: Path, rank: int, world: int, megabytes: int) -> None:
    """Write one rank's part: layers of equal size, each a source of those after it."""
    from basinscope.io.attributions import AttributionWriter
    from basinscope.io.attributions_layout import METRICS

    layers = [f"{i}.mlp.up" for i in range(LAYERS)]
    edges = [(target, source) for i, target in enumerate(layers) for source in layers[:i]]
    size = int(np.sqrt(megabytes * 1e6 / (8 * len(METRICS) * len(edges))))
    fields = {layer: {"module": layer, "size": size, "kind": "neurons"} for layer in layers}
    names = ("mean_importance_sum", "active", "square_sum")
    rng = np.random.default_rng(rank)
    with AttributionWriter.create_or_continue(
        path,
        metadata={
            "model": {"class": "random"}, "layers": fields, "importance_threshold": 0.0,
            "output_token_ids": [], "dataset_fingerprint": "random", "batch_size": 1,
            "n_batches": world, "parts": [[rank, world]],
        },
        edges={edge: (size, size) for edge in edges},
        counts={layer: {name: (size,) for name in names} for layer in layers},
    ) as writer:  # fmt: skip
        sums = {m: {e: rng.standard_normal((size, size)) for e in edges} for m in METRICS}
        counts = {layer: {name: rng.random(size) for name in names} for layer in layers}
        writer.save(sums, counts, tokens=1000, batches_done=1)
        writer.finish()


def peak_growth(paths: list[str], output: str) -> dict[str, Any]:
    """Merge in this process; say how far its memory rose, and how long it took."""
    import psutil

    from basinscope.io.attributions_merge import merge_attributions
    from benchmarks.harness import own_peak_memory

    before = psutil.Process().memory_info().rss
    start = time.perf_counter()
    merge_attributions(paths, output)
    seconds = time.perf_counter() - start
    return {
        "peak_growth_mib": round((own_peak_memory() - before) / 2**20, 1),
        "seconds": round(seconds, 2),
    }


if __name__ == "__main__":
    sys.exit(main())
