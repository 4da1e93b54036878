"""Measure two ways of doing one thing, in turn, on a machine that is never quiet.

Every figure is a ratio of neighbours in time: A B A B ... in one process, reported as the median
of the pairwise ratios with its quartiles. Peak memory is measured in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from basinscope import native
from basinscope.report.doctor import cpu_name

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("basinscope", "torch", "triton", "numba", "zarr", "transformers", "devinterp")


def paired(
    ours: Callable[[], object],
    peer: Callable[[], object],
    rounds: int,
    warmup: bool = True,
    least_seconds: float = 0.0,
) -> dict[str, Any]:
    """Time two functions in turn.

    Parameters
    ----------
    least_seconds : float
        A turn of either is as many calls as last so long, of which the mean counts.

    Returns
    -------
    dict
        ``ratio`` (peer seconds / our seconds: above 1 we are faster), its quartiles, and the
        median seconds of both.
    """
    if warmup:
        ours()
        peer()
    calls = [
        enough_calls(_seconds(work), least_seconds) if least_seconds else 1 for work in (ours, peer)
    ]
    pairs = [(_seconds(ours, calls[0]), _seconds(peer, calls[1])) for _ in range(rounds)]
    ratios = sorted(theirs / mine for mine, theirs in pairs)
    return {
        "ratio": round(statistics.median(ratios), 3),
        "ratio_quartiles": [round(q, 3) for q in quartiles(ratios)],
        "ratio_range": [round(ratios[0], 3), round(ratios[-1], 3)],
        "ours_s": round(statistics.median(mine for mine, _ in pairs), 4),
        "peer_s": round(statistics.median(theirs for _, theirs in pairs), 4),
        "rounds": rounds,
    }


def quartiles(values: list[float]) -> list[float]:
    """First and third quartile; of fewer than two values, the value twice."""
    if len(values) < 2:
        return [values[0], values[0]]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return [first, third]


def peak_memory(module: str, *arguments: str) -> int:
    """Run ``python -m module arguments`` and give its peak resident memory in bytes."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, *command], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return int(done.stdout.strip().splitlines()[-1])


_MEASURE = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
"""


def record(results: Path, name: str, settings: dict[str, Any], figures: dict[str, Any]) -> None:
    """Print a result and append it, with the machine and the versions, as a line of JSON."""
    line = {
        "benchmark": name,
        **settings,
        **figures,
        "machine": machine(),
        "versions": versions(),
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a") as file:
        file.write(json.dumps(line) + "\n")
    shown = {**settings, **figures}
    print(name, *(f"{key}={value}" for key, value in shown.items()), flush=True)


def machine() -> dict[str, Any]:
    """Describe the hardware; processors of one name differ by family and model."""
    described = {"cpu": cpu_name(), "cores": os.cpu_count(), "system": platform.system()}
    said = native.processor()
    numbers = {"cpu_family": "cpu family", "model": "model"}
    return described | {name: int(said[key]) for name, key in numbers.items() if key in said}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def own_peak_memory() -> int:
    """Peak resident memory of this program so far, in bytes.

    The kernel's figure for the program, where there is one: that for the process counts what it
    was forked from, too.
    """
    status = Path("/proc/self/status")
    if status.exists():
        peak = next(r for r in status.read_text().splitlines() if r.startswith("VmHWM"))
        return int(peak.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def parser(description: str | None, results: str) -> argparse.ArgumentParser:
    """Make a command line with the options that all benchmarks share."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--rounds", type=int, default=5, help="timed pairs (default 5)")
    options.add_argument("--out", type=Path, default=RESULTS / results, help="results file")
    options.add_argument("--toy", action="store_true", help="smallest sizes, to see that it runs")
    return options


def enough_calls(seconds: float, least_seconds: float) -> int:
    """How many calls of so many seconds last long enough to be timed.

    Whatever ran before leaves caches cold, and its OpenMP threads keep their cores for some
    milliseconds: whoever is timed next, with one short call, would pay for that.
    """
    return max(1, math.ceil(least_seconds / max(seconds, 1e-6)))


def _seconds(work: Callable[[], object], calls: int = 1) -> float:
    """Mean seconds of a call."""
    start = time.perf_counter()
    for _ in range(calls):
        work()
    return (time.perf_counter() - start) / calls
