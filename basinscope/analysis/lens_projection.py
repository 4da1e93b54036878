"""From blocks of activations to logits, with a final norm and an unembedding as arrays."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import xarray as xr
from dask.utils import SerializableLock

from basinscope.analysis import lens_blocks
from basinscope.analysis.lens_blocks import MEASURES, normalized, row_parts, softmax

Array = npt.NDArray[Any]
Translators = Mapping[int, tuple[Array, Array]]


class UnembeddingLike(Protocol):
    """What :class:`basinscope.models.unembedding.Unembedding` has; `weight` is indexed by rows."""

    @property
    def weight(self) -> Any: ...
    @property
    def bias(self) -> Any: ...
    @property
    def norm(self) -> str: ...
    @property
    def norm_weight(self) -> Any: ...
    @property
    def norm_bias(self) -> Any: ...
    @property
    def eps(self) -> float: ...
    @property
    def softcap(self) -> float | None: ...
    @property
    def scale(self) -> float: ...
    @property
    def num_layers(self) -> int | None: ...


@dataclass(frozen=True)
class How:
    """How an activation is read.

    Attributes
    ----------
    whole : bool
        As a stream that is the last, with biases and soft cap; else as a share.
    apply_norm : bool
    layer : int or None
        Whose translator comes first.
    """

    whole: bool
    apply_norm: bool
    layer: int | None


class Projection:
    """The arithmetic of a lens on one block at a time.

    Parameters
    ----------
    unembedding, translators
        As :class:`basinscope.analysis.logit_lens.LogitLens` takes them.
    """

    def __init__(
        self, unembedding: UnembeddingLike | xr.Dataset, translators: Translators | None
    ) -> None:
        if isinstance(unembedding, xr.Dataset):
            unembedding = _Stored(unembedding)
        self.weight = unembedding.weight
        self.bias = _vector(unembedding.bias)
        self.norm = unembedding.norm
        self.norm_weight = _vector(unembedding.norm_weight)
        self.norm_bias = _vector(unembedding.norm_bias)
        self.eps, self.scale = float(unembedding.eps), float(unembedding.scale)
        self.softcap = unembedding.softcap
        self.num_layers = unembedding.num_layers
        self.translators = dict(translators or {})
        for layer, (matrix, offset) in self.translators.items():
            if matrix.shape != (self.d_model, self.d_model) or offset.shape != (self.d_model,):
                raise ValueError(
                    f"the translator of layer {layer} has shapes {matrix.shape} and {offset.shape}"
                    f"; the unembedding is {self.d_model} wide"
                )
        self._matrix: Array | None = None
        self._lock = SerializableLock()
        self._token = uuid.uuid4().hex

    def __dask_tokenize__(self) -> str:
        return self._token  # hashing the weights would read them

    @property
    def vocab_size(self) -> int:
        """Number of tokens that have logits."""
        return int(self.weight.shape[0])

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self.weight.shape[1])

    @property
    def constant(self) -> Array:
        """What belongs to no activation: scale (W norm_bias + bias), (vocab,), float32."""
        found = np.zeros(self.vocab_size, np.float32)
        if self.norm_bias is not None:
            found += self._all_rows() @ self.norm_bias
        if self.bias is not None:
            found += self.bias
        return found * np.float32(self.scale)

    def _logits_block(
        self, x: Array, square: Array | None = None, *, how: How, apply_softmax: bool
    ) -> Array:
        rows = self._features(x, square, how)
        logits = self._scores(rows.reshape(-1, self.d_model), slice(None), whole=how.whole)
        found = softmax(logits) if apply_softmax else logits
        return found.reshape(*x.shape[:-1], self.vocab_size)

    def _directed_block(
        self,
        x: Array,
        first: Array,
        second: Array,
        square: Array | None = None,
        *,
        how: How,
        capped: bool,
    ) -> Array:
        rows = self._features(x, square, how)
        logits = partial(self._token_logits, rows, whole=how.whole, capped=capped and how.whole)
        found: Array = logits(first)
        if (second >= 0).any():
            found -= np.where(second >= 0, logits(second), np.float32(0))
        return found

    def _top_block(
        self, x: Array, square: Array | None = None, *, how: How, k: int
    ) -> tuple[Array, Array, Array]:
        rows = self._features(x, square, how).reshape(-1, self.d_model)
        good = np.isfinite(rows).all(1)
        rows[~good] = 0
        shape = (len(rows), k)
        tokens = np.empty(shape, np.int64)
        logits, probabilities = np.empty(shape, np.float32), np.empty(shape, np.float32)
        scores = partial(self._scores, whole=how.whole)
        for part in row_parts(len(rows)):
            tokens[part], logits[part], probabilities[part] = lens_blocks.top_tokens(
                rows[part], scores, self.vocab_size, k
            )
        tokens[~good], logits[~good], probabilities[~good] = -1, np.nan, np.nan
        outer = x.shape[:-1]
        return (
            tokens.reshape(*outer, k),
            logits.reshape(*outer, k),
            probabilities.reshape(*outer, k),
        )

    def _measured_block(self, *inputs: Array, hows: Sequence[How], final: int | None) -> Array:
        *streams, targets = inputs
        if targets.size and targets.max() >= self.vocab_size:
            raise ValueError(
                f"a token that follows has id {targets.max()}, outside the vocabulary of "
                f"{self.vocab_size}"
            )
        outer = streams[0].shape[:-1]
        layers = [
            self._features(x, None, how).reshape(-1, self.d_model)
            for x, how in zip(streams, hows, strict=True)
        ]
        flat = np.broadcast_to(targets, outer).reshape(-1)
        good = np.isfinite(layers).all((0, 2))
        for rows in layers:
            rows[~good] = 0
        found = np.empty((len(MEASURES), len(flat), len(layers)))
        scores = partial(self._scores, whole=True)
        for part in row_parts(len(flat)):
            cut = [rows[part] for rows in layers]
            followed = [
                self._token_logits(rows, flat[part], whole=True, capped=True) for rows in cut
            ]
            found[:, part] = lens_blocks.measures(
                cut, scores, self.vocab_size, final, flat[part], followed
            )
        found[:, ~good] = np.nan
        return found.swapaxes(0, 1).reshape(*outer, len(MEASURES), len(layers))

    def _features(self, x: Array, square: Array | None, how: How) -> Array:
        """What the unembedding multiplies, float32, as wide as `x`; a copy.

        NaN all along what is not finite at one place, or has such a statistic.
        """
        x = np.array(x, np.float32)
        good = np.isfinite(x).all(-1)
        x[~(good if square is None else good & np.isfinite(square))] = np.nan
        if how.layer is not None:
            matrix, offset = self.translators[how.layer]
            x += x @ matrix.T + offset
        if how.apply_norm:
            x = normalized(x, self.norm, self.eps, self.norm_weight, square)
            if how.whole and self.norm_bias is not None:
                x += self.norm_bias
        return x

    def _scores(self, rows: Array, tokens: slice, *, whole: bool) -> Array:
        """Logits (row, token) of a panel of the vocabulary."""
        logits: Array = rows @ self._all_rows()[tokens].T
        return self._finished(logits, self._bias_of(tokens, whole), whole)

    def _token_logits(self, rows: Array, tokens: Array, *, whole: bool, capped: bool) -> Array:
        """Logits (...) of one token for each row (..., d_model); those of -1 mean nothing."""
        tokens = np.maximum(tokens, 0)
        unique, places = np.unique(tokens, return_inverse=True)
        wanted = self._rows(unique)[places.reshape(tokens.shape)]
        logits = np.einsum("...d,...d->...", rows, wanted)
        bias = self._bias_of(tokens, whole)
        return self._finished(logits, bias, capped)

    def _bias_of(self, tokens: slice | Array, whole: bool) -> Array | None:
        return self.bias[tokens] if whole and self.bias is not None else None

    def _finished(self, logits: Array, bias: Array | None, capped: bool) -> Array:
        if bias is not None:
            logits += bias
        if self.scale != 1:
            logits *= np.float32(self.scale)
        if capped and self.softcap is not None:
            cap = np.float32(self.softcap)
            logits /= cap
            np.tanh(logits, out=logits)
            logits *= cap
        return logits

    def _all_rows(self) -> Array:
        """The weight, read once where it is on disk."""
        with self._lock:
            if self._matrix is None:
                self._matrix = np.asarray(self.weight, np.float32)
        return self._matrix

    def _rows(self, tokens: Array) -> Array:
        source = self.weight if self._matrix is None else self._matrix
        return np.asarray(source[tokens], np.float32)


class _Stored:
    """The group ``unembedding`` of a store; its weight is not read yet."""

    def __init__(self, group: xr.Dataset) -> None:
        missing = {"norm", "eps"} - group.attrs.keys()
        if "weight" not in group or missing:
            raise ValueError(
                f"the group has arrays {', '.join(map(str, group.data_vars)) or 'none'} and "
                f"attributes {', '.join(map(str, group.attrs)) or 'none'}: it is no stored "
                "unembedding"
            )
        self.weight: Any = group["weight"].variable
        self.bias, self.norm_weight, self.norm_bias = (
            group[name].to_numpy() if name in group else None
            for name in ("bias", "norm_weight", "norm_bias")
        )
        self.norm, self.eps = str(group.attrs["norm"]), float(group.attrs["eps"])
        self.softcap, self.scale = group.attrs.get("softcap"), float(group.attrs.get("scale", 1))
        self.num_layers: int | None = group.attrs.get("num_layers")


def _vector(values: Any) -> Array | None:
    return None if values is None else np.asarray(values, np.float32)
