"""Losses lie as they compress well, and rounded ones keep the error that is stated for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zarr

from basinscope.io.codecs import draw_last, round_losses, rounding_error


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


def test_draws_of_a_token_lie_side_by_side(tmp_path: Path) -> None:
    losses = np.arange(24, dtype=np.float32).reshape(1, 4, 3, 2)
    array = zarr.create_array(
        tmp_path / "a", shape=losses.shape, chunks=losses.shape, dtype="f4",
        filters=draw_last(4), compressors=None,
    )  # fmt: skip
    array[...] = losses
    (file,) = (file for file in (tmp_path / "a").rglob("*/0") if file.is_file())
    laid_out = np.frombuffer(file.read_bytes(), "<f4")
    np.testing.assert_array_equal(laid_out, losses.transpose(0, 2, 3, 1).ravel())
