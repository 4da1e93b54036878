"""Masks of weight restrictions are devinterp 2.0.1's, or differ for a reason that is named here.

Every model type of its table is built tiny, with and without grouped queries.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from devinterp.slt._model_structures import HEAD_STRUCTURES
from devinterp.slt._tiny_configs import make_tiny
from devinterp.slt.weight_restrictions import create_param_masks as their_masks
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from basinscope.models.restrictions import create_param_masks, structure_of
from tests.models.models_hooked import HookedTransformer
from tests.models.test_structure import MODELS
from tests.models.test_structure import built as built_for_heads

pytestmark = pytest.mark.peer

TYPES = sorted(set(HEAD_STRUCTURES) - {"hooked_transformer"})
CANNOT_BE_BUILT = {
    "code_llama": "Unrecognized model identifier",
    "gemma4_text": "'head_dim' is a per-layer attribute",
}
HEAD_OR_GROUP = re.compile(r"l0[hg]\d")


@dataclass
class Case:
    """One restriction of one model, and what each side selects; None where they refuse."""

    model: nn.Module
    spec: dict[str, Any]
    restriction: str
    ours: dict[str, Tensor]
    theirs: dict[str, Tensor] | None
    refusal: str = ""

    @property
    def missing(self) -> set[str]:
        return set(self.ours) - set(self.theirs or {})

    @property
    def extra(self) -> set[str]:
        return set(self.theirs or {}) - set(self.ours)

    @property
    def unequal(self) -> set[str]:
        common = set(self.ours) & set(self.theirs or {})
        return {name for name in common if not torch.equal(self.ours[name], self.theirs[name])}  # type: ignore[index]

    @property
    def only_missing(self) -> bool:
        return self.theirs is not None and not self.extra and not self.unequal

    @property
    def equal(self) -> bool:
        return self.only_missing and not self.missing


def tied(case: Case) -> bool:
    """They select nothing of a parameter that named_parameters lists under another name."""
    theirs = [parameter_of(case.model, name) for name in case.spec.get(case.restriction, [])]
    return case.only_missing and all(
        any(case.model.get_parameter(name) is other for other in theirs) for name in case.missing
    )


def renamed(case: Case) -> bool:
    """They select nothing, for the head's name is from before a release of transformers."""
    names = case.spec.get(case.restriction, [])
    head = case.model.get_output_embeddings()  # type: ignore[operator]
    return (
        case.restriction == "unembed"
        and case.theirs == {}
        and all(parameter_of(case.model, name) is None for name in names)
        and {id(case.model.get_parameter(n)) for n in case.ours} == {id(head.weight)}
    )


def key_bias(case: Case) -> bool:
    """They leave the key projection's bias out of heads, though not out of the attention."""
    if not HEAD_OR_GROUP.fullmatch(case.restriction) or not case.only_missing:
        return False
    (name,) = case.missing
    rows = case.ours[name.replace(".bias", ".weight")].all(1)
    return (
        re.search(r"\.(k_proj|key|Wk|k_lin)\.bias$", name) is not None
        and torch.equal(case.ours[name], rows)
        and name in their_masks(case.model, "l0 attn")
    )


def suffix(case: Case) -> bool:
    """Their MLP takes the attention's output projection, which ends on the same name."""
    return (
        case.restriction == "l0 mlp"
        and case.theirs is not None
        and not case.missing
        and not case.unequal
        and all(re.search(r"\.attention\.output\.dense\.(weight|bias)$", n) for n in case.extra)
        and case.extra <= set(their_masks(case.model, "l0 attn"))
    )


def experts(case: Case) -> bool:
    """Their MLP misses experts, or their router, that have other names in this transformers."""
    return (
        case.restriction == "l0 mlp"
        and case.only_missing
        and all(re.search(r"\.(experts|router)\.\w+", name) for name in case.missing)
    )


def lists(case: Case) -> bool:
    """They look at the first of several lists that hold the parts of a layer."""
    first, *others = case.spec["layer_prefixes"]
    return (
        case.restriction in ("l0", "l0 mlp")
        and case.only_missing
        and all(
            name.startswith(tuple(f"{prefix}.0." for prefix in others)) for name in case.missing
        )
        and all(name.startswith(f"{first}.0.") for name in case.theirs or {})
    )


def multi_query(case: Case) -> bool:
    """They fail where a single key-value head is fused with the queries."""
    return (
        HEAD_OR_GROUP.fullmatch(case.restriction) is not None
        and case.theirs is None
        and "is invalid for input of size" in case.refusal
        and structure_of(case.model).layers[0].num_groups == 1
    )


def unused_setting(case: Case) -> bool:
    """They read a number of key-value heads that the model itself does not."""
    if not HEAD_OR_GROUP.fullmatch(case.restriction):
        return False
    key = case.model.get_parameter("model.decoder.layers.0.self_attn.k_proj.weight")
    per_group = 2
    told = case.model.config.num_key_value_heads == 4 // per_group  # type: ignore[union-attr]
    if not told or key.shape[0] != case.model.config.hidden_size:  # type: ignore[union-attr]
        return False
    if case.theirs is None:
        return "out of range" in case.refusal
    return not case.missing | case.extra and all(
        case.theirs[n].sum() == per_group * case.ours[n].sum() for n in case.unequal
    )


BERT_LIKE = """
    bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert
    roberta roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl xmod
"""
BART_LIKE = """
    bart biogpt blenderbot blenderbot-small mbart mvp opt pegasus plbart trocr xglm
"""
REASONS: dict[Callable[[Case], bool], str] = {
    tied: f"""{BART_LIKE} {BERT_LIKE}
        bloom ctrl ernie4_5 ernie4_5_moe falcon gemma gemma2 gemma3_text gpt-sw3 gpt2 gpt_bigcode
        gpt_neo gpt_neox_japanese lfm2 mpt openai-gpt smollm3 starcoder2 vaultgemma whisper xlm""",
    renamed: "gpt_neox",
    key_bias: f"{BART_LIKE} {BERT_LIKE} ctrl xlm",
    suffix: BERT_LIKE,
    experts: "aria_text granitemoe granitemoeshared",
    lists: "xlm",
    multi_query: "falcon gpt_bigcode",
    unused_setting: "whisper",
}


class Record:
    """What was found, for the table at the end."""

    def __init__(self) -> None:
        self.equal: set[str] = set()
        self.different: dict[str, set[str]] = {reason.__name__: set() for reason in REASONS}
        self.cannot: dict[str, str] = {}

    def lines(self) -> Iterator[str]:
        different = set().union(*self.different.values())
        equal = sorted(self.equal - different)
        yield "restrictions, ours and devinterp's:"
        yield f"  equal in everything       {len(equal):3d}  {' '.join(equal)}"
        for reason in REASONS:
            types = sorted(self.different[reason.__name__])
            yield f"  different: {reason.__name__:14s} {len(types):3d}  {' '.join(types)}"
        for name, why in self.cannot.items():
            yield f"  cannot be built                {name}: {why}"


@pytest.fixture(scope="module")
def record(request: pytest.FixtureRequest) -> Iterator[Record]:
    found = Record()
    yield found
    reporter = request.config.pluginmanager.get_plugin("terminalreporter")
    capture = request.config.pluginmanager.get_plugin("capturemanager")
    if reporter is not None and capture is not None:
        with capture.global_and_fixture_disabled():
            reporter.ensure_newline()
            for line in found.lines():
                reporter.write_line(line)


@pytest.mark.parametrize("gqa", [False, True], ids=["", "gqa"])
@pytest.mark.parametrize("kind", TYPES)
def test_masks_are_the_peer_s_or_differ_for_a_known_reason(
    kind: str, gqa: bool, record: Record
) -> None:
    try:
        model = built(kind, gqa)
    except Exception as error:
        if kind not in CANNOT_BE_BUILT or CANNOT_BE_BUILT[kind] not in str(error):
            raise
        record.cannot[kind] = CANNOT_BE_BUILT[kind]
        return
    for case in cases(model, HEAD_STRUCTURES[kind]):
        if case.equal:
            record.equal.add(kind)
            continue
        why = [reason for reason, types in REASONS.items() if kind in types.split()]
        reasons = [reason.__name__ for reason in why if reason(case)]
        assert len(reasons) == 1, (
            f"{kind} {case.restriction}: {reasons or 'no reason'}; theirs "
            f"{case.refusal or 'has'} {sorted(case.extra)}, ours has {sorted(case.missing)}, "
            f"both {sorted(case.unequal)}, with other elements"
        )
        record.different[reasons[0]].add(kind)


OTHER_ROWS = {
    "codegen, in blocks": {"attn.qkv_proj.weight"},
    "falcon, plain": {"self_attention.query_key_value.weight"},
    "gpt_bigcode, plain": {"attn.c_attn.weight", "attn.c_attn.bias"},
    "qwen3, wide heads": {"self_attn.k_proj.weight", "self_attn.v_proj.weight"},
    "gemma, wide heads": {"self_attn.k_proj.weight", "self_attn.v_proj.weight"},
    "gemma4, full": {"self_attn.k_proj.weight", "self_attn.v_proj.weight"},
}


@pytest.mark.parametrize("kind", OTHER_ROWS)
def test_rows_that_the_tiny_sizes_do_not_show(kind: str) -> None:
    """With sizes as real models have them the peer takes rows of other heads, or half of a head.

    ``tests/models/test_structure.py`` changes these elements and sees which heads change.
    """
    model, number = built_for_heads(kind), MODELS[kind][2]
    ours, theirs = (f(model, f"l{number}h1") for f in (create_param_masks, their_masks))
    different = {name for name in ours if not torch.equal(ours[name], theirs[name])}  # type: ignore[arg-type]
    assert {name.split(f".{number}.")[1] for name in different} == OTHER_ROWS[kind]


def test_a_fused_projection_of_several_groups_fails_in_the_peer() -> None:
    model = built_for_heads("falcon, new")
    assert create_param_masks(model, "l1h0")
    with pytest.raises(RuntimeError, match="is invalid for input of size"):
        their_masks(model, "l1h0")


def test_a_second_kind_of_attention_has_no_heads_in_the_peer() -> None:
    model = built_for_heads("minimax, lightning")
    assert len(create_param_masks(model, "l1h0")) == 3
    assert their_masks(model, "l1h0") == their_masks(model, "l1 attn") == {}


@pytest.mark.parametrize("groups", [None, 2, 1])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_masks_of_a_transformer_lens_model_are_the_peer_s(groups: int | None, gated: bool) -> None:
    """On a stand-in with TransformerLens's names and shapes, not on a model of its own."""
    model = HookedTransformer(groups, gated)
    for case in cases(model, {}):
        assert case.equal, case.restriction


def test_experts_of_a_transformer_lens_model_are_in_the_mlp() -> None:
    """On the same stand-in: the peer's table has no experts."""
    model = HookedTransformer(experts=3)
    different = [case for case in cases(model, {}) if not case.equal]
    assert [case.restriction for case in different] == ["l0 mlp"]
    assert different[0].only_missing
    assert all(".mlp." in name for name in different[0].missing)
    assert len(different[0].ours) == 3 * 3 + 1


def test_the_docs_name_every_type_that_differs() -> None:
    text = (Path(__file__).parents[2] / "docs" / "restrictions.md").read_text()
    names = set(re.findall(r"[\w-]+", text))
    for types in (*REASONS.values(), *CANNOT_BE_BUILT):
        assert set(types.split()) <= names


def cases(model: nn.Module, spec: Any) -> Iterator[Case]:
    layer = structure_of(model).layers[0]
    assert not layer.unknown, layer.unknown
    heads = [f"l0h{head}" for head in range(layer.num_heads)]
    groups = [f"l0g{group}" for group in range(layer.num_groups)]
    for restriction in ["full", "l0", "l0 attn", "l0 mlp", "embed", "unembed", *heads, *groups]:
        ours = filled(model, create_param_masks(model, restriction))
        chosen = spec if isinstance(spec, dict) else best_variant(model, spec)
        case = Case(model, chosen, restriction, ours, None)
        try:
            case.theirs = filled(model, their_masks(model, restriction))
        except (RuntimeError, ValueError) as error:
            case.refusal = str(error)
        yield case


def built(kind: str, gqa: bool) -> nn.Module:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: nn.Module = AutoModelForCausalLM.from_config(make_tiny(kind, gqa=gqa))
    if kind == "xmod":
        model.set_default_language("en_XX")  # type: ignore[operator]
    return model


def filled(model: nn.Module, masks: dict[str, Tensor | None]) -> dict[str, Tensor]:
    every = torch.ones_like
    return {
        name: every(model.get_parameter(name), dtype=torch.bool) if mask is None else mask
        for name, mask in masks.items()
    }


def best_variant(model: nn.Module, variants: list[dict[str, Any]]) -> dict[str, Any]:
    """Of several tables for a type, the one whose names the model has most of."""
    names = [name for name, _ in model.named_parameters()]
    return max(
        variants, key=lambda v: sum(any(n.endswith(s) for n in names) for s in v.get("mlp", []))
    )


def parameter_of(model: nn.Module, name: str) -> nn.Parameter | None:
    try:
        return model.get_parameter(name)
    except AttributeError:
        return None
