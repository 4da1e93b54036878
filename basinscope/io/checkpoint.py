"""Chain checkpoints: what a chain needs to go on from the middle, inside its store.

There are two slots. The chain's record names the one that counts, and it is replaced last, so a
process killed at any moment, or a machine that fails, leaves a valid checkpoint or none.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec

from basinscope.io.durable import settle_tree
from basinscope.io.stored import DamagedStoreError

SLOTS = ("checkpoint_a", "checkpoint_b")
CHUNK = 64 * 2**20  # bytes in one file


def write_checkpoint(
    store: Path, chain: int, used_slot: str | None, state: Mapping[str, np.ndarray]
) -> str:
    """Write a chain's state to the slot that its record does not name.

    Parameters
    ----------
    used_slot : str or None
        The slot that the record names now; it stays as it is.
    state : mapping of str to ndarray
        Flat arrays of bytes (uint8).

    Returns
    -------
    str
        The slot to put into the record.
    """
    slot = SLOTS[1] if used_slot == SLOTS[0] else SLOTS[0]
    shutil.rmtree(_directory(store, chain, slot), ignore_errors=True)
    group = zarr.open_group(_directory(store, chain, slot), mode="w-")
    for name, values in state.items():
        array = group.create_array(
            name,
            shape=values.shape,
            dtype="uint8",
            chunks=(max(1, min(CHUNK, values.size)),),
            compressors=[Crc32cCodec()],
            dimension_names=(f"bytes_{name}",),
        )
        array[:] = values
    settle_tree(_directory(store, chain, slot))
    return slot


def read_checkpoint(store: Path, chain: int, slot: str) -> dict[str, np.ndarray]:
    """Read a slot.

    Raises
    ------
    DamagedStoreError
        If it is not there, or fails its checksum.
    """
    directory = _directory(store, chain, slot)
    try:
        group = zarr.open_group(directory, mode="r")
        return {name: np.asarray(array[:]) for name, array in group.arrays()}
    except (OSError, ValueError, RuntimeError) as error:
        raise DamagedStoreError(
            f"chain {chain} cannot go on from {directory}, which is damaged ({error}): restore the "
            "store from a copy, or sample the chain into a new store (chains=, another output_path)"
        ) from error


def remove_checkpoints(store: Path, chain: int) -> None:
    """Delete both slots of a chain that needs them no more."""
    for slot in SLOTS:
        shutil.rmtree(_directory(store, chain, slot), ignore_errors=True)


def _directory(store: Path, chain: int, slot: str) -> Path:
    return store / "chains" / str(chain) / slot
