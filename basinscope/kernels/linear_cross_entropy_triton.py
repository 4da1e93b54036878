"""Cross-entropy of a linear head in Triton, for 16-bit inputs: logits exist only in registers.

Forward: a program takes a block of tokens and a range of the vocabulary, multiplies tile by tile
and keeps each token's maximum and sum of exponentials; the ranges are joined in a fixed order.
Backward: logits are multiplied again, tile by tile, and the slopes of one stretch of the vocabulary
after the other are written to a buffer, from which the library's products make the gradients. No
atomic addition takes part, so results repeat to the last bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from basinscope.kernels.linear_cross_entropy import Gradients, Head, Kept

TOKENS, WORDS, WIDTH = 128, 256, 64  # of a tile, and of one step of its product
FEWER_WORDS = 128  # with a bias or a soft cap, for which a wide tile has too few registers
SLOPE_BYTES = 2**28  # of the buffer of slopes
SLOPE_ROW = 64  # rows of slopes start at multiples of so many, for products of any other are slow
# tanh(x) = x + x^3 TANH(x^2) for |x| <= 0.6, own Chebyshev fit, lowest power first
TANH = tl.constexpr((-0.3333333, 0.13332924, -0.05387514, 0.02111622, -0.00627639))
_PROGRAMS = 1024  # enough to fill a GPU evenly


class FusedKernels:
    """See ``HeadKernels``."""

    def forward(
        self, rows: Tensor, head: Head, targets: Tensor, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor, Kept]:
        tokens, vocabulary = len(rows), len(head.weight)
        if not tokens:
            level = torch.empty((2, 0), dtype=torch.float32, device=rows.device)
            return level[0], Kept(level)
        launch = _launch(head)
        rows, weight = _by_rows(rows), _by_rows(head.weight)
        blocks, tiles = triton.cdiv(tokens, TOKENS), triton.cdiv(vocabulary, launch["WORDS"])
        per_range = triton.cdiv(tiles, max(1, min(tiles, _PROGRAMS // blocks)))
        ranges = triton.cdiv(tiles, per_range)
        top, total = rows.new_empty((2, ranges, tokens), dtype=torch.float32)
        picked = torch.full((tokens,), torch.nan, dtype=torch.float32, device=rows.device)
        with torch.cuda.device_of(rows):
            head_loss_kernel[(blocks, ranges)](
                *_operands(rows, weight, head),
                targets, top, total, picked, per_range, **_features(rows, head), **launch,
            )  # fmt: skip
        # Joined here: ranges are few, and their order is fixed.
        peak = top.amax(0)
        log_total = (total * torch.exp(top - peak)).sum(0).log()
        return log_total - (picked - peak), Kept(torch.stack([peak, log_total]))

    def backward(
        self,
        rows: Tensor,
        head: Head,
        targets: Tensor,
        kept: Kept,
        upstream: Tensor,
        wanted: tuple[bool, bool, bool],
    ) -> Gradients:
        tokens, vocabulary = len(rows), len(head.weight)
        of_hidden = torch.zeros_like(rows, dtype=torch.float32) if wanted[0] else None
        of_weight = torch.zeros_like(head.weight) if wanted[1] else None
        of_bias = torch.zeros_like(head.bias) if head.bias is not None and wanted[2] else None
        if not tokens:
            return None if of_hidden is None else of_hidden.to(rows.dtype), of_weight, of_bias
        launch = _launch(head)
        tile = launch["WORDS"]
        rows, weight = _by_rows(rows), _by_rows(head.weight)
        # slopes are stored in units of the largest upstream gradient, so that small ones survive
        unit = upstream.abs().amax()
        relative = torch.where(unit > 0, upstream / unit, upstream)
        stretch = max(tile, SLOPE_BYTES // (2 * tokens) // tile * tile)
        pitch = triton.cdiv(min(stretch, vocabulary), SLOPE_ROW) * SLOPE_ROW
        buffer = rows.new_empty((tokens, pitch))
        for start in range(0, vocabulary, stretch):
            part = slice(start, min(start + stretch, vocabulary))
            words = part.stop - start
            slopes = buffer[:, :words]
            grid = (triton.cdiv(tokens, TOKENS), triton.cdiv(words, tile))
            with torch.cuda.device_of(rows):
                head_slope_kernel[grid](
                    *_operands(rows, weight, head),
                    targets, kept.level, relative, slopes, start, words, pitch,
                    **_features(rows, head), **launch,
                )  # fmt: skip
            if of_hidden is not None:
                of_hidden += _product(slopes, weight[part])
            if of_weight is not None:
                of_weight[part] = _product(slopes.t(), rows).mul_(unit)
            if of_bias is not None:
                of_bias[part] = slopes.sum(0, dtype=torch.float32).mul_(unit)
        if of_hidden is not None:
            of_hidden = of_hidden.mul_(unit).to(rows.dtype)
        return of_hidden, of_weight, of_bias


def _by_rows(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _operands(rows: Tensor, weight: Tensor, head: Head) -> tuple[object, ...]:
    bias = rows if head.bias is None else head.bias.contiguous()
    sizes = (len(rows), len(weight), rows.shape[1], rows.stride(0), weight.stride(0))
    return (rows, weight, bias, *sizes, head.scale, head.softcap or 1.0)


def _launch(head: Head) -> dict[str, int]:
    plain = head.bias is None and head.softcap is None
    words = WORDS if plain else FEWER_WORDS
    return {"TOKENS": TOKENS, "WORDS": words, "WIDTH": WIDTH, "num_warps": 8, "num_stages": 3}


def _features(rows: Tensor, head: Head) -> dict[str, bool]:
    return {
        "BIAS": head.bias is not None,
        "SOFTCAP": head.softcap is not None,
        "EVEN": rows.shape[1] % WIDTH == 0,
        # Triton's interpreter multiplies the bits of bfloat16 numbers
        "WIDEN": rows.device.type == "cpu",
    }


def _product(a: Tensor, b: Tensor) -> Tensor:
    """The float32 product of 16-bit matrices."""
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    with torch.autocast(a.device.type, enabled=False):
        return a.float() @ b.float()


@triton.jit
def head_loss_kernel(  # type: ignore[no-untyped-def]
    hidden, weight, bias, tokens, vocabulary, width, hidden_stride, weight_stride, scale, softcap,
    targets, top_of, total_of, picked, tiles_per_range,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, EVEN: tl.constexpr, WIDEN: tl.constexpr,
    TOKENS: tl.constexpr, WORDS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    inside = rows < tokens
    target = tl.load(targets + rows, mask=inside, other=-1)
    top = tl.full([TOKENS], float("-inf"), tl.float32)
    total = tl.zeros([TOKENS], tl.float32)
    first = tl.program_id(1) * tiles_per_range
    for tile in range(first, first + tiles_per_range):
        words = (tile * WORDS + tl.arange(0, WORDS)).to(tl.int64)
        logits = logits_tile(
            hidden, weight, bias, rows, words, tokens, vocabulary, width, hidden_stride,
            weight_stride, scale, softcap, BIAS, SOFTCAP, EVEN, WIDEN, TOKENS, WORDS, WIDTH,
        )  # fmt: skip
        hit = words[None, :] == target[:, None]
        found = tl.sum(tl.where(hit, logits, 0.0), axis=1)
        known = (target >= tile * WORDS) & (target < tl.minimum((tile + 1) * WORDS, vocabulary))
        tl.store(picked + rows, found, mask=inside & known)
        logits = tl.where((words < vocabulary)[None, :], logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, axis=1))
        # while all is -inf nothing is shifted, so that the sum stays zero
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(logits - shift[:, None]), axis=1)
        top = higher
    out = tl.program_id(1).to(tl.int64) * tokens + rows
    tl.store(top_of + out, top, mask=inside)
    tl.store(total_of + out, total, mask=inside)


@triton.jit
def head_slope_kernel(  # type: ignore[no-untyped-def]
    hidden, weight, bias, tokens, vocabulary, width, hidden_stride, weight_stride, scale, softcap,
    targets, level, upstream, slopes, start, count, pitch,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, EVEN: tl.constexpr, WIDEN: tl.constexpr,
    TOKENS: tl.constexpr, WORDS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The gradient of h W^T + b in words ``start`` to ``start + count - 1``, (tokens, pitch)."""
    rows = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    columns = tl.program_id(1).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    words = start + columns
    logits = logits_tile(
        hidden, weight, bias, rows, words, tokens, vocabulary, width, hidden_stride,
        weight_stride, scale, softcap, BIAS, SOFTCAP, EVEN, WIDEN, TOKENS, WORDS, WIDTH,
    )  # fmt: skip
    inside = rows < tokens
    target = tl.load(targets + rows, mask=inside, other=-1)
    peak = tl.load(level + rows, mask=inside, other=0.0)
    log_total = tl.load(level + tokens + rows, mask=inside, other=0.0)
    weighting = tl.load(upstream + rows, mask=inside, other=0.0) * scale
    hit = words[None, :] == target[:, None]
    share = tl.exp((logits - peak[:, None]) - log_total[:, None])
    slope = (share - tl.where(hit, 1.0, 0.0)) * weighting[:, None]
    if SOFTCAP:
        bent = logits / softcap
        slope = slope * (1.0 - bent * bent)
    out = slopes + rows[:, None] * pitch + columns[None, :]
    mask = inside[:, None] & (columns < count)[None, :]
    tl.store(out, slope.to(slopes.dtype.element_ty), mask=mask)


@triton.jit
def logits_tile(  # type: ignore[no-untyped-def]
    hidden, weight, bias, rows, words, tokens, vocabulary, width, hidden_stride, weight_stride,
    scale, softcap,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, EVEN: tl.constexpr, WIDEN: tl.constexpr,
    TOKENS: tl.constexpr, WORDS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Logits (TOKENS, WORDS) in float32; those past the last token or word mean nothing."""
    # an index past the end reads the first row, which costs no mask in the loop
    row = tl.where(rows < tokens, rows, 0)
    word = tl.where(words < vocabulary, words, 0)
    lanes = tl.arange(0, WIDTH)
    left = hidden + row[:, None] * hidden_stride + lanes[None, :]
    right = weight + word[None, :] * weight_stride + lanes[:, None]
    logits = tl.zeros([TOKENS, WORDS], tl.float32)
    for k in range(0, width, WIDTH):
        if EVEN:
            h = tl.load(left + k)
            w = tl.load(right + k)
        else:
            h = tl.load(left + k, mask=(k + lanes < width)[None, :], other=0.0)
            w = tl.load(right + k, mask=(k + lanes < width)[:, None], other=0.0)
        if WIDEN:
            h = h.to(tl.float32)
            w = w.to(tl.float32)
        logits = tl.dot(h, w, logits)
    if BIAS:
        logits += tl.load(bias + word).to(tl.float32)[None, :]
    logits *= scale
    if SOFTCAP:
        logits = softcap * tanh(logits / softcap)
    return logits


@triton.jit
def tanh(x):  # type: ignore[no-untyped-def]
    """To float32's precision, relative to its own size, also near zero."""
    z = x * x
    p = tl.zeros_like(z) + TANH[4]
    for i in tl.static_range(4):
        p = p * z + TANH[3 - i]
    far = 2.0 * tl.sigmoid(2.0 * x) - 1.0
    return tl.where(z < 0.36, x + x * (z * p), far)
