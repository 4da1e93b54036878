"""A run's directory: its names, how it comes into being, how it is moved and removed."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path

from basinscope.io.activation_index import PARTIAL, REMOVED, locked

ALL = "*"  # experiments, for a query
LONGEST = 255  # bytes, of a directory's name
TIME_FOLDER = "%Y-%m-%d_%H_%M_%S_%f"


@contextmanager
def new_run(model_dir: Path, moment: datetime) -> Iterator[tuple[Path, datetime]]:
    """Give a directory to write a run into, and the run's time; at the end it gets that name.

    It keeps the name of a draft if this process is killed, and goes if writing fails.

    Parameters
    ----------
    moment : datetime
        In UTC. The first microsecond from there on that no other run has is the run's time.

    Raises
    ------
    RuntimeError
        If the directory was moved away meanwhile.
    """
    model_dir.mkdir(parents=True, exist_ok=True)
    draft, moment = _claim(model_dir, moment)
    try:
        with locked(draft) as descriptor:
            yield draft, moment
            if not (draft.exists() and os.path.samestat(os.fstat(descriptor), draft.stat())):
                raise RuntimeError(
                    f"{draft} was moved away while the run was saved, and nothing is saved: do "
                    "not rename an experiment that is being written to; save again"
                )
            rename(draft, model_dir / moment.strftime(TIME_FOLDER))
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _claim(model_dir: Path, moment: datetime) -> tuple[Path, datetime]:
    """Find a time that no other run has, in whichever process: making a directory decides."""
    while True:
        name = moment.strftime(TIME_FOLDER)
        draft = model_dir / f".{name}{PARTIAL}"
        try:
            draft.mkdir()
        except FileExistsError:
            pass
        else:  # a draft gives up its name only after the run has its own
            if not (model_dir / name).exists():
                return draft, moment
            draft.rmdir()
        moment += timedelta(microseconds=1)


def rename(path: Path, target: Path) -> None:
    """Move a directory in one step, never over another.

    Raises
    ------
    FileExistsError
        If there is something at ``target``.
    """
    try:
        path.rename(target)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        raise FileExistsError(
            f"{target} exists already; {path} is left as it is: choose another name"
        ) from error


def remove_run(path: Path) -> None:
    """Delete a directory, which gets another name first: a run is there whole or not at all."""
    require_stopped(path)
    doomed = path.with_name(f".{time_of(path)}.{uuid.uuid4().hex}{REMOVED}")
    path.rename(doomed)
    for directory in path.parent.glob(f".*{REMOVED}"):  # also those of a removal cut short
        shutil.rmtree(directory, ignore_errors=True)
    if doomed.exists():
        raise OSError(f"{doomed} could not be deleted whole: delete what is left of it")


def require_stopped(path: Path) -> None:
    """Raise if a run is being saved in this directory."""
    try:
        with locked(path, wait=False):
            pass
    except BlockingIOError:
        raise RuntimeError(f"{path} is being saved right now: wait for it") from None


def time_of(path: Path) -> str:
    """Name the time of a run, half-written or whole."""
    return path.name.removeprefix(".").removesuffix(PARTIAL)


def require_experiment(base_dir: Path, name: str) -> Path:
    """Find an experiment, or raise a FileNotFoundError that lists those that are there."""
    names = experiment_names(base_dir)
    if name not in names:
        raise FileNotFoundError(
            f"{base_dir} has no experiment {name!r}; it has {', '.join(names) or 'none'}"
        )
    return base_dir / name


def experiment_names(base_dir: Path) -> list[str]:
    """List the experiments under a base directory."""
    if not base_dir.is_dir():
        raise FileNotFoundError(f"there is no directory {base_dir}: check the path")
    with os.scandir(base_dir) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def require_experiment_name(name: str) -> str:
    """Raise a ValueError if no directory of an experiment can have this name."""
    if not name or "/" in name or name.startswith(".") or name == ALL:
        raise ValueError(
            f"{name!r} cannot be the name of an experiment: it is that of a directory, and does "
            "not begin with a dot"
        )
    return name


def directory_of_model(name: str) -> str:
    """Name the directory of a model: the end of its name, as far as a directory's may be long.

    Raises
    ------
    ValueError
        If the name is empty.

    Examples
    --------
    >>> directory_of_model("EleutherAI/pythia-70m"), directory_of_model("./mine")
    ('EleutherAI_pythia-70m', '__mine')
    """
    if not name:
        raise ValueError("the model's name is empty: give one")
    directory = os.fsencode(name.replace("/", "_"))[-LONGEST:].decode(errors="ignore")
    return f"_{directory[1:]}" if directory.startswith(".") else directory
