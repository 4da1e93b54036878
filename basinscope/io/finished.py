"""What a finished store of activations or attributions has: arrays, each with all its chunks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from basinscope.io.activation_layout import KIND, UNEMBEDDING_DIMS, written_coordinates
from basinscope.io.attributions_layout import METRICS, counts_of, is_attribution_store, sums_path
from basinscope.io.chunked import has_every_chunk, read_attributes
from basinscope.io.stored import open_stored


def arrays_due(root: Path) -> list[Path]:
    """List the arrays of a finished store that must be there, with a file for every chunk.

    Returns
    -------
    list of Path
        None for a store that is not finished or of another kind, and for attributions that were
        written when chunks of only zeros had no files.
    """
    attributes = read_attributes(root)
    if attributes.get("completed") != 1:
        return []
    if attributes.get("kind") == KIND:
        return list(_activations(root, attributes["layout"]))
    if is_attribution_store(attributes):
        arrays = list(_attributions(root, attributes))
        opened = filter(None, map(open_stored, arrays))
        return arrays if all(map(has_every_chunk, opened)) else []
    return []


def _activations(root: Path, layout: Mapping[str, Any]) -> Iterator[Path]:
    yield from (root / name for name in layout["variables"])
    yield from (Path(stored.path) for stored in written_coordinates(root, layout))
    yield from (root / "unembedding" / n for n in layout["unembedding"] if n in UNEMBEDDING_DIMS)


def _attributions(root: Path, attributes: Mapping[str, Any]) -> Iterator[Path]:
    for metric in METRICS:
        for target, source in attributes["edges"]:
            yield sums_path(root, metric, (target, source))
    for layer in attributes["layers"]:
        yield from (root / "counts" / layer / name for name in counts_of(layer))
    if (root / "unembedding").is_dir():
        yield root / "unembedding" / "weight"
