"""Chains in worker processes: same numbers, several at once.

A worker is ``python -m basinscope.sampling.workers``; it reads its job from a file, so a caller's
script needs no ``if __name__ == "__main__"`` guard, and models and losses defined there travel.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import torch

from basinscope.io.store import RUNNING, SampleStore
from basinscope.sampling.chain import Progress, run_chains, working_copy
from basinscope.sampling.interrupt import StopRequest, stop_on_signals
from basinscope.sampling.job import SamplingJob

REPORT_SECONDS = 0.1  # between two reports of a worker


class WorkerError(OSError):
    """A worker process ended before its chains did."""


def run_in_workers(
    job: SamplingJob,
    path: Path,
    chains: list[int],
    workers: int,
    *,
    checkpoint_every: int | None,
    stop: StopRequest,
    report: Callable[[Progress], None],
) -> None:
    """Spread chains over processes that share the machine's threads.

    Each has an equal share, even where there are fewer chains than workers: sums depend on it.

    Raises
    ------
    WorkerError
        If a worker failed; the others are stopped, with their checkpoints written.
    """
    count = min(workers, len(chains))
    with tempfile.TemporaryDirectory(prefix="basinscope-job-") as directory:
        job_file = Path(directory) / "job.pt"
        pickled(
            job,
            job_file,
            names="the model, loss_fn or an observable's loss_fn",
            elsewhere=f"worker processes through {directory}",
            instead="use workers=1, make room there (TMPDIR names another place)",
        )
        processes = [
            _start(job_file, path, chains[i::count], workers, checkpoint_every)
            for i in range(count)
        ]
        try:
            _listen(processes, stop, report)
        finally:
            for process in processes:
                if process.poll() is None:
                    process.send_signal(signal.SIGTERM)
            for process in processes:
                process.wait()
                assert process.stdin is not None
                process.stdin.close()


def pickled(what: Any, to: Path | IO[bytes], *, names: str, elsewhere: str, instead: str) -> None:
    """Pickle for other processes, functions of notebooks and ties between weights included.

    Raises
    ------
    TypeError
        If that cannot be done: what (`names`) cannot be sent where, and what to do `instead`.
    """
    import cloudpickle

    try:
        torch.save(what, to, pickle_module=cloudpickle)
    except Exception as error:
        raise TypeError(
            f"{names} cannot be sent to {elsewhere} ({error}): {instead}, "
            "or define them without open files, locks or generators"
        ) from error


def _start(
    job_file: Path, store: Path, chains: list[int], workers: int, checkpoint_every: int | None
) -> subprocess.Popen[str]:
    order = {
        "job": str(job_file),
        "store": str(store),
        "chains": chains,
        "threads": max(1, torch.get_num_threads() // workers),
        "arithmetic": _arithmetic(),
        "checkpoint_every": checkpoint_every,
    }
    importable = os.pathsep.join(entry for entry in sys.path if entry)
    return subprocess.Popen(
        [sys.executable, "-m", "basinscope.sampling.workers", json.dumps(order)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": importable},
        start_new_session=True,  # Ctrl-C reaches the parent, which asks its workers
    )


def _listen(
    processes: list[subprocess.Popen[str]], stop: StopRequest, report: Callable[[Progress], None]
) -> None:
    """Pass reports on until all workers have ended."""
    messages: queue.Queue[dict[str, Any]] = queue.Queue()

    def read(process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                if line.startswith("{"):
                    messages.put(json.loads(line))
        messages.put({"ended": process.wait()})

    for process in processes:
        threading.Thread(target=read, args=(process,), daemon=True).start()

    running = len(processes)
    while running:
        stop.raise_if_asked()
        try:
            message = messages.get(timeout=0.2)
        except queue.Empty:
            continue
        if "ended" in message:
            running -= 1
            if message["ended"] != 0:
                raise WorkerError(
                    f"a worker process ended with exit code {message['ended']}; its own message "
                    "stands above. Finished chains are kept: the same call continues"
                )
        else:
            report(Progress(**message))


def _main(order: dict[str, Any]) -> None:
    reports, sys.stdout = sys.stdout, sys.stderr  # what a model or a loss prints is no report
    torch.set_num_threads(order["threads"])
    _set_arithmetic(**order["arithmetic"])
    job = torch.load(order["job"], weights_only=False)
    with stop_on_signals() as stop:
        _stop_with_parent()
        run_chains(
            job,
            working_copy(job),
            SampleStore(Path(order["store"])),
            order["chains"],
            checkpoint_every=order["checkpoint_every"],
            stop=stop,
            report=_printer(reports),
        )


def _arithmetic() -> dict[str, Any]:
    """What the caller's process has set of torch that decides the bits of a sum."""
    precision: str | list[str]
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set for one backend alone
        precision = [backend.fp32_precision for backend in _matmul_backends()]
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    return {
        "onednn": torch._C._get_mkldnn_enabled(),
        "matmul_precision": precision,
        "deterministic": "warn" if only_warns else torch.are_deterministic_algorithms_enabled(),
        "default_dtype": str(torch.get_default_dtype()).removeprefix("torch."),
    }


def _set_arithmetic(
    onednn: bool,
    matmul_precision: str | list[str],
    deterministic: bool | str,
    default_dtype: str,
) -> None:
    torch._C._set_mkldnn_enabled(onednn)
    if isinstance(matmul_precision, str):
        torch.set_float32_matmul_precision(matmul_precision)
    else:
        for backend, precision in zip(_matmul_backends(), matmul_precision, strict=True):
            backend.fp32_precision = precision
    torch.use_deterministic_algorithms(bool(deterministic), warn_only=deterministic == "warn")
    torch.set_default_dtype(getattr(torch, default_dtype))


def _matmul_backends() -> tuple[Any, ...]:
    backends: Any = torch.backends
    return backends.cuda.matmul, backends.mkldnn.matmul


def _stop_with_parent() -> None:
    """End this process in good order once its parent is gone and the pipe from it closed."""

    def wait() -> None:
        sys.stdin.read()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def _printer(to: IO[str]) -> Callable[[Progress], None]:
    """Print reports as lines of JSON, not more often than a person can see.

    A parent that is gone reads none: its worker still ends in good order.
    """
    last = 0.0

    def report(progress: Progress) -> None:
        nonlocal last
        if progress.state == RUNNING and time.monotonic() - last < REPORT_SECONDS:
            return
        last = time.monotonic()
        with suppress(BrokenPipeError):
            print(json.dumps(asdict(progress)), file=to, flush=True)

    return report


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
