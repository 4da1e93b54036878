"""The normal stream: known answers, and one stream on all paths."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from basinscope.kernels import compiled, noise_reference, noise_triton
from basinscope.kernels.noise import INIT, LANGEVIN, fill_normal
from tests.reference import philox

PATHS = ["cpu", "reference", "triton"]
CORNERS = dict(seed=2**63 - 1, chain=2**24 - 1, step=2**32 - 1, param_index=2**32 - 1, stream=INIT)
PLAIN = dict(seed=100, chain=0, step=7, param_index=3, stream=LANGEVIN)


@pytest.mark.parametrize(("counter", "key", "expected"), philox.KNOWN_ANSWERS)
def test_known_answers(counter: philox.Words, key: tuple[int, int], expected: philox.Words) -> None:
    assert philox.philox4x32(counter, key) == expected
    words = noise_reference.philox(*(torch.tensor(c) for c in counter), key)
    assert tuple(int(w) for w in words) == expected
    compiled_words = compiled._philox(*(np.uint32(w) for w in (*counter, *key)))
    assert tuple(int(w) for w in compiled_words) == expected


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("address", [PLAIN, CORNERS], ids=["plain", "corners"])
def test_every_path_makes_the_specified_stream(path: str, address: dict[str, Any]) -> None:
    """2e-6 is the error of a float32 angle at the largest radius, 6.8."""
    made = fill_normal(torch.empty(1537), path=path, **address)
    np.testing.assert_allclose(made.numpy(), philox.normals(1537, **address), atol=2e-6, rtol=1e-6)


@settings(deadline=None)  # the first example compiles
@given(
    count=st.integers(0, 5000),
    seed=st.integers(0, 2**63 - 1),
    step=st.integers(0, 2**32 - 1),
    chain=st.integers(0, 2**24 - 1),
)
def test_the_compiled_stream_is_the_reference_stream(
    count: int, seed: int, step: int, chain: int
) -> None:
    ours, theirs = (
        fill_normal(torch.empty(count), seed=seed, chain=chain, step=step, param_index=5, path=path)
        for path in ("cpu", "reference")
    )
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_a_longer_tensor_continues_the_same_numbers(path: str) -> None:
    long = fill_normal(torch.empty(2100), path=path, **PLAIN)
    for count in (1, 5, 1023, 2049):
        assert torch.equal(fill_normal(torch.empty(count), path=path, **PLAIN), long[:count])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
def test_shapes_strides_and_dtypes(path: str, dtype: torch.dtype) -> None:
    flat = fill_normal(torch.empty(15), path=path, **PLAIN)
    grid = torch.zeros(5, 3, dtype=dtype).t()
    assert fill_normal(grid, path=path, **PLAIN) is grid
    assert torch.equal(grid, flat.view(3, 5).to(dtype))
    assert fill_normal(torch.empty(0, 3, dtype=dtype), path=path, **PLAIN).shape == (0, 3)


def test_parameters_that_require_a_gradient_are_filled() -> None:
    parameter = torch.nn.Parameter(torch.zeros(4))
    fill_normal(parameter, **PLAIN)
    assert parameter.requires_grad
    assert parameter.grad_fn is None
    assert (parameter != 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -1}, "seed must be at least 0 and below 9223372036854775808, got -1"),
        ({"seed": 2**63}, "seed must be"),
        ({"chain": 2**24}, "chain must be at least 0 and below 16777216"),
        ({"step": 2**32}, "step must be"),
        ({"param_index": -1}, "param_index must be"),
        ({"stream": 256}, "stream must be"),
    ],
)
def test_addresses_out_of_range_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fill_normal(torch.empty(4), **{**PLAIN, **change})


def test_integers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"floating-point tensor, got torch\.int64"):
        fill_normal(torch.zeros(4, dtype=torch.int64), **PLAIN)


@pytest.mark.parametrize("word", [0, 1, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 1])
def test_words_go_to_the_kernel_as_signed_integers_of_the_same_bits(word: int) -> None:
    signed = noise_triton.as_int32(word)
    assert -(2**31) <= signed < 2**31
    assert signed % 2**32 == word
