"""Extraction: against the models' own outputs, and against models with weights taken out."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from basinscope.models.activation_cache import ActivationCache
from basinscope.models.components import neurons
from basinscope.models.extraction import ExtractionConfig, Extractor, extract
from basinscope.models.interventions import Intervention
from basinscope.models.restrictions import structure_of
from basinscope.models.sites import find_sites
from basinscope.models.stream import stream_of
from basinscope.models.unembedding import find_unembedding
from tests.models.models_tiny import CONFIGS, VOCABULARY, tiny
from tests.models.test_structure import GROUPED, hugging_face

LENGTH = 7
PARTS = ("resid_in", "resid_mid", "resid_out", "attn_in", "attn_out", "mlp_out", "head_out")


def ids(examples: int = 3) -> Tensor:
    return torch.randint(VOCABULARY, (examples, LENGTH), generator=torch.Generator().manual_seed(1))


def config(*names: str, **settings: Any) -> ExtractionConfig:
    return ExtractionConfig(**dict.fromkeys(names, True), **settings)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_stream_is_the_sum_of_what_is_written_to_it(name: str) -> None:
    cache = extract(tiny(name), ids(), config(*PARTS))
    for layer in range(2):
        into, mid, out = (cache[f"resid_{place}_{layer}"] for place in ("in", "mid", "out"))
        attention, mlp = cache[f"attn_out_{layer}"], cache[f"mlp_out_{layer}"]
        torch.testing.assert_close(into + attention + mlp, out, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(into + attention, mid)
        assert attention.abs().max() > 1e-3
        assert mlp.abs().max() > 1e-3
    torch.testing.assert_close(cache["resid_out_0"], cache["resid_in_1"], rtol=0, atol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_stream_is_the_models_own(name: str) -> None:
    model = tiny(name)
    cache = extract(model, ids(), config("resid_in", "resid_out", "logits", "embed", "input_ids"))
    with torch.no_grad():
        plain = model(ids(), output_hidden_states=True)
    torch.testing.assert_close(cache["logits"], plain.logits)
    torch.testing.assert_close(cache["resid_in_0"], plain.hidden_states[0])
    torch.testing.assert_close(cache["resid_out_0"], plain.hidden_states[1])
    torch.testing.assert_close(cache["embed"], model.get_input_embeddings()(ids()))
    assert torch.equal(cache["input_ids"], ids())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_heads_share_is_what_its_columns_of_the_projection_give(name: str) -> None:
    """Without the other heads' columns, and without a bias, the layer's attention gives it alone.

    Norms after the attention see another input then, so those models are checked before them.
    """
    model = tiny(name)
    cache = extract(model, ids(), config("head_out", "attn_out"))
    rest = cache["attn_out_0"] - cache["head_out_0"].sum(-2)
    assert (rest - rest[:1, :1]).abs().max() < 1e-5 or find_sites(model).heads[0].after
    if find_sites(model).heads[0].after:
        torch.testing.assert_close(rest, torch.zeros_like(rest), rtol=0, atol=1e-5)
        return
    slices = structure_of(model).layers[0].heads[find_sites(model).heads[0].projection]
    projection = find_sites(model).heads[0].projection
    for head in range(4):
        alone = copy.deepcopy(model)
        weight = alone.get_parameter(projection)
        others = torch.from_numpy(slices.head != head)
        with torch.no_grad():
            weight[others if slices.axis == 0 else (slice(None), others)] = 0
        share = extract(alone, ids(), config("attn_out", layers=[0]))["attn_out_0"] - rest
        torch.testing.assert_close(cache[f"head_out_L0H{head}"], share, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_attention_patterns_are_the_models_own(name: str) -> None:
    model = tiny(name)
    kept = model.config._attn_implementation
    cache = extract(model, ids(), config("attn_pattern", target_token_positions=[2, -1]))
    assert model.config._attn_implementation == kept
    eager = tiny(name, attn_implementation="eager")
    with torch.no_grad():
        patterns = eager(ids(), output_attentions=True).attentions
    assert cache["attn_pattern_1"].shape == (3, 4, 2, LENGTH)
    torch.testing.assert_close(cache["attn_pattern_1"], patterns[1][:, :, [2, -1]])
    torch.testing.assert_close(cache["attn_pattern_L1H2"], patterns[1][:, 2, [2, -1]])


@pytest.mark.parametrize("text", ["eager", "sdpa"])
def test_every_part_of_a_model_has_its_own_attention_again(text: str) -> None:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 16, "patch_size": 8,
    }  # fmt: skip
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration._from_config(
        Gemma3Config(
            text_config={**CONFIGS["gemma3_text"], "vocab_size": VOCABULARY}, vision_config=vision,
            mm_tokens_per_image=4, image_token_index=61, boi_token_index=62, eoi_token_index=63,
        ),
        attn_implementation={"": "sdpa", "text_config": text, "vision_config": "eager"},
    ).eval()  # fmt: skip
    extract(model, ids().clamp(max=60), config("attn_pattern"))
    parts = (model.config, model.config.text_config, model.config.vision_config)
    assert [part._attn_implementation for part in parts] == ["sdpa", text, "eager"]


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "opt"])
def test_queries_keys_and_values_are_what_the_projections_give(name: str) -> None:
    model = tiny(name)
    cache = extract(model, ids(), config("queries", "keys", "values", "attn_in"))
    attention = model.get_submodule(find_sites(model).plain["attn_in_1"].module)
    for kind, module in (
        ("queries", attention.q_proj),
        ("keys", attention.k_proj),
        ("values", attention.v_proj),
    ):
        with torch.no_grad():
            flat = module(cache["attn_in_1"])
        found = cache[f"{kind}_1"]
        assert found.shape[2] == (4 if kind == "queries" or name == "opt" else 2)
        torch.testing.assert_close(found.flatten(2), flat)
        torch.testing.assert_close(cache[f"{kind}_L1H1"], found[:, :, 1])


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "falcon", "bloom", "phi3", "codegen", "mpt"])
def test_fused_projections_are_taken_apart_so_that_scores_follow(name: str) -> None:
    """One-token sequences pass values alone: the values, mapped out, are the heads' shares."""
    model = tiny(name)
    single = ids()[:, :1]
    cache = extract(model, single, config("values", "keys", "head_out"))
    heads = find_sites(model).heads[0]
    weight = model.get_parameter(heads.projection).detach()
    values = cache["values_0"].repeat_interleave(4 // cache["values_0"].shape[2], dim=2)
    if type(model.get_submodule(heads.projection.rpartition(".")[0])).__name__ != "Conv1D":
        weight = weight.T
    shares = torch.einsum("bphs,hsd->bphd", values, weight.unflatten(0, (4, -1)))
    torch.testing.assert_close(cache["head_out_0"], shares, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(cache["keys_0"], cache["values_0"])


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_statistics_are_those_of_what_enters_the_final_norm(name: str) -> None:
    model = tiny(name)
    cache = extract(model, ids(), config("last_layernorm", "resid_out", layers=[1]))
    final = cache["resid_out_1"]
    torch.testing.assert_close(cache["last_layernorm_mean"], final.mean(-1))
    torch.testing.assert_close(cache["last_layernorm_variance"], final.var(-1, unbiased=False))
    torch.testing.assert_close(cache["last_layernorm_second_moment"], final.square().mean(-1))


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ("all", list(range(LENGTH))),
        ("last", [LENGTH - 1]),
        (2, [2]),
        (-2, [LENGTH - 2]),
        (slice(1, 6, 2), [1, 3, 5]),
        ([0, "last", slice(2, 4)], [0, LENGTH - 1, 2, 3]),
    ],
)
def test_positions_are_taken_in_the_order_of_asking(positions: Any, expected: list[int]) -> None:
    model = tiny("gpt2")
    whole = extract(model, ids(), config(*PARTS, "last_layernorm", "logits"))
    some = extract(
        model, ids(), config(*PARTS, "last_layernorm", "logits", target_token_positions=positions)
    )
    assert some.coords["position"].tolist() == expected
    for name in some:
        if "position" in some.dims[name]:
            torch.testing.assert_close(some[name], whole[name][:, expected])
    averaged = extract(model, ids(), config(*PARTS, average=True, target_token_positions=positions))
    assert averaged.coords["position"].tolist() == [-1]
    for name in averaged:
        if name != "input_ids":
            torch.testing.assert_close(averaged[name], some[name].mean(1, keepdim=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_activations_keep_the_models_dtype(dtype: torch.dtype) -> None:
    model = tiny("llama").to(dtype)
    cache = extract(model, ids(), config(*PARTS, "last_layernorm"))
    assert cache["resid_mid_1"].dtype == cache["head_out_1"].dtype == dtype
    assert {layer.scale for layer in stream_of(model)} == {1.0}
    assert cache["last_layernorm_mean"].dtype == torch.promote_types(dtype, torch.float32)
    data = cache.to_dataset()
    assert data["resid_out_0"].dtype == (np.float32 if dtype == torch.bfloat16 else np.float64)
    assert np.array_equal(data["resid_out_0"], cache["resid_out_0"].to(torch.float64).numpy())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_added_to_a_loud_stream_is_found_in_16_bits(dtype: torch.dtype) -> None:
    """Trained models have numbers in their streams beside which a layer adds next to nothing."""
    model = tiny("granite")
    expected = stream_of(model)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(300)
    assert stream_of(copy.deepcopy(model).to(dtype)) == expected


@pytest.mark.parametrize("name", ["gemma2", "olmo2"])
def test_heads_behind_a_norm_in_double_precision(name: str) -> None:
    """Their norms compute in float32 all the same."""
    cache = extract(tiny(name).double(), ids(), config("head_out", "attn_out"))
    torch.testing.assert_close(
        cache["head_out_1"].sum(-2), cache["attn_out_1"], rtol=1e-5, atol=1e-6
    )


def test_heads_behind_a_norm_that_subtracts_are_refused_in_16_bits_too() -> None:
    model = tiny("gemma2")
    for layer in model.get_submodule("model.layers"):
        layer.post_attention_layernorm = nn.LayerNorm(16)
        layer.post_attention_layernorm.bias.data.fill_(0.5)
    with pytest.raises(ValueError, match="behind a LayerNorm that does more than scale"):
        extract(model.to(torch.bfloat16), ids(), config("head_out"))


def test_numbers_of_numpy_and_torch_are_numbers() -> None:
    model = tiny("gpt2")
    plain = extract(model, ids(), config("resid_out", layers=[1], target_token_positions=[0, 2]))
    for layers, positions in (
        (np.array([1]), np.array([0, 2])),
        ([np.int64(1)], [np.int64(0), torch.tensor(2)]),
    ):
        asked = config("resid_out", layers=layers, target_token_positions=positions)
        cache = extract(model, ids().to(torch.uint8), asked)
        assert json.loads(json.dumps(cache.metadata)) == plain.metadata
        assert torch.equal(cache["resid_out_1"], plain["resid_out_1"])


def test_a_layer_that_adds_nothing_is_no_reason_to_fail() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.get_parameter("model.layers.0.self_attn.o_proj.weight").zero_()
        model.get_parameter("model.layers.0.mlp.down_proj.weight").zero_()
    cache = extract(model, ids(), config("resid_in", "resid_out", "attn_out"))
    assert not cache["attn_out_0"].any()
    assert torch.equal(cache["resid_in_0"], cache["resid_out_0"])


@pytest.mark.parametrize("name", ["gemma2", "granite", "gpt2", "llama", "mixtral", "olmo2"])
def test_a_model_that_was_empty_at_first_is_read_as_any_other(name: str) -> None:
    """Output projections are often zero at initialisation."""
    model = tiny(name)
    trained = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if any(part in key for part in ("o_proj", "down_proj", "c_proj")):
                parameter.zero_()
    empty = extract(model, ids(), config(*PARTS))
    assert not any(empty[key].any() for key in ("attn_out_0", "head_out_0", "mlp_out_0"))
    model.load_state_dict(trained)
    cache = extract(model, ids(), config(*PARTS))
    expected = extract(copy.deepcopy(model), ids(), config(*PARTS))
    assert cache["attn_out_0"].abs().max() > 1e-3
    for key in cache:
        assert torch.equal(cache[key], expected[key])
    stream = cache["resid_in_1"] + cache["attn_out_1"] + cache["mlp_out_1"]
    torch.testing.assert_close(stream, cache["resid_out_1"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "olmo2"])
@pytest.mark.parametrize("positions", ["all", "last"])
def test_heads_that_are_all_zero_behind_a_norm_have_no_share(
    name: str, positions: Any, dtype: torch.dtype
) -> None:
    model = tiny(name).to(dtype)
    zeros = [Intervention("zero", f"head_out_L0H{head}", positions) for head in range(4)]
    cache = extract(model, ids(), config("head_out", "attn_out"), zeros)
    assert not cache["head_out_0"][:, -1].any()
    assert cache["head_out_0"][:, 0].any() == (positions == "last")
    if dtype == torch.float32:
        for layer in range(2):
            shares = cache[f"head_out_{layer}"].sum(-2)
            torch.testing.assert_close(shares, cache[f"attn_out_{layer}"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("first", [True, False])
def test_an_embedding_of_another_width_has_an_axis_of_its_own(first: bool) -> None:
    model = tiny("opt", word_embed_proj_dim=8, do_layer_norm_before=first)
    cache = extract(model, ids(), config("embed", "resid_in"))
    assert cache["embed"].shape == (3, LENGTH, 8)
    assert cache.dims["embed"] == ("example", "position", "d_embed")
    assert cache.to_dataset()["resid_in_0"].sizes["d_model"] == 16
    assert extract(model, ids(), config("embed")).dims["embed"][-1] == "d_embed"
    assert extract(tiny("opt"), ids(), config("embed")).dims["embed"][-1] == "d_model"


def test_a_module_that_two_layers_share_is_not_read_for_one_of_them() -> None:
    model = tiny("llama")
    layers: Any = model.get_submodule("model.layers")
    layers[1].self_attn = layers[0].self_attn
    with pytest.raises(ValueError, match="attn_in_0 cannot be extracted: its module runs"):
        extract(model, ids(), config("attn_in", "logits"))


def test_what_is_no_attention_probability_is_not_called_one() -> None:
    """Lightning attention returns its state, (head, d_head, d_head), where others return them."""
    kinds = ["full_attention", "linear_attention"]
    model = hugging_face(
        "minimax",
        {**GROUPED, "num_local_experts": 2, "layer_types": kinds, "block_size": 4},
    )
    tokens = ids()[:, :LENGTH] % 40
    assert extract(model, tokens, config("attn_pattern", layers=[0]))["attn_pattern_0"].ndim == 4
    for length in (5, 8):  # 8 is d_head
        with pytest.raises(ValueError, match="no attention probabilities"):
            extract(model, torch.ones(2, length, dtype=torch.int64), config("attn_pattern"))


def test_several_streams_at_once_are_not_taken_for_one() -> None:
    """Gemma 3n's have an axis before the examples."""
    settings = {
        **GROUPED,
        "head_dim": 8,
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": 40,
        "hidden_size_per_layer_input": 4,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0, 0.0],
        "layer_types": ["sliding_attention", "full_attention"],
    }
    model = hugging_face("gemma3n_text", settings)
    square = ids().repeat(3, 1)[:LENGTH] % 40
    with pytest.raises(ValueError, match="hands several streams on at once"):
        extract(model, square, config("resid_out"))
    assert extract(model, square, config("queries"))["queries_1"].shape == (LENGTH, LENGTH, 4, 8)


def test_queries_whose_heads_are_unknown_are_refused() -> None:
    model = hugging_face("diffllama", GROUPED)
    with pytest.raises(ValueError, match="queries_0 cannot be extracted: model"):
        extract(model, ids() % 40, config("queries"))


def test_advice_on_masks_is_for_who_takes_masks() -> None:
    """What is refused here was found by code that weight restrictions share."""
    mamba = hugging_face("mamba", {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4})
    with pytest.raises(ValueError, match="activations of MambaForCausalLM cannot be found") as lost:
        extract(mamba, ids() % 40, config("resid_out"))
    with pytest.raises(ValueError, match=r"heads of layer 0 .* cannot be told apart") as mixed:
        extract(hugging_face("diffllama", GROUPED), ids() % 40, config("head_out"))
    with pytest.raises(ValueError, match="unembedding of MambaForCausalLM cannot") as headless:
        find_unembedding(mamba)
    assert not any("masks" in str(caught.value) for caught in (lost, mixed, headless))


def test_a_mixer_of_tokens_is_no_mlp() -> None:
    mamba = {"mamba_d_state": 8, "n_mamba_heads": 4, "mamba_headdim": 16, "num_mem_blocks": 1}
    kinds = {"layers_block_type": ["mamba", "hybrid"], "hybrid_layer_ids": [1]}
    model = hugging_face("zamba2", {**GROUPED, **mamba, **kinds})
    with pytest.raises(ValueError, match="mlp_out_0 cannot be extracted"):
        extract(model, ids() % 40, config("mlp_out"))


def test_what_is_kept_is_no_view_of_what_the_model_goes_on_with() -> None:
    model = tiny("gpt2")
    expected = extract(model, ids(), config("resid_out"))["resid_out_0"].clone()

    extractor = Extractor(model, config("resid_out"))

    def spoil(module: nn.Module, args: Any) -> None:
        args[0].zero_()

    model.get_submodule("transformer.h.1").register_forward_pre_hook(spoil)
    torch.testing.assert_close(extractor(ids())["resid_out_0"], expected)


def test_layers_after_the_last_one_asked_for_do_not_run() -> None:
    model = tiny("gpt2")
    runs: list[int] = []
    model.get_submodule("transformer.h.1").register_forward_hook(lambda *_: runs.append(1))
    extractor = Extractor(model, config("resid_out", "embed", layers=[0]))
    runs.clear()
    extractor(ids())
    assert not runs
    Extractor(model, config("resid_out", "logits", layers=[0]))(ids())
    assert runs


def test_the_model_comes_back_as_it_was() -> None:
    model = tiny("gpt2").train()
    before = copy.deepcopy(model.state_dict())

    def hooks() -> int:
        kinds = ("_forward_hooks", "_forward_pre_hooks")
        return sum(len(getattr(m, kind)) for m in model.modules() for kind in kinds)

    everything = config(*PARTS, "attn_pattern", "logits", "last_layernorm", "queries")
    extract(model, ids(), everything)

    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle")

    extractor = Extractor(model, everything)
    handle = model.get_submodule("transformer.h.1").register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        extractor(ids())
    handle.remove()
    assert hooks() == 0
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_dropout_is_off() -> None:
    model = tiny("gpt2", resid_pdrop=0.5, embd_pdrop=0.5).train()
    twice = [extract(model, ids(), config("resid_out"))["resid_out_1"] for _ in range(2)]
    assert torch.equal(*twice)


def test_caches_are_put_together_along_the_examples() -> None:
    model = tiny("gpt2")
    extractor = Extractor(model, config("resid_out", "head_out"))
    parts = [extractor(ids()[:1]), extractor(ids()[1:])]
    together = ActivationCache.cat(parts)
    whole = extractor(ids())
    assert together.num_examples == 3
    for name in whole:
        torch.testing.assert_close(together[name], whole[name])
    other = extract(model, ids(), config("resid_out"))
    with pytest.raises(ValueError, match="only one of them has head_out_0, head_out_1"):
        ActivationCache.cat([whole, other])
    elsewhere = extract(model, ids(), config("resid_out", "head_out", target_token_positions=[0]))
    with pytest.raises(ValueError, match="do not belong together: resid_out_0 is"):
        ActivationCache.cat([whole, elsewhere])
    with pytest.raises(ValueError, match="no caches"):
        ActivationCache.cat([])


def test_a_cache_says_what_it_holds() -> None:
    cache = extract(tiny("gpt2"), ids(), config("resid_out", "head_out"))
    assert "ActivationCache of GPT2LMHeadModel" in repr(cache)
    assert "head_out_1   (example: 3, position: 7, head: 4, d_model: 16)  float32" in repr(cache)
    assert "head_out_L1H3" in cache
    with pytest.raises(KeyError, match="did you mean 'resid_out_0'"):
        cache["resid_ou_0"]
    with pytest.raises(KeyError, match="heads 0 to 3"):
        cache["head_out_L1H4"]
    data = cache.to_dataset()
    assert data["head_out_0"].dims == ("example", "position", "head", "d_model")
    assert data.attrs["model"]["num_layers"] == 2
    assert data.attrs["extraction_config"]["head_out"] is True


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda m: extract(m, ids(), config("resid_out", layers=[2])), "layers 0 to 1"),
        (lambda m: extract(m, ids(), ExtractionConfig(input_ids=False)), "asks for nothing"),
        (
            lambda m: extract(m, ids(), config("resid_out", target_token_positions=[LENGTH])),
            "position 7 is out of range: a sequence has 7 tokens",
        ),
        (
            lambda m: extract(m, ids(), config("resid_out", target_token_positions=[-1, 6])),
            "names a token twice",
        ),
        (
            lambda m: extract(m, ids(), config("resid_out", target_token_positions="first")),
            "position 'first': it can be a number, a slice, 'all', 'last'",
        ),
        (
            lambda m: extract(m, ids(), config("resid_out", target_token_positions=slice(9, 9))),
            "names no token",
        ),
        (
            lambda m: extract(m, ids(), config("resid_out", target_token_positions=slice(0, 4, 0))),
            "its step must not be 0",
        ),
        (lambda m: extract(m, ids() + 1000, config("resid_out")), "token id 10.. is no row"),
        (
            lambda m: extract(m, ids().repeat(1, 5), config("resid_out")),
            "35 tokens, and GPT2LMHeadModel takes at most 32",
        ),
        (lambda m: extract(m, ids()[0], config("resid_out")), "shape .example, token."),
        (lambda m: extract(m, ids().float(), config("resid_out")), "must be integers"),
        (lambda m: extract(m, ids()[:0], config("resid_out")), "is empty"),
        (lambda m: extract(m, ids() > 3, config("resid_out")), "must be integers"),
        (lambda m: extract(m, 5, config("resid_out")), "must be a torch.Tensor"),  # type: ignore
        (
            lambda m: extract(m, ids(), config("resid_out", layers=[])),
            r"layers=\[\] leaves no layer to take resid_out from: give 'all', or some of 0 to 1",
        ),
        (
            lambda m: extract(m.get_submodule("transformer"), ids(), config("logits")),
            "logits cannot be extracted: GPT2Model names no output embeddings; give a causal LM",
        ),
        (lambda m: extract(m, ids(), config("resid_out", layers=1)), "layers=1: 'all', or a list"),
        (lambda m: extract(m, ids(), config("resid_out", layers=[True])), "or a list of numbers"),
    ],
)
def test_bad_input_is_refused(act: Callable[[nn.Module], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        act(tiny("gpt2"))


@pytest.mark.parametrize(
    ("given", "interventions", "message"),
    [
        ({"resid_out": True}, [], "must be an ExtractionConfig, such as"),
        (None, [], "config=None must be an ExtractionConfig"),
        (config("resid_out"), Intervention("zero", "embed"), "must be a list of Intervention"),
        (config("resid_out"), ["zero"], "must be a list of Intervention"),
        (config("resid_out"), None, "interventions=None must be a list"),
    ],
)
def test_what_is_no_configuration_or_intervention(
    given: Any, interventions: Any, message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        extract(tiny("gpt2"), ids(), given, interventions)


def test_a_name_is_no_model() -> None:
    for take in (lambda name: extract(name, ids(), config("resid_out")), find_unembedding, neurons):
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module; got str: load it"):
            take("gpt2")


def test_layers_that_add_nothing_say_so() -> None:
    model = tiny("opt", do_layer_norm_before=False)
    with pytest.raises(ValueError, match="attn_out_0 cannot be extracted: no output of"):
        extract(model, ids(), config("attn_out"))
    cache = extract(model, ids(), config("resid_in", "resid_out", "attn_in"))
    torch.testing.assert_close(cache["resid_out_0"], cache["resid_in_1"])
