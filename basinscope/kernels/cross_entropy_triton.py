"""Per-token cross-entropy in Triton: one program per token, online softmax over the vocabulary."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_MAX_BLOCK = 4096


def forward(rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Losses (A * B,) and levels (2, A * B), float32, for logits (A, B, V)."""
    loss = torch.empty(targets.shape, dtype=torch.float32, device=rows.device)
    level = torch.empty((2, len(loss)), dtype=torch.float32, device=rows.device)
    if loss.numel():
        _, inner, vocabulary = rows.shape
        outer_stride, inner_stride, _ = rows.stride()
        with torch.cuda.device_of(rows):
            loss_kernel[(loss.numel(),)](
                rows, outer_stride, inner_stride, inner, vocabulary, targets, loss, level,
                **_shape_of_program(vocabulary),
            )  # fmt: skip
    return loss, level


def backward(rows: Tensor, targets: Tensor, level: Tensor, upstream: Tensor, out: Tensor) -> None:
    """Write the gradient (softmax - one hot) * upstream to ``out``, which may be the rows."""
    if targets.numel():
        _, inner, vocabulary = rows.shape
        with torch.cuda.device_of(rows):
            gradient_kernel[(targets.numel(),)](
                rows, *rows.stride()[:2], out, *out.stride()[:2], inner, vocabulary, targets,
                level.contiguous(),
                upstream, **_shape_of_program(vocabulary),
            )  # fmt: skip


def _shape_of_program(vocabulary: int) -> dict[str, int]:
    block = min(_MAX_BLOCK, triton.next_power_of_2(vocabulary))
    return {"BLOCK": block, "num_warps": 8 if block >= 2048 else 4}


@triton.jit
def loss_kernel(  # type: ignore[no-untyped-def]
    logits, outer_stride, inner_stride, inner, vocabulary, targets, loss, level, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    row = logits + (token // inner) * outer_stride + (token % inner) * inner_stride
    lanes = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        x = tl.load(row + start + lanes, mask=start + lanes < vocabulary, other=float("-inf"))
        x = x.to(tl.float32)
        # one exponential per logit: of x and top, the smaller is counted in units of the larger;
        # a lane that saw only -inf so far has a sum of zero, and a NaN enters through the sum
        ratio = tl.exp(-tl.abs(x - tl.where(top == float("-inf"), 0.0, top)))
        higher = x > top
        total = tl.where(higher, total * ratio + 1.0, total + ratio)
        top = tl.where(higher, x, top)
    peak = tl.max(top, axis=0)
    log_total = tl.log(tl.sum(total * tl.exp(top - peak), axis=0))
    wanted = tl.load(targets + token)
    known = (wanted >= 0) & (wanted < vocabulary)
    target = tl.load(row + wanted, mask=known, other=float("nan")).to(tl.float32)
    tl.store(loss + token, log_total - (target - peak))
    tl.store(level + token, peak)
    tl.store(level + tl.num_programs(0) + token, log_total)


@triton.jit
def gradient_kernel(  # type: ignore[no-untyped-def]
    logits,
    outer_stride,
    inner_stride,
    gradient,
    gradient_outer_stride,
    gradient_inner_stride,
    inner,
    vocabulary,
    targets,
    level,
    upstream,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    a = token // inner
    b = token % inner
    row = logits + a * outer_stride + b * inner_stride
    out = gradient + a * gradient_outer_stride + b * gradient_inner_stride
    target = tl.load(targets + token)
    scale = tl.load(upstream + token)
    peak = tl.load(level + token)
    log_total = tl.load(level + tl.num_programs(0) + token)
    lanes = tl.arange(0, BLOCK)
    for start in range(0, vocabulary, BLOCK):
        where = start + lanes
        inside = where < vocabulary
        x = tl.load(row + where, mask=inside, other=0.0).to(tl.float32)
        slope = (tl.exp((x - peak) - log_total) - tl.where(where == target, 1.0, 0.0)) * scale
        tl.store(out + where, slope.to(gradient.dtype.element_ty), mask=inside)
