"""How fast this machine is, and how near each kernel comes to what the machine allows."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

ROUNDS = 7

# what one run works on: large against caches, small against memory
_SIZES = {
    "cpu": {"copy": 2**26, "product": 2048, "weights": 2**23, "tokens": 1024, "vocabulary": 8192,
            "width": 512},
    "cuda": {"copy": 2**30, "product": 8192, "weights": 2**28, "tokens": 8192, "vocabulary": 131072,
             "width": 4096},
}  # fmt: skip


@dataclass(frozen=True)
class Speed:
    """One kernel's time and the least that the machine would need.

    Attributes
    ----------
    name, dtype, size : str
    seconds, floor : float
    bound : str
        What the floor counts: "bytes" or "FLOPs".
    """

    name: str
    dtype: str
    size: str
    seconds: float
    floor: float
    bound: str


def report_speed(console: Console, device: torch.device, *, shrink: int = 1) -> None:
    """Measure and print; takes some seconds, and wants a quiet machine.

    Parameters
    ----------
    shrink
        Divides the sizes, for tests.
    """
    sizes = {name: max(16, size // shrink) for name, size in _SIZES[device.type].items()}
    bandwidth = copy_bandwidth(device, sizes["copy"])
    dtypes = [torch.float32] if device.type == "cpu" else [torch.float32, torch.bfloat16]
    rates = {dtype: matrix_rate(device, dtype, sizes["product"]) for dtype in dtypes}
    shown = ", ".join(f"{_short(dtype)} {rate / 1e12:.3g} TFLOP/s" for dtype, rate in rates.items())
    console.print(
        f"{_name(device)}: copies {bandwidth / 1e9:.3g} GB/s (both directions), multiplies {shown}",
        highlight=False,
    )
    table = Table(title="Kernels", title_justify="left", show_edge=False)
    for heading in ("kernel", "dtype", "size"):
        table.add_column(heading)
    for heading in ("time", "floor", "share"):
        table.add_column(heading, justify="right")
    for speed in kernel_speeds(device, sizes, bandwidth, rates):
        table.add_row(
            speed.name,
            speed.dtype,
            speed.size,
            _time(speed.seconds),
            f"{_time(speed.floor)} {speed.bound}",
            f"{speed.floor / speed.seconds:.0%}",
        )
    console.print(table)
    console.print(
        "The floor is the bytes that must move at the copy's speed, or the FLOPs at the\n"
        "product's; what stays in a cache may beat a floor of bytes.",
        highlight=False,
    )


def kernel_speeds(
    device: torch.device,
    sizes: dict[str, int],
    bandwidth: float,
    rates: dict[torch.dtype, float],
) -> Iterator[Speed]:
    """Measure every kernel on one device; bandwidth in bytes/s, rates in FLOP/s."""
    count, tokens = sizes["weights"], sizes["tokens"]
    vocabulary, width = sizes["vocabulary"], sizes["width"]
    for dtype, rate in rates.items():
        short, logits = _short(dtype), tokens * vocabulary * dtype.itemsize
        for name, metrics in (("SGLD update", False), ("  with diagnostics", True)):
            seconds, moved = _update_seconds(device, dtype, count, metrics)
            yield Speed(name, short, f"{count / 1e6:.3g}M", seconds, moved / bandwidth, "bytes")
        forward, both = _cross_entropy_seconds(device, dtype, tokens, vocabulary)
        size = f"{tokens} x {vocabulary}"
        yield Speed("cross-entropy", short, size, forward, logits / bandwidth, "bytes")
        yield Speed("  with gradient", short, size, both, 3 * logits / bandwidth, "bytes")
        seconds = _linear_seconds(device, dtype, tokens, vocabulary, width)
        floor = 3 * 2 * tokens * vocabulary * width / rate
        size = f"{tokens} x {width} x {vocabulary}"
        yield Speed("linear, with gradient", short, size, seconds, floor, "FLOPs")


def copy_bandwidth(device: torch.device, elements: int) -> float:
    """Bytes per second of a float32 copy, read and written bytes both counted."""
    source, target = (torch.zeros(elements, device=device) for _ in range(2))
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source), device)


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """FLOP per second of a square product."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / median_seconds(lambda: torch.mm(a, b, out=out), device)


def median_seconds(work: Callable[[], Any], device: torch.device, rounds: int = ROUNDS) -> float:
    """Median wall time of a call, the device's own work included."""
    work()
    times = []
    for _ in range(rounds):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _update_seconds(
    device: torch.device, dtype: torch.dtype, count: int, metrics: bool
) -> tuple[float, int]:
    from basinscope.kernels.sgld import SgldUpdate

    weight, anchor, gradient = (torch.randn(count, device=device).to(dtype) for _ in range(3))
    update = SgldUpdate(
        [weight], anchors=[anchor], lr=1e-6, n_beta=1.0, localization=1.0, metrics=metrics
    )
    step = iter(range(2**31))
    seconds = median_seconds(
        lambda: update.step([gradient], seed=0, chain=0, step=next(step)), device
    )
    return seconds, 4 * weight.nbytes  # weight, gradient and anchor are read, the weight written


def _cross_entropy_seconds(
    device: torch.device, dtype: torch.dtype, tokens: int, vocabulary: int
) -> tuple[float, float]:
    from basinscope.kernels.cross_entropy import token_cross_entropy

    logits = torch.randn(tokens, vocabulary, device=device).to(dtype).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), device=device)
    upstream = torch.full((tokens,), 1 / tokens, device=device)

    def forward() -> Tensor:
        with torch.no_grad():
            return token_cross_entropy(logits, targets)

    def both() -> None:  # the gradient replaces the logits, which stay finite
        loss = token_cross_entropy(logits, targets, reuse_logits=True)
        torch.autograd.grad(loss, logits, upstream)

    return median_seconds(forward, device), median_seconds(both, device)


def _linear_seconds(
    device: torch.device, dtype: torch.dtype, tokens: int, vocabulary: int, width: int
) -> float:
    from basinscope.kernels.linear_cross_entropy import linear_token_cross_entropy

    hidden = torch.randn(tokens, width, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width, device=device) / width**0.5).to(dtype)
    weight.requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), device=device)

    def both() -> None:
        loss = linear_token_cross_entropy(hidden, weight, targets).mean()
        torch.autograd.grad(loss, (hidden, weight))

    return median_seconds(both, device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"
