"""Interventions: change an activation on its way through the model.

Intervention("zero", "head_out_L3H5")
Intervention("mean", "mlp_out_2", positions=[-1])
Intervention("patch", "resid_out_4", positions=[5, 6], source=0)
Intervention("add", "resid_out_4", source=direction)
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

from basinscope.models.following import followed
from basinscope.models.forward import inside_bridge, uncompiled
from basinscope.models.knockout import Knockout, cuts_of, knocked_out, require_obeyed
from basinscope.models.passes import Passes, untouched
from basinscope.models.positions import Positions, Span, described, plain
from basinscope.models.shares import Added, change_shares
from basinscope.models.sites import Site, Sites, by_example, find_sites
from basinscope.models.stream import PROBE_TOKENS, changing_input, first_tensor
from basinscope.models.structure import require_module

KINDS = ("zero", "mean", "patch", "add", "knockout")
_TARGET = re.compile(
    r"embed"
    r"|(resid_in|resid_out|attn_in|attn_out|mlp_out|queries|keys|values|attn_pattern)_(?P<of>\d+)"
    r"|(?P<kind>head_out|queries|keys|values|attn_pattern)_L(?P<layer>\d+)H(?P<head>\d+)"
)


@dataclass(frozen=True)
class Intervention:
    """Change an activation at some positions, or keep them from attending to others.

    Attributes
    ----------
    kind : {"zero", "mean", "patch", "add", "knockout"}
        Replace it by zeros, by its mean over the examples of the batch at the same position, or by
        `source`; or add `source` to it, as steering vectors are. A knockout takes `key_positions`
        away from those that `positions` attend to; the softmax shares their probability among the
        keys that are left.
    target : str
        ``embed``, ``resid_in_{i}``, ``resid_out_{i}``, ``attn_in_{i}``, ``attn_out_{i}``,
        ``mlp_out_{i}``, ``queries_{i}``, ``keys_{i}``, ``values_{i}``; of the last three one head,
        ``queries_L{i}H{j}``; or one head's share of the attention output, ``head_out_L{i}H{j}``.
        For "knockout": ``attn_pattern_{i}``, or of one query head, ``attn_pattern_L{i}H{j}``.
    positions : "all", "last", int, slice, or a list of these
    source : int or Tensor, optional
        For "patch": which example of the same batch every other one takes the activation from, or
        the activation itself as a cache of another run holds it, also without its axis of examples,
        or without that of positions too. For "add": such a tensor.
    key_positions : "all", "last", int, slice, or a list of these, optional
        For "knockout": tokens that those at `positions` may not attend to. Each must be left one
        that it attends to.
    """

    kind: Literal["zero", "mean", "patch", "add", "knockout"]
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
        if self.kind not in ("patch", "add") and self.source is not None:
            raise ValueError(
                f"{self.kind!r} takes no source: leave it out, or give 'patch' or 'add'"
            )
        self._check_source()
        if self.kind == "add" and not isinstance(self.source, Tensor):
            raise ValueError(
                f"'add' adds a torch.Tensor, and source={self.source!r} is none: give one of shape "
                "(d_model), (position, d_model) or (example, position, d_model)"
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
def intervened(model: nn.Module, interventions: Sequence[Intervention]) -> Iterator[None]:
    """Apply interventions to whatever the model runs inside the block, ``generate`` too.

    Positions are those of the prompt: what ``generate`` is given, or the tokens of a pass without
    a cache, or with an empty one, which begins a sequence. A pass with a filled cache goes on with
    its sequence; ``generate`` with one counts in the whole sequence, cache and all. "last" and
    negative numbers count from the prompt's end; "all" and slices without a stop go on over the
    tokens that follow it, so that ``slice(n, None)``, for a prompt of n tokens, is what is
    generated. "mean", and "patch" from an example, work on the batch of each pass.

    Parameters
    ----------
    model : nn.Module
        A Hugging Face causal LM or a TransformerLens model. Its mode (``train``, ``eval``) and
        gradients are left to you.
    interventions : sequence of Intervention
        Applied in order. Blocks inside one another add up; they are left in the other order.

    Raises
    ------
    TypeError
        If the model or an intervention is something else.
    ValueError
        At once, if the model has no such layer, head or activation, or would not go by a knockout.
        In a pass: before it runs, if a position is out of range, prompts are padded, or a cache was
        filled outside of the block or does not count its tokens; while it runs, if a source has
        another shape, or has positions and is to stand at a token that was generated.
    RuntimeError
        When the block is left before one that was entered inside it.

    Notes
    -----
    One thread at a time may run the model. With gradient checkpointing ``backward`` must run inside
    the block.
    """
    interventions = listed(interventions)
    require_module(model)
    if uncompiled(model) is not model:
        raise ValueError(
            "the model is one from torch.compile, which passes interventions by: give, and run, "
            "the model that was compiled (model._orig_mod)"
        )
    outer, model = model, inside_bridge(model)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} runs two sequences, its encoder's and its decoder's: give a "
            "Hugging Face causal LM or a TransformerLens model"
        )
    with untouched(model):
        sites = find_sites(model)
        require_possible(model, sites, interventions)
    passes = Passes()
    knockouts = _knockouts(interventions)

    def begin(span: Span) -> None:
        cuts_of(knockouts, span)
        _require_positions(interventions, span)

    others = (i.target for i in interventions if i.kind == "mean" or isinstance(i.source, int))
    targets = {intervention.target for intervention in interventions}
    with (
        _as_written(model),
        changed(model, sites, interventions, passes),
        followed(model, outer, passes, targets, begin, next(others, None)),
    ):
        yield


@contextmanager
def changed(
    model: nn.Module, sites: Sites, interventions: Sequence[Intervention], passes: Passes
) -> Iterator[Added]:
    """Apply interventions to the forward passes inside the block.

    Yields
    ------
    dict
        What is added to heads' shares, by layer and head: what heads pass does not show it.

    Raises
    ------
    ValueError
        If the model has no such layer, head or activation, or a position is out of range.
    """
    added: Added = {}
    with ExitStack() as hooks:
        hooks.enter_context(knocked_out(model, sites, _knockouts(interventions), passes))
        if passes.span is not None:
            _require_positions(interventions, passes.span)
        of_layers = _with_shares(interventions)
        for layer, of_layer in of_layers.items():
            changes = []
            for intervention in of_layer:
                _, head = _site_of(sites, intervention)
                assert head is not None
                site = Site("", "output", scale=sites.heads[layer].scale)
                change = _changing(intervention, site, None, passes)
                changes.append((intervention.target, head, change))
            added[layer] = change_shares(model, hooks, layer, sites.heads[layer], changes, passes)
        apart = [each for of_layer in of_layers.values() for each in of_layer]
        for intervention in interventions:
            if intervention.kind == "knockout" or any(intervention is each for each in apart):
                continue
            site, head = _site_of(sites, intervention)
            change = _changing(intervention, site, head, passes)
            module = model.get_submodule(site.module)
            if site.part == "input":
                handle = module.register_forward_pre_hook(changing_input(change), with_kwargs=True)
            else:
                handle = module.register_forward_hook(_on_output(change))
            hooks.callback(handle.remove)
        yield added


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
    with changed(model, sites, even, Passes(Span.whole(PROBE_TOKENS))):
        require_obeyed(model, sites, knockouts)


def require_keys(interventions: Sequence[Intervention], lengths: Iterable[int]) -> None:
    """Refuse knockouts that do not fit sequences of all these lengths: see :func:`cuts_of`."""
    for length in lengths:
        cuts_of(_knockouts(interventions), Span.whole(length))


def listed(interventions: Any) -> tuple[Intervention, ...]:
    """Give interventions as a tuple.

    Raises
    ------
    TypeError
        If they are something else.
    """
    found = tuple(interventions) if isinstance(interventions, Iterable) else (None,)
    if not all(isinstance(part, Intervention) for part in found):
        raise TypeError(
            f"interventions={interventions!r} must be a list of Intervention, such as "
            "[Intervention('zero', 'mlp_out_0')]"
        )
    return found


def _require_positions(interventions: Sequence[Intervention], span: Span) -> None:
    """Refuse positions that a sequence does not have; knockouts are checked with their keys."""
    for intervention in interventions:
        if intervention.kind != "knockout":
            span.resolve(intervention.positions)


@contextmanager
def _as_written(model: nn.Module) -> Iterator[None]:
    """Have modules that were compiled in place run as they are written: with hooks."""
    compiled = {m: m._compiled_call_impl for m in model.modules() if m._compiled_call_impl}
    for module in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in compiled.items():
            module._compiled_call_impl = call


def _with_shares(interventions: Sequence[Intervention]) -> dict[int, list[Intervention]]:
    """Those of heads, in layers where a head's share is given as a tensor, by layer."""
    of_heads: dict[int, list[Intervention]] = {}
    for intervention in interventions:
        match = _TARGET.fullmatch(intervention.target)
        if match is not None and match["kind"] == "head_out":
            of_heads.setdefault(int(match["layer"]), []).append(intervention)
    return {
        layer: of_layer
        for layer, of_layer in of_heads.items()
        if any(isinstance(intervention.source, Tensor) for intervention in of_layer)
    }


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
    intervention: Intervention, site: Site, head: int | None, passes: Passes
) -> Callable[[Tensor], Tensor]:
    """Make the function from an activation to what it is changed to: itself, if it may stay."""
    rows = slice(None) if site.rows is None else site.rows

    def change(whole: Tensor) -> Tensor:
        tokens = whole.shape[1] if whole.ndim > 2 else None
        span = passes.now(intervention.target, tokens=tokens)
        chosen = None if span is None else _chosen(intervention.positions, span)
        if span is None or chosen is None:
            return whole
        changed = by_example(whole, span.length).clone()
        now = changed[:, chosen.tokens]
        part = now[..., rows].clone()
        shape = part.shape
        if site.heads and part.ndim == 3:
            part = part.unflatten(-1, (site.heads, -1))
        if head is None:
            part = _replacement(intervention, part, site.scale, chosen)
        else:
            of_head = part[..., head, :].clone()
            part[..., head, :] = _replacement(intervention, of_head, site.scale, chosen)
        now[..., rows] = part.reshape(shape)
        changed[:, chosen.tokens] = now
        return changed.view_as(whole)

    return change


@dataclass(frozen=True)
class _Chosen:
    """Which tokens of a pass are changed.

    Attributes
    ----------
    tokens : list of int
        Numbers in the pass.
    order : list of int
        Which of the positions that were asked for they are.
    in_prompt : int
        How many of those are in the prompt.
    generated : int or None
        The first of the tokens that was generated.
    prompt : int
    """

    tokens: list[int]
    order: list[int]
    in_prompt: int
    generated: int | None
    prompt: int


def _chosen(positions: Positions, span: Span) -> _Chosen | None:
    numbers = span.resolve(positions)
    here = [(at, n) for at, n in enumerate(numbers) if span.start <= n < span.stop]
    if not here:
        return None
    return _Chosen(
        tokens=[number - span.start for _, number in here],
        order=[at for at, _ in here],
        in_prompt=sum(number < span.prompt for number in numbers),
        generated=min((number for _, number in here if number >= span.prompt), default=None),
        prompt=span.prompt,
    )


def _replacement(intervention: Intervention, now: Tensor, scale: float, chosen: _Chosen) -> Tensor:
    """What stands at the positions after it, (example, position, width)."""
    if intervention.kind == "zero":
        return torch.zeros_like(now)
    if intervention.kind == "mean":
        return now.mean(0, keepdim=True).expand_as(now)
    source = intervention.source
    if isinstance(source, Tensor):
        given = _given(intervention.target, source, now, chosen).to(now) / scale
        return now + given if intervention.kind == "add" else given.expand_as(now)
    assert source is not None
    if not -len(now) <= source < len(now):
        raise ValueError(f"source={source}: the batch has examples 0 to {len(now) - 1}")
    return now[source].expand_as(now)


def _given(target: str, source: Tensor, now: Tensor, chosen: _Chosen) -> Tensor:
    """A source for the positions of this pass, checked against the activation there."""
    shape, width = tuple(source.shape), tuple(now.shape[2:])
    if len(shape) > len(width) and chosen.generated is not None:
        raise ValueError(
            f"the source of {target!r} has shape {shape}, with positions of the prompt, and token "
            f"{chosen.generated} was generated: give {width}, or positions that end with the "
            f"prompt, such as slice(0, {chosen.prompt})"
        )
    of_each = (chosen.in_prompt, *width)
    whole = (len(now), *of_each)
    if shape not in (width, of_each, whole, (1, *of_each)):
        raise ValueError(
            f"the source of {target!r} has shape {shape}: give {width}, one for each position "
            f"{of_each}, or for each example too {whole}"
        )
    if len(shape) == len(width) or len(chosen.order) == chosen.in_prompt:
        return source
    index = torch.as_tensor(chosen.order, device=source.device)
    return source.index_select(len(shape) - len(width) - 1, index)


def _on_output(change: Callable[[Tensor], Tensor]) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = first_tensor(output)
        assert hidden is not None
        if isinstance(output, tuple | list):
            return (change(hidden), *output[1:])
        return change(hidden)

    return hook
