"""Take activations out of a model while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from inspect import signature
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from basinscope.models.activation_cache import ActivationCache
from basinscope.models.forward import (
    evaluating,
    inside_bridge,
    is_hugging_face,
    max_sequence_length,
    token_logits,
    vocabulary_size,
)
from basinscope.models.head import NoLinearHeadError, named_head
from basinscope.models.interventions import (
    Intervention,
    changed,
    listed,
    require_keys,
    require_possible,
)
from basinscope.models.lengths import (
    by_length,
    common_positions,
    require_no_neighbours,
    require_positions,
    run_by_length,
)
from basinscope.models.passes import Passes, untouched
from basinscope.models.positions import Positions, Span, described, plain, resolve_positions
from basinscope.models.shares import Added
from basinscope.models.sites import (
    FINAL_NORM,
    Site,
    Sites,
    by_example,
    find_sites,
    head_weights,
    listening,
)
from basinscope.models.structure import require_module

STATISTICS = ("mean", "variance", "second_moment")
_HIDDEN = ("example", "position", "d_model")
DIMS = {
    "embed": _HIDDEN,
    "resid_in": _HIDDEN,
    "resid_mid": _HIDDEN,
    "resid_out": _HIDDEN,
    "attn_in": _HIDDEN,
    "attn_out": _HIDDEN,
    "mlp_out": _HIDDEN,
    "head_out": ("example", "position", "head", "d_model"),
    "queries": ("example", "position", "head", "d_head"),
    "keys": ("example", "position", "kv_head", "d_head"),
    "values": ("example", "position", "kv_head", "d_head"),
    "attn_pattern": ("example", "head", "position", "key_position"),
    FINAL_NORM: ("example", "position"),
    "logits": ("example", "position", "vocab"),
    "input_ids": ("example", "token"),
}
OF_THE_MODEL = ("embed", FINAL_NORM, "logits", "input_ids")  # not of a layer
_MID = ("resid_in", "attn_out")  # what resid_mid is the sum of


@dataclass(frozen=True)
class ExtractionConfig:
    """What to take, at which tokens and layers.

    Attributes
    ----------
    resid_in, resid_mid, resid_out : bool
        The residual stream before a layer, after its attention's share, after the layer. In layers
        whose attention and MLP stand side by side, "mid" is before plus the attention's share.
    attn_in, attn_out, mlp_out : bool
        What attention reads, and what attention and MLP add to the stream.
    head_out : bool
        Each head's share of ``attn_out``; what is left over is the output projection's bias, scaled
        by the norm behind it if there is one.
    queries, keys, values : bool
        By head, as the projections give them, before any rotation.
    attn_pattern : bool
        Attention probabilities; the model runs its eager attention for it.
    embed : bool
        What the token embedding gives; its last axis is ``d_embed`` where the model maps it to the
        stream's width.
    last_layernorm : bool
        Mean, variance and second moment of what enters the final norm, in float32.
    logits, input_ids : bool
    layers : "all" or sequence of int
    target_token_positions : "all", "last", int, slice, or a list of these
    average : bool
        Average over the chosen positions.
    """

    resid_in: bool = False
    resid_mid: bool = False
    resid_out: bool = False
    attn_in: bool = False
    attn_out: bool = False
    mlp_out: bool = False
    head_out: bool = False
    queries: bool = False
    keys: bool = False
    values: bool = False
    attn_pattern: bool = False
    embed: bool = False
    last_layernorm: bool = False
    logits: bool = False
    input_ids: bool = True
    layers: Literal["all"] | Sequence[int] = "all"
    target_token_positions: Positions = "all"
    average: bool = False

    @property
    def kinds(self) -> list[str]:
        """Names of what is to be taken."""
        return [f.name for f in fields(self) if f.name in DIMS and getattr(self, f.name)]

    def to_dict(self) -> dict[str, Any]:
        """Give the settings as JSON can hold them."""
        settings = asdict(self)
        given = plain(self.layers)
        settings["layers"] = given if isinstance(given, str) else [plain(n) for n in given]
        settings["target_token_positions"] = described(self.target_token_positions)
        return settings


def extract(
    model: nn.Module,
    input_ids: Tensor | Sequence[Tensor | Sequence[int]],
    config: ExtractionConfig,
    interventions: Sequence[Intervention] = (),
    *,
    batch_size: int | None = None,
) -> ActivationCache:
    """Run a batch and keep what the configuration asks for.

    Parameters
    ----------
    model : nn.Module
        A Hugging Face causal LM or a TransformerLens model. Dropout is off meanwhile, and the model
        comes back as it was.
    input_ids : Tensor (example, token), or a list of Tensor (token,) or of lists of int
        Sequences in a list may have several lengths: those of one length run together, and nothing
        is padded. Their positions count all from the start, or all from the end (the cache then has
        ``from_end`` for ``position``); ``input_ids`` are -1 where a sequence has no token.
    config : ExtractionConfig
    interventions : sequence of Intervention
        Applied in order; what is taken is what the model then has.
    batch_size : int, optional
        Examples that run together. Default: all of one length.

    Returns
    -------
    ActivationCache
        On the model's device, in the model's dtype.

    Raises
    ------
    TypeError
        If the model, `config` or an intervention is something else.
    ValueError
        Before the model runs: if nothing is asked for, a layer or position is out of range, ids are
        no (example, token) integers of the vocabulary, or the model has no such activation (says
        why).
    """
    extractor = Extractor(model, config, interventions)
    if batch_size is not None and (type(plain(batch_size)) is not int or batch_size < 1):
        raise ValueError(f"batch_size={batch_size!r}: give a number of examples, 1 or more")
    if isinstance(input_ids, Tensor) and batch_size is None:
        return extractor(input_ids)
    sequences = _sequences(model, input_ids)
    groups = by_length(sequences, batch_size)
    if len(groups) == 1:
        return extractor(torch.stack(list(sequences)))
    coords = extractor.common_positions(sorted({len(ids) for ids in sequences}))
    return run_by_length(extractor, sequences, groups, coords)


def _sequences(model: nn.Module, given: Any) -> Sequence[Tensor]:
    """Give sequences as tensors, each of them checked before any runs."""
    if isinstance(given, Tensor):
        _check_ids(model, given)
        return list(given)
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        raise ValueError(
            "input_ids must be a torch.Tensor (example, token), or a list of sequences of ids; got "
            + ("an empty list" if isinstance(given, Sequence) and not given else repr(given))
        )
    sequences = []
    for number, ids in enumerate(given):
        try:
            sequence = torch.as_tensor(ids)
            _check_ids(model, sequence[None])
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(f"sequence {number} of input_ids: {error}") from error
        sequences.append(sequence)
    return sequences


class Extractor:
    """Takes the same activations from any number of batches.

    Raises
    ------
    TypeError, ValueError
        As :func:`extract`.
    """

    def __init__(
        self,
        model: nn.Module,
        config: ExtractionConfig,
        interventions: Sequence[Intervention] = (),
    ) -> None:
        if not isinstance(config, ExtractionConfig):
            raise TypeError(
                f"config={config!r} must be an ExtractionConfig, such as "
                "ExtractionConfig(resid_out=True)"
            )
        require_module(model)
        self.model = model = inside_bridge(model)
        self.config = config
        self.interventions = listed(interventions)
        with untouched(model):
            self.sites = find_sites(model)
        self.names = _names(config, self.sites)
        if "logits" in self.names:
            _require_head(model)
        with self._attention(), untouched(model):
            require_possible(model, self.sites, self.interventions)
        self.metadata = _describe(model, config, self.interventions, len(self.sites.layers))

    def __call__(self, input_ids: Tensor) -> ActivationCache:
        """Run a batch, (example, token)."""
        _check_ids(self.model, input_ids)
        length = input_ids.shape[1]
        positions = resolve_positions(self.config.target_token_positions, length)
        taken = _Taken(length, positions, self.config.average)
        input_ids = input_ids.to(next(self.model.parameters()).device, torch.long)
        if "input_ids" in self.names:
            taken.found["input_ids"] = input_ids
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(evaluating(self.model))
            stack.enter_context(self._attention())
            passes = Passes(Span.whole(length))
            added = stack.enter_context(changed(self.model, self.sites, self.interventions, passes))
            for name in self.names:
                self._listen(stack, name, taken, added)
            if last := self._last_module():
                stack.callback(last.register_forward_hook(_stop).remove)
            try:
                logits = token_logits(self.model, input_ids)
            except _EnoughError:
                pass
            else:
                if "logits" in self.names:
                    taken.put("logits", taken.choose(logits))
        order = [n for name in self.names for n in _arrays_of(name)]
        if absent := [name for name in order if name not in taken.found]:
            raise ValueError(f"{absent[0]} cannot be extracted: its module does not run")
        return ActivationCache(
            {name: taken.found[name] for name in order},
            {name: _dims(name, taken.found[name], self.sites.width) for name in order},
            {"position": np.asarray([-1] if self.config.average else positions)},
            self.metadata,
        )

    def common_positions(self, lengths: Sequence[int]) -> dict[str, np.ndarray]:
        """Number the positions of sequences that do not run together.

        Parameters
        ----------
        lengths : sequence of int
            Those that there are.

        Returns
        -------
        dict of str to np.ndarray
            As :func:`basinscope.models.lengths.common_positions` gives them.

        Raises
        ------
        ValueError
            If such sequences have not all of what is asked for, or not at the same positions.
        """
        if self.config.attn_pattern and len(lengths) > 1:
            raise ValueError(
                "attn_pattern has as many key positions as a sequence has tokens: give sequences "
                "of one length, or leave it out"
            )
        _check_length(self.model, max(lengths))
        require_no_neighbours(self.interventions)
        require_positions(self.interventions, lengths)
        require_keys(self.interventions, lengths)
        config = self.config
        return common_positions(config.target_token_positions, config.average, lengths)

    def _attention(self) -> AbstractContextManager[None]:
        """Have the model compute its attention as what is asked for needs it."""
        patterns = [name for name in self.names if _kind(name) == "attn_pattern"]
        blocks = [self.model.get_submodule(self.sites.plain[n].module) for n in patterns]
        return _eager_attention(self.model, blocks)

    def _listen(self, stack: ExitStack, name: str, taken: _Taken, added: Added) -> None:
        """Hook the modules that an activation is read from."""
        sites = self.sites
        if name in sites.plain:
            use = taken.put_statistics if name == FINAL_NORM else partial(taken.put_chosen, name)
            self._hook(stack, sites.plain[name], use, taken.length)
        elif _kind(name) == "head_out":
            self._listen_to_heads(stack, name, taken, added)
        elif _kind(name) == "resid_mid":
            before: list[Tensor] = []

            def add(written: Tensor) -> None:
                taken.put(name, before.pop() + taken.choose(written))

            into, attention = (sites.plain[f"{kind}_{_layer(name)}"] for kind in _MID)
            self._hook(
                stack, into, lambda hidden: before.append(taken.choose(hidden)), taken.length
            )
            self._hook(stack, attention, add, taken.length)

    def _listen_to_heads(self, stack: ExitStack, name: str, taken: _Taken, added: Added) -> None:
        """Hook where the heads' outputs meet the projection, and the norms that follow it."""
        heads = self.sites.heads[_layer(name)]
        weights = head_weights(self.model, heads)
        shares: list[Tensor] = []

        def project(passed: Tensor) -> None:
            chosen = taken.choose(passed)
            contributions = torch.einsum("bphs,hsd->bphd", chosen, weights.to(chosen.dtype))
            for head, more in added.get(_layer(name), {}).items():
                contributions[:, :, head] += taken.choose(more)
            shares.append(contributions * heads.scale if heads.scale != 1 else contributions)
            if not heads.after:
                taken.put(name, shares.pop())

        def through(module: nn.Module, args: Any, output: Any, last: bool) -> None:
            factor = _factor(module, taken.choose(by_example(args[0], taken.length)))
            shares.append(shares.pop() * factor.unsqueeze(-2))
            if last:
                taken.put(name, shares.pop())

        self._hook(stack, heads.passed, project, taken.length)
        for number, norm in enumerate(heads.after, start=1):
            hook = partial(through, last=number == len(heads.after))
            handle = self.model.get_submodule(norm).register_forward_hook(hook)
            stack.callback(handle.remove)

    def _hook(
        self, stack: ExitStack, site: Site, use: Callable[[Tensor], None], length: int
    ) -> None:
        """Hand the tensor of a site on whenever its module runs."""
        stack.callback(listening(self.model, site, use, lambda: length).remove)

    def _last_module(self) -> nn.Module | None:
        """The layer after which nothing more is asked for; None where the model runs to its end."""
        of_layers = [name for name in self.names if _kind(name) not in OF_THE_MODEL]
        if not of_layers or {FINAL_NORM, "logits"} & set(self.names):
            return None
        return self.model.get_submodule(self.sites.layers[max(map(_layer, of_layers))])


def _describe(
    model: nn.Module, config: ExtractionConfig, interventions: Sequence[Intervention], layers: int
) -> dict[str, Any]:
    """Model, configuration and interventions, as JSON can hold them."""
    own: Any = getattr(model, "config", None) or getattr(model, "cfg", None)
    name = getattr(own, "name_or_path", None) or getattr(own, "model_name", None)
    return {
        "model": {
            "class": type(model).__name__,
            "name_or_path": name or type(model).__name__,
            "parameters": sum(p.numel() for p in model.parameters()),
            "num_layers": layers,
        },
        "extraction_config": config.to_dict(),
        "target_token_positions": described(config.target_token_positions),
        "interventions": [intervention.to_dict() for intervention in interventions],
    }


class _Taken:
    """What a forward pass has given so far."""

    def __init__(self, length: int, positions: list[int], average: bool) -> None:
        self.length = length
        self.found: dict[str, Tensor] = {}
        self._positions = positions
        self._average = average

    def choose(self, array: Tensor, axis: int = 1) -> Tensor:
        """Copy the chosen positions: the model may write into its own tensors."""
        index = torch.as_tensor(self._positions, device=array.device)
        return array.index_select(axis, index)

    def put(self, name: str, chosen: Tensor, axis: int = 1) -> None:
        """Keep an activation, averaged over its positions if that is asked for."""
        if self._average:
            wide = torch.promote_types(chosen.dtype, torch.float32)
            chosen = chosen.mean(axis, keepdim=True, dtype=wide).to(chosen.dtype)
        if name in self.found and not torch.equal(self.found[name], chosen):
            raise ValueError(f"{name} cannot be extracted: its module runs more than once")
        self.found[name] = chosen

    def put_chosen(self, name: str, array: Tensor) -> None:
        axis = DIMS[_kind(name)].index("position")
        self.put(name, self.choose(array, axis), axis)

    def put_statistics(self, hidden: Tensor) -> None:
        """Keep what the final norm divides by, in float32 or better."""
        chosen = self.choose(hidden)
        chosen = chosen.to(torch.promote_types(chosen.dtype, torch.float32))
        mean, second = chosen.mean(-1), chosen.square().mean(-1)
        variance = (chosen - mean.unsqueeze(-1)).square().mean(-1)
        for statistic, value in zip(STATISTICS, (mean, variance, second), strict=True):
            self.put(f"{FINAL_NORM}_{statistic}", value)


def _factor(module: nn.Module, given: Tensor) -> Tensor:
    """What a norm multiplies each number by, at the sizes it meets; it must do nothing else."""
    made = module.forward(given)  # without its hooks
    if torch.equal(given, made):
        return torch.ones_like(given)
    ones = torch.full_like(given[:1, :1], 1e4)  # its eps is nothing beside these
    weight = module.forward(ones).flatten()
    largest = (given * weight).abs().argmax(-1, keepdim=True)
    weighted = (given * weight).gather(-1, largest)
    shrink = torch.where(weighted == 0, 0.0, made.gather(-1, largest) / weighted)
    factor = shrink * weight
    exact = max(8 * torch.finfo(given.dtype).eps, 1e-4)  # norms compute in float32
    if not torch.allclose(given * factor, made, rtol=exact, atol=exact * float(made.abs().max())):
        raise ValueError(
            f"heads cannot be told apart behind a {type(module).__name__} that does more than "
            "scale; extract attn_out instead"
        )
    return factor


@contextmanager
def _eager_attention(model: nn.Module, blocks: list[nn.Module]) -> Iterator[None]:
    """Have a Hugging Face model's attention compute its probabilities, and return them."""
    if not blocks or not is_hugging_face(model):
        yield
        return
    config: Any = model.config  # the models read it anew in every pass
    kept = [(part, part._attn_implementation) for part in _configs(config)]
    with ExitStack() as hooks:
        for block in blocks:
            if "output_attentions" in signature(block.forward).parameters:
                handle = block.register_forward_pre_hook(_ask_for_weights, with_kwargs=True)
                hooks.callback(handle.remove)
        config._attn_implementation = "eager"
        try:
            yield
        finally:
            for part, implementation in kept:
                part._attn_implementation = implementation


def _configs(config: Any) -> Iterator[Any]:
    """Give a config, then those it holds, which transformers sets along with it."""
    yield config
    for name in config.sub_configs:
        if (part := getattr(config, name, None)) is not None:
            yield from _configs(part)


def _ask_for_weights(module: nn.Module, args: Any, kwargs: Any) -> Any:
    return args, {**kwargs, "output_attentions": True}


class _EnoughError(Exception):
    """Nothing that is asked for comes later in the forward pass."""


def _stop(module: nn.Module, args: Any, output: Any) -> None:
    raise _EnoughError


def _require_head(model: nn.Module) -> None:
    """Refuse a Hugging Face model whose output is its last hidden state."""
    try:
        if is_hugging_face(model):
            named_head(model)
    except NoLinearHeadError as error:
        raise ValueError(
            f"logits cannot be extracted: {error}; give a causal LM (AutoModelForCausalLM), or "
            "leave logits out"
        ) from error


def _names(config: ExtractionConfig, sites: Sites) -> list[str]:
    """Names of all that is asked for, layer by layer; each checked to be there."""
    count = len(sites.layers)
    layers = _layer_numbers(config.layers, count)
    kinds = config.kinds
    if not kinds:
        raise ValueError(f"the configuration asks for nothing; set some of {', '.join(DIMS)}")
    of_layers = [kind for kind in kinds if kind not in OF_THE_MODEL]
    if of_layers and not layers:
        raise ValueError(
            f"layers={config.layers!r} leaves no layer to take {', '.join(of_layers)} from: give "
            f"'all', or some of 0 to {count - 1}"
        )
    names = []
    for kind in kinds:
        if kind in OF_THE_MODEL:
            names.append(kind)
            continue
        found = {layer: _why_missing(sites, kind, layer) for layer in layers}
        if all(found.values()) or (not isinstance(config.layers, str) and any(found.values())):
            layer, why = next((layer, why) for layer, why in found.items() if why)
            raise ValueError(f"{kind}_{layer} cannot be extracted: {why}")
        names += [f"{kind}_{layer}" for layer, why in found.items() if not why]
    return names


def _layer_numbers(layers: Any, count: int) -> list[int]:
    given = plain(layers)
    if given == "all":
        return list(range(count))
    numbers: list[Any] = [plain(n) for n in given] if isinstance(given, Sequence) else [None]
    if not all(type(n) is int and 0 <= n < count for n in numbers):
        raise ValueError(
            f"layers={layers!r}: 'all', or a list of numbers; the model has layers 0 to {count - 1}"
        )
    return numbers


def _why_missing(sites: Sites, kind: str, layer: int) -> str:
    name = f"{kind}_{layer}"
    if name in sites.plain or (kind == "head_out" and layer in sites.heads):
        return ""
    if kind == "resid_mid":
        return _why_missing(sites, "attn_out", layer)
    return sites.missing.get(name, f"layer {layer} of this model has none")


def _arrays_of(name: str) -> list[str]:
    return [f"{FINAL_NORM}_{s}" for s in STATISTICS] if name == FINAL_NORM else [name]


def _kind(name: str) -> str:
    """Kind of an array, which its dimensions go by."""
    if name.startswith(FINAL_NORM):
        return FINAL_NORM
    return name if name in OF_THE_MODEL else name.rpartition("_")[0]


def _dims(name: str, array: Tensor, width: int) -> tuple[str, ...]:
    """Name an array's axes; that of an embedding of another width than the stream's is its own."""
    dims = DIMS[_kind(name)]
    return dims if name != "embed" or array.shape[-1] == width else (*dims[:-1], "d_embed")


def _layer(name: str) -> int:
    return int(name.rpartition("_")[2])


_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _check_ids(model: nn.Module, input_ids: Tensor) -> None:
    if not isinstance(input_ids, Tensor):
        raise ValueError(f"input_ids must be a torch.Tensor; got {type(input_ids).__name__}")
    if input_ids.ndim != 2 or input_ids.dtype not in _INTEGERS:
        raise ValueError(
            "input_ids must be integers of shape (example, token); got "
            f"{input_ids.dtype} of shape {tuple(input_ids.shape)}"
        )
    if input_ids.numel() == 0:
        raise ValueError(f"input_ids is empty: {tuple(input_ids.shape)}")
    count = vocabulary_size(model)
    low, high = int(input_ids.min()), int(input_ids.max())
    if count is not None and (low < 0 or high >= count):
        odd = low if low < 0 else high
        raise ValueError(f"token id {odd} is no row of the embedding, which has 0 to {count - 1}")
    _check_length(model, input_ids.shape[1])


def _check_length(model: nn.Module, length: int) -> None:
    limit = max_sequence_length(model)
    if limit is not None and length > limit:
        raise ValueError(
            f"input_ids have {length} tokens, and {type(model).__name__} takes at most {limit}"
        )
