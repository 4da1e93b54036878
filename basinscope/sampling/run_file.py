"""A run described in a YAML file, for the command line and for batch jobs."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import xarray as xr

from basinscope.io.location import local_path
from basinscope.models.restrictions import create_param_masks
from basinscope.sampling.config import SamplerConfig, merge_rmsprop_aliases
from basinscope.sampling.execution import check_execution
from basinscope.sampling.findings import ModelReport
from basinscope.sampling.loading import load_model, load_tokens, require_data
from basinscope.sampling.numbers import parse_numbers

SECTIONS = {
    "model": "a Hugging Face model: a directory or a name",
    "dtype": "float32 (default), bfloat16 or float16",
    "dataset": "what chains are trained on: a path, or a mapping with 'path'",
    "observables": "a mapping of name to a path, or to a mapping with 'path'",
    "restriction": "what may move: l0, l0h1, l0 mlp, embed, ..., or a list of these",
    "sampler": "arguments of basinscope.sample: lr, n_beta, num_chains, ...",
    "output": "the store to write",
}
DATA_KEYS: dict[str, tuple[type[Any], str]] = {
    "path": (str, "a path"),
    "column": (str, "the name of a column"),
    "max_length": (int, "a whole number of at least 2"),
    "add_bos_token": (bool, "true or false"),
    "batches_per_draw": (int, "a whole number of at least 1"),
}
NOT_IN_FILE = {"model", "dataset", "observables", "loss_fn", "param_masks", "output_path"}


def run_from_file(path: Path, overrides: Mapping[str, Any]) -> tuple[xr.DataTree, Path]:
    """Sample as a YAML file says.

    Parameters
    ----------
    path : Path
        The file; its relative paths count from its own directory.
    overrides : mapping
        Arguments of :func:`basinscope.sample` that replace the file's; ``chains`` may be a text
        such as ``"0,4:8"``. ``restriction`` and ``model`` replace the file's too; a path to a model
        counts from the working directory.

    Returns
    -------
    tree, store : xr.DataTree, Path

    Raises
    ------
    ValueError, FileNotFoundError
        Naming the key that is missing, unknown or wrong.
    """
    replaced = dict(overrides)
    plan = _read(path, model=replaced.pop("model", None))
    arguments = _arguments(path, plan, replaced)
    if "output_path" not in arguments:
        raise ValueError(f"{path}: say where the store goes: output: runs/samples.zarr, or --out")
    restriction = arguments.pop("restriction")
    dataset, observables = _sources(path, plan)

    name, model = _load_model(path, plan)
    if restriction is not None:
        arguments["param_masks"] = create_param_masks(model, restriction)
    tree = _sample()(
        model,
        dataset.load(name),
        _loaded(observables, name),
        **arguments,
    )
    return tree, Path(arguments["output_path"])


def check_from_file(
    path: Path, *, batch_size: int, device: str | None, model: str | None = None
) -> ModelReport:
    """Check what a YAML file describes: see :func:`basinscope.check_model`, and the run itself.

    The sampler's settings, and where data sets are, are checked before the model is loaded. The
    file's restriction is the one that is asked about, if it has one. The report ends with the
    finding "run", of :func:`basinscope.sampling.rehearsal.rehearse`.

    Raises
    ------
    ValueError, FileNotFoundError
        As :func:`run_from_file`.
    """
    from basinscope.sampling.check import check_model
    from basinscope.sampling.rehearsal import rehearse

    plan = _read(path, model)
    arguments = _arguments(path, plan, {})
    restriction = arguments["restriction"]
    dataset, observables = _sources(path, plan)
    name, loaded = _load_model(path, plan)
    data, observed = dataset.load(name), _loaded(observables, name)
    device = device or arguments.get("device")
    report = check_model(
        loaded,
        data,
        restrictions=None if restriction is None else {"of the file": restriction},
        batch_size=batch_size,
        device=device,
    )
    run = rehearse(
        loaded,
        data,
        observed,
        _config(arguments),
        param_masks=None if restriction is None else create_param_masks(loaded, restriction),
        device=device,
        cuda_graph=arguments.get("cuda_graph", False),
        output_path=arguments.get("output_path"),
    )
    return replace(report, findings=(*report.findings, run))


def _sample() -> Any:
    from basinscope.sampling.sample import sample

    return sample


def _read(path: Path, model: str | None) -> dict[str, Any]:
    """Read the file; another model than its own may be given, by its path from here or its name."""
    import yaml

    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory: give the YAML file that describes the run")
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
    plan = {name: given for name, given in plan.items() if given is not None}
    if model is not None:
        here = Path(model).expanduser().absolute()
        plan["model"] = str(here) if here.exists() else model
    missing = [name for name in ("model", "dataset", "sampler") if name not in plan]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}. It takes\n{wanted}")
    return plan


def _arguments(path: Path, plan: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The sampler's arguments, of the file and of what replaces it, and its restriction; checked.

    Of the file too: where the store goes, if it says so.
    """
    arguments = _mapping(path, "sampler", plan["sampler"], "name to value")
    parameters = inspect.signature(_sample()).parameters
    _refuse_unknown(path, "sampler", arguments, set(parameters) - NOT_IN_FILE)
    if "output" in plan:
        with _named(f"{path}, output"):
            arguments["output_path"] = local_path(plan["output"], start=path.parent)
    arguments |= {"restriction": _restriction(path, plan), **overrides}
    if isinstance(arguments.get("chains"), str):
        chains = parse_numbers("chains", arguments["chains"])
        arguments["chains"] = None if chains == "all" else chains
    for required in ("lr", "n_beta"):
        if required not in arguments:
            raise ValueError(f"{path}: sampler needs {required}")

    settings = _with_defaults(arguments)
    check_execution(_config(arguments), own_loss=False, **_taken_by(check_execution, settings))
    return arguments


def _with_defaults(arguments: Mapping[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(_sample()).parameters
    return {**{name: parameter.default for name, parameter in parameters.items()}, **arguments}


def _config(arguments: Mapping[str, Any]) -> SamplerConfig:
    settings = _with_defaults(arguments)
    rmsprop = merge_rmsprop_aliases(**_taken_by(merge_rmsprop_aliases, settings))
    settings["sampling_method_kwargs"] = rmsprop
    return SamplerConfig(**_taken_by(SamplerConfig, settings))


def _taken_by(function: Callable[..., Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in settings.items() if name in parameters}


def _restriction(path: Path, plan: Mapping[str, Any]) -> str | list[str] | None:
    given = plan.get("restriction")
    parts = given if isinstance(given, list) else [] if given is None else [given]
    if not all(isinstance(part, str) for part in parts):
        raise ValueError(f"{path}: restriction must be one such as l0h1, or a list; got {given!r}")
    return given


@dataclass(frozen=True)
class _Source:
    """A data set that a file names, and which is there."""

    label: str
    path: Path
    options: dict[str, Any]

    def load(self, tokenizer: str) -> Any:
        with _named(self.label):
            return load_tokens(self.path, tokenizer, **self.options)


def _sources(
    path: Path, plan: Mapping[str, Any]
) -> tuple[_Source, dict[str, tuple[_Source, int | None]]]:
    """The sampling data; and the observables, each with the batches that a draw takes of it."""
    dataset, _ = _source(path, "dataset", plan["dataset"])
    given = _mapping(path, "observables", plan.get("observables", {}), "name to path")
    return dataset, {obs: _source(path, f"observables.{obs}", of) for obs, of in given.items()}


def _loaded(sources: Mapping[str, tuple[_Source, int | None]], tokenizer: str) -> dict[str, Any]:
    """Load observables as ``sample`` takes them."""
    return {
        name: source.load(tokenizer) if batches is None else (source.load(tokenizer), batches)
        for name, (source, batches) in sources.items()
    }


def _source(config: Path, where: str, given: Any) -> tuple[_Source, int | None]:
    if not isinstance(given, str | Mapping):
        raise ValueError(
            f"{config}: {where} must be a path, or a mapping with 'path'; got {given!r}"
        )
    options: dict[str, Any] = {"path": given} if isinstance(given, str) else dict(given)
    _refuse_unknown(config, where, options, set(DATA_KEYS))
    options = {name: value for name, value in options.items() if value is not None}
    if "path" not in options:
        raise ValueError(f"{config}: {where} needs a path")
    with _named(f"{config}, {where if isinstance(given, str) else f'{where}.path'}"):
        path = local_path(options.pop("path"), "a data set", start=config.parent)
        require_data(path)
    for name, value in options.items():
        kind, wanted = DATA_KEYS[name]
        if type(value) is not kind or (kind is int and value < 1):  # a bool is no whole number
            raise ValueError(f"{config}: {where}.{name} must be {wanted}; got {value!r}")
    batches = options.pop("batches_per_draw", None)
    return _Source(f"{config}, {where}", path, options), batches


def _load_model(path: Path, plan: Mapping[str, Any]) -> tuple[str, Any]:
    """The model, and the name that its tokenizer has too."""
    given = plan["model"]
    if not isinstance(given, str) or not given:
        raise ValueError(f"{path}: model must be a directory or a name; got {given!r}")
    local = path.parent / Path(given).expanduser()  # next to the file, or else on the hub
    name = str(local) if local.exists() else given
    with _named(str(path)):
        return name, load_model(name, plan.get("dtype", "float32"))


def _mapping(config: Path, where: str, given: Any, of: str) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        got = "a list" if isinstance(given, list) else repr(given)
        raise ValueError(f"{config}: {where} must be a mapping of {of}; got {got}")
    if wrong := [name for name in given if not isinstance(name, str)]:
        raise ValueError(f"{config}: {where} has the name {wrong[0]!r}, no text: put it in quotes")
    return dict(given)


def _refuse_unknown(path: Path, where: str, given: Mapping[Any, Any], known: set[str]) -> None:
    unknown = sorted(str(name) for name in given if name not in known)
    if unknown:
        valid = sorted(known)
        near = [n for name in unknown for n in difflib.get_close_matches(name, valid, n=1)]
        meant = f": did you mean {', '.join(near)}?" if near else "."
        raise ValueError(
            f"{path}: {where} has unknown {', '.join(unknown)}{meant} It takes {', '.join(valid)}"
        )


@contextmanager
def _named(label: str) -> Iterator[None]:
    """Say in an error which part of a file it is about."""
    kinds = (FileNotFoundError, ValueError, TypeError)  # some that derive from them take no text
    try:
        yield
    except kinds as error:
        kind = next(kind for kind in kinds if isinstance(error, kind))
        raise kind(f"{label}: {error}") from error
