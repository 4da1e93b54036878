"""A store of dataset attribution: harvested batch by batch, opened lazily.

While a store is being harvested its sums lie in a group ``generation-N``, which the root's
attributes name. The next state is written beside it and then named instead, by replacing one small
file, so a process killed at any moment, or a machine that fails, leaves the one or the other.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr

from basinscope.io.attributions_layout import (
    KEPT_BY_THE_STORE,
    METRICS,
    OUTPUT_TOKENS,
    REQUIRED,
    SCHEMA_VERSION,
    Counts,
    Edge,
    Sums,
    is_attribution_store,
    missing_ranks,
    settings_of,
    unembedding_chunk,
    write_sums,
)
from basinscope.io.chunked import (
    open_array,
    read_attributes,
    replace_attributes,
    write_array,
    write_group,
)
from basinscope.io.durable import settle_tree
from basinscope.io.location import local_path, made_at_once, require_place
from basinscope.io.locks import lock_directory
from basinscope.io.store import now, provenance, require_same_settings
from basinscope.io.stored import DamagedStoreError, StoredArray

AGAIN = "the store is being harvested; open it again"


class AttributionLockedError(OSError):
    """Another process is writing this store."""


def open_attributions(path: str | os.PathLike[str]) -> StoredAttributions:
    """Open a store of attributions lazily; reads the root's attributes only.

    Parameters
    ----------
    path : path
        What :class:`AttributionWriter` or :func:`basinscope.merge_attributions` wrote.

    Raises
    ------
    FileNotFoundError
        If there is nothing at ``path``.
    ValueError
        If what is there is no store of attributions.

    Warns
    -----
    UserWarning
        If the store is still being harvested, or lacks ranks; says how far it is.
    """
    store = StoredAttributions(path)
    if gap := store.describe_gap():
        warnings.warn(f"{path} {gap}", stacklevel=2)
    return store


class StoredAttributions:
    """The readable side of a store, as it is when this is made.

    Parameters
    ----------
    path : path
        As for :func:`open_attributions`, which also warns about what is missing.

    Attributes
    ----------
    path : Path
    metadata : dict
        The root's attributes: ``layers``, ``tokens``, ``batches``, ``parts``, and so on.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = local_path(path)
        if not self.path.exists():
            raise FileNotFoundError(f"no store at {path}: check the path, or harvest one first")
        self.metadata = read_attributes(self.path)
        if not is_attribution_store(self.metadata):
            raise ValueError(
                f"{path} is not a store of attributions (a Zarr v3 group with attributes 'layers' "
                "and 'edges'): pass what harvest_attributions() or a merge wrote"
            )
        if self.metadata["schema_version"] > SCHEMA_VERSION:
            raise ValueError(
                f"{path} has schema version {self.metadata['schema_version']}; this Basinscope "
                f"reads up to {SCHEMA_VERSION}: install the one that wrote it, "
                f"{self.metadata['created_by']}"
            )

    @property
    def edges(self) -> list[Edge]:
        """Pairs of target layer and source layer that have attributions."""
        return [(target, source) for target, source in self.metadata["edges"]]

    @property
    def completed(self) -> bool:
        return bool(self.metadata["completed"] == 1)

    def describe_gap(self) -> str | None:
        """Say what the store lacks; None if it is whole."""
        if not self.completed:
            asked = self.metadata["n_batches"]
            return (
                f"is being harvested or was stopped: it holds {self.metadata['batches']} batches "
                f"({self.metadata['tokens']} tokens), of "
                f"{'all of the data' if asked is None else f'{asked} over all ranks'}. The call "
                "that began it continues it"
            )
        if missing := missing_ranks(self.metadata["parts"]):
            world = self.metadata["parts"][0][1]
            return f"lacks the parts of ranks {', '.join(map(str, missing))} of {world}"
        return None

    def sums(self, metric: str, target: str, source: str) -> StoredArray:
        """Open the sums of one edge, (target, source); reads no values.

        A contiguous slice reads the chunks that it touches, and no more.
        """
        return self._open(f"{metric}/{target}/{source}/sum")

    def matrix(self, metric: str, target: str, source: str) -> xr.DataArray:
        """Give the sums of one edge as a lazy array with dims (target, source)."""
        sums = self.sums(metric, target, source)
        lazy = da.from_array(
            sums, chunks=sums.chunk_shape, name=f"{metric}-{uuid.uuid4().hex}", asarray=True,
            fancy=False, meta=np.empty((0, 0)),
        )  # fmt: skip
        return xr.DataArray(lazy, dims=("target", "source"), name=metric)

    def counts(self, layer: str, name: str) -> np.ndarray:
        """Read one count of a layer.

        Parameters
        ----------
        layer : str
        name : str
            ``mean_importance_sum``, ``active`` or ``square_sum`` of components, ``occurrences`` of
            ``embed``, ``square_sum`` of ``output``.
        """
        return np.asarray(self._open(f"counts/{layer}/{name}"))

    def count_names(self) -> dict[str, list[str]]:
        """List the counts that each layer has."""
        groups = self._locate("counts").glob("*/*/zarr.json")
        names: dict[str, list[str]] = {}
        for file in sorted(groups):
            names.setdefault(file.parent.parent.name, []).append(file.parent.name)
        return names

    @property
    def unembedding(self) -> StoredArray | None:
        """The unembedding's weight (vocab, d_model), float32, opened; None if there is none."""
        return open_array(self.path / "unembedding" / "weight")

    def _open(self, name: str) -> StoredArray:
        stored = open_array(self._locate(name))
        if stored is None:
            raise FileNotFoundError(f"{self.path} has no array {name}")
        return _Unmoved(**vars(stored))

    def _locate(self, name: str) -> Path:
        """Find an array or group: in the generation that counts, if it was not moved out yet."""
        generation = self.metadata.get("generation")
        if generation is None:
            return self.path / name
        inside = self.path / str(generation) / name
        if inside.exists():
            return inside
        now_there = read_attributes(self.path)
        if any(now_there.get(field) != self.metadata[field] for field in ("batches", "tokens")):
            raise FileNotFoundError(f"{self.path} was saved anew since it was opened: {AGAIN}")
        return self.path / name


class _Unmoved(StoredArray):
    """An array of a store that may be saved anew while it is read.

    Files that went meanwhile are neither zeros, as in older stores, nor damage.
    """

    def chunks(self) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
        try:
            yield from super().chunks()
        except DamagedStoreError:
            self._require_unmoved()
            raise
        self._require_unmoved()

    def _require_unmoved(self) -> None:
        if not os.path.exists(os.path.join(self.path, "zarr.json")):
            raise FileNotFoundError(f"{self.path} went while it was read: {AGAIN}")


class AttributionWriter:
    """The writable side of a store; one process at a time holds it.

    Made by :meth:`create_or_continue`; a context manager, which lets go of the store at its end.

    Attributes
    ----------
    path : Path
    """

    def __init__(
        self,
        path: Path,
        lock: int,
        edges: Mapping[Edge, tuple[int, int]],
        counts: Mapping[str, Mapping[str, tuple[int, ...]]],
    ) -> None:
        self.path = path
        self._lock: int | None = lock
        self._edges = dict(edges)
        self._counts = {layer: dict(shapes) for layer, shapes in counts.items()}

    @classmethod
    def create_or_continue(
        cls,
        path: str | os.PathLike[str],
        *,
        metadata: Mapping[str, Any],
        edges: Mapping[Edge, tuple[int, int]],
        counts: Mapping[str, Mapping[str, tuple[int, ...]]],
        unembedding: np.ndarray | None = None,
    ) -> AttributionWriter:
        """Make a new store, or open one of the same metadata to go on with it.

        Parameters
        ----------
        path : path
        metadata : mapping
            ``model``, ``layers``, ``importance_threshold``, ``output_token_ids``,
            ``dataset_fingerprint``, ``batch_size``, ``n_batches`` and ``parts``, and whatever else
            decides the numbers. What the store keeps itself (``edges``, ``tokens``,
            ``created_by``, ...) need not be there.
        edges : mapping of (target, source) to (int, int)
            How many targets and sources each edge has.
        counts : mapping of layer and name to shape
        unembedding : np.ndarray (vocab, d_model), float32, or None

        Raises
        ------
        StoreMismatchError
            If the store has other metadata; names each field that differs.
        ValueError
            If ``path`` holds something else, which is left as it is; if the unembedding differs; if
            the metadata lacks a field, or the sizes contradict its ``layers``.
        NotADirectoryError
            If ``path`` is below a file.
        AttributionLockedError
            If another process is writing the store.
        """
        path = local_path(path)
        require_place(path)
        attributes = _initial_attributes(metadata, edges)
        if not path.exists() or (path.is_dir() and not any(path.iterdir())):
            _create(path, attributes, unembedding)
        if not is_attribution_store(read_attributes(path)):
            raise ValueError(
                f"{path} exists and is no store of attributions: it is left as it is; choose "
                "another output_path"
            )
        held = AttributionLockedError(
            f"{path} is being harvested by another process: wait for it, or give the two processes "
            "different ranks and stores"
        )
        writer = cls(path, lock_directory(path, held), edges, counts)
        try:
            stored = StoredAttributions(path)
            require_same_settings(path, settings_of(stored.metadata), settings_of(attributes))
            _require_same_unembedding(stored, unembedding)
            writer._remove_litter()
        except BaseException:
            writer.close()
            raise
        return writer

    @property
    def batches_done(self) -> int:
        """Batches that the saved sums hold."""
        return int(self._attributes["batches"])

    @property
    def completed(self) -> bool:
        return bool(self._attributes["completed"] == 1)

    def sums(self) -> tuple[Sums, Counts, int]:
        """Read the saved state: sums, counts and tokens; zeros before the first :meth:`save`."""
        stored = StoredAttributions(self.path)
        if not (stored.completed or stored.metadata["generation"]):
            return *self._zeros(), 0
        sums: Sums = {
            metric: {edge: np.asarray(stored.sums(metric, *edge)) for edge in self._edges}
            for metric in METRICS
        }
        counts: Counts = {
            layer: {name: stored.counts(layer, name) for name in names}
            for layer, names in self._counts.items()
        }
        return sums, counts, int(stored.metadata["tokens"])

    def save(
        self,
        sums: Mapping[str, Mapping[Edge, np.ndarray]],
        counts: Mapping[str, Mapping[str, np.ndarray]],
        *,
        tokens: int,
        batches_done: int,
    ) -> None:
        """Replace the saved state as a whole: a kill leaves the one before or this one.

        Parameters
        ----------
        sums : mapping of metric and (target, source) to np.ndarray (target, source)
            Totals so far, not what was added since the last call.
        counts : mapping of layer and name to np.ndarray
        tokens, batches_done : int
            Positions and batches that the sums hold.

        Raises
        ------
        ValueError
            If an array is missing, too many, or of another shape than this store's; or if the store
            is completed.
        """
        self._require_open()
        if self.completed:
            raise ValueError(f"{self.path} is completed: nothing is written to it any more")
        self._require_arrays(sums, counts)
        previous = self._attributes["generation"]
        number = 1 if previous is None else int(previous.rpartition("-")[2]) + 1
        generation = f"generation-{number}"
        shutil.rmtree(self.path / generation, ignore_errors=True)  # of a save that failed
        try:
            write_group(self.path / generation)
            write_sums(self.path / generation, sums, counts)
            settle_tree(self.path / generation)
        except BaseException:  # such as a full disk, which it would keep full
            shutil.rmtree(self.path / generation, ignore_errors=True)
            raise
        self._update(generation=generation, tokens=int(tokens), batches=int(batches_done))
        if previous is not None:
            _remove(self.path / previous)

    def finish(self) -> None:
        """Mark the store completed, and let go of it. The sums move to where they stay."""
        self._require_open()
        if not self.completed:
            if self._attributes["generation"] is None:
                self.save(*self._zeros(), tokens=0, batches_done=0)
            generation = self.path / self._attributes["generation"]
            for name in (*METRICS, "counts"):
                if (generation / name).exists():  # else a stopped finish() moved it
                    shutil.rmtree(self.path / name, ignore_errors=True)
                    (generation / name).rename(self.path / name)
            self._update(generation=None, completed=1, finished_at=now())
            _remove(generation)
        self.close()

    def close(self) -> None:
        """Let go of the store; another process may then continue it."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> AttributionWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _attributes(self) -> dict[str, Any]:
        return read_attributes(self.path)

    def _update(self, **fields: Any) -> None:
        replace_attributes(self.path, {**self._attributes, **fields})

    def _require_open(self) -> None:
        if self._lock is None:
            raise ValueError(f"{self.path} was closed: open it again with create_or_continue()")

    def _zeros(self) -> tuple[Sums, Counts]:
        return (
            {m: {edge: np.zeros(shape) for edge, shape in self._edges.items()} for m in METRICS},
            {
                layer: {name: np.zeros(shape) for name, shape in shapes.items()}
                for layer, shapes in self._counts.items()
            },
        )

    def _require_arrays(
        self,
        sums: Mapping[str, Mapping[Edge, np.ndarray]],
        counts: Mapping[str, Mapping[str, np.ndarray]],
    ) -> None:
        wanted = {
            f"{metric} of {source} -> {target}": tuple(shape)
            for metric in METRICS
            for (target, source), shape in self._edges.items()
        }
        given = {
            f"{metric} of {source} -> {target}": np.shape(values)
            for metric, arrays in sums.items()
            for (target, source), values in arrays.items()
        }
        wanted |= {
            f"{name} of {layer}": tuple(shape)
            for layer, shapes in self._counts.items()
            for name, shape in shapes.items()
        }
        given |= {
            f"{name} of {layer}": np.shape(values)
            for layer, arrays in counts.items()
            for name, values in arrays.items()
        }
        for what in wanted.keys() | given.keys():
            if wanted.get(what) != given.get(what):
                raise ValueError(
                    f"{what}: {self.path} takes shape {wanted.get(what, 'nothing')}, got "
                    f"{given.get(what, 'nothing')}"
                )

    def _remove_litter(self) -> None:
        """Remove what a process that was killed in :meth:`save` or :meth:`finish` left behind."""
        current = self._attributes["generation"]
        for entry in self.path.iterdir():
            if entry.name.startswith("generation-") and entry.name != current:
                shutil.rmtree(entry)
            elif entry.name.endswith(".partial"):
                entry.unlink()


def _initial_attributes(
    metadata: Mapping[str, Any], edges: Mapping[Edge, tuple[int, int]]
) -> dict[str, Any]:
    missing = sorted(REQUIRED - metadata.keys())
    if missing:
        raise ValueError(f"metadata lacks {', '.join(missing)}")
    sizes = {layer: fields["size"] for layer, fields in metadata["layers"].items()}
    sizes[OUTPUT_TOKENS] = len(metadata["output_token_ids"])
    for (target, source), shape in edges.items():
        expected = (sizes.get(target), sizes.get(source))
        if tuple(shape) != expected:
            raise ValueError(
                f"the edge from {source} to {target} has shape {tuple(shape)}; the sizes in "
                f"metadata['layers'] make it {expected}"
            )
    attributes = {
        **{name: value for name, value in metadata.items() if name not in KEPT_BY_THE_STORE},
        **provenance(),
        "schema_version": SCHEMA_VERSION,
        "edges": [list(edge) for edge in edges],
        "batches": 0,
        "tokens": 0,
        "completed": 0,
        "generation": None,
    }
    plain: dict[str, Any] = json.loads(json.dumps(attributes))  # as it will be read again
    return plain


def _create(path: Path, attributes: Mapping[str, Any], unembedding: np.ndarray | None) -> None:
    """Write a store without sums, then move it into place in one step."""
    with made_at_once(path, or_else=_holds_attributions) as draft:
        write_group(draft, attributes)
        if unembedding is not None:
            write_group(draft / "unembedding")
            write_array(
                draft / "unembedding" / "weight",
                np.asarray(unembedding, np.float32),
                ("vocab", "d_model"),
                unembedding_chunk(unembedding.shape),
            )


def _holds_attributions(path: Path) -> bool:
    return is_attribution_store(read_attributes(path))


def _require_same_unembedding(stored: StoredAttributions, given: np.ndarray | None) -> None:
    weight = stored.unembedding
    if weight is None and given is None:
        return
    same = weight is not None and given is not None and weight.shape == given.shape
    if weight is not None and given is not None and same:
        wanted = np.asarray(given, np.float32)
        same = all(np.array_equal(chunk, wanted[place]) for place, chunk in weight.chunks())
    if not same:
        raise ValueError(
            f"{stored.path} was harvested with another unembedding: it is left as it is; choose "
            "another output_path, or the model that it was begun with"
        )


def _remove(directory: Path) -> None:
    """Remove a directory such that no reader finds it half there."""
    gone = directory.with_name(f"{directory.name}.removed")
    directory.rename(gone)
    shutil.rmtree(gone)
