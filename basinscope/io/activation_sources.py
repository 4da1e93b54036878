"""What may be saved as activations: arrays of NumPy, xarray and torch, by what they can do.

torch is never imported here: a tensor is what can be detached.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from basinscope.io.activation_layout import (
    BFLOAT16,
    ActivationSource,
    ActivationSpec,
    dtype_name,
)
from basinscope.io.dims import FROM_END

_STREAM = ("example", "position", "d_model")
_EMBED = ("example", "position", "d_embed")
_OF_HEAD = ("example", "position", "d_head")
DIMS = {
    r"resid_(in|mid|out)_\d+|(attn_in|attn_out|mlp_out)_\d+|embed|head_out_L\d+H\d+": _STREAM,
    r"head_out_\d+": ("example", "position", "head", "d_model"),
    r"queries_\d+": ("example", "position", "head", "d_head"),
    r"(keys|values)_\d+": ("example", "position", "kv_head", "d_head"),
    r"(queries|keys|values)_L\d+H\d+": _OF_HEAD,
    r"attn_pattern_\d+": ("example", "head", "position", "key_position"),
    r"attn_pattern_L\d+H\d+": ("example", "position", "key_position"),
    r"last_layernorm_(mean|variance|second_moment)": ("example", "position"),
    r"logits": ("example", "position", "vocab"),
    r"input_ids": ("example", "token"),
}
"""Dims of the arrays that an extraction gives, by the pattern of their names.

``embed`` has a ``d_embed`` where it is not as wide as the stream.
"""


def sources_of(
    activations: Any,
) -> tuple[dict[str, ActivationSource], Mapping[Any, Any], dict[str, Any], dict[str, Any] | None]:
    """Find arrays, coordinates, attributes and unembedding in what is to be saved.

    Parameters
    ----------
    activations : mapping of str to array, xr.Dataset, xr.DataTree, or one array
        A mapping may have ``dims`` and ``coords`` as an activation cache does. Where nothing says
        what an array's dims are, the names of :data:`DIMS` do; other arrays get dims of their own.

    Raises
    ------
    TypeError
        If a value is no array of numbers; names it.
    """
    if isinstance(activations, xr.DataTree):
        others = sorted(activations.children.keys() - {"unembedding"})
        if others:
            raise TypeError(f"a tree of activations has no groups but unembedding: got {others}")
        unembedding = None
        if "unembedding" in activations.children:
            child = activations["unembedding"].to_dataset()
            unembedding = {**child.attrs, **{str(n): v.to_numpy() for n, v in child.items()}}
        arrays, coords, attrs, _ = sources_of(activations.to_dataset())
        return arrays, coords, attrs, unembedding
    if isinstance(activations, xr.Dataset):
        arrays = {str(name): _of_xarray(str(name), v) for name, v in activations.items()}
        return arrays, activations.coords, dict(activations.attrs), None
    if not isinstance(activations, Mapping):
        name = activations.name if isinstance(activations, xr.DataArray) else None
        activations = {name or "activations": activations}
    labelled = [v for v in activations.values() if isinstance(v, xr.DataArray)]
    found = [values.coords.to_dataset() for values in labelled]
    merged = xr.merge(found, join="exact", compat="no_conflicts").coords
    sizes = {dim: size for values in labelled for dim, size in values.sizes.items()}
    own = dict(getattr(activations, "coords", {}))
    if FROM_END in own:
        own[FROM_END] = ("position", own[FROM_END])
    return _sources(activations, sizes), {**merged, **own}, {}, None


def _sources(activations: Mapping[str, Any], sizes: dict[Any, int]) -> dict[str, ActivationSource]:
    known: Mapping[str, tuple[str, ...]] = getattr(activations, "dims", {})
    sources = {}
    for name in sorted(activations, key=lambda name: name == "embed"):  # last: others name d_model
        values = activations[name]
        if isinstance(values, xr.DataArray):
            sources[name] = _of_xarray(name, values)
            continue
        is_tensor = hasattr(values, "detach")
        array = values if is_tensor else _as_numpy(name, values)
        dims = known.get(name) or _dims_of(name, tuple(array.shape), sizes)
        sources[name] = (_of_tensor if is_tensor else _of_numpy)(name, array, dims)
    return {name: sources[name] for name in activations}


def _as_numpy(name: str, values: Any) -> np.ndarray:
    try:
        return np.asarray(values)
    except ValueError as error:  # rows of different lengths
        raise TypeError(f"activations[{name!r}] is no array: {error}") from None


def _dims_of(name: str, shape: tuple[int, ...], sizes: dict[Any, int]) -> tuple[str, ...]:
    """Name dims by the array's name, unless another array has them with other sizes."""
    for pattern, dims in (*DIMS.items(), ("embed", _EMBED)):
        if re.fullmatch(pattern, name) and len(dims) == len(shape):
            found = dict(zip(dims, shape, strict=True))
            if all(sizes.get(dim, size) == size for dim, size in found.items()):
                sizes.update(found)
                return dims
    return tuple(f"{name}_dim_{axis}" for axis in range(len(shape)))


def _of_xarray(name: str, values: xr.DataArray) -> ActivationSource:
    known = values.attrs.get("source_dtype") == BFLOAT16
    dims = tuple(map(str, values.dims))
    spec = _spec(name, dims, values.shape, BFLOAT16 if known else values.dtype)

    def read(start: int, stop: int) -> np.ndarray:
        return (values[start:stop] if values.ndim else values).to_numpy()

    return ActivationSource(spec, read)


def _of_tensor(name: str, values: Any, dims: tuple[str, ...]) -> ActivationSource:
    dtype = str(values.dtype).removeprefix("torch.")
    spec = _spec(name, dims, tuple(values.shape), dtype)
    if values.is_meta or str(values.layout) != "torch.strided":
        raise TypeError(
            f"activations[{name!r}] is a tensor of {values.layout} on {values.device}: give its "
            "numbers as a dense tensor (.to_dense())"
        )

    def read(start: int, stop: int) -> np.ndarray:
        part = (values[start:stop] if values.ndim else values).detach().cpu()
        return np.asarray((part.float() if dtype == BFLOAT16 else part).numpy())

    return ActivationSource(spec, read)


def _of_numpy(name: str, values: np.ndarray, dims: tuple[str, ...]) -> ActivationSource:
    spec = _spec(name, dims, values.shape, values.dtype)
    return ActivationSource(spec, lambda start, stop: values[start:stop] if values.ndim else values)


def _spec(name: str, dims: tuple[str, ...], shape: tuple[int, ...], dtype: Any) -> ActivationSpec:
    try:
        return ActivationSpec(dims, shape, dtype_name(dtype))
    except (TypeError, ValueError):
        raise TypeError(
            f"activations[{name!r}] is of type {dtype}; what is saved are real numbers of at most "
            "64 bits that NumPy has, and bfloat16: convert it, or put it into other_metadata"
        ) from None
