"""The SGLD update on a CPU: one call of the compiled pass for all parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from basinscope.kernels.noise import key_of
from basinscope.kernels.pointers import addresses, cut, name_of
from basinscope.kernels.threads import for_blocks, worthwhile
from basinscope.native import address, function

if TYPE_CHECKING:
    from basinscope.kernels.sgld import Factors, Group

BLOCK = 2048  # elements
N_SUMS = 9
SCRATCH = 49 * BLOCK  # bytes: five rows of the arithmetic, noise, random words, a mask
_COST = 0.65  # nanoseconds per parameter on one thread


class CompiledPass:
    """The tables of a group of parameters, made once, and the call that uses them."""

    def __init__(self, group: Group, factors: Factors, metrics: bool) -> None:
        self._group = group  # keeps alive what the tables point to
        dtype = group.weights[0].dtype
        sizes = [w.numel() for w in group.weights]
        every = metrics or group.zero_grads
        self._blocks = cut(sizes, group.masks, BLOCK, keep_empty=every)
        self._sizes = np.array(sizes, dtype=np.int64)
        self._streams = np.array(group.streams, dtype=np.int64)
        self._anchors = addresses(group.anchors or [None] * len(sizes))
        self._squares = addresses(group.squares or [None] * len(sizes))
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
        blocks = self._blocks
        self._fixed = [
            address(table)
            for table in (
                *(blocks.tensor_of, blocks.start_of, blocks.bits_of, blocks.bits, self._sizes),
                *(self._streams, self._anchors, self._squares, self._constants),
            )
        ]
        self._metrics = metrics
        extras = {
            "squares": group.squares is not None,
            "sums": metrics,
            "stochastic": factors.stochastic and dtype == torch.bfloat16,
            "zero_grads": group.zero_grads,
        }
        kind = (name_of(dtype), *(extra for extra, wanted in extras.items() if wanted))
        self._update = function("basinscope.kernels.compiled", "langevin_blocks", *kind)

    def __call__(
        self, gradients: Sequence[Tensor | None], seed: int, chain: int, step: int | Tensor
    ) -> Tensor | None:
        count = len(self._blocks)
        sums = np.zeros((count if self._metrics else 0, N_SUMS))
        weights, slopes = addresses(self._group.weights), addresses(gradients)
        changing = (address(weights), address(slopes), address(sums))
        numbers = (*self._fixed, *changing, *key_of(seed), int(step), chain)

        threads = worthwhile(_COST * BLOCK * count, torch.get_num_threads())

        def work(first: int, last: int) -> None:
            scratch = np.empty(SCRATCH, np.uint8)
            self._update(first, last, *numbers, address(scratch))

        for_blocks(work, count, threads)
        return torch.from_numpy(sums.sum(axis=0)) if self._metrics else None
