"""Which saved runs there are, and what each holds, without opening them one by one.

A listing of the directories says which runs there are. What they hold stands in one file beside
them, a line of JSON for each; it is no more than a copy. A run whose line is missing, damaged or
older than its directory is read itself and noted, so whatever happens to the file, no run is lost.
"""

from __future__ import annotations

import fcntl
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

INDEX = ".index.jsonl"
STORE = "activations.zarr"  # in a run's directory
PARTIAL, REMOVED = ".partial", ".removed"
SPARE_LINES = 100  # old lines, beyond as many as there are runs


class Run(NamedTuple):
    """One saved run.

    Attributes
    ----------
    experiment_name : str
    model_dir : Path
    path : Path
        The run's own directory, base / experiment / model / time.
    metadata : dict
    """

    experiment_name: str
    model_dir: Path
    path: Path
    metadata: dict[str, Any]

    @property
    def time(self) -> str:
        """Name of the run's directory."""
        return self.path.name


def runs_of(experiment: Path) -> tuple[list[Run], dict[Path, str]]:
    """List the runs of an experiment.

    Returns
    -------
    list of Run
        In the order of their directories' names: the oldest first.
    dict of Path to str
        What is not a whole run, and why.
    """
    noted, count = _read_index(experiment)
    runs, broken, lines = [], {}, []
    for model in _directories(experiment):
        for entry in _directories(Path(model.path), hidden=True):
            path = Path(entry.path)
            if entry.name.startswith("."):
                if entry.name.endswith(PARTIAL):
                    broken[path] = _why_partial(path)
                continue
            line = noted.get((model.name, entry.name))
            try:
                changed = entry.stat().st_mtime_ns
            except FileNotFoundError:  # removed or renamed meanwhile
                continue
            if line is None or line["changed"] != changed:
                try:
                    line = _line(path, changed, _read_metadata(path))
                except _NotARun as error:
                    if str(error):
                        broken[path] = str(error)
                    continue
                lines.append(line)
            metadata = {**line["metadata"], "experiment_name": experiment.name}
            runs.append(Run(experiment.name, path.parent, path, metadata))
    _append(experiment, lines)
    if count + len(lines) > 2 * len(runs) + SPARE_LINES:
        _compact(experiment, {(run.model_dir.name, run.time) for run in runs})
    return sorted(runs, key=lambda run: (run.time, run.model_dir)), broken


def note_run(path: Path) -> None:
    """Note a run that was just saved."""
    with suppress(OSError, _NotARun):  # moved or removed already
        _append(path.parents[1], [_line(path, path.stat().st_mtime_ns, _read_metadata(path))])


class _NotARun(Exception):
    """Why a directory is no whole run; nothing where it is no concern of ours."""


def _read_metadata(path: Path) -> dict[str, Any]:
    """Read the metadata of one run."""
    if not (path / STORE).is_dir():
        raise _NotARun(
            "it was saved by easyroutine: basinscope.activations.import_easyroutine reads it"
            if (path / "tensor.pt").is_file()
            else ""
        )
    try:
        attributes: dict[str, Any] = json.loads((path / STORE / "zarr.json").read_text())[
            "attributes"
        ]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise _NotARun(f"its {STORE}/zarr.json is damaged ({error})") from error
    if attributes.get("completed") != 1:
        raise _NotARun(f"its {STORE} is incomplete: the call that writes it continues it")
    attributes.pop("layout", None)
    return attributes


def _why_partial(path: Path) -> str:
    """Say why the directory of a run still has the name it has while it is written."""
    try:
        with locked(path, wait=False):
            return "it is half-written: its save was stopped; remove() deletes what there is"
    except BlockingIOError:
        return "it is being saved right now"
    except FileNotFoundError:
        return "it was being saved right now"


@contextmanager
def locked(directory: Path, wait: bool = True) -> Iterator[int]:
    """Hold a directory for this process, where the file system has locks.

    Raises
    ------
    BlockingIOError
        If another process holds it, and we do not wait.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError:  # no locks here
            pass
        yield descriptor
    finally:
        os.close(descriptor)


def _directories(path: Path, hidden: bool = False) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if (hidden or not entry.name.startswith(".")) and entry.is_dir():
                    yield entry
    except FileNotFoundError:  # removed or renamed meanwhile
        return


def _line(path: Path, changed: int, metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "model": path.parent.name,
        "time": path.name,
        "changed": changed,
        "metadata": dict(metadata),
    }


def _read_index(experiment: Path) -> tuple[dict[tuple[str, str], dict[str, Any]], int]:
    """Read the last whole line of every run, and count all lines."""
    found = {}
    try:
        lines = (experiment / INDEX).read_bytes().splitlines()
    except OSError:
        return {}, 0
    for text in lines:
        try:
            line = json.loads(text)
            if isinstance(line["metadata"], dict) and isinstance(line["changed"], int):
                found[line["model"], line["time"]] = line
        except (ValueError, KeyError, TypeError):
            continue
    return found, len(lines)


def _append(experiment: Path, lines: list[dict[str, Any]]) -> None:
    """Add lines in one write; where that cannot be done, the runs are read again next time."""
    if not lines:
        return
    text = "".join(json.dumps(line) + "\n" for line in lines).encode()
    with suppress(OSError), locked(experiment):
        descriptor = os.open(experiment / INDEX, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":  # of a writer that was killed
                text = b"\n" + text
            os.write(descriptor, text)
        finally:
            os.close(descriptor)


def _compact(experiment: Path, runs: set[tuple[str, str]]) -> None:
    """Leave out older lines, and those of runs that are gone."""
    draft = experiment / f"{INDEX}.{uuid.uuid4().hex}{PARTIAL}"
    with suppress(OSError), locked(experiment):
        kept = [line for run, line in _read_index(experiment)[0].items() if run in runs]
        try:
            draft.write_text("".join(json.dumps(line) + "\n" for line in kept))
            draft.replace(experiment / INDEX)
        finally:
            draft.unlink(missing_ok=True)
