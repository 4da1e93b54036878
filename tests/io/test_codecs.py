"""Rounded losses keep the error that is stated for them."""

from __future__ import annotations

import numpy as np
import pytest

from basinscope.io.codecs import round_losses, rounding_error


@pytest.mark.parametrize("bits", [1, 4, 9, 16, 23])
def test_rounded_losses_keep_their_stated_error(bits: int) -> None:
    exponents = np.random.default_rng(bits).uniform(-20, 20, (3, 50, 40, 7))
    losses = np.exp(exponents).astype(np.float32)
    rounded = round_losses(losses, bits)
    assert rounded.dtype == np.float32
    assert rounded.shape == losses.shape
    error = np.abs(rounded.astype(np.float64) - losses) / losses
    assert error.max() <= rounding_error(bits) == 2.0 ** -(bits + 1)
    if bits < 20:
        assert error.max() > rounding_error(bits) / 2, "the bound is not tight"
