"""Per-token cross-entropy on every path against float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from basinscope.kernels.cross_entropy import token_cross_entropy
from tests.reference import cross_entropy as oracle

PATHS = ["cpu", "reference", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(logits: Tensor, targets: Tensor, path: str) -> None:
    """Loss to 2e-6 of its scale, gradient to the rounding of the logits' dtype."""
    leaf = logits.detach().requires_grad_()
    upstream = torch.randn(targets.shape)
    loss = token_cross_entropy(leaf, targets, path=path)
    loss.backward(upstream)
    wide = logits.detach().double().numpy()
    truth = oracle.losses(wide, targets.numpy())
    assert loss.dtype == torch.float32
    assert loss.shape == targets.shape
    np.testing.assert_allclose(loss.detach().numpy(), truth, rtol=2e-6, atol=2e-6)

    assert leaf.grad is not None
    assert leaf.grad.dtype == logits.dtype
    slope = oracle.gradient(wide, targets.numpy(), upstream.double().numpy())
    whole = path == "triton" and logits.dtype == torch.bfloat16  # the interpreter truncates
    unit = torch.finfo(logits.dtype).eps * (1.01 if whole else 0.505)
    np.testing.assert_allclose(leaf.grad.double().numpy(), slope, rtol=max(unit, 1e-5), atol=5e-6)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 33), (3, 1000), (4099,), (2, 2, 3, 7), (3, 1), (1, 2)])
def test_shapes_and_dtypes(path: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    logits = (5 * torch.randn(shape)).to(dtype)
    check(logits, torch.randint(shape[-1], shape[:-1]), path)


@pytest.mark.parametrize("path", PATHS)
def test_strided_views(path: str) -> None:
    """The usual view without the last position, a transposed one, and a strided vocabulary."""
    logits = torch.randn(3, 6, 35)
    targets = torch.randint(35, (3, 5), dtype=torch.int32).long()
    check(logits[:, :-1], targets, path)
    check(logits.transpose(0, 1)[:5], targets.t(), path)
    check(torch.randn(3, 5, 70)[..., ::2], targets, path)


def test_gradient_reaches_the_tensor_behind_a_view() -> None:
    full = torch.randn(2, 4, 9, requires_grad=True)
    targets = torch.randint(9, (2, 3))
    token_cross_entropy(full[:, :-1], targets).sum().backward()
    assert full.grad is not None
    assert not full.grad[:, -1].any()
    assert full.grad[:, :-1].any()


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(0, 6),
    vocabulary=st.integers(1, 9000),
    scale=st.floats(0, 60),
    shift=st.floats(-1e4, 1e4),
)
def test_the_compiled_path_at_any_size_and_scale(
    tokens: int, vocabulary: int, scale: float, shift: float
) -> None:
    generator = torch.Generator().manual_seed(tokens + 7 * vocabulary)
    logits = scale * torch.randn(tokens, vocabulary, generator=generator) + shift
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    found = token_cross_entropy(logits, targets, path="cpu")
    truth = oracle.losses(logits.double().numpy(), targets.numpy())
    np.testing.assert_allclose(found.numpy(), truth, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("path", PATHS)
def test_a_certain_token_has_a_small_loss_with_full_precision(path: str) -> None:
    """No cancellation of log-sum-exp and logit: 10 + log(1 + e^-16) - 10 keeps its digits."""
    logits = torch.tensor([[10.0, -6.0], [1000.0, 984.0]])
    loss = token_cross_entropy(logits, torch.tensor([0, 0]), path=path)
    np.testing.assert_allclose(loss.numpy(), math.log1p(math.exp(-16)), rtol=0.1)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, inside Triton's interpreter
def test_logits_that_are_not_finite_show(path: str) -> None:
    logits = torch.randn(5, 37)
    clean = token_cross_entropy(logits, torch.zeros(5, dtype=torch.long), path=path)
    logits[0, 30] = torch.nan
    logits[1, 30] = torch.inf
    logits[2, 0] = -torch.inf
    logits[3] = -torch.inf
    loss = token_cross_entropy(logits, torch.zeros(5, dtype=torch.long), path=path)
    assert not loss[:4].isfinite().any()
    assert loss[4] == clean[4]


@pytest.mark.parametrize("path", PATHS)
def test_minus_infinity_elsewhere_is_a_probability_of_zero(path: str) -> None:
    logits = torch.randn(3, 5000)
    logits[:, 40:] = -torch.inf
    targets = torch.tensor([0, 20, 39])
    loss = token_cross_entropy(logits.requires_grad_(), targets, path=path)
    expected = token_cross_entropy(logits[:, :40], targets, path="reference")
    torch.testing.assert_close(loss, expected)
    loss.sum().backward()
    assert logits.grad is not None
    assert not logits.grad[:, 40:].any()


def test_nothing_is_kept_without_a_gradient() -> None:
    logits = torch.randn(4, 9, requires_grad=True)
    targets = torch.zeros(4, dtype=torch.long)
    assert token_cross_entropy(logits, targets).grad_fn is not None
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert token_cross_entropy(logits, targets).grad_fn is None


def test_float64_logits_are_taken_in_float32() -> None:
    logits = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    loss = token_cross_entropy(logits, torch.tensor([1, 2, 3]))
    loss.sum().backward()
    assert loss.dtype == torch.float32
    assert logits.grad is not None
    assert logits.grad.dtype == torch.float64


@pytest.mark.parametrize("path", PATHS)
def test_no_tokens(path: str) -> None:
    logits = torch.randn(2, 0, 7, requires_grad=True)
    loss = token_cross_entropy(logits, torch.zeros(2, 0, dtype=torch.long), path=path)
    assert loss.shape == (2, 0)
    loss.sum().backward()


def test_the_number_of_threads_changes_no_bit() -> None:
    logits, targets = torch.randn(300, 4000), torch.randint(4000, (300,))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = token_cross_entropy(logits, targets)
        torch.set_num_threads(3)
        assert torch.equal(token_cross_entropy(logits, targets), one)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        (torch.zeros(2, 5), torch.tensor([0, 5]), r"0 \.\. 4, got values from 0 to 5"),
        (torch.zeros(2, 5), torch.tensor([-100, 1]), "from -100 to 1; drop the tokens"),
        (torch.zeros(2, 5), torch.zeros(3, dtype=torch.long), r"\(3,\).*expected \(2,\)"),
        (torch.zeros(2, 5), torch.zeros(2), r"integer token ids, got torch\.float32"),
        (torch.zeros(2, 5, dtype=torch.long), torch.zeros(2, dtype=torch.long), "floating point"),
        (torch.tensor(1.0), torch.tensor(0), "shape"),
    ],
)
def test_what_does_not_fit_is_refused(logits: Tensor, targets: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        token_cross_entropy(logits, targets)
