"""Matrix products of traces, on the CPU or on a CUDA device."""

from __future__ import annotations

import importlib
import math
from typing import Any

import numpy as np

SMALL_PRODUCT = 2**23  # multiplications that one thread does before several have agreed
ONE_THREAD = 2**18  # multiplications for which BLAS wakes no other thread


def check_device(device: str | None) -> None:
    """Check that products can run on a device.

    Raises
    ------
    ValueError
        If it is not known, or not there.
    ModuleNotFoundError
        If it needs torch and torch is not installed.
    """
    kind = str(device or "cpu").partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device={device!r}: products run on 'cpu' or 'cuda' ('cuda:1', ...)")
    if kind == "cuda" and not _torch().cuda.is_available():
        raise ValueError(
            f"device={device!r}: torch finds no CUDA device here; leave device out to use the CPU"
        )


def product(
    a: np.ndarray, b: np.ndarray, device: str | None = None, out: np.ndarray | None = None
) -> np.ndarray:
    """Give a @ b.T.

    Parameters
    ----------
    a, b : np.ndarray (rows, samples)
    device : str, optional
        ``cuda`` runs it with torch there.
    out : np.ndarray (rows of a, rows of b), optional
        Where the result goes.
    """
    if out is None:
        out = np.empty((len(a), len(b)), a.dtype)
    if str(device or "cpu").startswith("cuda"):
        torch = _torch()
        on_device = [torch.from_numpy(np.ascontiguousarray(m)).to(device) for m in (a, b)]
        out[...] = (on_device[0] @ on_device[1].T).cpu().numpy()
        return out
    work = len(b) * a.shape[1]
    if 0 < work * len(a) <= SMALL_PRODUCT:  # BLAS would wake its threads, and wait for them
        most = max(1, ONE_THREAD // work)
        height = math.gcd(len(a), 1 << (most.bit_length() - 1))
        stack = a.reshape(-1, height, a.shape[1])
        np.matmul(stack, b.T, out=out.reshape(-1, height, len(b)))
        return out
    # NumPy takes a product of a matrix with itself for one triangle that it mirrors entry by
    # entry, which costs more than the other triangle. In halves, both are plain products.
    half = len(a) // 2 if np.may_share_memory(a, b) else 0
    for rows in (slice(0, half), slice(half, None)):
        np.matmul(a[rows], b.T, out=out[rows])
    return out


def _torch() -> Any:
    """Load torch, which is only here for CUDA: analysis runs without it."""
    try:
        return importlib.import_module("torch")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "device='cuda' needs torch: pip install 'basinscope[sampling]', or leave device out"
        ) from error
