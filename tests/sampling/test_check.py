"""check_model() says of each model what is so, and of no model what is not."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from rich.console import Console
from torch import Tensor, nn

import basinscope
from basinscope.sampling.check import ROUNDING, _restrictions, _structure, check_model
from basinscope.sampling.findings import ModelReport
from tests.conftest import token_rows
from tests.models.models_hooked import HookedTransformer
from tests.models_small import KINDS, VOCABULARY, RawModel, tiny_model

ROWS = token_rows(20, 9, seed=1)


class Changed(RawModel):
    """A model with something of its own done to the hidden states."""

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden, _ = self.mix(self.embed(input_ids))
        return self.head(self.change(hidden))

    def change(self, hidden: Tensor) -> Tensor:
        return hidden


class Capacity(Changed):
    """An expert that takes so many tokens of a batch, first come, first served."""

    def __init__(self, share: float = 0.25) -> None:
        super().__init__()
        self.expert, self.share = nn.Linear(12, 12), share

    def change(self, hidden: Tensor) -> Tensor:
        flat = hidden.flatten(0, 1)
        taken = flat[:, :1].sigmoid().round()
        taken = taken * (taken.cumsum(0) <= self.share * len(flat))
        return hidden + (taken * self.expert(flat)).view(hidden.shape)


class BatchNorm(Changed):
    """A norm over the batch, whose statistics are those of the batch, or frozen."""

    def __init__(self, frozen: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(12, track_running_stats=frozen)

    def change(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden.mT).mT


class AlwaysRandom(Changed):
    """Dropout that no eval() turns off."""

    def change(self, hidden: Tensor) -> Tensor:
        return nn.functional.dropout(hidden, 0.1)


class QuietlyRandom(Changed):
    """Dropout without a module."""

    def change(self, hidden: Tensor) -> Tensor:
        return nn.functional.dropout(hidden, 0.1, self.training)


class Twice(RawModel):
    """Two embeddings: how many ids the model knows cannot be told."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Embedding(VOCABULARY, 12)


def found(model: nn.Module, topic: str, dataset: Dataset = ROWS, **options: Any) -> Any:
    return check_model(model, dataset, device="cpu", **options)[topic]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [2, 3, 8])
def test_sequences_of_usual_models_are_independent(kind: str, batch_size: int) -> None:
    finding = found(tiny_model(kind), "batch", batch_size=batch_size)
    assert finding.level == "ok"
    assert finding.values["largest_difference"] <= 1e-5
    assert finding.values["repeated"] == 0


@pytest.mark.parametrize(
    ("make", "mixes"),
    [
        (lambda: Capacity(), True),
        (lambda: Capacity(share=1.0), False),
        (lambda: BatchNorm(frozen=False), True),
        (lambda: BatchNorm(frozen=True), False),
    ],
)
def test_a_sequence_that_depends_on_its_batch(make: Callable[[], nn.Module], mixes: bool) -> None:
    finding = found(make().eval(), "batch")
    values = finding.values
    assert finding.level == ("warning" if mixes else "ok")
    assert (values["largest_difference"] > 1e-3) == mixes
    assert values["rounding"] < 1e-5
    if mixes:
        assert f"{values['largest_difference']:.2g} nats" in finding.text


def test_the_differences_are_those_of_plain_forward_passes() -> None:
    model = Capacity().eval()
    ids = ROWS[:]["input_ids"][::2]  # two batches of 4, evenly spaced

    def losses(batch: Tensor) -> Tensor:
        with torch.no_grad():
            return nn.functional.cross_entropy(
                model(batch)[:, :-1].mT, batch[:, 1:], reduction="none"
            )

    plain = losses(ids[:4])
    alone = torch.cat([losses(ids[[row]]) - plain[[row]] for row in (0, 2, 3)])
    others = losses(ids[[0, 1, 4, 5]])[:2] - plain[:2]
    values = found(model, "batch", batch_size=4).values["differences"]
    assert values["alone"] == pytest.approx(float(alone.abs().max()), abs=1e-5)
    assert values["among_others"] == pytest.approx(float(others.abs().max()), abs=1e-5)
    assert values["reversed"] == pytest.approx(
        float((losses(ids[:4].flip(0)).flip(0) - plain).abs().max()), abs=1e-5
    )


def test_rounding_of_16_bit_models_is_no_dependence_on_the_batch() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    values = found(model, "batch").values
    exact = found(tiny_model("llama"), "batch").values["rounding"]
    assert values["rounding"] > 1e3 * exact
    assert values["largest_difference"] <= ROUNDING * values["rounding"]


def test_scores_that_are_masked_hide_no_dependence_on_the_batch() -> None:
    """Rounding changes no minus infinity; a difference of them would be no number."""

    class Masked(Capacity):
        def __init__(self) -> None:
            super().__init__()
            self.scores = nn.Identity()

        def forward(self, ids: Tensor) -> Tensor:
            masked = self.scores(torch.tensor([0.0, -torch.inf])).softmax(0)
            logits: Tensor = super().forward(ids)
            return logits * masked[0]

    finding = found(Masked().eval(), "batch")
    assert finding.level == "warning"
    assert finding.values["rounding"] < 1e-5


def test_one_row_has_its_own_copies_for_company() -> None:
    one = token_rows(1, 9, seed=3)
    assert found(tiny_model("gpt2"), "batch", one).level == "ok"
    assert found(BatchNorm(frozen=False).eval(), "batch", one).level == "ok"
    assert found(Capacity().eval(), "batch", one).level == "warning"


def test_losses_that_only_other_company_breaks() -> None:
    class Fragile(Changed):
        def change(self, hidden: Tensor) -> Tensor:
            return hidden if len(hidden) > 1 else hidden * torch.nan

    finding = found(Fragile(), "batch")
    assert finding.level == "warning"
    assert finding.values["differences"] == {
        "alone": np.inf, "reversed": 0.0, "among_others": 0.0
    }  # fmt: skip


def test_chance_that_eval_mode_leaves_on() -> None:
    finding = found(AlwaysRandom().eval(), "batch")
    assert finding.level == "warning"
    assert "twice" in finding.text
    assert finding.values["repeated"] > 0


def test_dropout_that_is_on() -> None:
    model = RawModel(dropout=0.2)
    finding = found(model.train(), "dropout")
    assert (finding.level, finding.values["modules"]) == ("note", ["drop"])
    assert finding.values["difference"] > 1e-3
    assert found(model, "batch").level == "ok"  # as sample() has it off
    quiet = found(QuietlyRandom().train(), "dropout")
    assert (quiet.level, quiet.values["modules"]) == ("note", [])
    assert quiet.values["difference"] > 1e-3


def test_dropout_that_is_off() -> None:
    assert found(RawModel(dropout=0.2).eval(), "dropout").values["difference"] is None
    for model in (RawModel(dropout=0.0), QuietlyRandom().eval()):
        assert found(model, "dropout").level == "ok"
    partly = RawModel(dropout=0.2).eval()
    partly.drop.train()
    assert found(partly, "dropout").values["modules"] == ["drop"]


def test_dtypes() -> None:
    model = tiny_model("gpt_neox")
    everything = sum(p.numel() for p in model.parameters())
    plain = found(model, "dtypes")
    assert (plain.level, plain.values) == ("ok", {"weights": {"float32": everything}})
    assert found(copy.deepcopy(model).double(), "dtypes").level == "ok"
    half = found(copy.deepcopy(model).to(torch.bfloat16), "dtypes")
    assert (half.level, half.values) == ("note", {"weights": {"bfloat16": everything}})
    raw = RawModel()
    raw.head.to(torch.bfloat16)
    raw.drop.register_forward_hook(lambda module, args, output: output.to(torch.bfloat16))
    mixed = found(raw, "dtypes")
    head = sum(p.numel() for p in raw.head.parameters())
    assert mixed.level == "note"
    assert mixed.values["weights"]["bfloat16"] == head


def test_quantised_weights() -> None:
    model = RawModel()
    model.table = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    finding = found(model, "dtypes")
    assert finding.level == "warning"
    assert "table" in finding.text


def test_tied_weights() -> None:
    assert found(tiny_model("gpt_neox"), "tied").values == {"tied": [], "overlapping": []}
    finding = found(tiny_model("gpt2"), "tied")
    assert finding.level == "note"
    assert finding.values["tied"] == [["transformer.wte.weight", "lm_head.weight"]]


def test_a_parameter_that_goes_by_two_names_in_one_module() -> None:
    model = RawModel()
    model.embed.again = model.embed.weight  # type: ignore[assignment]
    assert found(model, "tied").values["tied"] == [["embed.weight", "embed.again"]]


def test_parameters_that_overlap_without_being_one() -> None:
    model = RawModel()
    model.head.weight = nn.Parameter(model.embed.weight.detach())
    finding = found(model, "tied")
    assert finding.level == "warning"
    assert finding.values["overlapping"] == [["embed.weight", "head.weight"]]
    flat = torch.randn(2 * VOCABULARY * 12)
    model.embed.weight = nn.Parameter(flat[: VOCABULARY * 12].view(VOCABULARY, 12))
    model.head.weight = nn.Parameter(flat[VOCABULARY * 12 :].view(VOCABULARY, 12))
    assert found(model, "tied").level == "ok"  # neighbours in one storage
    both = flat.view(VOCABULARY, 24)
    model.embed.weight, model.head.weight = map(nn.Parameter, (both[:, :12], both[:, 12:]))
    assert found(model, "tied").level == "ok"  # in turns, row by row
    model.head.weight = nn.Parameter(both[:, 11:23])
    assert found(model, "tied").level == "warning"


def test_parameters_that_no_restriction_moves() -> None:
    model = tiny_model("llama")
    norms = [name for name, _ in model.named_parameters() if "norm" in name]
    usual = found(model, "restrictions")
    assert (usual.level, usual.values) == ("note", {"untouched": norms, "weights": 16 * len(norms)})
    names = ["full", "l0", "l1", "embed", "unembed", "model.norm.weight"]
    assert found(model, "restrictions", restrictions=names).level == "ok"
    assert found(model, "restrictions", restrictions=names[:-1]).values["untouched"] == [
        "model.norm.weight"
    ]
    empty = torch.zeros(16, dtype=torch.bool)
    masks = {"full": None, "some": {"model.norm.weight": empty, "lm_head.weight": None}}
    untouched = found(model, "restrictions", restrictions=masks).values["untouched"]
    assert untouched == [n for n, _ in model.named_parameters() if n != "lm_head.weight"]


def test_a_wrong_restriction_is_an_error() -> None:
    model = tiny_model("llama")
    for wrong, error in ((["l7"], "out of range"), ("l0", "a list of"), ({"a": 3}, "string")):
        with pytest.raises((TypeError, ValueError), match=error):
            check_model(model, ROWS, restrictions=wrong)  # type: ignore[arg-type]


def test_structure() -> None:
    finding = found(tiny_model("llama"), "structure")
    assert finding.level == "ok"
    assert finding.text == "2 layers, each with 4 heads of size 4 in 2 groups."
    assert finding.values["num_groups"] == [2, 2]
    for model in (RawModel(), tiny_model("hooked")):
        assert found(model, "structure").level == "note"
        assert found(model, "restrictions").level == "note"
    model = tiny_model("llama")
    model.config.num_attention_heads = 3
    unknown = found(model, "structure")
    assert unknown.level == "note"
    assert "names 3 heads" in unknown.text


def test_layers_that_differ_are_listed_apart() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "lfm2", vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=24, layer_types=["conv", "conv", "full_attention"],
        block_auto_adjust_ff_dim=False, block_ff_dim=24, pad_token_id=0,
    )  # fmt: skip
    text = found(AutoModelForCausalLM.from_config(config), "structure").text
    assert text == "3 layers: 0 to 1 with no attention; 2 with 4 heads of size 4 in 2 groups."


def test_ids_and_lengths_that_do_not_fit() -> None:
    model = tiny_model("gpt2")
    assert found(model, "vocabulary").level == found(model, "length").level == "ok"
    report = check_model(model, token_rows(20, 9, seed=1, vocabulary=60))
    assert report["vocabulary"].level == "warning"
    assert report["vocabulary"].values["highest"] > 39
    with pytest.raises(KeyError, match="no finding 'batch'; there are structure"):
        report["batch"]
    long = check_model(model, token_rows(20, 30, seed=1))
    assert long["length"].level == "warning"
    assert long["length"].values == {"sequence_length": 30, "limit": 16}
    assert long["batch"].level == "ok"


def test_a_model_that_names_no_vocabulary() -> None:
    assert found(Twice(), "vocabulary").level == "note"
    assert found(Twice(), "loss", token_rows(20, 9, seed=1, vocabulary=60)).level == "warning"


def test_a_loss_no_better_than_guessing() -> None:
    model = RawModel()
    finding = found(model, "loss")
    assert finding.level == "warning"
    assert finding.values["mean"] == pytest.approx(np.log(VOCABULARY), rel=0.1)
    assert finding.values["guessing"] == pytest.approx(np.log(VOCABULARY))
    constant = Dataset.from_dict({"input_ids": np.full((8, 9), 7)})
    with torch.no_grad():
        model.head.bias[7] = 8.0
    learnt = found(model, "loss", constant)
    assert learnt.level == "ok"
    assert learnt.values["mean"] < 0.1


def test_losses_that_are_not_finite() -> None:
    model = RawModel()
    with torch.no_grad():
        model.embed.weight[5] = torch.nan
    report = check_model(model.train(), ROWS)
    assert report["loss"].level == "warning"
    assert report["dropout"].level == "ok"
    assert 0 < report["loss"].values["non_finite"] < report["loss"].values["tokens"]
    assert report["batch"].level == "note"


def test_the_ways_of_taking_a_loss() -> None:
    model = tiny_model("llama")
    assert found(model, "head").values == {"module": "lm_head"}
    assert found(model, "entry").values == {"layer": 1}
    raw = check_model(RawModel(), ROWS)
    assert raw["head"].level == raw["entry"].level == "note"
    assert raw["entry"].values == {"layer": None}
    model.lm_head.register_forward_hook(lambda module, args, output: None)
    assert "has hooks" in found(model, "head").text


@pytest.mark.parametrize("train", [False, True])
def test_the_model_comes_back_untouched(train: bool) -> None:
    model = BatchNorm(frozen=True).train(train)
    model.norm.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    needs = [p.requires_grad for p in model.parameters()]
    state = torch.get_rng_state()
    check_model(model, ROWS)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == needs
    assert all(p.grad is None for p in model.parameters())
    assert {module.training for module in model.modules()} == {train}
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_bad_input_is_one_clear_error() -> None:
    model = tiny_model("gpt2")
    wrong: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        (("gpt2", ROWS), {}, "model must be a torch.nn.Module; got str"),
        ((model, [[1, 2]]), {}, "dataset must be a datasets.Dataset"),
        ((model, ROWS.rename_column("input_ids", "ids")), {}, "no column 'input_ids'"),
        ((model, ROWS), {"batch_size": 1}, "at least 2"),
        ((model, ROWS), {"batch_size": True}, "at least 2"),
        ((model, ROWS), {"device": "gpu"}, "device='gpu' cannot be used here"),
        ((nn.Sequential(), ROWS), {}, "has no parameters"),
        ((copy.deepcopy(model).to("meta"), ROWS), {}, "meta device"),
    ]
    for arguments, options, message in wrong:
        with pytest.raises((TypeError, ValueError), match=message):
            check_model(*arguments, **options)


def test_a_report_is_read_by_people_and_programs() -> None:
    report = basinscope.check_model(tiny_model("gpt2"), ROWS)
    assert isinstance(report, ModelReport)
    assert [finding.topic for finding in report.warnings] == ["loss"]
    text = str(report)
    assert repr(report) == text
    assert text.startswith("GPT2LMHeadModel, 7,488 weights\nok       structure     2 layers")
    assert max(map(len, text.splitlines())) <= 100
    shown = io.StringIO()
    Console(file=shown, width=500).print(report)
    for finding in report.findings:
        assert finding.text in shown.getvalue()
        assert finding.text.split()[0] in text


def test_a_hooked_model_without_maths_still_has_a_structure() -> None:
    model = HookedTransformer(groups=2)
    assert _structure(model).values["num_groups"] == [2, 2]
    assert "blocks.*.ln1.w" in _restrictions(model, None).text
