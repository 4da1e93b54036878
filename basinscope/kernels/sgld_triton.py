"""The SGLD update in Triton: one launch for all parameters of a dtype, through a pointer table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from basinscope.kernels import noise
from basinscope.kernels.noise import key_of
from basinscope.kernels.noise_triton import as_int32, normal, words
from basinscope.kernels.pointers import addresses, cut

if TYPE_CHECKING:
    from basinscope.kernels.sgld import Factors, Group

BLOCK = 1024
ROUNDING = tl.constexpr(noise.ROUNDING)
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class TritonPass:
    """The pointer table of a group of parameters on its device, and the launch that uses it."""

    def __init__(self, group: Group, factors: Factors, metrics: bool) -> None:
        dtype = group.weights[0].dtype
        if dtype not in _DTYPES:
            raise ValueError(
                f"path='triton' moves float32, bfloat16 and float16 parameters, got {dtype}; "
                "use path='reference', or 'cpu' on a CPU"
            )
        self._group = group  # keeps alive what the table points to
        self._device = group.weights[0].device
        sizes = [w.numel() for w in group.weights]
        nothing: list[Tensor | None] = [None] * len(sizes)
        self._fixed = [
            addresses(group.anchors or nothing),
            addresses(group.squares or nothing),
            np.array(sizes, dtype=np.int64),
            np.array([as_int32(s) for s in group.streams], dtype=np.int64),
        ]
        every = metrics or group.zero_grads
        blocks = cut(sizes, group.masks, BLOCK, keep_empty=every)
        where = np.stack([blocks.tensor_of, blocks.start_of, blocks.bits_of])
        self._blocks = torch.from_numpy(where).to(self._device)
        self._bits = torch.from_numpy(blocks.bits).to(self._device)
        self._scalars = (
            factors.gradient,
            factors.decay,
            factors.pull,
            factors.noise,
            factors.box,
            factors.alpha,
            factors.eps,
        )
        self._features = {
            "STORED": _DTYPES[dtype],
            "NOISE": factors.noise != 0,
            "RMSPROP": group.squares is not None,
            "METRICS": metrics,
            "ZERO_GRADS": group.zero_grads,
            "STOCHASTIC": factors.stochastic and dtype == torch.bfloat16,
            "BLOCK": BLOCK,
        }
        self._host_table = np.empty(0, np.int64)
        self._table = torch.empty(0, dtype=torch.int64)

    def __call__(
        self, gradients: Sequence[Tensor | None], seed: int, chain: int, step: int | Tensor
    ) -> Tensor | None:
        self._renew_table(gradients)
        programs = self._blocks.shape[1]
        metrics = self._features["METRICS"]
        rows = programs if metrics else 0
        sums = torch.zeros((rows, 9), dtype=torch.float32, device=self._device)
        if programs:
            counted = isinstance(step, Tensor)
            key0, key1, chain = (as_int32(word) for word in (*key_of(seed), chain))
            when = step if isinstance(step, Tensor) else as_int32(step)
            with torch.cuda.device_of(self._blocks):
                langevin_kernel[(programs,)](
                    self._table,
                    len(gradients),
                    self._blocks,
                    programs,
                    self._bits,
                    sums,
                    key0,
                    key1,
                    when,
                    chain,
                    *self._scalars,
                    COUNTED=counted,
                    **self._features,
                )
        return sums.sum(dim=0, dtype=torch.float64) if metrics else None

    def _renew_table(self, gradients: Sequence[Tensor | None]) -> None:
        """Upload the table if an address changed, which no one waits for."""
        table = np.stack([addresses(gradients), addresses(self._group.weights), *self._fixed])
        if not np.array_equal(table, self._host_table):
            self._host_table = table
            on_host = torch.from_numpy(table)
            if self._device.type == "cuda":  # a copy from pageable memory would wait for the GPU
                on_host = on_host.pin_memory()
            self._table = on_host.to(self._device, non_blocking=True)


@triton.jit(do_not_specialize=["tensors", "programs", "key0", "key1", "step", "chain"])
def langevin_kernel(  # type: ignore[no-untyped-def]
    table,
    tensors,
    blocks,
    programs,
    bits,
    sums,
    key0,
    key1,
    step,
    chain,
    gradient_factor,
    decay_factor,
    pull_factor,
    noise_factor,
    box,
    alpha,
    eps,
    STORED: tl.constexpr,
    NOISE: tl.constexpr,
    RMSPROP: tl.constexpr,
    METRICS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ZERO_GRADS: tl.constexpr,
    COUNTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if COUNTED:
        step = tl.load(step).to(tl.int32)
    program = tl.program_id(0)
    entry = table + tl.load(blocks + program)
    start = tl.load(blocks + programs + program)
    gradient = tl.load(entry)
    if gradient == 0:
        return
    weight = tl.load(entry + tensors).to(tl.pointer_type(STORED))
    anchor = tl.load(entry + 2 * tensors)
    size = tl.load(entry + 4 * tensors)
    mask = tl.load(blocks + 2 * programs + program)
    lanes = tl.arange(0, BLOCK)
    where = start + lanes
    inside = where < size
    # no anchor (an address of zero) and no mask (a negative place) read their defaults
    none = tl.zeros([BLOCK], tl.int64)
    anchored = inside & ((none + anchor) != 0)
    partial = inside & ((none + mask) >= 0)

    w = tl.load(weight + where, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gradient.to(tl.pointer_type(STORED)) + where, mask=inside, other=0.0)
    g = g.to(tl.float32)
    if ZERO_GRADS:
        nothing = tl.zeros([BLOCK], STORED)
        tl.store(gradient.to(tl.pointer_type(STORED)) + where, nothing, mask=inside)
    w0 = tl.load(anchor.to(tl.pointer_type(STORED)) + where, mask=anchored, other=0.0)
    w0 = w0.to(tl.float32)
    byte = tl.load(bits + mask + lanes // 8, mask=partial, other=255).to(tl.int32)
    keep = ((byte >> (lanes % 8)) & 1) != 0

    stream = tl.load(entry + 5 * tensors).to(tl.int32)
    noise = tl.zeros([BLOCK], tl.float32)
    if NOISE:
        noise = normal(start, key0, key1, stream, step, chain, BLOCK)
    gain = tl.full([BLOCK], 1.0, tl.float32)
    if RMSPROP:
        square = tl.load(entry + 3 * tensors).to(tl.pointer_type(tl.float32))
        v = tl.load(square + where, mask=inside, other=0.0)
        v = alpha * v + (1.0 - alpha) * (g * g)
        tl.store(square + where, v, mask=inside)
        gain = 1.0 / (tl.sqrt(v) + eps)

    distance = w - w0
    if METRICS:
        live = inside & keep
        a = tl.where(live, gain * g, 0.0)
        b = tl.where(live, gain * distance, 0.0)
        c = tl.where(live, gain * w, 0.0)
        n = tl.where(live, tl.sqrt(gain) * noise, 0.0)
        p = decay_factor * c + pull_factor * b
        row = sums + program * 9
        tl.store(row, tl.sum(a * a))
        tl.store(row + 1, tl.sum(g * g))
        tl.store(row + 2, tl.sum(b * b))
        tl.store(row + 3, tl.sum(c * c))
        tl.store(row + 4, tl.sum(n * n))
        tl.store(row + 5, tl.sum(distance * distance))
        tl.store(row + 6, tl.sum(a * p))
        tl.store(row + 7, tl.sum(a * n))
        tl.store(row + 8, tl.sum(p * n))

    drift = gradient_factor * g + decay_factor * w + pull_factor * distance
    moved = w + (gain * drift + tl.sqrt(gain) * (noise_factor * noise))
    low = w0 - box
    high = w0 + box
    moved = tl.where(moved < low, low, moved)
    moved = tl.where(moved > high, high, moved)
    moved = tl.where(keep, moved, w)
    if STOCHASTIC:
        random = words(start, key0, key1, stream, step, chain | (ROUNDING << 24), BLOCK)
        moved = rounded_at_random(moved, random)
    tl.store(weight + where, moved.to(STORED), mask=inside)


@triton.jit
def rounded_at_random(values, random):  # type: ignore[no-untyped-def]
    """To bfloat16, up or down so that the mean is kept: random bits are added to those cut off."""
    bits = values.to(tl.uint32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    up = (bits + (random >> 16)) & 0xFFFF0000
    return tl.where(finite, up.to(tl.float32, bitcast=True), values)
