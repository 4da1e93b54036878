"""Cross-entropy of a linear head, a stretch of tokens at a time, around the library's products.

Serves a CPU, float32 on a GPU, and plain torch: what differs is who takes the softmax of a stretch.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from basinscope.kernels.linear import linear
from basinscope.kernels.linear_cross_entropy import Gradients, Head, Kept

STRETCH_BYTES = {"cpu": 2**27, "cuda": 2**29}
"""Most bytes of logits at a time (beyond the least tokens that a product needs to be fast)."""
_FEW = 2**20  # bytes of logits that are never worth splitting: a core's cache holds them
_LEAST, _MOST = 64, 1024  # tokens: the weight's gradient is read and written once per stretch


class ChunkedKernels:
    """See ``HeadKernels``; `softmax` is a path's module of ``cross_entropy.kernels_for``."""

    def __init__(self, softmax: ModuleType) -> None:
        self._softmax = softmax

    def forward(
        self, rows: Tensor, head: Head, targets: Tensor, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor, Kept]:
        loss = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
        level = torch.empty((2, len(rows)), dtype=torch.float32, device=rows.device)
        # without a GPU to fill, the gradient is formed while the logits are at hand
        eager = any(wanted) and rows.device.type == "cpu"
        totals = _Totals(rows, head, wanted) if eager else None
        share = torch.full_like(loss, 1 / max(1, len(rows)))
        for part, hidden, logits in _stretches(rows, head):
            loss[part], level[:, part] = self._softmax.forward(logits[None], targets[part])
            if totals is not None:
                self._to_slope(logits, targets[part], level[:, part], share[part], head)
                totals.add(part, hidden, logits)
            del logits
        return loss, Kept(level, None if totals is None else totals.gradients())

    def backward(
        self,
        rows: Tensor,
        head: Head,
        targets: Tensor,
        kept: Kept,
        upstream: Tensor,
        wanted: tuple[bool, bool, bool],
    ) -> Gradients:
        if kept.gradients is not None and len(rows) and bool((upstream == upstream[0]).all()):
            ratio = float(upstream[0]) * len(rows)
            if abs(ratio - 1) > 1e-7:
                for gradient in kept.gradients:
                    if gradient is not None:
                        gradient.mul_(ratio)
            return _rounded(kept.gradients, rows.dtype)
        totals = _Totals(rows, head, wanted)
        for part, hidden, logits in _stretches(rows, head):
            self._to_slope(logits, targets[part], kept.level[:, part], upstream[part], head)
            totals.add(part, hidden, logits)
            del logits
        return _rounded(totals.gradients(), rows.dtype)

    def _to_slope(
        self, logits: Tensor, targets: Tensor, level: Tensor, upstream: Tensor, head: Head
    ) -> None:
        """Turn logits into the gradient of what they were before scale and cap, in place."""
        bend = None if head.softcap is None else 1 - (logits / head.softcap).square_()
        self._softmax.backward(logits[None], targets, level, upstream, logits[None])
        if bend is not None:
            logits.mul_(bend)
        if head.scale != 1:
            logits.mul_(head.scale)


class _Totals:
    """The gradients, from the slopes of one stretch after the other."""

    def __init__(self, rows: Tensor, head: Head, wanted: tuple[bool, bool, bool]) -> None:
        dtype, device = _arithmetic(rows.dtype), rows.device
        self._weight = head.weight.to(dtype)

        def empty(template: Tensor | None, is_wanted: bool) -> Tensor | None:
            if template is None or not is_wanted:
                return None
            return torch.empty(template.shape, dtype=dtype, device=device)

        self.hidden = empty(rows, wanted[0])
        self.weight = empty(head.weight, wanted[1])
        self.bias = empty(head.bias, wanted[2])
        self._first = True

    def add(self, part: slice, hidden: Tensor, slopes: Tensor) -> None:
        """Count a stretch: hidden states (n, D), slopes (n, V)."""
        if self.hidden is not None:
            torch.mm(slopes, self._weight, out=self.hidden[part])
        beta = 0 if self._first else 1
        if self.weight is not None:
            self.weight.addmm_(slopes.t(), hidden, beta=beta)
        if self.bias is not None:
            total = slopes.sum(0)
            self.bias = total if self._first else self.bias + total
        self._first = False

    def gradients(self) -> Gradients:
        found = (self.hidden, self.weight, self.bias)
        if self._first:  # no tokens
            for gradient in found:
                if gradient is not None:
                    gradient.zero_()
        return found


def _rounded(gradients: Gradients, dtype: torch.dtype) -> Gradients:
    hidden, weight, bias = (None if g is None else g.to(dtype) for g in gradients)
    return hidden, weight, bias


def _stretches(rows: Tensor, head: Head) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield which tokens, their hidden states and their logits (overwritten by the next)."""
    dtype = _arithmetic(rows.dtype)
    weight = head.weight.to(dtype)
    bias = None if head.bias is None else head.bias.to(dtype)
    length = _length(len(rows), weight)
    room = torch.empty((length, len(weight)), dtype=dtype, device=rows.device)
    for start in range(0, len(rows), max(1, length)):
        part = slice(start, min(start + length, len(rows)))
        hidden = rows[part].to(dtype)
        z = linear(hidden, weight, bias, room=room[: len(hidden)])
        if head.scale != 1:
            z.mul_(head.scale)
        if head.softcap is not None:
            z.div_(head.softcap).tanh_().mul_(head.softcap)
        yield part, hidden, z
        del z  # before the next ones are made, which may not be in the same memory


def _length(tokens: int, weight: Tensor) -> int:
    """Tokens per stretch, of nearly equal stretches."""
    per_token = len(weight) * weight.element_size()
    if weight.device.type == "cuda":
        most = max(_LEAST, STRETCH_BYTES["cuda"] // per_token)
    else:
        most = min(_MOST, max(_LEAST, STRETCH_BYTES["cpu"] // per_token))
        most = max(most, _FEW // per_token)
    stretches = -(-tokens // most)
    return -(-tokens // stretches) if stretches else 0


def _arithmetic(dtype: torch.dtype) -> torch.dtype:
    """16-bit numbers are multiplied and summed in float32."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32
