"""A model's head, taken apart: hidden states, a linear map, and what follows it.

What follows the linear map is found by putting numbers in its place and looking at what the model
makes of them, so no table of architectures is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from basinscope.models.forward import is_hugging_face, replaced_forward, token_logits


class NoLinearHeadError(ValueError):
    """The model's logits are not a linear map of hidden states that can be reached."""


@dataclass(frozen=True)
class LinearHead:
    """Logits are cap tanh(scale (h W^T + b) / cap), or scale (h W^T + b) without a cap.

    Attributes
    ----------
    module : str
        Name of the ``nn.Linear`` in the model that holds W (vocabulary, width) and b.
    scale : float
    softcap : float or None
    """

    module: str
    scale: float
    softcap: float | None


@torch.no_grad()
def find_linear_head(model: nn.Module, input_ids: Tensor) -> LinearHead:
    """Find the linear map that makes a Hugging Face model's logits, and what is done to them.

    Parameters
    ----------
    model : nn.Module
    input_ids : Tensor (batch, token)
        A small batch to try it on.

    Returns
    -------
    LinearHead

    Raises
    ------
    NoLinearHeadError
        With the reason, if there is no such map.
    """
    module = output_embeddings(model)
    name = next(name for name, found in model.named_modules() if found is module)
    return LinearHead(name, *_what_follows(model, module, input_ids))


def hidden_states(model: nn.Module, head: LinearHead, input_ids: Tensor) -> Tensor:
    """Run a model up to its head.

    Returns
    -------
    Tensor (batch, token, width)
        What the head's linear map would have been given.
    """
    reached: list[Tensor] = []

    def keep(hidden: Tensor) -> Tensor:
        reached.append(hidden)
        return hidden.detach().clone()  # which the model may change in place

    with replaced_forward(linear_of(model, head), keep):
        token_logits(model, input_ids)
    return reached[0]


def linear_of(model: nn.Module, head: LinearHead) -> nn.Linear:
    """The module that holds a head's weight and bias."""
    module = model.get_submodule(head.module)
    assert isinstance(module, nn.Linear)
    return module


def named_head(model: nn.Module) -> nn.Module:
    """Give the module that a Hugging Face model names as its output embeddings, of any kind.

    Raises
    ------
    NoLinearHeadError
        If it names none.
    """
    if not is_hugging_face(model):
        raise NoLinearHeadError(f"{type(model).__name__} is no Hugging Face model")
    module: nn.Module | None = model.get_output_embeddings()  # type: ignore[operator]
    if module is None:
        raise NoLinearHeadError(f"{type(model).__name__} names no output embeddings")
    return module


def output_embeddings(model: nn.Module) -> nn.Linear:
    """Give the module whose output the logits are made of.

    Raises
    ------
    NoLinearHeadError
        If it is no plain ``nn.Linear``.
    """
    module = named_head(model)
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        raise NoLinearHeadError(f"its head is a {type(module).__name__}, not an nn.Linear")
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(module, kind) for kind in hooks) or "forward" in vars(module):
        raise NoLinearHeadError("its head has hooks")
    return module


def _what_follows(
    model: nn.Module, module: nn.Linear, input_ids: Tensor
) -> tuple[float, float | None]:
    """Find scale and soft cap from what the model makes of given numbers."""
    vocabulary = module.weight.shape[0]
    given: list[Tensor] = []

    def answer(hidden: Tensor) -> Tensor:
        if hidden.shape[:-1] != input_ids.shape or hidden.shape[-1] != module.weight.shape[1]:
            raise NoLinearHeadError(
                f"its head is given {tuple(hidden.shape)} for ids of shape {tuple(input_ids.shape)}"
            )
        given.append(ramp((*input_ids.shape, vocabulary), hidden))
        return given[-1].clone()

    try:
        with replaced_forward(module, answer), torch.enable_grad():
            made = token_logits(model, input_ids)
    except NoLinearHeadError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise NoLinearHeadError(f"it fails with a head replaced ({reason})") from error
    if len(given) != 1:
        raise NoLinearHeadError(f"its head runs {len(given)} times per forward pass")
    if made.requires_grad:
        raise NoLinearHeadError("what follows its head has parameters, which may move")
    if made.shape != given[0].shape:
        raise NoLinearHeadError(f"its logits have shape {tuple(made.shape)}, its head's output not")
    scale, softcap = scale_and_cap(given[0].double(), made.double(), tolerance_of(made))
    if (scale, softcap) != (1.0, None) and made.dtype in (torch.bfloat16, torch.float16):
        raise NoLinearHeadError(f"its logits are scaled or capped in {made.dtype}")
    return scale, softcap


def ramp(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Numbers of both signs from 1/8 to 16384, no two alike in up to a million."""
    count = 1
    for size in shape:
        count *= size
    step = torch.arange(count, device=like.device)
    sign = 1 - 2 * ((step * 5 // 3) % 2)
    exponent = (step * 7) % 17 - 3
    mantissa = 1 + ((step * 48271) % 2**20).float() / 2**20
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return (sign * mantissa * torch.exp2(exponent.float())).to(dtype).view(shape)


def scale_and_cap(given: Tensor, made: Tensor, tolerance: float) -> tuple[float, float | None]:
    """Find scale and cap of a :class:`LinearHead` from a head's output and what was made of it.

    Raises
    ------
    NoLinearHeadError
        If something else was made of it.
    """
    largest = given.abs().argmax()
    smallest = given.abs().argmin()
    scale = float(made.flatten()[smallest] / given.flatten()[smallest])
    straight = float(made.flatten()[largest] / given.flatten()[largest])
    if straight and _agree(made, straight * given, tolerance):
        return rounded(straight), None
    cap = float(made.flatten()[largest].abs())
    for _ in range(3):  # the slope at zero, for what the cap already bends there
        bent = float(cap * torch.tanh(scale * given.flatten()[smallest] / cap))
        scale *= float(made.flatten()[smallest]) / bent if bent else 1.0
    scale, cap = rounded(scale), rounded(cap)
    if cap > 0 and _agree(made, cap * torch.tanh(scale * given / cap), 4 * tolerance):
        return scale, cap
    raise NoLinearHeadError("its logits are no scaled or soft-capped output of its head")


def _agree(made: Tensor, expected: Tensor, tolerance: float) -> bool:
    return bool(torch.allclose(made, expected, rtol=tolerance, atol=0.0))


def tolerance_of(made: Tensor) -> float:
    """Relative error that the rounding of logits explains."""
    return 4 * max(torch.finfo(made.dtype).eps, torch.finfo(torch.float32).eps)


def rounded(value: float, tolerance: float = 1.2e-7, digits: int = 7) -> float:
    """The number that a configuration file would hold, where it is as good as the one found.

    The shortest of at most so many digits, within the relative tolerance; else the value itself.
    """
    for count in range(1, digits + 1):
        short = float(f"{value:.{count}g}")
        if abs(short - value) <= tolerance * abs(value):
            return short
    return value
