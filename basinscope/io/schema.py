"""Which arrays a sampling store holds, with their shapes and chunks. Integers only, no I/O."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from basinscope.io import dims

SCHEMA_VERSION = 2  # 1 had no init_batch_loss

METRICS = {
    "scaled_grad": "norm of (ε/2) M G nβ g",
    "unscaled_grad": "norm of (ε/2) nβ g",
    "localization": "norm of (ε/2) M G γ (w - w0)",
    "weight_decay": "norm of (ε/2) M G λ w",
    "noise": "norm of sqrt(ε G) M σ ξ",
    "distance": "norm of w - w0 before the update",
    "dot_grad_prior": "scaled_grad · (localization + weight_decay)",
    "dot_grad_noise": "scaled_grad · noise",
    "dot_prior_noise": "(localization + weight_decay) · noise",
}
"""The nine diagnostics of an update, in the order in which the kernels return them."""

SHARD_BYTES = 32 * 2**20  # most bytes that one buffer holds before it is written
SHARD_ROWS = 50  # most draws or steps in one shard
METRIC_ROWS = 1000  # steps of one metric in one file
CHUNK_BYTES = 2**20  # about what reading one block of sequences should cost


@dataclass(frozen=True)
class ArraySpec:
    """One array of a store.

    Attributes
    ----------
    dims, shape, dtype
        As Zarr stores them.
    chunks : tuple of int
        What is decoded at once.
    shards : tuple of int or None
        What is written at once (one file). None: a chunk is a file.
    draw_last : bool
        Whether chunks are laid out with the second dimension last (losses of fixed sequences).
    attrs : mapping
        ``long_name`` and ``units``.
    """

    dims: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[int, ...]
    shards: tuple[int, ...] | None = None
    draw_last: bool = False
    attrs: Mapping[str, str] = field(default_factory=dict)

    @property
    def rows_per_write(self) -> int:
        """Extent of the second dimension in one file (draws or steps)."""
        return (self.shards or self.chunks)[1]


def sampling_arrays(
    *,
    num_chains: int,
    num_draws: int,
    num_steps: int,
    batch_size: int,
    gradient_accumulation_steps: int,
    num_init_loss_batches: int,
    sequence_length: int,
    observables: Mapping[str, int],
    largest_id: int,
    num_dataset_rows: int,
    shared_batches: bool,
    shared_start: bool,
    save_metrics: bool,
    save_sampling_input_ids: bool,
) -> dict[str, ArraySpec]:
    """List every array of a sampling store.

    Parameters
    ----------
    sequence_length : int
        Tokens per sequence; losses have one entry less.
    observables : mapping of str to int
        Observable id to its number of sequences.
    largest_id : int
        Largest token id of any data set; it decides the integer type of stored ids.
    num_dataset_rows : int
        Rows of the sampling data set; it decides the integer type of ``sampling_rows``.
    shared_batches : bool
        Whether all chains see the same batches (then ``sampling_rows`` has no chain).
    shared_start : bool
        Whether they also start at the same weights (then ``init_batch_loss`` has no chain).
    """
    tokens = sequence_length - 1
    micro = gradient_accumulation_steps * batch_size
    ids = smallest_unsigned(largest_id)

    arrays = {
        "init_loss": ArraySpec(
            (dims.CHAIN, dims.TOKEN_POS),
            (num_chains, tokens),
            "float32",
            (1, tokens),
            attrs={"long_name": "mean loss at the checkpoint", "units": "nats"},
        ),
        "n_beta": ArraySpec(
            (), (), "float64", (), attrs={"long_name": "inverse temperature nβ", "units": "1"}
        ),
        "sampling_loss": _loss(
            dims.DRAW,
            dims.BATCH,
            (num_chains, num_draws, batch_size, tokens),
            "loss of the sampling batch before the draw's update",
        ),
        "sampling_loss_micro": _loss(
            dims.STEP,
            dims.BATCH_SAMPLING,
            (num_chains, num_steps, micro, tokens),
            "loss of every sampling sequence at every step",
        ),
    }
    of_chains = ((dims.CHAIN,), (num_chains,))
    dim, size = ((), ()) if shared_batches and shared_start else of_chains
    init_batches = gradient_accumulation_steps * num_init_loss_batches
    at_once = max(1, min(init_batches, SHARD_BYTES // (4 * tokens)))
    arrays["init_batch_loss"] = ArraySpec(
        (*dim, dims.INIT_BATCH, dims.TOKEN_POS),
        (*size, init_batches, tokens),
        "float32",
        (*(1 for _ in size), at_once, tokens),
        attrs={"long_name": "mean loss of each batch behind init_loss", "units": "nats"},
    )
    dim, size = ((), ()) if shared_batches else of_chains
    arrays["sampling_rows"] = _integers(
        (*dim, dims.STEP, dims.BATCH_SAMPLING),
        (*size, num_steps, micro),
        smallest_unsigned(num_dataset_rows - 1),
        "row of the sampling data set",
    )
    if save_sampling_input_ids:
        arrays["sampling_input_ids_micro"] = ArraySpec(
            (dims.CHAIN, dims.STEP, dims.BATCH_SAMPLING, dims.TOKEN),
            (num_chains, num_steps, micro, sequence_length),
            ids,
            (1, _rows_per_write(num_steps, 4 * micro * tokens), micro, sequence_length),
            attrs={"long_name": "token ids of the sampling batches", "units": "1"},
        )
    for obs_id, sequences in observables.items():
        batch = dims.observable_batch(obs_id)
        arrays[f"loss_{obs_id}"] = _loss(
            dims.DRAW,
            batch,
            (num_chains, num_draws, sequences, tokens),
            f"loss on {obs_id} after the draw's update",
        )
        arrays[f"init_loss_{obs_id}"] = ArraySpec(
            (batch, dims.TOKEN_POS),
            (sequences, tokens),
            "float32",
            (max(1, min(sequences, SHARD_BYTES // (4 * tokens))), tokens),
            attrs={"long_name": f"loss on {obs_id} at the checkpoint", "units": "nats"},
        )
        arrays[f"input_ids_{obs_id}"] = _integers(
            (batch, dims.TOKEN), (sequences, sequence_length), ids, f"token ids of {obs_id}"
        )
    if save_metrics:
        for name, meaning in METRICS.items():
            arrays[f"metrics_{name}"] = ArraySpec(
                (dims.CHAIN, dims.STEP),
                (num_chains, num_steps),
                "float32",
                (1, min(num_steps, METRIC_ROWS)),
                attrs={"long_name": meaning, "units": "1"},
            )
    return arrays


def _loss(row: str, batch: str, shape: tuple[int, int, int, int], meaning: str) -> ArraySpec:
    """Chunk a loss array: a file per flush, inside it blocks of sequences over all its rows."""
    _, rows, sequences, tokens = shape
    flush = _rows_per_write(rows, 4 * sequences * tokens)
    block = _sequences_per_chunk(sequences, 4 * flush * tokens)
    whole = math.ceil(sequences / block) * block
    return ArraySpec(
        (dims.CHAIN, row, batch, dims.TOKEN_POS),
        shape,
        "float32",
        (1, flush, block, tokens),
        (1, flush, whole, tokens) if whole > block else None,
        draw_last=batch not in (dims.BATCH, dims.BATCH_SAMPLING),
        attrs={"long_name": meaning, "units": "nats"},
    )


def _integers(
    dim_names: tuple[str, ...], shape: tuple[int, ...], dtype: str, meaning: str
) -> ArraySpec:
    return ArraySpec(dim_names, shape, dtype, shape, attrs={"long_name": meaning, "units": "1"})


def _rows_per_write(rows: int, row_bytes: int) -> int:
    """Draws (or steps) in one file: evenly split, bounded in number and in bytes."""
    most = max(1, min(SHARD_ROWS, SHARD_BYTES // row_bytes))
    return math.ceil(rows / math.ceil(rows / most))


def _sequences_per_chunk(sequences: int, sequence_bytes: int) -> int:
    """Sequences decoded together: a power of two from 8 to 256 that makes about CHUNK_BYTES."""
    wanted = max(8, min(256, CHUNK_BYTES // sequence_bytes))
    return min(sequences, 1 << (wanted.bit_length() - 1))


def smallest_unsigned(largest: int) -> str:
    """Name the smallest unsigned integer type that holds ``largest``.

    Examples
    --------
    >>> smallest_unsigned(255), smallest_unsigned(50256)
    ('uint8', 'uint16')
    """
    return np.min_scalar_type(max(0, largest)).name
