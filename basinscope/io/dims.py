"""The one vocabulary of dimensions that the sampler, the stores and the analysis share."""

from __future__ import annotations

CHAIN = "chain"
DRAW = "draw"
STEP = "step"
BATCH = "batch"
BATCH_SAMPLING = "batch_sampling"
INIT_BATCH = "init_batch"
TOKEN = "token"
TOKEN_POS = "token_pos"
FROM_END = "from_end"  # of activations' positions: -1 is the last token


def observable_batch(obs_id: str) -> str:
    """Name the dimension over the sequences of one observable."""
    return f"batch_{obs_id}"


def observable_id(name: str) -> str:
    """Make an observable's name fit for a variable name.

    Examples
    --------
    >>> observable_id("pile/github"), observable_id("2nd set")
    ('pile_github', '_2nd_set')
    """
    cleaned = "".join(c if c.isalnum() or c == "_" else "_" for c in name)
    return f"_{cleaned}" if cleaned[:1].isdigit() else cleaned
