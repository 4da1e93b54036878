"""Whether a loss fits its model and data: it is tried once before anything is written."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from basinscope.sampling.job import SamplingJob


def require_loss(job: SamplingJob, model: nn.Module) -> None:
    """Evaluate the loss of the first batch, and its gradient, at the copy that chains start from.

    A caller's ``loss_fn`` gets a whole batch, as always; the model's own loss needs one sequence.

    Raises
    ------
    ValueError
        If it has another shape, is not finite, or is not of the copy's weights; says what to do.

    Warns
    -----
    UserWarning
        If some of the parameters that are to move have no gradient; names them.
    """
    rows = job.batch_rows(0)[0]
    batch = job.token_ids(rows if job.loss_fn is not None else rows[:1])
    wanted = (len(batch), job.sequence_length - 1)
    kind = "loss_fn" if job.loss_fn is not None else "the model's loss"
    try:
        with torch.enable_grad():
            losses = job.loss(model, batch)
    except IndexError as error:
        raise ValueError(
            f"{type(job.model).__name__} cannot take the data set's token ids, which go up to "
            f"{int(batch.max())} in sequences of {job.sequence_length} ({error}): tokenize with "
            "this model's own tokenizer, and to its length"
        ) from error
    _require_shape(losses, wanted, kind)
    if not losses.requires_grad:
        raise ValueError(
            f"{kind} has no gradient with respect to the parameters that should move: it was "
            "detached, computed under no_grad, or does not depend on them"
        )
    _require_gradients(job, model, losses, kind)
    if not torch.isfinite(losses).all():
        raise ValueError(
            f"{kind} is not finite at the checkpoint itself: sampling around it is meaningless. "
            "Check the weights (load the model in float32 or bfloat16) and the data"
        )


@torch.no_grad()
def require_observables(job: SamplingJob, model: nn.Module) -> None:
    """Evaluate what observables have in place of the loss, on a batch of each.

    Raises
    ------
    ValueError
        If it has another shape, or is not finite; names the observable.
    """
    for observable in job.observables:
        if observable.loss_fn is None:
            continue
        few = observable.input_ids[: job.config.batch_size]
        ids = torch.from_numpy(few.copy()).to(job.device)  # which the function may write to
        values = job.loss_of(observable.loss_fn)(model, ids)
        kind = f"the loss_fn of observable {observable.name!r}"
        _require_shape(values, (len(ids), job.sequence_length - 1), kind)
        if not torch.isfinite(values.float()).all():
            raise ValueError(
                f"{kind} is not finite at the checkpoint itself, and a chain ends where an "
                "observable is not: give a number that is, such as 0, where it has no value"
            )


def _require_gradients(job: SamplingJob, model: nn.Module, losses: Tensor, kind: str) -> None:
    """Refuse a loss that is not of the copy's weights; name those that it does not depend on."""
    moved = {name: p for name, p in model.named_parameters() if name in job.masks}
    original = {name: p for name, p in job.model.named_parameters() if p.requires_grad}
    try:
        found = torch.autograd.grad(
            losses.mean(), [*moved.values(), *original.values()], allow_unused=True
        )
    except RuntimeError as error:
        if "use_reentrant" in str(error):  # such a checkpoint takes backward() alone
            return
        raise
    of_original = [n for n, g in zip(original, found[len(moved) :], strict=True) if g is not None]
    if of_original:
        raise ValueError(
            f"{kind} depends on weights of the model that you passed ({', '.join(of_original[:3])}"
            f"{', ...' if len(of_original) > 3 else ''}): sampling moves a copy of your model, and "
            "a forward or a loss_fn that holds on to the model itself (a closure, a wrapped "
            "forward) never sees the copy move. Take weights from the model that is passed in; "
            "detach those that are meant to stay at the checkpoint, or use torch.no_grad(); in "
            "place of a TransformerLens bridge, give the Hugging Face model"
        )
    found = found[: len(moved)]
    gradients = dict(zip(moved, found, strict=True))
    sparse = [name for name, g in gradients.items() if g is not None and g.layout != torch.strided]
    if sparse:
        raise ValueError(
            f"{', '.join(sparse)} has a sparse gradient, which no update of all weights can use: "
            "make the layer with sparse=False"
        )
    without = [name for name, gradient in gradients.items() if gradient is None]
    if len(without) == len(moved):
        raise ValueError(
            f"{kind} does not depend on the weights of the model it is given, of which sampling "
            "moves a copy: take weights from the model that is passed in"
        )
    if without:
        warnings.warn(
            f"{len(without)} of {len(moved)} parameters have no gradient on the batch tried, and "
            f"a parameter without one does not move, noise included: {', '.join(without[:5])}"
            f"{', ...' if len(without) > 5 else ''}. If they are unused, leave them out "
            "(param_masks)",
            stacklevel=5,
        )


def _require_shape(losses: Any, wanted: tuple[int, int], kind: str) -> None:
    if not isinstance(losses, Tensor) or tuple(losses.shape) != wanted:
        got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(
            f"{kind} must have shape (batch, token - 1) = {wanted}, one loss per predicted token; "
            f"got {got}"
        )
