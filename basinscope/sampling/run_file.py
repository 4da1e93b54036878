"""A run described in a YAML file, for the command line and for batch jobs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xarray as xr

from basinscope.io.location import local_path
from basinscope.models.restrictions import create_param_masks
from basinscope.sampling.findings import ModelReport
from basinscope.sampling.loading import load_model, load_tokens

SECTIONS = {
    "model": "a Hugging Face model: a directory or a name",
    "dtype": "float32 (default), bfloat16 or float16",
    "dataset": "what chains are trained on: a path, or a mapping with 'path'",
    "observables": "a mapping of name to a path, or to a mapping with 'path'",
    "restriction": "what may move: l0, l0h1, l0 mlp, embed, ..., or a list of these",
    "sampler": "arguments of basinscope.sample: lr, n_beta, num_chains, ...",
    "output": "the store to write",
}
DATA_KEYS = {"path", "column", "max_length", "add_bos_token", "batches_per_draw"}
NOT_IN_FILE = {"model", "dataset", "observables", "loss_fn", "param_masks", "output_path"}


def run_from_file(path: Path, overrides: Mapping[str, Any]) -> tuple[xr.DataTree, Path]:
    """Sample as a YAML file says.

    Parameters
    ----------
    path : Path
        The file; its relative paths count from its own directory.
    overrides : mapping
        Arguments of :func:`basinscope.sample` that replace the file's; ``chains`` may be
        a text ``"FIRST:END"``, and ``restriction`` replaces the file's.

    Returns
    -------
    tree, store : xr.DataTree, Path

    Raises
    ------
    ValueError, FileNotFoundError
        Naming the key that is missing, unknown or wrong.
    """
    plan = _read(path)
    arguments = dict(plan.get("sampler") or {})
    known = set(inspect.signature(_sample()).parameters) - NOT_IN_FILE
    _refuse_unknown(path, "sampler", arguments, known)
    arguments |= overrides
    restriction = arguments.pop("restriction", plan.get("restriction"))
    if "output_path" not in arguments:
        if "output" not in plan:
            raise ValueError(
                f"{path}: say where the store goes: output: runs/samples.zarr, or --out"
            )
        arguments["output_path"] = path.parent / local_path(plan["output"])
    if isinstance(arguments.get("chains"), str):
        arguments["chains"] = parse_chains(arguments["chains"])
    for required in ("lr", "n_beta"):
        if required not in arguments:
            raise ValueError(f"{path}: sampler needs {required}")

    name = _located(path, plan["model"])
    model = load_model(name, plan.get("dtype", "float32"))
    if restriction is not None:
        arguments["param_masks"] = create_param_masks(model, restriction)
    dataset, _ = _load_data(path, "dataset", plan["dataset"], name)
    observables = {
        obs: _load_data(path, f"observables.{obs}", given, name)
        for obs, given in (plan.get("observables") or {}).items()
    }
    tree = _sample()(
        model,
        dataset,
        {n: (data, batches) if batches else data for n, (data, batches) in observables.items()},
        **arguments,
    )
    return tree, Path(arguments["output_path"])


def check_from_file(path: Path, *, batch_size: int, device: str | None) -> ModelReport:
    """Check the model and the sampling data of a YAML file, see :func:`basinscope.check_model`.

    The file's restriction is the one that is asked about, if it has one.

    Raises
    ------
    ValueError, FileNotFoundError
        As :func:`run_from_file`.
    """
    from basinscope.sampling.check import check_model

    plan = _read(path)
    restriction = plan.get("restriction")
    name = _located(path, plan["model"])
    model = load_model(name, plan.get("dtype", "float32"))
    dataset, _ = _load_data(path, "dataset", plan["dataset"], name)
    return check_model(
        model,
        dataset,
        restrictions=None if restriction is None else {"of the file": restriction},
        batch_size=batch_size,
        device=device,
    )


def parse_chains(text: str) -> list[int]:
    """Read ``"FIRST:END"`` (END not included) or a single number.

    Examples
    --------
    >>> parse_chains("0:3"), parse_chains("5")
    ([0, 1, 2], [5])
    """
    first, _, end = text.partition(":")
    try:
        return list(range(int(first), int(end))) if end else [int(first)]
    except ValueError as error:
        raise ValueError(f"chains must be FIRST:END, like 0:4; got {text!r}") from error


def _sample() -> Any:
    from basinscope.sampling.sample import sample

    return sample


def _read(path: Path) -> dict[str, Any]:
    import yaml

    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        plan = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    wanted = "\n".join(f"  {name}: {meaning}" for name, meaning in SECTIONS.items())
    if not isinstance(plan, dict):
        raise ValueError(f"{path} must hold a mapping with\n{wanted}")
    _refuse_unknown(path, "the file", plan, set(SECTIONS))
    missing = [name for name in ("model", "dataset", "sampler") if name not in plan]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}. It takes\n{wanted}")
    return plan


def _refuse_unknown(path: Path, where: str, given: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(set(given) - known)
    if unknown:
        raise ValueError(
            f"{path}: {where} has unknown {', '.join(unknown)}; it takes {', '.join(sorted(known))}"
        )


def _located(config: Path, name: str) -> str:
    """A path next to the configuration, or a name for the hub."""
    local = config.parent / Path(name).expanduser()
    return str(local) if local.exists() else name


def _load_data(config: Path, where: str, given: Any, tokenizer: str) -> tuple[Any, int | None]:
    """Load a data set that the file names, and how many of its batches a draw takes."""
    if not isinstance(given, str | Mapping):
        raise ValueError(
            f"{config}: {where} must be a path, or a mapping with 'path'; got {given!r}"
        )
    options: dict[str, Any] = {"path": given} if isinstance(given, str) else dict(given)
    _refuse_unknown(config, where, options, DATA_KEYS)
    if "path" not in options:
        raise ValueError(f"{config}: {where} needs a path")
    key = where if isinstance(given, str) else f"{where}.path"
    batches = options.pop("batches_per_draw", None)
    try:
        path = config.parent / local_path(options.pop("path"), "a data set")
        return load_tokens(path, tokenizer, **options), batches
    except (FileNotFoundError, ValueError, TypeError) as error:
        raise type(error)(f"{config}, {key}: {error}") from error
