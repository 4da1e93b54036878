"""What a store of attributions can be asked about: layers, edges and keys, and which are valid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from basinscope.io.attributions_layout import EMBED, OUTPUT, OUTPUT_TOKENS, Edge


@dataclass(frozen=True)
class Key:
    """A component (``0.mlp.up:5``), a token of ``embed``, or an output token (``output:42``)."""

    layer: str
    index: int

    @classmethod
    def parse(cls, text: str) -> Key:
        """Read ``layer:index``.

        Raises
        ------
        ValueError
            If ``text`` is not of this form.
        """
        layer, _, index = text.rpartition(":") if isinstance(text, str) else ("", "", "")
        if not (layer and index.isascii() and index.isdecimal()):
            raise ValueError(
                f"{text!r} is no key: give LAYER:INDEX, such as '0.mlp.up:5', 'embed:123' or "
                "'output:42' (for tokens, their ids)"
            )
        return cls(layer, int(index))

    @property
    def is_token(self) -> bool:
        """Whether the index is a token id."""
        return self.layer in (EMBED, OUTPUT)

    def __str__(self) -> str:
        return f"{self.layer}:{self.index}"


class Graph:
    """The layers of a store and the edges between them.

    Parameters
    ----------
    metadata : mapping
        The attributes of the store.
    edges : sequence of (target, source)
    vocab : int or None
        Rows of the unembedding, if the store has one.

    Attributes
    ----------
    layers : list of str
        In the order of the model.
    sources, targets : list of str
        Layers that edges begin at, and that they end at (with ``output_tokens``, if any were
        harvested).
    """

    def __init__(
        self, metadata: Mapping[str, Any], edges: Sequence[Edge], vocab: int | None
    ) -> None:
        self._sizes = {layer: int(fields["size"]) for layer, fields in metadata["layers"].items()}
        self._sizes[OUTPUT_TOKENS] = len(metadata["output_token_ids"])
        self._token_ids: list[int] = metadata["output_token_ids"]
        self._vocab = vocab
        self._edges = set(edges)
        starts, ends = {source for _, source in edges}, {target for target, _ in edges}
        self.layers = [layer for layer in self._sizes if layer != OUTPUT_TOKENS]
        self.sources = [layer for layer in self.layers if layer in starts]
        self.targets = [layer for layer in (*self.layers, OUTPUT_TOKENS) if layer in ends]

    def sources_of(self, target: str) -> list[str]:
        """List the layers with an edge to a layer."""
        return [source for source in self.sources if (target, source) in self._edges]

    def targets_of(self, source: str) -> list[str]:
        """List the layers that a layer has an edge to."""
        return [target for target in self.targets if (target, source) in self._edges]

    def size(self, layer: str) -> int:
        """Count the components, token ids or residual directions of a layer."""
        return self._sizes[layer]

    def names(self, layer: str) -> list[str]:
        """Name everything in a layer; directions that enter the unembedding ``residual:3``."""
        if layer == OUTPUT_TOKENS:
            return [f"{OUTPUT}:{token}" for token in self._token_ids]
        prefix = "residual" if layer == OUTPUT else layer
        return [f"{prefix}:{index}" for index in range(self.size(layer))]

    @property
    def output_tokens(self) -> Sequence[int]:
        """Token ids that can be targets."""
        if OUTPUT in self.targets and self._vocab is not None:
            return range(self._vocab)
        return self._token_ids if OUTPUT_TOKENS in self.targets else []

    def has_source(self, key: Key) -> bool:
        """Whether a key is a source of some edge."""
        return key.layer in self.sources and key.index < self.size(key.layer)

    def has_target(self, key: Key) -> bool:
        """Whether a key is a target of some edge."""
        if key.layer == OUTPUT:
            return key.index in self.output_tokens
        known = key.layer in self.targets and key.layer != OUTPUT_TOKENS
        return known and key.index < self.size(key.layer)

    def source(self, text: str) -> Key:
        """Read the key of a source.

        Raises
        ------
        ValueError
            Saying which layers are sources, or which indices there are.
        """
        key = Key.parse(text)
        self.require_source_layer(key.layer)
        return self._in_range(key)

    def target(self, text: str) -> Key:
        """Read the key of a target; raises as :meth:`source` does."""
        key = Key.parse(text)
        components = [layer for layer in self.targets if layer not in (OUTPUT, OUTPUT_TOKENS)]
        outputs = [OUTPUT] if self.output_tokens else []
        self._require_layer(key.layer, [*components, *outputs], "target")
        return self._in_range(key)

    def require_source_layer(self, layer: str) -> None:
        """Raise a ValueError that names the sources, unless ``layer`` is one."""
        self._require_layer(layer, self.sources, "source")

    def require_target_layer(self, layer: str) -> None:
        """Raise a ValueError that names the targets, unless ``layer`` is one."""
        self._require_layer(layer, self.targets, "target")

    def require_edge(self, source: str, target: str) -> None:
        """Raise a ValueError that names the sources of a target, unless ``source`` is one."""
        sources = self.sources_of(target)
        if source not in sources:
            raise ValueError(
                f"there is no edge from {source} to {target}; edges to it come from "
                f"{', '.join(sources) or 'nowhere'}"
            )

    def _require_layer(self, layer: str, valid: Sequence[str], role: str) -> None:
        if layer in valid:
            return
        what = f"is no {role}" if str(layer) in self._sizes else "is no layer of this store"
        close = get_close_matches(str(layer), valid, n=3)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise ValueError(
            f"{layer!r} {what}: {hint}its {role}s are {', '.join(valid) or 'none at all'}"
        )

    def _in_range(self, key: Key) -> Key:
        if key.layer == OUTPUT:
            valid: Sequence[int] = self.output_tokens
        else:
            valid = range(self.size(key.layer))
        if key.index not in valid:
            known = f"0 to {valid[-1]}" if isinstance(valid, range) else ", ".join(map(str, valid))
            raise ValueError(f"{key} is out of range: {key.layer} has {known} in this store")
        return key
