"""Interventions: against models with weights taken out, and against hand-made forward passes."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from basinscope.models.extraction import ExtractionConfig, extract
from basinscope.models.interventions import Intervention
from basinscope.models.sites import find_sites
from tests.models.models_tiny import VOCABULARY, tiny

LENGTH = 6
ALL = ExtractionConfig(
    resid_in=True, resid_out=True, attn_out=True, mlp_out=True, head_out=True, logits=True
)
PARTS = ExtractionConfig(attn_in=True, queries=True, keys=True, values=True, logits=True)
FAMILIES = ["gpt2", "gpt_neox", "llama", "opt", "gemma2", "granite", "bloom"]


def ids() -> Tensor:
    return torch.randint(VOCABULARY, (3, LENGTH), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("target", ["resid_in_1", "resid_out_0", "attn_out_0", "mlp_out_1"])
def test_zero_sets_an_activation_to_zero_there_and_leaves_the_past_alone(
    name: str, target: str
) -> None:
    model = tiny(name)
    plain = extract(model, ids(), ALL)
    cache = extract(model, ids(), ALL, [Intervention("zero", target, positions=[2, 4])])
    found = cache[target]
    assert found[:, [2, 4]].abs().max() == 0
    torch.testing.assert_close(found[:, :2], plain[target][:, :2])
    torch.testing.assert_close(cache["logits"][:, :2], plain["logits"][:, :2])
    changed = (cache["logits"] - plain["logits"]).abs().amax((0, 2))
    assert changed[2] > 1e-3
    assert changed[4] > 1e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_zero_on_a_head_is_a_model_without_its_columns(name: str) -> None:
    model = tiny(name)
    without = copy.deepcopy(model)
    heads = find_sites(model).heads[1]
    weight = without.get_parameter(heads.projection)
    module = without.get_submodule(heads.projection.rpartition(".")[0])
    size = weight.shape[0 if type(module).__name__ == "Conv1D" else 1] // 4
    with torch.no_grad():
        if type(module).__name__ == "Conv1D":
            weight[2 * size : 3 * size] = 0
        else:
            weight[:, 2 * size : 3 * size] = 0
        expected = without(ids()).logits
    cache = extract(model, ids(), ALL, [Intervention("zero", "head_out_L1H2")])
    torch.testing.assert_close(cache["logits"], expected)
    assert cache["head_out_L1H2"].abs().max() < 1e-6


def query_rows(name: str, head: int, size: int) -> tuple[str, slice]:
    """Where a head's queries stand in layer 1's projection, from the models' own code."""
    if name == "gpt2":  # queries, keys, values one behind another
        return "transformer.h.1.attn.c_attn", slice(head * size, (head + 1) * size)
    if name == "gpt_neox":  # of each head, queries, keys and values
        at = 3 * head * size
        return "gpt_neox.layers.1.attention.query_key_value", slice(at, at + size)
    return "model.layers.1.self_attn.q_proj", slice(head * size, (head + 1) * size)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama"])
def test_zero_on_a_heads_queries_is_a_model_without_their_rows(name: str) -> None:
    model = tiny(name)
    without = copy.deepcopy(model)
    size = model.config.hidden_size // model.config.num_attention_heads
    module, rows = query_rows(name, 2, size)
    projection = without.get_submodule(module)
    weight = projection.weight.T if name == "gpt2" else projection.weight
    with torch.no_grad():
        weight[rows] = 0
        if projection.bias is not None:
            projection.bias[rows] = 0
        expected = without(ids()).logits
    cache = extract(model, ids(), PARTS, [Intervention("zero", "queries_L1H2")])
    torch.testing.assert_close(cache["logits"], expected)
    plain = extract(model, ids(), PARTS)
    assert not cache["queries_L1H2"].any()
    torch.testing.assert_close(cache["queries_L1H1"], plain["queries_L1H1"])
    torch.testing.assert_close(cache["keys_1"], plain["keys_1"])


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama", "gemma2", "bloom"])
@pytest.mark.parametrize("target", ["attn_in_1", "queries_1", "keys_0", "values_1", "values_L0H1"])
def test_what_attention_reads_is_patched_from_another_example_or_run(
    name: str, target: str
) -> None:
    model = tiny(name)
    plain = extract(model, ids(), PARTS)
    within = extract(model, ids(), PARTS, [Intervention("patch", target, [1, 3], source=0)])
    torch.testing.assert_close(within["logits"][0], plain["logits"][0])
    torch.testing.assert_close(within[target][2, 3], plain[target][0, 3])
    torch.testing.assert_close(within[target][:, [0, 2]], plain[target][:, [0, 2]])
    assert (within["logits"] - plain["logits"])[1:].abs().max() > 1e-4
    given = Intervention("patch", target, [1, 3], source=plain[target][0, [1, 3]])
    across = extract(model, ids(), PARTS, [given])
    torch.testing.assert_close(across["logits"], within["logits"])


def test_values_of_all_heads_are_those_of_the_layer() -> None:
    model = tiny("gpt_neox")
    heads = [Intervention("mean", f"values_L1H{head}", positions=[1, 2]) for head in range(4)]
    by_heads = extract(model, ids(), PARTS, heads)
    whole = extract(model, ids(), PARTS, [Intervention("mean", "values_1", positions=[1, 2])])
    torch.testing.assert_close(by_heads["logits"], whole["logits"])


@pytest.mark.parametrize("target", ["resid_out_0", "attn_out_1", "mlp_out_0", "head_out_L0H1"])
def test_mean_is_over_the_examples_at_the_same_position(target: str) -> None:
    model = tiny("llama")
    plain = extract(model, ids(), ALL)
    cache = extract(model, ids(), ALL, [Intervention("mean", target, positions="last")])
    expected = plain[target][:, -1].mean(0)
    for example in range(3):
        torch.testing.assert_close(cache[target][example, -1], expected)
    torch.testing.assert_close(cache[target][:, :-1], plain[target][:, :-1])


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("target", ["embed", "resid_out_0", "attn_out_0", "mlp_out_0"])
def test_patching_takes_from_another_example_or_another_run(name: str, target: str) -> None:
    model = tiny(name)
    config = ExtractionConfig(
        embed=True, resid_out=True, attn_out=True, mlp_out=True, head_out=True, logits=True
    )
    plain = extract(model, ids(), config)
    within = extract(model, ids(), config, [Intervention("patch", target, [1, 3], source=0)])
    torch.testing.assert_close(within["logits"][0], plain["logits"][0])
    torch.testing.assert_close(within[target][2, 3], plain[target][0, 3])
    if not (name == "gemma2" and target == "embed"):
        assert (within["logits"] - plain["logits"])[1:].abs().amax((0, 2))[1] > 1e-3
    given = Intervention("patch", target, [1, 3], source=plain[target][0, [1, 3]])
    across = extract(model, ids(), config, [given])
    torch.testing.assert_close(across["logits"], within["logits"])


def test_patching_the_whole_stream_makes_an_example_the_other() -> None:
    model = tiny("gpt_neox")
    cache = extract(model, ids(), ALL, [Intervention("patch", "resid_out_0", source=1)])
    for example in (0, 2):
        torch.testing.assert_close(cache["logits"][example], cache["logits"][1])
    heads = [Intervention("patch", f"head_out_L0H{head}", source=1) for head in range(4)]
    by_heads = extract(model, ids(), ALL, heads)
    whole = extract(model, ids(), ALL, [Intervention("patch", "attn_out_0", source=1)])
    torch.testing.assert_close(by_heads["logits"], whole["logits"])


@pytest.mark.parametrize("name", ["gpt2", "opt", "gemma2"])
def test_interventions_on_one_site_follow_one_another(name: str) -> None:
    model, target = tiny(name), "mlp_out_0"
    plain = extract(model, ids(), ALL)[target]
    first = Intervention("zero", target, positions=[1])
    then = Intervention("patch", target, positions=[1, 2], source=np.int64(0))
    cache = extract(model, ids(), ALL, [first, then])
    assert not cache[target][:, 1].any()
    torch.testing.assert_close(cache[target][2, 2], plain[0, 2])
    assert cache.metadata["interventions"][1]["source"] == 0
    back = extract(model, ids(), ALL, [first, Intervention("patch", target, source=plain)])
    torch.testing.assert_close(back[target], plain)


@pytest.mark.parametrize("number", [np.int64(2), torch.tensor(2), np.array(2)])
def test_an_examples_number_may_be_wrapped(number: Any) -> None:
    assert Intervention("patch", "resid_out_0", source=number).source == 2
    given = Intervention("patch", "head_out_L0H1", source=number)
    assert given == Intervention("patch", "head_out_L0H1", source=2)


def test_interventions_are_gone_afterwards_and_written_down() -> None:
    model = tiny("gpt2")
    plain = extract(model, ids(), ALL)
    tensor = torch.ones(16)
    interventions = [
        Intervention("zero", "head_out_L0H1"),
        Intervention("patch", "mlp_out_1", slice(0, 2), source=tensor),
    ]
    cache = extract(model, ids(), ALL, interventions)
    assert not torch.allclose(cache["logits"], plain["logits"])
    torch.testing.assert_close(extract(model, ids(), ALL)["logits"], plain["logits"])
    zero, patch = cache.metadata["interventions"]
    assert zero == {
        "kind": "zero",
        "target": "head_out_L0H1",
        "positions": "all",
        "source": None,
    }
    assert patch["positions"] == [0, 2, None]
    assert patch["source"]["shape"] == [16]
    other = Intervention("patch", "mlp_out_1", slice(0, 2), source=tensor + 1).to_dict()
    assert other["source"]["sha256"] != patch["source"]["sha256"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("none", "resid_in_0"), "choose one of zero, mean, patch"),
        (("zero", "resid_mid_0"), "it can be embed, resid_in_0"),
        (("zero", 3), "target=3: it can be embed, resid_in_0"),
        (("zero", None), "target=None: it can be"),
        (("patch", "resid_in_0"), "'patch' needs source="),
        (("zero", "resid_in_0", "all", 1), "'zero' takes no source"),
        (("patch", "resid_in_0", "all", torch.tensor(2.0)), "give an example's number"),
        (("add", "resid_in_0"), "'add' adds a torch.Tensor, and source=None is none"),
        (("add", "resid_in_0", "all", 0), "'add' adds a torch.Tensor, and source=0 is none"),
        (("add", "attn_pattern_0", "all", torch.ones(4)), "can be knocked out"),
        (("patch", "resid_in_0", "all", True), "give an example's number"),
        (("patch", "resid_in_0", "all", np.ones(4)), "or a torch.Tensor"),
    ],
)
def test_interventions_that_make_no_sense_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Intervention(*arguments)


@pytest.mark.parametrize(
    ("intervention", "message"),
    [
        (Intervention("zero", "resid_in_2"), "layers 0 to 1"),
        (Intervention("zero", "head_out_L0H4"), "heads 0 to 3"),
        (Intervention("zero", "head_out_L2H0"), "layers 0 to 1"),
        (Intervention("zero", "resid_in_0", [LENGTH]), "position 6 is out of range"),
        (Intervention("patch", "resid_in_0", source=3), "examples 0 to 2"),
        (Intervention("patch", "resid_in_0", source=torch.ones(5)), "has shape .5,."),
        (Intervention("patch", "resid_in_0", source=torch.ones(1)), "has shape .1,."),
        (Intervention("patch", "resid_in_0", source=torch.ones(LENGTH, 1)), r"give \(16,\)"),
        (Intervention("zero", "queries_L0H4"), "'queries_L0H4': the layer has heads 0 to 3"),
        (Intervention("patch", "keys_0", source=torch.ones(16)), r"give \(4, 4\), one for each"),
        (Intervention("patch", "resid_in_0", source=torch.ones(2, LENGTH, 16)), "has shape .2, 6"),
    ],
)
def test_interventions_that_do_not_fit_are_refused(
    intervention: Intervention, message: str
) -> None:
    model = tiny("gpt2")
    with pytest.raises(ValueError, match=message):
        extract(model, ids(), ALL, [intervention])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_model_that_adds_no_attention_says_why() -> None:
    model = tiny("opt", do_layer_norm_before=False)
    config = ExtractionConfig(resid_out=True)
    with pytest.raises(ValueError, match="no output of"):
        extract(model, ids(), config, [Intervention("zero", "attn_out_0")])
