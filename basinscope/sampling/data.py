"""Token ids from Hugging Face data sets: checks, batch order and observable rows."""

from __future__ import annotations

import hashlib
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
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
    length = None
    for start, lengths in _checked_lengths(dataset, name):
        length = int(lengths[0]) if length is None else length
        odd = np.flatnonzero(lengths != length)
        if odd.size:
            row = start + int(odd[0])
            raise ValueError(
                f"all rows of {name} must have one length: row 0 has {length} tokens, row {row} "
                f"has {int(lengths[odd[0]])}. tokenize_and_concatenate() makes equal rows; "
                "padding would count as data"
            )
    assert length is not None
    if length < least_tokens:
        loss = " for a next-token loss" if least_tokens == 2 else ""
        raise ValueError(
            f"{name}'s rows have {length} token(s); at least {least_tokens} are needed{loss}"
        )
    return len(dataset), length


def check_sequences(dataset: Any, name: str) -> list[int]:
    """Check that a data set has rows of token ids, of any lengths.

    Returns
    -------
    list of int
        The lengths that there are, the shortest first.

    Raises
    ------
    TypeError, ValueError
        As :func:`check_dataset`; and if a row has no token.
    """
    found: set[int] = set()
    for start, lengths in _checked_lengths(dataset, name):
        empty = np.flatnonzero(lengths == 0)
        if empty.size:
            raise ValueError(
                f"row {start + int(empty[0])} of {name} has no tokens: give it some, or leave it "
                "out"
            )
        found.update(np.unique(lengths).tolist())
    return sorted(found)


def _checked_lengths(dataset: Any, name: str) -> Iterator[tuple[int, np.ndarray]]:
    """Check all but the lengths of rows; give those, some thousand, with the first row's number."""
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

    padded = False
    arrow = dataset.with_format("arrow")
    for start in range(0, len(dataset), LENGTH_CHECK_ROWS):
        table = arrow[start : start + LENGTH_CHECK_ROWS]
        lengths = _row_lengths(table)
        yield start, lengths
        if _has_padding(table):
            padded = True
        missing = _missing_ids(table)
        if missing.size:
            row = start + int(np.searchsorted(np.cumsum(lengths), missing[0], side="right"))
            raise ValueError(
                f"row {row} of {name} has a missing id (null): give every token an id, or leave "
                "the row out"
            )
    if padded:
        warnings.warn(
            f"{name} has an attention_mask with zeros, which is not used: padding counts as data. "
            "tokenize_and_concatenate() makes rows without padding",
            stacklevel=5,
        )


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
    """Places of nulls among the ids of all rows."""
    import pyarrow.compute as pc

    ids = pc.list_flatten(table.column("input_ids"))
    if not ids.null_count:
        return np.empty(0, np.int64)
    return np.flatnonzero(pc.is_null(ids).to_numpy())


def read_rows(dataset: Any, rows: Sequence[int] | np.ndarray) -> np.ndarray:
    """Read rows of one length of a checked data set.

    Returns
    -------
    ndarray (len(rows), sequence_length), int64
    """
    return _read(dataset, rows)[0].reshape(len(rows), -1)


def read_sequences(dataset: Any, rows: Sequence[int] | np.ndarray) -> list[np.ndarray]:
    """Read rows of a checked data set, each as an array of int64."""
    return _split(*_read(dataset, rows))


def _read(dataset: Any, rows: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Give the ids of rows, one after another, and the rows' lengths."""
    table = dataset.with_format("arrow")[[int(row) for row in rows]]
    column = table.column("input_ids").combine_chunks()
    ids = column.flatten().to_numpy(zero_copy_only=False)
    return np.asarray(ids, dtype=np.int64), _row_lengths(table)


def _split(ids: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    return np.split(ids, np.cumsum(lengths)[:-1])


def dataset_digest(dataset: Any, rows: int, check: Callable[[np.ndarray], None]) -> str:
    """Hash the token ids of a checked data set's first rows, some thousand at a time.

    Parameters
    ----------
    dataset : datasets.Dataset
    rows : int
    check : callable
        Sees all ids on the way, (id,), and raises ValueError if some are wrong.

    Raises
    ------
    ValueError
        What `check` says of the first wrong row, with the row's number.
    """
    digest = hashlib.sha256(str(rows).encode())
    for start in range(0, rows, LENGTH_CHECK_ROWS):
        ids, lengths = _read(dataset, range(start, min(start + LENGTH_CHECK_ROWS, rows)))
        _check_rows(check, ids, lengths, start)
        equal = (lengths == lengths[0]).all()
        digest.update(f"{lengths[0]}".encode() if equal else lengths.tobytes())
        digest.update(ids.tobytes())
    return digest.hexdigest()


def _check_rows(
    check: Callable[[np.ndarray], None], ids: np.ndarray, lengths: np.ndarray, start: int
) -> None:
    try:
        check(ids)
    except ValueError:
        for row, own in enumerate(_split(ids, lengths), start):
            try:
                check(own)
            except ValueError as error:
                raise ValueError(f"row {row}: {error}") from None
        raise


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
