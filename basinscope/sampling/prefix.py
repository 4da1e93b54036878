"""What cannot change is computed once: activations below the first layer that moves.

Under a restriction to layer k and above, what enters layer k is the same for every draw and chain.
It is kept per sequence, and forward passes start there.
"""

from __future__ import annotations

import logging
import threading
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor, nn

from basinscope.models.entry import Entry, NoEntryError, entered, find_entry, hidden_states_at
from basinscope.sampling.job import PROBE_TOKENS, SamplingJob

logger = logging.getLogger("basinscope")


class PrefixCache:
    """Hidden states that enter the first layer that moves.

    Shared by the chains of a process; each brings its copy of the model, whose layers below the
    entry are equal.

    Parameters
    ----------
    job : SamplingJob
    entry : Entry
        Where forward passes start.
    """

    def __init__(self, job: SamplingJob, entry: Entry) -> None:
        self.job, self.entry = job, entry
        observed = sum(o.input_ids.size for o in job.observables if o.loss_fn is None)
        observed *= entry.token_bytes
        sampled = job.pool.numel() * entry.token_bytes
        self.keeps_observables = observed <= job.prefix_cache_bytes
        left = job.prefix_cache_bytes - (observed if self.keeps_observables else 0)
        self.keeps_sampling = sampled <= left
        self._lock = threading.Lock()
        self._observed: dict[int, Tensor] = {}
        self._sampled: Tensor | None = None
        self._known = np.zeros(len(job.pool), dtype=np.bool_)

    def sampling(
        self, model: nn.Module, places: np.ndarray, on_device: Tensor
    ) -> AbstractContextManager[None]:
        """Start passes over rows ``places`` of the job's pool at the entry.

        The same numbers ``on_device`` save an upload, for which the host would wait.
        """
        if not self.keeps_sampling:
            return nullcontext()
        size = self.job.config.batch_size
        with self._lock:
            for group in np.unique(places[~self._known[places]] // size):
                self._keep(model, slice(group * size, (group + 1) * size))
        assert self._sampled is not None
        return entered(model, self.entry, self._sampled[on_device])

    def _keep(self, model: nn.Module, rows: slice) -> None:
        """Compute neighbours in the pool together, so that no chain's order decides their bits."""
        ids = self.job.pool[rows].to(self.job.device, torch.int64)
        found = self._compute(model, ids)
        if self._sampled is None:
            shape = (len(self.job.pool), *found.shape[1:])
            self._sampled = torch.empty(shape, dtype=found.dtype, device=found.device)
        self._sampled[rows] = found
        self._known[rows] = True

    def observing(
        self, model: nn.Module, number: int, input_ids: Tensor
    ) -> AbstractContextManager[None]:
        """Start the pass over the observables' batch of this number at the entry."""
        if not self.keeps_observables:
            return nullcontext()
        with self._lock:
            if number not in self._observed:
                self._observed[number] = self._compute(model, input_ids)
        return entered(model, self.entry, self._observed[number])

    def _compute(self, model: nn.Module, input_ids: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.no_grad(), self.job.precision():
            return hidden_states_at(model, self.entry, input_ids.clone())


def prefix_cache(job: SamplingJob, model: nn.Module) -> PrefixCache | None:
    """Make a cache for a job, or None where all layers have to run, which the log explains."""
    if job.loss_fn is not None or job.config.train_mode or job.cuda_graph:
        return None
    if not job.prefix_cache_bytes:
        return None
    few = job.pool[:1, :PROBE_TOKENS].to(job.device, torch.int64)
    try:
        with job.precision():
            entry = find_entry(model, few)
    except NoEntryError as error:
        logger.info("every draw runs all layers: %s", error)
        return None
    if entry is None:
        return None
    cache = PrefixCache(job, entry)
    kept = {"observables": cache.keeps_observables, "sampling batches": cache.keeps_sampling}
    names = " and ".join(name for name, is_kept in kept.items() if is_kept)
    logger.info(
        "layers below layer %d never change under this restriction: they run once for %s",
        entry.first,
        names or "nothing, for prefix_cache_bytes is too small",
    )
    return cache
