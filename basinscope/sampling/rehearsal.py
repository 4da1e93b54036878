"""What a run would take, or why it would be refused, found without sampling."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dask.utils import format_bytes
from torch import nn

from basinscope.io.store import SampleStore, is_store
from basinscope.sampling.config import SamplerConfig
from basinscope.sampling.findings import Finding
from basinscope.sampling.job import ParamMasks, SamplingJob, prepare_job
from basinscope.sampling.sample import checked_place, is_complete


def rehearse(
    model: nn.Module,
    dataset: Any,
    observables: Mapping[str, Any],
    config: SamplerConfig,
    *,
    param_masks: ParamMasks | None,
    device: str | torch.device | None,
    cuda_graph: bool,
    output_path: str | os.PathLike[str] | None,
) -> Finding:
    """Check a run's inputs against each other as ``sample`` does; nothing is written.

    Returns
    -------
    Finding
        "run", a warning if the run would be refused, or its losses may not fit the disk. Its
        values: ``refused`` (why, or ""), and unless that says why, ``chains_left``, ``steps`` of a
        chain, ``sequences_per_step``, ``sequences_per_draw``, ``losses_bytes`` (of the chains that
        are left, before they are compressed) and ``free_bytes`` on the output's disk (None without
        an output).
    """
    try:
        path = None if output_path is None else checked_place(output_path)
        job = prepare_job(
            model,
            dataset,
            observables,
            config,
            param_masks=param_masks,
            loss_fn=None,
            device=device,
            cuda_graph=cuda_graph,
        )
        left = _chains_left(path, job)
    except (TypeError, ValueError, OSError) as error:
        text = f"It would be refused: {error}"
        return Finding("run", "warning", text, {"refused": str(error)})
    losses = _losses_bytes(job) * len(left) // config.num_chains
    free = None if path is None else _free_bytes(path)
    values = {
        "chains_left": left,
        "steps": config.num_steps,
        "sequences_per_step": config.batch_size * config.gradient_accumulation_steps,
        "sequences_per_draw": sum(len(observable.input_ids) for observable in job.observables),
        "losses_bytes": losses,
        "free_bytes": free,
        "refused": "",
    }
    text = f"{_described(job, values)} {_of_output(path, job, values)}"
    full = free is not None and losses > free
    return Finding("run", "warning" if full else "ok", text, values)


def _chains_left(path: Path | None, job: SamplingJob) -> list[int]:
    """Find the chains that are still to be sampled; refuse a store of other settings."""
    if path is None or not is_store(path):
        return list(range(job.config.num_chains))
    return [] if is_complete(path, job.settings()) else SampleStore(path).unfinished()


def _losses_bytes(job: SamplingJob) -> int:
    losses = [array for name, array in job.arrays().items() if "loss" in name]
    return sum(math.prod(array.shape) * np.dtype(array.dtype).itemsize for array in losses)


def _free_bytes(path: Path) -> int:
    there = next(parent for parent in path.absolute().parents if parent.exists())
    return shutil.disk_usage(there).free


def _described(job: SamplingJob, values: Mapping[str, Any]) -> str:
    config = job.config
    text = (
        f"{config.num_chains} chains of {config.num_steps} steps, each on "
        f"{values['sequences_per_step']} sequences of {job.sequence_length} tokens"
    )
    if not job.observables:
        return f"{text}; no observables."
    names = ", ".join(observable.name for observable in job.observables)
    return (
        f"{text}; {config.num_draws} draws, each on the {values['sequences_per_draw']} sequences "
        f"of {names}."
    )


def _of_output(path: Path | None, job: SamplingJob, values: Mapping[str, Any]) -> str:
    left, size = values["chains_left"], format_bytes(values["losses_bytes"])
    losses = f"Losses: {size} before they are compressed"
    if path is None:
        return f"{losses}."
    if not left:
        return f"{path} has them all, with these settings: there is nothing left to sample."
    losses += f"; {format_bytes(values['free_bytes'])} are free."
    if len(left) == job.config.num_chains:
        return losses
    return f"{path} has some: chains {', '.join(map(str, left))} are left. {losses}"
