"""The CPU path, compiled by numba: Philox noise and the SGLD update, block by block.

A block is at most ``BLOCK`` consecutive elements of one tensor, small enough that the noise and
everything read stay in the first-level cache between the short loops below. Tensors come as
addresses, so one call serves all parameters; work on one block depends on nothing but the block,
so any split over threads gives the same bits.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic, overload

from basinscope.jit import FLOAT32, FLOAT64, INT64, OPTIONS, SUMMING, UINT8, UINT32, at, view
from basinscope.kernels.noise import ROUNDING
from basinscope.kernels.polynomials import COS, LOG, MINUS_TWO_LN_TWO, SIN, SQRT_HALF_BITS
from basinscope.kernels.sgld_cpu import BLOCK, N_SUMS

# numba has no 16-bit floats: they travel as uint16, with a number that says how to read them
STORAGE: dict[str, tuple[Any, int | None]] = {
    "float32": (np.float32(0), None),
    "float64": (np.float64(0), None),
    "bfloat16": (np.uint16(0), 0),
    "float16": (np.uint16(0), 1),
}

_inline = numba.njit(forceinline=True, **OPTIONS)


def langevin_blocks(dtype: str, *extras: str) -> Any:
    """Define the update of tensors of a dtype.

    Extras are "squares" (RMSprop), "sums" (raw sums of the metrics), "stochastic" (bfloat16 is
    rounded at random) and "zero_grads" (gradients are left as zeros).
    """
    storage, half = STORAGE[dtype]
    number = FLOAT64 if dtype == "float64" else FLOAT32
    # None or True, which are compiled apart
    preconditioned, measured, stochastic, zero_grads = (
        (extra in extras) or None for extra in ("squares", "sums", "stochastic", "zero_grads")
    )

    def update(
        first: Any, last: Any, tensor_of: Any, start_of: Any, bits_of: Any, bits: Any, sizes: Any,
        streams: Any, anchors: Any, squares: Any, constants: Any, weights: Any, gradients: Any,
        sums: Any, key0: Any, key1: Any, step: Any, chain: Any, scratch: Any,
    ) -> None:  # fmt: skip
        """Update blocks ``first`` to ``last - 1`` in place.

        `tensor_of`, `start_of`, `bits_of` (int64, one entry per block) say which elements a block
        is and where in `bits` its mask is, see ``pointers.Blocks``; `sizes`, `streams` (parameter
        index) and the four tables of addresses have one entry per tensor, int64. An address of
        zero means: no gradient (leave the tensor alone), no anchor. `constants` has the type of the
        arithmetic; `sums` (block, ``N_SUMS``) is float64; `scratch` has ``SCRATCH`` bytes.
        """
        gradient_factor = at(constants, 0, number)
        decay_factor = at(constants, 1, number)
        pull_factor = at(constants, 2, number)
        noise_factor = at(constants, 3, number)
        box = at(constants, 4, number)
        alpha = at(constants, 5, number)
        eps = at(constants, 6, number)
        # five rows of up to 8 bytes, two of 4, one of 1
        zeros = view(scratch, 0, BLOCK, number)
        gain = view(scratch, BLOCK, BLOCK, number)
        for_weights = view(scratch, 2 * BLOCK, BLOCK, number)
        for_gradients = view(scratch, 3 * BLOCK, BLOCK, number)
        for_anchors = view(scratch, 4 * BLOCK, BLOCK, number)
        noise = view(scratch, 10 * BLOCK, BLOCK, FLOAT32)
        words = view(scratch, 11 * BLOCK, BLOCK, UINT32)
        mask = view(scratch, 48 * BLOCK, BLOCK, UINT8)
        zeros[:] = 0
        noise[:] = 0
        for block in range(first, last):
            t = at(tensor_of, block, INT64)
            slopes = at(gradients, t, INT64)
            if slopes == 0:
                continue
            where = at(weights, t, INT64)
            start = at(start_of, block, INT64)
            count = min(BLOCK, at(sizes, t, INT64) - start)
            stream = at(streams, t, INT64)
            quads, quad = (count + 3) // 4, start // 4
            if noise_factor != 0:
                _normal(noise, quads, quad, stream, step, chain, key0, key1)
            w = read(where, start, count, storage, half, for_weights)
            g = read(slopes, start, count, storage, half, for_gradients)
            w0 = zeros[:count]
            if at(anchors, t, INT64) != 0:
                w0 = read(at(anchors, t, INT64), start, count, storage, half, for_anchors)
            if preconditioned is not None:
                v = view(at(squares, t, INT64), start, count, number)
                _precondition(v, g, gain, alpha, eps)
            h = _unless_none(preconditioned, gain)
            raw = _unless_none(measured, view(sums, N_SUMS * block, N_SUMS, FLOAT64))
            factors = (gradient_factor, decay_factor, pull_factor, noise_factor, box)
            first_bits = at(bits_of, block, INT64)
            if first_bits >= 0:
                _unpack(view(bits, first_bits, BLOCK // 8, UINT8), mask)
                _measure_and_move(w, g, w0, mask, h, noise, factors, raw)
            else:
                _measure_and_move(w, g, w0, None, h, noise, factors, raw)
            if zero_grads is not None:
                view(slopes, start, count, storage)[:] = storage
            if half is not None:
                out = view(where, start, count, storage)
                if stochastic is not None:
                    rounding = chain | ROUNDING << 24
                    _words(words, quads, quad, stream, step, rounding, key0, key1)
                    _narrow_at_random(w, words, out)
                else:
                    narrow(w, out, half)

    return update


def normal_blocks() -> Any:
    """Define the normal stream."""

    def fill(
        first: Any, last: Any, out: Any, size: Any, stream: Any, step: Any, chain: Any,
        key0: Any, key1: Any, scratch: Any,
    ) -> None:  # fmt: skip
        """Fill blocks ``first`` to ``last - 1`` of `size` float32 numbers."""
        noise = view(scratch, 0, BLOCK, FLOAT32)
        for block in range(first, last):
            start = block * BLOCK
            count = min(BLOCK, size - start)
            _normal(noise, (count + 3) // 4, start // 4, stream, step, chain, key0, key1)
            numbers = view(out, start, count, FLOAT32)
            for i in range(np.uint64(count)):
                numbers[i] = noise[i]

    return fill


@_inline
def _measure_and_move(
    w: Any, g: Any, w0: Any, mask: Any, gain: Any, noise: Any, factors: Any, sums: Any
) -> None:
    gradient_factor, decay_factor, pull_factor, noise_factor, box = factors
    if sums is not None:
        _measure(w, g, w0, mask, gain, noise, decay_factor, pull_factor, sums)
    _move(
        w, g, w0, mask, gain, noise,
        gradient_factor, decay_factor, pull_factor, noise_factor, box,
    )  # fmt: skip


@numba.njit(**OPTIONS)
def _move(
    w: Any, g: Any, w0: Any, mask: Any, gain: Any, noise: Any,
    gradient_factor: Any, decay_factor: Any, pull_factor: Any, noise_factor: Any, box: Any,
) -> None:  # fmt: skip
    """w <- clamp(w + G drift + sqrt(G) noise) where M, factors carrying signs and step size."""
    for i in range(np.uint64(w.size)):
        x = w[i]
        a = w0[i]
        drift = gradient_factor * g[i] + decay_factor * x + pull_factor * (x - a)
        if gain is None:
            moved = x + (drift + noise_factor * noise[i])
        else:
            moved = x + (gain[i] * drift + np.sqrt(gain[i]) * (noise_factor * noise[i]))
        low = a - box
        high = a + box
        moved = low if moved < low else moved
        moved = high if moved > high else moved
        if mask is not None:
            moved = moved if mask[i] else x
        w[i] = moved


@numba.njit(**OPTIONS)
def _precondition(v: Any, g: Any, gain: Any, alpha: Any, eps: Any) -> None:
    """v <- alpha v + (1 - alpha) g^2; gain = 1 / (sqrt(v) + eps)."""
    one = type(alpha)(1)
    for i in range(np.uint64(v.size)):
        v[i] = alpha * v[i] + (one - alpha) * (g[i] * g[i])
        gain[i] = one / (np.sqrt(v[i]) + eps)


@numba.njit(**SUMMING)
def _measure(
    w: Any, g: Any, w0: Any, mask: Any, gain: Any, noise: Any,
    decay_factor: Any, pull_factor: Any, sums: Any,
) -> None:  # fmt: skip
    """The nine raw sums of one block, in the order of ``basinscope.kernels.sgld``."""
    zero = decay_factor * 0
    aa = gg = bb = cc = nn = dd = ap = an = pn = zero
    for i in range(np.uint64(w.size)):
        keep = True if mask is None else mask[i] != 0
        slope = g[i]
        distance = w[i] - w0[i]
        a = slope if gain is None else gain[i] * slope
        b = distance if gain is None else gain[i] * distance
        c = w[i] if gain is None else gain[i] * w[i]
        n = noise[i] if gain is None else np.sqrt(gain[i]) * noise[i]
        if mask is not None:
            a = a if keep else zero
            b = b if keep else zero
            c = c if keep else zero
            n = n if keep else zero
        p = decay_factor * c + pull_factor * b
        aa += a * a
        gg += slope * slope
        bb += b * b
        cc += c * c
        nn += n * n
        dd += distance * distance
        ap += a * p
        an += a * n
        pn += p * n
    sums[0] = aa
    sums[1] = gg
    sums[2] = bb
    sums[3] = cc
    sums[4] = nn
    sums[5] = dd
    sums[6] = ap
    sums[7] = an
    sums[8] = pn


@numba.njit(**OPTIONS)
def _normal(
    out: Any, quads: Any, first: Any, stream: Any, step: Any, chain: Any, key0: Any, key1: Any
) -> None:
    """Four normal numbers per Philox counter, for counters ``first`` to ``first + quads - 1``."""
    c1 = np.uint32(stream)
    c2 = np.uint32(step)
    c3 = np.uint32(chain)
    k0 = np.uint32(key0)
    k1 = np.uint32(key1)
    base = np.uint32(first)
    for q in range(np.uint64(quads)):
        x0, x1, x2, x3 = _philox(np.uint32(base + np.uint32(q)), c1, c2, c3, k0, k1)
        a0, a1 = _box_muller(x0, x1)
        a2, a3 = _box_muller(x2, x3)
        i = np.uint64(4) * q
        out[i] = a0
        out[i + np.uint64(1)] = a1
        out[i + np.uint64(2)] = a2
        out[i + np.uint64(3)] = a3


@numba.njit(**OPTIONS)
def _words(
    out: Any, quads: Any, first: Any, stream: Any, step: Any, chain: Any, key0: Any, key1: Any
) -> None:
    """The words themselves, in the order of their lanes."""
    c1 = np.uint32(stream)
    c2 = np.uint32(step)
    c3 = np.uint32(chain)
    k0 = np.uint32(key0)
    k1 = np.uint32(key1)
    base = np.uint32(first)
    for q in range(np.uint64(quads)):
        x0, x1, x2, x3 = _philox(np.uint32(base + np.uint32(q)), c1, c2, c3, k0, k1)
        i = np.uint64(4) * q
        out[i] = x0
        out[i + np.uint64(1)] = x1
        out[i + np.uint64(2)] = x2
        out[i + np.uint64(3)] = x3


@_inline
def _philox(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> Any:
    """Philox4x32-10 (Salmon et al., SC 2011); written out so that the loop above vectorises."""
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1, np.uint32(0))
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1, np.uint32(1))
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1, np.uint32(2))
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1, np.uint32(3))
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1, np.uint32(4))
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1, np.uint32(5))
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1, np.uint32(6))
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1, np.uint32(7))
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1, np.uint32(8))
    return _round(c0, c1, c2, c3, k0, k1, np.uint32(9))


@_inline
def _round(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any, number: Any) -> Any:
    left = np.uint64(0xD2511F53) * np.uint64(c0)
    right = np.uint64(0xCD9E8D57) * np.uint64(c2)
    key0 = np.uint32(k0 + np.uint32(0x9E3779B9) * number)
    key1 = np.uint32(k1 + np.uint32(0xBB67AE85) * number)
    return (
        np.uint32(np.uint32(right >> np.uint64(32)) ^ c1 ^ key0),
        np.uint32(right),
        np.uint32(np.uint32(left >> np.uint64(32)) ^ c3 ^ key1),
        np.uint32(left),
    )


@_inline
def _box_muller(x: Any, y: Any) -> Any:
    """Two normal numbers from two words: radius sqrt(-2 ln u), angle 2 pi t."""
    u = np.float32(x) * np.float32(2.0**-32) + np.float32(2.0**-33)
    bits = bits_of(u)
    exponent = np.int32((bits - np.int32(SQRT_HALF_BITS)) >> np.int32(23))
    f = float_of(np.int32(bits - np.int32(exponent << np.int32(23)))) - np.float32(1)
    p = np.float32(LOG[8])
    p = p * f + np.float32(LOG[7])
    p = p * f + np.float32(LOG[6])
    p = p * f + np.float32(LOG[5])
    p = p * f + np.float32(LOG[4])
    p = p * f + np.float32(LOG[3])
    p = p * f + np.float32(LOG[2])
    p = p * f + np.float32(LOG[1])
    p = p * f + np.float32(LOG[0])
    tail = p * (f * f) - (f + f)
    radius = np.sqrt(np.float32(exponent) * np.float32(MINUS_TWO_LN_TWO) + tail)

    t = np.float32(y) * np.float32(2.0**-32)
    quarter = np.int32(t * np.float32(4) + np.float32(0.5))
    r = t - np.float32(quarter) * np.float32(0.25)
    z = r * r
    s = np.float32(SIN[4])
    s = s * z + np.float32(SIN[3])
    s = s * z + np.float32(SIN[2])
    s = s * z + np.float32(SIN[1])
    s = (s * z + np.float32(SIN[0])) * r
    c = np.float32(COS[4])
    c = c * z + np.float32(COS[3])
    c = c * z + np.float32(COS[2])
    c = c * z + np.float32(COS[1])
    c = c * z + np.float32(COS[0])
    swap = (quarter & np.int32(1)) != np.int32(0)
    cosine = s if swap else c
    sine = c if swap else s
    # the sign is flipped on the bits: cosine in quarters 1 and 2, sine in quarters 2 and 3
    flip_c = np.int32(((quarter + np.int32(1)) & np.int32(2)) << np.int32(30))
    flip_s = np.int32((quarter & np.int32(2)) << np.int32(30))
    cosine = float_of(np.int32(bits_of(cosine) ^ flip_c))
    sine = float_of(np.int32(bits_of(sine) ^ flip_s))
    return radius * cosine, radius * sine


def read(address: Any, start: Any, count: Any, storage: Any, half: Any, scratch: Any) -> Any:
    """A view of stored elements, or, for a 16-bit type, their float32 values in the scratch."""


@overload(read, strict=False)
def _read_by_type(
    address: Any, start: Any, count: Any, storage: Any, half: Any, scratch: Any
) -> Any:
    if isinstance(half, types.NoneType):
        return lambda address, start, count, storage, half, scratch: view(
            address, start, count, storage
        )
    return lambda address, start, count, storage, half, scratch: _widened(
        view(address, start, count, storage), half, scratch
    )


def _unless_none(condition: Any, value: Any) -> Any:
    """The value, or None where the condition is None: decided when compiling, by type."""


@overload(_unless_none, strict=False)
def _unless_none_by_type(condition: Any, value: Any) -> Any:
    if isinstance(condition, types.NoneType):
        return lambda condition, value: None
    return lambda condition, value: value


@_inline
def _widened(bits: Any, half: Any, out: Any) -> Any:
    _widen(bits, half, out)
    return out[: bits.size]


@numba.njit(**OPTIONS)
def _widen(bits: Any, half: Any, out: Any) -> None:
    if half == 0:
        for i in range(np.uint64(bits.size)):
            out[i] = float_of(np.int32(np.int32(bits[i]) << np.int32(16)))
    else:
        for i in range(np.uint64(bits.size)):
            out[i] = _from_float16(bits[i])


@numba.njit(**OPTIONS)
def narrow(values: Any, out: Any, half: Any) -> None:
    if half == 0:
        for i in range(np.uint64(values.size)):
            out[i] = _to_bfloat16(values[i])
    else:
        for i in range(np.uint64(values.size)):
            out[i] = _to_float16(values[i])


@numba.njit(**OPTIONS)
def _narrow_at_random(values: Any, words: Any, out: Any) -> None:
    """To bfloat16, up or down so that the mean is kept: random bits are added to those cut off."""
    for i in range(np.uint64(values.size)):
        bits = np.uint32(bits_of(values[i]))
        finite = (bits & np.uint32(0x7F800000)) != np.uint32(0x7F800000)
        up = np.uint16(np.uint32(bits + (words[i] >> np.uint32(16))) >> np.uint32(16))
        out[i] = up if finite else _to_bfloat16(values[i])


@numba.njit(**OPTIONS)
def _unpack(bits: Any, mask: Any) -> None:
    """Bits of a block, lowest first, as one byte each."""
    for i in range(np.uint64(mask.size)):
        mask[i] = (bits[i >> np.uint64(3)] >> np.uint8(i & np.uint64(7))) & np.uint8(1)


@_inline
def _to_bfloat16(value: Any) -> Any:
    """Round to nearest, ties to even, by an addition to the bits; NaN stays NaN."""
    bits = np.uint32(bits_of(value))
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)
    return np.uint16(rounded) if value == value else np.uint16(0x7FC0)


@_inline
def _from_float16(half: Any) -> Any:
    """Exact: the exponent is re-based by a product, which also serves subnormal numbers."""
    h = np.int32(half)
    magnitude = np.int32((h & np.int32(0x7FFF)) << np.int32(13))
    value = float_of(magnitude) * np.float32(2.0**112)
    special = np.int32(magnitude | np.int32(0x7F800000))
    finite = (h & np.int32(0x7C00)) != np.int32(0x7C00)
    bits = bits_of(value) if finite else special
    return float_of(np.int32(bits | np.int32((h & np.int32(0x8000)) << np.int32(16))))


@_inline
def _to_float16(value: Any) -> Any:
    """Round to nearest, ties to even; too large becomes infinity."""
    bits = np.uint32(bits_of(value))
    sign = np.uint16((bits >> np.uint32(16)) & np.uint32(0x8000))
    magnitude = bits & np.uint32(0x7FFFFFFF)
    # subnormal results: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits
    shifted = float_of(np.int32(magnitude)) + np.float32(0.5)
    small = np.uint32(bits_of(shifted)) - np.uint32(0x3F000000)
    odd = (magnitude >> np.uint32(13)) & np.uint32(1)
    normal = np.uint32(magnitude - np.uint32(112 << 23) + np.uint32(0xFFF) + odd) >> np.uint32(13)
    result = small if magnitude < np.uint32(113 << 23) else normal
    result = np.uint32(0x7C00) if magnitude >= np.uint32(0x477FF000) else result
    result = np.uint32(0x7E00) if magnitude > np.uint32(0x7F800000) else result
    return np.uint16(sign | np.uint16(result))


@intrinsic
def bits_of(typingctx: Any, value: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(types.float32), codegen


@intrinsic
def float_of(typingctx: Any, value: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), codegen
