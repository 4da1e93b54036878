"""Next-token cross-entropy of a model, by the shortest way that the model allows."""

from __future__ import annotations

import logging
from collections.abc import Callable

from torch import Tensor, nn

from basinscope.kernels.cross_entropy import next_token_cross_entropy
from basinscope.kernels.linear_cross_entropy import linear_token_cross_entropy
from basinscope.models.forward import token_logits
from basinscope.models.head import (
    LinearHead,
    NoLinearHeadError,
    find_linear_head,
    hidden_states,
    linear_of,
)

logger = logging.getLogger("basinscope")

LossFn = Callable[[nn.Module, Tensor], Tensor]
"""(model, input_ids (batch, token)) -> (batch, token - 1), nats if it is a loss"""

# Operations that keep nothing of their result for the backward pass, and views of results
_FORGETFUL = {
    "MmBackward0", "AddmmBackward0", "BmmBackward0", "LinearBackward0", "MulBackward0",
    "DivBackward0", "AddBackward0", "ToCopyBackward0",
}  # fmt: skip
_VIEWS = {"UnsafeViewBackward0", "ViewBackward0", "ReshapeAliasBackward0"}


def next_token_loss(model: nn.Module, input_ids: Tensor, head: LinearHead | None = None) -> Tensor:
    """Cross-entropy of each next token.

    Parameters
    ----------
    model : nn.Module
    input_ids : Tensor (batch, token)
    head : LinearHead, optional
        The model's head, if it has been found: it is then applied together with the loss, a
        stretch of tokens at a time. Default: the model makes all logits.

    Returns
    -------
    Tensor (batch, token - 1)
        float32 nats.
    """
    if head is None:
        logits = token_logits(model, input_ids)
        return next_token_cross_entropy(logits, input_ids, reuse_logits=_nobody_reads(logits))
    hidden = hidden_states(model, head, input_ids)
    linear = linear_of(model, head)
    return linear_token_cross_entropy(
        hidden[:, :-1],
        linear.weight,
        input_ids[:, 1:],
        bias=linear.bias,
        scale=head.scale,
        softcap=head.softcap,
    )


def head_or_none(model: nn.Module, input_ids: Tensor) -> LinearHead | None:
    """Find a model's linear head with a small batch; say so in the log if there is none."""
    try:
        return find_linear_head(model, input_ids)
    except NoLinearHeadError as error:
        logger.info("the loss is taken from the model's logits, all at once: %s", error)
        return None


def _nobody_reads(logits: Tensor) -> bool:
    """Whether the operation that made these logits can do its backward pass without them."""
    node = logits.grad_fn
    while node is not None and node.name() in _VIEWS:
        node = node.next_functions[0][0]
    return node is not None and node.name() in _FORGETFUL
