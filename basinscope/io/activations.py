"""Activations by experiment: saved whole or not at all, found again by what they are.

Every run has a directory ``base / experiment / model / time`` with its store ``activations.zarr``,
whose attributes are the run's metadata. Times are UTC. The experiment a run belongs to is the
directory it lies in, so renaming one is a single step.
"""

from __future__ import annotations

import operator
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from basinscope.io.activation_index import PARTIAL, STORE, Run, note_run, runs_of
from basinscope.io.activation_metadata import (
    Filter,
    field_filter,
    in_utc,
    model_filter,
    name_of_model,
    plain,
    time_filter,
)
from basinscope.io.activation_runs import (
    ALL,
    TIME_FOLDER,
    directory_of_model,
    experiment_names,
    new_run,
    remove_run,
    rename,
    require_experiment,
    require_experiment_name,
    require_stopped,
    time_of,
)
from basinscope.io.location import local_path

if TYPE_CHECKING:
    import xarray as xr

ENVIRONMENT = "ACTIVATION_BASE_DIR"
SHOWN = 40  # runs that repr() shows
OF_A_RUN = (
    "tag",
    "save_time",
    "experiment_name",
    "model_name",
    "target_token_positions",
    "interventions",
    "extraction_config",
    "arrays",
)
OF_THE_STORE = (
    "layout", "kind", "completed", "created_by", "created_at", "finished_at", "schema_version",
)  # fmt: skip


class ActivationSaver:
    """Saves activations under a base directory, one run at a time.

    Parameters
    ----------
    base_dir : path
        Made if it is not there.
    experiment_name : str
        The directory in it.
    """

    def __init__(self, base_dir: str | os.PathLike[str], experiment_name: str = "default") -> None:
        self.base_dir = local_path(base_dir, "a base directory")
        self.experiment_name = require_experiment_name(experiment_name)

    def __repr__(self) -> str:
        return f"ActivationSaver({str(self.base_dir)!r}, {self.experiment_name!r})"

    @classmethod
    def from_env(cls, experiment_name: str = "default") -> ActivationSaver:
        """Save under the directory that ACTIVATION_BASE_DIR names.

        Raises
        ------
        ValueError
            If the variable is not set.
        """
        return cls(_base_dir_from_env(), experiment_name)

    def save(
        self,
        activations: Any,
        model: Any,
        target_token_positions: Any,
        interventions: Any,
        extraction_config: Any,
        other_metadata: Mapping[str, Any] = {},
        tag: str | None = None,
        *,
        save_time: datetime | None = None,
    ) -> Path:
        """Save activations and what they are.

        Nothing is seen of the run until it is whole.

        Parameters
        ----------
        activations : mapping of str to array, xr.Dataset, xr.DataTree, or one array
            Arrays of NumPy or xarray, or tensors, which may be on a GPU and bfloat16. They are
            converted a chunk at a time.
        model : str or object
            Its name, or an object with ``name_or_path``, itself or in its ``config``, or with
            ``cfg.model_name``; otherwise its class names it.
        target_token_positions, interventions, extraction_config
            JSON, slices, dataclasses, or objects with ``to_dict()``.
        other_metadata : mapping
            More fields, beside these.
        tag : str, optional
        save_time : datetime, optional
            Default: now. Without a zone, it is UTC. Should another run have that very time, it is
            a microsecond later.

        Returns
        -------
        Path
            The run's directory. Other files may be put into it.

        Raises
        ------
        TypeError
            If an activation is no array of numbers, or a field is not JSON; names it.
        ValueError
            If ``other_metadata`` has a field of another argument.
        """
        taken = sorted(other_metadata.keys() & {*OF_A_RUN, *OF_THE_STORE})
        if taken:
            raise ValueError(f"other_metadata has {', '.join(taken)}: give those other names")
        # Only what saves or opens arrays takes the second that importing xarray and Zarr takes
        from basinscope.io.activation_layout import write_activations
        from basinscope.io.activation_sources import sources_of

        sources, coords, attrs, unembedding = sources_of(activations)
        model_name = name_of_model(model)
        metadata = {
            **{name: value for name, value in attrs.items() if name not in OF_A_RUN},
            **other_metadata,
            "tag": tag,
            "model_name": model_name,
            "target_token_positions": target_token_positions,
            "interventions": interventions,
            "extraction_config": extraction_config,
            "arrays": in_words({name: source.spec.shape for name, source in sources.items()}),
        }
        metadata = {name: plain(value, name) for name, value in metadata.items()}
        model_dir = self.base_dir / self.experiment_name / directory_of_model(model_name)
        wanted = datetime.now(UTC) if save_time is None else in_utc(save_time)
        with new_run(model_dir, wanted) as (draft, moment):
            metadata["save_time"] = moment.isoformat(timespec="microseconds")
            write_activations(draft / STORE, sources, metadata, coords, unembedding)
        path = model_dir / moment.strftime(TIME_FOLDER)
        note_run(path)
        return path

    def save_cache(
        self, cache: Any, other_metadata: Mapping[str, Any] = {}, tag: str | None = None
    ) -> Path:
        """Save a cache that carries its metadata.

        Parameters
        ----------
        cache : ActivationCache
            A mapping of arrays whose ``metadata`` has ``model`` (with ``name_or_path``) or
            ``model_name``, ``target_token_positions``, ``interventions`` and
            ``extraction_config``. What else is in it is kept.
        other_metadata, tag
            As :meth:`save` takes them.

        Returns
        -------
        Path
            The run's directory.

        Raises
        ------
        ValueError
            If the cache lacks metadata; names what is missing.
        """
        metadata = dict(getattr(cache, "metadata", None) or {})
        described = metadata.get("model", {})
        found = described if isinstance(described, Mapping) else {"name_or_path": described}
        name = found.get("name_or_path") or metadata.get("model_name") or found.get("class")
        needed = ("target_token_positions", "interventions", "extraction_config")
        missing = [field for field in needed if field not in metadata]
        if missing or not name:
            lacking = ", ".join(missing if name else ["model", *missing])
            raise ValueError(f"the cache's metadata lacks {lacking}: add it, or call save()")
        rest = {k: v for k, v in metadata.items() if k not in {*OF_A_RUN, *OF_THE_STORE}}
        positions, interventions, config = (metadata[field] for field in needed)
        return self.save(
            cache, name, positions, interventions, config, {**rest, **other_metadata}, tag
        )

    def rename_experiment(self, new: str) -> None:
        """Rename this saver's experiment, with all its runs, in one step.

        Raises
        ------
        FileNotFoundError
            If it has no runs yet.
        FileExistsError
            If there is an experiment of the new name.
        RuntimeError
            If a run of it is being saved.
        """
        old = require_experiment(self.base_dir, self.experiment_name)
        target = self.base_dir / require_experiment_name(new)
        for draft in old.glob(f"*/.*{PARTIAL}"):
            require_stopped(draft)
        rename(old, target)
        self.experiment_name = new


class ActivationLoader:
    """Finds saved activations.

    Parameters
    ----------
    base_dir : path
    experiment_name : str
        Where :meth:`query` looks unless it is told otherwise.
    """

    results: type[QueryResult]

    def __init__(self, base_dir: str | os.PathLike[str], experiment_name: str = "default") -> None:
        self.base_dir = local_path(base_dir, "a base directory")
        self.experiment_name = require_experiment_name(experiment_name)

    def __repr__(self) -> str:
        return f"ActivationLoader({str(self.base_dir)!r}, {self.experiment_name!r})"

    @classmethod
    def from_env(cls, experiment_name: str = "default") -> ActivationLoader:
        """Look under the directory that ACTIVATION_BASE_DIR names.

        Raises
        ------
        ValueError
            If the variable is not set.
        """
        return cls(_base_dir_from_env(), experiment_name)

    @classmethod
    def from_saver(cls, saver: ActivationSaver) -> ActivationLoader:
        """Look where a saver saves."""
        return cls(saver.base_dir, saver.experiment_name)

    def query(
        self,
        experiment_name: str | Callable[[str], bool] | None = None,
        model_name: Any = None,
        target_token_positions: Any = None,
        pivot_positions: Any = None,
        save_time: Any = None,
        custom_keys: Mapping[str, Any] | None = None,
        extraction_config: Any = None,
        interventions: Any = None,
        tag: Any = None,
    ) -> QueryResult:
        """Find the runs that fit all that is given.

        A filter is a value that a run's metadata must equal, or a function of that value that
        says whether it fits. None filters nothing.

        Parameters
        ----------
        experiment_name
            None: this loader's experiment. ``"*"``: all experiments.
        model_name
            With "/" or, as the directory has it, "_"; or a model, as ``save`` takes it.
        save_time
            Also a pair (from, until), ends included; either may be None. Times are strings in ISO
            format, names of runs' directories, or datetimes; those without a zone are UTC.
        custom_keys : mapping
            Names of other fields, such as those of ``other_metadata``, with a filter for each. A
            function is not asked about a run that lacks the field; here, None asks for runs where
            the field is None or missing.

        Returns
        -------
        QueryResult
            The oldest run first. It also says what is no whole run.

        Raises
        ------
        FileNotFoundError
            If the base directory or the experiment is not there; lists those that are.
        """
        given = {
            "target_token_positions": target_token_positions,
            "pivot_positions": pivot_positions,
            "extraction_config": extraction_config,
            "interventions": interventions,
            "tag": tag,
        }
        fields = {name: value for name, value in given.items() if value is not None}
        filters = [field_filter(*field) for field in {**fields, **(custom_keys or {})}.items()]
        if model_name is not None:
            filters.append(model_filter(model_name))
        if save_time is not None:
            filters.append(time_filter(save_time))
        runs: list[Run] = []
        not_whole: dict[Path, str] = {}
        for experiment in self._experiments(experiment_name):
            found, broken = runs_of(experiment)
            runs += [run for run in found if _fits(run, filters)]
            not_whole |= broken
        return self.results(sorted(runs, key=lambda run: (run.time, run.path)), not_whole)

    def _experiments(self, wanted: str | Callable[[str], bool] | None) -> list[Path]:
        if isinstance(wanted, str) and wanted != ALL:
            return [require_experiment(self.base_dir, wanted)]
        if wanted is None:
            return [require_experiment(self.base_dir, self.experiment_name)]
        names = experiment_names(self.base_dir)
        return [self.base_dir / name for name in names if not callable(wanted) or wanted(name)]


class QueryResult(Sequence[Run]):
    """Runs, the oldest first, as a query found them.

    Attributes
    ----------
    not_whole : dict of Path to str
        Directories of the experiments that hold no whole run, and why.
    """

    def __init__(self, runs: Sequence[Run], not_whole: Mapping[Path, str]) -> None:
        self._runs = list(runs)
        self.not_whole = dict(not_whole)

    def __len__(self) -> int:
        return len(self._runs)

    @overload
    def __getitem__(self, index: int) -> Run: ...

    @overload
    def __getitem__(self, index: slice) -> QueryResult: ...

    def __getitem__(self, index: int | slice) -> Run | QueryResult:
        if isinstance(index, slice):
            return type(self)(self._runs[index], self.not_whole)
        return self.find(index)

    def __str__(self) -> str:
        return "\n".join([*map(self._line, range(len(self))), *self._lines_of_not_whole()])

    def __repr__(self) -> str:
        shown = [self._line(index) for index in range(min(SHOWN, len(self)))]
        left = len(self) - len(shown)
        more = [f"... and {left:,} more"] if left else []
        counted = f"<QueryResult of {len(self):,} runs>"
        return "\n".join([counted, *shown, *more, *self._lines_of_not_whole()])

    def _line(self, index: int) -> str:
        run = self._runs[index]
        model = run.metadata.get("model_name", run.model_dir.name)
        tag = run.metadata.get("tag")
        words = [str(index), run.experiment_name, model, run.time]
        words += [f"tag={tag}"] if tag is not None else []
        return "  ".join([*words, run.metadata.get("arrays", "")])

    def _lines_of_not_whole(self) -> list[str]:
        return [f"!  {path}: {why}" for path, why in sorted(self.not_whole.items())]

    def get_paths(self) -> list[Path]:
        """Give the directory of every run."""
        return [run.path for run in self._runs]

    def load(self, identifier: int | str = -1) -> tuple[xr.DataTree, dict[str, Any]]:
        """Open a run lazily.

        Parameters
        ----------
        identifier : int or str
            Its number as printed; -1 is the latest. Or the name of its directory, a time.

        Returns
        -------
        xr.DataTree
            As :func:`basinscope.io.activation_store.open_activations` gives it.
        dict
            Its metadata.

        Raises
        ------
        IndexError, KeyError
            If there is no such run here; says which there are.
        ValueError
            If the run is not whole, or the time is that of several.
        """
        from basinscope.io.activation_store import open_activations

        run = self.find(identifier)
        return open_activations(run.path / STORE), dict(run.metadata)

    def remove(self, identifier: int | str) -> None:
        """Delete a run, or what is left of one that is not whole, and all in its directory.

        The directory gets another name first, so a run is there whole or not at all.

        Parameters
        ----------
        identifier : int or str
            As :meth:`load` takes it; of a half-written run, the time.

        Raises
        ------
        IndexError, KeyError, ValueError
            As :meth:`load` raises them.
        RuntimeError
            If the run is being saved.
        """
        path = self.path_of(identifier)
        remove_run(path)
        self._runs = [run for run in self._runs if run.path != path]
        self.not_whole.pop(path, None)

    def update_run_experiment(self, identifier: int | str, new_name: str) -> Path:
        """Move a run to another experiment, in one step.

        Parameters
        ----------
        identifier : int or str
            As :meth:`load` takes it.
        new_name : str
            The experiment; made if it is not there.

        Returns
        -------
        Path
            The run's new directory.

        Raises
        ------
        IndexError, KeyError, ValueError
            As :meth:`load` raises them.
        FileExistsError
            If that experiment has a run of this model and time.
        """
        run = self.find(identifier)
        base = run.path.parents[2]
        model_dir = base / require_experiment_name(new_name) / run.model_dir.name
        model_dir.mkdir(parents=True, exist_ok=True)
        rename(run.path, model_dir / run.time)
        metadata = {**run.metadata, "experiment_name": new_name}
        moved = Run(new_name, model_dir, model_dir / run.time, metadata)
        self._runs = [moved if other.path == run.path else other for other in self._runs]
        return moved.path

    def path_of(self, identifier: int | str) -> Path:
        """Find the directory of a run as :meth:`find` does, or of one that is not whole."""
        not_whole = [path for path in self.not_whole if time_of(path) == identifier]
        if not not_whole:
            return self.find(identifier).path
        found = [*not_whole, *(run.path for run in self._runs if run.time == identifier)]
        if len(found) > 1:
            raise ValueError(
                f"{len(found)} directories are of {identifier}, not all of them whole: "
                f"{', '.join(map(str, found))}. Give the number of a whole run"
            )
        return found[0]

    def find(self, identifier: int | str) -> Run:
        """Find a run by its number or its time.

        Raises
        ------
        IndexError, KeyError
            If there is no such run here; says which there are.
        ValueError
            If the run is not whole, or the time is that of several.
        """
        if not isinstance(identifier, str):
            index = operator.index(identifier)
            if not -len(self) <= index < len(self):
                there = f"0 to {len(self) - 1}" if self._runs else "none: nothing fits the query"
                raise IndexError(f"no run {index}; there are {there}{self._not_whole_in_words()}")
            return self._runs[index]
        found = [run for run in self._runs if run.time == identifier]
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(
                f"{len(found)} runs are of {identifier}: give the number of one, "
                + ", ".join(str(i) for i, run in enumerate(self._runs) if run in found)
            )
        for path, why in self.not_whole.items():
            if time_of(path) == identifier:
                raise ValueError(f"{path} cannot be loaded: {why}")
        shown = ", ".join(run.time for run in self._runs[-5:]) or "none"
        raise KeyError(f"no run of {identifier!r}; the latest here: {shown}")

    def _not_whole_in_words(self) -> str:
        return f"; {len(self.not_whole)} are not whole" if self.not_whole else ""


ActivationLoader.results = QueryResult


def in_words(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Sum up arrays, those of all layers and heads together.

    Examples
    --------
    >>> in_words({"resid_out_0": (4, 2, 8), "resid_out_1": (4, 2, 8), "logits": (4, 2, 50)})
    'resid_out_* x2 (4, 2, 8), logits (4, 2, 50)'
    """
    counts = Counter((re.sub(r"\d+", "*", name), shape) for name, shape in shapes.items())
    return ", ".join(
        f"{name} x{count} {shape}" if count > 1 else f"{name} {shape}"
        for (name, shape), count in counts.items()
    )


def _fits(run: Run, filters: Sequence[Filter]) -> bool:
    try:
        return all(fits(run) for fits in filters)
    except Exception as error:
        error.add_note(f"a filter of the query raised this, for {run.path}")
        raise


def _base_dir_from_env() -> str:
    found = os.environ.get(ENVIRONMENT)
    if not found:
        raise ValueError(
            f"{ENVIRONMENT} is not set: set it to the directory that activations are saved under, "
            "or give the directory itself"
        )
    return found
