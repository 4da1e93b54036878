"""Attention knockouts: chosen tokens may not attend to chosen others, as in Geva et al. (2023).

The mask that an attention module is given, or the scores of a TransformerLens model, forbid it, so
that the softmax shares what is left among the other keys. Whether a model's attention goes by that
mask is tried on a few tokens before anything else runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from basinscope.models.forward import evaluating, is_transformer_lens, token_logits, vocabulary_size
from basinscope.models.passes import Passes
from basinscope.models.positions import Positions, Span, has_no_end
from basinscope.models.restrictions import structure_of
from basinscope.models.sites import Sites, by_example
from basinscope.models.stream import PROBE_TOKENS, changing_input, first_tensor, stream_of
from basinscope.models.structure import reason_of

MASK = "attention_mask"  # its name, where a module is given it by name
_KEYS = slice(0, 3)  # what is knocked out, and for whom, when it is tried
_QUERIES = slice(3, PROBE_TOKENS)


@dataclass(frozen=True)
class Knockout:
    """Attention from some tokens to some others, in one layer.

    Attributes
    ----------
    target : str
        What it was asked for as.
    layer : int
    head : int or None
        A query head; None for all.
    queries, keys : "all", "last", int, slice, or a list of these
    """

    target: str
    layer: int
    head: int | None
    queries: Positions
    keys: Positions


Cut = dict[int | None, Tensor]
"""Query head, or None for all of them, to what is knocked out there: bool (token, key token).

The tokens are those that run, the key tokens all from the sequence's first."""


@contextmanager
def knocked_out(
    model: nn.Module, sites: Sites, knockouts: Sequence[Knockout], passes: Passes
) -> Iterator[None]:
    """Apply knockouts to the forward passes inside the block; those of one layer add up.

    Raises
    ------
    ValueError
        If the model has no such layer or head, or as :func:`cuts_of`; inside the block, if a layer
        with a window leaves a token no key, or is given no mask that knockouts can be put into.
    """
    cuts = _Cuts(knockouts, passes)
    if passes.span is not None:
        cuts.of(passes.span)
    with ExitStack() as hooks:
        for layer, (name, heads) in _places(model, sites, knockouts).items():
            module, now = model.get_submodule(name), partial(cuts.now, layer, heads)
            if is_transformer_lens(model):
                handle = module.register_forward_hook(partial(_mask_scores, name, now))
            else:
                hook = partial(_change_mask, name, now)
                handle = module.register_forward_pre_hook(hook, with_kwargs=True)
            hooks.callback(handle.remove)
        yield


class _Cuts:
    """What is knocked out in the pass that runs, added up once for all layers."""

    def __init__(self, knockouts: Sequence[Knockout], passes: Passes) -> None:
        self._knockouts, self._passes = knockouts, passes
        self._span: Span | None = None
        self._cuts: dict[int, Cut] = {}

    def of(self, span: Span) -> dict[int, Cut]:
        if span != self._span:
            self._cuts, self._span = cuts_of(self._knockouts, span), span
        return self._cuts

    def now(self, layer: int, heads: int) -> tuple[Tensor, Span] | None:
        targets = {knockout.target for knockout in self._knockouts if knockout.layer == layer}
        span = self._passes.now(*targets)
        return None if span is None else (_by_head(self.of(span)[layer], heads), span)


Now = Callable[[], tuple[Tensor, Span] | None]
"""Gives what is knocked out in the pass that runs, (head or 1, token, key token), and its span."""


def cuts_of(knockouts: Sequence[Knockout], span: Span) -> dict[int, Cut]:
    """Add up, layer by layer, what is knocked out of the tokens that run.

    Raises
    ------
    ValueError
        If a position is out of range, a knockout takes nothing away, or all that a token attends to
        is knocked out.
    """
    made: dict[tuple[int, ...], Tensor] = {}  # layers share one where they can: it is large
    cuts: dict[int, Cut] = {}
    past = _past(span)
    for knockout in knockouts:
        queries = _resolved(knockout, "positions", span)
        keys = _resolved(knockout, "key_positions", span)
        first = min(keys, default=span.prompt)  # without any, tokens that will be generated
        if not (span.goes_on and has_no_end(knockout.queries)) and max(queries) < first:
            raise ValueError(
                f"{knockout.target!r}: no token up to {max(queries)} attends to {first} or to "
                "what follows: give key_positions at or before the positions"
            )
        rows = [query - span.start for query in queries if span.start <= query < span.stop]
        columns = [key for key in keys if key < span.stop]
        known = (*rows, -1, *columns)
        if known not in made:
            made[known] = torch.zeros_like(past)
            made[known][torch.tensor(rows, dtype=torch.long)[:, None], columns] = True
        cut, of_layer = made[known], cuts.setdefault(knockout.layer, {})
        before = of_layer.get(knockout.head)
        of_layer[knockout.head] = cut if before is None else before | cut
    checked: list[Tensor] = []
    for layer, of_layer in cuts.items():
        cuts[layer] = _with_those_of_all(of_layer)
        for cut in cuts[layer].values():
            if not any(cut is other for other in checked):
                _require_keys_left(f"layer {layer}", past, cut, span.start)
                checked.append(cut)
    return cuts


def _past(span: Span) -> Tensor:
    """Which tokens each one that runs may attend to: bool (token, key token)."""
    return torch.ones(span.length, span.stop, dtype=torch.bool).tril(span.start)


def _resolved(knockout: Knockout, what: str, span: Span) -> list[int]:
    positions = knockout.queries if what == "positions" else knockout.keys
    try:
        return span.resolve(positions)
    except ValueError as error:
        raise ValueError(f"{what} of {knockout.target!r}: {error}") from error


def _with_those_of_all(cut: Cut) -> Cut:
    """Add what is knocked out in all heads to each that is named."""
    of_all = cut.get(None)
    return cut if of_all is None else {h: c if h is None else of_all | c for h, c in cut.items()}


def _by_head(cut: Cut, heads: int) -> Tensor:
    """Give (head, token, key token), or one for all heads."""
    if set(cut) == {None}:
        return cut[None][None]
    others = cut.get(None, torch.zeros_like(next(iter(cut.values()))))
    return torch.stack([cut.get(head, others) for head in range(heads)])


def _require_keys_left(
    where: str, allowed: Tensor, cut: Tensor, start: int, hidden: int = 0
) -> None:
    """Refuse a softmax over nothing; bool (..., token, key token).

    Numbers of tokens in the message count from `start`, those of keys from `hidden`.
    """
    none_left = allowed.any(-1) & ~(allowed & ~cut).any(-1)
    if none_left.any():
        place = tuple(none_left.nonzero()[0].tolist())
        of_each = allowed.expand(*none_left.shape, -1)
        keys = of_each[place].nonzero()[:, 0].tolist()
        raise ValueError(
            f"{where} lets token {place[-1] + start} attend to tokens {keys[0] + hidden} to "
            f"{keys[-1] + hidden} only, and all of these are knocked out: leave it a key, or leave "
            "it out of the positions"
        )


def _places(
    model: nn.Module, sites: Sites, knockouts: Sequence[Knockout]
) -> dict[int, tuple[str, int]]:
    """Names of the modules that take the masks or give the scores, and the layers' query heads."""
    places: dict[int, tuple[str, int]] = {}
    for knockout in knockouts:
        number, what = knockout.layer, f"{knockout.target!r}"
        if number >= len(sites.layers):
            raise ValueError(f"{what}: the model has layers 0 to {len(sites.layers) - 1}")
        site = sites.plain.get(f"attn_pattern_{number}")
        name = "" if site is None else site.module
        if is_transformer_lens(model):
            name = f"{sites.layers[number]}.attn.hook_attn_scores"
            site = site if name in dict(model.named_modules()) else None
        if site is None:
            raise ValueError(f"{what}: layer {number} of {type(model).__name__} has no attention")
        heads = 0 if knockout.head is None else _count_heads(model, knockout)
        places[number] = name, max(heads, places.get(number, (name, 0))[1])
    return places


def _count_heads(model: nn.Module, knockout: Knockout) -> int:
    layer = structure_of(model).layers[knockout.layer]
    if layer.unknown:
        raise ValueError(
            f"{knockout.target!r}: {reason_of(layer.unknown)}; knock out all heads, "
            f"'attn_pattern_{knockout.layer}'"
        )
    assert knockout.head is not None
    if knockout.head >= layer.num_heads:
        raise ValueError(f"{knockout.target!r}: the layer has heads 0 to {layer.num_heads - 1}")
    return layer.num_heads


def _mask_scores(name: str, now: Now, module: nn.Module, args: Any, scores: Tensor) -> Any:
    """A hook on the scores of a TransformerLens model, (example, head, token, key token)."""
    given = now()
    if given is None:
        return None
    cut, span = given[0].to(scores.device), given[1]
    _require_keys_left(name, scores[0] > torch.finfo(scores.dtype).min / 2, cut, span.start)
    return scores.masked_fill(cut, -torch.inf)


def _change_mask(name: str, now: Now, module: nn.Module, args: Any, kwargs: Any) -> Any:
    """A pre-hook on attention that is given a mask, or makes its own where it is given none."""
    what = now()
    if what is None or not what[0].any():
        return None
    cut, span = what
    parameters = list(signature(module.forward).parameters)
    at = parameters.index(MASK) if MASK in parameters else len(args)
    mask = args[at] if at < len(args) else kwargs.get(MASK)
    if mask is None:
        if any(getattr(value, "is_compileable", False) for value in (*args, *kwargs.values())):
            raise ValueError(
                f"{name} is given no mask, and a cache with room for tokens to come: leave out "
                "cache_implementation='static', or load the model with attn_implementation='eager'"
            )
        given = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        changed = _causal_mask(module, cut.to(given.device), span)
    elif not _fits(mask, span):
        shape = tuple(getattr(mask, "shape", ()))
        raise ValueError(
            f"{name} is given a {type(mask).__name__} {shape} for its mask, and no Tensor "
            f"(example, head, token, token){_ADVICE}"
        )
    else:
        changed = _forbidding(name, mask, cut.to(mask.device), span)
    if at < len(args):
        return (*args[:at], changed, *args[at + 1 :]), kwargs
    return args, {**kwargs, MASK: changed}


def _fits(mask: Any, span: Span) -> bool:
    """Whether a mask is for the tokens that run; those of a cache have keys of their own number."""
    if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.shape[-2] != span.length:
        return False
    return span.goes_on or mask.shape[-1] == span.stop


_ADVICE = ": load the model with attn_implementation='sdpa' or 'eager'"


def _causal_mask(module: nn.Module, cut: Tensor, span: Span) -> Tensor:
    """What scaled_dot_product_attention takes instead of ``is_causal``: True to attend."""
    used = _attention_of(module)
    if used not in (None, "eager", "sdpa"):
        raise ValueError(f"its attention ({used}) takes no mask{_ADVICE}")
    return (~cut & _past(span).to(cut.device))[None]


def _attention_of(module: nn.Module) -> str | None:
    """Name what the module computes attention with, as transformers calls it."""
    return getattr(getattr(module, "config", None), "_attn_implementation", None)


def _forbidding(name: str, mask: Tensor, cut: Tensor, span: Span) -> Tensor:
    """Add what is knocked out to a mask of numbers to add, of True to attend, or True not to.

    Where it has fewer keys than there are tokens, a window has dropped the first ones; where it has
    more, the cache has room for tokens to come.
    """
    keys = mask.shape[-1]
    hidden, room = max(span.stop - keys, 0), max(keys - span.stop, 0)
    cut = nn.functional.pad(cut[..., hidden:], (0, room))
    if mask.dtype != torch.bool:
        least = torch.finfo(mask.dtype).min
        _require_keys_left(name, mask[0] > least / 2, cut, span.start, hidden)
        return mask.masked_fill(cut, least)
    own = span.start - hidden
    itself = bool(mask[0, 0, 0, own])
    if own + 1 < keys and itself == bool(mask[0, 0, 0, -1]):
        raise ValueError(f"the mask of {name} treats the first token's own key as those after it")
    _require_keys_left(name, mask[0] == itself, cut, span.start, hidden)
    return mask & ~cut if itself else mask | cut


@torch.inference_mode(mode=False)
@torch.no_grad()
def require_obeyed(model: nn.Module, sites: Sites, knockouts: Sequence[Knockout]) -> None:
    """Refuse knockouts that a model's attention does not go by.

    A few tokens are run, with made-up numbers for what each attention reads. Other numbers at some
    keys must change what the heads hand on at later tokens, and must not where these keys are
    knocked out; nothing else may change. TransformerLens models have their scores in a module,
    which is reason enough.

    Raises
    ------
    ValueError
        Names the model and the layer, and says why.
    """
    places = _places(model, sites, knockouts)
    if not knockouts or is_transformer_lens(model):
        return
    known = _obeyed.setdefault(model, set())
    now = (
        tuple(name for name, _ in model.named_modules()),
        _attention_of(model),
        tuple(_attention_of(model.get_submodule(name)) for name, _ in places.values()),
        frozenset((knockout.layer, knockout.head) for knockout in knockouts),
    )
    if now not in known:
        _try(model, sites, knockouts, {layer: heads for layer, (_, heads) in places.items()})
        known.add(now)


_obeyed: WeakKeyDictionary[nn.Module, set[object]] = WeakKeyDictionary()


def _try(
    model: nn.Module, sites: Sites, knockouts: Sequence[Knockout], heads: dict[int, int]
) -> None:
    tried = [replace(knockout, queries=_QUERIES, keys=_KEYS) for knockout in knockouts]
    with evaluating(model):
        plain, other = (_handed_on(model, sites, (), change) for change in (False, True))
        cut, other_cut = (_handed_on(model, sites, tried, change) for change in (False, True))
    for layer, of_layer in cuts_of(tried, Span.whole(PROBE_TOKENS)).items():
        runs = [run.get(layer, []) for run in (plain, other, cut, other_cut)]
        which = None if None in of_layer else sorted(head for head in of_layer if head is not None)
        if why := _disobeyed(runs, which, heads[layer]):
            raise ValueError(f"{_refusal(model, knockouts, layer)}: {why}")


def _refusal(model: nn.Module, knockouts: Sequence[Knockout], layer: int) -> str:
    target = next((k.target for k in knockouts if k.layer == layer), f"attn_pattern_{layer}")
    return f"{target!r} cannot be knocked out in {type(model).__name__}"


def _handed_on(
    model: nn.Module, sites: Sites, knockouts: Sequence[Knockout], change: bool
) -> dict[int, list[Tensor]]:
    """What each layer's heads hand to its output projection, (token, width), at each of its runs.

    Where heads are not understood, it is what the attention returns.
    """
    found: dict[int, list[Tensor]] = {}
    begun = 0

    def made_up(layer: int, given: Tensor) -> Tensor:
        nonlocal begun
        begun = layer
        generator = torch.Generator().manual_seed(layer)
        first, second = (torch.randn(given.shape, generator=generator) for _ in range(2))
        if change:
            first[..., _KEYS, :] = second[..., _KEYS, :]
        return first.to(given)

    def keep(layer: int, handed: Any) -> None:
        if (tensor := first_tensor(handed)) is not None:
            found.setdefault(layer, []).append(by_example(tensor, PROBE_TOKENS)[0].float())

    structure = structure_of(model)
    with ExitStack() as hooks:
        for number, layer in enumerate(stream_of(model)):
            if layer.attention is None:
                continue
            attention = model.get_submodule(layer.attention)
            use = changing_input(partial(made_up, number))
            hooks.callback(attention.register_forward_pre_hook(use, with_kwargs=True).remove)
            if layer.output_projection is None or structure.layers[number].unknown:
                handle = attention.register_forward_hook(lambda _, __, out, n=number: keep(n, out))
            else:
                projection = model.get_submodule(layer.output_projection)
                handle = projection.register_forward_pre_hook(
                    lambda _, args, n=number: keep(n, args)
                )
            hooks.callback(handle.remove)
        passes = Passes(Span.whole(PROBE_TOKENS))
        hooks.enter_context(knocked_out(model, sites, knockouts, passes))
        device, count = next(model.parameters()).device, vocabulary_size(model) or 2
        ids = torch.arange(2, PROBE_TOKENS + 2, device=device) * 104729 % count
        try:
            token_logits(model, ids[None])
        except Exception as error:
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"{_refusal(model, knockouts, begun)}: {why}") from error
    return found


def _disobeyed(
    runs: Sequence[Sequence[Tensor]], which: Sequence[int] | None, heads: int
) -> str | None:
    """What is wrong with runs: plain, with other keys, then both with these keys knocked out.

    Parameters
    ----------
    runs : four lists of Tensor (token, width)
    which : list of int, or None for all
        The heads that they were knocked out in.
    heads : int
        How many there are; 0 where nobody asked.
    """
    if any(len(run) != 1 for run in runs):
        return f"its attention runs {len(runs[0])} times"
    plain, other, cut, other_cut = (run[0].unflatten(-1, (heads or 1, -1)) for run in runs)
    here = list(range(plain.shape[1])) if which is None else list(which)
    reached, left = (
        float((after - before)[_QUERIES, here].abs().max())
        for before, after in ((plain, other), (cut, other_cut))
    )
    if not reached > 0:
        return "nothing of one token's keys and values was seen to reach another"
    if not left <= 1e-3 * reached:
        return "its attention does not go by the mask that it is given"
    rest = torch.ones(plain.shape[:2], dtype=torch.bool, device=plain.device)
    rest[_QUERIES, here] = False
    if not bool(((cut - plain)[rest].abs() <= 0.05 * plain.abs().max()).all()):
        return "its attention is not causal, or has no mask for each head"
    return None
