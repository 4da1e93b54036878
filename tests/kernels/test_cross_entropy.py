"""Per-token cross-entropy on every path against float64."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from basinscope.kernels import cross_entropy_triton
from basinscope.kernels.cross_entropy import next_token_cross_entropy, token_cross_entropy
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


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shift", [0.0, -100.0])
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
def test_the_error_is_not_larger_than_eager_torch_has(
    path: str, dtype: torch.dtype, shift: float
) -> None:
    """Root mean square against float64; 1.15 for the scatter of float32's roundings.

    Twice that for gradients in bfloat16 in Triton's interpreter, which truncates where it stores
    them; a GPU rounds. A model's logits may lie anywhere: GPT-2's are about -100.
    """
    logits = (5 * torch.randn(150, 2000) + shift).to(dtype)
    targets, upstream = torch.randint(2000, (150,)), torch.randn(150)
    wide = logits.double().numpy()
    truth = (
        oracle.losses(wide, targets.numpy()),
        oracle.gradient(wide, targets.numpy(), upstream.double().numpy()),
    )
    errors = []
    for ours in (True, False):
        leaf = logits.clone().requires_grad_()
        if ours:
            loss = token_cross_entropy(leaf, targets, path=path)
        else:
            loss = F.cross_entropy(leaf.float(), targets, reduction="none")
        (slope,) = torch.autograd.grad(loss, leaf, upstream)
        found = (loss.detach().double().numpy(), slope.double().numpy())
        errors.append([np.sqrt(((f - t) ** 2).mean()) for f, t in zip(found, truth, strict=True)])
    (of_loss, of_slope), (allowed_of_loss, allowed_of_slope) = errors
    assert of_loss <= 1.15 * allowed_of_loss
    cut = path == "triton" and dtype == torch.bfloat16
    assert of_slope <= (2.5 if cut else 1.15) * allowed_of_slope


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("reuse", [False, True], ids=["new memory", "reused memory"])
def test_next_tokens_are_those_without_the_last_position(
    path: str, dtype: torch.dtype, reuse: bool
) -> None:
    full, ids = torch.randn(3, 6, 35).to(dtype), torch.randint(35, (3, 6))
    upstream = torch.randn(3, 5)
    results = []
    for whole in (True, False):
        leaf = full.clone().requires_grad_()
        made = leaf + 0  # a leaf's memory is not for reuse
        if whole:
            loss = next_token_cross_entropy(made, ids, reuse_logits=reuse, path=path)
        else:
            loss = token_cross_entropy(made[:, :-1], ids[:, 1:], path=path)
        loss.backward(upstream)
        assert leaf.grad is not None
        results.append((loss, leaf.grad))
    (loss, slope), (expected, expected_slope) = results
    assert loss.shape == (3, 5)
    assert torch.equal(loss, expected)
    assert slope.dtype == dtype
    assert torch.equal(slope, expected_slope)
    assert not slope[:, -1].any()
    assert slope[:, :-1].any(-1).all()


TARGETS = {
    "one of two": lambda ids: ids[:, 1:2],
    "every second": lambda ids: ids[:, ::2],
    "transposed": lambda ids: ids.t()[:4, :4],
    "the same": lambda ids: ids[:1, :1].expand(4, 4),
    "int32": lambda ids: ids.to(torch.int32)[:, 1:],
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("view", TARGETS)
def test_targets_in_any_memory(path: str, view: str) -> None:
    targets = TARGETS[view](torch.randint(300, (4, 8)))
    logits = torch.randn(*targets.shape, 300)
    upstream = torch.randn(targets.shape)
    results = []
    for ids in (targets, targets.long().clone(memory_format=torch.contiguous_format)):
        leaf = logits.clone().requires_grad_()
        loss = token_cross_entropy(leaf, ids, path=path)
        results.append((loss, *torch.autograd.grad(loss, leaf, upstream)))
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", [(1, 2, 1), (1, 2, 5), (4, 2, 300), (1, 40, 5)], ids=str)
def test_next_tokens_of_any_shape(path: str, shape: tuple[int, int, int]) -> None:
    logits, ids = torch.randn(shape), torch.randint(shape[-1], shape[:2])
    loss = next_token_cross_entropy(logits, ids, path=path)
    expected = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    torch.testing.assert_close(loss, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    ("shape", "ids", "message"),
    [
        ((2, 1, 5), (2, 1), r"at least two tokens, got \(2, 1, 5\)"),
        ((2, 5), (2,), r"\(batch, token, vocabulary\).*got \(2, 5\)"),
        ((2, 3, 5), (2, 2), r"\(2, 2\) do not fit; expected \(2, 3\)"),
    ],
)
def test_what_has_no_next_token_is_refused(
    shape: tuple[int, ...], ids: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        next_token_cross_entropy(torch.zeros(shape), torch.zeros(ids, dtype=torch.long))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_reused_logits_hold_the_gradient(path: str, dtype: torch.dtype) -> None:
    """Also those of a view, whose gaps stay as they are."""
    full, targets = torch.randn(3, 6, 40).to(dtype), torch.randint(35, (3, 5))
    upstream = torch.randn(3, 5)
    source = full.clone().requires_grad_()
    view = source[:, :-1, :35]
    (expected,) = torch.autograd.grad(token_cross_entropy(view, targets, path=path), view, upstream)

    made = source * 1
    logits = made[:, :-1, :35]
    loss = token_cross_entropy(logits, targets, reuse_logits=True, path=path)
    assert torch.equal(made, full), "the forward pass leaves logits alone"
    (gradient,) = torch.autograd.grad(loss, logits, upstream)
    assert torch.equal(gradient, expected)
    assert gradient.data_ptr() == made.data_ptr()
    assert gradient.stride() == logits.stride()
    assert torch.equal(made[:, :-1, :35], expected)
    assert torch.equal(made[:, -1], full[:, -1])
    assert torch.equal(made[..., 35:], full[..., 35:])


@pytest.mark.parametrize("path", PATHS)
def test_logits_that_had_to_be_copied_are_not_written_over(path: str) -> None:
    logits = (torch.randn(4, 70, requires_grad=True) * 1)[:, ::2]
    before = logits.detach().clone()
    targets = torch.randint(35, (4,))
    loss = token_cross_entropy(logits, targets, reuse_logits=True, path=path)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert torch.equal(logits, before)
    expected = before.softmax(-1) - F.one_hot(targets, 35)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", [(1, 1, 9), (1, 4, 9)], ids=str)
def test_logits_that_share_memory_are_not_written_over(
    path: str, shape: tuple[int, int, int]
) -> None:
    one = torch.randn(shape, requires_grad=True)
    targets = torch.randint(9, (3, 4))
    found, expected = (
        torch.autograd.grad(
            token_cross_entropy(
                (one * 1).expand(3, 4, 9), targets, reuse_logits=reuse, path=path
            ).sum(),
            one,
        )[0]
        for reuse in (True, False)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("operation", [torch.exp, torch.tanh, torch.sigmoid])
@pytest.mark.parametrize("cut", [False, True], ids=["logits", "a view of them"])
def test_autograd_notices_if_an_operation_needs_the_logits_written_over(
    path: str, operation: Callable[[Tensor], Tensor], cut: bool
) -> None:
    logits = operation(torch.randn(2, 4, 9, requires_grad=True))
    ids = torch.randint(9, (2, 4))
    if cut:
        loss = token_cross_entropy(logits[:, 1:], ids[:, 1:], reuse_logits=True, path=path)
    else:
        loss = next_token_cross_entropy(logits, ids, reuse_logits=True, path=path)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


@pytest.mark.parametrize("path", PATHS)
def test_autograd_notices_a_second_pass_over_reused_logits(path: str) -> None:
    leaf = torch.randn(3, 9, requires_grad=True)
    loss = token_cross_entropy(leaf * 1, torch.tensor([1, 2, 3]), reuse_logits=True, path=path)
    loss.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_target_that_is_no_token_has_a_loss_of_nan_in_triton(dtype: torch.dtype) -> None:
    """On a GPU nobody looks at the targets beforehand, and nothing outside the row is read."""
    logits = torch.randn(1, 6, 300).to(dtype)
    targets = torch.tensor([-100, -1, 299, 300, 0, 2**40])
    loss, lse = cross_entropy_triton.forward(logits, targets)
    assert loss.isfinite().tolist() == [False, False, True, False, True, False]
    slopes = torch.full_like(logits, torch.nan)
    cross_entropy_triton.backward(logits, targets, lse, torch.ones(6), slopes)
    assert slopes.isfinite().all()


@pytest.mark.parametrize("path", ["cpu", "triton"])
@pytest.mark.parametrize("strides", [(2**30 + 7, 500), (500, 2**30 + 7)], ids=["outer", "inner"])
def test_offsets_beyond_32_bits(path: str, strides: tuple[int, int]) -> None:
    """Neither stride needs more than 32 bits, but the offset of the third row does."""
    memory = reserved_memory(2**31 + 2000, torch.bfloat16)
    rows = memory.as_strided((3, 3, 100), (*strides, 1))
    values = torch.randn(3, 3, 100).bfloat16()
    targets = torch.randint(100, (3, 3))
    rows.copy_(values)
    results = []
    for logits in (rows, values):
        source = logits.requires_grad_()
        loss = token_cross_entropy(source, targets, reuse_logits=logits is rows, path=path)
        (gradient,) = torch.autograd.grad(loss.sum(), source)
        results.append((loss, gradient))
    (loss, gradient), (expected, expected_gradient) = results
    assert torch.equal(loss, expected)
    assert gradient.stride() == (*strides, 1)
    assert torch.equal(gradient, expected_gradient)


def reserved_memory(elements: int, dtype: torch.dtype) -> Tensor:
    """Zeros that take physical memory only where they are touched."""
    flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return torch.frombuffer(mmap.mmap(-1, elements * dtype.itemsize, flags=flags), dtype=dtype)
