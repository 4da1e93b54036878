"""How arrays are encoded: lossless by default, and every chunk carries a checksum."""

from __future__ import annotations

from typing import Any

from zarr.codecs import BloscCodec, Crc32cCodec, TransposeCodec

BLOSC_BLOCK = 2**20  # bytes that are shuffled and compressed together


def loss_filters(ndim: int, draw_last: bool, keep_bits: int | None = None) -> list[Any]:
    """Prepare a (chain, draw, sequence, token) chunk of losses for compression.

    Parameters
    ----------
    ndim : int
        Number of dimensions.
    draw_last : bool
        Move the second dimension to the end. The loss of one token changes little from draw to
        draw, so its high bytes compress well when they stand side by side.
    keep_bits : int, optional
        Round each float32 to this many mantissa bits first. The relative error of a value is
        then at most ``rounding_error(keep_bits)``. None stores every bit.
    """
    filters: list[Any] = []
    if keep_bits is not None:
        from zarr.codecs.numcodecs import BitRound

        filters.append(BitRound(keepbits=keep_bits))
    if draw_last:
        filters.append(TransposeCodec(order=(0, *range(2, ndim), 1)))
    return filters


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
