"""Attention knockouts: against patterns renormalised by hand, and against what they cut off."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import basinscope
from basinscope.io.store import StoreMismatchError
from basinscope.models import knockout
from basinscope.models.extraction import ExtractionConfig, Extractor, extract
from basinscope.models.forward import inside_bridge, token_logits, vocabulary_size
from basinscope.models.interventions import Intervention
from basinscope.models.sites import find_sites
from tests.conftest import token_rows
from tests.models.models_tiny import CONFIGS, VOCABULARY, tiny
from tests.models.test_structure import (
    DEEPSEEK,
    GEMMA4,
    GPT2,
    GROUPED,
    MOE,
    SIZES,
    SPECIAL,
    built,
    hugging_face,
)

LENGTH, KEY = 9, 2
PATTERNS = ExtractionConfig(attn_pattern=True, logits=True)
LOGITS = ExtractionConfig(logits=True)
ONE_ATTENTION = ("bloom", "codegen", "gemma2", "gpt_neo", "gptj", "mpt")  # eager alone
FAMILIES = [
    (name, attention)
    for name in CONFIGS
    for attention in ("eager", "sdpa")
    if attention == "eager" or name not in ONE_ATTENTION
]
FOUR_LAYERS = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "sliding_window": 4,
}
GEMMA3N = {
    **GROUPED,
    "head_dim": 8,
    "vocab_size_per_layer_input": 40,
    "hidden_size_per_layer_input": 4,
    "laurel_rank": 4,
    "activation_sparsity_pattern": [0.0, 0.0],
    "layer_types": ["sliding_attention", "full_attention"],
    "num_kv_shared_layers": 0,
}
BART = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 24}
CTRL = {"n_embd": 32, "n_layer": 2, "n_head": 4, "dff": 24, "n_positions": 16}
SPECIAL_ONES: dict[str, Callable[[], nn.Module]] = {
    "attention sinks": lambda: built("gpt_oss, sinks"),
    "mask given by its place": lambda: built("bert, decoder"),
    "mask given by its place, eager": lambda: hugging_face(
        "bert", {**SIZES, "is_decoder": True, "attn_implementation": "eager"}
    ),
    "one key head": lambda: built("gpt_bigcode, multi-query"),
    "norms over heads": lambda: built("olmo2, norm over heads"),
    "latent keys": lambda: hugging_face("deepseek_v3", DEEPSEEK),
    "heads of two sizes": lambda: built("gemma4, full"),
    "keys of an earlier layer": lambda: hugging_face("gemma4_text", {**GEMMA4, **FOUR_LAYERS}),
    "several streams": lambda: hugging_face("gemma3n_text", GEMMA3N),
    "heads that are not understood": lambda: hugging_face("diffllama", GROUPED),
    "experts for queries": lambda: hugging_face("jetmoe", {**SIZES, "kv_channels": 8, **MOE}),
    "decoder": lambda: hugging_face("bart", {**BART, "max_position_embeddings": 16}),
    "mask of another library": lambda: hugging_face("ctrl", CTRL),
    "window": lambda: tiny("mistral", sliding_window=4),
    "window, eager": lambda: tiny("mistral", sliding_window=4, attn_implementation="eager"),
    "window of its own": lambda: tiny(
        "gpt_neo", attention_types=[[["global", "local"], 1]], window_size=4
    ),
    "ALiBi in its mask": lambda: tiny("falcon", alibi=True),
    "ALiBi in its mask, eager": lambda: tiny("falcon", alibi=True, attn_implementation="eager"),
}


def ids(model: nn.Module, examples: int = 2) -> Tensor:
    count = vocabulary_size(model) or 0
    generator = torch.Generator().manual_seed(1)
    return torch.randint(count, (examples, LENGTH), generator=generator)


def everywhere(model: nn.Module, **where: Any) -> list[Intervention]:
    """The knockout in every layer: of what stands at KEY, after it, unless told otherwise."""
    where = {"positions": slice(KEY + 1, None), "key_positions": KEY, **where}
    numbers = range(len(find_sites(model).layers))
    return [Intervention("knockout", f"attn_pattern_{number}", **where) for number in numbers]


def renormalised(pattern: Tensor, cut: Tensor) -> Tensor:
    """What the softmax makes of the scores that are left, by another way; a sink keeps its own."""
    kept = pattern * ~cut
    whole = 1 - pattern.sum(-1, keepdim=True) + kept.sum(-1, keepdim=True)
    return torch.where(cut.any(-1, keepdim=True), kept / whole, pattern)


@pytest.mark.parametrize("head", [None, 2])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_left_of_the_pattern_is_renormalised(name: str, head: int | None) -> None:
    model = tiny(name)
    target = "attn_pattern_1" if head is None else f"attn_pattern_L1H{head}"
    cut = torch.zeros(4, LENGTH, LENGTH, dtype=torch.bool)
    cut[slice(None) if head is None else head, [[5], [LENGTH - 1]], [0, 4, 7]] = True
    given = Intervention("knockout", target, [5, "last"], key_positions=[0, 4, -2])
    plain, found = (extract(model, ids(model), PATTERNS, w) for w in ((), [given]))
    pattern = found["attn_pattern_1"]
    torch.testing.assert_close(pattern, renormalised(plain["attn_pattern_1"], cut))
    assert not pattern[:, cut].any()
    assert (plain["attn_pattern_1"][:, cut & torch.ones(LENGTH, LENGTH).tril().bool()] > 0).all()
    assert torch.equal(pattern[:, ~cut.any(-1)], plain["attn_pattern_1"][:, ~cut.any(-1)])
    assert torch.equal(found["attn_pattern_0"], plain["attn_pattern_0"])
    changed = (found["logits"] - plain["logits"]).abs().amax((0, 2)) > 1e-5
    assert changed.nonzero()[:, 0].tolist() == [5, LENGTH - 1]
    without = extract(model, ids(model), LOGITS, [given])["logits"]  # perhaps by sdpa
    torch.testing.assert_close(without, found["logits"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "attention"), FAMILIES)
def test_a_token_that_is_knocked_out_everywhere_reaches_no_other(name: str, attention: str) -> None:
    reaches_no_other(tiny(name, attn_implementation=attention))


@pytest.mark.parametrize("kind", SPECIAL_ONES)
def test_a_token_reaches_no_other_in_models_of_all_kinds(kind: str) -> None:
    reaches_no_other(SPECIAL_ONES[kind]())


def reaches_no_other(model: nn.Module) -> None:
    """Another token at KEY changes no logit behind it, and it does without the knockout."""
    first = ids(model)
    other = first.clone()
    other[:, KEY] = (other[:, KEY] + 1) % (vocabulary_size(model) or 0)
    plain, free = (extract(model, tokens, LOGITS)["logits"] for tokens in (first, other))
    assert (plain - free)[:, KEY + 1 :].abs().amax(-1).min() > 1e-4
    cut = everywhere(model)
    one, two = (extract(model, tokens, LOGITS, cut)["logits"] for tokens in (first, other))
    torch.testing.assert_close(one[:, KEY + 1 :], two[:, KEY + 1 :], rtol=0, atol=1e-6)
    torch.testing.assert_close(one[:, : KEY + 1], plain[:, : KEY + 1])
    assert (one - plain)[:, KEY + 1 :].abs().amax(-1).min() > 1e-4


def test_a_sink_keeps_its_share() -> None:
    model = built("gpt_oss, sinks")
    given = Intervention("knockout", "attn_pattern_L0H1", -1, key_positions=slice(0, 5))
    plain, found = (
        extract(model, ids(model), PATTERNS, w)["attn_pattern_0"] for w in ((), [given])
    )
    cut = torch.zeros(4, LENGTH, LENGTH, dtype=torch.bool)
    cut[1, -1, :5] = True
    torch.testing.assert_close(found, renormalised(plain, cut))
    assert (found[:, 1, -1].sum(-1) < 0.99).all()


@pytest.mark.parametrize("name", ["gpt2", "llama", "mpt", "falcon"])
def test_knockouts_of_one_layer_add_up(name: str) -> None:
    model = tiny(name)
    apart = [
        Intervention("knockout", "attn_pattern_1", 5, key_positions=1),
        Intervention("knockout", "attn_pattern_L1H3", 5, key_positions=[2]),
        Intervention("knockout", "attn_pattern_1", 7, key_positions=1),
        Intervention("knockout", "attn_pattern_1", [5, 6], key_positions=3),
        Intervention("knockout", "attn_pattern_L1H0", "last", key_positions=slice(0, 2)),
        Intervention("knockout", "attn_pattern_L1H0", "last", key_positions=5),
    ]
    plain = extract(model, ids(model), PATTERNS)["attn_pattern_1"]
    cut = torch.zeros(4, LENGTH, LENGTH, dtype=torch.bool)
    cut[:, 5, [1, 3]] = cut[:, 7, 1] = cut[3, 5, 2] = cut[:, 6, 3] = cut[0, -1, [0, 1, 5]] = True
    for order in (apart, apart[::-1]):
        found = extract(model, ids(model), PATTERNS, order)["attn_pattern_1"]
        torch.testing.assert_close(found, renormalised(plain, cut))
        assert not found[:, cut].any()


def test_they_stand_beside_other_interventions() -> None:
    """Values of zero at a key are a knockout that shares nothing among the others."""
    model = tiny("llama")
    zero = Intervention("zero", "values_1", positions=KEY)
    cut = Intervention("knockout", "attn_pattern_1", "last", key_positions=KEY)
    plain = extract(model, ids(model), PATTERNS)
    both = [extract(model, ids(model), PATTERNS, order) for order in ([zero, cut], [cut, zero])]
    assert torch.equal(both[0]["logits"], both[1]["logits"])
    assert not both[0]["attn_pattern_1"][:, :, -1, KEY].any()
    alone = extract(model, ids(model), PATTERNS, [cut])
    torch.testing.assert_close(both[0]["logits"][:, -1], alone["logits"][:, -1])
    zeroed = extract(model, ids(model), PATTERNS, [zero])
    torch.testing.assert_close(both[0]["logits"][:, :-1], zeroed["logits"][:, :-1])
    for one in (plain, zeroed):
        assert (both[0]["logits"] - one["logits"])[:, -1].abs().max() > 1e-3


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_have_exact_zeros_too(dtype: torch.dtype, attention: str) -> None:
    model = tiny("llama", attn_implementation=attention).to(dtype)
    pattern = extract(model, ids(model), PATTERNS, everywhere(model))["attn_pattern_1"]
    assert not pattern[:, :, KEY + 1 :, KEY].any()
    assert pattern[:, :, KEY + 1 :].sum(-1).min() > 0.9
    other = ids(model)
    other[:, KEY] = (other[:, KEY] + 1) % VOCABULARY
    one, two = (
        extract(model, tokens, LOGITS, everywhere(model))["logits"]
        for tokens in (ids(model), other)
    )
    torch.testing.assert_close(one[:, KEY + 1 :], two[:, KEY + 1 :], rtol=0, atol=1e-6)


def test_sequences_of_several_lengths_have_positions_of_their_own() -> None:
    model = tiny("gpt2")
    sequences = [row[:length] for row, length in zip(ids(model, 4), (5, 7, 5, 9), strict=True)]
    cut = everywhere(model, positions="last", key_positions=[0, -2])
    last = ExtractionConfig(logits=True, resid_out=True, target_token_positions="last")
    together = extract(model, sequences, last, cut)
    for number, sequence in enumerate(sequences):
        alone = extract(model, sequence[None], last, cut)
        for name in ("logits", "resid_out_0"):
            torch.testing.assert_close(together[name][number], alone[name][0])
        plain = extract(model, sequence[None], last)
        assert (plain["logits"] - alone["logits"]).abs().max() > 1e-4
    for length, keys, message in (
        (2, [3, -2], "key_positions of 'attn_pattern_0': position 3 is out of range"),
        (4, [0, -1, -2, -3], "token 3 attend to tokens 0 to 3 only"),
    ):
        short = [*sequences, ids(model)[0, :length]]
        with no_runs(model, 2, 4, 5, 7, 9), pytest.raises(ValueError, match=message):
            extract(model, short, last, everywhere(model, positions="last", key_positions=keys))


@contextmanager
def no_runs(model: nn.Module, *lengths: int) -> Iterator[None]:
    """Have the model run on no sequence of these lengths; those it is tried with are 6 and 8."""
    seen: list[int] = []
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    handle = embedding.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    yield
    handle.remove()
    assert not set(seen) & set(lengths)


def test_a_window_leaves_a_token_a_key_or_is_refused() -> None:
    for attention in ("eager", "sdpa"):
        model = tiny("mistral", sliding_window=3, attn_implementation=attention)
        for head in ("0", "L0H1"):
            cut = Intervention(
                "knockout", f"attn_pattern_{head}", [2, 7], key_positions=[5, 6, 7, 0]
            )
            with pytest.raises(
                ValueError, match="self_attn lets token 7 attend to tokens 5 to 7 only"
            ):
                extract(model, ids(model), LOGITS, [cut])
        assert not hooked(model)
        fine = Intervention("knockout", "attn_pattern_0", [2, 7], key_positions=[5, 6, 0])
        pattern = extract(model, ids(model), PATTERNS, [fine])["attn_pattern_0"]
        torch.testing.assert_close(pattern[:, :, 7, 7], torch.ones(2, 4))


def hooked(model: nn.Module) -> bool:
    return any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


MINIMAX = {
    **GROUPED,
    "num_local_experts": 2,
    "layer_types": ["full_attention", "linear_attention"],
    "block_size": 4,
}
XGLM = {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 24}
REFUSED: dict[str, tuple[str, Callable[[], nn.Module], str]] = {
    "linear attention": (
        "attn_pattern_1",
        lambda: hugging_face("minimax", MINIMAX),
        "'attn_pattern_1' cannot be knocked out in MiniMaxForCausalLM: ",
    ),
    "attends to later tokens": (
        "attn_pattern_0",
        lambda: hugging_face("bert", SIZES),
        "in BertLMHeadModel: its attention is not causal",
    ),
    "no mask": (
        "attn_pattern_1",
        lambda: hugging_face("openai-gpt", {**GPT2, **SPECIAL}),
        "in OpenAIGPTLMHeadModel: its attention does not go by the mask",
    ),
    "masks of its own for heads": (
        "attn_pattern_L0H1",
        lambda: hugging_face("doge", GROUPED),
        "'attn_pattern_L0H1' cannot be knocked out in DogeForCausalLM: The size of tensor",
    ),
    "one mask for all heads": (
        "attn_pattern_L1H1",
        lambda: hugging_face("xglm", {**XGLM, "max_position_embeddings": 16}),
        "'attn_pattern_L1H1' cannot be knocked out in XGLMForCausalLM: Attention mask should be",
    ),
    "no attention": (
        "attn_pattern_0",
        lambda: hugging_face("lfm2", {**GROUPED, "layer_types": ["conv", "full_attention"]}),
        "layer 0 of Lfm2ForCausalLM has no attention",
    ),
    "heads that are not understood": (
        "attn_pattern_L1H1",
        lambda: hugging_face("diffllama", GROUPED),
        "cannot be told apart.* knock out all heads, 'attn_pattern_1'",
    ),
    "kernel of its own": (
        "attn_pattern_0",
        lambda: of_its_own(tiny("llama")),
        r"its attention \(own\) takes no mask: load the model with attn_implementation='sdpa'",
    ),
    "mask without heads": (
        "attn_pattern_0",
        lambda: given_masks(tiny("llama"), lambda length: (length, length)),
        r"is given a Tensor \(6, 6\) for its mask, and no Tensor \(example, head, token, token\)",
    ),
    "mask for more keys": (
        "attn_pattern_0",
        lambda: given_masks(tiny("llama"), lambda length: (1, 1, length, length + 2)),
        r"is given a Tensor \(1, 1, 6, 8\) for its mask, and no Tensor \(example, head",
    ),
    "mask of True alone": (
        "attn_pattern_0",
        lambda: given_masks(tiny("llama"), lambda length: (1, 1, length, length), torch.bool),
        "treats the first token's own key as those after it",
    ),
    "a module of two layers": ("attn_pattern_0", lambda: shared(tiny("llama")), "runs 2 times"),
    "attention that forgets its mask": (
        "attn_pattern_1",
        lambda: forgetful(tiny("gpt2")),
        "in GPT2LMHeadModel: its attention does not go by the mask that it is given",
    ),
    "attention that sees nothing": (
        "attn_pattern_1",
        lambda: blind(tiny("llama")),
        "nothing of one token's keys and values was seen to reach another",
    ),
}


def of_its_own(model: Any) -> nn.Module:
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register("own", sdpa_attention_forward)
    model.set_attn_implementation("own")
    return model


def given_masks(
    model: Any, shape: Callable[[int], tuple[int, ...]], dtype: torch.dtype = torch.float32
) -> nn.Module:
    def give(module: Any, args: Any, kwargs: Any) -> Any:
        if len(module.self_attn._forward_pre_hooks) < 2:  # nothing is knocked out
            return None
        return args, {**kwargs, "attention_mask": torch.ones(shape(args[0].shape[1]), dtype=dtype)}

    for layer in model.model.layers:
        layer.register_forward_pre_hook(give, with_kwargs=True)
    return model


def shared(model: Any) -> nn.Module:
    model.model.layers[1].self_attn = model.model.layers[0].self_attn
    return model


def forgetful(model: Any) -> nn.Module:
    attention = model.transformer.h[1].attn
    forward = attention.forward
    attention.forward = lambda *args, attention_mask=None, **rest: forward(*args, **rest)
    return model


def blind(model: Any) -> nn.Module:
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.zero_()
    return model


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_knocked_out_is_refused_before_anything_runs(kind: str) -> None:
    target, make, message = REFUSED[kind]
    model = make()
    find_sites(model)
    before = hooked(model)
    given = Intervention("knockout", target, [3, 5], key_positions=[1])
    with no_runs(model, LENGTH), pytest.raises(ValueError, match=message):
        extract(model, ids(model), LOGITS, [given])
    assert hooked(model) == before


def test_a_head_that_attends_to_itself_alone_is_no_reason_to_refuse() -> None:
    """Large biases of queries and keys make such heads, whatever the tokens are."""
    model = tiny("phi")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.fill_(100 if name.endswith("bias") else 0)
    plain = extract(model, ids(model), PATTERNS)["attn_pattern_1"]
    assert torch.equal(plain, torch.eye(LENGTH).expand_as(plain))
    given = Intervention("knockout", "attn_pattern_L1H2", "last", key_positions="last")
    found = extract(model, ids(model), PATTERNS, [given])["attn_pattern_1"]
    assert not found[:, 2, -1, -1].any()
    torch.testing.assert_close(found[:, 2, -1].sum(-1), torch.ones(2))


def test_each_attention_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Sequence[Any]] = []
    monkeypatch.setattr(knockout, "_try", lambda *given: tried.append(given))
    model: Any = tiny("llama")
    cut = everywhere(model)
    for _ in range(2):
        Extractor(model, LOGITS, cut)
    assert len(tried) == 1
    Extractor(model, PATTERNS, cut)  # eager meanwhile
    assert len(tried) == 2
    Extractor(model, LOGITS, cut[:1])
    Extractor(model, LOGITS, [Intervention("knockout", "attn_pattern_L0H1", 3, key_positions=1)])
    assert len(tried) == 4
    Extractor(model, LOGITS, ())
    assert len(tried) == 4


@pytest.mark.parametrize(
    ("target", "queries", "keys", "message"),
    [
        ("attn_pattern_2", 3, 1, "'attn_pattern_2': the model has layers 0 to 1"),
        ("attn_pattern_L2H0", 3, 1, "'attn_pattern_L2H0': the model has layers 0 to 1"),
        ("attn_pattern_L1H4", 3, 1, "'attn_pattern_L1H4': the layer has heads 0 to 3"),
        ("attn_pattern_1", 9, 1, "^positions of 'attn_pattern_1': position 9 is out of range"),
        ("attn_pattern_1", 3, [-10], "^key_positions of 'attn_pattern_1': position -10 is out"),
        ("attn_pattern_1", 3, [1, 1], "key_positions of 'attn_pattern_1': .* names a token twice"),
        ("attn_pattern_1", 3, slice(4, 4), "key_positions of 'attn_pattern_1': .* names no token"),
        ("attn_pattern_1", [1, 3], [4, 5], "no token up to 3 attends to 4 or to what follows"),
        ("attn_pattern_1", "all", 0, "layer 1 lets token 0 attend to tokens 0 to 0 only"),
        ("attn_pattern_1", [8, 4], slice(0, 5), "layer 1 lets token 4 attend to tokens 0 to 4"),
        ("attn_pattern_L0H2", 8, "all", "layer 0 lets token 8 attend to tokens 0 to 8 only"),
    ],
)
def test_what_leaves_nothing_or_changes_nothing_is_refused(
    target: str, queries: Any, keys: Any, message: str
) -> None:
    model = tiny("llama")
    with pytest.raises(ValueError, match=message):
        extract(model, ids(model), LOGITS, [Intervention("knockout", target, queries, None, keys)])
    assert not hooked(model)


def test_what_two_knockouts_leave_nothing_of_together_is_refused() -> None:
    model = tiny("llama")
    of_all = Intervention("knockout", "attn_pattern_1", 3, key_positions=[0, 1])
    of_one = Intervention("knockout", "attn_pattern_L1H2", 3, key_positions=[2, 3])
    for given in ([of_all], [of_one]):
        extract(model, ids(model), LOGITS, given)
    with pytest.raises(ValueError, match="lets token 3 attend to tokens 0 to 3 only"):
        extract(model, ids(model), LOGITS, [of_one, of_all])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "knockout", "target": "attn_pattern_0"}, "'knockout' needs key_positions="),
        (
            {"kind": "zero", "target": "mlp_out_0", "key_positions": 1},
            "'zero' takes no key_positions",
        ),
        (
            {"kind": "zero", "target": "attn_pattern_0"},
            "'zero' of 'attn_pattern_0': .* can be knocked",
        ),
        (
            {"kind": "knockout", "target": "mlp_out_0", "key_positions": 1},
            "'knockout' of 'mlp_out_0': .* nothing else",
        ),
        (
            {"kind": "knockout", "target": "attn_pattern_0", "key_positions": 1, "source": 0},
            "'knockout' takes no source",
        ),
        ({"kind": "knockout", "target": "attn_pattern"}, "for 'knockout' attn_pattern_0 or"),
    ],
)
def test_knockouts_that_make_no_sense_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Intervention(**arguments)


def test_knockouts_are_written_down_and_others_as_before() -> None:
    model = tiny("gpt2")
    given = Intervention("knockout", "attn_pattern_L0H1", "last", key_positions=[0, slice(1, 3)])
    zero = Intervention("zero", "mlp_out_1")
    assert extract(model, ids(model), LOGITS, [given, zero]).metadata["interventions"] == [
        {
            "kind": "knockout",
            "target": "attn_pattern_L0H1",
            "positions": "last",
            "source": None,
            "key_positions": [0, [1, 3, None]],
        },
        {"kind": "zero", "target": "mlp_out_1", "positions": "all", "source": None},
    ]


def test_a_store_knows_its_knockouts(tmp_path: Path) -> None:
    model, rows = tiny("gpt2"), token_rows(5, LENGTH, seed=1)
    cut = everywhere(model, positions="last")

    def run(given: Sequence[Intervention]) -> Any:
        return basinscope.extract_dataset(
            model, rows, LOGITS, output=tmp_path / "s.zarr", batch_size=2,
            interventions=given, progress=False,
        )  # fmt: skip

    tree = run(cut)
    expected = extract(model, torch.as_tensor(rows["input_ids"][:]), LOGITS, cut)["logits"]
    found = torch.as_tensor(tree["logits"].to_numpy())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert run(cut).attrs == tree.attrs
    with pytest.raises(StoreMismatchError, match="interventions"):
        run(everywhere(model, positions="last", key_positions=3))


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"n_key_value_heads": 2},
        {"positional_embedding_type": "alibi"},
        {"use_local_attn": True, "window_size": 4, "attn_types": ["local", "global"]},
    ],
)
def test_scores_of_transformer_lens_are_masked(settings: dict[str, Any]) -> None:
    pytest.importorskip("transformer_lens.HookedTransformer")
    from tests.peer.test_transformer_lens import hooked as lens

    model = lens("plain", **settings)
    reaches_no_other(model)
    cut = torch.zeros(4, LENGTH, LENGTH, dtype=torch.bool)
    cut[1, -1, 6:8] = True
    given = Intervention("knockout", "attn_pattern_L0H1", "last", key_positions=[6, -2])
    plain, found = (
        extract(model, ids(model), PATTERNS, w)["attn_pattern_0"] for w in ((), [given])
    )
    torch.testing.assert_close(found, renormalised(plain, cut))
    assert not found[:, cut].any()
    if "window_size" in settings:
        every = Intervention("knockout", "attn_pattern_0", "last", key_positions=slice(4, None))
        with pytest.raises(ValueError, match="lets token 8 attend to tokens 5 to 8 only"):
            extract(model, ids(model), LOGITS, [every])


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "llama", "phi3"])
def test_a_bridge_is_knocked_out_as_the_model_inside(kind: str) -> None:
    pytest.importorskip("transformer_lens.model_bridge.sources._bridge_builder")
    from tests.models.test_bridge import bridge, plain

    model, bare = bridge(kind), plain(kind)
    given = [*everywhere(bare), Intervention("knockout", "attn_pattern_L1H1", 5, key_positions=4)]
    tokens = ids(bare)
    expected = extract(bare, tokens, PATTERNS, given)
    for found in (extract(model, tokens, PATTERNS, given), extract(model, tokens, LOGITS, given)):
        for name in found:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(token_logits(inside_bridge(model), tokens), bare(tokens).logits)
