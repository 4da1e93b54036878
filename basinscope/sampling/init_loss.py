"""The loss at the checkpoint, from which every estimate is counted."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from basinscope.sampling.chain import perturb
from basinscope.sampling.interrupt import StopRequest
from basinscope.sampling.job import SamplingJob
from basinscope.sampling.layers import quicken_linears


def init_losses(
    job: SamplingJob, model: nn.Module, chains: list[int], stop: StopRequest
) -> dict[int, np.ndarray]:
    """Compute each chain's mean loss at the checkpoint, (token_pos,) float32 nats.

    Chains that see the same batches have the same one, which is computed once, unless
    ``init_noise`` starts each of them elsewhere.

    Parameters
    ----------
    model : nn.Module
        A working copy at the checkpoint; it is there again afterwards.
    """
    noise = job.config.init_noise
    quicken_linears(model)
    if job.config.match_sampling_input_ids_across_chains and not noise and chains:
        torch.manual_seed(job.config.init_seed)  # only dropout uses torch's own generators
        shared = _mean_loss(job, model, chains[0], stop)
        return {chain: shared for chain in chains}
    losses = {}
    for chain in chains:
        if noise:
            _perturb_all(job, model, chain, noise)
        torch.manual_seed(job.config.init_seed + chain)
        losses[chain] = _mean_loss(job, model, chain, stop)
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


def _mean_loss(job: SamplingJob, model: nn.Module, chain: int, stop: StopRequest) -> np.ndarray:
    """Average over the first batches of a chain's order; a batch that comes twice counts twice."""
    config = job.config
    epoch = job.batch_rows(chain)
    count = config.gradient_accumulation_steps * config.num_init_loss_batches
    times = np.bincount(np.arange(count) % len(epoch), minlength=len(epoch))[: len(epoch)]
    used = epoch[times > 0].reshape(-1)
    weights = np.repeat(times[times > 0], config.batch_size) / (count * config.batch_size)

    per_forward = job.sequences_per_forward or config.batch_size
    total: Tensor | None = None
    with torch.no_grad():
        for start in range(0, len(used), per_forward):
            stop.raise_if_asked()
            part = slice(start, start + per_forward)
            losses = job.loss(model, job.token_ids(used[part])).double()
            weighted = torch.from_numpy(weights[part]).to(losses) @ losses
            total = weighted if total is None else total + weighted
    assert total is not None
    return total.float().cpu().numpy()


def _perturb_all(job: SamplingJob, model: nn.Module, chain: int, std: float) -> None:
    parameters = [p.data for p in model.parameters()]
    seed = job.config.init_seed + chain
    nowhere: list[Tensor | None] = [None] * len(parameters)
    perturb(parameters, nowhere, list(range(len(parameters))), std, seed=seed, chain=chain)


def _restore(job: SamplingJob, model: nn.Module) -> None:
    for ours, theirs in zip(model.parameters(), job.model.parameters(), strict=True):
        ours.data.copy_(theirs.data)
