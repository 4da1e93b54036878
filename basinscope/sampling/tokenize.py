"""From texts to token rows: of one length (tokenize whole, join, cut), or a row for each text."""

from __future__ import annotations

import copy
import numbers
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

DOCUMENTS_PER_BATCH = 1000
"""Documents tokenized or cut at once; the rows do not depend on it."""


def tokenize_and_concatenate(
    dataset: datasets.Dataset | datasets.IterableDataset,
    tokenizer: Any,
    streaming: bool = False,
    max_length: int = 1024,
    column_name: str = "text",
    add_bos_token: bool = True,
    num_proc: int | None = None,
) -> datasets.Dataset | datasets.IterableDataset:
    """Tokenize documents, join them into one stream and cut it into rows of one length.

    Each document is tokenized whole and without special tokens. Documents are joined in order, with
    the tokenizer's EOS token between them (with nothing, where it has none). The stream is then cut
    into rows without gaps or padding: BOS and ``max_length - 1`` stream tokens with
    `add_bos_token`, else `max_length` stream tokens. Only the end of the stream that fills no row
    is dropped. The rows depend on the documents and the tokenizer alone, not on `num_proc`.

    Parameters
    ----------
    dataset
        Documents, one per row. A ``DatasetDict`` is refused: pick a split.
    tokenizer
        A Hugging Face tokenizer, fast or slow. It is copied, never changed.
    streaming
        Return an ``IterableDataset`` that tokenizes while it is read. Always so when `dataset` is
        an ``IterableDataset``.
    max_length
        Tokens per row, BOS included; at least 2.
    column_name
        The column that holds the text.
    add_bos_token
        Begin every row with the tokenizer's BOS token.
    num_proc
        Processes that tokenize; None for none beside this one. Unused when streaming.

    Returns
    -------
    datasets.Dataset or datasets.IterableDataset
        One column ``input_ids (row, max_length)``, int32, in "torch" format (read as int64
        tensors). Where `dataset` lies in Arrow files, the rows do so too, and memory stays bounded.

    Raises
    ------
    TypeError
        If `dataset` is not a single data set, its column does not hold strings, or `max_length` is
        no whole number.
    ValueError
        If the column does not exist, `max_length` is under 2, the tokenizer has no BOS token though
        one is asked for, or the text is too short for one row (when streaming: raised at the end of
        the first pass).
    """
    import datasets

    _check_dataset(dataset, column_name)
    _check_row(tokenizer, max_length, add_bos_token)
    tokenizer = copy.deepcopy(tokenizer)
    bos = [tokenizer.bos_token_id] if add_bos_token else []
    documents = dataset.with_format(None).select_columns(column_name)

    if streaming or isinstance(dataset, datasets.IterableDataset):
        stream = _Restartable(documents, tokenizer, column_name, max_length, bos)
        rows: datasets.Dataset | datasets.IterableDataset = datasets.IterableDataset.from_generator(
            stream, features=_row_features(max_length)
        )
    else:
        rows = _cut_documents(documents, tokenizer, column_name, max_length, bos, num_proc)
    return rows.with_format("torch")


def tokenize_texts(
    dataset: datasets.Dataset,
    tokenizer: Any,
    max_length: int | None = None,
    column_name: str = "text",
    add_bos_token: bool = True,
    num_proc: int | None = None,
) -> datasets.Dataset:
    """Tokenize texts, each into a row of its own: as many rows, in the same order.

    Each text is tokenized whole and without special tokens, as :func:`tokenize_and_concatenate`
    does. Nothing is joined or padded, so rows have several lengths.

    Parameters
    ----------
    dataset
        Texts, one per row. A ``DatasetDict`` is refused: pick a split.
    tokenizer
        A Hugging Face tokenizer, fast or slow. It is copied, never changed.
    max_length
        Most tokens of a row, BOS included; at least 2. A longer text keeps its first ones, with a
        warning that counts such texts. None: every text is whole.
    column_name
        The column that holds the text.
    add_bos_token
        Begin every row with the tokenizer's BOS token.
    num_proc
        Processes that tokenize; None for none beside this one.

    Returns
    -------
    datasets.Dataset
        One column ``input_ids (row, token)``, int32, in "torch" format (read as int64 tensors).
        Where `dataset` lies in Arrow files, the rows do so too, and memory stays bounded.

    Raises
    ------
    TypeError
        If `dataset` is not a single ``Dataset``, its column does not hold strings, or `max_length`
        is no whole number.
    ValueError
        If the column does not exist, there are no texts, some have no tokens, `max_length` is under
        2, or the tokenizer has no BOS token though one is asked for.
    """
    import datasets
    from datasets import Features, List, Value

    _check_dataset(dataset, column_name)
    if not isinstance(dataset, datasets.Dataset):
        raise TypeError(
            "dataset is an IterableDataset, whose rows cannot be read by number. Make it a "
            "Dataset: datasets.Dataset.from_generator(lambda: iter(dataset))."
        )
    if len(dataset) == 0:
        raise ValueError("dataset has no texts: it has 0 rows.")
    _check_row(tokenizer, max_length, add_bos_token)
    bos = [tokenizer.bos_token_id] if add_bos_token else []
    features = Features({"input_ids": List(Value("int32"))})
    rows = (
        dataset.with_format(None)
        .select_columns(column_name)
        .map(
            _tokenize_each,
            with_indices=True,
            batched=True,
            batch_size=DOCUMENTS_PER_BATCH,
            num_proc=num_proc,
            remove_columns=[column_name],
            features=features,
            fn_kwargs={
                "tokenizer": copy.deepcopy(tokenizer),
                "column_name": column_name,
                "bos": bos,
            },
            desc="Tokenizing",
        )
    )
    counts = token_counts(rows)
    empty = np.flatnonzero(counts == len(bos))
    if empty.size:
        raise ValueError(
            f"texts without tokens: {empty.size} of {len(rows)}, the first of them in row "
            f"{empty[0]}. Remove such rows first, for example with dataset.filter."
        )
    if max_length is not None and (longer := int((counts > max_length).sum())):
        warnings.warn(
            f"texts with more than {max_length} tokens: {longer} of {len(rows)}, the longest of "
            f"{counts.max()}; their first {max_length} are kept",
            stacklevel=2,
        )
        rows = rows.with_format("arrow").map(
            _keep_first,
            batched=True,
            batch_size=DOCUMENTS_PER_BATCH,
            features=features,
            fn_kwargs={"count": max_length},
            desc="Cutting texts",
        )
    return rows.with_format("torch")


def token_counts(rows: datasets.Dataset) -> np.ndarray:
    """Count the tokens of each row of ``input_ids``: (row,)."""
    import pyarrow.compute as pc

    counts: np.ndarray = pc.list_value_length(rows.with_format("arrow")[:]["input_ids"]).to_numpy()
    return counts


def _check_dataset(dataset: Any, column_name: str) -> None:
    import datasets

    if isinstance(dataset, dict):
        raise TypeError(
            f"dataset is a {type(dataset).__name__} with splits {sorted(dataset)}; "
            f"pick one, such as dataset[{min(dataset, default='train')!r}]."
        )
    if not isinstance(dataset, datasets.Dataset | datasets.IterableDataset):
        raise TypeError(
            f"dataset is a {type(dataset).__name__}; it must be a datasets.Dataset or "
            "datasets.IterableDataset. Build one with datasets.Dataset.from_dict({'text': [...]})."
        )
    columns = dataset.column_names or list(next(iter(dataset), {column_name: ""}))
    if column_name not in columns:
        raise ValueError(
            f"dataset has no column {column_name!r}; it has {sorted(columns)}. "
            "Name the text column: column_name=..., --column of basinscope extract, or column in a "
            "run file."
        )
    feature = (dataset.features or {}).get(column_name)
    if feature is not None and getattr(feature, "dtype", None) not in ("string", "large_string"):
        raise TypeError(
            f"column {column_name!r} holds {feature}, not strings. "
            "Name the text column: column_name=..., --column of basinscope extract, or column in a "
            "run file."
        )


def _check_row(tokenizer: Any, max_length: int | None, add_bos_token: bool) -> None:
    """Check how long rows may be (None: as long as they are), and what they begin with."""
    if max_length is not None:
        if isinstance(max_length, bool) or not isinstance(max_length, numbers.Integral):
            raise TypeError(f"max_length must be a whole number of at least 2; got {max_length!r}")
        if max_length < 2:
            raise ValueError(
                f"max_length={max_length} is too small: a row needs at least 2 tokens, "
                "one to predict from and one to predict."
            )
    if add_bos_token and tokenizer.bos_token_id is None:
        raise ValueError(
            f"add_bos_token=True, but this {type(tokenizer).__name__} has no BOS token. "
            "Pass add_bos_token=False (--no-bos of basinscope extract, add_bos_token: false in a "
            "run file), or a tokenizer whose bos_token is set."
        )


def _row_features(max_length: int) -> datasets.Features:
    from datasets import Features, List, Value

    return Features({"input_ids": List(Value("int32"), length=max_length)})


def _cut_documents(
    documents: datasets.Dataset,
    tokenizer: Any,
    column_name: str,
    max_length: int,
    bos: list[int],
    num_proc: int | None,
) -> datasets.Dataset:
    """Tokenize in parallel, then cut in one sequential pass; both steps stream through Arrow."""
    import pyarrow.compute as pc
    from datasets import Features, List, Value

    tokenized = documents.map(
        _tokenize,
        with_indices=True,
        batched=True,
        batch_size=DOCUMENTS_PER_BATCH,
        num_proc=num_proc,
        remove_columns=[column_name],
        features=Features({"input_ids": List(Value("int32"))}),
        fn_kwargs={"tokenizer": tokenizer, "column_name": column_name},
        desc="Tokenizing",
    )
    num_tokens = pc.sum(pc.list_value_length(tokenized.data.column("input_ids"))).as_py() or 0
    _check_filled(num_tokens, max_length, bos)
    return tokenized.with_format("arrow").map(
        _Cutter(max_length, bos).cut_table,
        batched=True,
        batch_size=DOCUMENTS_PER_BATCH,
        features=_row_features(max_length),
        desc="Cutting rows",
    )


class _Restartable:
    """The rows of a stream of documents, from the first one each time it is called."""

    def __init__(
        self,
        documents: datasets.Dataset | datasets.IterableDataset,
        tokenizer: Any,
        column_name: str,
        max_length: int,
        bos: list[int],
    ) -> None:
        self.documents, self.tokenizer, self.column_name = documents, tokenizer, column_name
        self.max_length, self.bos = max_length, bos

    def __call__(self) -> Iterator[dict[str, np.ndarray]]:
        cutter = _Cutter(self.max_length, self.bos)
        num_documents, num_tokens = 0, 0
        for batch in self.documents.iter(batch_size=DOCUMENTS_PER_BATCH):
            size = len(batch[self.column_name])
            indices = list(range(num_documents, num_documents + size))
            for ids in _tokenize(batch, indices, self.tokenizer, self.column_name)["input_ids"]:
                yield from ({"input_ids": row} for row in cutter.cut(ids))
                num_tokens += len(ids)
            num_documents += size
        _check_filled(num_tokens, self.max_length, self.bos)


def _tokenize(
    batch: dict[str, list[Any]], indices: list[int], tokenizer: Any, column_name: str
) -> dict[str, list[np.ndarray]]:
    """Token ids per document, each after the first with the EOS token in front."""
    documents = _tokenize_texts(batch[column_name], indices, tokenizer, column_name)
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    joined = [
        (eos if index else []) + document
        for index, document in zip(indices, documents, strict=True)
    ]
    return {"input_ids": [np.asarray(document, dtype=np.int32) for document in joined]}


def _tokenize_texts(
    texts: list[Any], indices: list[int], tokenizer: Any, column_name: str
) -> list[list[int]]:
    """Token ids per text, whole and without special tokens."""
    for index, text in zip(indices, texts, strict=True):
        if not isinstance(text, str):
            raise TypeError(
                f"row {index} of column {column_name!r} is {text!r}, not a string. "
                "Remove such rows first, for example with dataset.filter."
            )
    ids: list[list[int]] = tokenizer(
        texts,
        add_special_tokens=False,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        verbose=False,
    )["input_ids"]
    return ids


def _check_filled(num_tokens: int, max_length: int, bos: list[int]) -> None:
    width = max_length - len(bos)
    if num_tokens < width:
        raise ValueError(
            f"the text holds {num_tokens} tokens, fewer than the {width} that one row of "
            f"max_length={max_length} takes. Give more text, or a smaller max_length."
        )


class _Cutter:
    """Cuts a token stream that comes in pieces; what fills no row yet waits for the next piece."""

    def __init__(self, max_length: int, bos: list[int]) -> None:
        self.max_length, self.bos = max_length, bos
        self.rest = np.empty(0, dtype=np.int32)

    def cut(self, tokens: np.ndarray) -> np.ndarray:
        """All rows (row, max_length) that are full after these tokens."""
        stream = np.concatenate([self.rest, tokens])
        width = self.max_length - len(self.bos)
        full = len(stream) // width
        self.rest = stream[full * width :]
        rows = np.empty((full, self.max_length), dtype=np.int32)
        rows[:, : len(self.bos)] = self.bos
        rows[:, len(self.bos) :] = stream[: full * width].reshape(full, width)
        return rows

    def cut_table(self, documents: pa.Table) -> pa.Table:
        """The same for an Arrow table of tokenized documents."""
        import pyarrow as pa

        pieces = [chunk.flatten().to_numpy() for chunk in documents["input_ids"].chunks]
        rows = self.cut(np.concatenate(pieces))
        column = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), self.max_length)
        return pa.table({"input_ids": column})


def _tokenize_each(
    batch: dict[str, list[Any]],
    indices: list[int],
    tokenizer: Any,
    column_name: str,
    bos: list[int],
) -> dict[str, list[np.ndarray]]:
    """Token ids per text, each with the BOS token in front."""
    rows = _tokenize_texts(batch[column_name], indices, tokenizer, column_name)
    return {"input_ids": [np.asarray(bos + row, dtype=np.int32) for row in rows]}


def _keep_first(texts: pa.Table, count: int) -> pa.Table:
    """An Arrow table of tokenized texts with at most so many tokens of each."""
    import pyarrow as pa
    import pyarrow.compute as pc

    return pa.table({"input_ids": pc.list_slice(texts["input_ids"], 0, count)})
