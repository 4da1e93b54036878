"""Which tokens of its sequence each forward pass of a model runs: all, or those not in a cache.

A pass without a cache, or with an empty one, begins a sequence; one with a filled cache goes on
with the sequence in it. Inside ``model.generate`` every pass belongs to what it was given, so that
passes without a cache, each of which runs all tokens so far, are told from new sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from inspect import Parameter, signature
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import Tensor, nn

from basinscope.models.forward import is_hugging_face, replaced_forward
from basinscope.models.positions import Span

_TOKENS = ("inputs_embeds", "input_ids", "inputs", "input")
_CACHES = ("past_key_values", "past_kv_cache", "cache_params")


class Passes:
    """Tells hooks which tokens run.

    Parameters
    ----------
    span : Span, optional
        Of every pass; left out, :func:`followed` says it.
    """

    def __init__(self, span: Span | None = None) -> None:
        self.span = span
        self.resting = False  # the model is to run as it is
        self.ran: set[str] = set()

    def now(self, *targets: str, tokens: int | None = None) -> Span | None:
        """Give the span of the pass that runs, to a hook on `targets`; None where it should rest.

        Raises
        ------
        ValueError
            If no pass was seen, or one of another number of tokens.
        """
        if self.resting:
            return None
        span = self.span
        if span is None or (span.goes_on and tokens not in (None, span.length)):
            raise ValueError(
                f"{targets[0]!r} is reached outside of the model's own forward pass: inside the "
                "block run the model that was given to it, not a part of it, nor what torch.compile"
                " made of it"
            )
        self.ran.update(targets)
        return span


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
    around = _blocks.setdefault(model, [])
    with ExitStack() as stack:
        forward = _around(following.forward, model, "forward")
        stack.enter_context(replaced_forward(model, forward))
        for each in dict.fromkeys((model, outer)):
            generate = partial(following.generate, is_hugging_face(each))
            for name, instead in (("generate", generate), ("generate_stream", _refuse_stream)):
                if hasattr(each, name):
                    stack.enter_context(_replaced(each, name, instead))
        around.append(passes)
        stack.callback(around.remove, passes)
        try:
            yield
        finally:
            passes.resting = True  # copies of the model that were made inside have the hooks still


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Have blocks around this one leave the model as it is; for trying it on a few tokens."""
    resting = [passes for passes in _blocks.get(model, ()) if not passes.resting]
    for passes in resting:
        passes.resting = True
    try:
        yield
    finally:
        for passes in resting:
            passes.resting = False


_blocks: WeakKeyDictionary[nn.Module, list[Passes]] = WeakKeyDictionary()


@dataclass
class _Generation:
    """One call of ``generate``: how long its prompt is and how many; unknown where it is text."""

    prompt: int | None
    rows: int | None
    cache: Any = None


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
        self._prompts: dict[int, tuple[ref[Any], int]] = {}  # of caches, which may not be hashable

    def forward(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a pass."""
        passes = self._passes
        if passes.resting:
            return run(*args, **kwargs)
        given = self._arguments(args, kwargs)
        cache = next((given[name] for name in _CACHES if given.get(name) is not None), None)
        passes.span = span = self._span(given, cache)
        _require_no_padding(given, span)
        if span.start == 0:
            self._begin(span)
        passes.ran.clear()
        output = run(*args, **kwargs)
        self._remember(cache, span.prompt)
        self._remember(_cache_in(output), span.prompt)
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
        tokens = _tokens_in(kwargs) if _tokens_in(kwargs) is not None else next(iter(args), None)
        shape = tokens.shape if isinstance(tokens, Tensor) and tokens.ndim > 1 else (None, None)
        if compiles:
            kwargs["disable_compile"] = True
        before, self._generation = self._generation, _Generation(shape[1], shape[0])
        try:
            return run(*args, **kwargs)
        finally:
            self._generation = before

    def _arguments(self, args: Any, kwargs: Any) -> dict[str, Any]:
        """Name what a pass is given."""
        bound = self._parameters.bind_partial(*args, **kwargs)
        given = dict(bound.arguments)
        for name, parameter in self._parameters.parameters.items():
            if parameter.kind is Parameter.VAR_KEYWORD:
                given |= given.pop(name, {})
        return given

    def _span(self, given: Mapping[str, Any], cache: Any) -> Span:
        tokens = _tokens_in(given)
        if not isinstance(tokens, Tensor):
            raise ValueError(
                f"{type(self._model).__name__} is given {type(tokens).__name__}, whose tokens "
                "cannot be counted: give token ids, a torch.Tensor (example, token)"
            )
        rows, count = tokens.shape[:2] if tokens.ndim > 1 else (1, len(tokens))
        start = _held_by(cache)
        if start:
            return Span(start, start + count, self._prompt_of(cache, start))
        generation = self._generation
        if generation is None:
            return Span(0, count, count)
        if generation.prompt is None:
            generation.prompt, generation.rows = count, rows
        if self._see_batch and rows != generation.rows:
            raise ValueError(
                f"{self._see_batch!r} depends on the other prompts of a batch, and generate() runs "
                f"{generation.rows} prompts in {rows} rows (num_beams, num_return_sequences): give "
                "each prompt one row, or leave it out"
            )
        another = generation.cache is not None and cache is not generation.cache
        if another or (cache is None and count < generation.prompt):
            raise ValueError(
                "generate() runs a second sequence beside the prompt (guidance_scale), and "
                "positions count in one: leave that out"
            )
        generation.cache = cache
        return Span(0, count, generation.prompt)

    def _prompt_of(self, cache: Any, held: int) -> int:
        known, prompt = self._prompts.get(id(cache), (None, 0))
        if known is None or known() is not cache:
            raise ValueError(
                f"the cache holds {held} tokens that did not run inside this block, so that it is "
                "not known where the prompt ends: run them inside it too"
            )
        return prompt

    def _remember(self, cache: Any, prompt: int) -> None:
        if cache is not None:
            self._prompts = {i: of for i, of in self._prompts.items() if of[0]() is not None}
            self._prompts[id(cache)] = ref(cache), prompt


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


def _refuse_stream(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    raise ValueError("interventions follow generate(), not generate_stream(): use that one")


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
        if hasattr(cache, "get_seq_length"):
            return int(cache.get_seq_length())
        return int(cache[0].past_keys.shape[1])
    except Exception as error:
        raise ValueError(
            f"a cache of type {type(cache).__name__} does not say how many tokens it holds: give a "
            "transformers Cache, such as DynamicCache(), or run without one (use_cache=False)"
        ) from error


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
