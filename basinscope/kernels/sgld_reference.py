"""The SGLD update in plain torch operations, for any device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from basinscope.kernels import noise_reference
from basinscope.kernels.noise import ROUNDING, key_of

if TYPE_CHECKING:
    from basinscope.kernels.sgld import Factors, Group


class ReferencePass:
    """One tensor after the other, one operation after the other."""

    def __init__(self, group: Group, factors: Factors, metrics: bool) -> None:
        self._group, self._factors, self._metrics = group, factors, metrics

    def __call__(
        self, gradients: Sequence[Tensor | None], seed: int, chain: int, step: int | Tensor
    ) -> Tensor | None:
        group, step = self._group, int(step)
        totals = _no_sums(group.weights[0].device) if self._metrics else None
        for i, gradient in enumerate(gradients):
            weight = group.weights[i]
            if gradient is None or weight.numel() == 0:
                continue
            xi = torch.zeros(weight.numel(), dtype=torch.float32, device=weight.device)
            if self._factors.noise != 0:
                noise_reference.fill(xi, key_of(seed), group.streams[i], step, chain)
            words = torch.empty(0)
            if self._factors.stochastic and weight.dtype == torch.bfloat16:
                address = (group.streams[i], step, chain | ROUNDING << 24)
                words = noise_reference.words(weight.numel(), key_of(seed), *address, weight.device)
            sums = self._update(i, gradient, xi.view(weight.shape), words)
            if totals is not None:
                totals += sums
            if group.zero_grads:
                gradient.zero_()
        return totals

    def _update(self, i: int, gradient: Tensor, xi: Tensor, words: Tensor) -> Tensor:
        group, factors = self._group, self._factors
        dtype = torch.float64 if gradient.dtype == torch.float64 else torch.float32
        w = group.weights[i].to(dtype)
        g = gradient.to(dtype)
        w0 = torch.zeros_like(w) if group.anchors is None else group.anchors[i].to(dtype)
        mask = group.masks[i]

        gain = torch.ones_like(w)
        if group.squares is not None:
            v = group.squares[i]
            v.mul_(factors.alpha).add_((1 - factors.alpha) * (g * g))
            gain = 1 / (v.sqrt() + factors.eps)
        noise = gain.sqrt() * xi
        sums = self._sums(w, g, w0, gain, noise, mask) if self._metrics else w.new_zeros(0)
        prior = factors.decay * w + factors.pull * (w - w0)
        moved = w + (gain * (factors.gradient * g + prior) + factors.noise * noise)
        if not math.isinf(factors.box):
            moved = torch.clamp(moved, w0 - factors.box, w0 + factors.box)
        if factors.stochastic and group.weights[i].dtype == torch.bfloat16:
            moved = _rounded_at_random(moved, words.view(moved.shape))
        if mask is not None:
            moved = torch.where(mask.to(moved.device), moved, w)
        group.weights[i].copy_(moved)
        return sums

    def _sums(
        self, w: Tensor, g: Tensor, w0: Tensor, gain: Tensor, noise: Tensor, mask: Tensor | None
    ) -> Tensor:
        """The nine raw sums, see ``basinscope.kernels.sgld.Pass``."""
        a = _masked(gain * g, mask)
        b = _masked(gain * (w - w0), mask)
        c = _masked(gain * w, mask)
        n = _masked(noise, mask)
        p = self._factors.decay * c + self._factors.pull * b
        pairs = [(a, a), (g, g), (b, b), (c, c), (n, n), (w - w0, w - w0), (a, p), (a, n), (p, n)]
        return torch.stack([_dot(x, y) for x, y in pairs])


def _no_sums(device: torch.device) -> Tensor:
    return torch.zeros(9, dtype=_accumulator(device), device=device)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(dtype=_accumulator(x.device))


def _masked(values: Tensor, mask: Tensor | None) -> Tensor:
    return values if mask is None else torch.where(mask.to(values.device), values, 0)


def _rounded_at_random(values: Tensor, words: Tensor) -> Tensor:
    """To bfloat16, up or down, so that the mean is kept; the bits below are added to and cut."""
    bits = values.view(torch.int32)
    up = ((bits + (words >> 16).to(torch.int32)) & -0x10000).view(torch.float32)
    return torch.where(values.isfinite(), up, values)


def _accumulator(device: torch.device) -> torch.dtype:
    """float64, except where the device has none."""
    return torch.float32 if device.type == "mps" else torch.float64
