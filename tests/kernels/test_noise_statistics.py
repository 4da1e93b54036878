"""Statistics of the normal stream.

Seeds are fixed, so a passing test keeps passing; for a fresh seed each z-score below would exceed
5 with probability 6e-7 and the Kolmogorov-Smirnov bound with 9e-7. With about 40 such checks, a
right generator fails a fresh seed once in 40,000 runs.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from basinscope.kernels.noise import INIT, LANGEVIN, fill_normal

COUNT = 4_000_000
Z = 5.0


def stream(
    count: int = COUNT,
    seed: int = 20,
    chain: int = 1,
    step: int = 12,
    param_index: int = 4,
    stream: int = LANGEVIN,
) -> Tensor:
    numbers = torch.empty(count)
    fill_normal(numbers, seed=seed, chain=chain, step=step, param_index=param_index, stream=stream)
    return numbers.double()


@pytest.fixture(scope="module")
def numbers() -> Tensor:
    return stream()


def test_moments(numbers: Tensor) -> None:
    """Mean of x^k against E[x^k], in units of its standard deviation."""
    for power, mean, second in [(1, 0, 1), (2, 1, 3), (3, 0, 15), (4, 3, 105), (6, 15, 10395)]:
        deviation = math.sqrt((second - mean**2) / COUNT)
        z = (numbers.pow(power).mean().item() - mean) / deviation
        assert abs(z) < Z, (power, z)


def test_kolmogorov_smirnov(numbers: Tensor) -> None:
    cdf = torch.special.ndtr(numbers.sort().values)
    above = torch.arange(1, COUNT + 1, dtype=torch.float64) / COUNT
    distance = max((above - cdf).max().item(), (cdf - above + 1 / COUNT).max().item())
    assert distance * math.sqrt(COUNT) < 2.7


@pytest.mark.parametrize("sigma", [1, 2, 3, 4, 5])
def test_tails(numbers: Tensor, sigma: int) -> None:
    """Both tails: counts beyond 1 to 5 standard deviations (2.3 expected beyond 5)."""
    expected = COUNT * math.erfc(sigma / math.sqrt(2))
    found = int((numbers.abs() > sigma).sum())
    allowed = Z * math.sqrt(expected) + (6 if expected < 100 else 0)  # a Poisson tail is longer
    assert abs(found - expected) < allowed, (found, expected)


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 8, 1024, 2048])
def test_no_correlation_at_a_lag(numbers: Tensor, lag: int) -> None:
    products = numbers[:-lag] * numbers[lag:]
    assert abs(products.mean().item()) * math.sqrt(products.numel()) < Z
    squares = (numbers[:-lag] ** 2 - 1) * (numbers[lag:] ** 2 - 1) / 2
    assert abs(squares.mean().item()) * math.sqrt(squares.numel()) < Z


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 21},
        {"seed": 20 + 2**32},
        {"chain": 2},
        {"step": 13},
        {"param_index": 5},
        {"stream": INIT},
        {"chain": 12, "step": 1},
    ],
    ids=str,
)
def test_streams_of_other_addresses_are_independent(numbers: Tensor, other: dict[str, int]) -> None:
    count = 1_000_000
    first, second = numbers[:count], stream(count, **other)
    assert abs((first * second).mean().item()) * math.sqrt(count) < Z
    squares = (first**2 - 1) * (second**2 - 1) / 2
    assert abs(squares.mean().item()) * math.sqrt(count) < Z


def test_one_element_over_many_steps_is_white() -> None:
    """What one weight feels: its noise over consecutive steps of a chain."""
    steps = 20_000
    felt = torch.stack([stream(1, step=i) for i in range(steps)]).flatten()
    assert abs(felt.mean().item()) * math.sqrt(steps) < Z
    assert abs((felt**2).mean().item() - 1) * math.sqrt(steps / 2) < Z
    assert abs((felt[1:] * felt[:-1]).mean().item()) * math.sqrt(steps - 1) < Z


def test_the_largest_radius_is_that_of_the_smallest_uniform(numbers: Tensor) -> None:
    assert numbers.abs().max().item() <= math.sqrt(2 * 33 * math.log(2)) + 1e-6
