"""From the device to the host without waiting: losses on their way, and who looks at them."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

MOST_PENDING = 64  # steps that a GPU may be ahead of the host


class NonFiniteLossError(ArithmeticError):
    """A chain left the region where its loss is a number."""

    def __init__(self, step: int, reason: str) -> None:
        super().__init__(f"step {step}: {reason}")
        self.step, self.reason = step, reason


class Arriving:
    """A tensor's values on their way to the host; only who asks for them waits.

    From a GPU they are copied to pinned memory after the work queued so far; a tensor on the CPU
    has arrived.

    Attributes
    ----------
    nbytes : int
    """

    def __init__(self, tensor: Tensor) -> None:
        self.nbytes = tensor.nbytes
        self._host, self._event = tensor, None
        if tensor.device.type == "cuda":
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(tensor.device))

    def ready(self) -> bool:
        """Whether asking would not wait."""
        return self._event is None or bool(self._event.query())

    def numpy(self) -> np.ndarray:
        """Wait for the values."""
        if self._event is not None:
            self._event.synchronize()
        values: np.ndarray = self._host.numpy()
        return values

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.numpy(), dtype=dtype, copy=copy)


class LossWatch:
    """Looks at the mean losses of a chain's steps as they arrive.

    On a CPU that is at once; on a GPU some steps later, so that the device never waits.

    Attributes
    ----------
    latest : float
        The last sampling loss that has arrived; NaN before the first.
    """

    def __init__(self) -> None:
        self.latest = float("nan")
        self._pending: deque[tuple[int, list[str], Arriving]] = deque()

    def see(self, step: int, losses: Mapping[str, Tensor]) -> None:
        """Take a step's losses by their names, and look at what has arrived.

        Raises
        ------
        NonFiniteLossError
            If a mean that arrived, of this or an earlier step, is not finite.
        """
        means = torch.stack([values.mean() for values in losses.values()])
        self._pending.append((step, list(losses), Arriving(means)))
        self.look(wait=len(self._pending) > MOST_PENDING)

    def look(self, *, wait: bool) -> None:
        """Look at what has arrived, or, with ``wait``, at everything; raises what `see` raises."""
        while self._pending and (wait or self._pending[0][2].ready()):
            step, names, arriving = self._pending.popleft()
            means = arriving.numpy()
            bad = np.flatnonzero(~np.isfinite(means))
            if bad.size:
                raise NonFiniteLossError(step, f"{names[bad[0]]} is not finite")
            if names == [SAMPLING_LOSS]:
                self.latest = float(means[0])


SAMPLING_LOSS = "the sampling loss"
