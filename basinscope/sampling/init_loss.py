"""The loss at the checkpoint, from which every estimate is counted."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from basinscope.sampling.chain import perturb
from basinscope.sampling.data import cycled
from basinscope.sampling.interrupt import StopRequest
from basinscope.sampling.job import SamplingJob
from basinscope.sampling.layers import quicken_linears


def init_losses(
    job: SamplingJob, model: nn.Module, chains: list[int], stop: StopRequest
) -> dict[int, np.ndarray]:
    """Compute the mean loss of each batch at the checkpoint, (init_batch, token_pos) nats.

    Of every chain, over the first batches of its order; float32. Chains that see the same batches
    have the same ones, which are computed once, unless ``init_noise`` starts each chain elsewhere.

    Parameters
    ----------
    model : nn.Module
        A working copy at the checkpoint; it is there again afterwards.
    """
    noise = job.config.init_noise
    quicken_linears(model)
    if job.config.match_sampling_input_ids_across_chains and not noise and chains:
        torch.manual_seed(job.config.init_seed)  # only dropout uses torch's own generators
        shared = _batch_losses(job, model, chains[0], stop)
        return {chain: shared for chain in chains}
    losses = {}
    for chain in chains:
        if noise:
            _perturb_all(job, model, chain, noise)
        torch.manual_seed(job.config.init_seed + chain)
        losses[chain] = _batch_losses(job, model, chain, stop)
        if noise:
            _restore(job, model)
    return losses


@torch.no_grad()
def observed_losses(job: SamplingJob, model: nn.Module) -> dict[str, np.ndarray]:
    """Compute each observable's losses at the checkpoint, (sequence, token_pos) float32 nats.

    Parameters
    ----------
    model : nn.Module
        A working copy at the checkpoint.
    """
    quicken_linears(model)
    torch.manual_seed(job.config.init_seed)
    found = job.evaluator()(model)
    return {obs_id: losses.cpu().numpy() for obs_id, losses in found.items()}


def _batch_losses(job: SamplingJob, model: nn.Module, chain: int, stop: StopRequest) -> np.ndarray:
    """Average over the sequences of each of the first batches; one that comes twice is run once."""
    config = job.config
    epoch = job.batch_rows(chain)
    count = config.gradient_accumulation_steps * config.num_init_loss_batches
    batches = epoch[:count]
    used = batches.reshape(-1)
    batch_of_row = np.repeat(np.arange(len(batches)), config.batch_size)

    per_forward = job.sequences_per_forward or config.batch_size
    means: Tensor | None = None
    with torch.no_grad():
        for start in range(0, len(used), per_forward):
            stop.raise_if_asked()
            part = slice(start, start + per_forward)
            losses = job.loss(model, job.token_ids(used[part])).double()
            if means is None:
                means = losses.new_zeros((len(batches), losses.shape[1]))
            first, last = batch_of_row[part][[0, -1]]
            members = batch_of_row[part] == np.arange(first, last + 1)[:, None]
            shares = torch.from_numpy(members / config.batch_size).to(losses)
            means[first : last + 1] += shares @ losses
    assert means is not None
    return cycled(means.float().cpu().numpy(), count)


def _perturb_all(job: SamplingJob, model: nn.Module, chain: int, std: float) -> None:
    parameters = [p.data for p in model.parameters()]
    seed = job.config.init_seed + chain
    nowhere: list[Tensor | None] = [None] * len(parameters)
    perturb(parameters, nowhere, list(range(len(parameters))), std, seed=seed, chain=chain)


def _restore(job: SamplingJob, model: nn.Module) -> None:
    for ours, theirs in zip(model.parameters(), job.model.parameters(), strict=True):
        ours.data.copy_(theirs.data)
