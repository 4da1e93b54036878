"""Names of linear maps: each role is found in the module, and in the rows, that play it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from basinscope.models.canonical import LinearMap, canonical_maps, weight_of
from basinscope.models.structure import UnknownStructureError
from tests.models.test_structure import CODEGEN, GROUPED, SPECIAL, VOCABULARY, built
from tests.models_small import RawModel, tiny_model

ATTENTION = ("attn.q", "attn.k", "attn.v", "attn.o")
PLAIN, GATED = ("mlp.up", "mlp.down"), ("glu.gate", "glu.up", "glu.down")

# 4 heads of 8, of which grouped models have 2 for keys and values
SEPARATE = ("q_proj", "k_proj", "v_proj")
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", GROUPED),
    "phi": ("phi", GROUPED),
    "gemma2": ("gemma2", {**GROUPED, "head_dim": 8}),
    "mistral, sliding": ("mistral", {**GROUPED, "sliding_window": 4}),
    "gptj": ("gptj", {**CODEGEN, **SPECIAL}),
    "llama, relu": ("llama", {**GROUPED, "hidden_act": "relu"}),
    "phi3, relu": ("phi3", {**GROUPED, "hidden_act": "relu"}),
}
SEPARATE_MODELS = [
    "llama", "llama, one key head", "llama, one head", "qwen2", "qwen3, wide heads", "gemma2",
    "olmo2, norm over heads", "mistral, sliding", "phi", "gptj", "opt", "llama, relu",
]  # fmt: skip
FUSED = {
    "gpt2, one after the other": ("c_attn", "blocks", 4, 4),
    "gpt_neox, interleaved": ("query_key_value", "per head", 4, 4),
    "bloom": ("query_key_value", "per head", 4, 4),
    "phi3, fused": ("qkv_proj", "blocks", 4, 2),
    "falcon, multi-query": ("query_key_value", "blocks", 4, 1),
    "falcon, new": ("query_key_value", "per group", 4, 2),
    "gpt_bigcode, multi-query": ("c_attn", "blocks", 4, 1),
}


@pytest.mark.parametrize("kind", SEPARATE_MODELS)
def test_separate_projections_are_what_their_names_say(kind: str) -> None:
    maps = canonical_maps(made(kind))
    gated = any("glu" in name for name in maps)
    roles = (*ATTENTION, *(GATED if gated else PLAIN))
    assert list(maps) == [f"{layer}.{role}" for layer in range(2) for role in roles]
    for name, linear in maps.items():
        leaf = linear.module.rpartition(".")[2]
        assert f".{name[0]}." in linear.module
        assert linear.rows is None
        role = name.partition(".")[2]
        if role in ATTENTION[:3]:
            assert leaf == f"{role[-1]}_proj"
        elif gated and role in GATED:
            assert leaf == f"{role.rpartition('.')[2]}_proj"


@pytest.mark.parametrize("kind", FUSED)
def test_rows_of_fused_projections(kind: str) -> None:
    """8 rows a head: all queries before keys and values, or these in turn for each head, or for
    each group of query heads."""
    leaf, layout, heads, groups = FUSED[kind]
    kinds = {
        "blocks": "q" * heads + "k" * groups + "v" * groups,
        "per head": "qkv" * heads,
        "per group": ("q" * (heads // groups) + "kv") * groups,
    }[layout]
    rows = np.repeat(list(kinds), 8)
    maps = canonical_maps(made(kind))
    for layer in range(2):
        for role in "qkv":
            found = maps[f"{layer}.attn.{role}"]
            assert found.module.endswith(leaf)
            assert found.rows is not None
            assert found.rows.tolist() == np.flatnonzero(rows == role).tolist()
        assert maps[f"{layer}.attn.o"].rows is None


def test_rows_of_a_fused_gate() -> None:
    maps = canonical_maps(made("phi3, fused"))
    assert maps["0.glu.gate"].module == maps["0.glu.up"].module == "model.layers.0.mlp.gate_up_proj"
    assert maps["1.glu.gate"].rows.tolist() == list(range(24))  # type: ignore[union-attr]
    assert maps["1.glu.up"].rows.tolist() == list(range(24, 48))  # type: ignore[union-attr]


def test_a_gate_is_the_one_that_bends_whatever_it_is_called() -> None:
    model = made("llama")
    for layer in model.model.layers:
        swap(layer.mlp)
    maps = canonical_maps(model)
    assert maps["0.glu.gate"].module.endswith("up_proj")
    assert maps["0.glu.up"].module.endswith("gate_proj")


def test_interleaved_gate_rows_are_found() -> None:
    model = made("phi3, fused")
    for layer in model.model.layers:
        layer.mlp.forward = lambda x, mlp=layer.mlp: mlp.down_proj(pairs(mlp, x))
    maps = canonical_maps(model)
    assert maps["0.glu.gate"].rows.tolist() == list(range(0, 48, 2))  # type: ignore[union-attr]
    assert maps["0.glu.up"].rows.tolist() == list(range(1, 48, 2))  # type: ignore[union-attr]


def test_a_fused_gate_that_cannot_be_told_has_no_name() -> None:
    maps = canonical_maps(made("phi3, relu"))
    assert list(maps)[:4] == [f"0.{role}" for role in ATTENTION]
    assert not any("glu" in name for name in maps)


def test_weights_of_fused_and_transposed_modules() -> None:
    model = made("gpt2, one after the other")
    maps = canonical_maps(model)
    attention = model.transformer.h[1].attn.c_attn
    assert torch.equal(weight_of(model, maps["1.attn.k"]), attention.weight[:, 32:64].T)
    assert torch.equal(
        weight_of(model, maps["1.attn.o"]), model.transformer.h[1].attn.c_proj.weight.T
    )
    assert maps["1.attn.o"] == LinearMap("transformer.h.1.attn.c_proj", None, True)


def test_what_has_no_role_has_no_name() -> None:
    experts = canonical_maps(made("mixtral"))
    assert list(experts) == [f"{layer}.{role}" for layer in range(2) for role in ATTENTION]
    sinks = canonical_maps(made("gpt_oss, sinks"))
    assert list(sinks) == ["0.attn.o", "1.attn.o"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_names_do_not_depend_on_the_dtype(dtype: torch.dtype) -> None:
    for kind in ("gpt2", "gpt_neox", "llama"):
        plain, other = canonical_maps(tiny_model(kind)), canonical_maps(tiny_model(kind).to(dtype))
        assert list(plain) == list(other)
        for name, linear in plain.items():
            assert np.array_equal(linear.rows, other[name].rows)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["gpt_neox", "llama", "falcon"])
def test_a_gradient_that_16_bits_cancel_to_zero_hides_no_query(
    kind: str, dtype: torch.dtype
) -> None:
    """Of 2048 query features in 8 layers, some have the gradient 0 at any one position."""
    sizes = {"hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 4}
    config = AutoConfig.for_model(kind, vocab_size=VOCABULARY, intermediate_size=256, **sizes)
    maps = canonical_maps(AutoModelForCausalLM.from_config(config).to(dtype))
    assert {f"{layer}.{role}" for layer in range(8) for role in ATTENTION} <= maps.keys()


def test_weights_of_zero_are_no_obstacle_and_the_model_is_left_alone() -> None:
    model = made("gpt_neox, interleaved").train()
    for parameter in model.parameters():
        parameter.data.zero_()
    assert len(canonical_maps(model)) == 12
    assert model.training
    assert all(p.grad is None and not p.any() for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_models_without_layers_are_refused() -> None:
    with pytest.raises(UnknownStructureError, match=r"maps of RawModel cannot be named: .*no list"):
        canonical_maps(RawModel())


def made(kind: str) -> Any:
    if kind not in OTHERS:
        return built(kind)
    name, settings = OTHERS[kind]
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, vocab_size=VOCABULARY, **settings)
    return AutoModelForCausalLM.from_config(config).eval()


def swap(mlp: Any) -> None:
    """Let the projections of a gated MLP trade places."""
    mlp.forward = lambda x: mlp.down_proj(mlp.gate_proj(x) * mlp.act_fn(mlp.up_proj(x)))


def pairs(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    both = mlp.gate_up_proj(x)
    return nn.functional.silu(both[..., ::2]) * both[..., 1::2]
