"""The Triton kernels on a real GPU: ``TRITON_INTERPRET=0 pytest -m gpu tests/kernels``."""

from __future__ import annotations

import os

import pytest
import torch

from basinscope.kernels.cross_entropy import token_cross_entropy
from basinscope.kernels.noise import fill_normal
from basinscope.kernels.sgld import SgldUpdate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="triton is interpreted"),
]


def test_the_stream_is_that_of_the_cpu() -> None:
    address = {"seed": 2**62 + 1, "chain": 3, "step": 2**31 + 5, "param_index": 2}
    ours = fill_normal(torch.empty(1_000_001, device="cuda"), path="triton", **address)
    theirs = fill_normal(torch.empty(1_000_001), path="cpu", **address)
    torch.testing.assert_close(ours.cpu(), theirs, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rmsprop", [{}, {"alpha": 0.9, "eps": 0.1}], ids=["plain", "rmsprop"])
def test_the_update_is_that_of_the_reference(dtype: torch.dtype, rmsprop: dict[str, float]) -> None:
    shapes = [(1000, 77), (5,), (0,), (4097,)]
    anchors = [torch.randn(s, device="cuda").to(dtype) for s in shapes]
    masks = [torch.rand(shapes[0], device="cuda") < 0.5, None, None, None]
    results = []
    for path in ("triton", "reference"):
        torch.manual_seed(1)
        weights = [a.clone() for a in anchors]
        update = SgldUpdate(
            weights, anchors=anchors, masks=masks, lr=1e-2, n_beta=10.0, localization=3.0,
            weight_decay=1.0, bounding_box_size=0.5, metrics=True, path=path, **rmsprop,
        )  # fmt: skip
        gradients = [torch.randn_like(w) for w in weights]
        metrics = [update.step(gradients, seed=1, chain=1, step=step) for step in range(3)]
        results.append((weights, metrics))
    (ours, our_metrics), (theirs, their_metrics) = results
    slack = 3 * torch.finfo(dtype).eps
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=max(slack, 5e-6), rtol=max(slack, 5e-6))
    tolerance = 1e-2 if dtype != torch.float32 else 1e-4
    for a, b in zip(our_metrics, their_metrics, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocabulary", [7, 5003, 50304])
def test_the_loss_is_that_of_the_reference(dtype: torch.dtype, vocabulary: int) -> None:
    full = (4 * torch.randn(3, 9, vocabulary, device="cuda")).to(dtype)
    targets = torch.randint(vocabulary, (3, 8), device="cuda")
    upstream = torch.randn(3, 8, device="cuda")
    results = []
    for path in ("triton", "reference"):
        leaf = full.clone().requires_grad_()
        loss = token_cross_entropy(leaf[:, :-1], targets, path=path)
        loss.backward(upstream)
        results.append((loss, leaf.grad))
    (ours, our_slope), (theirs, their_slope) = results
    torch.testing.assert_close(ours, theirs, atol=5e-6, rtol=5e-6)
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(our_slope, their_slope, atol=1e-6, rtol=max(unit, 1e-4))
