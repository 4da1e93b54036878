"""The machine's speed, and the share of it that each kernel reaches."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from basinscope.report.speed import copy_bandwidth, matrix_rate, median_seconds, report_speed

CPU = torch.device("cpu")


def test_every_kernel_is_measured_against_its_floor() -> None:
    shown = io.StringIO()
    report_speed(Console(file=shown, width=120), CPU, shrink=64)
    lines = shown.getvalue().splitlines()
    for kernel in ("SGLD update", "with diagnostics", "cross-entropy", "linear, with gradient"):
        row = next(line for line in lines if kernel in line)
        assert "float32" in row
        assert row.rstrip().endswith("%")
    assert "GB/s" in lines[0]


def test_the_machine_is_measured_in_bytes_and_flops_per_second() -> None:
    """A machine of this century: from 100 MB/s to 100 TB/s, from 100 MFLOP/s to 100 PFLOP/s."""
    assert 1e8 < copy_bandwidth(CPU, 2**20) < 1e14
    assert 1e8 < matrix_rate(CPU, torch.float32, 128) < 1e17


def test_a_time_is_the_median_of_warm_calls() -> None:
    calls: list[int] = []
    assert median_seconds(lambda: calls.append(1), CPU, rounds=3) == pytest.approx(0, abs=0.01)
    assert len(calls) == 4
