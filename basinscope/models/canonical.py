"""One name for each linear map of a model's layers, whatever the model calls its modules.

``0.attn.q``, ``.k``, ``.v`` and ``.o``; ``0.mlp.up`` and ``.down``; ``0.glu.gate``, ``.up`` and
``.down``. What a row of a projection is for is found by trying, on made-up numbers, so that fused
and interleaved projections need no table:

- at the first position attention has one key to choose: only values reach its output;
- the last position reads keys, and values, of those before it, but never a query of theirs;
- queries are what else attention reads, at any position: at one, 16 bits may cancel to zero;
- the product of a gate and an up projection is straight in the latter, bent in the former.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from basinscope.models.forward import uncompiled
from basinscope.models.structure import (
    Seen,
    UnknownStructureError,
    attention_modules,
    layer_modules,
    probe,
    projections_of,
    reason_of,
    require_module,
)

NOISE = 1e-3  # of the largest gradient: below it a gradient is rounding

Rows = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Part = tuple[str, Mask]
"""A module, and which of its rows."""


@dataclass(frozen=True)
class LinearMap:
    """A module's weight, or some of its rows.

    Attributes
    ----------
    module : str
        The module's name in the model.
    rows : ndarray (d_out,) or None
        Which of the module's output features; None for all.
    transposed : bool
        Whether the module keeps its weight as (d_in, d_out).
    """

    module: str
    rows: Rows | None = None
    transposed: bool = False


@torch.inference_mode(mode=False)
@torch.enable_grad()
def canonical_maps(model: nn.Module) -> dict[str, LinearMap]:
    """Name the linear maps inside a model's layers.

    What has no role in a softmax attention or in a plain or gated MLP has no name here:
    cross-attention, experts, low-rank queries, attention with sinks but for its output.

    Parameters
    ----------
    model : nn.Module
        It runs once, on a few tokens.

    Returns
    -------
    dict of str to LinearMap
        In the order of the layers, attention first.

    Raises
    ------
    UnknownStructureError
        If the model has no one list of layers, cannot be run, or if nothing in it has a name.
    """
    require_module(model)
    model = uncompiled(model)
    try:
        layers, attention = layer_modules(model), attention_modules(model)
        probes = probe(model, [[name] for name in layers])
    except UnknownStructureError as error:
        raise UnknownStructureError(
            f"the linear maps of {type(model).__name__} cannot be named: {reason_of(error)}"
        ) from error
    maps = {
        f"{number}.{role}": found
        for number, seen in enumerate(probes)
        for role, found in _maps_of_layer(model, attention[number], seen).items()
    }
    if not maps:
        raise UnknownStructureError(
            f"none of the layers of {type(model).__name__} ({layers[0]} and so on) has a linear "
            "map whose role in attention or MLP could be seen"
        )
    return maps


def weight_of(model: nn.Module, linear: LinearMap) -> Tensor:
    """Give the weight W of a map, out = in W^T + b.

    Returns
    -------
    Tensor (d_out, d_in)
        Without a gradient; a view where the rows are all of a module's.
    """
    module: Any = uncompiled(model).get_submodule(linear.module)
    weight: Tensor = module.weight.detach()
    weight = weight.T if linear.transposed else weight
    return weight if linear.rows is None else weight[torch.from_numpy(linear.rows)]


def _maps_of_layer(model: nn.Module, attention: list[str], seen: Seen) -> dict[str, LinearMap]:
    projections = projections_of(model, attention)
    attending = [name for name in seen.outputs if name in projections]
    others = [name for name in seen.outputs if name not in projections]
    found = {}
    for role, (name, rows) in {
        **_attention_roles(seen, attending),
        **_mlp_roles(seen, others),
    }.items():
        transposed = _is_transposed(model.get_submodule(name), seen.inputs[name])
        if transposed is not None:
            found[role] = LinearMap(name, None if rows.all() else np.flatnonzero(rows), transposed)
    return found


@torch.no_grad()
def _is_transposed(module: Any, given: Tensor) -> bool | None:
    """Whether a module makes x W + b of an x, not x W^T + b; None if it makes neither."""
    x = given.detach()
    made = module.forward(x)
    bias = getattr(module, "bias", None)
    largest = float(made.nan_to_num(0.0, 0.0, 0.0).abs().max())  # weights may be infinite
    close = 16 * torch.finfo(x.dtype).eps * x.shape[-1] ** 0.5 * largest
    for transposed, matrix in ((False, module.weight.T), (True, module.weight)):
        if matrix.is_floating_point() and matrix.shape == (x.shape[-1], made.shape[-1]):
            product = x @ matrix if bias is None else x @ matrix + bias
            if not bool(((product - made).abs() > close).any()):
                return transposed
    return None


def _attention_roles(seen: Seen, names: list[str]) -> dict[str, Part]:
    if len(names) < 2:
        return {}
    *before, last = names  # the last to run is the output projection
    passed = seen.inputs[last].reshape(-1, seen.inputs[last].shape[-1])  # (position, width)
    if not passed.requires_grad:
        return {}
    outputs = {name: seen.outputs[name] for name in before}
    of_first, of_last = _gradients(passed[0], outputs), _gradients(passed[-1], outputs)
    of_all = _gradients(passed, outputs)
    largest = max(float(gradient[0].abs().max()) for gradient in of_first.values())
    players: dict[str, list[Part]] = {"attn.q": [], "attn.k": [], "attn.v": []}
    for name in outputs:
        value = of_first[name][0].abs() > NOISE * largest
        key = (of_last[name][:-1] != 0).any(0) & ~value
        query = (of_all[name] != 0).any(0) & ~key & ~value
        for role, rows in (("attn.q", query), ("attn.k", key), ("attn.v", value)):
            if rows.any():
                players[role].append((name, rows.cpu().numpy()))
    output = {"attn.o": _whole(seen, last)}
    if any(len(parts) != 1 for parts in players.values()):
        return output
    roles = {role: parts[0] for role, parts in players.items()}
    queries, keys, values = (int(rows.sum()) for _, rows in roles.values())
    if keys != values or queries % keys:
        return output  # no softmax over keys: what was seen has another meaning
    return {**roles, **output}


def _gradients(passed: Tensor, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients (position, feature) of numbers that some positions pass on."""
    upstream = torch.linspace(1, 2, passed.numel()).to(passed).view(passed.shape)
    gradients = torch.autograd.grad(
        passed, list(outputs.values()), upstream, retain_graph=True, materialize_grads=True
    )
    return {
        name: gradient.reshape(-1, gradient.shape[-1])
        for name, gradient in zip(outputs, gradients, strict=True)
    }


def _mlp_roles(seen: Seen, names: list[str]) -> dict[str, Part]:
    """An up and a down projection, or a gate, an up and a down one; else none."""
    if len(names) not in (2, 3):
        return {}
    *before, last = names
    hidden, outputs = seen.inputs[last], {name: seen.outputs[name] for name in before}
    if not hidden.requires_grad:
        return {}
    if not all(bool(gradient.any()) for gradient in _gradients(hidden, outputs).values()):
        return {}
    down, width = _whole(seen, last), hidden.shape[-1]
    widths = [output.shape[-1] for output in outputs.values()]
    if widths == [width]:
        return {"mlp.up": _whole(seen, before[0]), "mlp.down": down}
    if widths not in ([2 * width], [width, width]):
        return {}
    pair = _gate_and_up(seen, before, last)
    return {"glu.gate": pair[0], "glu.up": pair[1], "glu.down": down} if pair else {}


def _gate_and_up(seen: Seen, before: list[str], last: str) -> tuple[Part, Part] | None:
    """Tell the two factors apart: what is straight is not the gate.

    Rows of one module are tried as halves and as pairs.
    """
    if len(before) == 2:
        pairs = [(_whole(seen, before[0]), _whole(seen, before[1]))]
    else:
        place = np.arange(seen.outputs[before[0]].shape[-1])
        splits = (place < len(place) // 2, place % 2 == 0)
        pairs = [((before[0], part), (before[0], ~part)) for part in splits]
    for first, second in pairs:
        straight = _is_straight(seen, last, first), _is_straight(seen, last, second)
        if straight == (False, True):
            return first, second
        if straight == (True, False):
            return second, first
    named = ["gate" in name.rpartition(".")[2] for name in before]
    if named in ([True, False], [False, True]):  # no second derivative shows where ReLU bends
        first, second = pairs[0]
        return (first, second) if named[0] else (second, first)
    return None


def _is_straight(seen: Seen, last: str, part: Part) -> bool:
    """Whether what the last module is given is linear in these rows of another's output."""
    name, rows = part
    output, product = seen.outputs[name], seen.inputs[last]
    upstream = torch.linspace(1, 2, product.numel()).to(product).view(product.shape)
    chosen = torch.from_numpy(rows).to(output.device)
    (slope,) = torch.autograd.grad(
        product, output, upstream, create_graph=True, materialize_grads=True
    )
    if not slope.requires_grad:
        return True
    (bend,) = torch.autograd.grad(
        slope[..., chosen].sum(), output, retain_graph=True, materialize_grads=True
    )
    return not bool(bend[..., chosen].any())


def _whole(seen: Seen, name: str) -> Part:
    """All rows of a module."""
    return name, np.ones(seen.outputs[name].shape[-1], dtype=np.bool_)
