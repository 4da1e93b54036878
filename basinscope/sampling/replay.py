"""The same work again and again: recorded once as a CUDA graph, then replayed by one launch.

A small model's step is hundreds of launches of a few microseconds each, and the GPU waits for the
host to make them. A graph makes them all at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

WARM_UP = 2  # calls before the recording: libraries load and kernels are compiled


class Replayed:
    """Work without arguments whose inputs and state stay where they are on the device.

    The first calls do the work as it stands; then it is recorded, and from there on replayed.

    Parameters
    ----------
    work : callable
        Returns tensors by name. It must not read anything back from the device.
    """

    def __init__(self, work: Callable[[], dict[str, Tensor]]) -> None:
        self._work = work
        self._calls = 0
        self._replay: Callable[[], None] | None = None
        self._results: dict[str, Tensor] = {}

    def __call__(self) -> dict[str, Tensor]:
        """Do the work once; the results are the caller's to keep."""
        self._calls += 1
        if self._calls <= WARM_UP:
            return self._work()
        if self._replay is None:
            self._replay, self._results = record(self._work)
        self._replay()
        return {name: result.clone() for name, result in self._results.items()}


def record(
    work: Callable[[], dict[str, Tensor]],
) -> tuple[Callable[[], None], dict[str, Tensor]]:
    """Record work as a CUDA graph on the current stream, without doing it.

    Returns
    -------
    replay : callable
        Does the work.
    results : dict of Tensor
        Where each replay leaves its results.

    Raises
    ------
    RuntimeError
        If the work waits for the device or uses what a graph cannot hold.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        # the writer's thread may wait for losses meanwhile, which must not end the recording
        with torch.cuda.graph(
            graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"
        ):
            results = work()
    except RuntimeError as error:
        raise RuntimeError(
            f"a step of this model cannot be recorded as a CUDA graph ({error}): it waits for the "
            "device, or changes from call to call. Sample it with cuda_graph=False"
        ) from error
    return graph.replay, results


@contextmanager
def own_stream(device: torch.device, wanted: bool) -> Iterator[None]:
    """Work on a stream of one's own, which recording needs, after what was queued before."""
    if not wanted or device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    try:
        with torch.cuda.stream(stream):
            yield
    finally:  # also after a failed chain, whose last steps still move the weights
        torch.cuda.current_stream(device).wait_stream(stream)
