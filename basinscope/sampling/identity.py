"""What a run is known by: the model, what moves of it, the loss and the tokens, as hashes.

A store is continued, or given back, only to a call whose description is the same.
"""

from __future__ import annotations

import functools
import hashlib
import json
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from basinscope.models.forward import inside_bridge, is_hugging_face
from basinscope.models.structure import used_parameters

# of a configuration: where it came from, and what changes no logit
NO_IDENTITY = {"transformers_version", "name_or_path", "torch_dtype", "dtype", "use_cache"}


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

    Arguments of a ``partial``, defaults and what a function closes over count; lists, dicts and
    the attributes of an object do not, for they may be where it keeps notes. Its bytecode counts,
    so another version of Python makes it another; line numbers do not.
    """
    digest = hashlib.sha256()
    for part in _parts(function, set()):
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


def _parts(value: Any, seen: set[int]) -> Iterator[bytes]:
    """What makes a function, or something that it holds, what it is."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        yield repr(value).encode()
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    yield type(value).__name__.encode()
    if isinstance(value, functools.partial):
        yield from _parts((value.func, value.args, *sorted(value.keywords.items())), seen)
    elif isinstance(value, types.MethodType):
        yield from _parts((value.__func__, value.__self__), seen)
    elif isinstance(value, types.FunctionType):
        yield from _parts_of_function(value, seen)
    elif isinstance(value, types.CodeType):
        yield value.co_code
        yield from _parts((value.co_consts, value.co_names), seen)
    elif isinstance(value, tuple):
        for item in value:
            yield from _parts(item, seen)
    elif isinstance(value, nn.Module):
        yield describe_model(value)["sha256"].encode()
    elif isinstance(value, Tensor):
        yield from (str(value.dtype).encode(), bytes(_bytes(value)))
    elif isinstance(value, np.ndarray):
        yield from (value.dtype.str.encode(), np.ascontiguousarray(value).tobytes())
    else:
        yield _qualified_name(value).encode()
        if callable(value) and not isinstance(value, type):
            yield from _parts(type(value).__call__, seen)


def _parts_of_function(function: types.FunctionType, seen: set[int]) -> Iterator[bytes]:
    """Its code, its defaults, what it closes over, and its module's own functions and numbers."""
    held = [function.__code__, function.__defaults__]
    held += sorted((function.__kwdefaults__ or {}).items())
    held += [cell.cell_contents for cell in function.__closure__ or ()]
    for name in function.__code__.co_names:
        found = function.__globals__.get(name)
        own = isinstance(found, types.FunctionType) and found.__module__ == function.__module__
        if own or isinstance(found, bool | int | float | str):
            held.append(found)
    yield from _parts(tuple(held), seen)


def _qualified_name(value: Any) -> str:
    kind = value if hasattr(value, "__qualname__") else type(value)
    return f"{kind.__module__}.{kind.__qualname__}"


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data
