"""Interventions: change an activation on its way through the model.

Intervention("zero", "head_out_L3H5")
Intervention("mean", "mlp_out_2", positions=[-1])
Intervention("patch", "resid_out_4", positions=[5, 6], source=0)
Intervention("zero", "queries_L3H5", positions="last")
Intervention("knockout", "attn_pattern_3", positions="last", key_positions=[0, 1])
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from basinscope.models.knockout import Knockout, cuts_of, knocked_out, require_obeyed
from basinscope.models.positions import Positions, described, plain, resolve_positions
from basinscope.models.sites import Site, Sites, by_example
from basinscope.models.stream import PROBE_TOKENS, changing_input, first_tensor

KINDS = ("zero", "mean", "patch", "knockout")
_TARGET = re.compile(
    r"embed"
    r"|(resid_in|resid_out|attn_in|attn_out|mlp_out|queries|keys|values|attn_pattern)_(?P<of>\d+)"
    r"|(?P<kind>head_out|queries|keys|values|attn_pattern)_L(?P<layer>\d+)H(?P<head>\d+)"
)


@dataclass(frozen=True)
class Intervention:
    """Replace an activation at some positions, or keep them from attending to others.

    Attributes
    ----------
    kind : {"zero", "mean", "patch", "knockout"}
        By zeros, by its mean over the examples of the batch at the same position, or by `source`.
        A knockout takes `key_positions` away from those that `positions` attend to; the softmax
        shares their probability among the keys that are left.
    target : str
        ``embed``, ``resid_in_{i}``, ``resid_out_{i}``, ``attn_in_{i}``, ``attn_out_{i}``,
        ``mlp_out_{i}``, ``queries_{i}``, ``keys_{i}``, ``values_{i}``; of the last three one head,
        ``queries_L{i}H{j}``; or one head's share of the attention output, ``head_out_L{i}H{j}``.
        For "knockout": ``attn_pattern_{i}``, or of one query head, ``attn_pattern_L{i}H{j}``.
    positions : "all", "last", int, slice, or a list of these
    source : int or Tensor, optional
        For "patch": which example of the same batch every other one takes the activation from, or
        (not for ``head_out``) the activation itself as a cache of another run holds it, also
        without its axis of examples, or without that of positions too.
    key_positions : "all", "last", int, slice, or a list of these, optional
        For "knockout": tokens that those at `positions` may not attend to. Each must be left one
        that it attends to.
    """

    kind: Literal["zero", "mean", "patch", "knockout"]
    target: str
    positions: Positions = "all"
    source: int | Tensor | None = None
    key_positions: Positions | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r}: choose one of {', '.join(KINDS)}")
        match = _TARGET.fullmatch(self.target) if isinstance(self.target, str) else None
        if match is None:
            raise ValueError(
                f"target={self.target!r}: it can be embed, resid_in_0, resid_out_0, attn_in_0, "
                "attn_out_0, mlp_out_0, queries_0, keys_0, values_0, queries_L0H0, keys_L0H0, "
                "values_L0H0 or head_out_L0H0, with numbers of your layers and heads; for "
                "'knockout' attn_pattern_0 or attn_pattern_L0H0"
            )
        self._check_keys()
        if self.kind == "patch" and self.source is None:
            raise ValueError(
                "'patch' needs source=...: an example's number, or a torch.Tensor to put there"
            )
        if self.kind != "patch" and self.source is not None:
            raise ValueError(f"{self.kind!r} takes no source: leave it out, or give 'patch'")
        self._check_source()
        if match["kind"] == "head_out" and isinstance(self.source, Tensor):
            raise ValueError(
                f"{self.target!r} can be patched from another example of its batch only: "
                "source=its number"
            )

    def _check_keys(self) -> None:
        """Have a knockout be of attention and say which keys, and nothing else do either."""
        if (self.kind == "knockout") != self.target.startswith("attn_pattern_"):
            raise ValueError(
                f"{self.kind!r} of {self.target!r}: attn_pattern_0 or attn_pattern_L0H0 can be "
                "knocked out, Intervention('knockout', ..., key_positions=...), and nothing else"
            )
        if (self.kind == "knockout") != (self.key_positions is not None):
            raise ValueError(
                f"{self.kind!r} takes no key_positions: leave them out"
                if self.kind != "knockout"
                else "'knockout' needs key_positions=...: tokens not to attend to, such as [0, 1]"
            )

    def _check_source(self) -> None:
        """Make an example's number Python's own, also one that stands in a tensor."""
        source: Any = self.source
        if source is None or (isinstance(source, Tensor) and source.ndim):
            return
        if type(plain(source)) is not int:
            raise ValueError(
                f"source={source!r}: give an example's number (int), or a torch.Tensor of shape "
                "(d_model), (position, d_model) or (example, position, d_model)"
            )
        object.__setattr__(self, "source", plain(source))

    def to_dict(self) -> dict[str, Any]:
        """Describe it for a store's metadata; a tensor by its shape and a digest."""
        source: Any = self.source
        if isinstance(source, Tensor):
            numbers = source.detach().cpu().double().contiguous().numpy()
            digest = hashlib.sha256(numbers.tobytes()).hexdigest()[:16]
            source = {"shape": list(source.shape), "sha256": digest}
        whole = {
            "kind": self.kind,
            "target": self.target,
            "positions": described(self.positions),
            "source": source,
        }
        if self.key_positions is not None:
            whole["key_positions"] = described(self.key_positions)
        return whole


@contextmanager
def intervened(
    model: nn.Module, sites: Sites, interventions: Sequence[Intervention], length: int
) -> Iterator[None]:
    """Apply interventions to the forward passes inside the block.

    Raises
    ------
    ValueError
        If the model has no such layer, head or activation, or a position is out of range.
    """
    with ExitStack() as hooks:
        hooks.enter_context(knocked_out(model, sites, _knockouts(interventions), length))
        for intervention in interventions:
            if intervention.kind == "knockout":
                continue
            site, head = _site_of(sites, intervention)
            change = _changing(intervention, site, head, length)
            module = model.get_submodule(site.module)
            if site.part == "input":
                handle = module.register_forward_pre_hook(changing_input(change), with_kwargs=True)
            else:
                handle = module.register_forward_hook(_on_output(change))
            hooks.callback(handle.remove)
        yield


def require_possible(model: nn.Module, sites: Sites, interventions: Sequence[Intervention]) -> None:
    """Refuse knockouts that the model would not go by; tries them on a few tokens.

    Queries are zero meanwhile, where they are known, so that every head attends to all tokens.

    Raises
    ------
    ValueError
        Says which model, which layer, and why.
    """
    knockouts = _knockouts(interventions)
    queries = sorted({f"queries_{knockout.layer}" for knockout in knockouts} & set(sites.plain))
    even = [Intervention("zero", name) for name in queries]
    with intervened(model, sites, even, PROBE_TOKENS):
        require_obeyed(model, sites, knockouts)


def require_keys(interventions: Sequence[Intervention], lengths: Iterable[int]) -> None:
    """Refuse knockouts that do not fit sequences of all these lengths: see :func:`cuts_of`."""
    for length in lengths:
        cuts_of(_knockouts(interventions), length)


def _knockouts(interventions: Sequence[Intervention]) -> list[Knockout]:
    found = []
    for given in interventions:
        if given.kind == "knockout":
            match = _TARGET.fullmatch(given.target)
            assert match is not None
            assert given.key_positions is not None
            head = int(match["head"]) if match["head"] else None
            layer = int(match["of"] or match["layer"])
            found.append(Knockout(given.target, layer, head, given.positions, given.key_positions))
    return found


def _site_of(sites: Sites, intervention: Intervention) -> tuple[Site, int | None]:
    match = _TARGET.fullmatch(intervention.target)
    assert match is not None
    number = match["of"] or match["layer"]
    if number and int(number) >= len(sites.layers):
        raise ValueError(
            f"{intervention.target!r}: the model has layers 0 to {len(sites.layers) - 1}"
        )
    name = f"{match['kind']}_{number}" if match["head"] else intervention.target
    if match["kind"] == "head_out" and int(number) in sites.heads:
        site = sites.heads[int(number)].passed
    elif name in sites.plain:
        site = sites.plain[name]
    else:
        why = sites.missing.get(name, "this model has no such activation")
        raise ValueError(f"{intervention.target!r}: {why}")
    head = int(match["head"]) if match["head"] else None
    if head is not None and head >= site.heads:
        raise ValueError(f"{intervention.target!r}: the layer has heads 0 to {site.heads - 1}")
    return site, head


def _changing(
    intervention: Intervention, site: Site, head: int | None, length: int
) -> Callable[[Tensor], Tensor]:
    """Make the function from an activation to what it is replaced by."""
    positions = resolve_positions(intervention.positions, length)
    rows = slice(None) if site.rows is None else site.rows

    def change(whole: Tensor) -> Tensor:
        changed = by_example(whole, length).clone()
        now = changed[:, positions]
        part = now[..., rows].clone()
        shape = part.shape
        if site.heads and part.ndim == 3:
            part = part.unflatten(-1, (site.heads, -1))
        if head is None:
            part = _replacement(intervention, part, site.scale)
        else:
            part[..., head, :] = _replacement(intervention, part[..., head, :].clone(), site.scale)
        now[..., rows] = part.reshape(shape)
        changed[:, positions] = now
        return changed.view_as(whole)

    return change


def _replacement(intervention: Intervention, now: Tensor, scale: float) -> Tensor:
    """What stands at the positions after it, (example, position, width)."""
    if intervention.kind == "zero":
        return torch.zeros_like(now)
    if intervention.kind == "mean":
        return now.mean(0, keepdim=True).expand_as(now)
    source = intervention.source
    if isinstance(source, Tensor):
        shape, whole = tuple(source.shape), tuple(now.shape)
        if shape not in (whole[2:], whole[1:], whole, (1, *whole[1:])):
            raise ValueError(
                f"the source of {intervention.target!r} has shape {shape}: give {whole[2:]}, one "
                f"for each position {whole[1:]}, or for each example too {whole}"
            )
        return (source.to(now) / scale).expand_as(now)
    assert source is not None
    if not -len(now) <= source < len(now):
        raise ValueError(f"source={source}: the batch has examples 0 to {len(now) - 1}")
    return now[source].expand_as(now)


def _on_output(change: Callable[[Tensor], Tensor]) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = first_tensor(output)
        assert hidden is not None
        if isinstance(output, tuple | list):
            return (change(hidden), *output[1:])
        return change(hidden)

    return hook
