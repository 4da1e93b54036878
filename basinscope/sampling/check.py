"""A look at a model and its data before sampling: what would make the numbers mean something else.

Everything is tried on a copy of the model: a handful of forward passes on a few sequences.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from basinscope.models.entry import NoEntryError, find_entry
from basinscope.models.forward import (
    inside_bridge,
    max_sequence_length,
    to_device,
    token_logits,
    trained_length,
    uncompiled,
    vocabulary_size,
)
from basinscope.models.head import LinearHead, NoLinearHeadError, find_linear_head
from basinscope.models.restrictions import create_param_masks, structure_of
from basinscope.models.structure import (
    Layer,
    ModelStructure,
    UnknownStructureError,
    layer_modules,
    used_parameters,
)
from basinscope.sampling.chain import copied, cuda_devices
from basinscope.sampling.data import check_dataset, read_rows
from basinscope.sampling.findings import Finding, ModelReport
from basinscope.sampling.job import PROBE_TOKENS, check_masks, choose_device
from basinscope.sampling.losses import next_token_loss

if TYPE_CHECKING:
    from datasets import Dataset

    Restrictions = Mapping[str, Mapping[str, Tensor | None] | str | Sequence[str] | None]

ROWS_READ = 2048  # evenly spaced over the data set, whose ids are looked at
ROUNDING = 10.0  # times what rounding each module's output once does, is still rounding
LEAST_DIFFERENCE = 1e-6  # nats per nat of loss that float32 losses cannot tell
GUESSING = 0.9  # share of the loss of guessing at which a model looks untrained
SHOWN = 4  # names in a sentence


def check_model(
    model: nn.Module,
    dataset: Dataset,
    *,
    restrictions: Restrictions | Sequence[str] | None = None,
    batch_size: int = 4,
    device: str | torch.device | None = None,
) -> ModelReport:
    """Look at a model and its data before sampling.

    Takes about a dozen forward passes of ``batch_size`` sequences, on a copy of the model, with
    dropout off as ``sample`` has it. The topics of the findings, and the keys of their values:

    =============  ===============================================================================
    structure      layers, heads, groups and head size: ``num_layers``, and per layer
                   ``num_heads``, ``num_groups``, ``head_size``, ``unknown`` (why, or "")
    restrictions   parameters that no restriction moves: ``untouched``, ``weights`` in them
    dtypes         of the parameters: ``weights`` of each dtype
    tied           names of one parameter: ``tied``; parameters that overlap in memory without
                   being one: ``overlapping``
    dropout        ``modules`` of dropout in train mode, and by how many nats two passes over the
                   same batch differ: ``difference`` (None in eval mode)
    vocabulary     ``lowest`` and ``highest`` id in the data, ``vocabulary`` (None: unknown)
    length         ``sequence_length`` and the model's ``limit`` (None: no limit is known)
    loss           ``mean`` of the finite losses, loss of ``guessing``, both in nats;
                   ``non_finite`` losses of ``tokens``
    batch          ``differences`` in nats of a sequence's losses "alone", "reversed" and
                   "among_others" from those in its batch, ``largest_difference``, ``repeated``
                   (the same batch twice) and ``rounding`` (what rounding alone does)
    head           ``module`` of a linear head, whose loss needs no logits in memory; or None
    entry          ``layer`` that forward passes enter at if only the last one moves; or None
    =============  ===============================================================================

    Where the data's ids do not fit the model, the last four and "dropout" are left out.

    Parameters
    ----------
    model : nn.Module
        As :func:`basinscope.sample` takes it; it is not changed.
    dataset : datasets.Dataset
        What would be sampled on: a column ``input_ids``, all rows of one length.
    restrictions : mapping or list of str, optional
        As :func:`basinscope.susceptibilities` takes them. Default: attention and MLP of every
        layer, embedding and unembedding.
    batch_size : int
        Sequences per forward pass, at least 2.
    device : str or torch.device, optional
        Default: the GPU if there is one.

    Returns
    -------
    ModelReport
        ``print`` shows it; ``report.warnings`` are what should be changed before sampling.

    Raises
    ------
    TypeError, ValueError
        If the model, the data set, a restriction or an argument is none; says what would be valid.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    model = uncompiled(model)
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 2:
        raise ValueError(
            f"batch_size must be a whole number of at least 2, so that a sequence has company; got "
            f"{batch_size!r}"
        )
    parameters = used_parameters(model)
    if not parameters:
        raise ValueError(f"{type(model).__name__} has no parameters to sample")
    if any(parameter.is_meta for parameter in parameters.values()):
        raise ValueError(f"{type(model).__name__} is on the meta device: load its weights first")
    chosen = choose_device(device)
    rows, _ = check_dataset(dataset, "dataset")
    ids = read_rows(dataset, np.unique(np.linspace(0, rows - 1, ROWS_READ).astype(np.int64)))

    with torch.random.fork_rng(devices=cuda_devices(chosen)):
        copy = to_device(copied(model), chosen)
        findings = [
            _structure(copy),
            _restrictions(copy, restrictions),
            _dtypes(parameters),
            _tied(model),
            _vocabulary(copy, ids),
            _length(copy, ids),
        ]
        if findings[-2].level != "warning":
            every = max(1, len(ids) // (2 * batch_size))
            some = ids[np.arange(2 * batch_size) * every % len(ids), : max_sequence_length(copy)]
            findings += _tried(copy, torch.from_numpy(some).to(chosen))
    return ModelReport(
        type(model).__name__, sum(p.numel() for p in parameters.values()), tuple(findings)
    )


def _structure(model: nn.Module) -> Finding:
    try:
        layers = structure_of(model).layers
    except UnknownStructureError as error:
        text = f"No layers were found, so only whole parameters can be named: {error}"
        return Finding("structure", "note", text, {"num_layers": 0})
    values = {
        "num_layers": len(layers),
        "num_heads": [layer.num_heads for layer in layers],
        "num_groups": [layer.num_groups for layer in layers],
        "head_size": [layer.head_size for layer in layers],
        "unknown": [layer.unknown for layer in layers],
    }
    text = f"{len(layers)} layers{_described(layers)}."
    reasons = [layer.unknown for layer in layers if layer.unknown]
    if reasons:
        return Finding("structure", "note", f"{text} Heads cannot be named: {reasons[0]}", values)
    return Finding("structure", "ok", text, values)


def _described(layers: Sequence[Layer]) -> str:
    """What layers have, those in a row that are alike together."""
    runs = [
        (kind, [number for number, _ in run])
        for kind, run in groupby(enumerate(layers), lambda numbered: _heads(numbered[1]))
    ]
    if len(runs) == 1:
        return f", each with {runs[0][0]}"
    return ": " + "; ".join(
        f"{numbers[0]} to {numbers[-1]} with {kind}"
        if len(numbers) > 1
        else f"{numbers[0]} with {kind}"
        for kind, numbers in runs
    )


def _heads(layer: Layer) -> str:
    if layer.unknown:
        return "heads that are not known"
    if not layer.num_heads:
        return "no attention"
    grouped = layer.num_groups != layer.num_heads
    groups = f" in {layer.num_groups} groups" if grouped else ""
    return f"{layer.num_heads} heads of size {layer.head_size}{groups}"


def _restrictions(model: nn.Module, restrictions: Restrictions | Sequence[str] | None) -> Finding:
    parameters = used_parameters(model)
    which = "The restrictions that are given"
    if restrictions is None:
        which = "Attention and MLP of all layers, embedding and unembedding"
        try:
            moved = _moved_by_parts(structure_of(model))
        except UnknownStructureError:
            text = "Not looked at, as no layers were found."
            return Finding("restrictions", "note", text, {"untouched": [], "weights": 0})
    else:
        moved = _moved_by(model, restrictions)
    untouched = [name for name in parameters if name not in moved]
    weights = sum(parameters[name].numel() for name in untouched)
    values = {"untouched": untouched, "weights": weights}
    if not untouched:
        return Finding("restrictions", "ok", f"{which} move every parameter.", values)
    everything = sum(parameter.numel() for parameter in parameters.values())
    text = (
        f"{which} leave {len(untouched)} of {len(parameters)} parameters where they are, "
        f"{weights:,} of {everything:,} weights ({weights / everything:.1%}): "
        f"{_shown(_alike(untouched))}. Only 'full' moves them, so the parts do not add up to it; a "
        "parameter's own name is a restriction too."
    )
    return Finding("restrictions", "note", text, values)


def _moved_by_parts(structure: ModelStructure) -> set[str]:
    in_layers = {n for layer in structure.layers for n in (*layer.attention, *layer.mlp)}
    return in_layers.union(structure.embed, structure.unembed)


def _moved_by(model: nn.Module, restrictions: Restrictions | Sequence[str]) -> set[str]:
    """Names of the parameters that some restriction moves, "full" aside."""
    if not isinstance(restrictions, Mapping):
        if isinstance(restrictions, str) or not isinstance(restrictions, Sequence):
            raise TypeError(
                "restrictions must be a list of restrictions, or a mapping of name to restriction "
                f"or masks; got {restrictions!r}"
            )
        restrictions = {name: name for name in restrictions}
    moved: set[str] = set()
    for wanted in restrictions.values():
        if wanted is None or (isinstance(wanted, str) and wanted.strip().lower() == "full"):
            continue
        if isinstance(wanted, Mapping):
            masks = check_masks(model, wanted)
        else:
            masks = create_param_masks(model, wanted)
        moved |= {name for name, mask in masks.items() if mask is None or bool(mask.any())}
    return moved


def _dtypes(parameters: Mapping[str, nn.Parameter]) -> Finding:
    weights: Counter[torch.dtype] = Counter()
    for parameter in parameters.values():
        weights[parameter.dtype] += parameter.numel()
    listed = ", ".join(f"{count:,} in {_word(dtype)}" for dtype, count in weights.most_common())
    values = {"weights": {_word(dtype): count for dtype, count in weights.items()}}
    odd = [name for name, p in parameters.items() if not p.is_floating_point()]
    if odd:
        text = (
            f"Quantised weights cannot be sampled, and {_shown(_alike(odd))} are: {listed}. Load "
            "the model in float32 or bfloat16."
        )
        return Finding("dtypes", "warning", text, values)
    if any(dtype.itemsize < 4 for dtype in weights):
        text = (
            f"Not all weights have 32 bits: {listed}. Small steps may be lost when 16-bit weights "
            "are rounded (sample() warns, and has weight_rounding='stochastic'); float32 weights "
            "with autocast='bfloat16' are nearly as fast."
        )
        return Finding("dtypes", "note", text, values)
    if len(weights) > 1:
        return Finding("dtypes", "note", f"Weights of several dtypes: {listed}.", values)
    return Finding("dtypes", "ok", f"All weights are {_word(next(iter(weights)))}.", values)


def _tied(model: nn.Module) -> Finding:
    names: dict[int, list[str]] = {}
    own: dict[int, nn.Parameter] = {}
    used = {id(parameter) for parameter in used_parameters(model).values()}
    inside = inside_bridge(model)
    for place, module in inside.named_modules(remove_duplicate=inside is not model):  # has aliases
        for name, parameter in module.named_parameters(place, False, remove_duplicate=False):
            if id(parameter) in used:
                names.setdefault(id(parameter), []).append(name)
                own[id(parameter)] = parameter
    tied = [group for group in names.values() if len(group) > 1]
    overlapping = [
        sorted(names[key][0] for key in group)
        for group in _side_by_side(own)
        if len(group) > 1 and _share_elements([own[key] for key in group])
    ]
    values = {"tied": tied, "overlapping": overlapping}
    if overlapping:
        text = (
            f"{_shown(' and '.join(group) for group in overlapping)} lie in the same memory "
            "without being one parameter: sample() would move copies of them apart. Assign one "
            "to the other's module, or clone it."
        )
        return Finding("tied", "warning", text, values)
    if tied:
        text = (
            f"Tied: {_shown(' = '.join(group) for group in tied)}. Each is one parameter, under "
            "its first name; a restriction to one of the places moves the other too."
        )
        return Finding("tied", "note", text, values)
    return Finding("tied", "ok", "No parameters share their memory.", values)


def _share_elements(parameters: Sequence[nn.Parameter]) -> bool:
    """Whether two parameters have an element in common, and not only lie between each other's."""
    first = min(parameter.data_ptr() for parameter in parameters)
    size = parameters[0].element_size()
    if any(parameter.element_size() != size for parameter in parameters):
        return True
    starts = [(parameter.data_ptr() - first) // size for parameter in parameters]
    taken = torch.zeros(
        max(start + _extent(p) for start, p in zip(starts, parameters, strict=True)),
        dtype=torch.bool,
    )
    for start, parameter in zip(starts, parameters, strict=True):
        mine = taken.as_strided(parameter.shape, parameter.stride(), start)
        if mine.any():
            return True
        mine.fill_(True)
    return False


def _extent(parameter: Tensor) -> int:
    """Elements from its first to its last in memory."""
    return 1 + sum((n - 1) * s for n, s in zip(parameter.shape, parameter.stride(), strict=True))


def _side_by_side(parameters: Mapping[int, nn.Parameter]) -> list[list[int]]:
    """Group parameters of which one begins in memory before another one ends."""
    spans = []
    for key, parameter in parameters.items():
        if parameter.numel():
            start = parameter.data_ptr()
            spans.append((start, start + _extent(parameter) * parameter.element_size(), key))
    groups: list[list[int]] = []
    reached = 0
    for start, end, key in sorted(spans):
        if start < reached:
            groups[-1].append(key)
        else:
            groups.append([key])
        reached = max(reached, end)
    return groups


def _vocabulary(model: nn.Module, ids: np.ndarray) -> Finding:
    known = vocabulary_size(model)
    lowest, highest = int(ids.min()), int(ids.max())
    values = {"lowest": lowest, "highest": highest, "vocabulary": known}
    found = f"The ids of {len(ids):,} rows go from {lowest} to {highest}"
    if lowest < 0 or (known is not None and highest >= known):
        valid = "0 or more" if known is None else f"0 to {known - 1}"
        text = (
            f"{found}, and the model knows {valid}: tokenize with this model's own tokenizer. The "
            "model was not run."
        )
        return Finding("vocabulary", "warning", text, values)
    if known is None:
        text = f"{found}; how many the model knows cannot be told."
        return Finding("vocabulary", "note", text, values)
    return Finding("vocabulary", "ok", f"{found}; the model knows {known}.", values)


def _length(model: nn.Module, ids: np.ndarray) -> Finding:
    length, limit = ids.shape[1], max_sequence_length(model)
    values = {"sequence_length": length, "limit": limit}
    if limit is not None and length > limit:
        text = (
            f"Sequences have {length} tokens and the model takes at most {limit}: cut them "
            f"shorter (tokenize_and_concatenate(max_length={limit})). For this report they are "
            "cut."
        )
        return Finding("length", "warning", text, values)
    trained = trained_length(model)
    if limit is None and trained is not None and length > trained:
        text = (
            f"Sequences have {length} tokens, and the model's configuration names {trained} "
            "(max_position_embeddings): it runs, on positions that it may never have seen."
        )
        return Finding("length", "warning", text, {**values, "trained": trained})
    known = f"; the model takes up to {limit}" if limit else "; nothing limits them"
    return Finding("length", "ok", f"Sequences have {length} tokens{known}.", values)


def _tried(model: nn.Module, ids: Tensor) -> list[Finding]:
    """What shows when the model runs; ``ids`` (2 batches, token) fit it."""
    modes = {name: module.training for name, module in model.named_modules()}
    model.eval()
    few = ids[:1, :PROBE_TOKENS]
    try:
        vocabulary = token_logits(model, few).shape[-1]
        head, about_head = _head(model, few)
        trial = _Trial(model, ids, head)
        torch.manual_seed(0)
        losses = trial.losses(ids)
    except IndexError as error:
        text = (
            f"The model cannot take these sequences ({error}): tokenize with its own tokenizer, "
            "and to its length."
        )
        return [Finding("loss", "warning", text, {})]
    return [
        _loss(losses, vocabulary),
        _batch(trial, losses.chunk(2)[0]),
        about_head,
        _entry(model, few),
        _dropout(trial, modes),
    ]


@dataclass(frozen=True)
class _Trial:
    """A copy of a model, two batches of ids (sequence, token), and how losses are taken."""

    model: nn.Module
    ids: Tensor
    head: LinearHead | None

    @torch.no_grad()
    def losses(self, ids: Tensor) -> Tensor:
        """(sequence, token_pos) in nats, float64."""
        size = len(self.ids) // 2
        return torch.cat(
            [next_token_loss(self.model, batch, self.head).double() for batch in ids.split(size)]
        )


def _loss(losses: Tensor, vocabulary: int) -> Finding:
    finite = losses[losses.isfinite()]
    lost = losses.numel() - finite.numel()
    guessing = math.log(vocabulary)
    mean = float(finite.mean()) if finite.numel() else None
    values = {"mean": mean, "guessing": guessing, "non_finite": lost, "tokens": losses.numel()}
    if lost or mean is None:
        text = (
            f"{lost:,} of {losses.numel():,} losses are NaN or infinite: sample() refuses such a "
            "checkpoint. Check the weights (load them in float32 or bfloat16) and the data."
        )
        return Finding("loss", "warning", text, values)
    found = f"The loss is {mean:.2f} nats per token on {len(losses)} sequences"
    if mean > GUESSING * guessing:
        text = (
            f"{found}, and guessing among {vocabulary:,} ids costs {guessing:.2f}: the model is "
            "untrained, or the data was made with another tokenizer."
        )
        return Finding("loss", "warning", text, values)
    text = f"{found}; guessing among {vocabulary:,} ids costs {guessing:.2f}."
    return Finding("loss", "ok", text, values)


def _batch(trial: _Trial, plain: Tensor) -> Finding:
    """Compare the losses of the first batch, ``plain``, with those in other company."""
    first, others = trial.ids.chunk(2)
    if not plain.isfinite().all():
        text = "Not compared, as losses are not finite."
        return Finding("batch", "note", text, {})
    half = (len(first) + 1) // 2
    mixed = torch.cat([first[:half], others[: len(first) - half]])
    chosen = sorted({0, len(first) // 2, len(first) - 1})
    alone = torch.cat([trial.losses(first[row : row + 1]) for row in chosen])
    differences = {
        "alone": _largest(alone - plain[chosen]),
        "reversed": _largest(trial.losses(first.flip(0)).flip(0) - plain),
        "among_others": _largest(trial.losses(mixed)[:half] - plain[:half]),
    }
    repeated = _largest(trial.losses(first) - plain)
    rounding = _rounding_effect(trial, plain)
    largest = max(differences.values())
    values = {
        "differences": differences,
        "largest_difference": largest,
        "repeated": repeated,
        "rounding": rounding,
    }
    usual = ROUNDING * rounding + LEAST_DIFFERENCE * max(1.0, _largest(plain))
    scale = f"rounding makes up to {usual:.1g}"
    if repeated > usual:
        text = (
            f"The same batch twice gives losses up to {repeated:.2g} nats apart in eval mode "
            f"({scale}): something random is left on. Let it depend on module.training."
        )
        return Finding("batch", "warning", text, values)
    if largest > usual:
        text = (
            f"A sequence's losses change by up to {largest:.2g} nats with what else is in its "
            f"batch ({scale}): experts with a capacity and norms over the batch do that. "
            "Losses then depend on batch_size and on the order of the rows, and influences and "
            "susceptibilities mix sequences. Lift the capacity, or freeze the norm's statistics."
        )
        return Finding("batch", "warning", text, values)
    text = (
        f"A sequence's losses do not depend on what else is in its batch: the largest difference "
        f"is {largest:.1g} nats, and {scale}."
    )
    return Finding("batch", "ok", text, values)


def _rounding_effect(trial: _Trial, plain: Tensor) -> float:
    """Largest change of a loss when each module's output is rounded at random once more.

    Random rounding as in Monte Carlo arithmetic (Parker 1997) shows what other orders of summation
    can do. Chance in the model itself is what it was for the plain losses.
    """
    generator = torch.Generator(trial.ids.device).manual_seed(0)

    def round_again(module: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return None
        exact = output.to(torch.promote_types(output.dtype, torch.float32))
        share = torch.rand(exact.shape, generator=generator, dtype=exact.dtype, device=exact.device)
        eps = torch.finfo(output.dtype).eps
        error = torch.nan_to_num(exact * (2 * share - 1) * eps, 0.0, 0.0, 0.0)  # of masked scores
        return (exact + error).to(output.dtype)

    leaves = [module for module in trial.model.modules() if not list(module.children())]
    hooks = [module.register_forward_hook(round_again) for module in leaves]
    try:
        torch.manual_seed(0)
        return _largest(trial.losses(trial.ids.chunk(2)[0]) - plain)
    finally:
        for hook in hooks:
            hook.remove()


def _head(model: nn.Module, few: Tensor) -> tuple[LinearHead | None, Finding]:
    try:
        head = find_linear_head(model, few)
    except NoLinearHeadError as error:
        text = f"The loss is taken from all logits of a batch at once: {error}."
        return None, Finding("head", "note", text, {"module": None})
    text = f"The loss is taken from {head.module} itself, without its logits in memory."
    return head, Finding("head", "ok", text, {"module": head.module})


def _entry(model: nn.Module, few: Tensor) -> Finding:
    """Try to enter the forward pass at the last layer, as if only that one moved."""
    try:
        last = layer_modules(model)[-1]
        model.requires_grad_(False)
        model.get_submodule(last).requires_grad_(True)
        entry = find_entry(model, few)
    except (UnknownStructureError, NoEntryError) as error:
        why = error if isinstance(error, NoEntryError) else "there is no one list of layers"
        text = f"Every draw runs all layers, under restrictions to upper layers too: {why}."
        return Finding("entry", "note", text, {"layer": None})
    if entry is None:
        text = "No layer lies below all of the last one's weights: every draw runs all layers."
        return Finding("entry", "ok", text, {"layer": None})
    text = "Under a restriction to upper layers, the layers below run once per sequence."
    return Finding("entry", "ok", text, {"layer": entry.first})


def _dropout(trial: _Trial, modes: Mapping[str, bool]) -> Finding:
    """Restore the modes that the model came in, and see whether chance acts."""
    if not any(modes.values()):
        none: dict[str, Any] = {"modules": [], "difference": None}
        return Finding("dropout", "ok", "All modules are in eval mode.", none)
    for name, module in trial.model.named_modules():
        module.training = modes[name]
    active = [
        name
        for name, module in trial.model.named_modules()
        if isinstance(module, _DropoutNd) and module.training and module.p > 0
    ]
    batch = trial.ids.chunk(2)[0]
    differences = trial.losses(batch) - trial.losses(batch)
    difference = _largest(differences[differences.isfinite()])
    values: dict[str, Any] = {"modules": active, "difference": difference}
    if not active and difference == 0:
        text = "The model is in train mode, which changes nothing between two passes."
        return Finding("dropout", "ok", text, values)
    where = _shown(_alike(active)) if active else "none of its modules, but a function"
    text = (
        f"Dropout is on ({where}): the same batch twice gives losses up to {difference:.2g} nats "
        "apart. sample() turns it off, unless train_mode=True; call model.eval() before you "
        "compare with losses of your own."
    )
    return Finding("dropout", "note", text, values)


def _largest(differences: Tensor) -> float:
    """Largest difference, infinite where one of two losses is NaN; 0 of none."""
    sizes = differences.abs().nan_to_num(nan=math.inf, posinf=math.inf)
    return float(sizes.max()) if sizes.numel() else 0.0


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _alike(names: Iterable[str]) -> list[str]:
    """Names of modules and parameters, those of all layers as one."""
    return list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names))


def _shown(names: Iterable[str]) -> str:
    listed = list(names)
    more = len(listed) - SHOWN
    return ", ".join(listed[:SHOWN]) + (f" and {more} more" if more > 0 else "")
