"""Conversions of the 16-bit types, compiled."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from basinscope.kernels import compiled
from basinscope.kernels.pointers import name_of


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_16_bit_values_survive_a_round_trip(dtype: torch.dtype) -> None:
    """Widening is exact and narrowing its inverse, infinities and subnormal numbers included."""
    stored = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    bits = stored.view(torch.int16).numpy().view(np.uint16)
    _, half = compiled.STORAGE[name_of(dtype)]
    wide = compiled._widened(bits, half, np.empty(bits.size, np.float32))
    np.testing.assert_array_equal(wide, stored.float().numpy())
    back = np.empty_like(bits)
    compiled.narrow(wide, back, half)
    numbers = ~np.isnan(wide)
    np.testing.assert_array_equal(back[numbers], bits[numbers])
    assert torch.from_numpy(back.view(np.int16)).view(dtype)[~numbers].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrowing_rounds_as_torch_does(dtype: torch.dtype) -> None:
    values = torch.randn(100_000) * 10.0 ** torch.randint(-9, 6, (100_000,))
    stored = values.to(dtype)
    ties = stored.float() + (torch.nextafter(stored, stored * 2).float() - stored.float()) / 2
    values = torch.cat([values, ties[ties.isfinite()]])
    out = np.empty(values.numel(), np.uint16)
    compiled.narrow(values.numpy(), out, compiled.STORAGE[name_of(dtype)][1])
    assert torch.equal(torch.from_numpy(out.view(np.int16)).view(dtype), values.to(dtype))
