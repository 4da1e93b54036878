"""Activations as the logit lens takes them: opened lazily, found by patterns of their names."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from basinscope.io import activation_store
from basinscope.io.activation_sources import DIMS
from basinscope.io.dims import FROM_END

STREAMS = re.compile(r"resid_(in|mid|out)_\d+|embed")
SHARES = re.compile(r"(attn_out|mlp_out)_\d+|head_out_(\d+|L\d+H\d+)")
OTHERS = re.compile(r"last_layernorm_(mean|variance|second_moment)|input_ids|logits")
WIDTH = "d_model"


def open_activations(activations: Any) -> xr.Dataset:
    """Give activations as a Dataset; what is on disk is not read.

    Parameters
    ----------
    activations : ActivationCache, xr.Dataset, xr.DataTree, path or mapping
        A mapping holds arrays or tensors (example, position, d_model), ``head_out_{i}`` (example,
        position, head, d_model), ``last_layernorm_...`` (example, position) and ``input_ids``
        (example, token); others in it are left aside.

    Raises
    ------
    TypeError, ValueError, FileNotFoundError
        If it is something else, has other axes, or is a path without a finished store.
    """
    if isinstance(activations, str | os.PathLike):
        return activation_store.open_activations(activations).to_dataset()
    if isinstance(activations, xr.Dataset):
        return activations
    if isinstance(activations, xr.DataTree) or hasattr(activations, "to_dataset"):
        found: xr.Dataset = activations.to_dataset()
        return found
    if isinstance(activations, Mapping):
        arrays = {name: _array(name, a) for name, a in activations.items() if _known(name)}
        widths = {values.shape[-1] for dims, values in arrays.values() if dims[-1] == "d_model"}
        if len(widths) > 1 and "embed" in arrays:  # of a model that maps it to the stream's width
            dims, values = arrays["embed"]
            arrays["embed"] = (*dims[:-1], "d_embed"), values
        return xr.Dataset(arrays)
    raise TypeError(
        f"activations are a {type(activations).__name__}: give an ActivationCache, an xarray "
        "Dataset or DataTree, the path of a store, or a dict of arrays"
    )


def _known(name: str) -> bool:
    return any(expression.fullmatch(name) for expression in (STREAMS, SHARES, OTHERS))


def _array(name: str, values: Any) -> tuple[tuple[str, ...], Any]:
    dims = next(dims for pattern, dims in DIMS.items() if re.fullmatch(pattern, name))
    if np.ndim(values) != len(dims):
        raise ValueError(f"{name} has shape {tuple(np.shape(values))}; its axes must be {dims}")
    if hasattr(values, "detach"):  # a tensor, maybe bfloat16, which NumPy has not
        values = values.detach().cpu()
        values = (values.float() if values.is_floating_point() else values).numpy()
    return dims, values


def described_model(dataset: xr.Dataset) -> Mapping[str, Any]:
    """What activations say about their model; nothing if they do not, or in other words."""
    found = dataset.attrs.get("model")
    return found if isinstance(found, Mapping) else {}


def model_name(dataset: xr.Dataset) -> str | None:
    """The name that activations carry of their model; its class is none."""
    model = described_model(dataset)
    name: str | None = model.get("name_or_path") or None
    return None if name == model.get("class") else name


def matching_keys(dataset: xr.Dataset, pattern: str) -> list[str]:
    """Give the names of d_model-wide arrays that fit a pattern, in the order of their numbers.

    Raises
    ------
    KeyError
        If none does; lists those there are, and names that are near.
    TypeError
        If `pattern` is no text.

    Examples
    --------
    >>> values = ("example", "position", "d_model"), np.zeros((1, 1, 2))
    >>> dataset = xr.Dataset({f"resid_out_{i}": values for i in (10, 9)})
    >>> matching_keys(dataset, "resid_out_{i}")
    ['resid_out_9', 'resid_out_10']
    """
    if not isinstance(pattern, str):
        raise TypeError(
            f"target_key={pattern!r}: give the name of an activation such as 'resid_out_3', or a "
            "pattern such as 'resid_out_{i}'"
        )
    names = _lens_names(dataset)
    expression = re.compile(re.sub(r"\\\{\w*\\\}", r"\\d+", re.escape(pattern)))
    found = sorted((n for n in names if expression.fullmatch(n)), key=numbers_in)
    if found:
        return found
    if pattern in dataset:
        dims = tuple(map(str, dataset[pattern].dims))
        raise KeyError(f"{pattern} has axes {dims}: the lens takes arrays whose last is {WIDTH}")
    there = ", ".join(sorted({re.sub(r"\d+", "{i}", n) for n in names})) or "none"
    near = difflib.get_close_matches(pattern, names, n=2)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise KeyError(f"no activations fit {pattern!r}; there are {there}{hint}")


def numbers_in(name: str) -> tuple[int, ...]:
    """Give the numbers of layer and head in a name."""
    return tuple(int(digits) for digits in re.findall(r"\d+", name))


def _lens_names(dataset: xr.Dataset) -> list[str]:
    """Names of arrays d_model wide, and of the single heads in them."""
    names = []
    for name, array in dataset.data_vars.items():
        if not array.dims or array.dims[-1] != WIDTH:
            continue
        names.append(str(name))
        if "head" in array.dims:
            kind, _, layer = str(name).rpartition("_")
            names += [f"{kind}_L{layer}H{head}" for head in range(array.sizes["head"])]
    return names


def activation(dataset: xr.Dataset, key: str) -> xr.DataArray:
    """Give an array by its name, or one head of a layer's."""
    match = re.fullmatch(r"(\w+)_L(\d+)H(\d+)", key)
    if match is None or key in dataset:
        return dataset[key]
    return dataset[f"{match[1]}_{match[2]}"].isel(head=int(match[3]), drop=True)


def token_ids(given: Any, name: str) -> np.ndarray:
    """Give token ids, or -1 for none, as an array with an axis of examples and one of tokens.

    Raises
    ------
    ValueError
        If they are no integers, or have other axes.
    """
    ids = np.asarray(given)
    if ids.ndim != 2 or ids.dtype.kind not in "iu":
        raise ValueError(
            f"{name} are {ids.dtype} of shape {ids.shape}: give whole numbers, a row for each "
            "example"
        )
    return ids


def token_numbers(dataset: xr.Dataset, tokens: int) -> np.ndarray | None:
    """Give which of its sequence's tokens each position is; -1 for an average.

    Returns
    -------
    np.ndarray (position,) or None
        None where that is not known.
    """
    if FROM_END in dataset.coords:  # shorter sequences have no tokens in front
        return dataset[FROM_END].to_numpy() + tokens
    if "position" in dataset.coords:
        return dataset["position"].to_numpy()
    count = dataset.sizes["position"]
    return np.arange(count) if count == tokens else None


def position_names(dataset: xr.Dataset) -> list[str]:
    """Say what each position is called: its number, from the end a negative one, or "mean"."""
    if FROM_END in dataset.coords:
        return list(map(str, dataset[FROM_END].to_numpy()))
    count = dataset.sizes["position"]
    numbers = dataset["position"].to_numpy() if "position" in dataset.coords else np.arange(count)
    return ["mean" if number < 0 else str(number) for number in numbers]


def next_tokens(dataset: xr.Dataset, input_ids: Any = None) -> xr.DataArray | None:
    """Give the token that follows each position, -1 where there is none.

    Parameters
    ----------
    dataset : xr.Dataset
    input_ids : array_like (example, token), optional
        Default: those in `dataset`.

    Returns
    -------
    DataArray (example, position) or None
        None without any ids.
    """
    if input_ids is None and "input_ids" not in dataset:
        return None
    ids = dataset["input_ids"] if input_ids is None else token_ids(input_ids, "input_ids")
    ids = xr.DataArray(ids, dims=("example", "token"))
    if ids.sizes["example"] != dataset.sizes["example"]:
        raise ValueError(
            f"input_ids have {ids.sizes['example']} examples, the activations "
            f"{dataset.sizes['example']}"
        )
    tokens, count = ids.sizes["token"], dataset.sizes["position"]
    positions = token_numbers(dataset, tokens)
    if positions is None:
        raise ValueError(
            f"which tokens the {count} positions are is not known (there are {tokens} tokens, and "
            "no coordinate position): pass targets (example, position)"
        )
    following = xr.DataArray(np.clip(positions + 1, 0, tokens - 1), dims="position")
    known = xr.DataArray((positions >= 0) & (positions + 1 < tokens), dims="position")
    return ids.isel(token=following).where(known, -1)
