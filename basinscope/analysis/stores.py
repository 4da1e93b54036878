"""What every estimator needs of a store: open it, and know which draws of it count."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import dask.array as da
import numpy as np
import xarray as xr

from basinscope.analysis.selections import Selected, count_written
from basinscope.io import dims
from basinscope.io.dims import observable_id
from basinscope.io.results import digest
from basinscope.io.store import (
    FAILED,
    chain_records,
    describe_gaps,
    read_root,
    records_of,
    require_store,
    sampler_settings,
    stored_array,
    stored_at,
)
from basinscope.io.stored import StoredArray

Part = StoredArray | Selected | np.ndarray  # losses of one chain: (1, rows, batch, token_pos)
FILE_BYTES = 2**25  # of losses in memory that one task takes, as if they were a file
TASK_BYTES = 2**28  # of losses on disk that one task goes through
SLAB_BYTES = 2**23  # of losses in memory that are gone through, and if need be copied, at once


@dataclass(frozen=True)
class Samples:
    """The losses of a store, restricted to what was written and may be averaged.

    Attributes
    ----------
    dataset : xr.Dataset
        The arrays at the root of the store, not read yet.
    name : str
        The path of the store, for messages.
    chains : tuple of int
        Chains that count, by their number in the store.
    places : tuple of int
        Where each of them stands in the arrays.
    draws, steps : tuple of int
        How many of each such chain count.
    recorded : bool
        Whether the store keeps a record of what was written (devinterp's do not).
    path : Path or None
        Where to read arrays from, if the samples were given by their path.
    """

    dataset: xr.Dataset
    name: str
    chains: tuple[int, ...]
    places: tuple[int, ...]
    draws: tuple[int, ...]
    steps: tuple[int, ...]
    recorded: bool
    path: Path | None = None

    @property
    def n_beta(self) -> float:
        """Inverse temperature nβ, from the settings: no array is read."""
        return float(self.sampler["n_beta"])

    @property
    def sampler(self) -> dict[str, Any]:
        """Settings of the sampler."""
        return self.config["sampler"]

    @property
    def config(self) -> dict[str, Any]:
        """Everything a run was configured with."""
        config: dict[str, Any] = self.dataset.attrs.get("metadata", {}).get("config", {})
        if "sampler" not in config:
            raise ValueError(
                f"{self.name} has no sampler settings (attribute metadata.config.sampler): "
                "pass what sample() returned, or the path of its store"
            )
        return config

    @property
    def observables(self) -> list[str]:
        """Ids of the observables, in the order of the store."""
        names = [str(name) for name in self.dataset.data_vars]
        return [name.removeprefix("loss_") for name in names if name.startswith("loss_")]

    def losses(self, name: str) -> list[Part]:
        """Give the losses of each chain that counts, up to the last row that counts."""
        rows = self.steps if dims.STEP in self.dataset.variables[name].dims else self.draws
        chains = zip(self.places, rows, strict=True)
        stored = self._stored(name)
        if stored is not None:
            return [stored.part(slice(chain, chain + 1), slice(count)) for chain, count in chains]
        data = unread(self.dataset.variables[name])
        parts = [data[chain : chain + 1, :count] for chain, count in chains]
        return [part if isinstance(part, np.ndarray) else Selected(part) for part in parts]

    def init_loss(self) -> list[StoredArray | da.Array | np.ndarray]:
        """Give the loss at the checkpoint of each chain that counts, (1, token_pos)."""
        return self._of_chains("init_loss")

    def init_batch_loss(self) -> list[StoredArray | da.Array | np.ndarray] | None:
        """Give the batches' losses at the checkpoint, (init_batch, token_pos).

        Of each chain that counts, or of all together where they are the same; None in a store
        without them.
        """
        variable = self.dataset.variables.get("init_batch_loss")
        if variable is None:
            return None
        if dims.CHAIN in variable.dims:
            return self._of_chains("init_batch_loss")
        stored = self._stored("init_batch_loss")
        return [unread(variable) if stored is None else stored]

    def _of_chains(self, name: str) -> list[StoredArray | da.Array | np.ndarray]:
        """Give an array of each chain that counts, with a first axis of one."""
        stored = self._stored(name)
        if stored is not None:
            return [stored.part(slice(chain, chain + 1)) for chain in self.places]
        data = unread(self.dataset.variables[name])
        return [data[chain : chain + 1] for chain in self.places]

    def _stored(self, name: str) -> StoredArray | None:
        """Find the array on disk that a variable is, to read it chunk by chunk."""
        if self.path is None:
            stored = stored_array(self.dataset.variables[name])
        else:
            stored = stored_at(self.path / name, self.dataset.variables[name])
        return stored.written() if stored is not None and self.recorded else stored

    def identity(self, names: Sequence[str]) -> dict[str, Any]:
        """Tell these samples from any others: settings, chains, and a digest of some losses.

        Reads ``init_loss``, and of the first chain the first, a middle and the last row of the
        arrays named.
        """
        some = [
            np.asarray(cut(part, slice(row, row + 1)))
            for part in (self.losses(name)[0] for name in names)
            for row in sorted({0, part.shape[1] // 2, part.shape[1] - 1})
        ]
        return {
            "created_at": self.dataset.attrs.get("created_at"),
            "sampler": self.sampler,
            "chains": list(self.chains),
            "draws": list(self.draws),
            "losses": [digest(values) for values in (*map(np.asarray, self.init_loss()), *some)],
        }

    @property
    def provenance(self) -> dict[str, object]:
        """Attributes of the store that its estimates carry on."""
        kept = ("created_by", "created_at", "schema_version", "metadata")
        return {name: self.dataset.attrs[name] for name in kept if name in self.dataset.attrs}


def open_samples(
    samples: xr.DataTree | str | os.PathLike[str], allow_incomplete: bool = False
) -> Samples:
    """Open a store's tree or path, and leave out what may not be averaged.

    The store's record decides what counts, not its values: what was not written reads as NaN.

    Parameters
    ----------
    samples : xr.DataTree or path
        A store of :func:`basinscope.sample` or of devinterp 2.x.
    allow_incomplete : bool
        Take the draws that a running or interrupted store records as written.

    Raises
    ------
    ValueError
        If chains are unfinished and ``allow_incomplete`` is False, if the store keeps no record of
        what was written, or if no chain is left.

    Warns
    -----
    UserWarning
        Naming the chains that are left out, and why.
    """
    path = None
    if isinstance(samples, xr.DataTree):
        dataset, records = samples.to_dataset(), chain_records(samples)
        name = str(dataset.encoding.get("source", "this tree"))
    else:
        path = require_store(samples)
        dataset, records = read_root(path), records_of(path)
        name = str(path)
    _require_losses(dataset, name)
    places = _places_of_chains(dataset, records, name)
    if not records:
        _require_completed(dataset, name)
        failed = dataset.attrs.get("failed_chains", ())
        kept = _kept(places, {chain: "failed" for chain in places if chain in failed}, name)
        return Samples(
            dataset, name, kept, tuple(places[chain] for chain in kept),
            (dataset.sizes.get(dims.DRAW, 0),) * len(kept),
            (dataset.sizes.get(dims.STEP, 0),) * len(kept), False, path,
        )  # fmt: skip
    records = {chain: records[chain] for chain in places}
    gaps = describe_gaps(records)
    unfinished = [chain for chain in gaps if records[chain]["state"] != FAILED]
    if unfinished and not allow_incomplete:
        reasons = "; ".join(f"chain {chain} {gaps[chain]}" for chain in unfinished)
        raise ValueError(
            f"{name} is not complete: {reasons}. Finish it with the call that began it, or take "
            "the draws that are written with allow_incomplete=True (--allow-incomplete)"
        )
    failed = {chain for chain in gaps if chain not in unfinished}
    sound = [chain for chain in places if chain not in failed]
    draws, steps = (
        count_written(dataset, row, {c: records[c][f"{row}s_written"] for c in sound}, name)
        for row in (dims.DRAW, dims.STEP)
    )
    left_out = {c: gap for c, gap in gaps.items() if c in failed or not draws[c]}
    kept = _kept(places, left_out, name)
    return Samples(
        dataset, name, kept, tuple(places[chain] for chain in kept),
        tuple(draws[chain] for chain in kept), tuple(steps[chain] for chain in kept), True, path,
    )  # fmt: skip


def _kept(chains: Iterable[int], left_out: Mapping[int, str], name: str) -> tuple[int, ...]:
    """Leave chains out, with a warning that says why."""
    kept = tuple(chain for chain in chains if chain not in left_out)
    if left_out:
        reasons = "; ".join(f"chain {chain} {gap}" for chain, gap in left_out.items())
        if not kept:
            raise ValueError(f"no chain of {name} can be analysed: {reasons}")
        warnings.warn(f"left out of this estimate of {name}: {reasons}", stacklevel=4)
    return kept


def _places_of_chains(
    dataset: xr.Dataset, records: Mapping[int, object], name: str
) -> dict[int, int]:
    """Find where each chain stands: by its number if the tree has it, else by the order."""
    if dims.CHAIN not in dataset.dims:
        raise ValueError(
            f"the arrays of {name} have no dimension 'chain': keep it, with one chain if need be "
            "(isel(chain=[0]))"
        )
    count = dataset.sizes[dims.CHAIN]
    if dims.CHAIN in dataset.coords:
        numbers = [int(number) for number in dataset[dims.CHAIN].values]
    elif count == _recorded(dataset, records, count):
        numbers = list(range(count))
    else:
        raise ValueError(
            f"{name} has {count} chains of {_recorded(dataset, records, count)}, so that it cannot "
            "be told which is which: select chains of a tree that open_store() gave, which are "
            "numbered"
        )
    unknown = [number for number in numbers if records and number not in records]
    if unknown or len(set(numbers)) < count:
        raise ValueError(
            f"chains {numbers} of {name} are not those of its records: {list(records)}"
        )
    return {number: place for place, number in enumerate(numbers)}


def _recorded(dataset: xr.Dataset, records: Mapping[int, object], unknown: int) -> int:
    """How many chains there were, where something is known of single ones."""
    if records or not dataset.attrs.get("failed_chains"):
        return len(records) or unknown
    sampler = sampler_settings(dataset.attrs)
    return int(sampler.get("num_chains", unknown))


def _require_losses(dataset: xr.Dataset, name: str) -> None:
    names = [str(variable) for variable in dataset.data_vars]
    if not any(variable.startswith(("loss_", "sampling_loss")) for variable in names):
        raise ValueError(
            f"{name} holds no losses but {', '.join(names) or 'nothing'}: pass the tree that "
            "sample() returned, or the path of its store"
        )
    for variable in names:
        shaped = dataset.variables[variable].dims
        if "loss" in variable and len(shaped) == 4:
            rows = dims.STEP if variable == "sampling_loss_micro" else dims.DRAW
            if (*shaped[:2], shaped[3]) != (dims.CHAIN, rows, dims.TOKEN_POS):
                raise ValueError(
                    f"{variable} of {name} has dims {shaped}; expected "
                    f"(chain, {rows}, batch, token_pos): transpose it"
                )


def _require_completed(dataset: xr.Dataset, name: str) -> None:
    on_disk = "source" in dataset.encoding
    if dataset.attrs.get("completed", None if on_disk else 1) != 1:
        ours = "schema_version" in dataset.attrs
        raise ValueError(
            f"{name} was not completed, and keeps no record of which draws were written, so "
            "missing ones cannot be told from NaN: "
            + (
                "select with tree.isel(...), which keeps the groups of chains that say it"
                if ours
                else "devinterp writes none; sample it again"
            )
        )


def choose_observables(samples: Samples, wanted: Literal["all"] | Sequence[str]) -> list[str]:
    """Find the ids of observables in a store, by their names or ids; "all" gives them sorted.

    Raises
    ------
    ValueError
        Naming those that the store does not have, and those that it has.
    """
    known = samples.observables
    if isinstance(wanted, str):
        wanted = sorted(known) if wanted == "all" else [wanted]
    found = [
        observable_id(name) if name not in known and isinstance(name, str) else name
        for name in wanted
    ]
    missing = [name for name in found if name not in known]
    if missing:
        raise ValueError(
            f"{samples.name} has no observable {', '.join(map(repr, missing))}; it has "
            f"{', '.join(sorted(known)) or 'none'}"
        )
    return found


def unread(variable: xr.Variable) -> da.Array | np.ndarray:
    """Give a variable's values where they are in memory, else as a Dask array."""
    if variable.chunks is None and not variable._in_memory:
        variable = variable.chunk()
    values: da.Array | np.ndarray = variable.data
    return values


def chunks_of(part: Part) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
    """Go through losses in pieces: those that a store holds, or slabs of an array in memory.

    Yields
    ------
    place : tuple of slice
        Where the values stand in the part.
    values : np.ndarray (1, rows, batch, token_pos)
    """
    if not isinstance(part, np.ndarray):
        yield from (chunk for chunk in part.chunks() if chunk[1].size)
        return
    rows = max(1, SLAB_BYTES // max(1, part[:, :1].nbytes))
    for first in range(0, part.shape[1], rows):
        row = slice(first, min(first + rows, part.shape[1]))
        if part.size:
            yield (slice(0, 1), row, slice(0, part.shape[2]), slice(0, part.shape[3])), part[:, row]


def streamed(part: Part) -> list[tuple[int, Part]]:
    """Split into what one task goes through chunk by chunk; give the first row with each.

    A task takes several files: they are not held, and a scheduler of few large tasks is not waited
    for. Losses that are no store's array are split by their Dask chunks.
    """
    if isinstance(part, StoredArray):
        file_bytes = part.nbytes // max(1, part.shape[1]) * part.file_shape[1]
        return files_of(part, max(1, TASK_BYTES // max(1, file_bytes)))
    if isinstance(part, np.ndarray):
        return files_of(part)
    return [
        (first, cut(piece, slice(None), slice(*at)))
        for first, piece in files_of(part)
        for at in part.bounds(2)
    ]


def files_of(part: Part, together: int = 1) -> list[tuple[int, Part]]:
    """Split along the rows, so many files to a piece; give the first row with each."""
    if isinstance(part, StoredArray):
        extent, begin = part.file_shape[1] * together, part.start[1]
        bounds = [*range(begin - begin % extent, part.stop[1], extent), part.stop[1]]
        return [(a, cut(part, slice(a, b))) for a, b in _pairs([max(0, n - begin) for n in bounds])]
    if isinstance(part, np.ndarray):
        extent = max(1, FILE_BYTES // max(1, part[:, :1].nbytes))
        return [(a, part[:, a : a + extent]) for a in range(0, part.shape[1], extent)]
    return [(a, cut(part, slice(a, b))) for a, b in part.bounds(1)]


def at_hand(parts: Sequence[Part]) -> bool:
    """Whether losses are in memory, and so few that one task may take them all."""
    in_memory = all(isinstance(part, np.ndarray) for part in parts)
    return in_memory and sum(part.nbytes for part in parts) <= FILE_BYTES


def cut(part: Part, rows: slice, sequences: slice = slice(None)) -> Part:
    """Narrow a chain's losses; reads nothing."""
    if isinstance(part, np.ndarray):
        return part[:, rows, sequences]
    return part.part(slice(None), rows, sequences)


def _pairs(bounds: list[int]) -> list[tuple[int, int]]:
    return [(a, b) for a, b in itertools.pairwise(bounds) if b > a]
