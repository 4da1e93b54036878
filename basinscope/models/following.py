"""Which tokens of its sequence each forward pass of a model runs: all, or those not in a cache.

A pass without a cache, or with an empty one, begins a sequence; one with a filled cache goes on
with the sequence in it. Inside ``model.generate`` every pass belongs to what it was given, so that
passes without a cache, each of which runs all tokens so far, are told from new sequences, and that
a cache which is filled with its first tokens does not say how long the prompt is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from inspect import Parameter, signature
from types import MethodType
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from basinscope.models.forward import is_hugging_face, replaced_forward
from basinscope.models.passes import Block, Passes, blocks_around
from basinscope.models.positions import Span

_TOKENS = ("inputs_embeds", "input_ids", "inputs", "input")
_CACHES = ("past_key_values", "past_kv_cache", "cache_params")
_UNCOUNTED = ("cache", "cu_seq_lens_q", "state")  # paged, several sequences in a row, RWKV's


@contextmanager
def followed(
    model: nn.Module,
    outer: nn.Module,
    passes: Passes,
    targets: set[str],
    begin: Callable[[Span], None],
    see_batch: str | None,
) -> Iterator[None]:
    """Follow the forward passes inside the block.

    Parameters
    ----------
    model : nn.Module
        Whose passes they are.
    outer : nn.Module
        The same, or what goes around it and has a ``generate`` too.
    passes : Passes
        Told of each.
    targets : set of str
        What must ask for the span in each of them.
    begin : callable
        Given the span of each pass that begins a sequence, before it runs.
    see_batch : str or None
        What depends on the other rows of a batch, if anything does.
    """
    following = _Following(model, passes, targets, begin, see_batch)
    around = blocks_around(model)
    block = Block(passes, ExitStack())
    inside: list[Block] = []
    with block.undo as stack:
        forward = _around(following.forward, model, "forward")
        stack.enter_context(replaced_forward(model, forward))
        for each in dict.fromkeys((model, outer)):
            generate = partial(following.generate, is_hugging_face(each))
            refused = {name: partial(_refuse, passes, name) for name in _REFUSED}
            for name, instead in {"generate": generate, **refused}.items():
                if hasattr(each, name):
                    stack.enter_context(_replaced(each, name, instead))
        around.append(block)
        stack.callback(around.remove, block)
        stack.callback(passes.rest)  # copies made inside have the hooks still
        try:
            yield
        finally:
            if block in around:
                inside = around[around.index(block) + 1 :]
            for later in reversed(inside):
                later.undo.close()
    if inside:
        raise RuntimeError(
            "a block of intervened() was left before one that was entered inside it, which is "
            "closed with it: leave them in the other order, as `with` does"
        )


@dataclass
class _Generation:
    """One call of ``generate``.

    Attributes
    ----------
    prompt, rows : int or None
        How long the prompt is, with what a cache holds of it, and how many there are; None where
        they are text.
    tokens : Tensor or None
        Of the prompt.
    begun : bool
        Whether a pass ran.
    cache
        Its own, as far as it was seen.
    """

    prompt: int | None
    rows: int | None
    tokens: Tensor | None
    begun: bool = False
    cache: Any = None


@dataclass(frozen=True)
class _Held:
    """What ran into a cache: tokens, and how many of these are the prompt's."""

    cache: ref[Any]
    prompt: int
    tokens: int


class _Following:
    """Follows passes; see :func:`followed`."""

    def __init__(
        self,
        model: nn.Module,
        passes: Passes,
        targets: set[str],
        begin: Callable[[Span], None],
        see_batch: str | None,
    ) -> None:
        self._model, self._passes, self._targets = model, passes, targets
        self._begin, self._see_batch = begin, see_batch
        self._parameters = signature(model.forward)
        self._generation: _Generation | None = None
        self._held: dict[int, _Held] = {}  # by the id of a cache, which may not be hashable

    def forward(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a pass."""
        passes = self._passes
        if passes.resting:
            return run(*args, **kwargs)
        given = self._arguments(args, kwargs)
        cache = next((given[name] for name in _CACHES if given.get(name) is not None), None)
        span = self._span(given, cache)
        _require_no_padding(given, span)
        if span.start == 0 or span.prompt != self._known(cache, span.start).prompt:
            self._begin(span)
        with passes.running(span):
            output = run(*args, **kwargs)
        self._remember(cache, span)
        self._remember(_cache_in(output), span)
        if missing := sorted(self._targets - passes.ran):
            raise ValueError(
                f"{missing[0]!r} was not changed: its module did not run in this pass of "
                f"{type(self._model).__name__}; leave it out, or run the whole model, as it is "
                "written, from token ids"
            )
        return output

    def generate(self, compiles: bool, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run ``generate``, which may compile passes if nobody forbids it: hooks would be lost."""
        if self._passes.resting:
            return run(*args, **kwargs)
        _require_no_padding(kwargs, None)
        _require_one_sequence(self._model, args, kwargs)
        if compiles:
            kwargs["disable_compile"] = True
        before, self._generation = self._generation, self._generation_of(args, kwargs)
        try:
            return run(*args, **kwargs)
        finally:
            self._generation = before

    def _generation_of(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Generation:
        tokens = _tokens_in(kwargs) if _tokens_in(kwargs) is not None else next(iter(args), None)
        if not isinstance(tokens, Tensor) or tokens.ndim < 2:
            return _Generation(None, None, None)
        rows, prompt = tokens.shape[:2]
        around = self._generation
        if around is not None and around.prompt is not None and _goes_on(tokens, around.tokens):
            return _Generation(around.prompt, rows, tokens, begun=True)  # the model assists itself
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2:  # of all, where a cache has the first ones
            prompt = max(prompt, mask.shape[1])
        return _Generation(prompt, rows, tokens)

    def _arguments(self, args: Any, kwargs: Any) -> dict[str, Any]:
        """Name what a pass is given."""
        bound = self._parameters.bind_partial(*args, **kwargs)
        given = dict(bound.arguments)
        for name, parameter in self._parameters.parameters.items():
            if parameter.kind is Parameter.VAR_KEYWORD:
                given |= given.pop(name, {})
        return given

    def _span(self, given: Mapping[str, Any], cache: Any) -> Span:
        if other := [name for name in _UNCOUNTED if given.get(name) is not None]:
            raise ValueError(
                f"{type(self._model).__name__} is given {other[0]}=..., which does not say how "
                "many tokens of its sequence ran: leave it out (use_cache=False for what generate()"
                " adds), and give one sequence for each row"
            )
        tokens = _tokens_in(given)
        if not isinstance(tokens, Tensor):
            raise ValueError(
                f"{type(self._model).__name__} is given {type(tokens).__name__}, whose tokens "
                "cannot be counted: give token ids, a torch.Tensor (example, token)"
            )
        rows, count = tokens.shape[:2] if tokens.ndim > 1 else (1, len(tokens))
        start = _held_by(cache)
        prompt = self._known(cache, start).prompt if start else count
        if self._generation is not None:
            prompt = self._prompt_in(self._generation, cache, start, count, rows, prompt)
        return Span(start, start + count, prompt)

    def _prompt_in(
        self, generation: _Generation, cache: Any, start: int, count: int, rows: int, prompt: int
    ) -> int:
        """How long the prompt of a pass inside generate() is; `prompt` says what its cache does."""
        if generation.prompt is None:
            generation.prompt, generation.rows = start + count, rows
        if self._see_batch and rows != generation.rows:
            raise ValueError(
                f"{self._see_batch!r} depends on the other prompts of a batch, and generate() runs "
                f"{generation.rows} prompts in {rows} rows (num_beams, num_return_sequences): give "
                "each prompt one row, or leave it out"
            )
        another = generation.cache is not None and cache is not generation.cache
        if another and start:
            return prompt
        if another or (cache is None and count < generation.prompt):
            raise ValueError(_SECOND)
        if start >= generation.prompt and not generation.begun:
            raise ValueError(
                f"generate() is given {generation.prompt} tokens, and a cache that holds {start}: "
                "give the whole sequence, those in the cache too"
            )
        generation.cache, generation.begun = cache, True
        return generation.prompt

    def _known(self, cache: Any, start: int) -> _Held:
        """What ran into a cache; refuses one that got tokens elsewhere."""
        held = self._held.get(id(cache))
        ran = held.tokens if held is not None and held.cache() is cache else 0
        if held is None or ran < start:
            raise ValueError(
                f"the cache holds {start} tokens{f', of which {start - ran}' if ran else ' that'} "
                "did not run inside this block, so that they are not changed, and it is not known "
                "where the prompt ends: run them inside it too"
            )
        return held

    def _remember(self, cache: Any, span: Span) -> None:
        if cache is not None:
            self._held = {i: held for i, held in self._held.items() if held.cache() is not None}
            self._held[id(cache)] = _Held(ref(cache), span.prompt, span.stop)


def _goes_on(tokens: Tensor, before: Tensor | None) -> bool:
    """Whether a sequence begins with another."""
    return before is not None and torch.equal(tokens[:, : before.shape[1]].to(before), before)


_SECOND = (
    "generate() runs a second sequence beside the prompt (guidance_scale), and positions count in "
    "one: leave that out"
)


def _require_one_sequence(model: nn.Module, args: Sequence[Any], given: Mapping[str, Any]) -> None:
    """Refuse ways of generating that run others beside the prompt, before anything runs."""
    if given.get("cache_implementation") == "paged":
        raise ValueError(f"{_REFUSED['generate_batch']}: leave out cache_implementation='paged'")
    own = getattr(model, "generation_config", None)
    configs = (given.get("generation_config"), args[1] if len(args) > 1 else None, own)
    scales = [given.get("guidance_scale"), *(getattr(c, "guidance_scale", None) for c in configs)]
    if next((scale for scale in scales if scale is not None), 1) != 1:
        raise ValueError(_SECOND)


def _around(instead: Callable[..., Any], module: nn.Module, name: str) -> Callable[..., Any]:
    """Make a method that gives `instead` the one it stands for; each copy of the module its own."""
    before = getattr(module, name)
    if getattr(before, "__self__", None) is not module:

        @wraps(before)
        def call(*args: Any, **kwargs: Any) -> Any:
            return instead(before, *args, **kwargs)

        return call
    function = before.__func__

    @wraps(function)
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return instead(MethodType(function, self), *args, **kwargs)

    return MethodType(method, module)


@contextmanager
def _replaced(module: nn.Module, name: str, instead: Callable[..., Any]) -> Iterator[None]:
    """Let a module's method do something else, which is given the method, for a while."""
    own = vars(module)
    kept = own.get(name)
    own[name] = _around(instead, module, name)
    try:
        yield
    finally:
        if kept is None:
            del own[name]  # falls back to its class's
        else:
            own[name] = kept


_REFUSED = {
    "generate_stream": "interventions follow generate(), not generate_stream()",
    **dict.fromkeys(
        ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager"),
        "interventions do not follow continuous batching, which runs several prompts in a row",
    ),
}


def _refuse(passes: Passes, name: str, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if passes.resting:
        return run(*args, **kwargs)
    raise ValueError(f"{_REFUSED[name]}: use generate()")


def _tokens_in(given: Mapping[str, Any]) -> Any:
    return next((given[name] for name in _TOKENS if given.get(name) is not None), None)


def _cache_in(output: Any) -> Any:
    """The cache that a model returns, if it does."""
    parts = output if isinstance(output, tuple) else [getattr(output, n, None) for n in _CACHES]
    return next((part for part in parts if hasattr(part, "get_seq_length")), None)


def _held_by(cache: Any) -> int:
    """Count the tokens in a cache."""
    if cache is None:
        return 0
    try:
        if not hasattr(cache, "get_seq_length"):
            return int(cache[0].past_keys.shape[1])
        if (held := int(cache.get_seq_length())) or not _has_numbers(cache):
            return held
    except Exception as error:
        raise ValueError(
            f"a cache of type {type(cache).__name__} does not say how many tokens it holds: give a "
            "transformers Cache, such as DynamicCache(), or run without one (use_cache=False)"
        ) from error
    raise ValueError(
        f"a cache of type {type(cache).__name__} says that it holds no tokens, and is not empty: "
        "run without one (use_cache=False), or give a new one if it is to begin a sequence"
    )


def _has_numbers(cache: Any) -> bool:
    """Whether a cache holds more than zeros, as one that is new or was reset does not."""
    parts = [vars(part) for part in (cache, *getattr(cache, "layers", ()))]
    tensors = (leaf for leaf in tree_leaves(parts) if isinstance(leaf, Tensor))
    return any(tensor.is_floating_point() and bool(tensor.any()) for tensor in tensors)


def _require_no_padding(given: Mapping[str, Any], span: Span | None) -> None:
    """Refuse rows that have no token somewhere, or several sequences."""
    mask, numbers = given.get("attention_mask"), given.get("position_ids")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        tokens = mask if span is None else mask[:, : span.stop]  # a static cache has room for more
        if not bool(tokens.all()):
            raise ValueError(
                "the attention_mask has zeros: positions of padded prompts would not be those of "
                "their tokens; give prompts of one length, or one at a time (where generate() is "
                "given no mask, it takes pad tokens for padding)"
            )
    if isinstance(numbers, Tensor) and numbers.ndim == 2 and bool((numbers.diff() < 0).any()):
        raise ValueError("position_ids begin anew inside a row: give one sequence for each row")
