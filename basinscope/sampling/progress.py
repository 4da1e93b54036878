"""What a person sees while chains run: bars on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from basinscope.io.store import FAILED, RUNNING
from basinscope.sampling.chain import Progress

LINE_SECONDS = 10.0  # between two lines in a log
BAR_SECONDS = 0.2  # between two updates of a bar

Report = Callable[[Progress], None]


@contextmanager
def show_progress(
    chains: list[int], num_steps: int, num_draws: int, tokens_per_step: int, show: bool | None
) -> Iterator[Report]:
    """Give a function that takes progress reports.

    Parameters
    ----------
    show : bool or None
        None shows bars on a terminal and lines elsewhere; False shows nothing.
    """
    if show is False or not sys.stderr:  # closed, as that of a daemon
        yield lambda progress: None
    elif show is None and sys.stderr.isatty():
        with _bars(chains, num_steps, num_draws, tokens_per_step) as report:
            yield report
    else:
        yield _lines(num_steps, num_draws, tokens_per_step)


@contextmanager
def show_count(noun: str, total: int, show: bool | None) -> Iterator[Callable[[int], None]]:
    """Give a function that is told how many of something are done.

    A bar on a terminal, a line now and then elsewhere; nothing if ``show`` is False.
    """
    if show is False or not sys.stderr:  # closed, as that of a daemon
        yield lambda done: None
    elif show is None and sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        columns = (TextColumn(noun), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Bars(*columns, console=Console(stderr=True)) as bars:
            task = bars.add_task("", total=total)
            yield lambda done: bars.update(task, completed=done)
    else:
        start = last = time.monotonic()
        before: int | None = None

        def say(done: int) -> None:
            nonlocal last, before
            before = done if before is None else before
            now = time.monotonic()
            if now - last < LINE_SECONDS and done < total:
                return
            last = now
            left = (total - done) * (now - start) / (done - before) if done > before else 0.0
            text = f"{noun} {done:,} of {total:,}, {now - start:.0f} s so far, {left:.0f} s left"
            print(text, file=sys.stderr, flush=True)

        yield say


@contextmanager
def _bars(
    chains: list[int], num_steps: int, num_draws: int, tokens_per_step: int
) -> Iterator[Report]:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("chain {task.fields[chain]}"),
        BarColumn(),
        TextColumn("{task.fields[draws]}/" + f"{num_draws} draws"),
        TextColumn("loss {task.fields[loss]}"),
        TextColumn("{task.fields[speed]} tokens/s"),
        TimeRemainingColumn(),
    )
    shown: dict[int, float] = {}
    with Bars(*columns, console=Console(stderr=True)) as bars:
        tasks = {
            c: bars.add_task(
                "", total=num_steps, start=False, chain=c, draws=0, loss="-", speed="-"
            )
            for c in chains
        }
        speeds = _Speeds(tokens_per_step)

        def report(progress: Progress) -> None:
            speed = speeds.of(progress)
            final = progress.state != RUNNING
            if not final and time.monotonic() - shown.get(progress.chain, 0.0) < BAR_SECONDS:
                return
            if progress.chain not in shown:
                bars.start_task(tasks[progress.chain])
            shown[progress.chain] = time.monotonic()
            fields: dict[str, Any] = {"draws": progress.draws, "speed": f"{speed:,.0f}"}
            if not final:
                fields["loss"] = f"{progress.loss:.4f}"
            elif progress.state == FAILED:
                fields["loss"] = "[red]failed[/red]"
            bars.update(tasks[progress.chain], completed=progress.step, **fields)

        yield report


def _lines(num_steps: int, num_draws: int, tokens_per_step: int) -> Report:
    printed: dict[int, float] = {}
    speeds = _Speeds(tokens_per_step)

    def report(progress: Progress) -> None:
        speed = speeds.of(progress)
        if progress.state != RUNNING:
            text = f"chain {progress.chain}: {progress.state} after {progress.draws} draws"
            print(text, file=sys.stderr, flush=True)
            return
        last = printed.setdefault(progress.chain, time.monotonic())
        if time.monotonic() - last < LINE_SECONDS:
            return
        printed[progress.chain] = time.monotonic()
        left = (num_steps - progress.step) * tokens_per_step / speed if speed else float("nan")
        print(
            f"chain {progress.chain}: {progress.draws}/{num_draws} draws, loss "
            f"{progress.loss:.4f}, {speed:,.0f} tokens/s, {left:.0f} s left",
            file=sys.stderr,
            flush=True,
        )

    return report


class _Speeds:
    """Sampled tokens per second of each chain, since it was first heard of."""

    def __init__(self, tokens_per_step: int) -> None:
        self.tokens_per_step = tokens_per_step
        self.first: dict[int, tuple[float, int]] = {}

    def of(self, progress: Progress) -> float:
        start, step = self.first.setdefault(progress.chain, (time.monotonic(), progress.step))
        elapsed = time.monotonic() - start
        return (progress.step - step) * self.tokens_per_step / elapsed if elapsed > 0 else 0.0
