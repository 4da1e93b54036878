"""How arrays are encoded: lossless by default, and every chunk carries a checksum."""

from __future__ import annotations

from typing import Any

import numpy as np
from numcodecs import BitRound
from zarr.codecs import BloscCodec, Crc32cCodec, TransposeCodec

BLOSC_BLOCK = 2**20  # bytes that are shuffled and compressed together


def draw_last(ndim: int) -> list[Any]:
    """Lay out a (chain, draw, sequence, token) chunk with the draws of one token side by side.

    The loss of a token changes little from draw to draw, so its high bytes compress well when
    they stand side by side.
    """
    return [TransposeCodec(order=(0, *range(2, ndim), 1))]


def round_losses(losses: np.ndarray, keep_bits: int) -> np.ndarray:
    """Round float32 losses to ``keep_bits`` mantissa bits, so that they compress better.

    The values are rounded before they are stored, so that a store needs no codec to undo it. The
    relative error of each is at most :func:`rounding_error`.
    """
    return BitRound(keepbits=keep_bits).encode(losses).view(losses.dtype)


def rounding_error(keep_bits: int) -> float:
    """Bound the relative error of a float32 rounded to ``keep_bits`` mantissa bits."""
    return float(2.0 ** -(keep_bits + 1))


def compressors(item_bytes: int) -> list[Any]:
    """Blosc (byte shuffle, zstd level 3), then a CRC32C so that a flipped bit is an error.

    Blosc's own block size, made for caches, costs 2% of the compression of losses.
    """
    blosc = BloscCodec(
        cname="zstd", clevel=3, shuffle="shuffle", typesize=item_bytes, blocksize=BLOSC_BLOCK
    )
    return [blosc, Crc32cCodec()]
