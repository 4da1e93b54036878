"""Models and token ids by their names, for the command line."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

DTYPES = ("float32", "bfloat16", "float16")
_LOADERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".txt": "text"}
_OF_TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "tekken.json")  # files, one of which is there


def load_model(name: str, dtype: str = "float32") -> Any:
    """Load a Hugging Face causal LM.

    Parameters
    ----------
    name : str
        A directory, or a name on the hub.
    dtype : {"float32", "bfloat16", "float16"}

    Raises
    ------
    ValueError
        If `dtype` is another.
    FileNotFoundError
        If there is neither such a directory nor, as far as the hub can be reached, such a name.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    with _explained("model", name):
        return AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype))


def load_tokenizer(name: str) -> Any:
    """Load a tokenizer for its texts.

    Parameters
    ----------
    name : str
        A directory, a ``tokenizer.json``, or a name on the hub.

    Returns
    -------
    tokenizers.Tokenizer or transformers.PreTrainedTokenizerBase
        The former, which takes neither transformers nor torch, wherever there is such a file.

    Raises
    ------
    FileNotFoundError
        If it is a directory without a tokenizer, or there is neither such a directory nor, as far
        as the hub can be reached, such a name.
    """
    if lacks_tokenizer(name):
        raise FileNotFoundError(
            f"no tokenizer was found in {name}: give the folder where one was saved, a "
            "tokenizer.json, or a name on the hub"
        )
    file = Path(name) / "tokenizer.json" if Path(name).is_dir() else Path(name)
    if file.is_file():
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(file))
    from transformers import AutoTokenizer

    with _explained("tokenizer", name):
        return AutoTokenizer.from_pretrained(name)


def load_words(name: str) -> Callable[[int], str]:
    """Load a tokenizer to turn token ids into their texts.

    Parameters
    ----------
    name : str
        As for :func:`load_tokenizer`, whose errors it raises.

    Returns
    -------
    function of int to str
        What is no text of its own, such as a part of a character, goes by its name in the
        vocabulary; ids that are not in there stay numbers.
    """
    tokenizer = load_tokenizer(name)
    piece = getattr(tokenizer, "id_to_token", None) or tokenizer.convert_ids_to_tokens

    def word(token: int) -> str:
        alone, again = (tokenizer.decode([token] * n, skip_special_tokens=False) for n in (1, 2))
        text: str = again.removeprefix(alone)  # with the space that a first word may lose
        return text if text and "\ufffd" not in again else piece(token) or str(token)

    return word


def lacks_tokenizer(name: str) -> bool:
    """Whether this is a directory without a tokenizer; of such, transformers makes an empty one."""
    folder = Path(name)
    return folder.is_dir() and not any(any(folder.glob(files)) for files in _OF_TOKENIZERS)


def load_tokens(
    path: Path,
    tokenizer: str,
    *,
    max_length: int | None = None,
    column: str = "text",
    add_bos_token: bool = True,
) -> Dataset:
    """Load token ids, or text that a model's tokenizer turns into them.

    Parameters
    ----------
    path : Path
        A directory of ``Dataset.save_to_disk``, or a parquet, JSON, CSV or text file; with a column
        ``input_ids``, or with text.
    tokenizer : str
        Where the tokenizer is: a directory, or a name on the hub.
    max_length : int, optional
        Tokens in a row; for text, which is cut into rows.
    column : str
        Where the text is.
    add_bos_token : bool

    Raises
    ------
    FileNotFoundError
        If there is no such directory or file, or text and no tokenizer.
    ValueError
        If the file cannot be read, text comes without `max_length`, or token ids come in rows of
        another length.
    """
    dataset = _read(path, text_by="document")
    if "input_ids" in dataset.column_names:
        if max_length is not None and len(dataset) and len(dataset[0]["input_ids"]) != max_length:
            raise ValueError(
                f"{str(path)!r} holds token ids, the first row {len(dataset[0]['input_ids'])} of "
                f"them, which are taken as they are: leave max_length={max_length} out, or cut the "
                "rows first"
            )
        return dataset

    from basinscope.sampling.tokenize import tokenize_and_concatenate

    if max_length is None:
        raise ValueError(
            f"{str(path)!r} is text, so it needs max_length (tokens per row; --max-length in a "
            "shell). basinscope extract can also take each text as a row: --each-text"
        )
    return tokenize_and_concatenate(
        dataset,
        _tokenizer_for(path, tokenizer),
        max_length=max_length,
        column_name=column,
        add_bos_token=add_bos_token,
    )


def load_texts(
    path: Path,
    tokenizer: str,
    *,
    rows: int | None = None,
    max_length: int | None = None,
    column: str = "text",
    add_bos_token: bool = True,
) -> Dataset:
    """Load texts as token ids, each text a row of its own.

    Parameters
    ----------
    path : Path
        As for :func:`load_tokens`, with text. Of a text file each line is a text; blank ones are
        left out, with a warning that counts them.
    tokenizer : str
        Where the tokenizer is: a directory, or a name on the hub.
    rows : int, optional
        Only the first so many texts.
    max_length : int, optional
        Most tokens of a row: see :func:`basinscope.tokenize_texts`.
    column : str
        Where the text is.
    add_bos_token : bool

    Raises
    ------
    FileNotFoundError
        If there is no such directory or file, or no tokenizer.
    ValueError
        If the file cannot be read, these are token ids, a text has no tokens, or there are none.
    """
    from basinscope.sampling.tokenize import tokenize_texts

    texts = _read(path, text_by="line")
    if "input_ids" in texts.column_names:
        raise ValueError(
            f"{str(path)!r} holds token ids (a column input_ids), whose rows are taken as they "
            "are: leave --each-text out"
        )
    found = _tokenizer_for(path, tokenizer)
    if path.suffix == ".txt":
        texts = _without_blank(texts, path)
    if rows is not None:
        texts = texts.select(range(min(rows, len(texts))))
    return tokenize_texts(
        texts,
        found,
        max_length=max_length,
        column_name=column,
        add_bos_token=add_bos_token,
    )


def _read(path: Path, text_by: str) -> Any:
    """Read a data set; of a text file, each "line" is a row, or the whole "document"."""
    import datasets

    require_data(path)
    if path.is_dir():
        found = datasets.load_from_disk(str(path))
        if isinstance(found, datasets.DatasetDict):
            one = next(iter(found), "train")
            raise ValueError(
                f"{str(path)!r} holds several data sets ({', '.join(found)}): give one of them, "
                f"such as {str(path / one)!r}"
            )
        return found
    if not path.stat().st_size:
        raise ValueError(f"{str(path)!r} is empty: give a file with data")
    loader = _LOADERS[path.suffix]
    extra = {"sample_by": text_by} if loader == "text" else {}
    try:
        return datasets.load_dataset(loader, data_files=str(path), split="train", **extra)
    except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
        reason = str(error.__cause__ or error).partition("\n")[0]
        raise ValueError(f"{str(path)!r} cannot be read as {loader}: {reason}") from error


def _tokenizer_for(path: Path, tokenizer: str) -> Any:
    """Load the tokenizer that a path of text needs."""
    from transformers import AutoTokenizer

    if lacks_tokenizer(tokenizer):
        raise FileNotFoundError(
            f"{str(path)!r} is text, and no tokenizer was found in {tokenizer}: save the model's "
            "there with save_pretrained(), or give token ids"
        )
    with _explained("tokenizer", tokenizer):
        return AutoTokenizer.from_pretrained(tokenizer)


def _without_blank(lines: Any, path: Path) -> Any:
    """Leave out blank lines, and warn of them."""
    texts = lines.filter(
        lambda some: [bool(line.strip()) for line in some], input_columns="text", batched=True
    )
    if blank := len(lines) - len(texts):
        warnings.warn(
            f"blank lines of {str(path)!r} are left out: {blank} of {len(lines)}; sequences are "
            "numbered without them",
            stacklevel=3,
        )
    return texts


def require_data(path: Path) -> None:
    """Refuse a path that :func:`load_tokens` cannot read, without a look inside.

    Raises
    ------
    FileNotFoundError
        If it does not exist, or is a file of another kind.
    """
    if path.is_dir() or (path.suffix in _LOADERS and path.is_file()):
        return
    problem = "must be" if path.exists() else "does not exist: it must be"
    raise FileNotFoundError(
        f"{str(path)!r} {problem} a directory of Dataset.save_to_disk, or a file ending in "
        f"{', '.join(_LOADERS)}"
    )


@contextmanager
def _explained(what: str, name: str) -> Iterator[None]:
    """Say what was looked for where neither a directory nor the hub has it."""
    try:
        yield
    except OSError as error:
        if Path(name).exists():
            raise
        reason = str(error).partition("\n")[0]
        raise FileNotFoundError(
            f"no {what} {name!r}: there is no such directory here, and from the hub it could not "
            f"be had ({reason})"
        ) from error
