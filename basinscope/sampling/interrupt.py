"""Stop at a step's end: the first SIGINT or SIGTERM asks, the second insists."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class SiblingFailedError(RuntimeError):
    """Another chain of this process raised an error; this one stops too."""


class StopRequest:
    """Whether this run should stop, and why.

    Attributes
    ----------
    signal : int or None
        The signal that asked for it.
    failed : bool
        Whether a chain that runs beside this one raised an error.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.failed = False

    @property
    def asked(self) -> bool:
        return self.signal is not None or self.failed

    def raise_if_asked(self) -> None:
        """Raise KeyboardInterrupt after SIGINT, SystemExit(143) after SIGTERM."""
        if self.failed:
            raise SiblingFailedError("a chain beside this one raised an error")
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal is not None:
            raise SystemExit(128 + self.signal)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Catch SIGINT and SIGTERM inside the block, and restore the handlers after it.

    Outside the main thread, where Python allows no handlers, nothing is caught.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if request.signal is not None:
            request.raise_if_asked()
        request.signal = number

    before: dict[int, Any] = {
        number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield request
        request.raise_if_asked()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
