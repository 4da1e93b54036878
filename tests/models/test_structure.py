"""Parts of models: a head's elements move that head and nothing else, and none is forgotten."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from basinscope.models.forward import token_logits
from basinscope.models.restrictions import create_param_masks
from basinscope.models.structure import Layer, UnknownStructureError, find_structure
from tests.models.models_hooked import HEAD_SIZE, HEADS, HookedTransformer
from tests.models.test_head import unchanged
from tests.models_small import HookedStandIn, RawModel

VOCABULARY = 40
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16}
MPT = {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 16}
SPECIAL = {"bos_token_id": 0, "eos_token_id": 0}
MOE = {"num_local_experts": 2, "num_experts_per_tok": 1}
FULL_AND_LINEAR = {"layer_types": ["full_attention", "linear_attention"], "block_size": 4}
DEEPSEEK = {
    **SIZES,
    "q_lora_rank": 32,  # as many as queries: no sign of heads
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}
GEMMA4 = {
    **GROUPED,
    "head_dim": 8,
    "global_head_dim": 16,
    "num_global_key_value_heads": 1,
    "layer_types": ["sliding_attention", "full_attention"],
    "hidden_size_per_layer_input": 4,
    "vocab_size_per_layer_input": VOCABULARY,
    "num_kv_shared_layers": 0,
}
CODEGEN = {"n_embd": 64, "n_layer": 2, "n_head": 8, "n_positions": 16, "rotary_dim": 4}
FALCON = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
FALCON_NEW = {"new_decoder_architecture": True, "num_kv_heads": 2}

# Type, settings, which layer, and its heads, groups and head size
MODELS: dict[str, tuple[str, dict[str, Any], int, tuple[int, int, int]]] = {
    "gpt_neox, interleaved": ("gpt_neox", SIZES, 1, (4, 4, 8)),
    "gpt2, one after the other": ("gpt2", {**GPT2, **SPECIAL}, 1, (4, 4, 8)),
    "llama": ("llama", SIZES, 0, (4, 4, 8)),
    "llama, grouped": ("llama", GROUPED, 1, (4, 2, 8)),
    "llama, one key head": ("llama", {**SIZES, "num_key_value_heads": 1}, 1, (4, 1, 8)),
    "llama, one head": (
        "llama",
        {**SIZES, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8},
        1,
        (1, 1, 8),
    ),
    "falcon, multi-query": ("falcon", {**FALCON, "multi_query": True}, 1, (4, 1, 8)),
    "falcon, new": ("falcon", {**FALCON, **FALCON_NEW}, 1, (4, 2, 8)),
    "falcon, plain": ("falcon", {**FALCON, "multi_query": False}, 1, (4, 4, 8)),
    "phi3, fused": ("phi3", GROUPED, 1, (4, 2, 8)),
    "mpt": ("mpt", MPT, 1, (4, 4, 8)),
    "codegen, in blocks": ("codegen", {**CODEGEN, **SPECIAL}, 1, (8, 8, 8)),
    "bloom": ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4, **SPECIAL}, 1, (4, 4, 8)),
    "gpt_bigcode, multi-query": ("gpt_bigcode", {**GPT2, **SPECIAL}, 1, (4, 1, 8)),
    "gpt_bigcode, plain": (
        "gpt_bigcode",
        {**GPT2, **SPECIAL, "multi_query": False},
        1,
        (4, 4, 8),
    ),
    "qwen3, wide heads": ("qwen3", {**GROUPED, "head_dim": 16}, 1, (4, 2, 16)),
    "gemma, wide heads": ("gemma", {**GROUPED, "head_dim": 16}, 1, (4, 2, 16)),
    "gemma4, sliding": ("gemma4_text", GEMMA4, 0, (4, 2, 8)),
    "gemma4, full": ("gemma4_text", GEMMA4, 1, (4, 2, 16)),
    "olmo2, norm over heads": ("olmo2", SIZES, 1, (4, 4, 8)),
    "olmo2, grouped": ("olmo2", GROUPED, 1, (4, 2, 8)),
    "mixtral": ("mixtral", {**GROUPED, **MOE}, 1, (4, 2, 8)),
    "opt": ("opt", {**SIZES, "ffn_dim": 24, "word_embed_proj_dim": 32}, 1, (4, 4, 8)),
    "bert, decoder": ("bert", {**SIZES, "is_decoder": True}, 1, (4, 4, 8)),
    "gpt_oss, sinks": ("gpt_oss", {**GROUPED, **MOE, "head_dim": 8}, 1, (4, 2, 8)),
    "minimax, lightning": ("minimax", {**GROUPED, **MOE, **FULL_AND_LINEAR}, 1, (4, 4, 8)),
}
NORM_OVER_HEADS = {"olmo2, norm over heads", "olmo2, grouped", "minimax, lightning"}


@pytest.mark.parametrize("kind", MODELS)
def test_heads_groups_and_their_size(kind: str) -> None:
    _, _, number, expected = MODELS[kind]
    layer = find_structure(built(kind)).layers[number]
    assert (layer.num_heads, layer.num_groups, layer.head_size) == expected
    assert not layer.unknown


@pytest.mark.parametrize("kind", MODELS)
def test_what_is_a_head_s_alone_changes_what_that_head_passes_on_alone(kind: str) -> None:
    heads = Heads(kind)
    for head in range(heads.count):
        others = [masks for other, masks in enumerate(heads.masks) if other != head]
        alone = {
            name: mask & ~any_of(name, others, mask) for name, mask in heads.read_by(head).items()
        }
        assert heads.changed_by(alone) == {head}


@pytest.mark.parametrize("kind", MODELS)
def test_a_head_and_its_key_value_head_change_what_their_group_passes_on(kind: str) -> None:
    heads = Heads(kind)
    for head in range(heads.count):
        per_group = heads.count // heads.layer.num_groups
        first = head // per_group * per_group
        assert heads.changed_by(heads.read_by(head)) == set(range(first, first + per_group))


@pytest.mark.parametrize("kind", MODELS)
def test_nothing_is_forgotten(kind: str) -> None:
    """Every row and column is some head's, and what is not changes nothing that heads pass on."""
    heads = Heads(kind)
    for name in heads.layer.heads:
        assert any_of(name, heads.masks).all(), name
    no_head_s = [name for name in heads.layer.attention if name not in heads.masks[0]]
    rest = {name: torch.tensor(True) for name in no_head_s}
    assert all(name.endswith(".bias") for name in rest)  # of the output projection
    assert heads.changed_by(rest) == set()


@pytest.mark.parametrize("kind", MODELS)
def test_a_head_s_columns_are_those_that_take_what_it_passes_on(kind: str) -> None:
    heads = Heads(kind)
    passed = torch.randn(3, heads.count, heads.layer.head_size)
    for head, masks in enumerate(heads.masks):
        other = passed.clone()
        other[:, head] = torch.randn(3, heads.layer.head_size)
        mask = masks[f"{heads.output}.weight"]
        for cut, same in ((mask, True), (~mask, False)):
            outputs = heads.with_output_zero(cut, passed), heads.with_output_zero(cut, other)
            assert torch.equal(*outputs) == same
        only = passed.clone()
        only[:, [h for h in range(heads.count) if h != head]] = 0
        torch.testing.assert_close(
            heads.with_output_zero(~mask, passed), heads.with_output_zero(None, only)
        )


@pytest.mark.parametrize("kind", MODELS)
def test_a_group_is_the_union_of_its_heads(kind: str) -> None:
    heads = Heads(kind)
    groups = heads.layer.num_groups
    for group in range(groups):
        masks = create_param_masks(heads.model, f"l{heads.number}g{group}")
        own = [m for h, m in enumerate(heads.masks) if h * groups // heads.count == group]
        assert len(own) == heads.count // groups
        assert masks.keys() == own[0].keys()
        for name, mask in masks.items():
            assert torch.equal(mask, any_of(name, own)), name


class Heads:
    """A model, the masks of one layer's heads, and what they pass to the output projection."""

    def __init__(self, kind: str) -> None:
        self.model, self.number = built(kind), MODELS[kind][2]
        self.layer = find_structure(self.model).layers[self.number]
        self.count = self.layer.num_heads
        names = [f"l{self.number}h{head}" for head in range(self.count)]
        self.masks: list[dict[str, Tensor]] = [filled(self.model, name) for name in names]
        (self.output,) = {
            name.removesuffix(".weight")
            for name in self.layer.heads
            if re.search(r"\.(o_proj|out_proj|c_proj|dense|Wo)\.weight$", name)
        }
        if kind in NORM_OVER_HEADS:  # they mix heads, but move no feature
            for name, module in list(self.model.named_modules()):
                if (
                    name.startswith(self.output.rpartition(".")[0])
                    and "Norm" in type(module).__name__
                ):
                    self.model.set_submodule(name, nn.Identity())
        self.before = self.passed()

    def read_by(self, head: int) -> dict[str, Tensor]:
        return {n: m for n, m in self.masks[head].items() if n != f"{self.output}.weight"}

    def passed(self) -> Tensor:
        """What goes into the output projection, (token, head, feature)."""
        seen = []
        module = self.model.get_submodule(self.output)
        hook = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
        with torch.no_grad():
            token_logits(self.model, torch.arange(1, 9)[None] * 5 % VOCABULARY)
        hook.remove()
        return seen[0].reshape(-1, self.count, self.layer.head_size)

    def changed_by(self, masks: dict[str, Tensor]) -> set[int]:
        """Which heads pass on something else when the elements of masks are others."""
        parameters = {name: self.model.get_parameter(name) for name in masks}
        before = {name: p.detach().clone() for name, p in parameters.items()}
        with torch.no_grad():
            for name, p in parameters.items():
                p += masks[name] * torch.randn_like(p) / 2
            change = (self.passed() - self.before).abs().amax((0, 2))
            for name, p in parameters.items():
                p.copy_(before[name])
        return set((change > 1e-5).nonzero()[:, 0].tolist())

    def with_output_zero(self, cut: Tensor | None, passed: Tensor) -> Tensor:
        module = self.model.get_submodule(self.output)
        weight: Any = module.weight
        before = weight.detach().clone()
        with torch.no_grad():
            if cut is not None:
                weight.masked_fill_(cut, 0)
            output = module(passed.flatten(1))
            weight.copy_(before)
        return output


def any_of(name: str, all_masks: list[dict[str, Tensor]], like: Tensor | None = None) -> Tensor:
    if not all_masks:
        assert like is not None
        return torch.zeros_like(like)
    return torch.stack([masks[name] for masks in all_masks]).any(0)


def filled(model: nn.Module, restriction: str) -> dict[str, Tensor]:
    masks = create_param_masks(model, restriction)
    assert all(mask is not None for mask in masks.values())
    return {name: mask for name, mask in masks.items() if mask is not None}


def built(kind: str) -> nn.Module:
    name, settings, *_ = MODELS[kind]
    return hugging_face(name, settings)


def hugging_face(name: str, settings: dict[str, Any]) -> nn.Module:
    """With weights large enough for heads to differ, and without any that are zero."""
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = AutoConfig.for_model(name, vocab_size=VOCABULARY, **settings)
        model: nn.Module = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model


# Parts of layers


def short(names: Any, number: int) -> set[str]:
    return {name.split(f".{number}.", 1)[1] for name in names}


def test_a_layer_has_all_its_parameters_and_norms_are_of_neither_part() -> None:
    layer = find_structure(built("qwen3, wide heads")).layers[1]
    attention = {f"self_attn.{part}_proj.weight" for part in "qkvo"}
    mlp = {f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    norms = {"self_attn.q_norm.weight", "self_attn.k_norm.weight"}
    norms |= {"input_layernorm.weight", "post_attention_layernorm.weight"}
    assert short(layer.attention, 1) == attention
    assert short(layer.mlp, 1) == mlp
    assert short(layer.parameters, 1) == attention | mlp | norms
    assert all(".layers.1." in name for name in layer.parameters)


@pytest.mark.parametrize("kind", MODELS)
def test_layers_share_nothing_and_miss_nothing(kind: str) -> None:
    model = built(kind)
    structure = find_structure(model)
    names = [name for name, _ in model.named_parameters()]
    inside = [name for layer in structure.layers for name in layer.parameters]
    assert len(structure.layers) == 2
    assert len(inside) == len(set(inside))
    assert set(inside) == {name for name in names if re.search(r"\.[01]\.", name)}
    for layer in structure.layers:
        assert layer.mlp
        assert not set(layer.attention) & set(layer.mlp)
        assert set(layer.attention) | set(layer.mlp) < set(layer.parameters)
        assert set(layer.heads) <= set(layer.attention)
        rest = set(layer.parameters) - set(layer.attention) - set(layer.mlp)
        assert all(re.search(r"norm|ln_", name, re.IGNORECASE) for name in rest), rest


@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [
        ("mixtral", MOE, {"mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"}),
        (
            "qwen2_moe",
            {"num_experts": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8},
            {
                *("mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
                *(f"mlp.shared_expert.{part}_proj.weight" for part in ("gate", "up", "down")),
                "mlp.shared_expert_gate.weight",
            },
        ),
        (
            "gpt_oss",
            {**MOE, "head_dim": 8},
            {
                *("mlp.router.weight", "mlp.router.bias"),
                *("mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj_bias"),
                *("mlp.experts.down_proj", "mlp.experts.down_proj_bias"),
            },
        ),
    ],
)
def test_every_expert_and_the_router_are_in_the_mlp(
    kind: str, settings: dict[str, Any], expected: set[str]
) -> None:
    layer = find_structure(hugging_face(kind, {**GROUPED, **settings})).layers[0]
    assert short(layer.mlp, 0) == expected


def test_numbers_that_heads_have_one_of_are_cut_too() -> None:
    heads = Heads("gpt_oss, sinks")
    (name,) = [name for name in heads.layer.heads if name.endswith("sinks")]
    for head, masks in enumerate(heads.masks):
        assert masks[name].tolist() == [other == head for other in range(4)]
        assert heads.changed_by({name: masks[name]}) == {head}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("gpt2", {**GPT2, **SPECIAL, "add_cross_attention": True}),
        ("bart", {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4}),
    ],
)
def test_cross_attention_is_in_a_layer_but_in_no_part_of_it(
    kind: str, settings: dict[str, Any]
) -> None:
    model = hugging_face(kind, {**settings, "decoder_ffn_dim": 24, "max_position_embeddings": 16})
    layer = find_structure(model).layers[1]
    cross = {n for n in layer.parameters if re.search(r"crossattention|encoder_attn", n)}
    assert len(cross) >= 6
    assert not cross & {*layer.attention, *layer.mlp, *layer.heads}
    assert layer.num_heads == 4
    assert layer.heads
    assert layer.mlp


@pytest.mark.parametrize(
    ("kind", "settings", "other"),
    [
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "conv."),
        ("jamba", {"attn_layer_period": 2, "attn_layer_offset": 1, **MOE}, "mamba."),
        (
            "olmo_hybrid",
            {"layer_types": ["linear_attention", "full_attention"]},
            "linear_attn.",
        ),
    ],
)
def test_layers_of_several_kinds(kind: str, settings: dict[str, Any], other: str) -> None:
    """What mixes tokens without heads is in a layer, but in neither part; the rest as always."""
    model = hugging_face(kind, {**GROUPED, "num_experts": 2, **settings})
    first, second = find_structure(model).layers
    assert (first.num_heads, first.num_groups, first.heads, first.unknown) == (0, 0, {}, "")
    assert (second.num_heads, second.num_groups) == (4, 2)
    assert first.attention == ()
    assert any(name.startswith(other) for name in short(first.parameters, 0))
    assert not any(other in name for name in first.mlp)
    assert short(first.mlp, 0)
    assert short(second.attention, 1) == short(second.heads, 1)
    assert len(second.heads) == 4
    assert all(re.search(r"\.(mlp|feed_forward)\.", name) for name in (*first.mlp, *second.mlp))
    message = r"^'l0h0': this layer has no attention heads$"
    with pytest.raises(ValueError, match=message):
        create_param_masks(model, "l0h0")
    with pytest.raises(ValueError, match="'l0 attn' selects nothing"):
        create_param_masks(model, "l0 attn")
    assert list(create_param_masks(model, "l1h3")) == list(second.heads)


def test_a_mixer_beside_the_attention_is_not_in_the_mlp() -> None:
    mamba = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}
    model = hugging_face("falcon_h1", {**GROUPED, **mamba, "mamba_n_groups": 1})
    layer = find_structure(model).layers[0]
    assert {name.split(".")[0] for name in short(layer.mlp, 0)} == {"feed_forward"}
    assert any(name.startswith("mamba.") for name in short(layer.parameters, 0))
    assert (layer.num_heads, layer.num_groups) == (4, 2)


def test_parts_of_layers_in_lists_of_their_own() -> None:
    """XLM keeps attentions, MLPs and norms apart."""
    model = hugging_face("xlm", {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "causal": True})
    for number, layer in enumerate(find_structure(model).layers):
        owners = {name.split(".")[1] for name in layer.parameters}
        assert owners == {"attentions", "ffns", "layer_norm1", "layer_norm2"}
        assert all(f".{number}." in name for name in layer.parameters)
        assert {name.split(".")[1] for name in layer.attention} == {"attentions"}
        assert {name.split(".")[1] for name in layer.mlp} == {"ffns"}
        assert layer.num_heads == 4
        assert len(layer.heads) == 7


def test_latent_projections_belong_to_no_head_but_to_the_attention() -> None:
    """A head is what it reads itself; what all heads read through a projection is not cut."""
    model = hugging_face("deepseek_v3", DEEPSEEK)
    layer = find_structure(model).layers[1]
    assert short(layer.heads, 1) == {
        *("self_attn.q_b_proj.weight", "self_attn.kv_b_proj.weight", "self_attn.o_proj.weight"),
        "self_attn.kv_a_proj_with_mqa.weight",
    }
    assert "model.layers.1.self_attn.q_a_proj.weight" in layer.attention
    masks = filled(model, "l1h2")
    shared = masks["model.layers.1.self_attn.kv_a_proj_with_mqa.weight"][:, 0]
    assert shared.tolist() == [False] * 12 + [True] * 4  # the one rotary key of all heads
    own = masks["model.layers.1.self_attn.q_b_proj.weight"][:, 0]
    assert own.view(4, 12).all(1).tolist() == [False, False, True, False]
    assert int(own.sum()) == 12


def test_the_layers_are_the_decoder_s() -> None:
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = {"d_model": 32, "decoder_attention_heads": 4, "decoder_ffn_dim": 8, "vocab_size": 40}
    torch.manual_seed(3)
    model = BartForConditionalGeneration(
        BartConfig(**sizes, decoder_layers=1, encoder_layers=3, encoder_ffn_dim=64)
    )
    (layer,) = find_structure(model).layers
    assert all(name.startswith("model.decoder.layers.0.") for name in layer.parameters)
    assert layer.num_heads == 4


# Embeddings


def test_embedding_and_unembedding() -> None:
    structure = find_structure(built("gpt_neox, interleaved"))
    assert structure.embed == ("gpt_neox.embed_in.weight",)
    assert structure.unembed == ("lm_head.weight",)


def test_an_unembedding_has_its_bias() -> None:
    structure = find_structure(hugging_face("phi", SIZES))
    assert structure.unembed == ("lm_head.weight", "lm_head.bias")


def test_tied_weights_are_both() -> None:
    structure = find_structure(built("gpt2, one after the other"))
    assert structure.embed == structure.unembed == ("transformer.wte.weight",)


def test_a_tied_weight_has_the_one_name_that_the_model_gives_it() -> None:
    model = hugging_face("bert", {**SIZES, "is_decoder": True})
    structure = find_structure(model)
    assert structure.embed == ("bert.embeddings.word_embeddings.weight",)
    assert structure.unembed == (*structure.embed, "cls.predictions.bias")
    assert set(structure.unembed) < {name for name, _ in model.named_parameters()}


def test_layers_that_share_weights_have_the_names_that_the_model_gives_them() -> None:
    model = built("llama, grouped")
    layers = model.get_submodule("model.layers")
    layers[1].self_attn = layers[0].self_attn  # type: ignore[index]
    first, second = find_structure(model).layers
    assert second.heads.keys() == first.heads.keys()
    assert second.attention == first.attention
    assert set(second.parameters) <= {name for name, _ in model.named_parameters()}
    assert {name.split(".")[2] for name in second.mlp} == {"1"}


def test_a_bias_that_one_layer_has_and_another_has_not() -> None:
    model = hugging_face("qwen2", GROUPED)
    for number, part in ((0, "k"), (1, "v")):
        model.get_submodule(f"model.layers.{number}.self_attn.{part}_proj").bias = None
    for layer, part in zip(find_structure(model).layers, "kv", strict=True):
        weights = [name.split(".")[-2][0] for name in layer.heads if name.endswith(".weight")]
        biases = [name.split(".")[-2][0] for name in layer.heads if name.endswith(".bias")]
        assert sorted(weights) == ["k", "o", "q", "v"]
        assert set(biases) == {"q", "k", "v"} - {part}


# Whatever the weights are


def same(first: Layer, second: Layer) -> bool:
    def slices(layer: Layer) -> list[Any]:
        return [
            (name, s.axis, s.head.tolist(), s.group.tolist()) for name, s in layer.heads.items()
        ]

    return slices(first) == slices(second)


WEIGHTS: dict[str, Callable[[nn.Parameter], object]] = {
    "zero": lambda p: p.zero_(),
    "one": lambda p: p.fill_(1),
    "huge": lambda p: p.mul_(1e4),
    "tiny": lambda p: p.mul_(1e-7),
    "no numbers": lambda p: p.fill_(torch.nan),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("kind", ["gpt_neox, interleaved", "llama, grouped", "olmo2, grouped"])
def test_heads_are_found_whatever_the_weights_are(
    kind: str, weights: str, dtype: torch.dtype
) -> None:
    expected = find_structure(built(kind)).layers
    model = built(kind)
    with torch.no_grad():
        for parameter in model.parameters():
            WEIGHTS[weights](parameter)
    for layer, other in zip(find_structure(model.to(dtype)).layers, expected, strict=True):
        assert same(layer, other)
        assert layer.heads


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", sorted(MODELS.keys() - NORM_OVER_HEADS))
def test_sixteen_bits_are_enough(kind: str, dtype: torch.dtype) -> None:
    expected = find_structure(built(kind)).layers
    found = find_structure(built(kind).to(dtype)).layers
    assert all(same(layer, other) for layer, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_wide_heads_do_not_overflow(dtype: torch.dtype) -> None:
    model = hugging_face("gemma", {**GROUPED, "head_dim": 512}).to(dtype)
    layer = find_structure(model).layers[1]
    assert (layer.num_heads, layer.num_groups, layer.head_size) == (4, 2, 512)
    for slices in layer.heads.values():
        assert (slices.group >= 0).all()


@pytest.mark.parametrize(("kind", "key"), [("olmo", "clip_qkv"), ("mpt", "attn_config")])
def test_models_that_write_into_what_a_projection_gives(kind: str, key: str) -> None:
    clip = {"clip_qkv": 0.5}
    sizes = GROUPED if kind == "olmo" else MPT
    model = hugging_face(kind, {**sizes, key: clip if key == "attn_config" else 0.5})
    layer = find_structure(model).layers[0]
    assert not layer.unknown
    assert layer.num_heads == 4


# The model stays what it was


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
def test_a_model_is_unchanged_wherever_it_is_looked_at(
    training: bool, context: Any, frozen: bool
) -> None:
    kind = "gpt2, one after the other"  # has dropout
    model = built(kind).train(training).requires_grad_(not frozen)
    model.get_submodule("transformer.h.1").train(not training)
    expected = find_structure(built(kind)).layers
    generator = torch.get_rng_state()
    with unchanged(model), context():
        found = find_structure(model).layers
    assert all(same(layer, other) for layer, other in zip(found, expected, strict=True))
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("kind", MODELS)
def test_every_kind_of_model_is_unchanged(kind: str) -> None:
    model = built(kind)
    with unchanged(model):
        find_structure(model)


class Broken(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("broken\nin two lines")


def test_a_model_that_cannot_be_run_has_layers_but_no_heads() -> None:
    model = built("llama, grouped").train()
    model.set_submodule("model.layers.1.mlp", Broken())
    with unchanged(model):
        structure = find_structure(model)
    assert [layer.num_heads for layer in structure.layers] == [0, 0]
    assert len(structure.layers[0].mlp) == 3
    assert structure.embed == ("model.embed_tokens.weight",)
    reason = structure.layers[0].unknown
    assert "cannot be run on a few tokens to see its heads (broken)" in reason
    assert "sample(param_masks={parameter name: bool tensor of its shape, or None})" in reason


def test_a_model_that_needs_to_be_told_something_first() -> None:
    model = hugging_face("xmod", {**SIZES, "is_decoder": True})
    layer = find_structure(model).layers[0]
    assert "set_default_language" in layer.unknown
    model.set_default_language("en_XX")  # type: ignore[operator]
    assert find_structure(model).layers[0].num_heads == 4


# What is not understood is not guessed


def not_understood(model: nn.Module) -> str:
    layer = find_structure(model).layers[0]
    assert (layer.num_heads, layer.num_groups, layer.head_size, layer.heads) == (0, 0, 0, {})
    assert layer.attention
    assert "model.layers.0.self_attn.q_proj (" in layer.unknown
    assert "Pass masks by hand" in layer.unknown
    return layer.unknown


def test_heads_that_are_differences_of_two() -> None:
    reason = not_understood(hugging_face("diffllama", GROUPED))
    assert "the heads of layer 0 of DiffLlamaForCausalLM cannot be told apart" in reason
    assert "no row is read by all of the first head and by no other, if there are 4" in reason


def test_key_heads_that_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads 0 and 2 share the first key-value head: neighbours do not."""

    def repeat(hidden: Tensor, times: int) -> Tensor:
        return hidden.repeat(1, times, 1, 1)

    monkeypatch.setattr("transformers.models.llama.modeling_llama.repeat_kv", repeat)
    model = hugging_face("llama", {**GROUPED, "attn_implementation": "eager"})
    assert "k_proj is read by heads [0, 2], which are no group of 2" in not_understood(model)


def test_heads_of_which_no_row_is_one_s_alone() -> None:
    model = hugging_face("jetmoe", {**SIZES, "kv_channels": 8, **MOE})
    layer = find_structure(model).layers[0]
    assert "no row is read by all of the first head and by no other" in layer.unknown
    assert layer.heads == {}


def test_a_number_of_heads_that_cannot_be() -> None:
    model = built("llama")
    model.config.num_attention_heads = 5  # type: ignore[union-attr]
    assert "takes 32 numbers, and model.config names 5 heads" in not_understood(model)
    for wrong in (1, 2, 8, 16):
        model.config.num_attention_heads = wrong  # type: ignore[union-attr]
        assert f"if there are {wrong} heads as model.config says" in not_understood(model)


class Plain(nn.Module):
    """A module of one's own, without a configuration."""

    def __init__(self) -> None:
        super().__init__()
        inner = built("llama")
        self.model, self.head = inner.model, inner.lm_head

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.model(ids).last_hidden_state)  # type: ignore[operator]


def test_no_number_of_heads() -> None:
    assert "model.config names no number of heads" in not_understood(Plain())


def test_a_number_of_key_heads_in_the_configuration_that_the_model_does_not_use() -> None:
    model = built("llama, grouped")
    model.config.num_key_value_heads = 1  # type: ignore[union-attr]
    assert find_structure(model).layers[0].num_groups == 2


def test_a_weight_that_is_made_of_others() -> None:
    model = built("llama")
    nn.utils.parametrizations.weight_norm(model.get_submodule("model.layers.0.self_attn.k_proj"))
    reason = not_understood(model)
    assert "the weight of model.layers.0.self_attn.k_proj is made of other parameters" in reason
    assert find_structure(model).layers[1].num_heads == 4


class Unused(nn.Module):
    """Multiplies, but not with what it holds."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden


def test_a_projection_that_is_not_run() -> None:
    model = built("llama")
    name = "model.layers.0.self_attn.v_proj"
    model.set_submodule(name, Unused(model.get_submodule(name)))
    assert "of its projections 3 were run" in not_understood(model)


class LowRank(nn.Module):
    """A projection with a low-rank change beside it, as adapters have it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.down = nn.Linear(base.in_features, 3, bias=False)
        self.up = nn.Linear(3, base.out_features, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    def forward(self, hidden: Tensor) -> Tensor:
        return self.base_layer(hidden) + self.up(self.down(hidden))


def test_adapters_are_cut_where_heads_read_them() -> None:
    model = built("llama, grouped")
    name = "model.layers.0.self_attn.q_proj"
    model.set_submodule(name, LowRank(model.get_submodule(name)))  # type: ignore[arg-type]
    masks = filled(model, "l0h1")
    rows = [False] * 8 + [True] * 8 + [False] * 16
    assert masks[f"{name}.base_layer.weight"][:, 0].tolist() == rows
    assert masks[f"{name}.up.weight"][:, 0].tolist() == rows
    assert f"{name}.down.weight" not in masks
    assert f"{name}.down.weight" in create_param_masks(model, "l0 attn")


def test_models_without_layers_or_attention_are_refused() -> None:
    with pytest.raises(UnknownStructureError) as caught:
        find_structure(RawModel())
    assert str(caught.value) == (
        "RawModel has no list of layers with attention in it (lists of modules: none). Pass masks "
        "by hand: sample(param_masks={parameter name: bool tensor of its shape, or None})"
    )
    model = hugging_face("mamba", {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4})
    with pytest.raises(UnknownStructureError, match=r"modules: backbone\.layers of 2\)"):
        find_structure(model)


# TransformerLens


@pytest.mark.parametrize("groups", [None, 2, 1])
def test_a_transformer_lens_model(groups: int | None) -> None:
    """On a stand-in: TransformerLens 4 has no HookedTransformer, its bridge has other names."""
    model = HookedTransformer(groups)
    structure = find_structure(model)
    assert structure.embed == ("embed.W_E",)
    assert structure.unembed == ("unembed.W_U", "unembed.b_U")
    underscore = "" if groups is None else "_"
    for number, layer in enumerate(structure.layers):
        assert (layer.num_heads, layer.num_groups) == (HEADS, groups or HEADS)
        assert layer.head_size == HEAD_SIZE
        prefix = f"blocks.{number}.attn."
        own = {f"{prefix}{name}" for name in ("W_Q", "b_Q", "W_O")}
        shared = {f"{prefix}{underscore}{name}" for name in ("W_K", "b_K", "W_V", "b_V")}
        assert set(layer.heads) == own | shared
        assert set(layer.attention) == own | shared | {f"{prefix}b_O"}
        assert short(layer.mlp, number) == {"mlp.W_in", "mlp.b_in", "mlp.W_out", "mlp.b_out"}
        rest = set(layer.parameters) - set(layer.attention) - set(layer.mlp)
        assert short(rest, number) == {"ln1.w", "ln1.b", "ln2.w", "ln2.b"}
        for name in own:
            assert layer.heads[name].head.tolist() == list(range(HEADS))
        for name in shared:
            assert layer.heads[name].group.tolist() == list(range(groups or HEADS))
            assert (layer.heads[name].head < 0).all() == (groups is not None)


def test_a_model_that_only_looks_like_transformer_lens_is_refused() -> None:
    with pytest.raises(UnknownStructureError, match=r"no parameters named blocks\.0\.attn\.W_Q"):
        find_structure(HookedStandIn())
