"""Where a store of dataset attribution has its arrays, and how they are cut and written.

One Zarr v3 group: ``{metric}/{target}/{source}/sum (target, source)``, ``counts/{layer}/{name}``,
``unembedding/weight (vocab, d_model)``, and everything else in the root's attributes. Sums and
counts are stored, never means, so that parts can be added.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from basinscope.io.chunked import write_array, write_group

SCHEMA_VERSION = 1
METRICS = ("attr", "attr_abs", "mean_squared_attr")
EMBED, OUTPUT = "embed", "output"
OUTPUT_TOKENS = "output_tokens"  # targets that are single tokens, in the order of their ids
CHUNK = (256, 512)  # most targets and sources in one file: 1 MiB
UNEMBEDDING_CHUNK = 2**20  # bytes
REQUIRED = {
    "model", "layers", "importance_threshold", "output_token_ids", "dataset_fingerprint",
    "batch_size", "n_batches", "parts",
}  # fmt: skip
KEPT_BY_THE_STORE = {
    "created_by", "schema_version", "created_at", "finished_at", "edges", "batches", "tokens",
    "completed", "generation",
}  # fmt: skip

Edge = tuple[str, str]
"""Target layer and source layer."""
Sums = dict[str, dict[Edge, np.ndarray]]
"""By metric and edge: (target, source), float64."""
Counts = dict[str, dict[str, np.ndarray]]
"""By layer and name: one entry for each component, token id or residual direction, float64."""


def write_sums(
    path: Path,
    sums: Mapping[str, Mapping[Edge, np.ndarray]],
    counts: Mapping[str, Mapping[str, np.ndarray]],
) -> None:
    """Write the groups of sums and counts below ``path``, as float64."""
    write_groups(path, {edge for arrays in sums.values() for edge in arrays}, counts)
    for metric, arrays in sums.items():
        for edge, values in arrays.items():
            values = np.asarray(values, np.float64)
            write_array(sums_path(path, metric, edge), values, ("target", "source"), CHUNK)
    for layer, named in counts.items():
        for name, values in named.items():
            write_count(path, layer, name, values)


def write_groups(path: Path, edges: Collection[Edge], layers: Iterable[str]) -> None:
    """Write the groups that sums and counts are in, below ``path``."""
    groups = [path / "counts", *(path / "counts" / layer for layer in layers)]
    for metric in METRICS:
        groups.append(path / metric)
        groups += [path / metric / target for target in dict.fromkeys(t for t, _ in edges)]
        groups += [path / metric / target / source for target, source in edges]
    for group in groups:
        write_group(group)


def sums_path(path: Path, metric: str, edge: Edge) -> Path:
    """Name the array of one edge."""
    return path / metric / edge[0] / edge[1] / "sum"


def counts_of(layer: str) -> tuple[str, ...]:
    """Name the counts that a layer has."""
    of_components = ("mean_importance_sum", "active", "square_sum")
    return {EMBED: ("occurrences",), OUTPUT: ("square_sum",)}.get(layer, of_components)


def write_count(path: Path, layer: str, name: str, values: np.ndarray) -> None:
    """Write one count of a layer below ``path``, as float64, in one chunk."""
    dim = {EMBED: "token_id", OUTPUT: "width"}.get(layer, "component")
    values = np.asarray(values, np.float64)
    write_array(path / "counts" / layer / name, values, (dim,), values.shape)


def unembedding_chunk(shape: tuple[int, ...]) -> tuple[int, int]:
    """Give the most rows, all of the width, that one file of the unembedding holds."""
    return max(1, UNEMBEDDING_CHUNK // (4 * shape[1])), shape[1]


def is_attribution_store(attributes: Mapping[str, Any]) -> bool:
    """Whether a group with these attributes is a store of attributions."""
    return {"layers", "edges", "tokens", "completed"} <= attributes.keys()


def settings_of(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Give what decides the numbers of a store, with a field for every edge."""
    settings = {name: val for name, val in attributes.items() if name not in KEPT_BY_THE_STORE}
    settings["edges"] = {f"{source} -> {target}": True for target, source in attributes["edges"]}
    return settings


def missing_ranks(parts: list[list[int]]) -> list[int]:
    """List the ranks that parts of one world size lack.

    Examples
    --------
    >>> missing_ranks([[0, 4], [2, 4]])
    [1, 3]
    """
    return sorted(set(range(parts[0][1])) - {rank for rank, _ in parts})
