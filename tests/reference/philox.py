"""Philox4x32-10 and the normal stream: scalar integers and float64, obviously right, slow."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Words = tuple[int, int, int, int]

KNOWN_ANSWERS: list[tuple[Words, tuple[int, int], Words]] = [
    # (counter, key, output) of philox4x32 with 10 rounds: Random123's kat_vectors
    (
        (0, 0, 0, 0),
        (0, 0),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def philox4x32(counter: Words, key: tuple[int, int]) -> Words:
    """Ten rounds on Python integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        left, right = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1 = (right >> 32) ^ c1 ^ k0, right & 0xFFFFFFFF
        c2, c3 = (left >> 32) ^ c3 ^ k1, left & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def normals(
    count: int,
    *,
    seed: int,
    chain: int,
    step: int,
    param_index: int,
    stream: int = 0,
    first_quad: int = 0,
) -> npt.NDArray[np.float64]:
    """`count` numbers of a stream; only the uniforms are rounded to float32."""
    whole = -(-count // 4) * 4
    address = {"seed": seed, "chain": chain, "step": step, "param_index": param_index}
    lanes = words(whole, stream=stream, first_quad=first_quad, **address).astype(np.float32)
    numbers: list[float] = []
    for x, y in lanes.reshape(-1, 2):
        u = np.float64(np.float32(x * np.float32(2.0**-32)) + np.float32(2.0**-33))
        angle = 2 * np.pi * np.float64(y) * 2.0**-32
        radius = np.sqrt(-2 * np.log(u))
        numbers += [radius * np.cos(angle), radius * np.sin(angle)]
    return np.array(numbers[:count])


def words(
    count: int,
    *,
    seed: int,
    chain: int,
    step: int,
    param_index: int,
    stream: int = 0,
    first_quad: int = 0,
) -> npt.NDArray[np.uint64]:
    """`count` 32-bit words of a stream, from a block of four on."""
    key = (seed & 0xFFFFFFFF, seed >> 32)
    quads = range(first_quad, first_quad - (-count // 4))
    counters = [(quad, param_index, step, chain | stream << 24) for quad in quads]
    found = [word for counter in counters for word in philox4x32(counter, key)]
    return np.array(found[:count], dtype=np.uint64)
