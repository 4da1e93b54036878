"""Queries to attributions, in plain numpy on dense sums: slow, float64, a line per definition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from basinscope.io.attributions_layout import Counts, Sums


class DenseAttributions:
    """All values of a store, by key.

    Parameters
    ----------
    sums, counts, tokens
        As a writer saves them.
    weight : np.ndarray (vocab, d_model)
    metadata : dict
    """

    def __init__(
        self, sums: Sums, counts: Counts, tokens: int, weight: np.ndarray, metadata: dict[str, Any]
    ) -> None:
        self.sums, self.counts, self.tokens = sums, counts, tokens
        self.weight, self.metadata = weight.astype(float), metadata

    def values(self, metric: str, normalize: Sequence[str] = ()) -> dict[tuple[str, str], float]:
        """Compute every value by (source key, target key); output tokens as far as known."""
        found = {}
        for (target, source), sums in self.sums[metric].items():
            matrix, names = sums, [f"{target}:{index}" for index in range(len(sums))]
            if target == "output_tokens":
                names = [f"output:{token}" for token in self.metadata["output_token_ids"]]
            if target == "output":
                matrix = np.array([[row @ column for column in sums.T] for row in self.weight])
                names = [f"output:{token}" for token in range(len(self.weight))]
            if target == ("output_tokens" if metric == "attr" else "output"):
                continue  # these follow from the residual, or do not follow from it
            for (t, s), total in np.ndenumerate(matrix):
                mean = total / self.tokens
                measure = self.measure(source, s, names[t], metric, normalize)
                found[f"{source}:{s}", names[t]] = mean / measure if measure else 0.0
        return found

    def measure(
        self, source: str, s: int, target: str, metric: str, normalize: Sequence[str]
    ) -> float:
        """What a mean is divided by."""
        measure = 1.0
        for name, count in (
            ("source_importance", "mean_importance_sum"),
            ("source_count", "active"),
        ):
            if name in normalize:
                count = "occurrences" if source == "embed" else count
                measure *= self.counts[source][count][s] / self.tokens
        if "target_rms" in normalize:
            square = self.mean_square(target)
            measure *= square if metric == "mean_squared_attr" else np.sqrt(square)
        return measure

    def mean_square(self, target: str) -> float:
        layer, index = target.rsplit(":", 1)
        if layer == "output":
            residual = self.counts["output"]["square_sum"].sum() / self.tokens
            return residual * (self.weight[int(index)] ** 2).sum()
        return self.counts[layer]["square_sum"][int(index)] / self.tokens

    def dead(self, key: str) -> bool:
        layer, index = key.rsplit(":", 1)
        if layer in ("embed", "output"):
            return False
        mean = self.counts[layer]["mean_importance_sum"][int(index)] / self.tokens
        return bool(mean < self.metadata["importance_threshold"])
