"""Which implementation of a kernel runs: Triton on a GPU, compiled on a CPU, or plain torch."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os

PATHS = ("auto", "triton", "cpu", "reference")

_log = logging.getLogger("basinscope")


def resolve(path: str, device_type: str) -> str:
    """Choose the path a kernel takes.

    Parameters
    ----------
    path
        "auto", or one of "triton" (GPU; under Triton's interpreter CPU tensors instead), "cpu"
        (compiled by numba) and "reference" (plain torch operations, any device).
    device_type
        The ``type`` of the tensors' ``torch.device``.

    Returns
    -------
    str
        "triton", "cpu" or "reference". "auto" takes the fast path of the device where its
        compiler is installed and compiles, and otherwise "reference", which it says once in the
        log.

    Raises
    ------
    ValueError
        If `path` is unknown or cannot work on tensors of this device.
    RuntimeError
        If the compiler of the path asked for is not installed.
    """
    if path not in PATHS:
        raise ValueError(f"unknown kernel path {path!r}; choose one of {', '.join(PATHS)}")
    if path == "auto":
        return _automatic(device_type)
    if path == "reference":
        return path
    home, compiler = _NEEDS[path]
    if path == "triton" and _interpreted() and device_type == home:
        raise ValueError(
            f"path='triton' is interpreted here, on CPU tensors, and these are on {device_type!r}; "
            "unset TRITON_INTERPRET before triton is imported, or use path='auto' or 'reference'"
        )
    if device_type != home and not (path == "triton" and device_type == "cpu" and _interpreted()):
        raise ValueError(
            f"path={path!r} works on {home} tensors, these are on {device_type!r}; "
            f"use path='auto' or 'reference'{_HINTS[path]}"
        )
    if not _installed(compiler):
        raise RuntimeError(
            f"path={path!r} needs {compiler}, which is not installed; install "
            f"'basinscope[sampling]', or use path='auto' or 'reference'"
        )
    return path


_NEEDS = {"triton": ("cuda", "triton"), "cpu": ("cpu", "numba")}
_HINTS = {
    "triton": ", or set TRITON_INTERPRET=1 before triton is imported to interpret it on a CPU",
    "cpu": ", or move the tensors to the CPU",
}


def _automatic(device_type: str) -> str:
    for path, (home, compiler) in _NEEDS.items():
        if device_type == home:
            if path == "triton" and _interpreted():  # which reads addresses as those of the host
                say_once(f"triton is interpreted: kernels on {device_type} run as plain torch")
                return "reference"
            if _installed(compiler):
                return path
            say_once(f"{compiler} is not installed: kernels on {device_type} run as plain torch")
    return "reference"


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


@functools.cache
def say_once(message: str) -> None:
    """Log what a user may wonder about, the first time that it happens."""
    _log.info(message)
