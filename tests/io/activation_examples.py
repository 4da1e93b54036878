"""A small store of activations, and what goes into it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from basinscope.io.activation_store import ActivationWriter, Variable

POSITIONS, WIDTH, TOKENS = 3, 8, 5
VARIABLES: dict[str, Variable] = {
    "resid_out_0": (("example", "position", "d_model"), (POSITIONS, WIDTH), "float32"),
    "resid_out_1": (("example", "position", "d_model"), (POSITIONS, WIDTH), "bfloat16"),
    "half": (("example", "d_model"), (WIDTH,), "float16"),
    "last_layernorm_mean": (("example", "position"), (POSITIONS,), "float32"),
    "input_ids": (("example", "token"), (TOKENS,), "int32"),
    "correct": (("example",), (), "bool"),
}
ATTRS = {"model": {"class": "Tiny", "d_model": WIDTH}, "target_token_positions": ["last", -2]}
COORDS = {"position": np.array([1, 5, 9])}
CHUNK = 4 * POSITIONS * WIDTH * 4  # bytes: four examples of the largest array


def writer(path: Path, total: int | None, **changes: Any) -> ActivationWriter:
    arguments: dict[str, Any] = {
        "variables": VARIABLES,
        "num_examples": total,
        "attrs": ATTRS,
        "coords": COORDS,
        "chunk_bytes": CHUNK,
    }
    return ActivationWriter.create_or_continue(path, **(arguments | changes))


def examples(start: int, stop: int) -> dict[str, np.ndarray]:
    """What example number n holds depends on n only."""
    return {name: values[start:stop] for name, values in _all_examples().items()}


@cache
def _all_examples() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        return rng.normal(size=(2000, *shape)).astype(np.float32)

    resid = draw((POSITIONS, WIDTH))
    return {
        "resid_out_0": resid,
        "resid_out_1": (resid.view(np.uint32) & 0xFFFF0000).view(np.float32),
        "half": draw((WIDTH,)).astype(np.float16),
        "last_layernorm_mean": resid.mean(-1),
        "input_ids": (draw((TOKENS,)) * 1000).astype(np.int32),
        "correct": draw(()) > 0,
    }
