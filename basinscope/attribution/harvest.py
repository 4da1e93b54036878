"""harvest_attributions(): from a model and a data set to a store of attributions."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from basinscope.attribution.backward import BatchAttribution, Importance
from basinscope.io.attributions import AttributionWriter
from basinscope.io.attributions_layout import EMBED, METRICS, OUTPUT, OUTPUT_TOKENS, counts_of
from basinscope.io.memory import free_memory
from basinscope.models.canonical import LinearMap, weight_of
from basinscope.models.components import Components, neurons
from basinscope.models.forward import (
    evaluating,
    max_sequence_length,
    to_device,
    uncompiled,
    vocabulary_size,
)
from basinscope.models.head import NoLinearHeadError, output_embeddings
from basinscope.models.passes import require_unchanged
from basinscope.models.positions import plain
from basinscope.models.structure import require_module
from basinscope.sampling.data import check_dataset, dataset_digest, read_rows
from basinscope.sampling.identity import describe_function, describe_model
from basinscope.sampling.interrupt import StopRequest, stop_on_signals
from basinscope.sampling.job import check_vocabulary, choose_device
from basinscope.sampling.progress import show_count

if TYPE_CHECKING:
    from datasets import Dataset

SAVE_SECONDS = 60.0  # between two saves, or ten times what one takes


@torch.inference_mode(mode=False)
@torch.enable_grad()
def harvest_attributions(
    model: nn.Module,
    dataset: Dataset,
    *,
    output_path: str | os.PathLike[str],
    batch_size: int,
    components: str | Mapping[str, Components] = "neurons",
    targets: Sequence[str] | None = None,
    sources: Sequence[str] | None = None,
    output_tokens: Sequence[int] = (),
    n_batches: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    importance: Importance | None = None,
    importance_threshold: float = 0.0,
    alive: Mapping[str, Any] | None = None,
    targets_at_once: int | None = None,
    device: str | torch.device | None = None,
    progress: bool | None = None,
) -> Path:
    r"""Sum over a data set what components, and tokens, contribute to other components.

    With y_t the sum over a batch's positions of target t's activation, times its importance, and
    x_s a source's activation at one position, times its importance, an attribution is

    .. math:: a = \frac{\partial y_t}{\partial x_s} x_s

    and direct: the forward pass is cut at all components, and what is none lets gradients through.
    Three sums over positions and batches are stored, in float64: of a (``attr``), of the same with
    \|activation\| in y (``attr_abs``), by its own backward pass, and of a² (``mean_squared_attr``).
    A token's attribution is the sum over the width of its embedding.

    Parameters
    ----------
    model : nn.Module
        A Hugging Face causal LM. It is left as it was, whatever happens.
    dataset : datasets.Dataset
        With a column ``input_ids`` of equally long rows. Batch i has its rows from i
        ``batch_size`` on; the last may be short.
    output_path : path
        The store. If it exists with the same settings it is continued. Each rank needs its own;
        ``basinscope.merge_attributions`` adds them up.
    batch_size : int
        Sequences per batch. A stop loses at most the batches since the last save.
    components : "neurons" or mapping of str to Components
        What ``basinscope.models.components`` makes, by canonical name. Layers left out are not
        cut: gradients pass through them.
    targets : sequence of str, optional
        Names of layers among the components, and "output": the directions of the residual stream
        that the unembedding reads. Default: all.
    sources : sequence of str, optional
        Names of layers among the components, and "embed". Default: all; of these a target's are
        those that it depends on. The forward pass is cut at the others all the same. The sums of
        "embed" have a column for every token id, and are often most of the memory.
    output_tokens : sequence of int
        Token ids that are targets themselves, y the sum of their logits without bias or scale.
        ``attr`` of any token follows from "output"; the two other metrics do not.
    n_batches : int, optional
        Batches over all ranks. Default: the whole data set.
    rank, world_size : int
        This process takes batches rank, rank + world_size, ...
    importance : callable, optional
        ``({name: activations (batch, token, C)}, input_ids (batch, token)) -> {name: importances
        (batch, token, C)}``, called without gradients. 1 for layers that it leaves out. Constants
        for the gradients. Known to the store by its code and by what is fixed with it, as a
        ``loss_fn`` of :func:`basinscope.sample` is.
    importance_threshold : float
        Positions of greater importance are counted as active.
    alive : mapping of str to bool array (C,), optional
        Components of these layers that are False have importance 0. What has importance 0 all over
        a batch costs nothing in it, as target or as source. Which components are dead is known
        after a harvest only, from its mean importances: harvest a few batches first to learn it.
    targets_at_once : int, optional
        Targets per backward pass. Default: as many as keep its widest tensor within 4 MiB, which a
        CPU's cache holds, and at most 16 (on a GPU 64 MiB and 64). Sums differ by rounding only.
    device : str or torch.device, optional
        Where the model runs meanwhile. Default: where it is.
    progress : bool, optional
        True: lines on stderr; False: nothing; None: a bar on a terminal, lines elsewhere.

    Returns
    -------
    Path
        The store, completed.

    Raises
    ------
    TypeError, ValueError
        Before any work, with what is valid: arguments, data set, layers, components; a data set
        with ids that the model does not know; sums too large for the free memory; a model inside a
        block of :func:`basinscope.intervened`.
    FloatingPointError
        If activations or attributions become infinite or NaN, which no sum would survive.
    StoreMismatchError
        If the store has other settings; names each that differs.
    AttributionLockedError
        If another process writes the store.
    """
    _check_numbers(batch_size, n_batches, rank, world_size, targets_at_once, importance_threshold)
    output_tokens = _token_ids(output_tokens)
    if importance is not None and not callable(importance):
        raise TypeError(
            "importance must be a function (activations, input_ids) -> importances by layer, or "
            f"None; got {type(importance).__name__}"
        )
    require_module(model)
    require_unchanged(model, "harvest_attributions()")
    model = uncompiled(model)
    batches, rows, fingerprint = _plan(model, dataset, batch_size, n_batches, rank, world_size)
    with _prepared(model, device):
        embedding, unembedding, head = _ends(model)
        parts = _components(model, components)
        chosen = _targets(parts, targets, output_tokens, unembedding, head)
        starts = _sources(parts, sources)
        masks = _alive(parts, alive)
        place = next(model.get_submodule(embedding).parameters()).device

        def batch(number: int) -> Tensor:
            numbers = range(number * batch_size, min((number + 1) * batch_size, rows))
            return torch.tensor(read_rows(dataset, numbers), device=place)

        attribution = BatchAttribution(
            model, parts, chosen, sources=starts, embedding=embedding, unembedding=unembedding,
            importance=importance, importance_threshold=importance_threshold, alive=masks,
            targets_at_once=targets_at_once, input_ids=batch(0),
        )  # fmt: skip
        sizes = {name: part.size for name, part in {**chosen, **parts}.items()}
        sizes[EMBED] = vocabulary_size(model) or 0
        edges = {(t, s): (sizes[t], sizes[s]) for t, s in attribution.edges}
        _require_edges(edges, chosen, starts)
        _require_memory(edges)
        with (
            AttributionWriter.create_or_continue(
                output_path,
                metadata={
                    "model": describe_model(model),
                    "layers": _layers(parts, chosen, embedding, sizes[EMBED]),
                    "components_sha256": _digest_of(parts, masks),
                    "importance": None if importance is None else describe_function(importance),
                    "importance_threshold": float(importance_threshold),
                    "output_token_ids": output_tokens,
                    "dataset_fingerprint": fingerprint,
                    "batch_size": int(batch_size),
                    "n_batches": None if n_batches is None else int(n_batches),
                    "parts": [[int(rank), int(world_size)]],
                },
                edges=edges,
                counts=_count_shapes(parts, chosen, sizes[EMBED]),
                unembedding=_weight(head) if OUTPUT in chosen else None,
            ) as writer,
            stop_on_signals() as stop,
        ):
            if not writer.completed:
                _run(attribution, writer, batches, batch, stop, progress)
    return writer.path


def _check_numbers(
    batch_size: int,
    n_batches: int | None,
    rank: int,
    world_size: int,
    targets_at_once: int | None,
    importance_threshold: float,
) -> None:
    whole = {
        "batch_size": batch_size,
        "n_batches": n_batches,
        "world_size": world_size,
        "targets_at_once": targets_at_once,
    }
    for name, value in whole.items():
        if value is None and name in ("n_batches", "targets_at_once"):
            continue
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
    if isinstance(rank, bool) or not isinstance(rank, int | np.integer) or rank < 0:
        raise ValueError(f"rank={rank!r} must be a whole number of at least 0")
    if rank >= world_size:
        raise ValueError(
            f"rank={rank} is none of world_size={world_size}: ranks are 0 to {world_size - 1}"
        )
    if not 0 <= importance_threshold < float("inf"):
        raise ValueError(f"importance_threshold={importance_threshold!r} must be 0 or more")


def _token_ids(given: Any) -> list[int]:
    """Give token ids as Python's own numbers."""
    listed = plain(given)
    ids: list[Any] = [plain(token) for token in listed] if isinstance(listed, Sequence) else [None]
    if isinstance(given, str) or not all(type(token) is int for token in ids):
        raise TypeError(f"output_tokens={given!r} must be a list of token ids, such as [1, 2]")
    return ids


def _plan(
    model: nn.Module,
    dataset: Any,
    batch_size: int,
    n_batches: int | None,
    rank: int,
    world_size: int,
) -> tuple[list[int], int, str]:
    """Check the data set; give this rank's batches, the rows of all ranks, and their hash."""
    rows, length = check_dataset(dataset, "dataset", least_tokens=1)
    limit = max_sequence_length(model)
    if limit is not None and length > limit:
        raise ValueError(
            f"dataset's sequences have {length} tokens, and {type(model).__name__} takes at most "
            f"{limit}: cut them shorter (tokenize_and_concatenate(max_length={limit}))"
        )
    available = -(-rows // batch_size)
    if n_batches is not None and n_batches > available:
        raise ValueError(
            f"n_batches={n_batches}, and dataset has {rows} rows: {available} batches of "
            f"batch_size={batch_size}"
        )
    total = available if n_batches is None else n_batches
    rows = min(rows, total * batch_size)
    check = partial(check_vocabulary, model, name="dataset")
    digest = dataset_digest(dataset, rows, check)
    return list(range(rank, total, world_size)), rows, f"sha256 {digest}"


@contextmanager
def _prepared(model: nn.Module, device: str | torch.device | None) -> Iterator[None]:
    """Let a model run on a device, without dropout and without gradients of its weights."""
    parameters = list(model.parameters())
    home = {parameter.device for parameter in parameters}
    asked = None if device is None else choose_device(device)
    moves = asked is not None and home != {torch.empty(0, device=asked).device}
    if moves and len(home) > 1:
        raise ValueError(
            f"the model is spread over {', '.join(map(str, sorted(map(str, home))))}: leave device "
            "out to run it there"
        )
    required = [parameter.requires_grad for parameter in parameters]
    try:
        if moves and asked is not None:
            to_device(model, asked)
        for parameter in parameters:
            parameter.requires_grad_(False)
        with evaluating(model):
            yield
    finally:
        for parameter, was in zip(parameters, required, strict=True):
            parameter.requires_grad_(was)
        if moves:
            to_device(model, home.pop())


def _ends(model: nn.Module) -> tuple[str, str, nn.Linear]:
    """Name the modules of a model's token embedding and unembedding, and give the latter."""
    try:
        head = output_embeddings(model)
    except NoLinearHeadError as error:
        raise ValueError(
            f"attributions start at a token embedding and end at a linear unembedding: {error}. "
            "Give a Hugging Face causal LM"
        ) from error
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    names = {id(module): name for name, module in model.named_modules()}
    return names[id(embedding)], names[id(head)], head


def _components(
    model: nn.Module, components: str | Mapping[str, Components]
) -> dict[str, Components]:
    """Check components, and have their factors where their modules are."""
    if isinstance(components, str) and components == "neurons":
        return neurons(model)
    if not isinstance(components, Mapping):
        raise TypeError(
            f"components={components!r} must be 'neurons', or a dict of canonical name to "
            "Components: what neurons(), singular_directions() or rank_one_factors() make"
        )
    placed = {}
    for name, part in components.items():
        if not isinstance(part, Components):
            raise TypeError(
                f"components[{name!r}] is a {type(part).__name__}, not Components: "
                "rank_one_factors(model, {name: (V, U)}) makes them"
            )
        if part.name != name:
            raise ValueError(f"components[{name!r}] are those of {part.name!r}")
        place = weight_of(model, part.linear).device
        V, U = (None if t is None else t.to(place) for t in (part.V, part.U))
        placed[name] = replace(part, V=V, U=U)
    return placed


def _targets(
    components: Mapping[str, Components],
    targets: Sequence[str] | None,
    ids: Sequence[int],
    unembedding: str,
    head: nn.Linear,
) -> dict[str, Components]:
    """Give the targets that were asked for, those at the unembedding last."""
    valid = [*components, OUTPUT]
    wanted = valid if targets is None else [targets] if isinstance(targets, str) else list(targets)
    if unknown := [str(name) for name in wanted if name not in valid]:
        raise ValueError(
            f"targets names {', '.join(unknown)}, which is no target here; there are "
            f"{', '.join(valid)}"
        )
    found = {name: part for name, part in components.items() if name in wanted}
    at = LinearMap(unembedding)
    if OUTPUT in wanted:
        found[OUTPUT] = Components(OUTPUT, at, head.in_features, None, None, "output")
    if ids:
        low, high = min(ids), max(ids)
        if low < 0 or high >= head.out_features or len(set(ids)) < len(ids):
            raise ValueError(
                f"output_tokens must be different ids from 0 to {head.out_features - 1}; got {ids}"
            )
        reads = head.weight.detach()[list(ids)].T
        reads = reads.to(torch.promote_types(reads.dtype, torch.float32))
        found[OUTPUT_TOKENS] = Components(OUTPUT_TOKENS, at, len(ids), reads, None, "output")
    if not found:
        raise ValueError("there is nothing to harvest: name a target or an output token")
    return found


def _sources(components: Mapping[str, Components], sources: Sequence[str] | None) -> list[str]:
    valid = [EMBED, *components]
    wanted = valid if sources is None else [sources] if isinstance(sources, str) else list(sources)
    if unknown := [str(name) for name in wanted if name not in valid]:
        raise ValueError(
            f"sources names {', '.join(unknown)}, which is no source here; there are "
            f"{', '.join(valid)}"
        )
    return wanted


def _alive(
    components: Mapping[str, Components], alive: Mapping[str, Any] | None
) -> dict[str, Tensor]:
    masks = {}
    for name, given in (alive or {}).items():
        if name not in components:
            raise ValueError(
                f"alive names {name!r}, which is none of the components: {', '.join(components)}"
            )
        mask = torch.as_tensor(given)
        if mask.dtype != torch.bool or mask.shape != (components[name].size,):
            raise ValueError(
                f"alive[{name!r}] must be a bool array of shape ({components[name].size},); got "
                f"{mask.dtype} of {tuple(mask.shape)}"
            )
        masks[name] = mask
    return masks


def _require_edges(
    edges: Collection[tuple[str, str]], targets: Collection[str], sources: Collection[str]
) -> None:
    if not edges:
        raise ValueError(
            f"there is nothing to harvest: none of the targets ({', '.join(targets)}) depends "
            f"directly on one of the sources ({', '.join(sources) or 'none'})"
        )


def _require_memory(edges: Mapping[tuple[str, str], tuple[int, int]]) -> None:
    """Refuse sums that do not fit into what is free."""
    bytes_of = {edge: 8 * len(METRICS) * rows * columns for edge, (rows, columns) in edges.items()}
    needed, free = sum(bytes_of.values()), free_memory()
    if needed > free:
        target, source = max(bytes_of, key=lambda edge: bytes_of[edge])
        raise ValueError(
            f"the sums of {len(edges)} pairs of layers take {needed / 2**30:.1f} GiB, and "
            f"{free / 2**30:.1f} GiB are free (the largest, from {source} to {target}, takes "
            f"{bytes_of[target, source] / 2**30:.1f}): name fewer targets or sources, or "
            "give fewer components"
        )


def _layers(
    components: Mapping[str, Components],
    targets: Mapping[str, Components],
    embedding: str,
    vocabulary: int,
) -> dict[str, dict[str, Any]]:
    """Describe every layer for the store."""
    described = {EMBED: {"module": embedding, "size": vocabulary, "kind": "embedding"}}
    for name, part in {**components, **targets}.items():
        if name != OUTPUT_TOKENS:
            described[name] = {"module": part.linear.module, "size": part.size, "kind": part.kind}
    return described


def _count_shapes(
    components: Mapping[str, Components], targets: Mapping[str, Components], vocabulary: int
) -> dict[str, dict[str, tuple[int, ...]]]:
    sizes = {name: part.size for name, part in components.items()} | {EMBED: vocabulary}
    if OUTPUT in targets:
        sizes[OUTPUT] = targets[OUTPUT].size
    return {layer: {name: (size,) for name in counts_of(layer)} for layer, size in sizes.items()}


def _weight(head: nn.Linear) -> np.ndarray:
    weight: np.ndarray = head.weight.detach().float().cpu().numpy()
    return weight


def _digest_of(components: Mapping[str, Components], alive: Mapping[str, Tensor]) -> str:
    """Name components by a hash of all that makes them."""
    digest = hashlib.sha256()
    for name, part in sorted(components.items()):
        digest.update(f"{name} {part.linear.module} {part.kind}".encode())
        for values in (part.linear.rows, part.V, part.U, alive.get(name)):
            if values is not None:
                array = np.ascontiguousarray(torch.as_tensor(values).cpu().numpy())
                digest.update(f"{array.shape} {array.dtype}".encode())
                digest.update(array.data)
            digest.update(b";")
    return digest.hexdigest()


def _run(
    attribution: BatchAttribution,
    writer: AttributionWriter,
    batches: Sequence[int],
    batch: Callable[[int], Tensor],
    stop: StopRequest,
    progress: bool | None,
) -> None:
    """Add the batches that are not yet in the store, saving now and then."""
    sums, counts, tokens = writer.sums()
    done = writer.batches_done
    saved, pause = time.monotonic(), SAVE_SECONDS
    with show_count("batch", len(batches), progress) as report:
        report(done)
        while done < len(batches) and not stop.asked:
            input_ids = batch(batches[done])
            attribution.add(input_ids, sums, counts)
            done, tokens = done + 1, tokens + input_ids.numel()
            report(done)
            if done == len(batches) or stop.asked or time.monotonic() - saved >= pause:
                begun = time.monotonic()
                writer.save(sums, counts, tokens=tokens, batches_done=done)
                saved = time.monotonic()
                pause = max(SAVE_SECONDS, 10 * (saved - begun))
    if done == len(batches):
        writer.finish()
