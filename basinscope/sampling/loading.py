"""Models and token ids by their names, for the command line."""

from __future__ import annotations

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
        If text comes without `max_length`.
    """
    import datasets

    require_data(path)
    dataset: Any
    if path.is_dir():
        dataset = datasets.load_from_disk(str(path))
    else:
        loader = _LOADERS[path.suffix]
        extra = {"sample_by": "document"} if loader == "text" else {}
        dataset = datasets.load_dataset(loader, data_files=str(path), split="train", **extra)
    if "input_ids" in dataset.column_names:
        return dataset
    from transformers import AutoTokenizer

    from basinscope.sampling.tokenize import tokenize_and_concatenate

    if max_length is None:
        raise ValueError(f"{str(path)!r} is text, so it needs max_length (tokens per row)")
    if lacks_tokenizer(tokenizer):
        raise FileNotFoundError(
            f"{str(path)!r} is text, and no tokenizer was found in {tokenizer}: save the model's "
            "there with save_pretrained(), or give token ids"
        )
    with _explained("tokenizer", tokenizer):
        found = AutoTokenizer.from_pretrained(tokenizer)
    return tokenize_and_concatenate(
        dataset,
        found,
        max_length=max_length,
        column_name=column,
        add_bos_token=add_bos_token,
    )


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
