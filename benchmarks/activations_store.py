"""Memory and speed of streaming activations to a store, and of finding one run of 10,000.

    python -m benchmarks.activations_store [--gigabytes 2] [--rounds 3]

Batches of 16 examples of 64 positions and 1024 numbers in 12 layers, which are random: what
compresses least. One batch is made and appended again and again by a process of its own. The
figure is its highest resident memory beyond what it had before the first append, that is with the
batch. The floor is the time that writing the same bytes to plain files takes, in the same round.
The query is timed in a fresh process, from the import on.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import own_peak_memory, parser, record

BATCH, POSITIONS, WIDTH, LAYERS = 16, 64, 1024, 12
RUNS = 10_000
TOY = {"gigabytes": 0.05, "rounds": 1}


def main() -> None:
    options = parser(__doc__, "activations_store.jsonl")
    options.set_defaults(rounds=3)
    options.add_argument("--gigabytes", type=float, default=2.0)
    options.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16")
    options.add_argument("--one", action="store_true", help="stream once (internal)")
    asked = options.parse_args()
    if asked.toy:
        vars(asked).update(TOY)
    batches = max(1, round(asked.gigabytes * 2**30 / batch_bytes(asked.dtype)))
    if asked.one:
        print(json.dumps(stream(batches, asked.dtype)))
        return
    runs = [in_own_process(asked.gigabytes, asked.dtype) for _ in range(asked.rounds)]
    figures: dict[str, Any] = {
        name: round(statistics.median(run[name] for run in runs), 3) for name in runs[0]
    }
    extra = [run["extra_mib"] for run in runs]
    figures["extra_mib_range"] = [min(extra), max(extra)]
    settings = {"gigabytes": asked.gigabytes, "dtype": asked.dtype, "rounds": asked.rounds}
    record(asked.out, "activations_store", settings, figures)
    count = 100 if asked.toy else RUNS
    seconds = [query_seconds(count) for _ in range(asked.rounds)]
    record(
        asked.out,
        "activations_query",
        {"runs": count, "rounds": asked.rounds},
        {"seconds": round(statistics.median(seconds), 4), "range": [min(seconds), max(seconds)]},
    )


def in_own_process(gigabytes: float, dtype: str) -> dict[str, float]:
    """Stream once in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.activations_store", "--one"]
    command += ["--gigabytes", str(gigabytes), "--dtype", dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def stream(batches: int, dtype: str) -> dict[str, float]:
    """Append a batch so many times; give memory in MiB, speed in MB/s, and bytes to raw bytes."""
    from basinscope.io.activation_store import ActivationWriter

    dims = ("example", "position", "d_model")
    names = [f"resid_out_{layer}" for layer in range(LAYERS)]
    batch = {name: random_values(layer, dtype) for layer, name in enumerate(names)}
    with tempfile.TemporaryDirectory() as folder:
        before = own_peak_memory()
        start = time.perf_counter()
        writer = ActivationWriter.create_or_continue(
            Path(folder) / "a.zarr",
            variables={name: (dims, (POSITIONS, WIDTH), dtype) for name in names},
            num_examples=batches * BATCH,
            attrs={},
            coords={"position": np.arange(POSITIONS)},
        )
        for _ in range(batches):
            writer.append(batch)
        writer.finish()
        seconds = time.perf_counter() - start
        extra = own_peak_memory() - before
        files = [file for file in writer.path.rglob("*") if file.is_file()]
        stored = sum(file.stat().st_size for file in files)
        floor = plain_seconds(Path(folder), list(batch.values()), stored)
    raw = batches * batch_bytes(dtype)
    return {
        "extra_mib": round(extra / 2**20, 1),
        "mb_per_s": round(raw / seconds / 1e6, 1),
        "bytes_to_raw": round(stored / raw, 4),
        "seconds_to_plain_files": round(seconds / floor, 3),
    }


def random_values(seed: int, dtype: str) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal((BATCH, POSITIONS, WIDTH), np.float32)
    if dtype == "bfloat16":
        values = (values.view(np.uint32) & 0xFFFF0000).view(np.float32)
    return values.astype("float16") if dtype == "float16" else values


def plain_seconds(folder: Path, arrays: list[np.ndarray], nbytes: int) -> float:
    """Write so many bytes of these arrays to plain files."""
    start, written = time.perf_counter(), 0
    while written < nbytes:
        for array in arrays:
            array.tofile(folder / f"plain {written}")
            written += array.nbytes
    return time.perf_counter() - start


def batch_bytes(dtype: str) -> int:
    """Bytes of one batch as the model has it: two for each number of 16 bits."""
    return LAYERS * BATCH * POSITIONS * WIDTH * (4 if dtype == "float32" else 2)


def query_seconds(count: int) -> float:
    """Time one query in a fresh process."""
    from tests.io.test_activations import make_runs

    code = """
import sys, time
start = time.perf_counter()
from basinscope.io.activations import ActivationLoader
found = ActivationLoader(sys.argv[1]).query(custom_keys={"lr": lambda lr: lr < 0.5})
print(time.perf_counter() - start)
"""
    with tempfile.TemporaryDirectory() as folder:
        make_runs(Path(folder), count)
        command: list[Any] = [sys.executable, "-c", code, folder]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return round(float(done.stdout), 4)


if __name__ == "__main__":
    sys.exit(main())
