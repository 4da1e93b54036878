"""What a run is known by: the model, what moves of it, the loss and the tokens, as hashes.

A store is continued, or given back, only to a call whose description is the same.
"""

from __future__ import annotations

import dis
import functools
import hashlib
import inspect
import json
import os
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from basinscope.models.forward import inside_bridge, is_hugging_face
from basinscope.models.structure import used_parameters

# of a configuration: where it came from, and what changes no logit
NO_IDENTITY = {
    *("transformers_version", "name_or_path", "architectures"),  # the class has a field of its own
    *("torch_dtype", "dtype", "use_cache"),
}
PLAIN = bool | int | float | complex | str | bytes | np.generic | torch.dtype | torch.device
LIBRARIES = {"basinscope", "numpy", "torch", "transformers"}  # wherever they are
STANDARD_LIBRARY = os.path.realpath(sysconfig.get_path("stdlib"))


def describe_model(model: nn.Module) -> dict[str, Any]:
    """Identify a checkpoint: class, size, a hash of all weights and buffers, and its configuration.

    Weights of the same shapes can belong to models with another number of heads; so a Hugging Face
    model's configuration counts too.
    """
    digest = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(_bytes(tensor))
    return {
        "class": type(model).__name__,
        "parameters": sum(p.numel() for p in used_parameters(model).values()),
        "dtypes": sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()}),
        "sha256": digest.hexdigest(),
        "config_sha256": _config_digest(model),
    }


def describe_masks(model: nn.Module, masks: Mapping[str, Tensor | None]) -> dict[str, Any]:
    """Identify a restriction: how much moves, and a hash of names and masks."""
    digest = hashlib.sha256()
    for name in sorted(masks):
        mask = masks[name]
        digest.update(name.encode())
        digest.update(b"all" if mask is None else _bytes(mask))
    return {
        "parameters": len(masks),
        "elements": moved_elements(model, masks),
        "sha256": digest.hexdigest(),
    }


def moved_elements(model: nn.Module, masks: Mapping[str, Tensor | None]) -> int:
    """Count the weights that move."""
    parameters = dict(model.named_parameters())
    return sum(
        parameters[name].numel() if mask is None else int(mask.count_nonzero())
        for name, mask in masks.items()
    )


def describe_function(function: Callable[..., Any]) -> str:
    """Identify a caller's function: its name, and a hash of its code and of what is fixed with it.

    Arguments of a ``partial``, defaults, what a function closes over and what it reads of its
    module count, and so do functions of the user's that it calls, from whatever file. Functions of
    libraries count by their names. Lists, dicts, the attributes of an object and globals that the
    function assigns itself do not count, for they may be where it keeps notes. Its bytecode counts,
    so another version of Python makes it another; line numbers do not.
    """
    digest = hashlib.sha256()
    for part in _all_parts(function):
        digest.update(len(part).to_bytes(8, "big"))  # else 1 and 23 would be 12 and 3
        digest.update(part)
    return f"{_qualified_name(function)} {digest.hexdigest()[:16]}"


def digest_of(*arrays: np.ndarray) -> str:
    """Hash arrays, with their shapes."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(repr(array.shape).encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _config_digest(model: nn.Module) -> str | None:
    model = inside_bridge(model)
    if not is_hugging_face(model):
        return None
    settings = {
        key: value
        for key, value in model.config.to_dict().items()  # type: ignore[union-attr,operator]
        if not key.startswith("_") and key not in NO_IDENTITY
    }
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _all_parts(function: Callable[..., Any]) -> Iterator[bytes]:
    """What makes a function what it is, and then each function that it leads to, once."""
    met: list[types.FunctionType] = []
    yield from _parts(function, met)
    for one in met:  # grows on the way, so that a long way needs no deep stack
        yield from _parts_of_function(one, met)


def _parts(value: Any, met: list[types.FunctionType]) -> Iterator[bytes]:
    """What makes something that a function holds what it is; a function by its place in `met`."""
    if value is None or isinstance(value, PLAIN):
        yield repr(value).encode()
        return
    yield type(value).__name__.encode()
    if isinstance(value, functools.partial):
        yield from _parts((value.func, value.args, *sorted(value.keywords.items())), met)
    elif isinstance(value, types.MethodType):
        yield from _parts((value.__func__, value.__self__), met)
    elif isinstance(value, types.FunctionType):
        if value not in met:
            met.append(value)
        yield str(met.index(value)).encode()
    elif isinstance(value, types.CodeType):
        yield value.co_code
        yield from _parts((value.co_consts, value.co_names), met)
    elif isinstance(value, tuple):
        yield str(len(value)).encode()
        for item in value:
            yield from _parts(item, met)
    elif isinstance(value, frozenset):
        yield from _parts(tuple(sorted(value, key=repr)), met)
    elif isinstance(value, nn.Module):
        yield describe_model(value)["sha256"].encode()
    elif isinstance(value, Tensor):
        yield from (f"{value.dtype} {tuple(value.shape)}".encode(), bytes(_bytes(value)))
    elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
        yield from (f"{value.dtype.str} {value.shape}".encode(), value.tobytes())
    elif isinstance(value, types.ModuleType):
        yield value.__name__.encode()
    else:
        yield _qualified_name(value).encode()
        called = type(value).__call__ if callable(value) and not isinstance(value, type) else None
        if isinstance(called, types.FunctionType):  # of builtin functions it is none
            yield from _parts(called, met)


def _parts_of_function(
    function: types.FunctionType, met: list[types.FunctionType]
) -> Iterator[bytes]:
    """Its code, its defaults, what it closes over, and what it reads of modules."""
    held = [function.__code__, function.__defaults__]
    held += sorted((function.__kwdefaults__ or {}).items())
    held += [cell.cell_contents for cell in function.__closure__ or ()]
    for name, found in _globals_read(function).items():
        foreign = isinstance(found, types.FunctionType) and not (
            found.__module__ == function.__module__ or _is_users_function(found)
        )
        held.append((name, _qualified_name(found) if foreign else found))
    yield from _parts(tuple(held), met)


def _globals_read(function: types.FunctionType) -> dict[str, Any]:
    """What its code, and the code inside it, reads of its module, and of the user's modules there.

    Read from the bytecode, which tells a global from an attribute of the same name.
    """
    found: dict[str, Any] = {}
    assigned = set()
    for code in _codes(function.__code__):
        name, value = "", None
        for step in dis.get_instructions(code):
            if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                name, value = step.argval, function.__globals__.get(step.argval)
                found[name] = value
            elif step.opname in ("LOAD_ATTR", "LOAD_METHOD") and _is_users_module(value):
                name, value = f"{name}.{step.argval}", getattr(value, step.argval, None)
                found[name] = value
            elif step.opname != "EXTENDED_ARG":
                value = None
            if step.opname == "STORE_GLOBAL":
                assigned.add(step.argval)
    return {name: value for name, value in found.items() if name not in assigned}


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """A function's code, and that of lambdas, comprehensions and functions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _is_users_module(value: Any) -> bool:
    if not isinstance(value, types.ModuleType):
        return False
    places = [getattr(value, "__file__", None), *getattr(value, "__path__", [])]
    file = next((place for place in places if place), "")
    return not _is_library(value.__name__, file)


def _is_users_function(function: types.FunctionType) -> bool:
    """Whether it, or what a library's decorator has wrapped, is of no library."""
    return any(
        isinstance(one, types.FunctionType)
        and not _is_library(str(one.__globals__.get("__name__")), one.__code__.co_filename)
        for one in (function, inspect.unwrap(function))
    )


def _is_library(name: str, file: str) -> bool:
    """Whether a module is Python's own or was installed."""
    return (
        name in sys.builtin_module_names
        or name.partition(".")[0] in LIBRARIES
        or file.startswith("<frozen")
        or not {"site-packages", "dist-packages"}.isdisjoint(Path(file).parts)
        or Path(os.path.realpath(file)).is_relative_to(STANDARD_LIBRARY)
    )


def _qualified_name(value: Any) -> str:
    kind = value if hasattr(value, "__qualname__") else type(value)
    return f"{getattr(kind, '__module__', None)}.{kind.__qualname__}"


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data
