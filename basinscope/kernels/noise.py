"""Counter-based Gaussian noise: the same numbers on every path and device, with no state to keep.

Element e of the noise of a parameter is lane e mod 4 of one Philox4x32-10 block (Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", SC 2011):

    key     = (seed mod 2^32, seed div 2^32)
    counter = (e div 4, parameter index, step, chain + 2^24 stream)

Words (x0, x1) make lanes 0 and 1, words (x2, x3) lanes 2 and 3, by Box and Muller's transform:
sqrt(-2 ln u) cos(2 pi t) and sqrt(-2 ln u) sin(2 pi t) with u = 2^-32 x + 2^-33 from the first word
and t = 2^-32 y from the second, both rounded to float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from basinscope.kernels import paths

LANGEVIN = 0
"""Stream of the noise in an SGLD step."""
INIT = 1
"""Stream of the perturbation of a chain's starting point."""
ROUNDING = 2
"""Stream whose words round weights at random: element e takes the upper half of word e mod 4."""

MAX_ELEMENTS = 2**34


def fill_normal(
    out: Tensor,
    *,
    seed: int,
    chain: int,
    step: int,
    param_index: int,
    stream: int = LANGEVIN,
    path: str = "auto",
) -> Tensor:
    """Fill a tensor in place with standard normal numbers of the counter-based stream.

    Parameters
    ----------
    out
        Floating-point tensor of any shape and strides; elements are numbered in row-major order.
        Numbers are made in float32 and then rounded to its dtype.
    seed, chain, step, param_index, stream
        The numbers' address; 0 <= seed < 2^63, chain < 2^24, step and param_index < 2^32,
        stream ``LANGEVIN``, ``INIT`` or ``ROUNDING``.
    path
        "auto", "triton", "cpu" or "reference", see `basinscope.kernels.paths.resolve`.

    Returns
    -------
    Tensor
        `out`.

    Raises
    ------
    ValueError
        If an address is out of range, or `out` is not floating point or too large.
    """
    check_address(seed=seed, chain=chain, step=step)
    _check_range("param_index", param_index, 2**32)
    _check_range("stream", stream, 2**8)
    if not out.is_floating_point():
        raise ValueError(f"noise needs a floating-point tensor, got {out.dtype}")
    if out.numel() > MAX_ELEMENTS:
        raise ValueError(
            f"one noise stream has {MAX_ELEMENTS} elements, the tensor has {out.numel()}; "
            "fill it in parts with different param_index"
        )
    path = paths.resolve(path, out.device.type)
    direct = out.dtype == torch.float32 and out.is_contiguous()
    with torch.no_grad():
        flat = (
            out.detach().view(-1)
            if direct
            else torch.empty(out.numel(), dtype=torch.float32, device=out.device)
        )
        if flat.numel():
            _fill(flat, key_of(seed), param_index, step, chain | stream << 24, path)
        if not direct:
            out.copy_(flat.view(out.shape))
    return out


def check_address(*, seed: int, chain: int, step: int) -> None:
    """Refuse a seed, chain or step outside the counter's range."""
    _check_range("seed", seed, 2**63)
    _check_range("chain", chain, 2**24)
    _check_range("step", step, 2**32)


def key_of(seed: int) -> tuple[int, int]:
    """The two 32-bit key words of a seed."""
    return seed & 0xFFFFFFFF, seed >> 32


def _check_range(name: str, value: int, limit: int) -> None:
    if not 0 <= value < limit:
        raise ValueError(f"{name} must be at least 0 and below {limit}, got {value}")


def _fill(
    flat: Tensor, key: tuple[int, int], param_index: int, step: int, chain: int, path: str
) -> None:
    if path == "cpu":
        from basinscope.kernels.noise_cpu import fill
    elif path == "triton":
        from basinscope.kernels.noise_triton import fill
    else:
        from basinscope.kernels.noise_reference import fill
    fill(flat, key, param_index, step, chain)
