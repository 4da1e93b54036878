"""How arrays are encoded: lossless by default, and every chunk carries a checksum."""

from __future__ import annotations

from typing import Any

from zarr.codecs import BloscCodec, Crc32cCodec, TransposeCodec

MANTISSA_BITS = 23  # of a float32


def loss_filters(ndim: int, keep_bits: int | None = None) -> list[Any]:
    """Order a (chain, draw, sequence, token) chunk so that the draws of one token are neighbours.

    A token's loss changes little from draw to draw, so its exponent bytes compress well when
    they stand side by side.

    Parameters
    ----------
    ndim : int
        Number of dimensions; the second one is moved to the end.
    keep_bits : int, optional
        Round each float32 to this many mantissa bits first. The relative error of a value is
        then at most ``rounding_error(keep_bits)``. None stores every bit.
    """
    filters: list[Any] = []
    if keep_bits is not None:
        from zarr.codecs.numcodecs import BitRound

        filters.append(BitRound(keepbits=keep_bits))
    filters.append(TransposeCodec(order=(0, *range(2, ndim), 1)))
    return filters


def rounding_error(keep_bits: int) -> float:
    """Bound the relative error of a float32 rounded to ``keep_bits`` mantissa bits."""
    return float(2.0 ** -(keep_bits + 1))


def compressors(item_bytes: int) -> list[Any]:
    """Blosc (byte shuffle, zstd level 1), then a CRC32C so that a flipped bit is an error."""
    return [
        BloscCodec(cname="zstd", clevel=1, shuffle="shuffle", typesize=item_bytes),
        Crc32cCodec(),
    ]
