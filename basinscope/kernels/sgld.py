"""One step of stochastic gradient Langevin dynamics on all parameters, in place.

    v <- alpha v + (1 - alpha) g^2,   G = 1 / (sqrt(v) + eps)         (RMSprop; otherwise G = 1)
    w <- w - (lr / 2) M [G n_beta g + G (lambda w + gamma (w - w0))] + sqrt(lr G) M sigma xi
    w <- clamp(w, w0 - box, w0 + box) where M = 1

with M a 0/1 mask, gamma the localization, lambda the weight decay, sigma the noise level and xi the
normal stream of `basinscope.kernels.noise`. SGLD: Welling and Teh, ICML 2011; the preconditioner:
Li et al., AAAI 2016 (without its drift correction); localization: Lau et al., 2023.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from basinscope.kernels import paths
from basinscope.kernels.noise import MAX_ELEMENTS, check_address

METRIC_NAMES = (
    "scaled_grad",
    "unscaled_grad",
    "localization",
    "weight_decay",
    "noise",
    "distance",
    "dot_grad_prior",
    "dot_grad_noise",
    "dot_prior_noise",
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Factors:
    """The step's constants, signs and step size included: what multiplies each term."""

    gradient: float  # -(lr / 2) n_beta
    decay: float  # -(lr / 2) lambda
    pull: float  # -(lr / 2) gamma
    noise: float  # sqrt(lr) sigma
    box: float  # radius; infinity for none
    alpha: float
    eps: float
    stochastic: bool  # whether bfloat16 weights are rounded at random


@dataclass(frozen=True)
class Group:
    """Parameters of one dtype, and what belongs to each of them."""

    weights: list[Tensor]
    anchors: list[Tensor] | None
    masks: list[Tensor | None]
    squares: list[Tensor] | None
    streams: list[int]  # the parameter indices of the noise
    zero_grads: bool


Pass = Callable[[Sequence[Tensor | None], int, int, int | Tensor], Tensor | None]
"""(gradients, seed, chain, step) -> the nine raw sums (float64), or None without metrics.

In the order of ``METRIC_NAMES``, with a = M G g, b = M G (w - w0), c = M G w, n = M sqrt(G) xi and
p = -(lr / 2) (gamma b + lambda c), the raw sums are those of a^2, g^2, b^2, c^2, n^2, (w - w0)^2,
a p, a n and p n over all elements, at the weights before the update.
"""


class SgldUpdate:
    """The SGLD update of a fixed set of parameters.

    Parameters
    ----------
    params
        Contiguous tensors on one device, float32, bfloat16 or float16 (float64 on the "cpu" and
        "reference" paths); updated in place. Arithmetic is in float32 (float64 for float64).
    anchors
        w0, of the parameters' shapes and dtypes. Needed with localization, a box or metrics.
    masks
        Per parameter a bool tensor of its shape, or None for all elements. They are copied to one
        bit per element, and stretches without a chosen element are not visited. An element whose
        mask is False is never written, whatever its gradient.
    param_indices
        The noise streams of the parameters; by default 0, 1, 2, ...
    lr, n_beta
        Step size and inverse temperature.
    localization, weight_decay, noise_level
        gamma, lambda, sigma.
    bounding_box_size
        Radius of the box around w0, or None.
    alpha, eps
        Both given: RMSprop preconditioning, with ``square_avgs`` as its state.
    rounding
        How bfloat16 weights are rounded when they are written. "nearest" loses a step smaller
        than half the distance to the next bfloat16 number (2^-9 of the weight), "stochastic"
        rounds up or down with the probability that keeps the mean, by the ``ROUNDING`` stream of
        `basinscope.kernels.noise`. Other dtypes are rounded to nearest, or need no rounding.
    zero_grads
        Whether `step` leaves zeros in the gradients, written in the same pass: for gradients that
        stay where they are and are added to, as in a CUDA graph.
    metrics
        Whether `step` returns the nine diagnostics.
    path
        "auto", "triton", "cpu" or "reference", see `basinscope.kernels.paths.resolve`. "auto" takes
        "reference" for float64 parameters on a GPU.

    Attributes
    ----------
    path : str
        The path that runs.
    square_avgs : list of Tensor or None
        v per parameter (float32; float64 for float64 parameters), zero at first. May be
        overwritten in place between steps. Where a mask is False they mean nothing.

    Raises
    ------
    ValueError
        If tensors, masks or settings do not fit together; the message says which.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        *,
        anchors: Sequence[Tensor] | None = None,
        masks: Sequence[Tensor | None] | None = None,
        param_indices: Sequence[int] | None = None,
        lr: float,
        n_beta: float,
        localization: float = 0.0,
        weight_decay: float = 0.0,
        noise_level: float = 1.0,
        bounding_box_size: float | None = None,
        alpha: float | None = None,
        eps: float | None = None,
        rounding: Literal["nearest", "stochastic"] = "nearest",
        zero_grads: bool = False,
        metrics: bool = False,
        path: str = "auto",
    ) -> None:
        self.params = list(params)
        _check_settings(lr, noise_level, bounding_box_size, alpha, eps)
        _check_params(self.params)
        _check_rounding(rounding, self.params)
        measured = bool(localization) or bounding_box_size is not None or metrics
        if anchors is None and measured:
            raise ValueError(
                "localization, a bounding box and metrics measure the distance from anchors, "
                "and none were given; pass anchors=[w0 of each parameter]"
            )
        kept_anchors = None if anchors is None else _checked_anchors(anchors, self.params)
        if not measured:  # they would be read for nothing
            kept_anchors = None
        kept_masks = _checked_masks(masks, self.params)
        streams = _checked_streams(param_indices, len(self.params))
        self.path = _path_for(path, self.params)
        self.square_avgs = None if alpha is None else [_zeros_for(p) for p in self.params]
        self._factors = Factors(
            gradient=-lr / 2 * n_beta,
            decay=-lr / 2 * weight_decay,
            pull=-lr / 2 * localization,
            noise=math.sqrt(lr) * noise_level,
            box=math.inf if bounding_box_size is None else bounding_box_size,
            alpha=alpha or 0.0,
            eps=eps or 0.0,
            stochastic=rounding == "stochastic",
        )
        self._zero_grads = zero_grads
        self._scale = _metric_scale(self._factors, self.params[0].device)
        self._expected = [(p.dtype, p.shape, p.device) for p in self.params]
        self._members: list[list[int]] = []
        self._passes: list[Pass] = []
        squares = self.square_avgs
        for dtype in dict.fromkeys(p.dtype for p in self.params):
            members = [i for i, p in enumerate(self.params) if p.dtype == dtype]
            group = Group(
                weights=[self.params[i] for i in members],
                anchors=None if kept_anchors is None else [kept_anchors[i] for i in members],
                masks=[kept_masks[i] for i in members],
                squares=None if squares is None else [squares[i] for i in members],
                streams=[streams[i] for i in members],
                zero_grads=zero_grads,
            )
            self._members.append(members)
            self._passes.append(_pass_for(self.path, group, self._factors, metrics))

    @torch.no_grad()
    def step(
        self, grads: Sequence[Tensor | None], *, seed: int, chain: int, step: int | Tensor
    ) -> Tensor | None:
        """Update every parameter once, in place.

        Parameters
        ----------
        grads
            One gradient per parameter, of its shape, dtype and device; a parameter whose gradient
            is None is left alone and does not count in the metrics.
        seed, chain, step
            The noise's address, see `basinscope.kernels.noise`. A step in a tensor of one int64 on
            the parameters' device is read by the Triton kernel when it runs.

        Returns
        -------
        Tensor or None
            With metrics, the diagnostics in the order of ``METRIC_NAMES``, float32 of shape (9,).

        Raises
        ------
        ValueError
            If a gradient does not fit its parameter or the noise's address is out of range.
        """
        if isinstance(step, Tensor) and self.path != "triton":
            step = int(step)
        check_address(seed=seed, chain=chain, step=0 if isinstance(step, Tensor) else step)
        gradients = self._checked_gradients(grads)
        totals = None
        for members, run in zip(self._members, self._passes, strict=True):
            mine = gradients if len(self._passes) == 1 else [gradients[i] for i in members]
            sums = run(mine, seed, chain, step)
            if sums is not None:
                totals = sums if totals is None else totals + sums
        torch.autograd.graph.increment_version(self.params)
        return None if totals is None else _metrics_from(totals, self._scale)

    def _checked_gradients(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        if len(grads) != len(self.params):
            raise ValueError(
                f"got {len(grads)} gradients for {len(self.params)} parameters; pass one each "
                "(None for a parameter without)"
            )
        checked: list[Tensor | None] = []
        for i, (grad, expected) in enumerate(zip(grads, self._expected, strict=True)):
            if grad is not None:
                if (grad.dtype, grad.shape, grad.device) != expected:
                    raise ValueError(
                        f"gradient {i} is {_describe(grad)}, "
                        f"its parameter {_describe(self.params[i])}; they must agree"
                    )
                if grad.layout is not torch.strided:
                    raise ValueError(
                        f"gradient {i} is sparse, which no update of all weights can use: make the "
                        "layer with sparse=False"
                    )
                if not grad.is_contiguous():
                    if self._zero_grads:
                        raise ValueError(
                            f"gradient {i} has strides {grad.stride()} for shape "
                            f"{tuple(grad.shape)}; with zero_grads they must be contiguous"
                        )
                    grad = grad.contiguous()
            checked.append(grad)
        return checked


def _check_settings(
    lr: float, noise_level: float, box: float | None, alpha: float | None, eps: float | None
) -> None:
    if not (lr > 0 and math.isfinite(lr)):
        raise ValueError(f"lr must be positive and finite, got {lr}")
    if not noise_level >= 0:
        raise ValueError(f"noise_level must not be negative, got {noise_level}")
    if box is not None and not box >= 0:
        raise ValueError(f"bounding_box_size must not be negative, got {box}; None is no box")
    if (alpha is None) != (eps is None):
        raise ValueError(
            f"RMSprop needs alpha and eps together, got alpha={alpha}, eps={eps}; "
            "give both, or neither for plain SGLD"
        )
    if alpha is not None and not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie between 0 and 1, got {alpha}")
    if eps is not None and not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")


def _check_params(params: list[Tensor]) -> None:
    if not params:
        raise ValueError("there are no parameters to update; pass at least one")
    for i, param in enumerate(params):
        if param.dtype not in DTYPES:
            names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
            raise ValueError(f"parameter {i} is {param.dtype}; SGLD moves {names}")
        if param.device != params[0].device:
            raise ValueError(
                f"parameter {i} is on {param.device}, parameter 0 on {params[0].device}; "
                "make one update, or one group of parameters, for each device"
            )
        if not param.is_contiguous():
            raise ValueError(
                f"parameter {i} has strides {param.stride()} for shape {tuple(param.shape)}; "
                "parameters must be contiguous, call .contiguous() on it first"
            )
        if param.numel() > MAX_ELEMENTS:
            raise ValueError(f"parameter {i} has {param.numel()} elements, over {MAX_ELEMENTS}")


def _check_rounding(rounding: str, params: list[Tensor]) -> None:
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"rounding must be 'nearest' or 'stochastic', got {rounding!r}")
    halves = [i for i, param in enumerate(params) if param.dtype == torch.float16]
    if rounding == "stochastic" and halves:
        raise ValueError(
            f"parameter {halves[0]} is torch.float16: stochastic rounding is for bfloat16 weights; "
            "use rounding='nearest', or bfloat16 or float32 weights"
        )


def _checked_anchors(anchors: Sequence[Tensor], params: list[Tensor]) -> list[Tensor]:
    if len(anchors) != len(params):
        raise ValueError(f"got {len(anchors)} anchors for {len(params)} parameters; pass one each")
    for i, (anchor, param) in enumerate(zip(anchors, params, strict=True)):
        if (anchor.dtype, anchor.shape, anchor.device) != (param.dtype, param.shape, param.device):
            raise ValueError(
                f"anchor {i} is {_describe(anchor)}, its parameter {_describe(param)}; "
                "they must agree"
            )
    return [anchor.detach().contiguous() for anchor in anchors]


def _checked_masks(
    masks: Sequence[Tensor | None] | None, params: list[Tensor]
) -> list[Tensor | None]:
    if masks is None:
        return [None] * len(params)
    if len(masks) != len(params):
        raise ValueError(
            f"got {len(masks)} masks for {len(params)} parameters; pass one each (None: all moves)"
        )
    for i, (mask, param) in enumerate(zip(masks, params, strict=True)):
        if mask is None:
            continue
        if mask.dtype != torch.bool or mask.shape != param.shape:
            raise ValueError(
                f"mask {i} is {_describe(mask)}, its parameter {_describe(param)}; a mask is "
                "torch.bool of its parameter's shape, on any device"
            )
    return list(masks)


def _checked_streams(param_indices: Sequence[int] | None, count: int) -> list[int]:
    if param_indices is None:
        return list(range(count))
    if len(param_indices) != count or len(set(param_indices)) != count:
        raise ValueError(
            f"param_indices must be {count} different numbers, got {list(param_indices)}"
        )
    if not all(0 <= index < 2**32 for index in param_indices):
        raise ValueError(f"param_indices must be in 0 .. 2**32 - 1, got {list(param_indices)}")
    return list(param_indices)


def _zeros_for(param: Tensor) -> Tensor:
    dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
    return torch.zeros(param.shape, dtype=dtype, device=param.device)


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"


def _path_for(path: str, params: list[Tensor]) -> str:
    found = paths.resolve(path, params[0].device.type)
    if path == "auto" and found == "triton" and any(p.dtype == torch.float64 for p in params):
        paths.say_once("triton moves no float64 parameters: they take their steps in plain torch")
        return "reference"
    return found


def _pass_for(path: str, group: Group, factors: Factors, metrics: bool) -> Pass:
    if path == "cpu":
        from basinscope.kernels.sgld_cpu import CompiledPass

        return CompiledPass(group, factors, metrics)
    if path == "triton":
        from basinscope.kernels.sgld_triton import TritonPass

        return TritonPass(group, factors, metrics)
    from basinscope.kernels.sgld_reference import ReferencePass

    return ReferencePass(group, factors, metrics)


def _metrics_from(sums: Tensor, scale: Tensor) -> Tensor:
    """Norms and dot products of the update's terms from the nine raw sums (see ``Pass``)."""
    return (torch.cat([sums[:6].sqrt(), sums[6:]]) * scale).to(torch.float32)


def _metric_scale(factors: Factors, device: torch.device) -> Tensor:
    """What each norm and dot product is multiplied by."""
    gradient, noise = -factors.gradient, factors.noise
    norms = (gradient, gradient, -factors.pull, -factors.decay, noise, 1.0)
    dots = (-gradient, gradient * noise, -noise)
    dtype = torch.float32 if device.type == "mps" else torch.float64  # which MPS does not have
    return torch.tensor(norms + dots, dtype=dtype, device=device)
