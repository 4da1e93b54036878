"""A model's linear maps as sums of components, and its forward pass cut at them.

A map out = in W^T + b is written as activations = in V, out = activations U + b + in R: component c
reads the direction V[:, c] and writes U[c]. What V U leaves of W^T is the remainder R.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from basinscope.models.canonical import LinearMap, canonical_maps, weight_of
from basinscope.models.forward import replaced_forward
from basinscope.models.structure import UnknownStructureError

ROUNDING = 64  # epsilons of W's norm: a smaller remainder is rounding

Kind = Literal["neurons", "singular", "given", "output"]


@dataclass(frozen=True)
class Components:
    """The components of one linear map.

    Attributes
    ----------
    name : str
        Canonical name of the map.
    linear : LinearMap
        The module, and which of its rows are meant.
    size : int
        C, the number of components.
    V : Tensor (d_in, C) or None
        What each reads, float32 or float64; None where component c is input feature c.
    U : Tensor (C, d_out) or None
        What each writes; None where component c is output feature c.
    kind : {"neurons", "singular", "given", "output"}
    """

    name: str
    linear: LinearMap
    size: int
    V: Tensor | None
    U: Tensor | None
    kind: Kind

    def activations(self, given: Tensor) -> Tensor:
        """Activations (..., C) of what the map is given, (..., d_in), in at least float32."""
        if self.V is None:
            return _precise(given)
        return given.to(self.V.dtype) @ self.V

    def slopes(self, gradient: Tensor, columns: Tensor | None = None) -> Tensor:
        """Gradients (..., C) of activations from those of the map's output, (..., d_out).

        Of the components in ``columns`` only, if given.
        """
        if self.U is None:
            return gradient if columns is None else gradient[..., columns]
        writes = self.U if columns is None else self.U[columns]
        return gradient.to(writes.dtype) @ writes.T


def neurons(model: nn.Module, layers: Iterable[str] | None = None) -> dict[str, Components]:
    """Take output neurons as components: component c of a map is its output feature c.

    Parameters
    ----------
    model : nn.Module
    layers : iterable of str, optional
        Canonical names, such as ``0.mlp.up``. Default: all that the model has.

    Raises
    ------
    ValueError
        If a layer does not exist; lists those that do.
    UnknownStructureError
        If the model's maps cannot be named.
    """
    found = {}
    for name, linear in _chosen_maps(model, layers).items():
        weight = _precise(weight_of(model, linear))
        found[name] = Components(name, linear, weight.shape[0], weight.T, None, "neurons")
    return found


def singular_directions(
    model: nn.Module, rank: int | None = None, layers: Iterable[str] | None = None
) -> dict[str, Components]:
    """Take singular directions as components, largest singular value first.

    Of W = Σ s_c u_c v_c^T component c reads s_c v_c and writes u_c, so that its activation is the
    length of what it writes. Of u_c and -u_c that is taken whose largest entry is positive.

    Parameters
    ----------
    model : nn.Module
    rank : int, optional
        Most components of a map; the rest of the map is its remainder. Default: all.
    layers : iterable of str, optional
        Canonical names. Default: all that the model has.

    Raises
    ------
    ValueError
        If ``rank`` is no positive number, or a layer does not exist; lists those that do.
    UnknownStructureError
        If the model's maps cannot be named.
    """
    whole = isinstance(rank, int | np.integer) and not isinstance(rank, bool)
    if rank is not None and (not whole or rank < 1):
        raise ValueError(f"rank={rank!r} must be a whole number of at least 1, or None for all")
    found = {}
    for name, linear in _chosen_maps(model, layers).items():
        left, values, right = torch.linalg.svd(
            _precise(weight_of(model, linear)), full_matrices=False
        )
        left, values, right = left[:, :rank], values[:rank], right[:rank]
        largest = left.gather(0, left.abs().argmax(0, keepdim=True))
        sign = torch.where(largest < 0, -1.0, 1.0).to(left)
        reads, writes = (right.T * values * sign).contiguous(), (left * sign).T.contiguous()
        found[name] = Components(name, linear, len(values), reads, writes, "singular")
    return found


def rank_one_factors(
    model: nn.Module, factors: Mapping[str, tuple[Tensor | np.ndarray, Tensor | np.ndarray]]
) -> dict[str, Components]:
    """Take given rank-one factors as components.

    Parameters
    ----------
    model : nn.Module
    factors : mapping of str to (V, U)
        By canonical name: V (d_in, C) and U (C, d_out). V U need not be all of the map: what it
        leaves is the remainder.

    Raises
    ------
    ValueError
        If a layer does not exist, or if factors do not fit it; says what would.
    UnknownStructureError
        If the model's maps cannot be named.
    """
    found = {}
    for name, linear in _chosen_maps(model, factors).items():
        weight = _precise(weight_of(model, linear))
        V, U = (torch.as_tensor(part).detach().to(weight) for part in factors[name])
        d_out, d_in = weight.shape
        if V.ndim != 2 or U.ndim != 2 or V.shape[1] != U.shape[0] or not V.shape[1]:
            raise ValueError(
                f"the factors of {name} have shapes {tuple(V.shape)} and {tuple(U.shape)}: V must "
                f"be ({d_in}, C) and U (C, {d_out}), with one C of at least 1"
            )
        if (V.shape[0], U.shape[1]) != (d_in, d_out):
            raise ValueError(
                f"the factors of {name} have shapes {tuple(V.shape)} and {tuple(U.shape)}, and "
                f"{linear.module} maps {d_in} to {d_out} numbers there: V must be ({d_in}, C) and "
                f"U (C, {d_out})"
            )
        if not (torch.isfinite(V).all() and torch.isfinite(U).all()):
            raise ValueError(f"the factors of {name} hold numbers that are not finite")
        found[name] = Components(name, linear, V.shape[1], V, U, "given")
    return found


def _chosen_maps(model: nn.Module, layers: Iterable[str] | None) -> dict[str, LinearMap]:
    maps = canonical_maps(model)
    if layers is None:
        return maps
    chosen = [layers] if isinstance(layers, str) else list(layers)
    if unknown := [name for name in chosen if name not in maps]:
        raise ValueError(
            f"{type(model).__name__} has no {', '.join(map(str, unknown))}; it has "
            f"{', '.join(maps)}"
        )
    return {name: linear for name, linear in maps.items() if name in chosen}


def _precise(values: Tensor) -> Tensor:
    """Values in at least float32."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


@dataclass
class Cut:
    """What one forward pass left at the modules where it was cut.

    Attributes
    ----------
    inputs : dict of str to Tensor (..., d_in)
        By module: what it was given, as it depends on the leaves before.
    leaves : dict of str to Tensor (..., d_out)
        By module: what it made, as the leaf that all after it depends on.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    leaves: dict[str, Tensor] = field(default_factory=dict)


class Decomposition:
    """A model whose forward pass can be cut at components.

    Parameters
    ----------
    model : nn.Module
    components : mapping of str to Components
        By canonical name.

    Raises
    ------
    ValueError
        If components were made for another model.
    """

    def __init__(self, model: nn.Module, components: Mapping[str, Components]) -> None:
        self.model = model
        self.components = dict(components)
        by_module: dict[str, list[Components]] = {}
        for part in self.components.values():
            by_module.setdefault(part.linear.module, []).append(part)
        self.remainders = {m: _remainder(model, parts) for m, parts in by_module.items()}

    @contextmanager
    def cut(self) -> Iterator[Cut]:
        """Cut the one forward pass that is made inside the block.

        Its numbers are the model's own. A module's output is a leaf for what comes after; only the
        remainder lets gradients through to what comes before.

        Raises
        ------
        UnknownStructureError
            If a module runs a second time.
        """
        record = Cut()
        with ExitStack() as replaced:
            for name, remainder in self.remainders.items():
                module = self.model.get_submodule(name)
                replaced.enter_context(cut_at(module, name, record, remainder))
            yield record


@contextmanager
def cut_at(
    module: nn.Module, name: str, record: Cut, remainder: Tensor | None = None
) -> Iterator[None]:
    """Make a module's output a leaf, but for ``remainder`` (d_in, d_out) of its map."""
    own = module.forward

    def forward(given: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if name in record.leaves:
            raise UnknownStructureError(
                f"{name} runs more than once in a forward pass: its components have no one "
                "activation per token. Leave it out"
            )
        with torch.no_grad():
            made = own(given, *args, **kwargs)
        leaf = made.detach().requires_grad_()
        record.inputs[name], record.leaves[name] = given.clone(), leaf
        if remainder is None:
            return leaf.clone()  # models may write into it
        passed = given @ remainder
        return leaf + (passed - passed.detach())

    with replaced_forward(module, forward):
        yield


def _remainder(model: nn.Module, parts: list[Components]) -> Tensor | None:
    """What components leave of a module's W^T, (d_in, d_out); None where that is nothing."""
    linear = parts[0].linear
    whole = weight_of(model, LinearMap(linear.module, None, linear.transposed))
    rest = _precise(whole).T.clone()
    for part in parts:
        rows: Any = slice(None) if part.linear.rows is None else torch.from_numpy(part.linear.rows)
        own = rest[:, rows]
        made = part.U if part.V is None else part.V if part.U is None else part.V @ part.U
        if made is None or made.shape != own.shape:
            raise ValueError(
                f"the components of {part.name} make a map of shape "
                f"{None if made is None else tuple(made.shape)}, and that of this model's "
                f"{linear.module} has {tuple(own.shape)}: make them from this model"
            )
        left = own - made
        close = ROUNDING * torch.finfo(left.dtype).eps * own.norm()
        rest[:, rows] = left if left.norm() > close else 0.0
    return rest.to(whole.dtype) if rest.any() else None
