"""The one vocabulary of dimensions that the sampler, the stores and the analysis share."""

from __future__ import annotations

CHAIN = "chain"
DRAW = "draw"
STEP = "step"
BATCH = "batch"
BATCH_SAMPLING = "batch_sampling"
TOKEN = "token"
TOKEN_POS = "token_pos"


def observable_batch(obs_id: str) -> str:
    """Name the dimension over the sequences of one observable."""
    return f"batch_{obs_id}"
