"""The normal stream in Triton: the device functions, and the kernel that fills a tensor."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from basinscope.kernels import polynomials

BLOCK = 1024

LOG = tl.constexpr(polynomials.LOG)
SIN = tl.constexpr(polynomials.SIN)
COS = tl.constexpr(polynomials.COS)
SQRT_HALF_BITS = tl.constexpr(polynomials.SQRT_HALF_BITS)
MINUS_TWO_LN_TWO = tl.constexpr(polynomials.MINUS_TWO_LN_TWO)
SCALE = tl.constexpr(2.0**-32)
HALF_SCALE = tl.constexpr(2.0**-33)


def fill(flat: Tensor, key: tuple[int, int], param_index: int, step: int, chain: int) -> None:
    """Fill a contiguous float32 vector; `chain` carries the stream in its top byte."""
    words = [as_int32(word) for word in (*key, param_index, step, chain)]
    grid = (triton.cdiv(flat.numel(), BLOCK),)
    with torch.cuda.device_of(flat):
        fill_kernel[grid](flat, flat.numel(), *words, BLOCK=BLOCK)


def as_int32(word: int) -> int:
    """A 32-bit word as the signed integer of the same bits, so that its Triton type is fixed."""
    return word - 2**32 if word >= 2**31 else word


_WORDS = ["key0", "key1", "stream", "step", "chain"]


@triton.jit(do_not_specialize=["size", *_WORDS])
def fill_kernel(out, size, key0, key1, stream, step, chain, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    start = tl.program_id(0).to(tl.int64) * BLOCK
    where = start + tl.arange(0, BLOCK)
    values = normal(start, key0, key1, stream, step, chain, BLOCK)
    tl.store(out + where, values, mask=where < size)


@triton.jit
def normal(start, key0, key1, stream, step, chain, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Elements ``start`` to ``start + BLOCK - 1`` of a stream; `start` is a multiple of 4."""
    c0, c1, c2, c3 = philox(start, key0, key1, stream, step, chain, BLOCK)
    n0, n1 = box_muller(c0, c1)
    n2, n3 = box_muller(c2, c3)
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))


@triton.jit
def words(start, key0, key1, stream, step, chain, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The words behind ``normal``, in the order of their lanes."""
    c0, c1, c2, c3 = philox(start, key0, key1, stream, step, chain, BLOCK)
    return tl.interleave(tl.interleave(c0, c2), tl.interleave(c1, c3))


@triton.jit
def philox(start, key0, key1, stream, step, chain, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Philox4x32-10 (Salmon et al., SC 2011) of BLOCK // 4 counters."""
    quads = tl.arange(0, BLOCK // 4)
    c0 = (start // 4 + quads).to(tl.uint32)
    none = tl.zeros([BLOCK // 4], tl.uint32)
    c1 = none + word(stream)
    c2 = none + word(step)
    c3 = none + word(chain)
    k0 = word(key0)
    k1 = word(key1)
    for _ in tl.static_range(10):
        left = c0
        right = c2
        c0 = tl.umulhi(none + 0xCD9E8D57, right) ^ c1 ^ k0
        c2 = tl.umulhi(none + 0xD2511F53, left) ^ c3 ^ k1
        c1 = right * 0xCD9E8D57
        c3 = left * 0xD2511F53
        k0 = k0 + tl.full([], 0x9E3779B9, tl.uint32)
        k1 = k1 + tl.full([], 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def word(value):  # type: ignore[no-untyped-def]
    return value.to(tl.uint32, bitcast=True)


@triton.jit
def box_muller(x, y):  # type: ignore[no-untyped-def]
    """As in ``compiled.py``, operation by operation."""
    u = x.to(tl.float32) * SCALE + HALF_SCALE
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - SQRT_HALF_BITS) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    p = tl.zeros_like(f) + LOG[8]
    for i in tl.static_range(8):
        p = p * f + LOG[7 - i]
    radius = tl.sqrt(exponent.to(tl.float32) * MINUS_TWO_LN_TWO + (p * (f * f) - (f + f)))

    t = y.to(tl.float32) * SCALE
    quarter = (t * 4.0 + 0.5).to(tl.int32)
    r = t - quarter.to(tl.float32) * 0.25
    z = r * r
    s = tl.zeros_like(z) + SIN[4]
    c = tl.zeros_like(z) + COS[4]
    for i in tl.static_range(4):
        s = s * z + SIN[3 - i]
        c = c * z + COS[3 - i]
    s = s * r
    swap = (quarter & 1) != 0
    cosine = tl.where(swap, s, c)
    sine = tl.where(swap, c, s)
    cosine = tl.where(((quarter + 1) & 2) != 0, -cosine, cosine)
    sine = tl.where((quarter & 2) != 0, -sine, sine)
    return radius * cosine, radius * sine
