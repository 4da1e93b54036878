"""Activations of whole data sets, streamed to a store."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from basinscope.io.activation_store import ActivationWriter, open_activations
from basinscope.models.activation_cache import ActivationCache, to_numpy
from basinscope.models.extraction import ExtractionConfig, Extractor
from basinscope.models.interventions import Intervention
from basinscope.models.structure import UnknownStructureError
from basinscope.models.unembedding import find_unembedding
from basinscope.sampling.data import check_dataset, dataset_digest, read_rows
from basinscope.sampling.identity import describe_model
from basinscope.sampling.job import check_vocabulary
from basinscope.sampling.layers import quick_linears
from basinscope.sampling.progress import show_count

if TYPE_CHECKING:
    import xarray as xr
    from datasets import Dataset


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

    A batch at a time is held. The same call continues a store that was stopped, from its last whole
    chunk and with the same batches, and returns a completed one as it is.

    Parameters
    ----------
    model : nn.Module
        A Hugging Face causal LM or a TransformerLens model, on its own device.
    dataset : datasets.Dataset
        Column ``input_ids``, all rows of one length.
    config : ExtractionConfig
    output : path
    batch_size : int
        Examples in a forward pass. "mean" and "patch" interventions see one batch, so that with
        them a store is continued with the same size only.
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
        If the data set or the configuration is wrong, as :func:`basinscope.extract` says; before
        the store is made.
    StoreMismatchError
        If ``output`` was made with other settings, or from other data; names each.
    """
    whole = isinstance(batch_size, int | np.integer) and not isinstance(batch_size, bool)
    if not whole or batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r} must be a whole number of at least 1")
    batch_size = int(batch_size)
    rows, _ = check_dataset(dataset, "dataset", least_tokens=1)
    digest = dataset_digest(dataset, rows, partial(check_vocabulary, model, name="dataset"))
    extractor = Extractor(model, config, interventions)

    def batch_at(begin: int) -> ActivationCache:
        numbers = range(begin, min(begin + batch_size, rows))
        with quick_linears(model):
            return extractor(torch.tensor(read_rows(dataset, numbers)))

    see_batch = any(intervention.kind != "zero" for intervention in interventions)
    if see_batch and rows > batch_size and rows % batch_size:
        batch_at(rows // batch_size * batch_size)  # they must fit the last, smaller one too
    cache = batch_at(0)
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
        coords=cache.coords,
        unembedding=_unembedding(model) if save_unembedding else None,
    ) as writer:
        with show_count("example", rows, progress) as report:
            report(writer.examples_done)
            while (done := writer.examples_done) < rows:
                begin = done // batch_size * batch_size
                if begin:
                    del cache  # one at a time
                    cache = batch_at(begin)
                writer.append(_arrays(cache, skip=done - begin))
                report(writer.examples_done)
        writer.finish()
    return open_activations(output)


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
