"""Where a model keeps its layers, heads, embedding and unembedding, found in the model itself.

Layers come from the module tree. Which rows and columns belong to a head is found by trying: a few
tokens go through the model, and the gradient of what a head passes to the output projection shows
which features of the other projections it reads. The projections give made-up numbers meanwhile,
and norms inside an attention let theirs through: what is found holds for any weights. No
architecture has a table, fused and grouped projections in whatever order included.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from basinscope.models.forward import (
    evaluating,
    inside_bridge,
    is_transformer_lens,
    token_logits,
    vocabulary_size,
)

PROBE_TOKENS = 8
_ATTENTION = re.compile(r"att(ention|n)|selfatt", re.IGNORECASE)
_CROSS = re.compile(r"cross|encoder_att|enc_dec", re.IGNORECASE)
_NORM = re.compile(r"norm", re.IGNORECASE)
BY_HAND = (
    "Pass masks by hand: sample(param_masks={parameter name: bool tensor of its shape, or None})"
)


class UnknownStructureError(ValueError):
    """A part of the model was asked for that could not be found in it."""


def require_module(model: object) -> None:
    """Raise a TypeError unless a model is a ``torch.nn.Module``."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module; got {type(model).__name__}: load it first, such as "
            "with AutoModelForCausalLM.from_pretrained()"
        )


def reason_of(error: object) -> str:
    """Give what an error says without its advice on masks, for what takes none."""
    return str(error).replace(BY_HAND, "").strip().removesuffix(".")


@dataclass(frozen=True)
class HeadSlices:
    """Which heads the rows or columns of one parameter belong to.

    Attributes
    ----------
    axis : int
        0 for rows, 1 for columns.
    head : ndarray (size of the axis,)
        The query head that owns each row or column alone; -1 where it is shared.
    group : ndarray (size of the axis,)
        The group of query heads (those of one key-value head) that it belongs to; -1 for none.
    """

    axis: int
    head: npt.NDArray[np.int64]
    group: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Layer:
    """The parameters of one layer, by name.

    Attributes
    ----------
    parameters, attention, mlp : tuple of str
        All of them; those of the attention's projections; those of the MLP, every expert
        included. Norms, cross-attention and convolutions over tokens are in ``parameters`` only.
    num_heads, num_groups : int
        Query heads, and key-value heads; 0 without attention.
    head_size : int
        Width of what one head passes to the output projection.
    heads : dict of str to HeadSlices
        The parameters that are cut into heads.
    unknown : str
        Why there is an attention but no heads were found; empty otherwise.
    """

    parameters: tuple[str, ...]
    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    num_heads: int
    num_groups: int
    head_size: int
    heads: dict[str, HeadSlices]
    unknown: str = ""


@dataclass(frozen=True)
class ModelStructure:
    """A model's parts, by the names of their parameters.

    Attributes
    ----------
    layers : tuple of Layer
    embed, unembed : tuple of str
        Token embedding, and the map to logits with its bias; the same parameter where they are
        tied.
    """

    layers: tuple[Layer, ...]
    embed: tuple[str, ...]
    unembed: tuple[str, ...]


@torch.inference_mode(mode=False)
@torch.enable_grad()
def find_structure(model: nn.Module) -> ModelStructure:
    """Find the parts of a Hugging Face causal LM or a TransformerLens model.

    An attention whose heads cannot be told apart has none, and its layer says why.

    Raises
    ------
    UnknownStructureError
        If the model has no layers; says what was found.
    """
    model = inside_bridge(model)
    if is_transformer_lens(model):
        return _hooked_structure(model)
    lists = _layer_lists(model)
    parts = [_parts_of_layer(model, lists, number) for number in range(len(lists[0][1]))]
    try:
        probes: Sequence[Seen | str] = probe(model, [attention for _, attention in parts])
    except UnknownStructureError as error:
        probes = [str(error)] * len(parts)
    canonical = _canonical_names(model)
    layers = []
    known: dict[tuple[Any, ...], _Heads] = {}
    for number, ((names, attention), seen) in enumerate(zip(parts, probes, strict=True)):
        projections = projections_of(model, attention)
        kind = tuple(
            (local, leaf, tuple(parameter.shape))
            for local, module in _local(projections)
            for leaf, parameter in module.named_parameters(recurse=False)
        )
        if kind not in known or known[kind].unknown:
            known[kind] = _heads_or_why(model, projections, seen, number)
        found = known[kind]
        heads = {
            canonical[id(getattr(module, leaf))]: found.slices[f"{local}.{leaf}"]
            for local, module in _local(projections)
            for leaf in ("weight", "bias")
            if f"{local}.{leaf}" in found.slices
        }
        heads |= _sinks(model, names["attention"], found.num_heads, found.num_groups)
        order = {name: place for place, name in enumerate(names["parameters"])}
        layers.append(
            Layer(
                parameters=names["parameters"],
                attention=names["attention"],
                mlp=names["mlp"],
                num_heads=found.num_heads,
                num_groups=found.num_groups,
                head_size=found.size,
                heads=dict(sorted(heads.items(), key=lambda item: order[item[0]])),
                unknown=found.unknown,
            )
        )
    return ModelStructure(tuple(layers), *_embeddings(model))


@dataclass(frozen=True)
class _Heads:
    """What :class:`Layer` says of heads, for layers of one kind."""

    num_heads: int = 0
    num_groups: int = 0
    size: int = 0
    slices: dict[str, HeadSlices] = field(default_factory=dict)
    unknown: str = ""


def layer_modules(model: nn.Module) -> list[str]:
    """Names of the modules that are a model's layers, in order.

    Raises
    ------
    UnknownStructureError
        If there is no list of layers, or if the parts of layers are kept in several lists.
    """
    model = inside_bridge(model)
    if is_transformer_lens(model):
        blocks = getattr(model, "blocks", None)
        if not isinstance(blocks, nn.ModuleList):
            raise UnknownStructureError(f"{type(model).__name__} has no list of blocks")
        return [f"blocks.{number}" for number in range(len(blocks))]
    lists = _layer_lists(model)
    if len(lists) > 1:
        raise UnknownStructureError(
            f"the layers of {type(model).__name__} are spread over {len(lists)} lists: "
            f"{', '.join(name for name, _ in lists)}"
        )
    ((name, modules),) = lists
    return [f"{name}.{number}" for number in range(len(modules))]


def attention_modules(model: nn.Module) -> list[list[str]]:
    """Names of each layer's modules that are its self-attention, in order; mostly one.

    Raises
    ------
    UnknownStructureError
        If there is no list of layers.
    """
    model = inside_bridge(model)
    lists = _layer_lists(model)
    return [_parts_of_layer(model, lists, number)[1] for number in range(len(lists[0][1]))]


def _layer_lists(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """The list of layers, and others beside it of the same length (parts of layers kept apart)."""
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and not re.search(r"\.\d+\.", name)
    }
    with_attention = {
        name: module
        for name, module in lists.items()
        if any(_is_attention(inner) for layer in module for inner in layer.modules())
    }
    chosen = {n: m for n, m in with_attention.items() if "decoder" in n} or with_attention
    if not chosen:
        found = ", ".join(f"{name} of {len(module)}" for name, module in lists.items()) or "none"
        raise UnknownStructureError(
            f"{type(model).__name__} has no list of layers with attention in it (lists of modules: "
            f"{found}). {BY_HAND}"
        )
    main = max(chosen, key=lambda name: sum(p.numel() for p in chosen[name].parameters()))
    parent = main.rpartition(".")[0]
    beside = [
        (name, module)
        for name, module in lists.items()
        if name != main and name.rpartition(".")[0] == parent and len(module) == len(lists[main])
    ]
    return [(main, lists[main]), *beside]


def _parts_of_layer(
    model: nn.Module, lists: list[tuple[str, nn.ModuleList]], number: int
) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """Names of a layer's parameters, and of the modules that are its self-attention."""
    prefixes = [f"{name}.{number}" for name, _ in lists]
    attention: list[str] = []
    cross: list[str] = []
    norms: list[str] = []
    convolutions: list[str] = []
    for prefix in prefixes:
        for name, module in model.get_submodule(prefix).named_modules(prefix=prefix):
            if name != prefix and _CROSS.search(name.rpartition(".")[2]):
                cross.append(name)
            elif _is_norm(module):
                norms.append(name)
            elif isinstance(module, nn.Conv1d):
                parent = _unwrapped(_unwrapped(name).rpartition(".")[0])
                convolutions.append(name if parent in prefixes else parent)
            elif _is_attention(module) and (name != prefix or len(lists) > 1):
                attention.append(name)
    own = [n for n in _outermost(attention) if not _within(n, cross)]
    canonical = _canonical_names(model)
    modules = {id(module): name for name, module in model.named_modules()}
    inside = {
        local: canonical[id(parameter)]
        for prefix in prefixes
        for local, parameter in model.get_submodule(prefix).named_parameters(prefix=prefix)
    }
    unused = [name for prefix in prefixes for name in _cut_into_parts(model, prefix)]
    inside = {n: c for n, c in inside.items() if not _within(n, unused)}
    plain = {n: c for n, c in inside.items() if not _within(n, norms) and not _within(n, cross)}
    return {
        "parameters": tuple(inside.values()),
        "attention": tuple(c for n, c in plain.items() if _within(n, own)),
        "mlp": tuple(c for n, c in plain.items() if not _within(n, [*own, *convolutions])),
    }, [modules[id(model.get_submodule(name))] for name in own]


def _unwrapped(name: str) -> str:
    """Name what a ``TransformerBridge`` has put around a module; any other stays as it is."""
    return re.sub(r"(\._original_component)+$", "", name)


def _canonical_names(model: nn.Module) -> dict[int, str]:
    """By id, the one name of each parameter that ``named_parameters`` gives."""
    return {id(parameter): name for name, parameter in model.named_parameters()}


def _is_attention(module: nn.Module) -> bool:
    """Whether a module is an attention block: its class says so, and it multiplies."""
    if not _ATTENTION.search(type(module).__name__):
        return False
    return sum(1 for inner in module.modules() if _is_projection(inner)) >= 2


def _is_projection(module: nn.Module) -> bool:
    """Whether a module multiplies with a matrix of its own; one around such a module does not."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or isinstance(module, nn.Embedding):
        return False
    return not any(_is_projection(inner) for inner in module.children())


def _is_norm(module: nn.Module) -> bool:
    return _NORM.search(type(module).__name__) is not None and not list(module.children())


def _outermost(names: list[str]) -> list[str]:
    return [n for n in names if not any(n != other and _within(n, [other]) for other in names)]


def _within(name: str, prefixes: list[str]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def projections_of(model: nn.Module, attention: list[str]) -> dict[str, nn.Module]:
    """Give the linear maps of a layer's self-attention by full name."""
    unused = [name for prefix in attention for name in _cut_into_parts(model, prefix)]
    return {
        name: module
        for prefix in attention
        for name, module in model.get_submodule(prefix).named_modules(prefix=prefix)
        if _is_projection(module)
        and not _CROSS.search(name[len(prefix) :])
        and not _within(name, unused)
    }


def used_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Give a model's parameters by name, without what a ``TransformerBridge`` no longer uses.

    These are fused projections, which TransformerLens has cut into parameters of their own.
    """
    inside = inside_bridge(model)
    fused = [] if inside is model else _cut_into_parts(inside, "")
    return {name: p for name, p in inside.named_parameters() if not _within(name, fused)}


def _cut_into_parts(model: nn.Module, prefix: str) -> list[str]:
    found = []
    for name, module in model.get_submodule(prefix).named_modules(prefix=prefix):
        parts = dict(module.named_children())
        if {"qkv", "q", "k", "v"} <= parts.keys() and hasattr(parts["qkv"], "_original_component"):
            found.append(f"{name}.qkv")
        if {"gate", "in"} <= parts.keys() and hasattr(module, "fused_attr"):
            found.append(f"{name}._original_component.{module.fused_attr}")
    return found


def _local(projections: dict[str, nn.Module]) -> list[tuple[str, Any]]:
    """The same without the number of the layer in their names."""
    return [(re.sub(r"\.\d+\.", ".", name, count=1), p) for name, p in projections.items()]


@dataclass
class Seen:
    """What a probe saw of one layer's projections, in the order in which they ran."""

    outputs: dict[str, Tensor]
    inputs: dict[str, Tensor]


def probe(model: nn.Module, attention: list[list[str]]) -> list[Seen]:
    """Run a few tokens, cutting the graph at every projection's output.

    A projection gives made-up numbers: trained ones may be cut off, underflow, or be zero.
    """
    seen = {tuple(prefixes): Seen({}, {}) for prefixes in attention}  # layers may share them
    hooks = []
    generator = torch.Generator().manual_seed(0)
    for prefixes, record in seen.items():
        for name, module in projections_of(model, list(prefixes)).items():

            def cut(
                module: nn.Module,
                args: Any,
                output: Any,
                name: str = name,
                record: Seen = record,
            ) -> Any:
                if not isinstance(output, Tensor) or not args or not isinstance(args[0], Tensor):
                    return None
                made_up = torch.randn(output.shape, generator=generator) / 2
                record.inputs[name] = args[0]
                record.outputs[name] = made_up.to(output).requires_grad_()
                return record.outputs[name].clone()  # models may write into it

            hooks.append(module.register_forward_hook(cut))
        for prefix in prefixes:
            for norm in filter(_is_norm, model.get_submodule(prefix).modules()):
                hooks.append(norm.register_forward_hook(_let_through))
    try:
        with evaluating(model):
            count = vocabulary_size(model) or 2
            device = next(model.parameters()).device
            ids = (torch.arange(1, PROBE_TOKENS + 1, device=device) * 7919) % count
            token_logits(model, ids[None])
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnknownStructureError(
            f"{type(model).__name__} cannot be run on a few tokens to see its heads ({reason}). "
            f"{BY_HAND}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return [seen[tuple(prefixes)] for prefixes in attention]


def _let_through(module: nn.Module, args: Any, output: Any) -> Any:
    """A norm over all heads would mix them; it leaves every feature in its place."""
    if len(args) == 1 and isinstance(output, Tensor) and output.shape == args[0].shape:
        return args[0].to(output.dtype)
    return None


def _heads_or_why(
    model: nn.Module, projections: dict[str, nn.Module], seen: Seen | str, layer: int
) -> _Heads:
    if not projections:
        return _Heads()
    if isinstance(seen, str):
        return _Heads(unknown=seen)
    try:
        return _heads_of(model, projections, seen)
    except UnknownStructureError as error:
        shapes = ", ".join(f"{n} {tuple(p.weight.shape)}" for n, p in projections.items())  # type: ignore[arg-type]
        return _Heads(
            unknown=f"the heads of layer {layer} of {type(model).__name__} cannot be told apart: "
            f"{error} (found {shapes}). {BY_HAND}"
        )


def _heads_of(model: nn.Module, projections: dict[str, nn.Module], seen: Seen) -> _Heads:
    """Heads, groups, head size, and the slices of each projection's weight and bias."""
    for name, module in projections.items():
        if not isinstance(module.weight, nn.Parameter):
            raise UnknownStructureError(f"the weight of {name} is made of other parameters")
    names = list(seen.outputs)
    if len(names) < len(projections) or len(names) < 2:
        raise UnknownStructureError(f"of its projections {len(names)} were run")
    last = names[-1]  # to run: the output projection
    passed = seen.inputs[last]
    width = passed.shape[-1]
    num_heads = _told_heads(model)
    if not num_heads or width % num_heads:
        raise UnknownStructureError(
            f"the output projection takes {width} numbers, and model.config names "
            f"{num_heads or 'no number of'} heads"
        )
    if not passed.requires_grad:
        raise UnknownStructureError("no projection's output reaches the last one")
    size = width // num_heads
    outputs = {n: seen.outputs[n] for n in names[:-1]}
    tables = _readers(passed.split(size, dim=-1), outputs)
    readers = {n: table for n, table in tables.items() if table.any()}
    ends = _readers((passed[..., :1], passed[..., size - 1 : size]), outputs)  # of head 0
    if not any((_alone(readers[n]) & ends[n].all(0)).any() for n in readers):
        raise UnknownStructureError(
            f"no row is read by all of the first head and by no other, if there are {num_heads} "
            "heads as model.config says"
        )
    local = dict(zip(projections, (n for n, _ in _local(projections)), strict=True))
    num_groups = _num_groups(readers, num_heads)
    slices: dict[str, HeadSlices] = {}
    for name, table in readers.items():
        head, group = _owners(name, table, num_heads, num_groups)
        slices |= _of_module(local[name], projections[name], head, group, output=False)
    head = np.repeat(np.arange(num_heads), size)
    group = head * num_groups // num_heads
    slices |= _of_module(local[last], projections[last], head, group, output=True)
    return _Heads(num_heads, num_groups, size, slices)


def _readers(
    blocks: Sequence[Tensor], outputs: dict[str, Tensor]
) -> dict[str, npt.NDArray[np.bool_]]:
    """Per projection a table (block, feature): does the block read the feature?"""
    rows = {name: [] for name in outputs}  # type: dict[str, list[npt.NDArray[np.bool_]]]
    for block in blocks:
        upstream = torch.linspace(1, 2, block.numel()).to(block).view(block.shape)
        gradients = torch.autograd.grad(
            block, list(outputs.values()), upstream, retain_graph=True, allow_unused=True
        )
        for name, gradient, output in zip(outputs, gradients, outputs.values(), strict=True):
            features = output.shape[-1]
            read = np.zeros(features, dtype=np.bool_)
            if gradient is not None:
                read = (gradient.reshape(-1, features) != 0).any(0).cpu().numpy()
            rows[name].append(read)
    return {name: np.stack(tables) for name, tables in rows.items()}


def _alone(table: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Which features the first head reads and no other."""
    return table[0] & (table.sum(0) == 1)


def _num_groups(readers: dict[str, npt.NDArray[np.bool_]], num_heads: int) -> int:
    """Number of key-value heads, as the sharing of features shows it."""
    counts = {int(c) for table in readers.values() for c in table.sum(0) if c > 1}
    return num_heads // min(counts, default=1)


def _owners(
    name: str, table: npt.NDArray[np.bool_], num_heads: int, num_groups: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Head and group of each feature of a projection."""
    per_group = num_heads // num_groups
    count = table.sum(0)
    first = table.argmax(0)
    head = np.where(count == 1, first, -1)
    group = np.where(count > 0, first // per_group, -1)
    whole = (count == per_group) & (first % per_group == 0)
    contiguous = table[first + np.maximum(count, 1) - 1, np.arange(table.shape[1])]
    good = (count == 0) | (count == 1) | (whole & contiguous)
    if not good.all():
        readers = np.flatnonzero(table[:, int(np.argmin(good))]).tolist()
        raise UnknownStructureError(
            f"row {int(np.argmin(good))} of {name} is read by heads {readers}, which are no group "
            f"of {per_group}"
        )
    return head, group


def _of_module(
    local: str,
    module: Any,
    head: npt.NDArray[np.int64],
    group: npt.NDArray[np.int64],
    *,
    output: bool,
) -> dict[str, HeadSlices]:
    """Slices of a projection's weight (and bias) from those of its features."""
    transposed = not isinstance(module, nn.Linear) and type(module).__name__ == "Conv1D"
    axis = int(output != transposed)
    slices = {f"{local}.weight": HeadSlices(axis, head, group)}
    if not output and getattr(module, "bias", None) is not None:
        slices[f"{local}.bias"] = HeadSlices(0, head, group)
    return {n: s for n, s in slices.items() if module.weight.shape[axis] == len(head)}


def _sinks(
    model: nn.Module, attention: tuple[str, ...], num_heads: int, num_groups: int
) -> dict[str, HeadSlices]:
    """Parameters of the attention itself with one number per head."""
    found = {}
    for name in attention:
        leaf = name.rpartition(".")[2]
        if leaf in ("weight", "bias") or model.get_parameter(name).shape != (num_heads,):
            continue
        head = np.arange(num_heads)
        found[name] = HeadSlices(0, head, head * num_groups // num_heads)
    return found


def _embeddings(model: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
    names = _canonical_names(model)

    def of(getter: str) -> tuple[str, ...]:
        find = getattr(model, getter, None)
        module = find() if callable(find) else None
        own = [] if module is None else list(module.parameters(recurse=True))
        return tuple(names[id(p)] for p in own if id(p) in names)

    return of("get_input_embeddings"), of("get_output_embeddings")


def _told_heads(model: nn.Module) -> int:
    """Number of heads in the configuration (of the decoder, of the text), 0 if there is none."""
    config: Any = getattr(model, "config", None)
    own = getattr(config, "get_text_config", None)
    for candidate, key in (
        (config, "decoder_attention_heads"),
        (own(decoder=True) if callable(own) else None, "num_attention_heads"),
        (config, "num_attention_heads"),
    ):
        value = getattr(candidate, key, None)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return 0


def _hooked_structure(model: nn.Module) -> ModelStructure:
    """A TransformerLens model, whose parameters have the heads as their first axis."""
    config: Any = model.cfg
    heads = int(config.n_heads)
    groups = int(getattr(config, "n_key_value_heads", None) or heads)
    names = [name for name, _ in model.named_parameters()]
    layers = []
    for number in range(int(getattr(config, "n_layers", 0))):
        inside = [n for n in names if n.startswith(f"blocks.{number}.")]
        attention = [n for n in inside if re.search(r"\.attn\._?[Wb]_", n)]
        slices = {}
        for name in attention:
            length = model.get_parameter(name).shape[0]
            key_value = re.search(r"_[KV]$", name) is not None
            if name.endswith("b_O") or length not in (heads, groups):
                continue
            if key_value and length == groups != heads:
                slices[name] = HeadSlices(0, np.full(groups, -1), np.arange(groups))
            else:
                head = np.arange(heads)
                slices[name] = HeadSlices(0, head, head * groups // heads)
        layers.append(
            Layer(
                parameters=tuple(inside),
                attention=tuple(attention),
                mlp=tuple(n for n in inside if re.search(r"\.mlp\.(?!.*\bln\b)", n)),
                num_heads=heads,
                num_groups=groups,
                head_size=int(config.d_head),
                heads=slices,
            )
        )
    if not any(layer.attention for layer in layers):
        raise UnknownStructureError(
            f"{type(model).__name__} has no parameters named blocks.0.attn.W_Q and so on, as a "
            f"TransformerLens HookedTransformer has (its first are: {', '.join(names[:3])}). "
            f"{BY_HAND}"
        )
    return ModelStructure(
        tuple(layers),
        tuple(n for n in names if n == "embed.W_E"),
        tuple(n for n in names if n.startswith("unembed.")),
    )
