"""The logit lens: what activations inside a model say about the next token."""

from __future__ import annotations

import uuid
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import xarray as xr
from dask.utils import SerializableLock

from basinscope.analysis import lens_blocks
from basinscope.analysis.lens_blocks import normalized, row_parts, softmax
from basinscope.analysis.lens_inputs import (
    SHARES,
    STREAMS,
    WIDTH,
    activation,
    matching_keys,
    next_tokens,
    numbers_in,
    open_activations,
)

BLOCK_BYTES = 2**26  # about the most that one task of a lazy result holds of logits
MEASURES = {
    "entropy": ("entropy of the prediction", "nats"),
    "kl_to_final": ("KL divergence of the layer's prediction from the last one's", "nats"),
    "cross_entropy": ("cross-entropy of the next token", "nats"),
    "rank": ("number of tokens with a larger logit than the next one", "1"),
}
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


class LogitLens:
    """Projects activations through a model's final norm and unembedding.

    A residual stream is read as if it were the last one: normalised by its own statistics, with
    every bias, scaled and soft-capped. The logits of the last layer's are the model's own.

    What a head or a sublayer adds to the stream is read as its share of the logits: divided by the
    standard deviation (or root mean square) of the final stream, its own mean taken away where the
    norm is a LayerNorm, without biases, scaled, and not soft-capped. The norm is then a linear map,
    so the shares of the first stream, every head, every output bias and every MLP add up: with
    :attr:`constant` they are the logits before a soft cap. (Not where positions were averaged: an
    average of shares is no share of an average.)

    Parameters
    ----------
    unembedding : Unembedding or xr.Dataset
        Of a model; or the group ``unembedding`` of a store of activations. Of its weight, rows are
        read as they are needed, and all of them once where all are.
    model_name : str, optional
        Compared with what activations say about their model, by the last part of both: a folder
        ``/models/gpt2`` and ``openai/gpt2`` are the same. None compares nothing.
    translators : mapping of int to (ndarray, ndarray), optional
        A tuned lens: A (d_model, d_model) and b (d_model,) for layer l, added as A h + b to the
        stream h that enters layer l: to ``resid_in_{l}``, and ``resid_out_{l-1}``. The last
        stream has none.

    References
    ----------
    nostalgebraist (2020), "interpreting GPT: the logit lens". Elhage et al. (2021), "A mathematical
    framework for transformer circuits", on shares of logits. Belrose et al. (2023),
    arXiv:2303.08112, on tuned lenses.
    """

    def __init__(
        self,
        unembedding: UnembeddingLike | xr.Dataset,
        *,
        model_name: str | None = None,
        translators: Translators | None = None,
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
        self.model_name = model_name
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

    def __repr__(self) -> str:
        tuned = f", tuned for {len(self.translators)} layers" if self.translators else ""
        name = self.model_name or "a model"
        return f"LogitLens({name}: {self.vocab_size} tokens, {self.d_model} wide{tuned})"

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

    def compute(
        self,
        activations: Any,
        target_key: str,
        token_directions: Sequence[int] | Sequence[tuple[int, int]] | Array | None = None,
        apply_norm: bool = True,
        apply_softmax: bool = False,
        metric: Literal["logit_diff", "accuracy"] = "logit_diff",
        *,
        statistics: Literal["auto", "own", "final"] = "auto",
    ) -> xr.Dataset:
        """Project activations to logits, or to the logits of chosen tokens only.

        Parameters
        ----------
        activations : ActivationCache, xr.Dataset, xr.DataTree, path or dict of arrays
            With ``last_layernorm_variance`` (LayerNorm) or ``last_layernorm_second_moment``
            (RMSNorm) where `statistics` are those of the final stream. Dask arrays stay lazy.
        target_key : str
            A name such as ``resid_out_3``, ``head_out_L0H1``; or a pattern for all of them,
            ``resid_out_{i}``, ``head_out_L{i}H{j}``.
        token_directions : sequence, optional
            For each example a token id, or a pair (a, b). Only their rows of the unembedding are
            read, and no array as wide as the vocabulary is made.
        apply_norm : bool
            False: the activations are multiplied with the unembedding as they are; streams get its
            bias.
        apply_softmax : bool
            Probabilities instead of logits.
        metric : {"logit_diff", "accuracy"}
            With `token_directions`: logit(a), or logit(a) - logit(b); or the share of examples with
            logit(a) > logit(b).
        statistics : {"auto", "own", "final"}
            "own": everything is normalised by itself. "final": everything is a share, with the
            statistics of the final stream, ``resid_*`` too. "auto": shares are heads' and
            sublayers' outputs only.

        Returns
        -------
        xr.Dataset
            For each key ``logit_lens_{key}``, float32: (example, position, vocab), or
            (example, position) for "logit_diff", (position,) for "accuracy".

        Raises
        ------
        KeyError
            If no key fits.
        ValueError
            If widths, models, token ids or their number do not fit, or statistics are missing.
        """
        if metric not in ("logit_diff", "accuracy"):
            raise ValueError(f"metric={metric!r}: give 'logit_diff' or 'accuracy'")
        if apply_softmax and token_directions is not None:
            raise ValueError(
                "apply_softmax needs the logits of all tokens: leave token_directions out, or "
                "compare logits"
            )
        dataset = self._opened(activations)
        readings = self._readings(dataset, target_key, apply_norm, statistics)
        directions = None
        if token_directions is not None:
            directions = self._directions(token_directions, dataset.sizes["example"], metric)
        result = {}
        for reading in readings:
            if directions is None:
                found = self._all_logits(reading, apply_softmax)
            else:
                found = self._directed(reading, directions, metric)
            result[f"logit_lens_{reading.key}"] = found
        attributes = {
            "target_key": target_key,
            "statistics": statistics,
            "apply_norm": apply_norm,
            "apply_softmax": apply_softmax,
        }
        if token_directions is not None:
            attributes["metric"] = metric
        return xr.Dataset(result, attrs=attributes)

    def top_tokens(
        self,
        activations: Any,
        target_key: str,
        k: int = 5,
        *,
        statistics: Literal["auto", "own", "final"] = "auto",
    ) -> xr.Dataset:
        """Find the tokens with the largest logits, a panel of the vocabulary at a time.

        Parameters
        ----------
        activations, target_key, statistics
            As for :meth:`compute`.
        k : int

        Returns
        -------
        xr.Dataset
            ``token``, ``logit`` and, for residual streams, ``probability``, each (layer, example,
            position, k), largest first. Names with more numbers than a layer's (or none) stand
            along ``component`` instead of ``layer``. Token -1 where activations are not finite.
        """
        if not 1 <= k <= self.vocab_size:
            raise ValueError(f"k={k}: give 1 to {self.vocab_size}")
        dataset = self._opened(activations)
        readings = self._readings(dataset, target_key, True, statistics)
        parts = []
        for reading in readings:
            array, square = reading.inputs(8 * self.d_model)
            tokens, logits, probabilities = xr.apply_ufunc(
                partial(self._top_block, how=reading.how, k=k),
                array,
                *square,
                input_core_dims=[[WIDTH], *([] for _ in square)],
                output_core_dims=[["k"]] * 3,
                dask="parallelized",
                output_dtypes=[np.int64, np.float32, np.float32],
                dask_gufunc_kwargs={"output_sizes": {"k": k}},
            )
            part = {"token": tokens, "logit": logits}
            if reading.how.whole:
                part["probability"] = probabilities
            parts.append(xr.Dataset(part))
        return _stacked(parts, [reading.key for reading in readings])

    def measures(
        self,
        activations: Any,
        target_key: str = "resid_out_{i}",
        *,
        input_ids: Any = None,
        targets: Any = None,
    ) -> xr.Dataset:
        """Measure how far the prediction of each layer is, example by example.

        Parameters
        ----------
        activations
            As for :meth:`compute`.
        target_key : str
            Of residual streams.
        input_ids : array_like (example, token), optional
            Default: those stored with the activations.
        targets : array_like (example, position), optional
            The tokens that follow, -1 for none. Default: from the ids.

        Returns
        -------
        xr.Dataset
            Each (layer, example, position), float64: ``entropy``; ``kl_to_final``, sum p_final
            (log p_final - log p) (where ``resid_out_{last}`` is there); ``cross_entropy`` of the
            token that follows and ``rank``, the number of tokens before it, NaN where nothing
            follows (both only where ids or targets are known). In nats, but for the rank.

        Warns
        -----
        UserWarning
            If ``kl_to_final`` is left out; says what is missing.
        """
        dataset = self._opened(activations)
        readings = self._readings(dataset, target_key, True, "own")
        shares = [reading.key for reading in readings if not reading.how.whole]
        if shares:
            raise ValueError(f"{shares[0]} is no residual stream, and predicts nothing by itself")
        following = self._targets(dataset, input_ids, targets)
        keys = [reading.key for reading in readings]
        last = _last_stream(dataset)
        if last is not None and last not in keys:
            readings += self._readings(dataset, last, True, "own")
        final = None if last is None else [reading.key for reading in readings].index(last)
        arrays = [reading.inputs(8 * self.d_model * len(readings))[0] for reading in readings]
        found = xr.apply_ufunc(
            partial(self._measured_block, hows=[r.how for r in readings], final=final),
            *arrays,
            xr.DataArray(-1) if following is None else following,
            input_core_dims=[*([WIDTH] for _ in arrays), []],
            output_core_dims=[["measure", "layer"]],
            dask="parallelized",
            output_dtypes=[np.float64],
            dask_gufunc_kwargs={"output_sizes": {"measure": len(MEASURES), "layer": len(readings)}},
        )
        found = found.isel(layer=slice(len(keys))).transpose("layer", ...)
        left_out = ({"kl_to_final"} if final is None else set()) | (
            {"cross_entropy", "rank"} if following is None else set()
        )
        names = [name for name in MEASURES if name not in left_out]
        parts = [
            xr.Dataset({n: found.isel(measure=list(MEASURES).index(n), layer=at) for n in names})
            for at in range(len(keys))
        ]
        result = _stacked(parts, keys)
        for name in names:
            result[name].attrs = dict(zip(("long_name", "units"), MEASURES[name], strict=True))
        return result

    def _opened(self, activations: Any) -> xr.Dataset:
        dataset = open_activations(activations)
        name = _model_name(dataset)
        if self.model_name and name and _last_part(name) != _last_part(self.model_name):
            raise ValueError(
                f"the activations are of {name!r}, and the lens is of {self.model_name!r}: take "
                "the lens of their model; or, if it is meant, set lens.model_name = None"
            )
        return dataset

    def _readings(
        self, dataset: xr.Dataset, pattern: str, apply_norm: bool, statistics: str
    ) -> list[_Reading]:
        if statistics not in ("auto", "own", "final"):
            raise ValueError(f"statistics={statistics!r}: give 'auto', 'own' or 'final'")
        return [
            self._reading(dataset, key, apply_norm, statistics)
            for key in matching_keys(dataset, pattern)
        ]

    def _reading(
        self, dataset: xr.Dataset, key: str, apply_norm: bool, statistics: str
    ) -> _Reading:
        """Decide how a key is read."""
        array = activation(dataset, key)
        if array.sizes[WIDTH] != self.d_model:
            raise ValueError(
                f"{key} is {array.sizes[WIDTH]} wide, and the unembedding {self.d_model}: they are "
                "of different models"
            )
        stream = STREAMS.fullmatch(key) is not None
        apply_norm = apply_norm and self.norm != "none"
        if statistics == "auto" and apply_norm and not stream and not SHARES.fullmatch(key):
            raise ValueError(
                f"{key} is neither a residual stream nor added to one: say with statistics='own' "
                "or 'final' how to normalise it, or pass apply_norm=False"
            )
        own = statistics == "own" or (statistics == "auto" and stream)
        square = None
        if apply_norm and not own:
            name = f"last_layernorm_{'variance' if self.norm == 'layer' else 'second_moment'}"
            if name not in dataset:
                raise ValueError(
                    f"{key} is a share of the final residual stream, and {name} is missing: "
                    "extract the final norm's statistics too, or pass statistics='own' or "
                    "apply_norm=False"
                )
            square = dataset[name]
        whole = own and stream
        return _Reading(
            key, array, square, _How(whole, apply_norm, self._translator_of(key, whole))
        )

    def _translator_of(self, key: str, whole: bool) -> int | None:
        """Number of the translator for a key; None if it needs none."""
        if not self.translators:
            return None
        kind, _, digits = key.rpartition("_")
        if not whole or kind not in ("resid_in", "resid_out"):
            raise ValueError(
                f"a tuned lens reads resid_in_{{i}} and resid_out_{{i}} by themselves, not {key}: "
                "use a lens without translators"
            )
        layer = int(digits) + (kind == "resid_out")
        return layer if layer in self.translators else None

    def _all_logits(self, reading: _Reading, apply_softmax: bool) -> xr.DataArray:
        array, square = reading.inputs(4 * self.vocab_size)
        found: xr.DataArray = xr.apply_ufunc(
            partial(self._logits_block, how=reading.how, apply_softmax=apply_softmax),
            array,
            *square,
            input_core_dims=[[WIDTH], *([] for _ in square)],
            output_core_dims=[["vocab"]],
            dask="parallelized",
            output_dtypes=[np.float32],
            dask_gufunc_kwargs={"output_sizes": {"vocab": self.vocab_size}},
        )
        return _described(found, reading, "probabilities" if apply_softmax else "logits")

    def _directed(self, reading: _Reading, directions: Array, metric: str) -> xr.DataArray:
        array, square = reading.inputs(4 * self.d_model)
        tokens = [xr.DataArray(ids, dims="example") for ids in directions.T]
        found: xr.DataArray = xr.apply_ufunc(
            # a soft cap keeps the order, but float32 may not tell two logits near it apart
            partial(
                self._directed_block,
                how=reading.how,
                capped=metric == "logit_diff",
            ),
            array,
            *tokens,
            *square,
            input_core_dims=[[WIDTH], [], [], *([] for _ in square)],
            dask="parallelized",
            output_dtypes=[np.float32],
        )
        if metric == "logit_diff":
            return _described(found, reading, "logit differences")
        return _described((found > 0).mean("example"), reading, "share of examples")

    def _directions(self, given: Any, examples: int, metric: str) -> Array:
        """Give (example, 2) token ids; the second is -1 where one token was given."""
        pairs = []
        for place, entry in enumerate(given):
            ids = np.atleast_1d(np.asarray(entry))
            if ids.dtype.kind not in "iu" or ids.shape not in ((1,), (2,)):
                raise ValueError(
                    f"token_directions[{place}] is {entry!r}: give a token id or a pair of them"
                )
            outside = ids[(ids < 0) | (ids >= self.vocab_size)]
            if len(outside):
                raise ValueError(
                    f"token_directions[{place}] has id {outside[0]}, outside the vocabulary of "
                    f"{self.vocab_size}"
                )
            if metric == "accuracy" and len(ids) == 1:
                raise ValueError(
                    f"token_directions[{place}] is one token: metric 'accuracy' compares pairs"
                )
            pairs.append((int(ids[0]), int(ids[1]) if len(ids) == 2 else -1))
        if len(pairs) != examples:
            raise ValueError(
                f"there are {len(pairs)} token_directions and {examples} examples: give one for "
                "each"
            )
        return np.array(pairs, np.int64).reshape(examples, 2)

    def _targets(self, dataset: xr.Dataset, input_ids: Any, targets: Any) -> xr.DataArray | None:
        if targets is None:
            return next_tokens(dataset, input_ids)
        if input_ids is not None:
            raise ValueError("give input_ids or targets, not both")
        found = np.asarray(targets)
        wanted = (dataset.sizes["example"], dataset.sizes["position"])
        if found.shape != wanted:
            raise ValueError(f"targets have shape {found.shape}; (example, position) are {wanted}")
        return xr.DataArray(found.astype(np.int64), dims=("example", "position"))

    def _logits_block(
        self, x: Array, square: Array | None = None, *, how: _How, apply_softmax: bool
    ) -> Array:
        rows = self._features(x, square, how)
        logits = self._scores(rows.reshape(-1, self.d_model), slice(None), whole=how.whole)
        return (softmax(logits) if apply_softmax else logits).reshape(*x.shape[:-1], -1)

    def _directed_block(
        self,
        x: Array,
        first: Array,
        second: Array,
        square: Array | None = None,
        *,
        how: _How,
        capped: bool,
    ) -> Array:
        rows = self._features(x, square, how)
        logits = partial(self._token_logits, rows, whole=how.whole, capped=capped and how.whole)
        found: Array = logits(first)
        if (second >= 0).any():
            found -= np.where(second >= 0, logits(second), np.float32(0))
        return found

    def _top_block(
        self, x: Array, square: Array | None = None, *, how: _How, k: int
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

    def _measured_block(self, *inputs: Array, hows: Sequence[_How], final: int | None) -> Array:
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

    def _features(self, x: Array, square: Array | None, how: _How) -> Array:
        """What the unembedding multiplies, float32, as wide as `x`; a copy."""
        x = np.array(x, np.float32)
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


@dataclass(frozen=True)
class _How:
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


@dataclass(frozen=True)
class _Reading:
    """An activation and how it is read.

    Attributes
    ----------
    array : DataArray (example, position, d_model), or with a head before the width
    square : DataArray (example, position) or None
        Variance or mean square of the final stream, where it is divided by that.
    """

    key: str
    array: xr.DataArray
    square: xr.DataArray | None
    how: _How

    def inputs(self, row_bytes: int) -> tuple[xr.DataArray, list[xr.DataArray]]:
        """Give the arrays, in blocks that make not too much of so many bytes a row."""
        return _in_blocks(self.array, row_bytes), [] if self.square is None else [self.square]


def _in_blocks(array: xr.DataArray, row_bytes: int) -> xr.DataArray:
    """Cut a lazy array by examples, and by positions where one example is too much."""
    if array.chunks is None:
        return array
    rows = max(1, BLOCK_BYTES // row_bytes)
    per_position = array.sizes.get("head", 1)
    per_example = array.sizes["position"] * per_position
    stored = max(array.chunksizes["example"])
    pieces = -(-stored // max(1, rows // max(1, per_example)))
    chunks = {"example": -(-stored // pieces), WIDTH: -1}
    if per_example > rows:
        chunks["position"] = max(1, rows // per_position)
    return array.chunk(chunks)


def _model_name(dataset: xr.Dataset) -> str | None:
    """The name that activations carry of their model; its class is none."""
    model = dataset.attrs.get("model", {})
    name: str | None = model.get("name_or_path")
    return None if name == model.get("class") else name


def _last_part(name: str) -> str:
    """The name of a model without where it is kept."""
    return name.rstrip("/").rpartition("/")[2]


def _vector(values: Any) -> Array | None:
    return None if values is None else np.asarray(values, np.float32)


def _described(found: xr.DataArray, reading: _Reading, what: str) -> xr.DataArray:
    source = "as a stream" if reading.how.whole else "as a share of the last stream"
    return found.assign_attrs(long_name=f"{what} of {reading.key}, {source}", units="1")


def _stacked(parts: Sequence[xr.Dataset], keys: Sequence[str]) -> xr.Dataset:
    """Put one Dataset a key along ``layer``, or along ``component`` where names say more."""
    if all(len(numbers_in(key)) == 1 for key in keys):
        along = xr.Variable("layer", [numbers_in(key)[0] for key in keys])
    else:
        along = xr.Variable("component", np.array(keys, dtype=object))
    return xr.concat(parts, dim=along.dims[0]).assign_coords({along.dims[0]: along})


def _last_stream(dataset: xr.Dataset) -> str | None:
    """Name the stream behind the last layer; None, with a warning, if it is not there."""
    there = [n for n in map(str, dataset.data_vars) if n.startswith("resid_out_")]
    count = dataset.attrs.get("model", {}).get("num_layers")
    last = max(there, key=numbers_in, default=None) if count is None else f"resid_out_{count - 1}"
    if last in there:
        return last
    warnings.warn(
        f"kl_to_final is left out: it needs {last or 'the resid_out of the last layer'}; extract "
        "it too",
        stacklevel=3,
    )
    return None
