"""The residual stream: which modules read it and write to it, layer by layer.

What a layer's attention and MLP add to the stream is found by trying. A few tokens go through the
model, and those two outputs inside a layer are taken whose sum, times one number, is what the layer
changed. So norms after a sublayer, residual multipliers, sublayers side by side, and blocks that
add the stream inside their attention need no table. The layers are given small made-up numbers:
beside a loud stream, 16 bits lose what is added to it. Every module with weights gives made-up
numbers, too: trained ones may be zero, or alike before and behind a norm.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from basinscope.models.forward import evaluating, is_transformer_lens, token_logits, vocabulary_size
from basinscope.models.head import rounded
from basinscope.models.structure import (
    UnknownStructureError,
    attention_modules,
    layer_modules,
    projections_of,
)

PROBE_TOKENS = 6
UNIT = 2.0**-8  # of made-up numbers, so few of it that 16 bits add three without rounding
QUIET, LOUDER = 20, 100  # the most that a layer is given, and that its modules make


@dataclass(frozen=True)
class Layer:
    """Modules of one layer, by name.

    Attributes
    ----------
    module : str
        Takes the stream and returns it.
    attention : str or None
        The block that reads the stream through a norm; None in a layer without attention.
    output_projection : str or None
        Its last linear map.
    attention_writes, mlp_writes : str or None
        Modules whose output, times `scale`, is added to the stream. Where nothing is added (a norm
        over the stream itself), both are None.
    after_projection : tuple of str
        Modules between the output projection and what is added, in order: norms, dropout.
    scale : float
    one_stream : bool
        Whether the stream is (example, token, d_model); some models hand several on at once.
    width : int
        The stream's d_model.
    """

    module: str
    attention: str | None
    output_projection: str | None
    attention_writes: str | None
    mlp_writes: str | None
    after_projection: tuple[str, ...]
    scale: float
    one_stream: bool
    width: int


def stream_of(model: nn.Module) -> tuple[Layer, ...]:
    """Find the layers of a Hugging Face causal LM, once per model.

    Weights do not matter. It is found again when modules, or factors of a layer's own, are others.

    Raises
    ------
    UnknownStructureError
        If the model has no list of layers, or does not run on a few tokens; says what was found.
    """
    if is_transformer_lens(model):
        raise UnknownStructureError(
            f"{type(model).__name__} names its stream itself: blocks.0.hook_resid_pre and so on"
        )
    names = tuple(name for name, _ in model.named_modules())
    known = (names, _numbers_of_layers(model))
    found = _streams.get(model)
    if found is None or found[0] != known:
        found = _streams[model] = (known, _find(model))
    return found[1]


_streams: WeakKeyDictionary[nn.Module, tuple[object, tuple[Layer, ...]]] = WeakKeyDictionary()


def _numbers_of_layers(model: nn.Module) -> tuple[bytes, ...]:
    """Factors and the like that are in no module of a layer: they are not made up."""
    layers = [model.get_submodule(name) for name in layer_modules(model)]
    numbers = [
        tensor.detach().reshape(-1)
        for layer in layers
        for tensor in (*layer.parameters(recurse=False), *layer.buffers(recurse=False))
        if tensor.ndim < 2
    ]
    return tuple(vector.cpu().view(torch.uint8).numpy().tobytes() for vector in numbers)


@dataclass
class _Ran:
    """One run of a module inside a layer."""

    name: str
    given: Tensor
    made: Tensor


@torch.inference_mode(mode=False)
@torch.no_grad()
def _find(model: nn.Module) -> tuple[Layer, ...]:
    layers = layer_modules(model)
    blocks = attention_modules(model)
    runs: list[list[_Ran]] = [[] for _ in layers]
    generator = torch.Generator().manual_seed(0)

    def made_up(most: int, like: Tensor) -> Tensor:
        return UNIT * torch.randint(-most, most + 1, like.shape, generator=generator).to(like)

    def make_up(module: nn.Module, args: Any, output: Any) -> Any:
        real = isinstance(output, Tensor) and output.is_floating_point()
        return made_up(LOUDER, output) if real else None

    with ExitStack() as hooks:
        for module in _with_weights(model, layers):
            hooks.callback(module.register_forward_hook(make_up).remove)
        for layer, seen in zip(layers, runs, strict=True):
            whole = model.get_submodule(layer)
            handle = whole.register_forward_pre_hook(
                changing_input(partial(made_up, QUIET)), with_kwargs=True
            )
            hooks.callback(handle.remove)
            for name, module in whole.named_modules(prefix=layer):
                note = _noting(name, seen)
                handle = module.register_forward_hook(note, with_kwargs=True)
                hooks.callback(handle.remove)
        hooks.enter_context(evaluating(model))
        device = next(model.parameters()).device
        count = vocabulary_size(model) or 2
        ids = (torch.arange(2, PROBE_TOKENS + 2, device=device) * 104729) % count
        try:
            token_logits(model, ids[None])
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UnknownStructureError(
                f"{type(model).__name__} cannot be run on a few tokens to see its residual stream "
                f"({reason})"
            ) from error
    return tuple(
        _layer(model, layer, attention, seen)
        for layer, attention, seen in zip(layers, blocks, runs, strict=True)
    )


def _with_weights(model: nn.Module, layers: list[str]) -> list[nn.Module]:
    """The innermost modules that have parameters: projections, norms, experts; each once."""
    modules = dict.fromkeys(m for layer in layers for m in model.get_submodule(layer).modules())
    return [m for m in modules if _count(m, inside=False) and _count(m) == _count(m, inside=False)]


def _count(module: nn.Module, *, inside: bool = True) -> int:
    """Number of a module's parameters, with those of the modules inside it."""
    return len(list(module.parameters(recurse=inside)))


def _noting(name: str, seen: list[_Ran]) -> Any:
    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = first_tensor(args) if args else first_tensor(tuple(kwargs.values()))
        made = first_tensor(output)
        if given is not None and made is not None:
            seen.append(_Ran(name, given.clone(), made.clone()))

    return note


def first_tensor(value: Any) -> Tensor | None:
    """The hidden states of what a module takes or returns: itself, or first in a tuple."""
    if isinstance(value, tuple | list):
        value = value[0] if value else None
    return value if isinstance(value, Tensor) else None


def changing_input(change: Callable[[Tensor], Tensor]) -> Any:
    """Make a pre-hook, with keywords, that changes the hidden states a module takes."""

    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, HIDDEN: change(kwargs[HIDDEN])}

    return hook


HIDDEN = "hidden_states"  # its name, where a module is given it by name


def _layer(model: nn.Module, layer: str, attention: list[str], seen: list[_Ran]) -> Layer:
    whole = next((run for run in seen if run.name == layer), None)
    if whole is None or whole.given.shape != whole.made.shape:
        raise UnknownStructureError(f"{layer} does not take the residual stream and return it")
    inside = [  # some models flatten (example, token) on the way
        _Ran(run.name, run.given, run.made.reshape(whole.made.shape))
        for run in seen
        if run is not whole
        and run.made.shape[-1] == whole.made.shape[-1]
        and run.made.numel() == whole.made.numel()
    ]
    ran = [run.name for run in seen]
    projections = [name for name in ran if name in projections_of(model, attention)]
    block = attention[0] if len(attention) == 1 and attention[0] in ran else None
    projection = projections[-1] if block and projections else None
    of_attention = _that_carry(inside, projection)
    change = whole.made - whole.given
    writers = _writers(inside, of_attention, change)
    one_stream, width = whole.given.ndim == 3, whole.given.shape[-1]
    if writers is None or (writers[0] is None and _mixes_tokens(model, layer, writers[1])):
        return Layer(layer, block, projection, None, None, (), 1.0, one_stream, width)
    attention_writes, mlp_writes, scale = writers
    between = of_attention[: of_attention.index(attention_writes) + 1] if attention_writes else []
    return Layer(
        layer,
        block,
        projection,
        attention_writes,
        mlp_writes,
        tuple(n for n in between if n not in (projection, block) and not _wraps(n, projection)),
        scale,
        one_stream,
        width,
    )


def _mixes_tokens(model: nn.Module, layer: str, name: str | None) -> bool:
    """Whether a part of a layer has a convolution over tokens, so that it is no MLP."""
    assert name is not None
    part = name[len(layer) + 1 :].partition(".")[0]
    mixer = model.get_submodule(f"{layer}.{part}")
    return any(isinstance(module, nn.Conv1d) for module in mixer.modules())


def _that_carry(inside: list[_Ran], projection: str | None) -> list[str]:
    """The output projection and modules that hand its output on, in the order they ran."""
    carried: list[_Ran] = []
    for run in inside:
        if run.name == projection or any(
            torch.equal(run.given.flatten(), other.made.flatten())
            or torch.equal(run.made, other.made)
            for other in carried
        ):
            carried.append(run)
    return [run.name for run in carried]


def _wraps(outer: str, inner: str | None) -> bool:
    return inner is not None and inner.startswith(f"{outer}.")


def _writers(
    inside: list[_Ran], of_attention: list[str], change: Tensor
) -> tuple[str | None, str | None, float] | None:
    """Find which outputs add up to a layer's change: attention's, the MLP's, and their scale."""
    coarse = change.dtype in (torch.bfloat16, torch.float16)
    change = change.double()
    tolerance = (2e-2 if coarse else 1e-4) * float(change.norm())
    best: tuple[float, str | None, str | None, float] | None = None
    attention = [run for run in inside if run.name in of_attention]
    others = [run for run in inside if run.name not in of_attention]
    pairs: list[tuple[_Ran | None, _Ran | None]] = [(a, m) for a in attention for m in others]
    singles: list[tuple[_Ran | None, _Ran | None]] = [
        *((a, None) for a in attention),
        *((None, m) for m in others),
    ]
    rounding = 1e-3 if coarse else 1e-5
    for first, second in [*pairs, *singles]:
        total = torch.stack([run.made.double() for run in (first, second) if run]).sum(0)
        power = float(total.square().sum())
        scale = float((total * change).sum()) / power if power else 1.0
        error = float((change - scale * total).norm())
        if scale and error <= tolerance and (best is None or error < 0.99 * best[0]):
            names = (first.name if first else None, second.name if second else None)
            best = (error, *names, rounded(scale, rounding, digits=4))
    return best[1:] if best else None
