"""Activations of a batch, by name.

    resid_in_{i}, resid_mid_{i}, resid_out_{i}, attn_in_{i}, attn_out_{i}, mlp_out_{i}, embed
                                            (example, position, d_model), embed with
                                            d_embed where it is not as wide as the stream
    head_out_{i}                            (example, position, head, d_model)
    queries_{i}                             (example, position, head, d_head)
    keys_{i}, values_{i}                    (example, position, kv_head, d_head)
    attn_pattern_{i}                        (example, head, position, key_position)
    last_layernorm_mean, last_layernorm_variance, last_layernorm_second_moment
                                            (example, position)
    logits                                  (example, position, vocab)
    input_ids                               (example, token)

One head of a layer's array has a name too: ``head_out_L{i}H{j}``, ``keys_L{i}H{j}`` and so on.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

if TYPE_CHECKING:
    import xarray as xr

_ONE_HEAD = re.compile(r"(head_out|queries|keys|values|attn_pattern)_L(\d+)H(\d+)")


class ActivationCache(Mapping[str, Tensor]):
    """Named activations with their dimensions, positions and where they come from.

    Attributes
    ----------
    dims : dict of str to tuple of str
        Names of each array's axes.
    coords : dict of str to ndarray
        ``position``: the token that each stored position is; -1 for an average over positions. For
        sequences of several lengths whose positions count from the end, ``from_end`` in its place:
        -1 is the last token.
    metadata : dict
        Model, configuration, positions, interventions.
    """

    def __init__(
        self,
        arrays: Mapping[str, Tensor],
        dims: Mapping[str, tuple[str, ...]],
        coords: Mapping[str, npt.NDArray[np.int64]],
        metadata: Mapping[str, Any],
    ) -> None:
        self._arrays = dict(arrays)
        self.dims = {name: dims[name] for name in arrays}
        self.coords = dict(coords)
        self.metadata = dict(metadata)

    def __getitem__(self, name: str) -> Tensor:
        """Give an array, or one head of it by its ``..._L{i}H{j}`` name."""
        if name in self._arrays:
            return self._arrays[name]
        match = _ONE_HEAD.fullmatch(name)
        whole = f"{match[1]}_{match[2]}" if match else ""
        if match and whole in self._arrays:
            axis = next(a for a, dim in enumerate(self.dims[whole]) if dim.endswith("head"))
            array = self._arrays[whole]
            if int(match[3]) < array.shape[axis]:
                return array.select(axis, int(match[3]))
            raise KeyError(f"{name!r}: {whole} has heads 0 to {array.shape[axis] - 1}")
        near = difflib.get_close_matches(name, self._arrays, n=2)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise KeyError(f"{name!r} was not extracted; there are {', '.join(self._arrays)}{hint}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __repr__(self) -> str:
        model = self.metadata.get("model", {}).get("class", "a model")
        lines = [f"ActivationCache of {model}"]
        width = max((len(name) for name in self), default=0)
        for name, array in self._arrays.items():
            sizes = zip(self.dims[name], array.shape, strict=True)
            shape = ", ".join(f"{dim}: {size}" for dim, size in sizes)
            lines.append(f"  {name:<{width}}  ({shape})  {str(array.dtype).removeprefix('torch.')}")
        return "\n".join(lines)

    @property
    def num_examples(self) -> int:
        """Number of examples; 0 for an empty cache."""
        return next((len(array) for array in self._arrays.values()), 0)

    def to(self, device: torch.device | str) -> ActivationCache:
        """Give the same activations on another device."""
        arrays = {name: array.to(device) for name, array in self.items()}
        return ActivationCache(arrays, self.dims, self.coords, self.metadata)

    @classmethod
    def cat(cls, caches: Sequence[ActivationCache]) -> ActivationCache:
        """Put the examples of several caches into one.

        Raises
        ------
        ValueError
            If there is none, or if their arrays, shapes beside the examples, positions or metadata
            differ.
        """
        if not caches:
            raise ValueError("there are no caches to put together")
        first = caches[0]
        for number, other in enumerate(caches[1:], start=1):
            if difference := _difference(first, other):
                raise ValueError(f"caches 0 and {number} do not belong together: {difference}")
        arrays = {name: torch.cat([cache[name] for cache in caches]) for name in first}
        return cls(arrays, first.dims, first.coords, first.metadata)

    def to_dataset(self) -> xr.Dataset:
        """Give the arrays as an xarray Dataset of NumPy arrays, bfloat16 as float32."""
        import xarray as xr

        variables = {name: (self.dims[name], to_numpy(array)) for name, array in self.items()}
        coords = {name: ("position", numbers) for name, numbers in self.coords.items()}
        return xr.Dataset(variables, coords=coords, attrs=self.metadata)


def to_numpy(array: Tensor) -> npt.NDArray[Any]:
    """Copy to NumPy, which has no bfloat16: that becomes float32, exactly."""
    array = array.detach().cpu()
    return (array.float() if array.dtype == torch.bfloat16 else array).numpy()


def _difference(first: ActivationCache, other: ActivationCache) -> str:
    """Say in what two caches differ that must not; empty if in nothing."""
    if list(first) != list(other):
        odd = sorted(set(first) ^ set(other))
        return f"only one of them has {', '.join(odd)}" if odd else "their arrays' order"
    for name in first:
        if first[name].shape[1:] != other[name].shape[1:]:
            return f"{name} is {tuple(first[name].shape)} and {tuple(other[name].shape)}"
    for name in first.coords:
        if not np.array_equal(first.coords[name], other.coords[name]):
            return f"{name} is {first.coords[name].tolist()} and {other.coords[name].tolist()}"
    for key in first.metadata:
        if first.metadata[key] != other.metadata.get(key):
            return f"{key} is {first.metadata[key]!r} and {other.metadata.get(key)!r}"
    return ""
