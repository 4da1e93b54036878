"""Random stores of attributions, written as a harvest writes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from basinscope.io.attributions import METRICS, AttributionWriter, Counts, Edge, Sums
from basinscope.io.stored import open_stored

SIZES = {"embed": 11, "0.attn.q": 6, "0.mlp.up": 9, "1.mlp.up": 7, "output": 4}
KINDS = {"embed": "embedding", "output": "output"}
EDGES: list[Edge] = [
    ("0.attn.q", "embed"),
    ("0.mlp.up", "embed"),
    ("0.mlp.up", "0.attn.q"),
    ("1.mlp.up", "embed"),
    ("1.mlp.up", "0.mlp.up"),
    ("output", "embed"),
    ("output", "0.mlp.up"),
    ("output", "1.mlp.up"),
    ("output_tokens", "embed"),
    ("output_tokens", "1.mlp.up"),
]
OUTPUT_TOKEN_IDS = [2, 9]
VOCABULARY = 10


def metadata_of(
    rank: int = 0, world_size: int = 1, sizes: dict[str, int] | None = None, **changes: Any
) -> dict[str, Any]:
    """Make the metadata of one rank's part."""
    layers = {
        layer: {"module": f"module.{layer}", "size": size, "kind": KINDS.get(layer, "neurons")}
        for layer, size in (sizes or SIZES).items()
    }
    return {
        "model": {"class": "Tiny", "parameters": 1234},
        "layers": layers,
        "importance_threshold": 0.1,
        "output_token_ids": OUTPUT_TOKEN_IDS,
        "dataset_fingerprint": "abc",
        "batch_size": 4,
        "n_batches": 12,
        "parts": [[rank, world_size]],
        **changes,
    }


def shapes_of(
    edges: Sequence[Edge] = EDGES, sizes: dict[str, int] | None = None
) -> dict[Edge, tuple[int, int]]:
    """Give the shape of every edge."""
    known = {**(sizes or SIZES), "output_tokens": len(OUTPUT_TOKEN_IDS)}
    return {(target, source): (known[target], known[source]) for target, source in edges}


def count_shapes(sizes: dict[str, int] | None = None) -> dict[str, dict[str, tuple[int]]]:
    """Give the shape of every count."""
    components = ("mean_importance_sum", "active", "square_sum")
    names = {"embed": ("occurrences",), "output": ("square_sum",)}
    return {
        layer: {name: (size,) for name in names.get(layer, components)}
        for layer, size in (sizes or SIZES).items()
    }


def random_sums(
    rng: np.random.Generator,
    tokens: int = 100,
    edges: Sequence[Edge] = EDGES,
    sizes: dict[str, int] | None = None,
) -> tuple[Sums, Counts]:
    """Draw sums of both signs (squares: positive), a tenth of them zero, and counts."""

    def draw(metric: str, shape: tuple[int, int]) -> np.ndarray:
        values = rng.standard_normal(shape) * tokens * (rng.random(shape) > 0.1)
        return values**2 if metric == "mean_squared_attr" else values

    sums: Sums = {
        metric: {edge: draw(metric, shape) for edge, shape in shapes_of(edges, sizes).items()}
        for metric in METRICS
    }
    counts: Counts = {
        layer: {
            name: rng.integers(0, tokens, shape).astype(float) if name in ("active", "occurrences")
            else tokens * rng.random(shape)
            for name, shape in named.items()
        }
        for layer, named in count_shapes(sizes).items()
    }  # fmt: skip
    return sums, counts


def unembedding(seed: int = 0) -> np.ndarray:
    """Draw an unembedding (vocab, d_model)."""
    shape = (VOCABULARY, SIZES["output"])
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def new_writer(path: Path, **metadata: Any) -> AttributionWriter:
    """Create or continue a store of the usual layers and edges."""
    return AttributionWriter.create_or_continue(
        path,
        metadata=metadata_of(**metadata),
        edges=shapes_of(),
        counts=count_shapes(),
        unembedding=unembedding(),
    )


def write_part(
    path: Path, sums: Sums, counts: Counts, tokens: int = 100, batches: int = 3, **metadata: Any
) -> Path:
    """Write a finished part."""
    with new_writer(path, **metadata) as writer:
        writer.save(sums, counts, tokens=tokens, batches_done=batches)
        writer.finish()
    return path


def random_store(path: Path, seed: int = 0, tokens: int = 100, **metadata: Any) -> Path:
    """Write a finished random store."""
    return write_part(path, *random_sums(np.random.default_rng(seed), tokens), tokens, **metadata)


def as_older(path: Path) -> Path:
    """Make a store what it was when the fill value was 0, and chunks of only zeros no files."""
    for file in path.rglob("zarr.json"):
        metadata = json.loads(file.read_text())
        if metadata["node_type"] != "array":
            continue
        file.write_text(json.dumps({**metadata, "fill_value": 0}))
        stored = open_stored(file.parent)
        assert stored is not None
        for chunk in file.parent.glob("c.*"):
            index = [int(number) for number in chunk.name.split(".")[1:]]
            corner = [i * n for i, n in zip(index, stored.file_shape, strict=True)]
            bounds = [slice(a, a + n) for a, n in zip(corner, stored.file_shape, strict=True)]
            if not np.asarray(stored.part(*bounds)).any():
                chunk.unlink()
    return path
