"""A job: everything checked and read that chains need, so that they only compute."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from basinscope.io.schema import ArraySpec, sampling_arrays
from basinscope.models.forward import (
    first_name,
    max_sequence_length,
    uncompiled,
    vocabulary_size,
)
from basinscope.models.head import LinearHead
from basinscope.models.structure import used_parameters
from basinscope.sampling.config import SamplerConfig
from basinscope.sampling.data import batch_order, check_dataset, cycled, read_rows
from basinscope.sampling.identity import (
    describe_function,
    describe_masks,
    describe_model,
    digest_of,
)
from basinscope.sampling.layers import TOKENS
from basinscope.sampling.losses import LossFn, next_token_loss
from basinscope.sampling.observables import (
    Around,
    Observable,
    ObservableEvaluator,
    left_as_found,
    read_observables,
)

PROBE_TOKENS = 16  # of one sequence, with which a model is tried out

# tokens that one forward without gradients takes: what fills the device, less where logits count
FORWARD_TOKENS = {"cpu": TOKENS, "cuda": 2**16}
LOGITS_TOKENS = {"cpu": TOKENS, "cuda": 2**14}
# on a CPU a small model's forward takes more, for it costs more than its arithmetic
SMALL_WORK = 2**28  # tokens times weights, up to which more tokens pay
SMALL_TOKENS = 8192
GRADIENT_TOKENS = 512  # tokens whose activations a CPU keeps for a gradient: more are no faster

ParamMasks = Mapping[str, Tensor | None]


@dataclass(frozen=True)
class SamplingJob:
    """What all chains of a run share.

    Attributes
    ----------
    model : nn.Module
        The caller's model at the checkpoint; never changed.
    masks : dict of str to Tensor or None
        The parameters that move; a mask of None moves all of it.
    dataset_rows : int
        Rows of the sampling data set.
    pool : Tensor (row, token)
        The rows of the sampling data set that some chain uses, each once.
    pool_rows : ndarray (row,)
        Their numbers in the data set, ascending.
    head : LinearHead or None
        The model's head, if the loss can be taken without all logits in memory.
    cuda_graph : bool
        Whether steps are recorded once and replayed.
    prefix_cache_bytes : int
        Most bytes of activations that are kept from draw to draw.
    """

    model: nn.Module
    config: SamplerConfig
    masks: dict[str, Tensor | None]
    loss_fn: LossFn | None
    device: torch.device
    dataset_rows: int
    pool: Tensor
    pool_rows: np.ndarray
    observables: list[Observable]
    head: LinearHead | None = None
    cuda_graph: bool = False
    prefix_cache_bytes: int = 0

    @property
    def sequence_length(self) -> int:
        return self.pool.shape[1]

    @property
    def loss(self) -> LossFn:
        """The caller's loss, or next-token cross-entropy."""
        return self.loss_of(None)

    def loss_of(self, own: LossFn | None) -> LossFn:
        """An observable's own loss, or what all others have."""
        loss: LossFn = partial(next_token_loss, head=self.head)
        if own is not None:
            loss = partial(_undisturbed, own)
        elif self.loss_fn is not None:
            loss = self.loss_fn
        return partial(_with_precision, self, loss) if self.config.autocast else loss

    @property
    def has_own_code(self) -> bool:
        """Whether functions of the caller's run: ``loss_fn``, or an observable's."""
        return self.loss_fn is not None or any(o.loss_fn is not None for o in self.observables)

    def precision(self) -> AbstractContextManager[None]:
        """The context in which the model runs."""
        if self.config.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    @property
    def sequences_per_forward(self) -> int | None:
        """Sequences per forward without gradients; None where the caller's loss sees batches."""
        if self.loss_fn is not None:
            return None
        tokens = FORWARD_TOKENS if self.head else LOGITS_TOKENS
        most = tokens.get(self.device.type, tokens["cpu"])
        if self.head and self.device.type == "cpu":
            weights = sum(parameter.numel() for parameter in self.model.parameters())
            most = max(most, min(SMALL_TOKENS, SMALL_WORK // weights))
        return max(self.config.batch_size, most // self.sequence_length)

    @property
    def sequences_per_gradient(self) -> int:
        """Sequences whose activations are kept at once, of a batch whose gradient is taken.

        A caller's loss sees whole batches, and so does dropout, whose stream depends on them.
        """
        size = self.config.batch_size
        if self.device.type != "cpu" or self.loss_fn is not None or self.config.train_mode:
            return size
        return min(size, max(1, GRADIENT_TOKENS // self.sequence_length))

    def evaluator(self, around: Around | None = None) -> ObservableEvaluator:
        """What evaluates the observables; see there for `around`."""
        return ObservableEvaluator(
            self.observables,
            self.loss_of,
            batch_size=self.config.batch_size,
            per_forward=self.sequences_per_forward,
            device=self.device,
            around=around,
        )

    def batch_rows(self, chain: int) -> np.ndarray:
        """Data set rows of every batch of one epoch in a chain's order, (batches, batch_size)."""
        seed = self.config.init_seed
        if not self.config.match_sampling_input_ids_across_chains:
            seed += chain
        return batch_order(self.dataset_rows, self.config.batch_size, self.config.shuffle, seed)

    def step_rows(self, chain: int) -> np.ndarray:
        """Data set rows of every step of a chain, (steps, gradient_accumulation * batch_size)."""
        batches = self.config.num_steps * self.config.gradient_accumulation_steps
        return cycled(self.batch_rows(chain), batches).reshape(self.config.num_steps, -1)

    def token_ids(self, rows: np.ndarray) -> Tensor:
        """Token ids of data set rows, (row, token) int64 on the job's device."""
        positions = torch.from_numpy(np.searchsorted(self.pool_rows, rows))
        return self.pool[positions].to(self.device, torch.int64)

    def arrays(self) -> dict[str, ArraySpec]:
        """The arrays of this job's store."""
        config = self.config
        largest = max([int(self.pool.max()), *(int(o.input_ids.max()) for o in self.observables)])
        return sampling_arrays(
            num_chains=config.num_chains,
            num_draws=config.num_draws,
            num_steps=config.num_steps,
            batch_size=config.batch_size,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            num_init_loss_batches=config.num_init_loss_batches,
            sequence_length=self.sequence_length,
            observables={o.obs_id: len(o.input_ids) for o in self.observables},
            largest_id=largest,
            num_dataset_rows=self.dataset_rows,
            shared_batches=config.match_sampling_input_ids_across_chains,
            shared_start=not config.init_noise,
            save_metrics=config.save_metrics,
            save_sampling_input_ids=config.save_sampling_input_ids,
        )

    def settings(self) -> dict[str, Any]:
        """Everything that decides the numbers of a run, as the store's metadata keeps it."""
        return {
            "sampler": self.config.asdict(),
            "observables": [observable.describe() for observable in self.observables],
            "model": describe_model(self.model),
            "param_masks": describe_masks(self.model, self.masks),
            "loss_fn": None if self.loss_fn is None else describe_function(self.loss_fn),
            "datasets": {
                "sampling": {
                    "rows": self.dataset_rows,
                    "sequence_length": self.sequence_length,
                    "sha256": digest_of(self.pool_rows, self.pool.to(torch.int64).numpy()),
                },
                **{
                    f"observable {o.obs_id}": {"sha256": digest_of(o.input_ids)}
                    for o in self.observables
                },
            },
        }


def prepare_job(
    model: nn.Module,
    dataset: Any,
    observables: Mapping[str, Any],
    config: SamplerConfig,
    *,
    param_masks: ParamMasks | None,
    loss_fn: LossFn | None,
    device: str | torch.device | None,
    cuda_graph: bool = False,
) -> SamplingJob:
    """Check a call's inputs against each other and read the rows that it will use.

    Raises
    ------
    TypeError, ValueError
        In one paragraph: what was got, what is valid, what to do.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    model = uncompiled(model)
    if loss_fn is not None and not callable(loss_fn):
        raise TypeError(
            "loss_fn must be a function (model, input_ids) -> (batch, token - 1) losses, or None; "
            f"got {type(loss_fn).__name__}"
        )
    chosen = choose_device(device)
    if cuda_graph and chosen.type != "cuda":
        raise ValueError(f"cuda_graph=True needs a CUDA device; sampling would run on {chosen}")
    masks = check_masks(model, param_masks)

    rows, length = check_dataset(dataset, "dataset")
    if rows < config.batch_size:
        raise ValueError(
            f"dataset has {rows} rows, fewer than one batch of batch_size={config.batch_size}: "
            "give more rows or a smaller batch_size"
        )
    limit = max_sequence_length(model)
    if limit is not None and length > limit:
        raise ValueError(
            f"dataset's sequences have {length} tokens, and {type(model).__name__} takes at most "
            f"{limit}: cut them shorter (tokenize_and_concatenate(max_length={limit}))"
        )
    read = read_observables(
        observables,
        batch_size=config.batch_size,
        batches_per_draw=config.batches_per_draw,
        seed=config.obs_seed,
        sequence_length=length,
    )
    if cuda_graph and (own := [o.name for o in read if o.loss_fn is not None]):
        raise ValueError(
            f"cuda_graph=True replays one recording of the model's own loss, and observable "
            f"{own[0]!r} has a loss_fn: use one without the other"
        )
    used = _used_rows(config, rows)
    ids = read_rows(dataset, used)
    for name, values in [
        ("dataset", ids),
        *((f"observable {o.name!r}", o.input_ids) for o in read),
    ]:
        check_vocabulary(model, values, name)
    return SamplingJob(
        model=model,
        config=config,
        masks=masks,
        loss_fn=loss_fn,
        device=chosen,
        dataset_rows=rows,
        pool=torch.from_numpy(ids.astype(np.int32)),
        pool_rows=used,
        observables=read,
        cuda_graph=cuda_graph,
    )


def choose_device(device: str | torch.device | None) -> torch.device:
    """Give the asked device, or the GPU if there is one, or the CPU."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, TypeError) as error:
        found = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise ValueError(
            f"device={device!r} cannot be used here ({str(error).splitlines()[0]}); "
            f"available: {', '.join(found)}"
        ) from error
    return chosen


def check_masks(model: nn.Module, param_masks: ParamMasks | None) -> dict[str, Tensor | None]:
    """Check which parameters move; None moves all that require a gradient."""
    parameters = dict(model.named_parameters())
    if not parameters:
        raise ValueError(f"{type(model).__name__} has no parameters to sample")
    absent = [name for name, parameter in parameters.items() if parameter.is_meta]
    if absent:
        raise ValueError(
            f"{len(absent)} parameters of {type(model).__name__} are on the meta device, without "
            f"values ({', '.join(absent[:3])}): load the model whole, without offloading"
        )
    if param_masks is None:
        moved = {name: None for name, p in used_parameters(model).items() if p.requires_grad}
        if not moved:
            raise ValueError(
                f"no parameter of {type(model).__name__} requires a gradient: call "
                "model.requires_grad_(True), or name the parameters to move in param_masks"
            )
        _require_floats(parameters, moved)
        return dict(moved)
    if not isinstance(param_masks, Mapping):
        raise TypeError(
            "param_masks must be a dict of parameter name to bool mask or None; "
            f"got {type(param_masks).__name__}"
        )
    for name, mask in param_masks.items():
        if name not in parameters:
            first = first_name(model, str(name))
            if first is not None:
                raise ValueError(
                    f"param_masks names {name!r}, which is tied to {first!r}: one tensor, which "
                    f"goes by its first name; use {first!r}"
                )
            near = difflib.get_close_matches(str(name), parameters, n=3)
            raise ValueError(
                f"param_masks names {name!r}, which is no parameter of {type(model).__name__}; "
                f"did you mean {', '.join(near) if near else 'one of model.named_parameters()'}?"
            )
        if mask is None:
            continue
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = f"a {mask.dtype} tensor" if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"the mask of {name!r} must be a bool tensor or None; got {got}")
        if mask.shape != parameters[name].shape:
            raise ValueError(
                f"the mask of {name!r} has shape {tuple(mask.shape)}, the parameter "
                f"{tuple(parameters[name].shape)}: they must be equal"
            )
    if not any(mask is None or bool(mask.any()) for mask in param_masks.values()):
        raise ValueError("param_masks selects no weight at all: nothing would move")
    _require_floats(parameters, param_masks)
    return dict(param_masks)


def _require_floats(parameters: Mapping[str, Tensor], moved: ParamMasks) -> None:
    for name in moved:
        if not parameters[name].is_floating_point():
            raise ValueError(
                f"parameter {name!r} has dtype {parameters[name].dtype}: quantised weights cannot "
                "be sampled; load the model in float32, bfloat16 or float16, or name the "
                "parameters to move in param_masks"
            )


def _used_rows(config: SamplerConfig, num_rows: int) -> np.ndarray:
    """Rows that training steps or the initial loss read, over all chains, ascending."""
    matched = config.match_sampling_input_ids_across_chains
    per_step = config.gradient_accumulation_steps
    batches = per_step * max(config.num_steps, config.num_init_loss_batches)
    seeds = [config.init_seed + c for c in range(1 if matched else config.num_chains)]
    orders = [batch_order(num_rows, config.batch_size, config.shuffle, seed) for seed in seeds]
    return np.unique(np.concatenate([order[:batches].reshape(-1) for order in orders]))


def check_vocabulary(model: nn.Module, ids: np.ndarray, name: str) -> None:
    """Refuse token ids that a model does not know, with what it knows."""
    size = vocabulary_size(model)
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (size is not None and high >= size) or high > np.iinfo(np.int32).max:
        valid = f"0 to {size - 1}" if size is not None else "0 or more"
        raise ValueError(
            f"{name} has token ids from {low} to {high}, and {type(model).__name__} knows {valid}: "
            "tokenize with this model's own tokenizer"
        )


def _with_precision(job: SamplingJob, loss: LossFn, model: nn.Module, input_ids: Tensor) -> Tensor:
    with job.precision():
        return loss(model, input_ids)


def _undisturbed(loss: LossFn, model: nn.Module, input_ids: Tensor) -> Tensor:
    with left_as_found(model):
        return loss(model, input_ids)
