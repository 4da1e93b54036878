"""Numba's on-disk cache, and conversions of the 16-bit types."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import ModuleType
from typing import Any

import numba
import numpy as np
import pytest
import torch

from basinscope.analysis import sums, token_means
from basinscope.jit import jit
from basinscope.kernels import compiled
from basinscope.kernels.pointers import name_of


@pytest.mark.parametrize("module", [sums, token_means], ids=lambda m: m.__name__)
def test_what_is_inlined_from_other_files_carries_their_digest(module: ModuleType) -> None:
    """Numba's cache sees a change of the file itself only, so the file must change too."""
    assert module.__file__
    for name, digest in module.INLINED.items():
        current = hashlib.sha256((Path(module.__file__).parent / name).read_bytes()).hexdigest()[
            :16
        ]
        assert digest == current, f'set INLINED["{name}"] to "{current}" in {module.__file__}'


def test_the_kernels_work_where_no_cache_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numba then refuses ``cache=True`` with a RuntimeError."""
    njit = numba.njit

    def refusing(*args: Any, cache: bool = False, **options: Any) -> Any:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(*args, **options)

    monkeypatch.setattr(numba, "njit", refusing)

    @jit
    def twice(x: float) -> float:
        return 2 * x

    assert twice(1.5) == 3.0


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
