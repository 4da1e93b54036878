"""Activations of whole data sets, streamed to a store."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from basinscope.io.activation_store import ActivationWriter, open_activations
from basinscope.models.activation_cache import ActivationCache, to_numpy
from basinscope.models.extraction import ExtractionConfig, Extractor
from basinscope.models.interventions import Intervention
from basinscope.models.lengths import by_length, run_by_length
from basinscope.models.passes import require_unchanged
from basinscope.models.structure import UnknownStructureError
from basinscope.models.unembedding import find_unembedding
from basinscope.sampling.data import (
    check_sequences,
    dataset_digest,
    read_rows,
    read_sequences,
)
from basinscope.sampling.identity import describe_model
from basinscope.sampling.job import check_vocabulary
from basinscope.sampling.layers import quick_linears
from basinscope.sampling.progress import show_count

if TYPE_CHECKING:
    import xarray as xr
    from datasets import Dataset

Report = Callable[[int], None]

WINDOW_BYTES = 256 * 2**20  # most bytes of activations that wait for rows of other lengths
WINDOW_BATCHES = 256  # most batches among which rows of one length are looked for


def extract_dataset(
    model: nn.Module,
    dataset: Dataset,
    config: ExtractionConfig,
    *,
    output: str | os.PathLike[str],
    batch_size: int = 8,
    interventions: Sequence[Intervention] = (),
    save_unembedding: bool = True,
    progress: bool | None = None,
) -> xr.DataTree:
    """Run a data set through a model and stream what is asked for to a Zarr store.

    A batch at a time is held; of rows of several lengths, as many batches as give 256 MiB, at most
    256. The same call continues a store that was stopped, from its last whole chunk and with the
    same batches, and returns a completed one as it is.

    Parameters
    ----------
    model : nn.Module
        A Hugging Face causal LM or a TransformerLens model, on its own device.
    dataset : datasets.Dataset
        Column ``input_ids``. Rows may have several lengths: those of one length that are near each
        other run together, and nothing is padded. Positions count all from the start, or all from
        the end (the store then has ``from_end`` for ``position``); ``input_ids`` are -1 where a row
        has no token.
    config : ExtractionConfig
    output : path
    batch_size : int
        Examples in a forward pass. "mean", "patch" and "add" interventions see one batch, so that
        with them a store is continued with the same size only.
    interventions : sequence of Intervention
    save_unembedding : bool
        Store final norm and unembedding beside the activations, so that a logit lens needs neither
        the model nor torch.
    progress : bool, optional
        True: a line now and then on stderr; False: nothing; None: a bar on a terminal.

    Returns
    -------
    xr.DataTree
        As :func:`basinscope.open_activations` opens it.

    Raises
    ------
    ValueError
        If the data set or the configuration is wrong, as :func:`basinscope.extract` says, or the
        model is inside a block of :func:`basinscope.intervened`; before the store is made.
    StoreMismatchError
        If ``output`` was made with other settings, or from other data; names each.
    """
    require_unchanged(model, "extract_dataset()")
    whole = isinstance(batch_size, int | np.integer) and not isinstance(batch_size, bool)
    if not whole or batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r} must be a whole number of at least 1")
    batch_size = int(batch_size)
    rows, lengths, digest = _checked(model, dataset)
    one_length = len(lengths) == 1
    extractor = Extractor(model, config, interventions)
    coords = {} if one_length else extractor.common_positions(lengths)

    def run(begin: int, count: int, report: Report = lambda done: None) -> ActivationCache:
        numbers = range(begin, min(begin + count, rows))
        if one_length:
            with quick_linears(model):
                return extractor(torch.tensor(read_rows(dataset, numbers)))
        # oneDNN would compile for, and keep about a MiB of, every size of a batch
        ids = [torch.tensor(row) for row in read_sequences(dataset, numbers)]
        groups = _reported(by_length(ids, batch_size), begin, report)
        return run_by_length(extractor, ids, groups, coords, width=lengths[-1])

    see_batch = any(intervention.kind in ("mean", "patch", "add") for intervention in interventions)
    if see_batch and one_length and rows > batch_size and rows % batch_size:
        run(rows // batch_size * batch_size, batch_size)  # they must fit the last, smaller one too
    cache = run(0, batch_size if one_length else 1)
    window = batch_size if one_length else _window(cache, batch_size)
    with ActivationWriter.create_or_continue(
        output,
        variables={
            name: (cache.dims[name], tuple(array.shape[1:]), _dtype(array))
            for name, array in cache.items()
        },
        num_examples=rows,
        attrs={
            **cache.metadata,
            "model": {**cache.metadata["model"], **describe_model(model)},
            "dataset": {"rows": rows, "sha256": digest},
            **({"batch_size": batch_size} if see_batch else {}),
        },
        coords={name: ("position", numbers) for name, numbers in cache.coords.items()},
        unembedding=_unembedding(model) if save_unembedding else None,
    ) as writer:
        with show_count("example", rows, progress) as report:
            report(writer.examples_done)
            while (done := writer.examples_done) < rows:
                begin = done // window * window
                if begin or cache.num_examples < min(window, rows):
                    del cache  # one at a time
                    cache = run(begin, window, report)
                writer.append(_arrays(cache, skip=done - begin))
                report(writer.examples_done)
        writer.finish()
    return open_activations(output)


def _checked(model: nn.Module, dataset: Dataset) -> tuple[int, list[int], str]:
    """Check a data set; give its number of rows, their lengths, and its digest."""
    lengths = check_sequences(dataset, "dataset")
    check = partial(check_vocabulary, model, name="dataset")
    return len(dataset), lengths, dataset_digest(dataset, len(dataset), check)


def _reported(
    groups: Sequence[Sequence[int]], done: int, report: Report
) -> Iterator[Sequence[int]]:
    """Give groups of examples one by one, and tell before each how many are done."""
    for group in groups:
        report(done)
        yield group
        done += len(group)


def _window(cache: ActivationCache, batch_size: int) -> int:
    """Choose among how many examples those of one length are looked for: whole batches."""
    example = sum(array[0].nbytes for array in cache.values())
    return batch_size * max(1, min(WINDOW_BATCHES, WINDOW_BYTES // (example * batch_size)))


def _arrays(cache: ActivationCache, skip: int) -> dict[str, np.ndarray]:
    return {name: to_numpy(array[skip:]) for name, array in cache.items()}


def _dtype(array: torch.Tensor) -> str:
    return str(array.dtype).removeprefix("torch.")


def _unembedding(model: nn.Module) -> dict[str, Any] | None:
    """What the store keeps of it; None, with a warning, where the model has none that is known."""
    try:
        found = find_unembedding(model)
    except UnknownStructureError as error:
        warnings.warn(f"stored without an unembedding: {error}", stacklevel=3)
        return None
    parts = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
    absent = {name for name, value in parts.items() if value is None and name != "softcap"}
    return {name: value for name, value in parts.items() if name not in absent}
