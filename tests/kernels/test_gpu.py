"""The Triton kernels on a real GPU: ``TRITON_INTERPRET=0 pytest -m gpu tests/kernels``."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from basinscope.kernels.cross_entropy import next_token_cross_entropy, token_cross_entropy
from basinscope.kernels.linear_cross_entropy import linear_token_cross_entropy
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
def test_the_update_is_that_of_the_reference(dtype: torch.dtype, rmsprop: dict[str, Any]) -> None:
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
    for one, other in zip(our_metrics, their_metrics, strict=True):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("path", ["triton", "reference"])
def test_reused_logits_hold_the_gradient_of_the_next_tokens(dtype: torch.dtype, path: str) -> None:
    full = (4 * torch.randn(3, 9, 5003, device="cuda")).to(dtype)
    ids = torch.randint(5003, (3, 9), device="cuda")
    upstream = torch.randn(3, 8, device="cuda")
    leaf = full.clone().requires_grad_()
    expected = token_cross_entropy(leaf[:, :-1], ids[:, 1:], path=path)
    expected.backward(upstream)

    logits = full.clone().requires_grad_() * 1
    loss = next_token_cross_entropy(logits, ids, reuse_logits=True, path=path)
    (gradient,) = torch.autograd.grad(loss, logits, upstream)
    assert torch.equal(loss, expected)
    assert leaf.grad is not None
    assert torch.equal(gradient, leaf.grad)
    assert gradient.data_ptr() == logits.data_ptr()
    assert not gradient[:, -1].any()


def test_more_logits_than_32_bits_count() -> None:
    """4.3 GB of logits, and their gradient in the same memory."""
    vocabulary, tokens = 50_304, 2**31 // 50_304 + 9
    if torch.cuda.mem_get_info()[0] < 8e9:
        pytest.skip("needs 8 GB of free memory on the device")
    logits = torch.empty(tokens, vocabulary, device="cuda", dtype=torch.bfloat16).normal_()
    targets = torch.randint(vocabulary, (tokens,), device="cuda")
    upstream = torch.randn(tokens, device="cuda")
    parts = [slice(start, min(start + 2000, tokens)) for start in range(0, tokens, 2000)]
    reference = torch.cat(
        [token_cross_entropy(logits[part], targets[part], path="reference") for part in parts]
    )
    last = logits[-32:].clone().requires_grad_()
    token_cross_entropy(last, targets[-32:], path="reference").backward(upstream[-32:])

    loss = token_cross_entropy(logits.requires_grad_(), targets, reuse_logits=True, path="triton")
    torch.testing.assert_close(loss, reference, atol=5e-6, rtol=5e-6)
    (gradient,) = torch.autograd.grad(loss, logits, upstream)
    assert gradient.data_ptr() == logits.data_ptr()
    torch.testing.assert_close(gradient[-32:], last.grad, atol=1e-6, rtol=2**-7)
    # a softmax minus a one at the target adds up to zero
    sums = torch.cat([gradient[part].sum(-1, dtype=torch.float32) for part in parts])
    assert (sums.abs() < 0.02 * upstream.abs() + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"bias": True, "scale": 0.5, "softcap": 20.0}], ids=["plain", "bias and cap"]
)
@pytest.mark.parametrize("shared", [True, False], ids=["mean", "per token"])
@pytest.mark.parametrize("width", [320, 333])
def test_the_loss_of_a_linear_head_is_that_of_the_reference(
    dtype: torch.dtype, options: dict[str, Any], shared: bool, width: int
) -> None:
    """Products are summed in another order, and slopes have 16 bits where the inputs have."""
    tokens, vocabulary = 257, 5003
    options = dict(options)
    inputs = [
        torch.randn(tokens, width, device="cuda").to(dtype),
        (3 / width**0.5 * torch.randn(vocabulary, width, device="cuda")).to(dtype),
    ]
    if options.pop("bias", False):
        inputs.append(torch.randn(vocabulary, device="cuda").to(dtype))
    targets = torch.randint(vocabulary, (tokens,), device="cuda")
    upstream = torch.randn(tokens, device="cuda")
    if shared:
        upstream = torch.full_like(upstream, 1 / tokens)
    results = []
    for path in ("triton", "triton", "reference"):
        hidden, weight, *bias = leaves = [t.clone().requires_grad_() for t in inputs]
        loss = linear_token_cross_entropy(
            hidden, weight, targets, bias=bias[0] if bias else None, path=path, **options
        )
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves, upstream)])
    first, second, reference = results
    for ours, again in zip(first, second, strict=True):
        assert torch.equal(ours, again)
    torch.testing.assert_close(first[0], reference[0], atol=3e-5, rtol=1e-5)
    for ours, theirs in zip(first[1:], reference[1:], strict=True):
        assert ours.dtype == dtype
        error = (ours.double() - theirs.double()).norm() / theirs.double().norm()
        assert error < max(0.5 * torch.finfo(dtype).eps, 1e-5)


def test_a_target_that_is_no_token_has_a_loss_of_nan() -> None:
    hidden = torch.randn(6, 64, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(300, 64, device="cuda", dtype=torch.bfloat16)
    targets = torch.tensor([-100, -1, 299, 300, 511, 2**40], device="cuda")
    for loss in (
        token_cross_entropy(hidden @ weight.t(), targets),
        linear_token_cross_entropy(hidden, weight, targets),
    ):
        assert loss.isfinite().tolist() == [False, False, True, False, False, False]
