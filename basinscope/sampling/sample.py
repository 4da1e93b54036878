"""sample(): from a model and data sets to a store of per-token losses."""

from __future__ import annotations

import logging
import os
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from basinscope.io.codecs import rounding_error
from basinscope.io.location import local_path, require_place
from basinscope.io.store import (
    FAILED,
    ChainLockedError,
    SampleStore,
    is_store,
    open_store,
    provenance,
    read_store,
    require_same_settings,
)
from basinscope.io.writer import BackgroundWriter
from basinscope.kernels.linear import uses_onednn
from basinscope.models.passes import require_unchanged
from basinscope.sampling.chain import cuda_devices, run_chains, working_copy
from basinscope.sampling.config import SamplerConfig, merge_rmsprop_aliases
from basinscope.sampling.execution import Execution, check_execution
from basinscope.sampling.identity import moved_elements
from basinscope.sampling.init_loss import init_losses, observed_losses
from basinscope.sampling.interrupt import StopRequest, stop_on_signals
from basinscope.sampling.job import PROBE_TOKENS, SamplingJob, prepare_job
from basinscope.sampling.loss_check import require_loss, require_observables
from basinscope.sampling.losses import LossFn, head_or_none
from basinscope.sampling.precision import warn_about_rounding
from basinscope.sampling.progress import show_progress
from basinscope.sampling.workers import run_in_workers

if TYPE_CHECKING:
    import xarray as xr
    from datasets import Dataset

    from basinscope.sampling.observables import Observables

logger = logging.getLogger("basinscope")

PREFIX_CACHE_BYTES = 2**30
TEMPORARY_WORK = 1000  # sampled sequences beyond which losing a temporary store deserves a warning


class ChainFailedWarning(UserWarning):
    """A chain's loss became infinite or NaN; the others are complete."""


def sample(
    model: nn.Module,
    dataset: Dataset,
    observables: Observables,
    *,
    lr: float,
    n_beta: float,
    param_masks: Mapping[str, Tensor | None] | None = None,
    num_chains: int = 4,
    num_draws: int = 200,
    batch_size: int = 32,
    num_burnin_steps: int = 0,
    num_steps_bw_draws: int = 1,
    num_init_loss_batches: int = 32,
    init_seed: int = 100,
    batches_per_draw: int = 3,
    obs_seed: int = 1337,
    gradient_accumulation_steps: int = 1,
    localization: float = 0.0,
    noise_level: float = 1.0,
    llc_weight_decay: float = 0.0,
    bounding_box_size: float | None = None,
    sampling_method: Literal["sgmcmc_sgld", "rmsprop_sgld"] = "sgmcmc_sgld",
    sampling_method_kwargs: dict[str, Any] | None = None,
    rmsprop_eps: float | None = None,
    rmsprop_alpha: float | None = None,
    shuffle: bool = True,
    match_sampling_input_ids_across_chains: bool = True,
    init_noise: float | None = None,
    device: str | torch.device | None = None,
    save_metrics: bool = False,
    output_path: str | os.PathLike[str] | None = None,
    loss_fn: LossFn | None = None,
    train_mode: bool = False,
    weight_rounding: Literal["nearest", "stochastic"] = "nearest",
    autocast: Literal["bfloat16"] | None = None,
    save_sampling_input_ids: bool = False,
    loss_keep_bits: int | None = None,
    chains_at_once: int | None = None,
    workers: int = 1,
    cuda_graph: bool = False,
    prefix_cache_bytes: int = PREFIX_CACHE_BYTES,
    chains: Sequence[int] | None = None,
    checkpoint_every: int | None = None,
    profile: str | os.PathLike[str] | None = None,
    profile_steps: tuple[int, int] = (5, 15),
    progress: bool | None = None,
) -> xr.DataTree:
    r"""Sample weights around a checkpoint and store every per-token loss.

    Each chain starts at the checkpoint w0 and takes
    ``num_burnin_steps + num_draws * num_steps_bw_draws`` steps of stochastic gradient Langevin
    dynamics (Welling & Teh 2011, localized as in Lau et al. 2023):

    .. math::
        w ← w - \frac{ε}{2} M [G nβ g + G (λ w + γ (w - w_0))] + \sqrt{ε G} M σ ξ

    with g the gradient of the mean per-token loss of a batch and G = 1, or RMSprop's
    preconditioner. The caller's model is not changed, whatever happens.

    Parameters
    ----------
    model : nn.Module
        Maps ``input_ids (batch, token)`` to logits: a Hugging Face causal LM, a TransformerLens
        model, or any module that returns logits or an object with ``.logits``.
    dataset : datasets.Dataset
        What chains are trained on: a column ``input_ids``, all rows of one length, at least 2.
    observables : dict
        Name to a data set, or to ``(data set, batches_per_draw)``, whose losses each draw records;
        or to ``(data set, batches_per_draw, loss_fn)``, to record another number per token.
    lr, n_beta : float
        Step size ε and inverse temperature nβ.
    param_masks : dict, optional
        Parameter name to bool mask, or to None for all of it. Only these move. Default: every
        parameter that requires a gradient.
    num_chains, num_draws, num_burnin_steps, num_steps_bw_draws : int
        Chains, draws per chain, steps before the first draw, steps per draw.
    batch_size, gradient_accumulation_steps : int
        Sequences per batch, batches per step.
    num_init_loss_batches : int
        Batches (times ``gradient_accumulation_steps``) for the loss at the checkpoint.
    batches_per_draw, obs_seed : int
        How many batches of an observable a draw evaluates, and the seed that picks them.
    init_seed : int
        Chain c draws its noise with ``init_seed + c``.
    localization, llc_weight_decay, noise_level : float
        γ, λ and σ of the equation.
    bounding_box_size : float, optional
        Weights stay within this distance of the checkpoint, each by itself.
    init_noise : float, optional
        Standard deviation of one perturbation of the weights before the first step.
    sampling_method : {"sgmcmc_sgld", "rmsprop_sgld"}
    sampling_method_kwargs, rmsprop_eps, rmsprop_alpha
        RMSprop's ``eps`` (0.1) and ``alpha`` (0.99).
    shuffle, match_sampling_input_ids_across_chains : bool
        Shuffle the data set once; let all chains see the same batches in the same order.
    device : str or torch.device, optional
        Default: the GPU if there is one.
    save_metrics : bool
        Store nine norms and dot products of every update.
    output_path : path, optional
        The store. If it exists with the same settings it is continued, or returned if complete.
        Default: a temporary directory, with a warning if the work is worth keeping.
    loss_fn : callable, optional
        ``(model, input_ids) -> (batch, token - 1)`` losses in place of next-token cross-entropy.
    train_mode : bool
        Leave dropout on while sampling and observing.
    weight_rounding : {"nearest", "stochastic"}
        How bfloat16 weights are rounded after a step. Steps smaller than half a bfloat16 unit are
        lost to "nearest" and kept on average by "stochastic", which adds noise to them. float32
        weights are not concerned.
    autocast : {"bfloat16"}, optional
        Run the model under ``torch.autocast``: faster products, losses off by about 1%; weights,
        gradients and stored losses stay as they are. ``docs/sampling.md`` has what it changes.
    save_sampling_input_ids : bool
        Store the sampling batches' token ids, not only their row numbers.
    loss_keep_bits : int, optional
        Round stored losses to this many mantissa bits (relative error at most
        ``2 ** -(bits + 1)``). Default: lossless.
    chains_at_once : int, optional
        Chains that run side by side in threads of this process, each with a copy of the model
        and its share of torch's threads. Default: on a CPU as many as there are threads, if the
        copies are small and the loss is the model's own; else 1.
    workers : int
        Worker processes that share the machine's threads and run chains side by side.
    cuda_graph : bool
        Record a step once as a CUDA graph and replay it: for small models on a GPU, whose steps
        are many short launches. The numbers are the same.
    prefix_cache_bytes : int
        Under a restriction to layer k and above, what enters layer k never changes: it is computed
        once per sequence and kept in at most so many bytes, for the observables first and then for
        the sampling batches. 0 keeps nothing.
    chains : sequence of int, optional
        Run only these chains of the store (for array jobs). Default: all.
    checkpoint_every : int, optional
        Draws between checkpoints, from which an interrupted chain continues. Default: an
        interrupted chain starts again.
    profile : path, optional
        Write a ``torch.profiler`` trace of the steps ``profile_steps`` of the first chain.
    progress : bool, optional
        True: lines on stderr; False: nothing; None: bars on a terminal, lines elsewhere.

    Returns
    -------
    xr.DataTree
        The store, opened lazily. Losses in nats; see ``docs/store.md`` for its arrays.

    Raises
    ------
    ValueError, TypeError
        Before any sampling: an argument, data set, mask or model that does not fit; a model inside
        a block of :func:`basinscope.intervened`.
    StoreMismatchError
        If ``output_path`` has a store of other settings; names each field.
    FileExistsError, NotADirectoryError
        If ``output_path`` has something that is not a store, or is below a file.
    StoreWriteError
        If the store cannot be written, as soon as that is known.

    Warns
    -----
    ChainFailedWarning
        If a chain's loss became NaN or infinite. It is marked as failed, the others are kept.
    WeightRoundingWarning
        If the moved weights have 16 bits and typical steps are small against their rounding.
    """
    require_unchanged(model, "sample()")
    config = SamplerConfig(
        lr=lr,
        n_beta=n_beta,
        num_chains=num_chains,
        num_draws=num_draws,
        batch_size=batch_size,
        num_burnin_steps=num_burnin_steps,
        num_steps_bw_draws=num_steps_bw_draws,
        gradient_accumulation_steps=gradient_accumulation_steps,
        num_init_loss_batches=num_init_loss_batches,
        batches_per_draw=batches_per_draw,
        init_seed=init_seed,
        obs_seed=obs_seed,
        localization=localization,
        noise_level=noise_level,
        llc_weight_decay=llc_weight_decay,
        bounding_box_size=bounding_box_size,
        init_noise=init_noise,
        sampling_method=sampling_method,
        sampling_method_kwargs=merge_rmsprop_aliases(
            sampling_method, sampling_method_kwargs, rmsprop_eps, rmsprop_alpha
        ),
        shuffle=shuffle,
        match_sampling_input_ids_across_chains=match_sampling_input_ids_across_chains,
        save_metrics=save_metrics,
        save_sampling_input_ids=save_sampling_input_ids,
        train_mode=train_mode,
        weight_rounding=weight_rounding,
        autocast=autocast,
        loss_keep_bits=loss_keep_bits,
    )
    execution = check_execution(
        config,
        own_loss=loss_fn is not None,
        chains=chains,
        chains_at_once=chains_at_once,
        workers=workers,
        checkpoint_every=checkpoint_every,
        cuda_graph=cuda_graph,
        prefix_cache_bytes=prefix_cache_bytes,
        profile=profile,
        profile_steps=profile_steps,
        progress=progress,
    )
    path = None if output_path is None else checked_place(output_path)
    job = prepare_job(
        model,
        dataset,
        observables,
        config,
        param_masks=param_masks,
        loss_fn=loss_fn,
        device=device,
        cuda_graph=cuda_graph,
    )
    job = replace(job, prefix_cache_bytes=execution.prefix_cache_bytes)
    settings = job.settings()
    if path is not None and is_store(path) and is_complete(path, settings):
        logger.info("%s is complete and has these settings: nothing to sample", path)
        return open_store(path)

    warn_about_rounding(job)
    with (
        torch.inference_mode(mode=False),  # whatever the caller's mode is
        torch.enable_grad(),
        stop_on_signals() as stop,
        torch.random.fork_rng(devices=cuda_devices(job.device)),
    ):
        store = _run(job, settings, path, execution, stop)
    _warn_about_failures(store)
    return read_store(store.path)


def checked_place(output_path: str | os.PathLike[str]) -> Path:
    """Give the path of the store; refuse one that holds something else, or cannot hold a store."""
    path = local_path(output_path)
    if _is_taken(path):
        raise FileExistsError(
            f"{path} exists and is not a sampling store; it is left as it is. "
            "Choose another output_path"
        )
    require_place(path)
    return path


def _is_taken(path: Path) -> bool:
    """Whether something that is no store, and not an empty directory, is at ``path``."""
    if not path.exists() or is_store(path):
        return False
    return not path.is_dir() or any(path.iterdir())


def is_complete(path: Path, settings: dict[str, Any]) -> bool:
    """Refuse a store of other settings; say whether nothing is left to sample."""
    attributes = SampleStore(path).attributes
    require_same_settings(path, attributes.get("metadata", {}).get("config", {}), settings)
    return bool(attributes.get("completed") == 1)


def _run(
    job: SamplingJob,
    settings: dict[str, Any],
    path: Path | None,
    execution: Execution,
    stop: StopRequest,
) -> SampleStore:
    """Sample the chains that are missing, into a store that is made here if there is none."""
    config = job.config
    working = working_copy(job)
    if job.loss_fn is None:
        few = job.token_ids(job.batch_rows(0)[0][:1])[:, :PROBE_TOKENS]
        job = replace(job, head=head_or_none(working, few))
    require_loss(job, working)
    require_observables(job, working)
    path = path or _temporary_path(config)
    if not is_store(path):
        SampleStore.create(path, job.arrays(), _attributes(job, settings), config.num_chains)
    is_complete(path, settings)  # another process may have made it since the settings were compared
    store = SampleStore(path)
    todo = [chain for chain in store.unfinished() if chain in execution.chains]
    tokens = config.gradient_accumulation_steps * config.batch_size * (job.sequence_length - 1)
    with show_progress(
        todo, config.num_steps, config.num_draws, tokens, execution.progress
    ) as report:
        _write_inputs(job, store, working, todo, stop)
        if execution.processes > 1 and todo:
            del working
            run_in_workers(
                job,
                path,
                todo,
                execution.processes,
                checkpoint_every=execution.checkpoint_every,
                stop=stop,
                report=report,
            )
        else:
            run_chains(
                job,
                working,
                store,
                todo,
                checkpoint_every=execution.checkpoint_every,
                stop=stop,
                report=report,
                at_once=execution.at_once(job),
                profile=execution.profile,
                profile_steps=execution.profile_steps,
            )
    store.finish()
    return store


def _temporary_path(config: SamplerConfig) -> Path:
    work = config.num_chains * config.num_steps * config.batch_size
    path = Path(tempfile.mkdtemp(prefix="basinscope-")) / "samples.zarr"
    if work > TEMPORARY_WORK:
        warnings.warn(
            f"no output_path was given: {work} sampled sequences go to the temporary store {path}, "
            "which your system may delete; pass output_path='samples.zarr' to keep them",
            stacklevel=4,
        )
    return path


def _attributes(job: SamplingJob, settings: dict[str, Any]) -> dict[str, Any]:
    config = job.config
    attributes = {
        "metadata": {"config": settings},
        "completed": 0,
        **provenance(),
        "torch": torch.__version__,
        "device": str(job.device),
        "loss": "loss_fn" if job.loss_fn is not None else ("linear head" if job.head else "logits"),
        "linear_layers": "onednn" if job.device.type == "cpu" and uses_onednn() else "torch",
    }
    if config.save_metrics:
        attributes["metrics_numel"] = moved_elements(job.model, job.masks)
    if config.loss_keep_bits is not None:
        attributes["loss_relative_error"] = rounding_error(config.loss_keep_bits)
    return attributes


def _write_inputs(
    job: SamplingJob, store: SampleStore, model: nn.Module, chains: list[int], stop: StopRequest
) -> None:
    """Write what no draw changes: ids, row numbers and the loss at the checkpoint."""
    missing = [c for c in chains if not store.record(c)["init_loss_written"]]
    if not missing:
        return
    start = time.perf_counter()
    writer = BackgroundWriter(store.path, store.arrays)
    try:
        writer.put("n_beta", (), np.asarray(job.config.n_beta))
        for observable in job.observables:
            writer.put(f"input_ids_{observable.obs_id}", slice(None), observable.input_ids)
        if job.config.match_sampling_input_ids_across_chains:
            writer.put("sampling_rows", slice(None), job.step_rows(0))
        else:
            rows = np.stack([job.step_rows(chain) for chain in range(job.config.num_chains)])
            writer.put("sampling_rows", slice(None), rows)
        for obs_id, losses in observed_losses(job, model).items():
            writer.put(f"init_loss_{obs_id}", slice(None), losses)
        _write_init_losses(store, writer, init_losses(job, model, missing, stop))
        writer.drain()
    finally:
        writer.close()
    share = round((time.perf_counter() - start) / len(missing), 6)
    for chain in missing:
        with suppress(ChainLockedError), store.lock(chain):  # whoever samples it noted their own
            seconds = {"init_loss": share, **store.record(chain)["seconds"]}
            store.update_record(chain, init_loss_written=True, seconds=seconds)


def _write_init_losses(
    store: SampleStore, writer: BackgroundWriter, losses: Mapping[int, np.ndarray]
) -> None:
    """Write the loss at the checkpoint, of each chain on average and of the batches behind it."""
    for chain, of_batches in losses.items():
        writer.put("init_loss", chain, of_batches.mean(axis=0, dtype=np.float64).astype(np.float32))
    stored = store.arrays.get("init_batch_loss")  # None in a store of schema version 1
    if stored is not None and stored.ndim == 2:
        writer.put("init_batch_loss", slice(None), next(iter(losses.values())))
    elif stored is not None:
        for chain, of_batches in losses.items():
            writer.put("init_batch_loss", chain, of_batches)


def _warn_about_failures(store: SampleStore) -> None:
    failed = {c: r for c, r in store.records().items() if r["state"] == FAILED}
    if failed:
        reasons = "; ".join(
            f"chain {c} at step {r['failed_step']}: {r['reason']}" for c, r in failed.items()
        )
        warnings.warn(
            f"{len(failed)} of {store.num_chains} chains failed and are left out of estimates "
            f"({reasons}). A smaller lr, or more localization, keeps chains in the basin",
            ChainFailedWarning,
            stacklevel=3,
        )
