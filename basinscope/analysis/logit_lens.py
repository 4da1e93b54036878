"""The logit lens: what activations inside a model say about the next token."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import xarray as xr

from basinscope.analysis.lens_blocks import MEASURES
from basinscope.analysis.lens_inputs import (
    SHARES,
    STREAMS,
    WIDTH,
    activation,
    described_model,
    matching_keys,
    model_name,
    next_tokens,
    numbers_in,
    open_activations,
    token_ids,
)
from basinscope.analysis.lens_projection import (
    Array,
    How,
    Projection,
    Translators,
    UnembeddingLike,
)

BLOCK_BYTES = 2**26  # about the most that one task of a lazy result holds of logits


class LogitLens(Projection):
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
        super().__init__(unembedding, translators)
        self.model_name = model_name

    def __repr__(self) -> str:
        tuned = f", tuned for {len(self.translators)} layers" if self.translators else ""
        name = self.model_name or "a model"
        return f"LogitLens({name}: {self.vocab_size} tokens, {self.d_model} wide{tuned})"

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
            logit(a) > logit(b), NaN at positions where an example's logits are not finite.
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
        if metric == "accuracy" and token_directions is None:
            raise ValueError(
                "metric='accuracy' needs token_directions: a pair of token ids for each example"
            )
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
        whole = isinstance(k, int | np.integer) and not isinstance(k, bool)
        if not whole or not 1 <= k <= self.vocab_size:
            raise ValueError(f"k={k!r}: give 1 to {self.vocab_size}, a whole number")
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
            (log p_final - log p) (where ``resid_out_{last}`` is there, and the lens or the
            activations know how many layers the model has); ``cross_entropy`` of the token that
            follows and ``rank``, the number of tokens before it, NaN where nothing follows (both
            only where ids or targets are known). In nats, but for the rank. NaN where activations
            are not finite.

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
        last = self._last_stream(dataset)
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
        name = model_name(dataset)
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
        return _Reading(key, array, square, How(whole, apply_norm, self._translator_of(key, whole)))

    def _last_stream(self, dataset: xr.Dataset) -> str | None:
        """Name the stream behind the last layer; None, with a warning, if it is not there."""
        count = self.num_layers
        if count is None:
            count = described_model(dataset).get("num_layers")
        last = None if count is None else f"resid_out_{count - 1}"
        if last in dataset:
            return last
        missing = (
            f"it needs {last}; extract it too"
            if last
            else "it needs the last layer's resid_out, and neither the lens nor the activations "
            "say how many layers the model has; take the lens from the model"
        )
        warnings.warn(f"kl_to_final is left out: {missing}", stacklevel=3)
        return None

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
        right = (found > 0).astype(np.float64).where(np.isfinite(found))
        share = right.mean("example", skipna=False).astype(np.float32)
        return _described(share, reading, "share of examples")

    def _directions(self, given: Any, examples: int, metric: str) -> Array:
        """Give (example, 2) token ids; the second is -1 where one token was given."""
        if not np.iterable(given):
            raise ValueError(
                f"token_directions={given!r}: give a token id, or a pair of them, for each example"
            )
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
        found = token_ids(targets, "targets")
        wanted = (dataset.sizes["example"], dataset.sizes["position"])
        if found.shape != wanted:
            raise ValueError(f"targets have shape {found.shape}; (example, position) are {wanted}")
        return xr.DataArray(found.astype(np.int64), dims=("example", "position"))


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
    how: How

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
    pieces = max(1, -(-stored // max(1, rows // max(1, per_example))))
    chunks = {"example": -(-stored // pieces), WIDTH: -1}
    if per_example > rows:
        chunks["position"] = max(1, rows // per_position)
    return array.chunk(chunks)


def _last_part(name: str) -> str:
    """The name of a model without where it is kept."""
    return name.rstrip("/").rpartition("/")[2]


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
