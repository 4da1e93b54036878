"""The normal stream in plain torch operations, for any device; int64 stands in for uint32."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def fill(flat: Tensor, key: tuple[int, int], param_index: int, step: int, chain: int) -> None:
    """Fill a contiguous float32 vector; `chain` carries the stream in its top byte."""
    lanes = words(-(-flat.numel() // 4) * 4, key, param_index, step, chain, flat.device).view(-1, 4)
    x0, x1, x2, x3 = lanes.unbind(1)
    numbers = [*_box_muller(x0, x1), *_box_muller(x2, x3)]
    flat.copy_(torch.stack(numbers, dim=1).view(-1)[: flat.numel()])


def words(
    count: int, key: tuple[int, int], param_index: int, step: int, chain: int, device: torch.device
) -> Tensor:
    """Give the first `count` words of a stream, as int64 from 0 to 2^32 - 1."""
    quads = torch.arange(-(-count // 4), dtype=torch.int64, device=device)
    lanes = philox(
        quads,
        torch.full_like(quads, param_index),
        torch.full_like(quads, step),
        torch.full_like(quads, chain),
        key,
    )
    return torch.stack(lanes, dim=1).view(-1)[:count]


def philox(
    c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 of int64 tensors that hold 32-bit words (Salmon et al., SC 2011)."""
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _product(_MULTIPLIERS[0], c0)
        high1, low1 = _product(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return c0, c1, c2, c3


def _product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a 32 x 32-bit product, in halves so that 64 signed bits suffice."""
    upper, lower = a * (b >> 16), a * (b & 0xFFFF)
    high = (upper + (lower >> 16)) >> 16
    return high, ((upper << 16) + lower) & _LOW


def _box_muller(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    u = x.to(torch.float32) * 2.0**-32 + 2.0**-33
    angle = y.to(torch.float32) * 2.0**-32 * (2 * math.pi)
    radius = torch.sqrt(-2 * torch.log(u))
    return radius * torch.cos(angle), radius * torch.sin(angle)
