"""From token ids to logits, whatever the model is."""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

SPARE_POSITIONS = 8  # most rows of a table of positions beyond the longest sequence (OPT has two)


def token_logits(model: nn.Module, input_ids: Tensor) -> Tensor:
    """Run a model and return its logits.

    Parameters
    ----------
    model : nn.Module
        A Hugging Face causal LM, a TransformerLens model, or any module that maps ids to logits or
        to an object with ``.logits``.
    input_ids : Tensor (batch, token)

    Returns
    -------
    Tensor (batch, token, vocabulary)

    Raises
    ------
    TypeError
        If the model returns neither a tensor nor an object with ``.logits``.
    """
    if is_transformer_lens(model):
        output = model(input_ids, return_type="logits")
    elif is_hugging_face(model):
        with _one_sequence_per_row(model):
            output = model(input_ids, use_cache=False, return_dict=True)
        if not hasattr(output, "logits"):  # a base model, or a forward of one's own
            output = output[0]
    else:
        output = model(input_ids)
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"{type(model).__name__} returned {type(output).__name__}: the model must map "
            "input_ids (batch, token) to a logits tensor or to an object with .logits; or pass "
            "loss_fn(model, input_ids) -> (batch, token - 1)"
        )
    return logits


@contextmanager
def _one_sequence_per_row(model: nn.Module) -> Iterator[None]:
    """Keep transformers from reading positions back, where they are those that all rows share.

    It looks for rows in which several sequences are packed: in every forward pass it would wait for
    a GPU, and a pass that a CUDA graph records would get a mask, and with it other kernels. A class
    that is not of transformers may give positions of its own, packed in all rows alike: looked for.
    """
    of_transformers = type(model).__module__.startswith("transformers.")
    masking: Any = sys.modules.get("transformers.masking_utils")
    look = getattr(masking, "find_packed_sequence_indices", None)
    if look is not None and not hasattr(look, "looks_by"):
        masking.find_packed_sequence_indices = _look_if_needed(look)
    before = getattr(_thread, "rows_are_whole", False)
    _thread.rows_are_whole = of_transformers
    try:
        yield
    finally:
        _thread.rows_are_whole = before


_thread = threading.local()


def _look_if_needed(look: Callable[[Tensor], Tensor | None]) -> Callable[[Tensor], Tensor | None]:
    def find(position_ids: Tensor) -> Tensor | None:
        shared = position_ids.stride(0) == 0  # one row of them, expanded: no ids decide them
        if shared and getattr(_thread, "rows_are_whole", False):
            return None
        return look(position_ids)

    find.looks_by = look  # type: ignore[attr-defined]
    return find


def inside_bridge(model: nn.Module) -> nn.Module:
    """Give the model that a TransformerLens ``TransformerBridge`` goes around.

    It is a Hugging Face model with the bridge's hooks in place of its modules; names of its
    parameters and modules are good for the bridge too. Any other model is given back.
    """
    model = uncompiled(model)
    inside = vars(model).get("original_model")
    return inside if isinstance(inside, nn.Module) and is_transformer_lens(model) else model


def uncompiled(model: nn.Module) -> nn.Module:
    """Give the module that ``torch.compile`` wrapped; its parameters have other names there.

    Any other model is given back. One that was compiled in place (``model.compile()``) is itself,
    and a copy of it is not compiled.
    """
    inside = vars(model).get("_modules", {}).get("_orig_mod")
    return model if inside is None else inside


def is_transformer_lens(model: nn.Module) -> bool:
    """Whether a model looks like a ``HookedTransformer`` or ``TransformerBridge``."""
    if not hasattr(getattr(model, "cfg", None), "n_heads"):
        return False
    return "return_type" in inspect.signature(model.forward).parameters


def is_hugging_face(model: nn.Module) -> bool:
    """Whether a model is a Hugging Face ``PreTrainedModel`` (without importing transformers)."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def vocabulary_size(model: nn.Module) -> int | None:
    """Count the ids that the model's embedding takes; None where it cannot be told."""
    model = inside_bridge(model)
    if is_transformer_lens(model):
        return int(model.cfg.d_vocab)  # type: ignore[union-attr,arg-type]
    if is_hugging_face(model):
        return int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    return embeddings[0].num_embeddings if len(embeddings) == 1 else None


def max_sequence_length(model: nn.Module) -> int | None:
    """Give the longest sequence for which a model has positions; None where no table limits it."""
    model = inside_bridge(model)
    if is_transformer_lens(model):
        return int(model.cfg.n_ctx)  # type: ignore[union-attr,arg-type]
    limit = trained_length(model)
    if limit is None:
        return None
    tokens = model.get_input_embeddings() if is_hugging_face(model) else None  # type: ignore[operator]
    learned = [
        module.num_embeddings
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module is not tokens
    ]
    fixed = [len(buffer) for buffer in model.buffers() if buffer.ndim == 2]
    has_table = limit in fixed or any(0 <= rows - limit <= SPARE_POSITIONS for rows in learned)
    return limit if has_table else None


def trained_length(model: nn.Module) -> int | None:
    """Give the sequence length that a model's configuration names, if it names one."""
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return int(limit) if isinstance(limit, int) and limit > 0 else None


def first_name(model: nn.Module, name: str) -> str | None:
    """Give the name by which ``named_parameters`` lists a tied parameter; None for no parameter."""
    found = dict(model.named_parameters(remove_duplicate=False)).get(name)
    return next((own for own, p in model.named_parameters() if p is found), None)


def to_device(model: nn.Module, device: torch.device) -> nn.Module:
    """Move a model, quietly (TransformerLens prints otherwise).

    By its class's method: one that was put on the model itself (accelerate does) may belong to the
    model that this one is a copy of.
    """
    quietly = {"print_details": False} if is_transformer_lens(model) else {}
    moved: nn.Module = type(model).to(model, device, **quietly)  # type: ignore[call-overload]
    return moved


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module do something else for a while; set past its ``__setattr__``, which some have."""
    own = vars(module)
    kept = own.get("forward")
    own["forward"] = forward
    try:
        yield
    finally:
        if kept is None:
            del own["forward"]  # falls back to its class's
        else:
            own["forward"] = kept


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Have a model in evaluation mode inside the block, and every module as it was after it.

    Modules that were compiled in place run as they are written meanwhile: compiled ones are
    compiled anew for every hook.
    """
    training = [module for module in model.modules() if module.training]
    compiled = {m: m._compiled_call_impl for m in model.modules() if m._compiled_call_impl}
    if training:
        model.eval()
    for module in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for module, call in compiled.items():
            module._compiled_call_impl = call
