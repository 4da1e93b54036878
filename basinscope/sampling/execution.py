"""How a run is computed: the arguments of a call that change no number of it, checked."""

from __future__ import annotations

import numbers
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from basinscope.io.location import local_path, require_place
from basinscope.sampling.config import SamplerConfig
from basinscope.sampling.job import SamplingJob

COPIES_BYTES = 64 * 2**20  # largest model that several chains get copies of by themselves


@dataclass(frozen=True)
class Execution:
    """How a run is computed.

    Attributes
    ----------
    chains : frozenset of int
        The chains of the store that this call runs.
    chains_at_once : int or None
        Chains side by side in threads; None leaves it to :meth:`at_once`.
    workers : int
        Processes that run chains side by side.
    checkpoint_every : int or None
        Draws between checkpoints.
    cuda_graph : bool
    prefix_cache_bytes : int
    profile : Path or None
        Trace to write of ``profile_steps``.
    profile_steps : tuple of int
    progress : bool or None
    """

    chains: frozenset[int]
    chains_at_once: int | None
    workers: int
    checkpoint_every: int | None
    cuda_graph: bool
    prefix_cache_bytes: int
    profile: Path | None
    profile_steps: tuple[int, int]
    progress: bool | None

    @property
    def processes(self) -> int:
        """Worker processes that share the threads, however many chains are left."""
        return min(self.workers, len(self.chains))

    def at_once(self, job: SamplingJob) -> int:
        """Chains that run side by side in threads.

        On a CPU, one thread per chain beats many threads per operation: nothing waits. Dropout
        draws from torch's one generator, and a caller's functions may keep state: those run alone.
        """
        size = sum(p.numel() * p.element_size() for p in job.model.parameters())
        alone = job.device.type != "cpu" or job.has_own_code or job.config.train_mode
        alone = alone or self.profile is not None or size > COPIES_BYTES
        usual = 1 if alone else torch.get_num_threads()
        return min(len(self.chains), self.chains_at_once or usual)


def check_execution(
    config: SamplerConfig,
    *,
    own_loss: bool,
    chains: Sequence[int] | None,
    chains_at_once: int | None,
    workers: int,
    checkpoint_every: int | None,
    cuda_graph: bool,
    prefix_cache_bytes: int,
    profile: str | os.PathLike[str] | None,
    profile_steps: tuple[int, int],
    progress: bool | None,
) -> Execution:
    """Check how a run shall be computed.

    Parameters
    ----------
    own_loss : bool
        Whether the caller brings a ``loss_fn``.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong, or does not go with another.
    """
    workers = _count("workers", workers)
    if not isinstance(prefix_cache_bytes, numbers.Integral) or prefix_cache_bytes < 0:
        raise ValueError(
            f"prefix_cache_bytes must be a number of bytes, 0 or more; got {prefix_cache_bytes!r}"
        )
    if chains_at_once is not None:
        chains_at_once = _count("chains_at_once", chains_at_once)
    if checkpoint_every is not None:
        checkpoint_every = _count("checkpoint_every", checkpoint_every)
    asked = _chains(chains, config.num_chains)
    if profile is not None and (workers > 1 or (chains_at_once or 1) > 1):
        raise ValueError("profile= traces one chain: use it with workers=1 and chains_at_once=1")
    if config.train_mode and (chains_at_once or 1) > 1:
        raise ValueError(
            "train_mode=True draws dropout from torch's one generator, which chains in threads "
            f"would share: use workers={chains_at_once} in place of chains_at_once"
        )
    if cuda_graph and (config.train_mode or own_loss or profile is not None):
        raise ValueError(
            "cuda_graph=True replays one recording of the model's own loss: use it without "
            "train_mode, loss_fn and profile"
        )
    if cuda_graph and (chains_at_once or 1) > 1:
        raise ValueError(
            "cuda_graph=True records steps, and a process can record one thing at a time: use "
            f"workers={chains_at_once} in place of chains_at_once"
        )
    trace = None if profile is None else local_path(profile, "a profile")
    if trace is not None:
        require_place(trace)
        profile_steps = _window(profile_steps, config.num_steps)
    return Execution(
        asked, chains_at_once, workers, checkpoint_every, cuda_graph, int(prefix_cache_bytes),
        trace, profile_steps, progress,
    )  # fmt: skip


def _count(name: str, value: Any) -> int:
    if not _is_whole(value) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1; got {value!r}")
    return int(value)


def _chains(chains: Sequence[int] | None, num_chains: int) -> frozenset[int]:
    if chains is None:
        return frozenset(range(num_chains))
    asked = frozenset(chains) if isinstance(chains, Iterable) else frozenset()
    if not asked or asked - set(range(num_chains)):
        raise ValueError(
            f"chains must name some of 0 to {num_chains - 1} (num_chains={num_chains}); "
            f"got {chains!r}"
        )
    return asked


def _window(steps: Any, num_steps: int) -> tuple[int, int]:
    """Check which steps are traced: a first one of the run, and the one after the last."""
    pair = isinstance(steps, Sequence) and len(steps) == 2 and all(map(_is_whole, steps))
    if not pair or not 0 <= steps[0] < min(steps[1], num_steps):
        raise ValueError(
            "profile_steps must be two whole numbers, the first step to trace and the one after "
            f"the last, such as {(0, min(10, num_steps))} in this run of {num_steps} steps; got "
            f"{steps!r}"
        )
    return int(steps[0]), int(steps[1])


def _is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
