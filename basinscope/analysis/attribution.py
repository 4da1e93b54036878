"""Questions to a store of dataset attribution: who gives what to whom, per token on average."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from basinscope.analysis.attribution_keys import Graph, Key
from basinscope.analysis.attribution_scales import Normalize, Scales, require_one_of
from basinscope.io.attributions import open_attributions
from basinscope.io.attributions_layout import EMBED, OUTPUT, OUTPUT_TOKENS
from basinscope.io.stored import StoredArray

SIGNS = ("positive", "negative")
TEXT_METHODS = ("decode", "convert_ids_to_tokens")  # of a tokenizer


@dataclass(frozen=True, repr=False)
class Attribution:
    """One line of a list of the strongest.

    Attributes
    ----------
    key : str
        Such as ``"0.mlp.up:5"``, ``"embed:123"`` or ``"output:42"``.
    layer : str
    index : int
        Component, or token id.
    value : float
    token : str or None
        The token's text, for ``embed`` and ``output`` where a tokenizer was given.
    """

    key: str
    layer: str
    index: int
    value: float
    token: str | None = None

    def __repr__(self) -> str:
        token = "" if self.token is None else f" {self.token!r}"
        return f"{self.key}{token} {self.value:+.4g}"


class AttributionStore:
    """A store of attributions, opened for questions; values are read when they are asked for.

    With ``x`` the activation of a source at one position and ``y`` that of a target, summed over
    positions (each times its importance, where the harvest was given some), the value of a metric
    is a mean over all positions that were harvested:

    - ``attr`` = mean of ``dy/dx x``: how much of the target's activation came through the source;
    - ``attr_abs`` = mean of ``d|y|/dx x``: how much of its magnitude did. It has a sign too:
      a source that pulls the target towards zero is negative (of ``y = 3 - 1``, the second
      gives ``-1`` to ``|y|``), so both signs can be asked for;
    - ``mean_squared_attr`` = mean of ``(dy/dx x)²``, which is never negative.

    ``normalize`` divides these means, by one or both of a source's and a target's measure:

    - ``"source_importance"``: by the mean importance of the source, Σ importance / tokens (of a
      token of ``embed``: by its frequency). What remains is the attribution per unit of importance;
    - ``"source_count"``: by the share of positions where the source's importance is over the
      threshold (of a token of ``embed``: by its frequency): the attribution per active position;
    - ``"target_rms"``: by the root of the mean square of the target's activation (for
      ``mean_squared_attr``, by the mean square). For an output token this is the root mean square
      length of what enters the unembedding times the length of the token's row of it, the most that
      the RMS of the token's logit can be.

    Where a measure is zero, so is every attribution, and the value is 0.

    Parameters
    ----------
    path : path
        A store of :func:`basinscope.harvest_attributions`, or of parts merged.
    tokenizer : optional
        Has ``decode([id])`` or ``convert_ids_to_tokens([id])``, or both; gives tokens their text.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is nothing at ``path``, or no store of attributions.
    TypeError
        If ``tokenizer`` has neither method.

    Warns
    -----
    UserWarning
        If the store is still being harvested, or lacks ranks.
    """

    def __init__(self, path: str | os.PathLike[str], tokenizer: Any = None) -> None:
        if tokenizer is not None and not any(hasattr(tokenizer, name) for name in TEXT_METHODS):
            raise TypeError(
                f"tokenizer={tokenizer!r} must have decode([id]) or convert_ids_to_tokens([id]), "
                "as what AutoTokenizer.from_pretrained() gives does"
            )
        self._stored = open_attributions(path)
        self._tokenizer = tokenizer
        self._weight = self._stored.unembedding
        vocab = None if self._weight is None else self._weight.shape[0]
        self._graph = Graph(self._stored.metadata, self._stored.edges, vocab)

    @property
    def metadata(self) -> dict[str, Any]:
        """The attributes of the store: model, layers, tokens, batches, parts and so on."""
        return self._stored.metadata

    @property
    def layers(self) -> list[str]:
        """Names of all layers, in the order of the model."""
        return self._graph.layers

    def has_source(self, key: str) -> bool:
        """Whether a component or token of ``embed`` is a source, and not dead.

        A component is dead if its mean importance is under the store's threshold.

        Raises
        ------
        ValueError
            If ``key`` is not of the form ``layer:index``.
        """
        found = Key.parse(key)
        return self._graph.has_source(found) and self._is_alive(found)

    def has_target(self, key: str) -> bool:
        """Whether a component or output token is a target, and not dead.

        Raises
        ------
        ValueError
            If ``key`` is not of the form ``layer:index``.
        """
        found = Key.parse(key)
        return self._graph.has_target(found) and self._is_alive(found)

    def attribution(
        self, source: str, target: str, metric: str = "attr", *, normalize: Normalize = None
    ) -> float:
        """Give the attribution of one source to one target, per token.

        Parameters
        ----------
        source : str
            ``"0.mlp.up:5"``, or ``"embed:123"`` for a token id.
        target : str
            ``"1.mlp.up:7"``, or ``"output:42"`` for the logit of a token id.
        metric : str
            ``"attr"``, ``"attr_abs"`` or ``"mean_squared_attr"``; see the class.
        normalize : str or sequence of str, optional
            See the class.

        Raises
        ------
        ValueError
            If a key, the metric or ``normalize`` is not known (says what is), if the two layers
            have no edge, or if the metric of an output token was not harvested (says how to).
        """
        scales = Scales(self._stored, metric, normalize)
        start, end = self._graph.source(source), self._graph.target(target)
        layer, row = self._row_of(end, metric)
        self._graph.require_edge(start.layer, layer)
        if row is None:
            total = self._direction(end) @ self._column(metric, OUTPUT, start)
        else:
            at = slice(row, row + 1), slice(start.index, start.index + 1)
            total = np.asarray(self._stored.sums(metric, layer, start.layer).part(*at)).item()
        return float(total * scales.sources(start.layer)[start.index] * self._factor(scales, end))

    def top_sources(
        self,
        target: str,
        k: int = 10,
        sign: str = "positive",
        metric: str = "attr",
        *,
        normalize: Normalize = None,
    ) -> list[Attribution]:
        """List the sources that give most to a target; dead components are left out.

        Parameters
        ----------
        target : str
            ``"1.mlp.up:7"`` or ``"output:42"``.
        k : int
            At most so many.
        sign : str
            ``"positive"`` for the largest values, or ``"negative"`` for the lowest. Values of the
            other sign, and zeros, are never listed.
        metric, normalize
            See the class. ``"mean_squared_attr"`` has no negative values, and asking for them is
            an error.

        Returns
        -------
        list of Attribution
            The strongest first.

        Raises
        ------
        ValueError
            As for :meth:`attribution`.
        """
        _require_order(k, sign, metric)
        scales = Scales(self._stored, metric, normalize)
        key = self._graph.target(target)
        layer, row = self._row_of(key, metric)
        factor = self._factor(scales, key)
        found = {}
        for source in self._graph.sources_of(layer):
            sums = self._stored.sums(metric, layer, source)
            if row is None:
                values = _weighted_rows(self._direction(key), sums)
            else:
                values = np.asarray(sums.part(slice(row, row + 1)))[0]
            found[source] = values * scales.sources(source) * factor
        return self._strongest(found, k, sign)

    def top_targets(
        self,
        source: str,
        k: int = 10,
        sign: str = "positive",
        metric: str = "attr",
        include_outputs: bool = True,
        *,
        normalize: Normalize = None,
    ) -> list[Attribution]:
        """List the targets that a source gives most to; dead components are left out.

        Parameters
        ----------
        source : str
            ``"0.mlp.up:5"`` or ``"embed:123"``.
        k, sign, metric, normalize
            As for :meth:`top_sources`.
        include_outputs : bool
            List output tokens too: for ``"attr"`` all of the vocabulary, for the other metrics
            those that were harvested themselves.

        Returns
        -------
        list of Attribution
            The strongest first.

        Raises
        ------
        ValueError
            As for :meth:`attribution`.
        """
        _require_order(k, sign, metric)
        scales = Scales(self._stored, metric, normalize)
        key = self._graph.source(source)
        factor = scales.sources(key.layer)[key.index]
        found = {
            target: self._column(metric, target, key) * scales.targets(target) * factor
            for target in self._graph.targets_of(key.layer)
            if target not in (OUTPUT, OUTPUT_TOKENS)
        }
        if include_outputs:
            found[OUTPUT] = self._to_outputs(key, metric, scales) * factor
        return self._strongest(found, k, sign)

    def matrix(
        self,
        target_layer: str,
        source_layer: str,
        metric: str = "attr",
        *,
        normalize: Normalize = None,
    ) -> xr.DataArray:
        """Give all attributions between two layers as a lazy array.

        Parameters
        ----------
        target_layer : str
            A layer; ``"output"`` for the residual directions that enter the unembedding, or
            ``"output_tokens"`` for the tokens that were harvested themselves.
        source_layer : str
        metric, normalize
            See the class.

        Returns
        -------
        xr.DataArray (target, source)
            Dask-backed; coordinates are keys (``"residual:3"`` for residual directions), so that
            ``.sel(source="embed:123")`` works.

        Raises
        ------
        ValueError
            If there is no such edge; says which there are.
        """
        scales = Scales(self._stored, metric, normalize)
        self._graph.require_target_layer(target_layer)
        self._graph.require_source_layer(source_layer)
        self._graph.require_edge(source_layer, target_layer)
        sums = self._stored.matrix(metric, target_layer, source_layer)
        values = sums * scales.targets(target_layer)[:, None] * scales.sources(source_layer)
        return values.rename(metric).assign_coords(
            target=self._graph.names(target_layer), source=self._graph.names(source_layer)
        )

    def summary(self, metric: str = "attr", *, normalize: Normalize = None) -> xr.DataArray:
        """Add up the magnitudes of all attributions between each two layers.

        Reads the metric once, block by block, on as many threads as there are cores.

        Returns
        -------
        xr.DataArray (target_layer, source_layer)
            Σ over targets and sources of |value|, as :meth:`matrix` has the values; NaN where there
            is no edge. The targets of ``output`` are residual directions.
        """
        scales = Scales(self._stored, metric, normalize)
        targets, sources = self._graph.targets, self._graph.sources
        edges = [
            (target, source) for target in targets for source in self._graph.sources_of(target)
        ]

        def strength(edge: tuple[str, str]) -> float:
            rows, columns = scales.targets(edge[0])[:, None], scales.sources(edge[1])
            return sum(
                float(np.abs(values * rows[place[0]] * columns[place[1]]).sum())
                for place, values in self._stored.sums(metric, *edge).chunks()
            )

        result = xr.DataArray(
            np.full((len(targets), len(sources)), np.nan),
            coords={"target_layer": targets, "source_layer": sources},
            name=metric,
        )
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for (target, source), value in zip(edges, pool.map(strength, edges), strict=True):
                result.loc[target, source] = value
        return result

    def token_text(self, key: str) -> str | None:
        """Give the text of a key's token; None for components, or without a tokenizer."""
        found = Key.parse(key)
        if self._tokenizer is None or not found.is_token:
            return None
        text = ""
        if hasattr(self._tokenizer, "decode"):
            text = str(self._tokenizer.decode([found.index]))
        broken = not text or "\ufffd" in text  # part of a character is no text
        if broken and hasattr(self._tokenizer, "convert_ids_to_tokens"):
            return str(self._tokenizer.convert_ids_to_tokens([found.index])[0])
        return text

    def __repr__(self) -> str:
        return (
            f"AttributionStore({str(self._stored.path)!r}: {len(self._stored.edges)} edges between "
            f"{len(self.layers)} layers, {self.metadata['tokens']:,} tokens)"
        )

    def _row_of(self, target: Key, metric: str) -> tuple[str, int | None]:
        """Find the layer and row that hold a target.

        No row: it is a combination of all rows of ``output``, weighted by its row of the
        unembedding.
        """
        if target.layer != OUTPUT:
            return target.layer, target.index
        if metric == "attr" and OUTPUT in self._graph.targets and self._weight is not None:
            return OUTPUT, None
        tokens = self.metadata["output_token_ids"]
        if target.index not in tokens:
            raise ValueError(
                f"{metric} of {target} was not harvested, and as it is not linear it does not "
                f"follow from the residual: harvest with output_tokens=[{target.index}] "
                f"(harvested: {', '.join(map(str, tokens)) or 'none'})"
            )
        return OUTPUT_TOKENS, tokens.index(target.index)

    def _direction(self, target: Key) -> np.ndarray:
        """Read an output token's row of the unembedding, (d_model)."""
        assert self._weight is not None
        row = np.asarray(self._weight.part(slice(target.index, target.index + 1)))[0]
        return row.astype(np.float64)

    def _column(self, metric: str, target: str, source: Key) -> np.ndarray:
        """Read the sums of one source to a layer, (target)."""
        at = slice(None), slice(source.index, source.index + 1)
        return np.asarray(self._stored.sums(metric, target, source.layer).part(*at))[:, 0]

    def _to_outputs(self, source: Key, metric: str, scales: Scales) -> np.ndarray:
        """Compute one source's sums to all output tokens, (vocab), zero where not known."""
        targets = self._graph.targets_of(source.layer)
        if metric == "attr" and OUTPUT in targets and self._weight is not None:
            column = self._column(metric, OUTPUT, source)
            values = np.empty(self._weight.shape[0])
            for (rows, _), block in self._weight.chunks():
                values[rows] = block.astype(np.float64) @ column * scales.output_tokens(block)
            return values
        tokens = self.metadata["output_token_ids"]
        values = np.zeros(max(tokens, default=-1) + 1)
        if OUTPUT_TOKENS in targets:
            column = self._column(metric, OUTPUT_TOKENS, source)
            values[tokens] = column * scales.targets(OUTPUT_TOKENS)
        return values

    def _factor(self, scales: Scales, target: Key) -> float:
        if target.layer == OUTPUT:
            return scales.output_token(target.index)
        return float(scales.targets(target.layer)[target.index])

    def _alive(self, layer: str) -> np.ndarray:
        """Tell which components of a layer are not dead."""
        mean = self._stored.counts(layer, "mean_importance_sum") / max(1, self.metadata["tokens"])
        return np.asarray(mean >= self.metadata["importance_threshold"])

    def _is_alive(self, key: Key) -> bool:
        return key.is_token or bool(self._alive(key.layer)[key.index])

    def _strongest(self, found: dict[str, np.ndarray], k: int, sign: str) -> list[Attribution]:
        """Keep the k largest (or lowest) of several layers, without dead components."""
        entries = []
        for layer, values in found.items():
            strength = values if sign == "positive" else -values
            if layer not in (EMBED, OUTPUT):
                strength = np.where(self._alive(layer), strength, 0)
            for index in _largest(strength, k):
                key = Key(layer, index)
                text = self.token_text(str(key))
                entries.append(Attribution(str(key), layer, index, float(values[index]), text))
        entries.sort(key=lambda entry: -abs(entry.value))
        return entries[:k]


def _require_order(k: int, sign: str, metric: str) -> None:
    require_one_of(sign, SIGNS, "sign")
    if sign == "negative" and metric == "mean_squared_attr":
        raise ValueError(
            "mean_squared_attr is a mean of squares and never negative, so sign has no meaning for "
            "it: leave it 'positive', or ask for metric 'attr' or 'attr_abs'"
        )
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise ValueError(f"k={k!r}: give a whole number of at least 1")


def _weighted_rows(weights: np.ndarray, matrix: StoredArray) -> np.ndarray:
    """Compute ``weights @ matrix``, block by block."""
    total = np.zeros(matrix.shape[1])
    for (rows, columns), values in matrix.chunks():
        total[columns] += weights[rows] @ values
    return total


def _largest(strength: np.ndarray, k: int) -> list[int]:
    """Find the places of the k largest positive values; of equal ones the first."""
    positive = np.flatnonzero(strength > 0)
    if len(positive) > k:
        limit = np.partition(strength[positive], -k)[-k]
        positive = positive[strength[positive] >= limit]
    order = np.argsort(-strength[positive], kind="stable")[:k]
    places: list[int] = positive[order].tolist()
    return places
