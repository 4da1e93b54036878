"""The SGLD update on a CPU: one call of the compiled pass for all parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from basinscope.kernels import compiled
from basinscope.kernels.noise import key_of
from basinscope.kernels.pointers import addresses, cut
from basinscope.kernels.threads import for_blocks, worthwhile

if TYPE_CHECKING:
    from basinscope.kernels.sgld import Factors, Group

_COST = 0.65  # nanoseconds per parameter on one thread


class CompiledPass:
    """The tables of a group of parameters, made once, and the call that uses them."""

    def __init__(self, group: Group, factors: Factors, metrics: bool) -> None:
        self._group = group  # keeps alive what the tables point to
        dtype = group.weights[0].dtype
        sizes = [w.numel() for w in group.weights]
        every = metrics or group.zero_grads
        self._blocks = cut(sizes, group.masks, compiled.BLOCK, keep_empty=every)
        self._sizes = np.array(sizes, dtype=np.int64)
        self._streams = np.array(group.streams, dtype=np.int64)
        self._anchors = addresses(group.anchors or [None] * len(sizes))
        self._squares = None if group.squares is None else addresses(group.squares)
        self._storage, self._half = compiled.storage_of(dtype)
        self._constants = np.array(
            [
                factors.gradient,
                factors.decay,
                factors.pull,
                factors.noise,
                factors.box,
                factors.alpha,
                factors.eps,
            ],
            dtype=np.float64 if dtype == torch.float64 else np.float32,
        )
        self._metrics = metrics
        # None or True, which numba compiles apart
        self._zero_grads = group.zero_grads or None
        self._stochastic = (factors.stochastic and dtype == torch.bfloat16) or None

    def __call__(
        self, gradients: Sequence[Tensor | None], seed: int, chain: int, step: int | Tensor
    ) -> Tensor | None:
        blocks = self._blocks
        sums = np.zeros((len(blocks), compiled.N_SUMS)) if self._metrics else None
        arguments = (
            blocks.tensor_of,
            blocks.start_of,
            blocks.bits_of,
            blocks.bits,
            self._sizes,
            self._streams,
            addresses(self._group.weights),
            addresses(gradients),
            self._anchors,
            self._squares,
            self._storage,
            self._half,
            *key_of(seed),
            int(step),
            chain,
            self._stochastic,
            self._zero_grads,
            self._constants,
            sums,
        )

        threads = worthwhile(_COST * compiled.BLOCK * len(blocks), torch.get_num_threads())

        def work(first: int, last: int) -> None:
            compiled.langevin_blocks(first, last, *arguments)

        for_blocks(work, len(blocks), threads)
        return None if sums is None else torch.from_numpy(sums.sum(axis=0))
