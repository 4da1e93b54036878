"""Profiles of an analysis: where its time went, against what its plan said."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from basinscope.analysis.plan import Plan
from basinscope.io.location import local_path, require_place
from basinscope.report.console import install_hint

IO_COUNTERS = Path("/proc/self/io")


@contextmanager
def profiled(directory: str | os.PathLike[str], plan: Plan) -> Iterator[dict[str, Any]]:
    """Profile what runs inside, and leave the findings in a directory.

    ``profile.html`` is Dask's own: the performance report of the cluster where a
    ``distributed.Client`` is active, else task stream, CPU and memory of this process.
    ``summary.json`` holds what is yielded.

    Parameters
    ----------
    directory : path
        Made if it is not there.
    plan : Plan
        Of what runs.

    Yields
    ------
    dict
        Filled at the end: ``seconds``; ``gb_per_s`` (decoded losses), ``gflop_per_s`` (products);
        the plan's figures; ``file_bytes`` (what this process read from files, encoded; None where
        the system does not count them, or other processes read).

    Raises
    ------
    ModuleNotFoundError
        If bokeh, which draws the profile, is not installed.
    """
    _require_bokeh()
    directory = local_path(directory, "a profile")
    require_place(directory / "profile.html")
    directory.mkdir(parents=True, exist_ok=True)
    summary: dict[str, Any] = {}
    on_cluster = _client() is not None
    with _recorded(directory / "profile.html", on_cluster):
        before, start = _bytes_from_files(), time.perf_counter()
        yield summary
        seconds = time.perf_counter() - start
        after = _bytes_from_files()
    summary |= {
        "estimator": plan.estimator,
        "seconds": round(seconds, 6),
        "gb_per_s": round(plan.bytes_to_read / seconds / 1e9, 6),
        "gflop_per_s": round(plan.flops / seconds / 1e9, 6),
        "bytes_to_read": plan.bytes_to_read,
        "flops": plan.flops,
        "tasks": plan.tasks,
        "planned_peak_memory": plan.peak_memory,
        "file_bytes": None if on_cluster or before is None or after is None else after - before,
        "resident_memory": psutil.Process().memory_info().rss,
    }
    (directory / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")


@contextmanager
def _recorded(page: Path, on_cluster: bool) -> Iterator[None]:
    if on_cluster:
        from distributed import performance_report

        with performance_report(filename=str(page)):
            yield
        return
    from dask.diagnostics.profile import CacheProfiler, Profiler, ResourceProfiler
    from dask.diagnostics.profile_visualize import visualize

    with Profiler() as tasks, ResourceProfiler(dt=0.1) as resources, CacheProfiler() as cache:
        yield
    recorded = [profiler for profiler in (tasks, resources, cache) if profiler.results]
    if recorded:
        # with its scripts inside, so that the page opens where there is no network
        visualize(recorded, filename=str(page), show=False, save=True, mode="inline")


def _client() -> Any:
    """Give the active client of a cluster, if there is one."""
    try:
        from distributed import get_client
    except ModuleNotFoundError:
        return None
    try:
        return get_client()
    except ValueError:
        return None


def _bytes_from_files() -> int | None:
    try:
        counters = dict(line.split(": ") for line in IO_COUNTERS.read_text().splitlines())
    except OSError:
        return None
    return int(counters["rchar"])


def _require_bokeh() -> None:
    try:
        import bokeh  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"profiles are drawn with bokeh: {install_hint('bokeh')}"
        ) from error
