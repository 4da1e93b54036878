"""From the residual stream to logits: a model's final norm and its unembedding, as numbers.

Both are found by trying. A few tokens go through the model, which shows the modules behind the last
layer and what they hand on; the norm is then given made-up numbers, which show its kind, weight,
bias and epsilon; and what was found must give the model's own logits. No architecture has a table.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from basinscope.models.forward import (
    evaluating,
    inside_bridge,
    is_hugging_face,
    is_transformer_lens,
    max_sequence_length,
    token_logits,
    vocabulary_size,
)
from basinscope.models.head import NoLinearHeadError, ramp, scale_and_cap, tolerance_of
from basinscope.models.stream import first_tensor
from basinscope.models.structure import (
    UnknownStructureError,
    layer_modules,
    reason_of,
    require_module,
)

PROBE_ROWS, PROBE_TOKENS = 2, 8
LOUD = 1e4  # so large that no epsilon matters
CLOSE = 1e-5  # relative, of float32 arithmetic in a norm
Norm = Literal["layer", "rms", "none"]
Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Unembedding:
    """Logits are softcap(scale (norm(x) W^T + b)), softcap(z) = c tanh(z / c).

    Attributes
    ----------
    weight : ndarray (vocab, d_model), float32
        W. A projection between the norm and the head is multiplied into it.
    bias : ndarray (vocab,) or None
        b.
    norm : {"layer", "rms", "none"}
        (x - mean) / sqrt(variance + eps), x / sqrt(mean square + eps), or x.
    norm_weight : ndarray (d_model,) or None
        What multiplies; where a model adds 1 to its parameter, that is done.
    norm_bias : ndarray (d_model,) or None
    eps, scale : float
    softcap : float or None
    num_layers : int or None
        Of the model, if known: the stream behind the last one is what all of this is made for.
    """

    weight: Array
    bias: Array | None
    norm: Norm
    norm_weight: Array | None
    norm_bias: Array | None
    eps: float
    softcap: float | None
    scale: float
    num_layers: int | None = None


def find_final_norm(model: nn.Module) -> str | None:
    """Name the module whose output the unembedding multiplies.

    Parameters
    ----------
    model : nn.Module
        It runs once, on a few tokens.

    Returns
    -------
    str or None
        None where nothing behind the last layer is a norm.

    Raises
    ------
    UnknownStructureError
        If the model does not run on a few tokens, or its layers cannot be found.
    """
    norm = _run(model).norm
    return None if norm is None else norm.name


def find_unembedding(model: nn.Module) -> Unembedding:
    """Take a model's final norm and unembedding, in float32, as a copy.

    Parameters
    ----------
    model : nn.Module
        A Hugging Face causal LM or a TransformerLens model.

    Raises
    ------
    TypeError
        If the model is no module.
    UnknownStructureError
        If the logits are no such function of what the last layer returns; says what was found.
    """
    require_module(model)
    model = inside_bridge(model)
    with _naming(model), torch.inference_mode(mode=False), torch.no_grad():
        run = _run(model)
        if run.norm is not None and not _alike(run.norm.given, run.stream):
            raise UnknownStructureError(
                f"its final norm {run.norm.name} is not given what its last layer {run.layer} "
                "returns"
            )
        head = _head(model, run.ids)
        weight, bias = head.weight, head.bias
        between = _between(model, run, head, run.stream if run.norm is None else run.norm.made)
        if between is not None:
            matrix, offset = between
            bias = weight @ offset if bias is None else bias + weight @ offset
            weight = weight @ matrix
        found = Unembedding(
            weight=weight.numpy(),
            bias=bias.numpy() if bias is not None and bias.any() else None,
            norm=run.numbers.norm,
            norm_weight=run.numbers.weight,
            norm_bias=run.numbers.bias,
            eps=run.numbers.eps,
            softcap=head.softcap,
            scale=head.scale,
            num_layers=len(layer_modules(model)),
        )
        _require_same_logits(found, run)
    return found


def project(unembedding: Unembedding, stream: npt.NDArray[Any]) -> Array:
    """Make logits (..., vocab) of residual streams (..., d_model), in float32."""
    x = stream.astype(np.float32)
    if unembedding.norm == "layer":
        x = x - x.mean(-1, keepdims=True)
    if unembedding.norm != "none":
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + np.float32(unembedding.eps))
    if unembedding.norm_weight is not None:
        x = x * unembedding.norm_weight
    if unembedding.norm_bias is not None:
        x = x + unembedding.norm_bias
    logits = x @ unembedding.weight.T
    if unembedding.bias is not None:
        logits += unembedding.bias
    logits *= np.float32(unembedding.scale)
    if unembedding.softcap is not None:
        cap = np.float32(unembedding.softcap)
        logits = cap * np.tanh(logits / cap)
    return logits


@contextmanager
def _naming(model: nn.Module) -> Iterator[None]:
    """Say of which model an error is."""
    try:
        yield
    except (UnknownStructureError, NoLinearHeadError) as error:
        raise UnknownStructureError(
            f"the unembedding of {type(model).__name__} cannot be taken out of it: "
            f"{reason_of(error)}"
        ) from error


@dataclass(frozen=True)
class _Ran:
    """One run of a module, with floating-point numbers of one shape on both sides."""

    name: str
    given: Tensor
    made: Tensor


@dataclass(frozen=True)
class _NormNumbers:
    """What :class:`Unembedding` says of a norm."""

    norm: Norm
    weight: Array | None
    bias: Array | None
    eps: float


_NO_NORM = _NormNumbers("none", None, None, 0.0)


@dataclass(frozen=True)
class _Run:
    """A few tokens on their way through a model.

    Attributes
    ----------
    ids : Tensor (row, token)
    layer : str
        The last one; with `stream`, what it returns.
    norm : _Ran or None
        The last norm behind it; with `numbers`, what it computes.
    logits : Tensor (row, token, vocab)
    """

    ids: Tensor
    layer: str
    stream: Tensor
    norm: _Ran | None
    numbers: _NormNumbers
    logits: Tensor


@torch.inference_mode(mode=False)
@torch.no_grad()
def _run(model: nn.Module) -> _Run:
    layers = layer_modules(model)
    last = layers[-1]
    inside = {module for layer in layers for module in model.get_submodule(layer).modules()}
    stream: list[Tensor] = []
    seen: list[_Ran] = []

    def note_stream(module: nn.Module, args: Any, output: Any) -> None:
        stream.append(_hidden(output).clone())

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if name == last:
                hooks.callback(module.register_forward_hook(note_stream).remove)
            elif module not in inside:
                note = _noting(name, seen, behind=stream)
                hooks.callback(module.register_forward_hook(note, with_kwargs=True).remove)
        ids = _some_ids(model, PROBE_ROWS)
        logits = _logits(model, ids)
    if not stream:
        raise UnknownStructureError(f"its last layer {last} was not run")
    for ran in reversed(seen):
        numbers = _norm_numbers(model.get_submodule(ran.name), ran.given.shape[-1])
        if numbers is not None:
            return _Run(ids, last, stream[-1], ran, numbers, logits)
    return _Run(ids, last, stream[-1], None, _NO_NORM, logits)


def _noting(name: str, seen: list[_Ran], behind: list[Tensor]) -> Callable[..., None]:
    """Note what a module makes of one tensor, once there is something in `behind`."""

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = [*args, *kwargs.values()]
        if not behind or len(given) != 1 or not isinstance(output, Tensor):
            return
        if isinstance(given[0], Tensor) and given[0].is_floating_point():
            seen.append(_Ran(name, given[0].clone(), output.clone()))

    return note


def _hidden(output: Any) -> Tensor:
    found = first_tensor(output)
    if found is None:
        raise UnknownStructureError(f"its last layer returns a {type(output).__name__}")
    return found


def _some_ids(model: nn.Module, rows: int) -> Tensor:
    tokens = min(PROBE_TOKENS, max_sequence_length(model) or PROBE_TOKENS)
    device = next(model.parameters()).device
    count = vocabulary_size(model) or 2
    return (torch.arange(1, rows * tokens + 1, device=device) * 7919 % count).view(rows, tokens)


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    try:
        with evaluating(model):
            return token_logits(model, ids)
    except (UnknownStructureError, NoLinearHeadError):
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnknownStructureError(f"it cannot be run on a few tokens ({reason})") from error


def _norm_numbers(module: nn.Module, width: int) -> _NormNumbers | None:
    """Find what a module computes if it is a norm over its last axis; None if it is not."""
    if any(parameter.ndim > 1 for parameter in module.parameters()):
        return None
    alone = copy.deepcopy(module).to("cpu", torch.float32)
    try:
        return _measured(module, alone, width)
    except (RuntimeError, ValueError, IndexError):  # it takes no other numbers than it was given
        return None


def _measured(module: nn.Module, alone: nn.Module, width: int) -> _NormNumbers | None:
    drawn = torch.randn(3, width, generator=torch.Generator().manual_seed(0)) + 1

    def f(x: Tensor) -> Tensor:
        made = alone(x[None])[0]
        return made if isinstance(made, Tensor) and made.shape == x.shape else x

    bias = f(torch.zeros(1, width))
    loud = f(LOUD * drawn)
    if not _alike(loud, f(2 * LOUD * drawn)) or _alike(loud, bias.expand_as(loud)):
        return None
    norm: Norm = "layer" if _alike(loud, f(LOUD * (drawn + 3))) else "rms"
    signs = 1 - 2 * (torch.arange(width) % 2).float()[None]
    unit = _normed(signs, norm, eps=0.0)
    weight = (f(LOUD * signs) - f(-LOUD * signs)) / (2 * unit)
    eps = _epsilon(lambda x: ((f(x) - f(-x)) / 2)[0], weight[0], signs, norm)
    eps = _as_the_module_has_it(module, eps)
    for volume in (1e-3, 1.0, 1e3):
        x = volume * drawn
        if not _alike(f(x), weight * _normed(x, norm, eps) + bias):
            return None
    return _NormNumbers(
        norm,
        None if _alike(weight, torch.ones_like(weight)) else weight[0].numpy(),
        bias[0].numpy() if bias.any() else None,
        eps,
    )


def _normed(x: Tensor, norm: Norm, eps: float) -> Tensor:
    x = x.double()
    x = x - x.mean(-1, keepdim=True) if norm == "layer" else x
    return (x / torch.sqrt((x**2).mean(-1, keepdim=True) + eps)).float()


def _epsilon(odd: Callable[[Tensor], Tensor], weight: Tensor, signs: Tensor, norm: Norm) -> float:
    """Find epsilon from the answer to numbers about as small as its root."""
    unit = _normed(signs, norm, eps=0.0)
    square = float(((signs - signs.mean() if norm == "layer" else signs) ** 2).mean())
    told = weight.abs() > weight.abs().max() / 10
    eps = 1e-6
    for _ in range(3):
        volume = max(eps, 1e-12) ** 0.5
        shrunk = (odd(volume * signs) / (weight * unit[0]))[told].double().median()
        mean_square = volume**2 * square
        eps = mean_square * max(0.0, float(1 / shrunk**2) - 1)
    return eps if eps > 1e-14 else 0.0


def _as_the_module_has_it(module: nn.Module, eps: float) -> float:
    """The number among a module's attributes that was measured, to its last digit."""
    held = [v for v in vars(module).values() if isinstance(v, float)]
    return min((v for v in held if abs(v - eps) <= 1e-3 * eps), default=_short(eps))


def _short(value: float) -> float:
    """The number of one or two digits that a measured one stands for."""
    short = float(f"{value:.2g}")
    return short if abs(short - value) <= 1e-3 * value else value


@dataclass(frozen=True)
class _Head:
    """The module that makes logits: (vocab, width) weight, bias, and what follows it."""

    name: str
    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None


def _head(model: nn.Module, ids: Tensor) -> _Head:
    module: Any = None
    if is_transformer_lens(model):
        module = model.unembed
        weight, bias = module.W_U.T, getattr(module, "b_U", None)
    elif is_hugging_face(model):
        module = model.get_output_embeddings()  # type: ignore[operator]
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if module is None:
        raise UnknownStructureError(
            "it is neither a TransformerLens model nor a Hugging Face model that names its output "
            "embeddings"
        )
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise UnknownStructureError(f"its head is a {type(module).__name__} without a matrix")
    given: list[Tensor] = []

    def answer(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        given.append(ramp((*ids.shape, len(weight)), output))
        return given[-1].clone()

    with _hooked(module, answer):
        made = _logits(model, ids)
    if len(given) != 1 or made.shape != given[0].shape:
        raise UnknownStructureError(
            f"its head {type(module).__name__} with {len(weight)} tokens runs {len(given)} times, "
            f"and the logits have shape {tuple(made.shape)} for ids of shape {tuple(ids.shape)}"
        )
    scale, softcap = scale_and_cap(given[0].double(), made.double(), tolerance_of(made))
    name = next(name for name, found in model.named_modules() if found is module)
    return _Head(name, _copied(weight), None if bias is None else _copied(bias), scale, softcap)


def _between(
    model: nn.Module, run: _Run, head: _Head, normed: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Find the affine map from the norm to the head, (width, d_model) and (width,), if any."""
    reached = _head_input(model, head, run.ids)
    if _alike(reached, normed):
        return None
    source = run.layer if run.norm is None else run.norm.name
    width = normed.shape[-1]
    generator = torch.Generator().manual_seed(0)
    probes = torch.cat(
        [
            torch.zeros(1, width),
            torch.eye(width),
            torch.randn(PROBE_TOKENS, width, generator=generator),
        ]
    )
    tokens = run.ids.shape[1]
    answers = []
    for chunk in probes.split(PROBE_ROWS * tokens):
        value = torch.zeros(PROBE_ROWS * tokens, width)
        value[: len(chunk)] = chunk
        value = value.view(PROBE_ROWS, tokens, width).to(normed)
        made = _head_input(model, head, run.ids, model.get_submodule(source), value)
        answers.append(_copied(made.flatten(0, 1)[: len(chunk)]))
    offset, rest, drawn = torch.cat(answers).split([1, width, PROBE_TOKENS])
    matrix = (rest - offset).T
    if not _alike(drawn, _copied(probes[-PROBE_TOKENS:].to(normed)) @ matrix.T + offset, normed):
        raise UnknownStructureError(
            f"what its head {head.name} is given is no affine map of what {source} returns"
        )
    return matrix, offset[0]


def _head_input(
    model: nn.Module,
    head: _Head,
    ids: Tensor,
    source: nn.Module | None = None,
    value: Tensor | None = None,
) -> Tensor:
    """Run a model, with a module's output replaced if asked, up to what its head is given."""
    reached: list[Tensor] = []

    def keep(module: nn.Module, args: Any) -> None:
        reached.append(args[0].clone())

    def replace(module: nn.Module, args: Any, output: Any) -> Any:
        return (value, *output[1:]) if isinstance(output, tuple) else value

    with ExitStack() as hooks:
        kept = model.get_submodule(head.name).register_forward_pre_hook(keep)
        hooks.callback(kept.remove)
        if source is not None:
            hooks.enter_context(_hooked(source, replace))
        _logits(model, ids)
    return reached[0]


@contextmanager
def _hooked(module: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _require_same_logits(found: Unembedding, run: _Run) -> None:
    expected = _copied(run.logits).numpy()
    made = project(found, _copied(run.stream).numpy())
    error = float(np.abs(made - expected).max())
    largest = float(np.abs(expected).max())
    if not error <= max(1e-4, 8 * torch.finfo(run.stream.dtype).eps) * largest:
        raise UnknownStructureError(
            f"logits made from the last layer's output differ from its own by up to {error:.3g}, "
            f"these being up to {largest:.3g}. Found: norm {found.norm!r} "
            f"({run.norm.name if run.norm else 'none'}), eps {found.eps:.3g}, scale "
            f"{found.scale:.6g}, soft cap {found.softcap}, head weight {found.weight.shape}"
        )


def _alike(made: Tensor, expected: Tensor, rounded_as: Tensor | None = None) -> bool:
    """Equal, but for the rounding of float32 (or of what was rounded like another tensor)."""
    if made.shape != expected.shape:
        return False
    coarse = 0.0 if rounded_as is None else 8 * torch.finfo(rounded_as.dtype).eps
    largest = float(expected.abs().max())
    return bool((made.to(expected.device) - expected).abs().max() <= max(CLOSE, coarse) * largest)


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True)
