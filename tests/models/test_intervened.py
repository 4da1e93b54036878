"""Interventions on models that users run: against whole sequences, extracted at every step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

import basinscope
from basinscope import ExtractionConfig, Intervention, extract, intervened
from basinscope.models.positions import Positions
from tests.models.models_tiny import CONFIGS, VOCABULARY, tiny

PROMPT, STEPS, WIDTH = 6, 3, 16
LOGITS = ExtractionConfig(logits=True)
SOURCES = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(5))
REPEATS = torch.tensor([[5, 6, 7, 5, 6, 7]])  # so that prompt lookup finds what may follow
WINDOW = {"sliding_window": 4}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {}),
    "gpt2, eager": ("gpt2", {"attn_implementation": "eager"}),
    "llama": ("llama", {}),
    "gpt_neox": ("gpt_neox", {}),
    "gemma2": ("gemma2", WINDOW),
    "mistral": ("mistral", WINDOW),
    "mistral, eager": ("mistral", {**WINDOW, "attn_implementation": "eager"}),
    "granite": ("granite", {}),
}
AFTER = slice(PROMPT, None)
BATCHES = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")
SETS: dict[str, list[Intervention]] = {
    "add": [
        Intervention("add", "resid_out_0", source=2 * SOURCES[0]),
        Intervention("add", "resid_in_1", AFTER, source=SOURCES[1]),
    ],
    "add to what is generated": [Intervention("add", "mlp_out_0", AFTER, source=SOURCES[0])],
    "zero": [
        Intervention("zero", "head_out_L0H1", "last"),
        Intervention("zero", "mlp_out_1", slice(-2, None)),
        Intervention("zero", "keys_L0H0", [1]),
    ],
    "mean": [Intervention("mean", "resid_out_0"), Intervention("mean", "values_1", -1)],
    "patch": [
        Intervention("patch", "attn_out_0", slice(1, None, 2), source=0),
        Intervention("patch", "mlp_out_0", [1, -1], source=SOURCES[:2]),
        Intervention("patch", "attn_in_1", [0, slice(PROMPT + 1, None)], source=SOURCES[2]),
    ],
    "knockout": [
        Intervention("knockout", "attn_pattern_1", AFTER, key_positions=[0, 4]),
        Intervention("knockout", "attn_pattern_0", slice(2, None), key_positions=1),
        Intervention("knockout", "attn_pattern_0", "last", key_positions=3),
    ],
    "knockout of what was generated": [
        Intervention(
            "knockout", "attn_pattern_1", slice(2, None), key_positions=slice(PROMPT, None)
        )
    ],
    "knockout in a head": [
        Intervention("knockout", "attn_pattern_L1H2", slice(3, None), key_positions=slice(1, 3))
    ],
}


MERGED = {
    "changes": [*SETS["zero"], *SETS["patch"], *SETS["mean"], *SETS["add"]],
    "knockouts": [*SETS["knockout"], *SETS["knockout of what was generated"]],
}


@cache
def model_of(name: str) -> Any:
    kind, settings = MODELS[name]
    return tiny(kind, **settings)


def ids(examples: int = 2, length: int = PROMPT) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(1, VOCABULARY, (examples, length), generator=generator)


def generated(model: Any, prompt: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
    settings = {"max_new_tokens": STEPS, "do_sample": False, "pad_token_id": 0, **settings}
    settings |= {"output_logits": True, "return_dict_in_generate": True, "eos_token_id": None}
    made = model.generate(prompt, **settings)
    return made.sequences, torch.stack(made.logits, 1)


def recomputed(
    model: nn.Module, prompt: Tensor, interventions: Sequence[Intervention], steps: int = STEPS
) -> tuple[Tensor, Tensor]:
    """Tokens, and the logits that chose them, from whole sequences and positions by number."""
    tokens, logits = prompt, []
    for _ in range(steps):
        length = tokens.shape[1]
        now = []
        for each in interventions:
            positions = numbers(each.positions, prompt.shape[1], length)
            keys = numbers(each.key_positions, prompt.shape[1], length)
            if positions and (each.key_positions is None or keys):
                changes = {} if each.key_positions is None else {"key_positions": keys}
                now.append(replace(each, positions=positions, **changes))
        logits.append(extract(model, tokens, LOGITS, now)["logits"][:, -1])
        tokens = torch.cat([tokens, logits[-1].argmax(-1, keepdim=True)], 1)
    return tokens, torch.stack(logits, 1)


def numbers(positions: Positions | None, prompt: int, length: int) -> list[int]:
    """What positions mean, written down another way."""
    if positions is None:
        return []
    if isinstance(positions, list):
        return [number for part in positions for number in numbers(part, prompt, length)]
    if positions == "all":
        return list(range(length))
    if isinstance(positions, slice):
        start = positions.start or 0
        start = start + prompt if start < 0 else start
        return list(range(start, positions.stop or length, positions.step or 1))
    assert not isinstance(positions, Sequence) or positions == "last"
    return [prompt - 1 if positions == "last" else positions % prompt]  # type: ignore[operator]


def untouched(model: nn.Module) -> bool:
    hooks = any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    return not hooks and not {"forward", "generate", *BATCHES} & set(vars(model))


@pytest.mark.parametrize("kind", MERGED)
@pytest.mark.parametrize("name", MODELS)
def test_generation_is_that_of_whole_sequences(name: str, kind: str) -> None:
    as_whole_sequences(model_of(name), MERGED[kind])


@pytest.mark.parametrize("kind", SETS)
def test_each_kind_of_intervention_goes_on(kind: str) -> None:
    as_whole_sequences(model_of("llama"), SETS[kind])


@pytest.mark.slow
@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize("name", CONFIGS)
def test_each_kind_goes_on_in_every_model(name: str, kind: str) -> None:
    if kind == "knockout in a head" and name in ("bloom", "gemma2", "gpt_neo", "mpt"):
        pytest.skip("one mask for all heads")
    as_whole_sequences(tiny(name), SETS[kind])


def as_whole_sequences(model: nn.Module, given: list[Intervention]) -> None:
    """Generate with a cache and without, and compare tokens and logits with the oracle's."""
    expected = recomputed(model, ids(), given)
    plain = generated(model, ids())[1]
    with intervened(model, given):
        found = generated(model, ids())
        without = generated(model, ids(), use_cache=False)
    for tokens, logits in (found, without):
        assert torch.equal(tokens, expected[0])
        torch.testing.assert_close(logits, expected[1], rtol=0, atol=1e-4)
    assert (expected[1] - plain).abs().amax() > 1e-4
    assert untouched(model)
    torch.testing.assert_close(generated(model, ids())[1], plain, rtol=0, atol=0)


def test_a_vector_that_is_added_is_a_bias() -> None:
    """However generate() chooses tokens, orders its cache, or runs what it guessed."""
    model = model_of("gpt2")
    biased = copy.deepcopy(model)
    with torch.no_grad():
        biased.transformer.h[0].mlp.c_proj.bias += 3 * SOURCES[0]
    ways: list[dict[str, Any]] = [
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 2, "use_cache": False},
        {"do_sample": True, "num_return_sequences": 3},
        {"prompt_lookup_num_tokens": 2},
        {"prefill_chunk_size": 4},
        {"cache_implementation": "static"},
    ]
    for way in ways:
        one = REPEATS if "prompt_lookup_num_tokens" in way else ids()
        settings = {"max_new_tokens": 5, "eos_token_id": None, "pad_token_id": 0, **way}
        torch.manual_seed(1)
        expected = biased.generate(one, **settings)
        torch.manual_seed(1)
        with intervened(model, [Intervention("add", "mlp_out_0", source=3 * SOURCES[0])]):
            assert torch.equal(model.generate(one, **settings), expected), way


@pytest.mark.parametrize(
    "way",
    [
        {"prefill_chunk_size": 4},
        {"prompt_lookup_num_tokens": 2},
        {"cache_implementation": "static"},
    ],
)
def test_positions_are_the_prompts_however_it_runs(way: dict[str, Any]) -> None:
    model = model_of("mistral, eager" if "cache_implementation" in way else "llama")
    given = [
        Intervention("add", "resid_out_0", [-1, 1], source=4 * SOURCES[:2]),
        Intervention("zero", "attn_out_1", AFTER),
        Intervention("knockout", "attn_pattern_0", slice(-1, None), key_positions=[2, 3]),
    ]
    expected = recomputed(model, REPEATS, given)[0]
    assert not torch.equal(expected, generated(model, REPEATS)[0])
    with intervened(model, given):
        found = model.generate(
            REPEATS, max_new_tokens=STEPS, do_sample=False, eos_token_id=None, **way
        )
    assert torch.equal(found, expected)


@torch.no_grad()
def test_passes_of_ones_own_begin_and_go_on() -> None:
    model = model_of("gpt2")
    given = [
        Intervention("add", "resid_out_0", "last", source=SOURCES[0]),
        Intervention("zero", "mlp_out_1", slice(4, None)),
    ]
    first, second = ids(2, 8), ids(1, 5) + 0
    whole = [
        extract(model, tokens, LOGITS, [replace(given[0], positions=end), given[1]])["logits"]
        for tokens, end in ((first, PROMPT - 1), (second, 3))
    ]
    with intervened(model, given):
        alone = model(first[:, :PROMPT]).logits
        one = model(first[:, :PROMPT])
        two = model(second[:, :4])  # between: another sequence, of another length
        more = model(first[:, PROMPT:], past_key_values=one.past_key_values)  # several at once
        last = model(second[:, 4:], past_key_values=two.past_key_values)
        tuples = model(first[:, :PROMPT], return_dict=False)
        again = model(first[:, PROMPT:], past_key_values=tuples[1])
        longer = model(first).logits
    for found, expected in (
        (alone, whole[0][:, :PROMPT]),
        (more.logits, whole[0][:, PROMPT:]),
        (again.logits, whole[0][:, PROMPT:]),
        (last.logits, whole[1][:, 4:]),
        (longer, extract(model, first, LOGITS, given)["logits"]),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_mode_and_gradients_are_the_users() -> None:
    model = copy.deepcopy(model_of("llama")).train()
    steering = torch.zeros(WIDTH, requires_grad=True)
    share = torch.zeros(WIDTH, requires_grad=True)
    given = [
        Intervention("add", "resid_out_0", "last", source=steering),
        Intervention("patch", "head_out_L1H2", "last", source=share),
    ]
    with intervened(model, given):
        assert model.training
        model(ids()).logits.sum().backward()
    assert all(module.training for module in model.modules())
    for vector in (steering, share):
        assert vector.grad is not None
        assert vector.grad.abs().max() > 0
    weight = model.model.layers[1].self_attn.o_proj.weight
    with intervened(model, [Intervention("patch", "head_out_L1H2", source=share)]):
        model.zero_grad()
        model(ids()).logits.sum().backward()
    assert weight.grad[:, 8:12].abs().max() < 1e-6  # that head's share does not depend on it
    assert weight.grad[:, :8].abs().max() > 1e-3


@torch.no_grad()
def test_blocks_add_up_and_are_left_after_an_error() -> None:
    model = model_of("gpt2")
    given = [
        Intervention("zero", "mlp_out_0", "last"),
        Intervention("knockout", "attn_pattern_1", "last", key_positions=0),
        Intervention("patch", "values_0", slice(2, None), source=0),
    ]
    expected = recomputed(model, ids(), given)[0]
    with intervened(model, given[:1]):
        with intervened(model, given[1:]):
            assert torch.equal(generated(model, ids())[0], expected)
            inside = extract(model, ids(), LOGITS)["logits"]
        zeroed = generated(model, ids())[1]
    torch.testing.assert_close(inside, extract(model, ids(), LOGITS, given)["logits"])
    torch.testing.assert_close(zeroed, recomputed(model, ids(), given[:1])[1])
    for broken in ([Intervention("zero", "mlp_out_0", 9)], [Intervention("zero", "mlp_out_5")]):
        with pytest.raises(ValueError, match=r"out of range|layers 0 to 1"):  # noqa: SIM117
            with intervened(model, given), intervened(model, broken):
                generated(model, ids())
        assert untouched(model)


@torch.no_grad()
def test_a_copy_made_inside_is_itself_and_free_afterwards() -> None:
    model, given = model_of("gpt2"), [Intervention("zero", "mlp_out_0", "last")]
    with intervened(model, given):
        copied = copy.deepcopy(model)
        copied.lm_head.weight.mul_(2)  # and with it the embedding, which is tied
        inside = copied(ids()).logits
    expected = copy.deepcopy(model)
    expected.lm_head.weight.mul_(2)
    torch.testing.assert_close(inside, extract(expected, ids(), LOGITS, given)["logits"])
    torch.testing.assert_close(copied(ids()).logits, expected(ids()).logits)


def head_shares(model: nn.Module) -> tuple[ExtractionConfig, Any]:
    config = ExtractionConfig(head_out=True, attn_out=True, logits=True)
    return config, extract(model, ids(), config)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox", "granite"])
def test_a_heads_share_is_what_it_was_given(name: str) -> None:
    model, target = model_of(name), "head_out_L1H2"
    config, plain = head_shares(model)
    own = Intervention("patch", target, source=plain[target])
    back = extract(model, ids(), config, [own])
    torch.testing.assert_close(back["logits"], plain["logits"], rtol=1e-5, atol=1e-5)
    zeros = Intervention("patch", target, [1, 3], source=torch.zeros(WIDTH))
    zeroed = Intervention("zero", target, [1, 3])
    zero, same = (extract(model, ids(), config, [each]) for each in (zeros, zeroed))
    torch.testing.assert_close(zero["logits"], same["logits"], rtol=1e-4, atol=1e-5)
    given = Intervention("patch", target, [1, -1], source=SOURCES[:2])
    found = extract(model, ids(), config, [given])
    torch.testing.assert_close(found[target][:, [1, -1]], SOURCES[:2].expand(2, 2, WIDTH))
    change = (found["attn_out_1"] - plain["attn_out_1"])[:, [1, -1]]
    torch.testing.assert_close(change, SOURCES[:2] - plain[target][:, [1, -1]])
    for rest in ("head_out_L1H0", "head_out_L1H3"):
        assert torch.equal(found[rest], plain[rest])
    assert torch.equal(found["attn_out_1"][:, 2], plain["attn_out_1"][:, 2])


@pytest.mark.parametrize("name", ["gpt2", "granite"])
def test_what_is_done_to_heads_of_a_layer_is_done_in_order(name: str) -> None:
    model = model_of(name)
    config, plain = head_shares(model)
    given = Intervention("patch", "head_out_L1H2", source=SOURCES[0])
    added = Intervention("add", "head_out_L1H2", "last", source=SOURCES[1])
    zero = Intervention("zero", "head_out_L1H2")
    other = Intervention("mean", "head_out_L1H0", positions=2)
    one = extract(model, ids(), config, [given, other, zero])
    torch.testing.assert_close(
        one["logits"], extract(model, ids(), config, [other, zero])["logits"], rtol=1e-4, atol=1e-5
    )
    found = extract(model, ids(), config, [zero, given, other, added])
    expected = SOURCES[0].expand(2, PROMPT, WIDTH).clone()
    expected[:, -1] += SOURCES[1]
    torch.testing.assert_close(found["head_out_L1H2"], expected)
    mean = plain["head_out_L1H0"][:, 2].mean(0).expand(2, WIDTH)
    torch.testing.assert_close(found["head_out_L1H0"][:, 2], mean)
    alike = extract(model, ids(), config, [replace(added, target="attn_out_1")])
    torch.testing.assert_close(
        extract(model, ids(), config, [added])["logits"], alike["logits"], rtol=1e-4, atol=1e-5
    )


def test_heads_behind_norms_cannot_be_given_shares() -> None:
    model = model_of("gemma2")
    for kind in ("patch", "add"):
        given = Intervention(kind, "head_out_L0H1", source=SOURCES[0])  # type: ignore[arg-type]
        message = r"post_attention_layernorm .Gemma2RMSNorm. stands behind .* give attn_out_0"
        with pytest.raises(ValueError, match=message), intervened(model, [given]):
            pass
        with pytest.raises(ValueError, match=message):
            extract(model, ids(), LOGITS, [given])
    assert untouched(model)


@pytest.mark.parametrize("name", ["gpt2", "granite", "gemma2"])
@pytest.mark.parametrize(
    "target",
    ["embed", "resid_in_1", "resid_out_0", "attn_in_1", "attn_out_0", "mlp_out_1", "values_1",
     "queries_L1H2"],
)  # fmt: skip
def test_adding_is_patching_with_the_sum(name: str, target: str) -> None:
    model = model_of(name)
    kinds = {target.split("_L")[0].rstrip("_0123456789"): True}
    config = ExtractionConfig(**kinds, logits=True)  # type: ignore[arg-type]
    plain = extract(model, ids(), config)
    now = plain[target][:, [1, 3]]
    vector = torch.randn(now.shape[1:], generator=torch.Generator().manual_seed(1))
    added = extract(model, ids(), config, [Intervention("add", target, [1, 3], source=vector)])
    patch = Intervention("patch", target, [1, 3], source=now + vector)
    patched = extract(model, ids(), config, [patch])
    torch.testing.assert_close(added[target], patched[target])
    torch.testing.assert_close(added["logits"], patched["logits"], rtol=1e-4, atol=1e-5)
    assert (added["logits"] - plain["logits"]).abs().max() > 1e-3


REFUSED: dict[str, tuple[Intervention, dict[str, Any], str]] = {
    "no such layer": (Intervention("zero", "mlp_out_2"), {}, "layers 0 to 1"),
    "no such head": (Intervention("zero", "head_out_L0H4"), {}, "heads 0 to 3"),
    "no such position": (
        Intervention("zero", "mlp_out_0", PROMPT),
        {},
        "a sequence has 6 tokens",
    ),
    "no position": (
        Intervention("zero", "mlp_out_0", slice(PROMPT, PROMPT + 2)),
        {},
        "names no token of a sequence of 6",
    ),
    "knocked out of the past": (
        Intervention("knockout", "attn_pattern_0", "last", key_positions=AFTER),
        {},
        "no token up to 5 attends to 6",
    ),
    "no key left": (
        Intervention("knockout", "attn_pattern_0", AFTER, key_positions="all"),
        {},
        "lets token 6 attend to tokens 0 to 6 only",
    ),
    "positions of the prompt": (
        Intervention("patch", "mlp_out_0", source=SOURCES[:PROMPT]),
        {},
        r"token 6 was generated: give \(16,\), or positions .* such as slice\(0, 6\)",
    ),
    "another width": (
        Intervention("add", "mlp_out_0", "last", source=torch.ones(3)),
        {},
        r"give \(16,\), one for each position \(1, 16\)",
    ),
    "padding": (
        Intervention("zero", "mlp_out_0"),
        {"attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1], [1] * 6])},
        "give prompts of one length",
    ),
    "embeddings": (
        Intervention("zero", "embed"),
        {"inputs_embeds": torch.ones(2, PROMPT, WIDTH), "inputs": None},
        "'embed' was not changed",
    ),
    "rows of one prompt": (
        Intervention("mean", "mlp_out_0"),
        {"num_beams": 2},
        "2 prompts in 4 rows",
    ),
    "a static cache without masks": (
        Intervention("knockout", "attn_pattern_0", "last", key_positions=0),
        {"cache_implementation": "static"},
        "leave out cache_implementation='static'",
    ),
    "guidance": (
        Intervention("zero", "mlp_out_0", "last"),
        {"guidance_scale": 2.0},
        "a second sequence",
    ),
    "guidance without a cache": (
        Intervention("zero", "mlp_out_0", "last"),
        {"guidance_scale": 2.0, "use_cache": False, "negative_prompt_ids": ids(2, 9)},
        "a second sequence",
    ),
    "pages": (
        Intervention("zero", "mlp_out_0", "last"),
        {"cache_implementation": "paged"},
        "do not follow continuous batching.* leave out cache_implementation",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_makes_no_sense_is_refused(what: str) -> None:
    model = model_of("gpt2")
    intervention, settings, message = REFUSED[what]
    call = {"inputs": ids(), "max_new_tokens": STEPS, "eos_token_id": None, **settings}
    if call["inputs"] is None:
        del call["inputs"]
    with pytest.raises(ValueError, match=message), intervened(model, [intervention]):
        model.generate(**call, pad_token_id=0, do_sample=False)
    assert untouched(model)


@torch.no_grad()
def test_passes_whose_positions_cannot_be_known_are_refused() -> None:
    model, given = model_of("gpt2"), [Intervention("zero", "mlp_out_0", "last")]
    filled = model(ids()).past_key_values
    packed = torch.tensor([[0, 1, 2, 0, 1, 2]])
    with intervened(model, given):
        with pytest.raises(ValueError, match="holds 6 tokens that did not run inside this block"):
            model(ids()[:, :1], past_key_values=filled)
        with pytest.raises(ValueError, match="position_ids begin anew inside a row"):
            model(ids(1), position_ids=packed)
        with pytest.raises(ValueError, match="does not say how many tokens it holds"):
            model(ids()[:, :1], past_key_values=((torch.ones(1), torch.ones(1)),))
        with pytest.raises(ValueError, match="whose tokens cannot be counted"):
            model(None)
        for other in ({"cache": object()}, {"cu_seq_lens_q": torch.tensor([0, 2, 6])}):
            with pytest.raises(ValueError, match="does not say how many tokens of its sequence"):
                model(ids(1), **other)
    with intervened(model, given):
        for run in (lambda: None, lambda: model(ids()), lambda: model(ids(), labels=ids(2, 3))):
            with suppress(ValueError, IndexError):
                run()  # what ran before, or failed, says nothing about a part of the model
            with pytest.raises(ValueError, match="outside of the model's own forward pass"):
                model.transformer(ids())
    compiled = nn.Module()
    compiled._orig_mod = model  # as torch.compile has it
    with pytest.raises(ValueError, match=r"give, and run, the model .*_orig_mod"):
        intervened(compiled, given).__enter__()
    with pytest.raises(TypeError, match="must be a list of Intervention"):
        intervened(model, ["zero"]).__enter__()  # type: ignore[list-item]
    assert untouched(model)


@pytest.mark.parametrize("name", BATCHES)
def test_continuous_batching_is_refused_at_once(name: str) -> None:
    model = model_of("llama")
    with (
        pytest.raises(ValueError, match="do not follow continuous batching"),
        intervened(model, [Intervention("zero", "mlp_out_0", "last")]),
    ):
        getattr(model, name)([[1, 2]])
    assert untouched(model)


def test_guidance_of_a_generation_config_is_refused_and_no_guidance_is_not() -> None:
    model = copy.deepcopy(model_of("llama"))
    given, plain = [Intervention("zero", "mlp_out_0", "last")], model.generation_config
    guided = copy.deepcopy(plain)
    guided.guidance_scale = 2.0
    expected = recomputed(model, ids(), given)[0]
    with intervened(model, given):
        assert torch.equal(generated(model, ids(), guidance_scale=1)[0], expected)
        with pytest.raises(ValueError, match="a second sequence"):
            model.generate(ids(), generation_config=guided)
        with pytest.raises(ValueError, match="a second sequence"):
            model.generate(ids(), guided)
        model.generation_config = guided
        with pytest.raises(ValueError, match="a second sequence"):
            generated(model, ids())
        assert torch.equal(generated(model, ids(), guidance_scale=1)[0], expected)


ENDS = [
    Intervention("add", "resid_out_0", "last", source=4 * SOURCES[0]),
    Intervention("knockout", "attn_pattern_1", "last", key_positions=0),
]


@torch.no_grad()
def test_a_prompt_whose_first_tokens_are_in_a_cache_ends_where_it_does() -> None:
    """What ran before was changed where its own prompts ended, and stays so in the cache."""
    model = model_of("llama")
    turn = ids(2, PROMPT + 4)
    for begin in (lambda c: model(ids(2)[:, :3], past_key_values=c), None):
        held = DynamicCache(config=model.config)
        with intervened(model, ENDS):
            if begin is not None:
                begin(held)
                first, ends = ids(2), [2, PROMPT - 1]
            else:
                one = generated(model, ids(2, 4), past_key_values=held)[0]
                first, ends = torch.cat([one, turn[:, :3]], 1), [3, one.shape[1] + 2]
            settings: dict[str, Any] = {"past_key_values": held}
            found = generated(model, first, **settings)
        numbered = [replace(each, positions=ends) for each in ENDS]
        expected = recomputed(model, first, numbered)
        assert torch.equal(found[0], expected[0])
        torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-4)
        wrong = recomputed(model, first, ENDS)[1]
        assert (wrong - expected[1]).abs().max() > 1e-4


@torch.no_grad()
def test_new_tokens_alone_go_on_with_a_cache_as_their_mask_says() -> None:
    model, whole = model_of("llama"), ids(2)
    numbered = [replace(each, positions=[2, PROMPT - 1]) for each in ENDS]
    expected = recomputed(model, whole, numbered)
    with intervened(model, ENDS):
        held = model(whole[:, :3]).past_key_values
        mask = torch.ones_like(whole)
        found = generated(model, whole[:, 3:], past_key_values=held, attention_mask=mask)[1]
        with pytest.raises(ValueError, match="given 3 tokens, and a cache that holds 8: give the"):
            generated(model, whole[:, 3:], past_key_values=held)
    torch.testing.assert_close(found, expected[1], rtol=0, atol=1e-4)
    with intervened(model, [Intervention("zero", "mlp_out_0", [1, 2])]):
        held = model(whole[:, :3]).past_key_values
        held.crop(-2)
        assert generated(model, whole[:, :3], past_key_values=held)[0].shape == (2, 6)
    with intervened(model, [Intervention("zero", "mlp_out_0", 3)]):
        held = model(whole[:, :4]).past_key_values
        held.crop(-3)
        with pytest.raises(ValueError, match="a sequence has 3 tokens"):
            generated(model, whole[:, :3], past_key_values=held)


def test_a_model_that_assists_itself_guesses_with_the_prompts_positions() -> None:
    """Else it would guess wrong, and more would have to run."""
    model = model_of("llama")
    by_number = [Intervention("add", "resid_out_0", PROMPT - 1, source=4 * SOURCES[0])]
    settings = {"assistant_model": model, "max_new_tokens": 8}
    counts, made = [], []
    for given in (by_number, [replace(by_number[0], positions="last")]):
        ran: list[int] = []
        handle = model.lm_head.register_forward_hook(lambda *_, r=ran: r.append(1))
        with intervened(model, given):
            made.append(generated(model, ids(1), **settings)[0])
        handle.remove()
        counts.append(len(ran))
    assert torch.equal(*made)
    assert counts[0] == counts[1]


_LINEAR = {f"linear_{what}_head_dim": 4 for what in ("key", "value")} | {
    f"linear_num_{what}_heads": 2 for what in ("key", "value")
}
_SSM = {"mamba_d_state": 4, "mamba_n_groups": 1, "mamba_chunk_size": 8, "mamba_expand": 2}
_EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1}
HYBRIDS: dict[str, dict[str, Any]] = {
    "minimax": {"head_dim": 8, "num_local_experts": 2},
    "qwen3_next": {
        "head_dim": 8, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8,
        **_LINEAR, **_EXPERTS,
    },
    "jamba": {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
        "expert_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4, **_EXPERTS,
    },
    "falcon_h1": {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_ssm": 32, **_SSM},
}  # fmt: skip


def hybrid(name: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(3)
    kinds = {"layer_types": ["linear_attention", "full_attention"]}
    settings = {**CONFIGS["llama"], **HYBRIDS[name], "vocab_size": VOCABULARY, "pad_token_id": 0}
    settings |= kinds if name in ("minimax", "qwen3_next") else {}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **settings)).eval()


LATER = [Intervention("add", "resid_out_0", slice(PROMPT, None), source=4 * SOURCES[0])]


@torch.no_grad()
def test_a_cache_that_does_not_count_is_refused() -> None:
    model, why = hybrid("minimax"), "says that it holds no tokens, and is not empty"
    filled = model(ids()).past_key_values
    assert filled.get_seq_length() == 0
    with intervened(model, LATER):
        with pytest.raises(ValueError, match=why):
            model(ids(), past_key_values=filled)
        with pytest.raises(ValueError, match=why):
            generated(model, ids())
        found = generated(model, ids(), use_cache=False)[1]
        assert model(ids()).logits.shape == (2, PROMPT, VOCABULARY)  # makes one, and needs none
    torch.testing.assert_close(found, recomputed(model, ids(), LATER)[1], rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", [*sorted({*HYBRIDS} - {"minimax"}), "llama", "static"])
def test_a_cache_that_was_reset_begins_anew(name: str) -> None:
    model = hybrid(name) if name in HYBRIDS else model_of("llama")
    whole = ids(2, PROMPT + 1)
    expected = extract(model, whole, LOGITS, LATER)["logits"]
    given = StaticCache(config=model.config, max_cache_len=16) if name == "static" else None
    held = model(ids(2, 3), past_key_values=given).past_key_values
    with intervened(model, LATER):
        for _ in range(2):
            held.reset()
            model(whole[:, :PROMPT], past_key_values=held)
            found = model(whole[:, PROMPT:], past_key_values=held).logits
            torch.testing.assert_close(found, expected[:, PROMPT:], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_cache_may_be_cropped_and_not_get_tokens_elsewhere() -> None:
    model, whole = model_of("llama"), ids(2, PROMPT + 1)
    other = copy.deepcopy(model)
    expected = extract(model, whole, LOGITS, LATER)["logits"]
    with intervened(model, LATER):
        held = model(whole[:, :PROMPT]).past_key_values
        for _ in range(2):
            found = model(whole[:, PROMPT:], past_key_values=held).logits
            torch.testing.assert_close(found, expected[:, PROMPT:], rtol=1e-4, atol=1e-5)
            held.crop(-1)
        held.crop(-PROMPT)
        model(ids(2, 4), past_key_values=held)
        other(ids(2, 4), past_key_values=held)
        with pytest.raises(ValueError, match="holds 8 tokens, of which 4 did not run inside"):
            model(ids(2, 1), past_key_values=held)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # where none is wanted
@pytest.mark.parametrize("reentrant", [True, False])
def test_blocks_that_backward_runs_again_are_changed_again(reentrant: bool) -> None:
    model = copy.deepcopy(model_of("llama")).train()
    model.enable_input_require_grads()
    given = [Intervention("add", "attn_in_0", 2, source=4 * SOURCES[0])]

    def gradients(between: Callable[[], Any]) -> Tensor:
        model.zero_grad()
        with intervened(model, given):
            loss = model(ids(), labels=ids(), use_cache=False).loss
            between()
            loss.backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    def look() -> None:
        with torch.no_grad():
            model(ids(2, 5))

    expected = gradients(look)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert torch.equal(gradients(look), expected)
    with pytest.raises(ValueError, match="pass of 6 tokens, and the last one with gradients had 5"):
        gradients(lambda: model(ids(2, 5)))


@torch.no_grad()
def test_a_copys_shares_are_of_its_own_weights() -> None:
    model, given = model_of("llama"), [Intervention("patch", "head_out_L1H2", source=SOURCES[0])]
    with intervened(model, given):
        copied = copy.deepcopy(model)
        copied.model.layers[1].self_attn.o_proj.weight.mul_(3)
        inside = copied(ids()).logits
        own = model(ids()).logits
    expected = copy.deepcopy(model)
    expected.model.layers[1].self_attn.o_proj.weight.mul_(3)
    torch.testing.assert_close(inside, extract(expected, ids(), LOGITS, given)["logits"])
    torch.testing.assert_close(own, extract(model, ids(), LOGITS, given)["logits"])


def test_stores_that_would_not_record_interventions_are_refused(tmp_path: Path) -> None:
    model = model_of("llama")
    wrapped = nn.Module()
    wrapped._orig_mod = model  # as torch.compile has it
    data, place = datasets.Dataset.from_dict({"input_ids": ids(8).tolist()}), tmp_path / "store"
    settings: dict[str, Any] = {"lr": 1e-3, "n_beta": 1.0, "num_chains": 1, "num_draws": 1}
    calls: dict[str, Callable[[Any], Any]] = {
        "extract_dataset": lambda model: basinscope.extract_dataset(
            model, data, LOGITS, output=place
        ),
        "sample": lambda model: basinscope.sample(
            model, data, {}, batch_size=2, output_path=place, **settings
        ),
        "harvest_attributions": lambda model: basinscope.harvest_attributions(
            model, data, output_path=place, batch_size=2
        ),
    }
    for name, call in calls.items():
        for each in (model, wrapped):
            with (
                intervened(model, []),
                pytest.raises(ValueError, match=rf"{name}\(\) inside a block of intervened\(\)"),
            ):
                call(each)
    assert not place.exists()
    calls["extract_dataset"](model)
    assert place.exists()


@torch.no_grad()
def test_blocks_left_in_another_order_are_closed() -> None:
    model = model_of("gpt2")
    plain = model(ids()).logits
    outer, inner = (intervened(model, [Intervention("zero", f"mlp_out_{i}")]) for i in (0, 1))
    outer.__enter__()
    inner.__enter__()
    with pytest.raises(RuntimeError, match="leave them in the other order"):
        outer.__exit__(None, None, None)
    assert torch.equal(model(ids()).logits, plain)
    inner.__exit__(None, None, None)
    assert untouched(model)
    assert torch.equal(model(ids()).logits, plain)


def test_models_that_are_no_causal_language_models_are_refused() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    given = [Intervention("add", "resid_out_0", "last", source=SOURCES[0])]
    sizes = {"d_model": 16, "max_position_embeddings": 32, "vocab_size": VOCABULARY}
    sizes |= {f"{part}_layers": 1 for part in ("encoder", "decoder")}
    sizes |= {f"{part}_attention_heads": 4 for part in ("encoder", "decoder")}
    bart = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("bart", **sizes))
    with pytest.raises(ValueError, match="runs two sequences, its encoder's and its decoder's"):
        intervened(bart, given).__enter__()
    with pytest.raises(ValueError, match=r"cannot be found: .*causal LM"):
        intervened(Plain(), given).__enter__()
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "attention_hidden_size": 16}
    rwkv = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("rwkv", vocab_size=VOCABULARY, context_length=32, **sizes)
    ).eval()
    with intervened(rwkv, given), torch.no_grad():
        state = rwkv(ids(), use_cache=True).state
        with pytest.raises(ValueError, match=r"is given state=.*use_cache=False"):
            rwkv(ids(), state=state)


class Plain(nn.Module):
    """Layers with attention that a Hugging Face model could have."""

    def __init__(self) -> None:
        super().__init__()
        inside: Any = copy.deepcopy(model_of("gpt2"))
        self.h, self.wte = inside.transformer.h, inside.transformer.wte
        self.head = inside.lm_head

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.wte(input_ids)
        for layer in self.h:
            hidden = layer(hidden)
        return self.head(hidden)


def test_a_model_that_was_compiled_in_place_runs_as_it_is_written() -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the model was compiled")

    model = copy.deepcopy(model_of("gpt2"))
    model._compiled_call_impl = fail  # what model.compile() sets
    given = [Intervention("zero", "mlp_out_0", "last")]
    with intervened(model, given):
        found = generated(model, ids())[0]
    assert torch.equal(found, recomputed(model_of("gpt2"), ids(), given)[0])
    assert model._compiled_call_impl is fail


LENS = [
    Intervention("add", "resid_out_0", slice(2, None), source=torch.linspace(-2, 2, 20)),
    Intervention("zero", "queries_L1H2", "last"),
    Intervention("patch", "head_out_L1H0", [0, 2], source=torch.linspace(1, 3, 20)),
    Intervention("knockout", "attn_pattern_1", slice(3, None), key_positions=[1, 2]),
]


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_transformer_lens_models_generate_with_a_cache_and_without() -> None:
    pytest.importorskip("transformer_lens.HookedTransformer")
    from tests.peer.test_transformer_lens import hooked

    model = hooked(
        "rotary"
    )  # learned positions of its own are others with a cache: they begin anew
    prompt = ids(2, 5) % 40
    settings = {"max_new_tokens": STEPS, "do_sample": False, "stop_at_eos": False}
    expected, logits = recomputed(model, prompt, LENS)
    with intervened(model, LENS):
        for cached in (True, False):
            found = model.generate(prompt, use_past_kv_cache=cached, verbose=False, **settings)
            assert torch.equal(found, expected)
        torch.testing.assert_close(model(prompt)[:, -1], logits[:, 0])
        with pytest.raises(ValueError, match="not generate_stream"):
            model.generate_stream(prompt)
        with pytest.raises(ValueError, match="whose tokens cannot be counted"):
            model("some text")
    assert not torch.equal(model.generate(prompt, verbose=False, **settings), expected)
    assert {"forward", "generate"}.isdisjoint(vars(model))


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_bridges_generate_as_the_model_inside() -> None:
    pytest.importorskip("transformer_lens.model_bridge.sources._bridge_builder")
    from tests.models.test_bridge import bridge, plain

    given = [
        Intervention("add", "resid_out_0", "last", source=4 * SOURCES[0]),
        Intervention("patch", "head_out_L1H1", slice(2, None), source=SOURCES[1]),
    ]
    prompt = ids() % 40
    expected = recomputed(plain("gpt2"), prompt, given)[0]
    model: Any = bridge("gpt2")
    settings = {"max_new_tokens": STEPS, "do_sample": False, "stop_at_eos": False}
    with intervened(model, given):
        for cached in (True, False):
            found = model.generate(prompt, use_past_kv_cache=cached, verbose=False, **settings)
            assert torch.equal(found, expected)


def test_it_is_public() -> None:
    assert basinscope.intervened is intervened
