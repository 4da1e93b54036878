"""Random stores, in memory and on disk in any layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from zarr.codecs import ZstdCodec

Chunks = tuple[int, int, int, int]


def random_tree(
    seed: int,
    *,
    observables: Mapping[str, int] | None = None,
    chains: int = 2,
    draws: int = 12,
    steps: int = 15,
    batch: int = 3,
    tokens: int = 4,
    n_beta: float = 10.0,
    dtype: str = "float32",
    fluctuation: float = 0.3,
    ids_seed: int = 0,
    init_losses: bool = False,
) -> xr.DataTree:
    """Make a store's tree: losses are 3 + an offset per token + a shared and an own fluctuation.

    Parameters
    ----------
    observables
        Id to number of sequences.
    ids_seed
        Of the token ids, so that several restrictions share them.
    init_losses
        Whether each observable has losses at the checkpoint.
    """
    rng = np.random.default_rng(seed)

    def losses(rows: int, sequences: int) -> np.ndarray:
        offsets = rng.normal(0, 0.5, (1, 1, sequences, tokens))
        shared = rng.standard_normal((chains, rows, 1, 1)) * rng.normal(0, 1, offsets.shape)
        own = rng.standard_normal((chains, rows, sequences, tokens))
        return (3 + offsets + fluctuation * (shared + own)).astype(dtype)

    arrays: dict[str, Any] = {
        "init_loss": (("chain", "token_pos"), losses(chains, 1)[0, :, 0]),
        "sampling_loss": (("chain", "draw", "batch", "token_pos"), losses(draws, batch)),
        "sampling_loss_micro": (
            ("chain", "step", "batch_sampling", "token_pos"),
            losses(steps, batch),
        ),
        "n_beta": ((), np.float64(n_beta)),
    }
    ids = np.random.default_rng(ids_seed)
    for name, count in (observables or {"a": 3, "b": 2}).items():
        batch_dim = f"batch_{name}"
        arrays[f"loss_{name}"] = (
            ("chain", "draw", batch_dim, "token_pos"),
            losses(draws, count),
        )
        if init_losses:
            at_init = losses(1, count)[0, 0]
            arrays[f"init_loss_{name}"] = ((batch_dim, "token_pos"), at_init)
        arrays[f"input_ids_{name}"] = (
            (batch_dim, "token"),
            ids.integers(0, 200, (count, tokens + 1)).astype("uint8"),
        )
    attrs = {"metadata": {"config": {"sampler": {"n_beta": n_beta}}}, "completed": 1}
    return xr.DataTree(xr.Dataset(arrays, attrs=attrs))


def write_tree(
    tree: xr.DataTree, path: Path, *, chunks: Chunks | None = None, shards: Chunks | None = None
) -> Path:
    """Write a tree with the losses in ``chunks``, each cut to the array, in ``shards`` of these."""
    encoding = {}
    for name in _losses(tree):
        shape = tree[name].shape
        inner = tuple(map(min, chunks, shape)) if chunks else shape
        encoding[name] = {"chunks": inner}
        if shards:  # whole chunks, as Zarr asks for
            encoding[name]["shards"] = tuple(
                -(-min(n, whole) // chunk) * chunk
                for n, whole, chunk in zip(shards, shape, inner, strict=True)
            )
    return _write(tree.dataset, path, encoding)


def write_devinterp_tree(tree: xr.DataTree, path: Path) -> Path:
    """Write a tree as devinterp 2.x lays it out: 50 draws a chunk, int64 ids, no ``n_beta``."""
    dataset = tree.dataset.drop_vars("n_beta")
    codec = {"compressors": [ZstdCodec(level=0, checksum=False)]}
    encoding: dict[str, dict[str, Any]] = {}
    for name, variable in dataset.data_vars.items():
        if str(name).startswith("input_ids_"):
            dataset[name] = variable.astype("int64")
            encoding[str(name)] = {"chunks": variable.shape, **codec}
    for name in _losses(tree):
        shape = tree[name].shape
        encoding[name] = {"chunks": (1, min(50, shape[1]), *shape[2:]), **codec}
    return _write(dataset, path, encoding)


def _losses(tree: xr.DataTree) -> list[str]:
    return [str(name) for name, variable in tree.data_vars.items() if variable.ndim == 4]


def _write(dataset: xr.Dataset, path: Path, encoding: Mapping[str, Any]) -> Path:
    dataset.to_zarr(path, encoding=encoding, zarr_format=3, consolidated=False)
    return path
