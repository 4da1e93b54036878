"""Weight restrictions: parts of a model by name, as masks of its parameters.

    "full"             every parameter
    "l3"               layer 3            "l3 attn", "l3 mlp"    its attention, its MLP
    "l3h5"             head 5 of layer 3: its rows of the query, key and value projections and its
                       columns of the output projection; with grouped queries its key-value head too
    "l3g1"             a key-value head and all query heads that share it
    "embed", "unembed" token embedding, map to logits
    a parameter's own name

Case and spaces do not matter, and a list means the union. What the parts are is found in the model
itself, see :mod:`basinscope.models.structure`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from basinscope.models.forward import first_name, uncompiled
from basinscope.models.structure import (
    Layer,
    ModelStructure,
    UnknownStructureError,
    find_structure,
    used_parameters,
)

ParamMasks = dict[str, Tensor | None]
"""Parameter name to a bool mask of its shape, or to None for all of it."""

PATTERNS = "'full', 'l0', 'l0h1', 'l0g0', 'l0 attn', 'l0 mlp', 'embed', 'unembed'"


def create_param_masks(model: nn.Module, restriction: str | Sequence[str]) -> ParamMasks:
    """Make the masks of a weight restriction.

    Parameters
    ----------
    model : nn.Module
        A Hugging Face causal LM or a TransformerLens model.
    restriction : str or list of str
        As the table of this module says; a list is the union, "full" not allowed in it.

    Returns
    -------
    dict of str to Tensor or None
        For ``sample(param_masks=...)``. A mask of whole rows or columns is a view that takes one
        byte per row or column, not per element.

    Raises
    ------
    TypeError
        If `restriction` is neither a string nor a list of them.
    ValueError
        If it names no part of this model: a layer, head or group out of range (with the range), or
        no known pattern (with the patterns).
    UnknownStructureError
        If the model's own structure, or the heads of the layer, could not be found; says what was.
    """
    if isinstance(restriction, str):
        return _masks_of(model, restriction)
    if not isinstance(restriction, Sequence) or not all(isinstance(r, str) for r in restriction):
        raise TypeError(f"restriction must be a string or a list of strings; got {restriction!r}")
    if not restriction:
        raise ValueError(f"the list of restrictions is empty; name some of {PATTERNS}")
    if len(restriction) > 1 and any(_plain(r) == "full" for r in restriction):
        raise ValueError(
            "'full' is everything and cannot be combined with other restrictions; use it alone"
        )
    return _union([_masks_of(model, part) for part in restriction])


def all_layers(model: nn.Module, part: str = "") -> dict[str, ParamMasks]:
    """Make the restrictions to each layer, or to a part ("attn" or "mlp") of each.

    Returns
    -------
    dict of str to masks
        "l0", "l1", ... (or "l0 attn", ...) for ``susceptibilities(weight_restrictions=...)``;
        layers without such a part are left out.
    """
    names = [f"l{number} {part}".strip() for number in range(len(structure_of(model).layers))]
    return {name: masks for name in names if (masks := _masks_of(model, name, empty_is_fine=True))}


def all_heads(model: nn.Module) -> dict[str, ParamMasks]:
    """Make the restrictions to each attention head, "l0h0", "l0h1", ... layer by layer.

    Layers without attention are left out; one whose heads are not understood raises
    ``UnknownStructureError``.
    """
    found = {}
    for number, layer in enumerate(structure_of(model).layers):
        if layer.unknown:
            raise UnknownStructureError(layer.unknown)
        for head in range(layer.num_heads):
            found[f"l{number}h{head}"] = _masks_of(model, f"l{number}h{head}")
    return found


def structure_of(model: nn.Module) -> ModelStructure:
    """Find a model's structure, once per model, and again when its parameters are others."""
    parameters = tuple((name, tuple(p.shape)) for name, p in model.named_parameters())
    found = _structures.get(model)
    if found is None or found[0] != parameters:
        found = _structures[model] = (parameters, find_structure(model))
    return found[1]


_structures: WeakKeyDictionary[nn.Module, tuple[object, ModelStructure]] = WeakKeyDictionary()


def _masks_of(model: nn.Module, restriction: str, empty_is_fine: bool = False) -> ParamMasks:
    model = uncompiled(model)
    if restriction.strip() in dict(model.named_parameters()):
        return {restriction.strip(): None}
    wanted = _plain(restriction)
    if wanted == "full":
        return dict.fromkeys(used_parameters(model))
    match = re.fullmatch(r"(embed|unembed)|l(\d+)(?:(h|g)(\d+)|(attn|mlp))?", wanted)
    if match is None:
        tied = first_name(model, restriction.strip())
        if tied is not None:
            raise ValueError(
                f"{restriction!r} is tied to {tied!r}: one tensor, which goes by its first name; "
                f"use {tied!r}"
            )
        names = [name for name, _ in model.named_parameters()]
        near = difflib.get_close_matches(restriction, names, n=2)
        hint = f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""
        raise ValueError(
            f"unknown restriction {restriction!r}; valid are {PATTERNS}, or the name of a "
            f"parameter{hint}"
        )
    structure = structure_of(model)
    edge, number, kind, index, part = match.groups()
    if edge:
        of_edge = {"embed": structure.embed, "unembed": structure.unembed}
        masks: ParamMasks = dict.fromkeys(of_edge[edge])
    else:
        layer = _layer(structure, int(number), restriction)
        if kind:
            masks = _head_masks(model, layer, kind, int(index), restriction)
        else:
            of_part = {"attn": layer.attention, "mlp": layer.mlp, None: layer.parameters}
            masks = dict.fromkeys(of_part[part])
    if not masks and not empty_is_fine:
        raise ValueError(
            f"{restriction!r} selects nothing: {type(model).__name__} has no such part there"
        )
    return masks


def _plain(restriction: str) -> str:
    return re.sub(r"[\s_]+", "", restriction.lower())


def _layer(structure: ModelStructure, number: int, restriction: str) -> Layer:
    count = len(structure.layers)
    if number >= count:
        raise ValueError(
            f"{restriction!r}: layer {number} is out of range, the model has layers 0 to "
            f"{count - 1}"
        )
    return structure.layers[number]


def _head_masks(
    model: nn.Module, layer: Layer, kind: str, index: int, restriction: str
) -> ParamMasks:
    word, count = ("head", layer.num_heads) if kind == "h" else ("group", layer.num_groups)
    if layer.unknown:
        raise UnknownStructureError(f"{restriction!r}: {layer.unknown}")
    if count == 0:
        raise ValueError(f"{restriction!r}: this layer has no attention heads")
    if index >= count:
        raise ValueError(
            f"{restriction!r}: {word} {index} is out of range, the layer has {word}s 0 to "
            f"{count - 1}"
        )
    masks: ParamMasks = {}
    for name, slices in layer.heads.items():
        if kind == "g":
            chosen = slices.group == index
        else:
            group = index * layer.num_groups // layer.num_heads
            chosen = (slices.head == index) | ((slices.head < 0) & (slices.group == group))
        masks[name] = _spread(chosen, slices.axis, model.get_parameter(name))
    return masks


def _spread(chosen: np.ndarray, axis: int, parameter: Tensor) -> Tensor:
    """A mask of whole rows or columns, as a view of one byte for each."""
    axis = 0 if parameter.ndim == 1 else axis
    assert len(chosen) == parameter.shape[axis], (len(chosen), parameter.shape, axis)
    shape = [1] * parameter.ndim
    shape[axis] = -1
    return torch.from_numpy(chosen.copy()).view(shape).expand(parameter.shape)


def _union(parts: list[ParamMasks]) -> ParamMasks:
    """Join masks; parameters in the order in which they first appear."""
    joined: ParamMasks = {}
    for masks in parts:
        for name, mask in masks.items():
            other = joined.get(name, mask)
            if mask is None or other is None:
                joined[name] = None
            else:
                joined[name] = mask if name not in joined else _either(other, mask)
    return joined


def _either(a: Tensor, b: Tensor) -> Tensor:
    """Elementwise or, on as few elements as both views have."""
    if a.stride() == b.stride():
        first = tuple(slice(1) if stride == 0 else slice(None) for stride in a.stride())
        return (a[first] | b[first]).expand(a.shape)
    return a | b
