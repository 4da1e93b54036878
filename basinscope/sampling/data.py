"""Token ids from Hugging Face data sets: checks, batch order and observable rows."""

from __future__ import annotations

import hashlib
import random
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

LENGTH_CHECK_ROWS = 10_000  # rows whose lengths are read at once


def check_dataset(dataset: Any, name: str, least_tokens: int = 2) -> tuple[int, int]:
    """Check that a data set has equally long rows of token ids.

    Parameters
    ----------
    dataset : datasets.Dataset
        With a column ``input_ids``.
    name : str
        What the caller calls it, for messages.
    least_tokens : int
        Two have a next-token loss.

    Returns
    -------
    rows, sequence_length : int

    Raises
    ------
    TypeError
        If it is not a ``datasets.Dataset``.
    ValueError
        If the column is missing or holds no integers, there are no rows, their lengths differ,
        an id is missing, or they have too few tokens.
    """
    import datasets
    import pyarrow as pa

    if isinstance(dataset, datasets.DatasetDict):
        raise TypeError(
            f"{name} is a DatasetDict with the splits {', '.join(dataset)}: pass one of them, "
            f"for example {name}[{next(iter(dataset), 'train')!r}]"
        )
    if not isinstance(dataset, datasets.Dataset):
        raise TypeError(
            f"{name} must be a datasets.Dataset with a column 'input_ids'; "
            f"got {type(dataset).__name__}. datasets.Dataset.from_dict({{'input_ids': rows}}) "
            "makes one from lists or arrays"
        )
    if "input_ids" not in dataset.column_names:
        raise ValueError(
            f"{name} has no column 'input_ids'; it has {', '.join(dataset.column_names) or 'none'}."
            " tokenize_and_concatenate() makes one from text"
        )
    if len(dataset) == 0:
        raise ValueError(f"{name} has no rows")
    if dataset.format["type"] == "custom":
        raise ValueError(
            f"{name} has a transform that makes its rows when they are read, and ids are read "
            "without it: apply it with dataset.map(...), or drop it with dataset.with_format(None)"
        )

    kind = dataset.features.arrow_schema.field("input_ids").type
    if not (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    ):
        raise ValueError(
            f"{name}'s column 'input_ids' must hold lists of token ids; it holds {kind}"
        )
    if not pa.types.is_integer(kind.value_type):
        raise ValueError(
            f"{name}'s column 'input_ids' must hold integers; it holds {kind.value_type}"
        )

    first, length, padded = None, 0, False
    arrow = dataset.with_format("arrow")
    for start in range(0, len(dataset), LENGTH_CHECK_ROWS):
        table = arrow[start : start + LENGTH_CHECK_ROWS]
        lengths = _row_lengths(table)
        if first is None:
            first, length = lengths[0], int(lengths[0])
        odd = np.flatnonzero(lengths != length)
        if odd.size:
            row = start + int(odd[0])
            raise ValueError(
                f"all rows of {name} must have one length: row 0 has {length} tokens, row {row} "
                f"has {int(lengths[odd[0]])}. tokenize_and_concatenate() makes equal rows; "
                "padding would count as data"
            )
        if _has_padding(table):
            padded = True
        missing = _missing_ids(table)
        if missing.size:
            raise ValueError(
                f"row {start + int(missing[0]) // length} of {name} has a missing id (null): give "
                "every token an id, or leave the row out"
            )
    if padded:
        warnings.warn(
            f"{name} has an attention_mask with zeros, which is not used: padding counts as data. "
            "tokenize_and_concatenate() makes rows without padding",
            stacklevel=4,
        )
    if length < least_tokens:
        loss = " for a next-token loss" if least_tokens == 2 else ""
        raise ValueError(
            f"{name}'s rows have {length} token(s); at least {least_tokens} are needed{loss}"
        )
    return len(dataset), length


def _row_lengths(table: Any) -> np.ndarray:
    import pyarrow.compute as pc

    lengths = pc.list_value_length(table.column("input_ids")).to_numpy(zero_copy_only=False)
    return np.nan_to_num(np.asarray(lengths, dtype=np.float64)).astype(np.int64)


def _has_padding(table: Any) -> bool:
    import pyarrow.compute as pc

    if "attention_mask" not in table.column_names:
        return False
    lowest = pc.min(pc.list_flatten(table.column("attention_mask"))).as_py()
    return lowest is not None and not lowest


def _missing_ids(table: Any) -> np.ndarray:
    """Places of nulls among all ids of equally long rows."""
    import pyarrow.compute as pc

    ids = pc.list_flatten(table.column("input_ids"))
    if not ids.null_count:
        return np.empty(0, np.int64)
    return np.flatnonzero(pc.is_null(ids).to_numpy())


def read_rows(dataset: Any, rows: Sequence[int] | np.ndarray) -> np.ndarray:
    """Read rows of a checked data set.

    Returns
    -------
    ndarray (len(rows), sequence_length), int64
    """
    table = dataset.with_format("arrow")[[int(row) for row in rows]]
    column = table.column("input_ids").combine_chunks()
    ids = column.flatten().to_numpy(zero_copy_only=False)
    return np.asarray(ids, dtype=np.int64).reshape(len(rows), -1)


def dataset_digest(dataset: Any, rows: int, check: Callable[[np.ndarray], None]) -> str:
    """Hash the token ids of a checked data set's first rows, some thousand at a time.

    Parameters
    ----------
    dataset : datasets.Dataset
    rows : int
    check : callable
        Sees all ids on the way, and raises if some are wrong.
    """
    digest = hashlib.sha256(str(rows).encode())
    for start in range(0, rows, LENGTH_CHECK_ROWS):
        ids = read_rows(dataset, range(start, min(start + LENGTH_CHECK_ROWS, rows)))
        check(ids)
        digest.update(f"{ids.shape[1]}".encode())
        digest.update(ids.tobytes())
    return digest.hexdigest()


def batch_order(num_rows: int, batch_size: int, shuffle: bool, seed: int) -> np.ndarray:
    """Give the rows of each batch of one epoch, in ``torch.utils.data.DataLoader``'s order.

    The order is that of ``DataLoader(dataset, batch_size, shuffle, drop_last=True,
    generator=torch.Generator().manual_seed(seed))``, which draws one number for its workers
    before it permutes.

    Returns
    -------
    ndarray (batches, batch_size), int64
    """
    order: Tensor
    if shuffle:
        generator = torch.Generator().manual_seed(seed)
        torch.empty((), dtype=torch.int64).random_(generator=generator)
        order = torch.randperm(num_rows, generator=generator)
    else:
        order = torch.arange(num_rows)
    batches = num_rows // batch_size
    return order[: batches * batch_size].view(batches, batch_size).numpy()


def cycled(batches: np.ndarray, count: int) -> np.ndarray:
    """Repeat an epoch's batches until there are ``count``."""
    return batches[np.arange(count) % len(batches)]


def observable_rows(num_rows: int, count: int, seed: int) -> list[int]:
    """Choose an observable's rows, the same for every draw."""
    return random.Random(seed).sample(range(num_rows), count)
