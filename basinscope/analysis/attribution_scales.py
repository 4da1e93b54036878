"""What sums of attributions are multiplied by: means over tokens, or per unit of something."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from basinscope.io.attributions import StoredAttributions
from basinscope.io.attributions_layout import EMBED, METRICS, OUTPUT, OUTPUT_TOKENS

BY_SOURCE = ("source_importance", "source_count")
NORMALISATIONS = (*BY_SOURCE, "target_rms")

Normalize = str | Sequence[str] | None


class Scales:
    """The factors of one metric's sums; :class:`AttributionStore` says what each divides by.

    Parameters
    ----------
    stored : StoredAttributions
    metric : str
    normalize : str, sequence of str, or None

    Raises
    ------
    ValueError
        If the metric or ``normalize`` is not known, or both measures of a source are asked for.
    """

    def __init__(self, stored: StoredAttributions, metric: str, normalize: Normalize) -> None:
        self._stored = stored
        self._squared = require_one_of(metric, METRICS, "metric") == "mean_squared_attr"
        given: Any = () if normalize is None else normalize
        one = isinstance(given, str) or not isinstance(given, Iterable)
        measures = [given] if one else list(given)
        for measure in measures:
            require_one_of(measure, NORMALISATIONS, "normalize")
        if set(BY_SOURCE) <= set(measures):
            raise ValueError(
                f"normalize takes one of {' and '.join(BY_SOURCE)}: each divides by the source"
            )
        self._by_importance = "source_importance" in measures
        self._by_count = "source_count" in measures
        self._by_rms = "target_rms" in measures
        self._tokens = max(1, stored.metadata["tokens"])

    def sources(self, layer: str) -> np.ndarray:
        """Give the factor of every source of a layer, (source)."""
        if not (self._by_importance or self._by_count):
            size = self._stored.metadata["layers"][layer]["size"]
            return np.full(size, 1.0 / self._tokens)
        measure = "mean_importance_sum" if self._by_importance else "active"
        return _inverse(self._stored.counts(layer, "occurrences" if layer == EMBED else measure))

    def targets(self, layer: str) -> np.ndarray:
        """Give the factor of every target of a layer, (target)."""
        ids = self._stored.metadata["output_token_ids"]
        if not self._by_rms:
            tokens = layer == OUTPUT_TOKENS
            return np.ones(len(ids) if tokens else self._stored.metadata["layers"][layer]["size"])
        if layer != OUTPUT_TOKENS:
            return self._by_square(self._stored.counts(layer, "square_sum") / self._tokens)
        return np.array([self.output_token(token) for token in ids])

    def output_token(self, token: int) -> float:
        """Give the factor of one output token."""
        if not self._by_rms:
            return 1.0
        weight = self._stored.unembedding
        if weight is None:
            raise ValueError(NO_RESIDUAL)
        return float(self.output_tokens(np.asarray(weight.part(slice(token, token + 1))))[0])

    def output_tokens(self, rows: np.ndarray) -> np.ndarray:
        """Give the factor of output tokens, (token), from their rows of the unembedding."""
        if not self._by_rms:
            return np.ones(len(rows))
        if OUTPUT not in self._stored.count_names():
            raise ValueError(NO_RESIDUAL)
        length_squared = self._stored.counts(OUTPUT, "square_sum").sum() / self._tokens
        return self._by_square(length_squared * np.square(rows, dtype=np.float64).sum(axis=1))

    def _by_square(self, mean_square: np.ndarray) -> np.ndarray:
        return _inverse(mean_square if self._squared else np.sqrt(mean_square))


NO_RESIDUAL = (
    "target_rms of output tokens needs the unembedding and the mean square of what enters it: "
    "harvest 'output' among the targets, or leave output tokens out (include_outputs=False)"
)


def require_one_of(given: str, valid: Sequence[str], what: str) -> str:
    """Raise a ValueError that lists what is valid, unless ``given`` is."""
    if given not in valid:
        raise ValueError(f"{what} must be one of {', '.join(valid)}; got {given!r}")
    return given


def _inverse(values: np.ndarray) -> np.ndarray:
    """1 / values, and 0 where there is nothing to divide by."""
    return np.divide(1.0, values, out=np.zeros(values.shape), where=values > 0)
