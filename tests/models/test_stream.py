"""Which modules read and write the stream: the same for any weights, in any precision."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from basinscope.models.stream import stream_of
from basinscope.models.structure import layer_modules
from tests.models.models_tiny import CONFIGS, tiny
from tests.models.test_structure import GROUPED, hugging_face

HALF = [torch.bfloat16, torch.float16]


def without_weights(model: nn.Module) -> nn.Module:
    """A copy whose layers have nothing but zeros: projections, experts, norms."""
    empty = copy.deepcopy(model)
    with torch.no_grad():
        for name in layer_modules(empty):
            for parameter in empty.get_submodule(name).parameters():
                parameter.zero_()
    return empty


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_found_does_not_depend_on_weights(name: str) -> None:
    model = tiny(name)
    found = stream_of(model)
    assert all(layer.attention_writes and layer.mlp_writes for layer in found)
    assert found[0].scale == (0.22 if name == "granite" else 1)
    assert stream_of(without_weights(model)) == found


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ["gpt2", "granite", "mixtral", "olmo2"])
def test_what_is_found_does_not_depend_on_precision(name: str, dtype: torch.dtype) -> None:
    model = tiny(name)
    found = stream_of(model)
    assert stream_of(copy.deepcopy(model).to(dtype)) == found
    assert stream_of(without_weights(model).to(dtype)) == found


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_a_norm_over_the_stream_is_not_taken_for_what_is_added(dtype: torch.dtype) -> None:
    for layer in stream_of(tiny("opt", do_layer_norm_before=False).to(dtype)):
        assert layer.attention_writes is None
        assert layer.mlp_writes is None


def test_factors_of_a_layers_own_are_looked_at_again() -> None:
    """They are in no module, so that what a layer adds depends on them."""
    settings = {**GROUPED, "keep_window_size": 16}
    model = hugging_face("doge", settings)
    factors: Any = [p for name, p in model.named_parameters() if name.endswith("_residual")]
    with torch.no_grad():
        for factor in factors:
            factor.fill_(1)
    assert all(layer.attention_writes and layer.mlp_writes for layer in stream_of(model))
    factors[0].data[0] = 2  # unseen by the counter of changes
    first, second = stream_of(model)
    assert first.attention_writes is None
    assert second.attention_writes is not None


def test_a_module_that_layers_share_makes_up_the_same_for_all() -> None:
    model = tiny("llama")
    layers: Any = model.get_submodule("model.layers")
    layers[1].mlp = layers[0].mlp
    assert stream_of(model)[0].attention_writes == "model.layers.0.self_attn.o_proj"
    assert stream_of(model)[0].mlp_writes == "model.layers.0.mlp.down_proj"
