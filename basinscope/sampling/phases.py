"""Where the time of a run goes: seconds per phase, and named ranges for a profiler."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


class PhaseClock:
    """Adds up wall time per phase.

    On a GPU a phase's time is what the host spent on it; the kernels it launched may still run.

    Parameters
    ----------
    elsewhere : callable
        Seconds so far that are counted elsewhere, and not for the phase in which they pass.

    Attributes
    ----------
    seconds : dict of str to float
    annotate : bool
        Whether phases also become ranges in a running profiler (and NVTX ranges on CUDA).
    """

    def __init__(self, elsewhere: Callable[[], float] = lambda: 0.0) -> None:
        self.elsewhere = elsewhere
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.annotate = False

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count the time inside the block."""
        start = self._now()
        try:
            if self.annotate:
                with _named_range(phase):
                    yield
            else:
                yield
        finally:
            self.seconds[phase] += self._now() - start

    def _now(self) -> float:
        return time.perf_counter() - self.elsewhere()


@contextmanager
def _named_range(phase: str) -> Iterator[None]:
    if torch.cuda.is_available():
        torch.cuda.nvtx.range_push(phase)
    try:
        with torch.profiler.record_function(phase):
            yield
    finally:
        if torch.cuda.is_available():
            torch.cuda.nvtx.range_pop()


class StepProfiler:
    """Writes a ``torch.profiler`` trace of a window of steps.

    Parameters
    ----------
    path : Path or None
        Chrome trace to write; None profiles nothing.
    steps : (int, int)
        First step and the step after the last.
    """

    def __init__(self, path: Path | None, steps: tuple[int, int], clock: PhaseClock) -> None:
        self.path, self.clock = path, clock
        self.first, self.end = steps
        self.running: Any = None

    def before_step(self, step: int) -> None:
        """Start at the window's first step, or where a resumed chain goes on after it."""
        if self.path is not None and self.running is None and step >= self.first:
            with self.clock("profile"):
                self.running = torch.profiler.profile()
                self.running.__enter__()
            self.clock.annotate = True

    def after_step(self, step: int) -> None:
        """Stop after the window's last step and write the trace."""
        if self.running is not None and step + 1 >= self.end:
            self.finish()

    def finish(self) -> None:
        """Write what was profiled, if anything, and profile no more."""
        if self.running is None:
            return
        self.clock.annotate = False
        assert self.path is not None
        with self.clock("profile"):
            self.running.__exit__(None, None, None)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.running.export_chrome_trace(str(self.path))
        self.running, self.path = None, None
