"""The choice of a path."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from basinscope.kernels import paths


@pytest.mark.parametrize(
    ("path", "device", "installed", "chosen"),
    [
        ("auto", "cuda", True, "triton"),
        ("auto", "cuda", False, "reference"),
        ("auto", "cpu", True, "cpu"),
        ("auto", "cpu", False, "reference"),
        ("auto", "mps", True, "reference"),
        ("triton", "cuda", True, "triton"),
        ("cpu", "cpu", True, "cpu"),
        ("reference", "cuda", True, "reference"),
        ("reference", "cpu", False, "reference"),
    ],
)
def test_choices(
    monkeypatch: pytest.MonkeyPatch, path: str, device: str, installed: bool, chosen: str
) -> None:
    monkeypatch.setattr(paths, "_installed", lambda module: installed)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert paths.resolve(path, device) == chosen


def test_triton_takes_cpu_tensors_only_when_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert paths.resolve("triton", "cpu") == "triton"
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match=r"these are on 'cpu'.*TRITON_INTERPRET=1"):
        paths.resolve("triton", "cpu")


def test_an_interpreted_triton_is_kept_from_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The update's kernel would follow the GPU's addresses in the host's memory."""
    monkeypatch.setattr(paths, "_installed", lambda module: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert paths.resolve("auto", "cuda") == "reference"
    with pytest.raises(ValueError, match=r"these are on 'cuda'; unset TRITON_INTERPRET"):
        paths.resolve("triton", "cuda")


def test_what_cannot_be_met_is_an_error_that_names_the_alternatives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ValueError, match="auto, triton, cpu, reference"):
        paths.resolve("cuda", "cuda")
    with pytest.raises(ValueError, match="path='auto' or 'reference'"):
        paths.resolve("cpu", "cuda")
    monkeypatch.setattr(paths, "_installed", lambda module: False)
    with pytest.raises(RuntimeError, match=r"basinscope\[sampling\].*'auto' or 'reference'"):
        paths.resolve("cpu", "cpu")


def test_a_fallback_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(paths, "_installed", lambda module: False)
    paths.say_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="basinscope"):
        paths.resolve("auto", "cpu")
        paths.resolve("auto", "cpu")
    assert [record.message for record in caplog.records] == [
        "numba is not installed: kernels on cpu run as plain torch"
    ]


def test_importing_the_kernels_loads_no_compiler() -> None:
    code = (
        "import sys, basinscope.kernels.sgld, basinscope.kernels.noise, "
        "basinscope.kernels.cross_entropy; "
        "sys.exit(bool({'numba', 'triton'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
