"""Where in a model each activation is read, and written: a module's input or its output."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from basinscope.models.canonical import canonical_maps
from basinscope.models.forward import evaluating, is_transformer_lens, token_logits
from basinscope.models.restrictions import structure_of
from basinscope.models.stream import HIDDEN, Layer, first_tensor, stream_of
from basinscope.models.structure import ModelStructure, UnknownStructureError, reason_of
from basinscope.models.unembedding import find_final_norm

FINAL_NORM = "last_layernorm"


@dataclass(frozen=True)
class Site:
    """One place in a model.

    Attributes
    ----------
    module : str
    part : {"input", "output", "weights"}
        What the module takes, what it returns, or the second thing that it returns.
    scale : float
        What is added to the residual stream is so many times that.
    heads : int
        The last axis is that many heads side by side; 0 where it is not cut.
    rows : ndarray or None
        Which of its last axis; None for all.
    """

    module: str
    part: Literal["input", "output", "weights"]
    scale: float = 1.0
    heads: int = 0
    rows: npt.NDArray[np.int64] | None = None

    def read(self, args: Any, kwargs: Any, output: Any, length: int) -> Tensor:
        """Take the tensor of this site, (example, token, ...), from a call of its module."""
        if self.part == "input":
            found = args[0] if args else kwargs.get(HIDDEN)
        elif self.part == "weights":
            found = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        else:
            found = first_tensor(output)
        if not isinstance(found, Tensor):
            raise ValueError(f"{self.module} gives no {self.part} to read here: got {found!r}")
        if self.part == "weights" and (
            found.shape[-2:] != (length, length) or bool((found < 0).any())
        ):
            raise ValueError(
                f"{self.module} gives no attention probabilities (example, head, token, token), "
                f"but {tuple(found.shape)} other numbers: choose layers without it"
            )
        found = by_example(found, length)
        if self.rows is not None:
            found = found[..., torch.as_tensor(self.rows, device=found.device)]
        if self.heads and found.ndim == 3:
            found = found.unflatten(-1, (self.heads, -1))
        return found if self.scale == 1.0 else found * self.scale


def listening(
    model: nn.Module, site: Site, use: Callable[[Tensor], None], length: Callable[[], int]
) -> RemovableHandle:
    """Hand the tensor of a site on whenever its module runs; `length` counts the tokens then."""
    module = model.get_submodule(site.module)
    if site.part == "input":

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            use(site.read(args, kwargs, None, length()))

        return module.register_forward_pre_hook(before, with_kwargs=True)

    def after(module: nn.Module, args: Any, output: Any) -> None:
        use(site.read(args, {}, output, length()))

    return module.register_forward_hook(after)


def by_example(array: Tensor, length: int) -> Tensor:
    """Give (example, token, width) where a model has flattened the first two."""
    return array.unflatten(0, (-1, length)) if array.ndim == 2 else array


@dataclass(frozen=True)
class Heads:
    """The heads of a layer: what each passes, and what becomes of it.

    Attributes
    ----------
    passed : Site
        (example, token, head, d_head)
    projection : str
        The parameter that maps them to the stream.
    after : tuple of str
        Norms between there and the stream.
    scale : float
    """

    passed: Site
    projection: str
    after: tuple[str, ...] = ()
    scale: float = 1.0


@dataclass(frozen=True)
class Sites:
    """Every activation of a model that can be read.

    Attributes
    ----------
    plain : dict of str to Site
        By the names of :mod:`basinscope.models.activation_cache`.
    heads : dict of int to Heads
        By layer.
    missing : dict of str to str
        Why a name that other models have cannot be read.
    layers : tuple of str
        Names of the layers' modules.
    width : int
        The stream's d_model.
    """

    plain: dict[str, Site]
    heads: dict[int, Heads]
    missing: dict[str, str]
    layers: tuple[str, ...]
    width: int


def find_sites(model: nn.Module) -> Sites:
    """Find where the activations of a Hugging Face causal LM or TransformerLens model are.

    Raises
    ------
    UnknownStructureError
        If the model has no list of layers, or does not run on a few tokens.
    """
    if is_transformer_lens(model):
        return _hooked_sites(model)
    try:
        return _sites(model)
    except UnknownStructureError as error:
        raise UnknownStructureError(
            f"the activations of {type(model).__name__} cannot be found: {reason_of(error)}"
        ) from error


def _sites(model: nn.Module) -> Sites:
    stream = stream_of(model)
    structure = structure_of(model)
    plain: dict[str, Site] = {}
    heads: dict[int, Heads] = {}
    missing: dict[str, str] = {}
    for number, layer in enumerate(stream):
        if layer.one_stream:
            plain[f"resid_in_{number}"] = Site(layer.module, "input")
            plain[f"resid_out_{number}"] = Site(layer.module, "output")
        else:
            why = f"{layer.module} hands several streams on at once"
            missing |= {f"resid_in_{number}": why, f"resid_out_{number}": why}
        for name, module, what in (
            (f"attn_out_{number}", layer.attention_writes, "attention"),
            (f"mlp_out_{number}", layer.mlp_writes, "MLP"),
        ):
            if module is None:
                missing[name] = f"no output of {layer.module} was seen to be what its {what} adds"
            else:
                plain[name] = Site(module, "output", scale=layer.scale)
        if layer.attention is not None:
            plain[f"attn_in_{number}"] = Site(layer.attention, "input")
            plain[f"attn_pattern_{number}"] = Site(layer.attention, "weights")
            why = f"{layer.attention} has no projection that gives just these, as far as was seen"
            missing |= {f"{kind}_{number}": why for kind in ("queries", "keys", "values")}
        found = _heads(structure, layer, number)
        if isinstance(found, str):
            missing[f"head_out_{number}"] = found
        else:
            heads[number] = found
    plain |= _queries_keys_values(model, structure)
    if not hasattr(model, "get_input_embeddings"):
        raise UnknownStructureError(
            "it has no get_input_embeddings(): give a Hugging Face causal LM or a TransformerLens "
            "model"
        )
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    plain["embed"] = Site(next(n for n, m in model.named_modules() if m is embedding), "output")
    norm = find_final_norm(model)
    plain[FINAL_NORM] = Site(norm, "input") if norm else Site(stream[-1].module, "output")
    names = tuple(layer.module for layer in stream)
    return Sites(plain, heads, missing, names, stream[-1].width)


def _heads(structure: ModelStructure, layer: Layer, number: int) -> Heads | str:
    """A layer's heads, or why they cannot be taken apart."""
    found = structure.layers[number]
    if layer.attention is None or layer.output_projection is None:
        return f"layer {number} has no attention"
    if found.unknown:
        return reason_of(found.unknown)
    if layer.attention_writes is None:
        return f"no output of {layer.module} was seen to be what its attention adds"
    return Heads(
        Site(layer.output_projection, "input", heads=found.num_heads),
        f"{layer.output_projection}.weight",
        layer.after_projection,
        layer.scale,
    )


def _queries_keys_values(model: nn.Module, structure: ModelStructure) -> dict[str, Site]:
    sites = {}
    try:
        maps = canonical_maps(model)
    except UnknownStructureError:
        return {}
    for name, linear in maps.items():
        match = re.fullmatch(r"(\d+)\.attn\.([qkv])", name)
        if match is None:
            continue
        layer = structure.layers[int(match[1])]
        if layer.unknown:
            continue  # as many heads as nobody knows
        kind, heads = {
            "q": ("queries", layer.num_heads),
            "k": ("keys", layer.num_groups),
            "v": ("values", layer.num_groups),
        }[match[2]]
        sites[f"{kind}_{match[1]}"] = Site(linear.module, "output", heads=heads, rows=linear.rows)
    return sites


def head_weights(model: nn.Module, heads: Heads) -> Tensor:
    """Give the map from each head to the stream, (head, d_head, d_model)."""
    return weights_by_head(model.get_submodule(heads.projection.rpartition(".")[0]), heads)


def weights_by_head(module: nn.Module, heads: Heads) -> Tensor:
    """Give the same from the module that has the parameter."""
    weight = module.get_parameter(heads.projection.rpartition(".")[2])
    if weight.ndim == 3:
        return weight
    transposed = isinstance(module, nn.Linear) or type(module).__name__ != "Conv1D"
    return (weight.T if transposed else weight).unflatten(0, (heads.passed.heads, -1))


def _hooked_sites(model: nn.Module) -> Sites:
    """A TransformerLens model, which has a module for each of its activations."""
    config: Any = model.cfg
    layers = tuple(f"blocks.{number}" for number in range(int(config.n_layers)))
    modules = dict(model.named_modules())
    behind = _behind_attention(model, layers)
    places = {
        "resid_in": "hook_resid_pre",
        "resid_mid": "hook_resid_mid",
        "resid_out": "hook_resid_post",
        "attn_in": "ln1",
        "attn_out": "hook_attn_out",
        "mlp_out": "hook_mlp_out",
        "queries": "attn.hook_q",
        "keys": "attn.hook_k",
        "values": "attn.hook_v",
        "attn_pattern": "attn.hook_pattern",
    }
    plain = {
        f"{kind}_{number}": Site(f"{layer}.{place}", "output")
        for number, layer in enumerate(layers)
        for kind, place in places.items()
        if f"{layer}.{place}" in modules
    }
    for number, layer in enumerate(layers):
        if f"{layer}.ln1" in behind[layer]:  # attention reads the stream itself
            plain[f"attn_in_{number}"] = Site(f"{layer}.hook_resid_pre", "output")
    for name in [name for name in plain if name.startswith(("queries_", "keys_", "values_"))]:
        few = None if name.startswith("queries_") else getattr(config, "n_key_value_heads", None)
        plain[name] = replace(plain[name], heads=int(few or config.n_heads))
    plain["embed"] = Site("hook_embed", "output")
    last = f"blocks.{len(layers) - 1}.hook_resid_post"
    plain[FINAL_NORM] = Site("ln_final", "input") if "ln_final" in modules else Site(last, "output")
    heads = {
        number: Heads(
            Site(f"{layer}.attn.hook_z", "output", heads=int(config.n_heads)),
            f"{layer}.attn.W_O",
            behind[layer],
        )
        for number, layer in enumerate(layers)
        if f"{layer}.attn.hook_z" in modules
    }
    return Sites(plain, heads, {}, layers, int(config.d_model))


@torch.inference_mode(mode=False)
@torch.no_grad()
def _behind_attention(model: nn.Module, layers: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Names of the modules between a block's attention and its hook_attn_out, in order: norms.

    One token shows them: each is given the very tensor that the one before it returned.
    """
    behind: dict[str, list[str]] = {layer: [] for layer in layers}
    handed_on: dict[str, Tensor] = {}

    def follow(layer: str, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if name == "attn":
            handed_on[layer] = output
        elif layer in handed_on and args and args[0] is handed_on[layer]:
            if name == "hook_attn_out":
                del handed_on[layer]
            else:
                behind[layer].append(f"{layer}.{name}")
                handed_on[layer] = output

    with ExitStack() as hooks:
        for layer in layers:
            for name, module in model.get_submodule(layer).named_children():
                handle = module.register_forward_hook(partial(follow, layer, name))
                hooks.callback(handle.remove)
        hooks.enter_context(evaluating(model))
        device = next(model.parameters()).device
        token_logits(model, torch.zeros((1, 1), dtype=torch.long, device=device))
    return {layer: tuple(names) for layer, names in behind.items()}
