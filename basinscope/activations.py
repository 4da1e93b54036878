"""Activations where torch is needed: tensors of a stored run, and runs that easyroutine saved.

The store itself (:mod:`basinscope.io.activations`) never imports torch, so that it opens without.
"""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import xarray as xr

from basinscope.io import activations
from basinscope.io.activation_store import ActivationWriter, open_activations
from basinscope.io.activations import OF_A_RUN, ActivationSaver
from basinscope.io.location import local_path

if TYPE_CHECKING:
    import torch

__all__ = [
    "ActivationLoader",
    "ActivationSaver",
    "ActivationWriter",
    "QueryResult",
    "as_tensors",
    "import_easyroutine",
    "open_activations",
]

SOURCE = "imported_from"
HEADS_AXIS = {"attn_pattern": 1, "head_out": 2, "queries": 2}
RENAMED = {"pattern": "attn_pattern", "head_queries": "queries"}


class QueryResult(activations.QueryResult):
    __doc__ = activations.QueryResult.__doc__

    @overload
    def load(
        self, identifier: int | str = -1, *, torch: Literal[False] = False
    ) -> tuple[xr.DataTree, dict[str, Any]]: ...

    @overload
    def load(
        self, identifier: int | str = -1, *, torch: Literal[True]
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any]]: ...

    def load(self, identifier: int | str = -1, *, torch: bool = False) -> tuple[Any, Any]:
        """Open a run lazily, or read it into tensors.

        Parameters
        ----------
        identifier : int or str
            Its number as printed; -1 is the latest. Or the name of its directory, a time.
        torch : bool
            Give a dict of name to tensor, as :func:`as_tensors`.

        Returns
        -------
        xr.DataTree or dict of str to torch.Tensor
        dict
            Its metadata.

        Raises
        ------
        IndexError, KeyError
            If there is no such run here; says which there are.
        ValueError
            If the run is not whole, or the time is that of several.
        """
        tree, metadata = super().load(identifier)
        return (as_tensors(tree) if torch else tree), metadata


class ActivationLoader(activations.ActivationLoader):
    __doc__ = activations.ActivationLoader.__doc__

    results = QueryResult


def as_tensors(
    arrays: xr.DataTree | xr.Dataset,
    names: Iterable[str] | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, torch.Tensor]:
    """Read arrays of a stored run into tensors.

    Parameters
    ----------
    arrays : xr.DataTree or xr.Dataset
        As :meth:`QueryResult.load` or :func:`open_activations` gives it, or a selection of it.
    names : iterable of str, optional
        Default: all arrays.
    device : torch.device or str

    Returns
    -------
    dict of str to torch.Tensor
        What was bfloat16 is bfloat16 again, bit for bit.

    Raises
    ------
    KeyError
        If there is no array of a name.
    """
    import torch

    wanted = list(map(str, arrays.data_vars)) if names is None else list(names)
    unknown = [name for name in wanted if name not in arrays.data_vars]
    if unknown:
        there = ", ".join(map(str, arrays.data_vars))
        raise KeyError(f"no activations {', '.join(unknown)}; there are {there}")
    tensors = {}
    for name in wanted:
        values = arrays[name]
        source = values.attrs.get("source_dtype")
        dtype = torch.bfloat16 if source == "bfloat16" else None
        read = values.to_numpy()
        if values.chunks is None or not read.flags.writeable:  # not ours alone
            read = read.copy()
        tensors[name] = torch.from_numpy(read).to(device=device, dtype=dtype)
    return tensors


def import_easyroutine(
    source: str | os.PathLike[str], base_dir: str | os.PathLike[str]
) -> list[Path]:
    """Bring runs that easyroutine's ActivationSaver wrote into a base directory of ours.

    The files are only read, and without running what a pickle may hold. What was imported before
    is left alone, so the same call continues a stopped one. Arrays get our names where there is
    one: ``pattern_L0H1`` becomes a head of ``attn_pattern_0`` (``attn_pattern_L0H1`` where not all
    heads are there), ``head_queries_L0H1`` one of ``queries_0``; others keep theirs. What is no
    tensor becomes metadata, under ``easyroutine``. Times are taken as they stand, as UTC.

    Two kinds are not what their names say in easyroutine 1.1.5. Its ``resid_mid_0`` is what the
    norm before the MLP gives, and becomes ``mlp_in_0``. Its ``head_keys_L0H1`` and
    ``head_values_L0H1`` are those of head 0, whichever head they are named after; they keep their
    names, so that nothing takes them for our ``keys_0`` and ``values_0``.

    Parameters
    ----------
    source : path
        A run's directory (``tensor.pt`` and ``metadata.json``), or one with runs below it.
    base_dir : path

    Returns
    -------
    list of Path
        Our directories of all runs of ``source``.

    Raises
    ------
    FileNotFoundError
        If there is no run.
    ValueError
        If runs could not be imported, once all others are; says why, and what to do.
    """
    base_dir = local_path(base_dir, "a base directory")
    folder = local_path(source, "runs of easyroutine").resolve()
    runs = sorted(file.parent for file in folder.rglob("tensor.pt"))
    if not runs:
        raise FileNotFoundError(f"there is no tensor.pt in {source}, or in a directory below it")
    paths, problems = [], []
    for run in runs:
        try:
            paths.append(_import_run(run, base_dir))
        except (ValueError, TypeError, OSError) as error:
            problems.append(f"  {run}: {error}")
    if problems:
        raise ValueError(
            f"{len(problems)} of {len(runs)} runs could not be imported:\n" + "\n".join(problems)
        )
    return paths


def _import_run(run: Path, base_dir: Path) -> Path:
    metadata = json.loads((run / "metadata.json").read_text())
    if not isinstance(metadata, dict):
        raise ValueError(f"metadata.json holds a {type(metadata).__name__}, not fields")
    experiment = metadata.get("experiment_name") or run.parents[1].name
    if (base_dir / experiment).is_dir():
        known = ActivationLoader(base_dir, experiment).query(custom_keys={SOURCE: str(run)})
        if known:
            return known[-1].path
    loaded = _load_weights(run / "tensor.pt")
    cache = loaded.state.get("cache", {}) if isinstance(loaded, _OldObject) else loaded
    if not isinstance(cache, Mapping):
        cache = {"activations": cache}
    tensors, rest = _converted({k: v for k, v in cache.items() if k != "metadata"})
    others = {name: value for name, value in metadata.items() if name not in OF_A_RUN}
    return ActivationSaver(base_dir, experiment).save(
        tensors,
        metadata.get("model_name") or run.parent.name,
        metadata.get("target_token_positions"),
        metadata.get("interventions"),
        metadata.get("extraction_config"),
        other_metadata={**others, SOURCE: str(run), "easyroutine": rest},
        tag=metadata.get("tag"),
        save_time=_save_time(metadata, run),
    )


def _save_time(metadata: Mapping[str, Any], run: Path) -> datetime:
    try:
        return datetime.fromisoformat(metadata["save_time"])
    except (KeyError, TypeError, ValueError):
        return datetime.fromtimestamp((run / "tensor.pt").stat().st_mtime, UTC)


class _OldObject:
    """What stands in for a class of easyroutine: keeps the state, and does nothing."""

    state: Mapping[str, Any]

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple):  # of a class with slots
            state = {name: value for part in state if part for name, value in part.items()}
        self.state = state

    def to_dict(self) -> dict[str, Any]:
        return dict(self.state)


def _no_pattern(*_: object) -> None:
    """Stand in for the function that makes regular expressions, which a cache holds some of."""


_STAND_INS: list[Any] = [
    (_no_pattern, "re._compile"),
    *(
        (_OldObject, f"easyroutine.interpretability.{name}")
        for name in (
            "activation_cache.ActivationCache",
            "activation_cache.ValueWithInfo",
            "hooked_model.ExtractionConfig",
            "interventions.Intervention",
        )
    ),
]


def _load_weights(file: Path) -> Any:
    import torch

    try:
        with torch.serialization.safe_globals(_STAND_INS):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(
            f"{file.name} holds {found[1] if found else 'something'} beside tensors, which may run "
            "code when it is read, and is refused. Where you trust it and its library is "
            "installed, load it there with torch.load(..., weights_only=False), and save a plain "
            "dict of its tensors with torch.save in its place"
        ) from error
    except (RuntimeError, EOFError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0] or "it ends too early"
        raise ValueError(f"{file.name} is damaged ({reason}): restore it from a copy") from error


def _converted(cache: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Give an old cache's tensors by our names, and what is no tensor."""
    tensors: dict[str, torch.Tensor] = {}
    rest: dict[str, Any] = {}
    for name, value in cache.items():
        found = _tensors_in(_our_name(name), value)
        if found:
            tensors |= found
        else:
            rest[name] = value
    return _stacked(tensors), rest


def _tensors_in(name: str, value: Any) -> dict[str, torch.Tensor]:
    """Name the tensors that a value is or holds; none if it holds anything else."""
    import torch

    if isinstance(value, _OldObject):
        value = value.state.get("_value")
    if isinstance(value, torch.Tensor):
        return {name: value}
    if isinstance(value, Mapping):
        parts = {f"{name}_{key}": part for key, part in value.items()}
    elif isinstance(value, list | tuple):
        parts = {f"{name}_{number}": part for number, part in enumerate(value)}
    else:
        return {}
    if not all(isinstance(part, torch.Tensor) for part in parts.values()):
        return {}
    shapes = {(part.ndim, part.shape[1:]) for part in parts.values()}
    if isinstance(value, list) and len(shapes) == 1 and value[0].ndim:  # one for each batch
        return {name: torch.cat(value)}
    return parts


def _our_name(name: str) -> str:
    match = re.fullmatch(r"(\w+)(_L\d+H\d+)", name)
    if match and match[1] in RENAMED:
        return RENAMED[match[1]] + match[2]
    if match := re.fullmatch(r"resid_mid_(\d+)", name):
        return f"mlp_in_{match[1]}"
    return "embed" if name == "input_embeddings" else name


def _stacked(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Put heads together where every layer has all of them."""
    import torch

    heads: dict[str, dict[int, dict[int, str]]] = {}
    for name in tensors:
        match = re.fullmatch(r"(\w+)_L(\d+)H(\d+)", name)
        if match and match[1] in HEADS_AXIS:
            heads.setdefault(match[1], {}).setdefault(int(match[2]), {})[int(match[3])] = name
    found = dict(tensors)
    for kind, layers in heads.items():
        counts = {tuple(sorted(of)) for of in layers.values()}
        shapes = {tensors[name].shape for of in layers.values() for name in of.values()}
        whole = len(counts) == 1 and counts == {tuple(range(len(next(iter(counts)))))}
        if whole and len(shapes) == 1 and len(next(iter(shapes))) == 3:
            for layer, of in layers.items():
                parts = [found.pop(of[head]) for head in sorted(of)]
                found[f"{kind}_{layer}"] = torch.stack(parts, dim=HEADS_AXIS[kind])
    return found
