"""create_param_masks: what each restriction selects, how it may be written, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import basinscope
from basinscope.models.restrictions import (
    ParamMasks,
    _either,
    all_heads,
    all_layers,
    create_param_masks,
    structure_of,
)
from basinscope.models.structure import UnknownStructureError
from basinscope.sampling.losses import next_token_loss
from basinscope.sampling.sample import sample
from tests.conftest import token_rows
from tests.models_small import RawModel, tiny_model

ATTENTION = [f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkvo"]
MLP = [f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")]
NORMS = [f"model.layers.1.{norm}_layernorm.weight" for norm in ("input", "post_attention")]
EMBED, UNEMBED = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def llama() -> nn.Module:
    """Two layers of 4 heads of 4, in 2 groups, of hidden size 16; 40 token ids."""
    return tiny_model("llama")


@pytest.mark.parametrize(
    ("restriction", "names"),
    [
        ("l1", [*ATTENTION, *MLP, *NORMS]),
        ("l1 attn", ATTENTION),
        ("l1 mlp", MLP),
        ("embed", [EMBED]),
        ("unembed", [UNEMBED]),
        ("model.norm.weight", ["model.norm.weight"]),
        ("  model.norm.weight\n", ["model.norm.weight"]),
        (MLP[1], [MLP[1]]),
        (["embed", "unembed"], [EMBED, UNEMBED]),
        (("l1 mlp", "embed"), [*MLP, EMBED]),
        (["l1 mlp", "l1 attn", MLP[0]], [*MLP, *ATTENTION]),
    ],
)
def test_parts_are_whole_parameters(llama: nn.Module, restriction: Any, names: list[str]) -> None:
    masks = create_param_masks(llama, restriction)
    assert list(masks) == names
    assert set(masks.values()) == {None}


def test_full_is_every_parameter(llama: nn.Module) -> None:
    expected = dict.fromkeys(name for name, _ in llama.named_parameters())
    assert create_param_masks(llama, "full") == expected
    assert create_param_masks(llama, ["full"]) == expected
    assert (
        create_param_masks(RawModel(), " Full ").keys()
        == dict(RawModel().named_parameters()).keys()
    )


def rows(masks: ParamMasks) -> dict[str, list[int]]:
    """Which rows (of o_proj, columns) are selected, after checking that they are whole."""
    found = {}
    for name, mask in masks.items():
        assert mask is not None
        assert mask.dtype == torch.bool
        axis = int("o_proj" in name)
        assert torch.equal(mask.any(1 - axis), mask.all(1 - axis))
        found[name.split(".")[-2][0]] = mask.any(1 - axis).nonzero()[:, 0].tolist()
    return found


def test_a_head_is_its_rows_and_columns_and_its_key_value_head(llama: nn.Module) -> None:
    masks = create_param_masks(llama, "l1h2")
    assert list(masks) == ATTENTION
    assert {name: mask.shape for name, mask in masks.items() if mask is not None} == {
        name: llama.get_parameter(name).shape for name in ATTENTION
    }
    own, shared = [8, 9, 10, 11], [4, 5, 6, 7]
    assert rows(masks) == {"q": own, "k": shared, "v": shared, "o": own}


def test_a_group_is_a_key_value_head_and_all_that_share_it(llama: nn.Module) -> None:
    own, shared = list(range(8, 16)), [4, 5, 6, 7]
    found = rows(create_param_masks(llama, "l1g1"))
    assert found == {"q": own, "k": shared, "v": shared, "o": own}


@pytest.mark.parametrize(
    ("written", "plain"),
    [
        (["L0H1", " l0 h1 ", "l0_h1", "l0h01", "L 0 H 1", "l0\th1"], "l0h1"),
        (["L0G1", "l0 g1"], "l0g1"),
        (["L0 Attn", "l0attn", "l0_ATTN", "l0  attn"], "l0 attn"),
        (["L0 MLP", "l0mlp"], "l0 mlp"),
        (["L1", " l1", "l 1"], "l1"),
        (["Embed", "EMBED "], "embed"),
        (["UnEmbed"], "unembed"),
        (["FULL"], "full"),
    ],
)
def test_case_and_spaces_do_not_matter(llama: nn.Module, written: list[str], plain: str) -> None:
    expected = create_param_masks(llama, plain)
    for restriction in written:
        assert_same(create_param_masks(llama, restriction), expected)


def assert_same(masks: ParamMasks, expected: ParamMasks) -> None:
    assert list(masks) == list(expected)
    for name, mask in masks.items():
        other = expected[name]
        if mask is None or other is None:
            assert mask is other
        else:
            assert torch.equal(mask, other)


# Unions


def test_a_list_is_the_union(llama: nn.Module) -> None:
    union = create_param_masks(llama, ["l1h0", "l1h2", "l0h1", "embed"])
    parts = [create_param_masks(llama, name) for name in ("l1h0", "l1h2", "l0h1")]
    assert list(union) == [*parts[0], *parts[2], EMBED]
    for name in ATTENTION:
        masks = [part[name] for part in parts[:2]]
        assert torch.equal(union[name], masks[0] | masks[1])  # type: ignore[arg-type, operator]
    assert union[EMBED] is None
    assert_same({n: union[n] for n in parts[2]}, parts[2])


def test_a_part_of_a_parameter_and_all_of_it_is_all_of_it(llama: nn.Module) -> None:
    for restriction in (["l1h0", ATTENTION[0]], [ATTENTION[0], "l1h0"], ["l1h0", "l1 attn"]):
        assert create_param_masks(llama, restriction)[ATTENTION[0]] is None
    assert create_param_masks(llama, ["l1h0", ATTENTION[0]])[ATTENTION[1]] is not None


def test_a_union_of_all_heads_is_everything_that_is_cut(llama: nn.Module) -> None:
    union = create_param_masks(llama, [f"l0h{head}" for head in range(4)])
    assert all(mask is not None and mask.all() for mask in union.values())
    assert_same(create_param_masks(llama, ["l0h3", "l0h3"]), create_param_masks(llama, "l0h3"))


def test_unions_do_not_change_what_they_are_made_of(llama: nn.Module) -> None:
    before = create_param_masks(llama, "l0h0")
    create_param_masks(llama, ["l0h0", "l0h1"])
    assert_same(create_param_masks(llama, "l0h0"), before)


def test_a_union_of_rows_stays_one_byte_per_row(llama: nn.Module) -> None:
    union = create_param_masks(llama, ["l1h0", "l1h2"])
    assert [stored(union, name) for name in ATTENTION] == [16, 8, 8, 16]


def test_a_union_of_rows_and_columns() -> None:
    by_row = torch.tensor([True, False, False])[:, None].expand(3, 4)
    by_column = torch.tensor([False, True, True, False])[None].expand(3, 4)
    expected = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0], [0, 1, 1, 0]]).bool()
    for masks in ((by_row, by_column), (by_column, by_row), (by_row, by_column.clone())):
        assert torch.equal(_either(*masks), expected)
    assert torch.equal(_either(by_row.clone(), by_column.clone()), expected)
    assert torch.equal(_either(by_row[:, :1], ~by_row[:, :1]), torch.ones(3, 1).bool())


# Memory


def stored(masks: ParamMasks, name: str) -> int:
    mask = masks[name]
    assert mask is not None
    return mask.untyped_storage().nbytes()


def test_a_head_s_masks_take_one_byte_per_row_or_column(llama: nn.Module) -> None:
    masks = create_param_masks(llama, "l1h3")
    assert [stored(masks, name) for name in ATTENTION] == [16, 8, 8, 16]
    storages = {mask.untyped_storage().data_ptr() for mask in masks.values() if mask is not None}
    assert len(storages) == 4  # one's masks are not written into by another's


def test_400_heads_of_a_large_model_take_megabytes() -> None:
    """One layer as a model with 25 of them would have, of hidden size 2048 and 16 heads."""
    config = AutoConfig.for_model(
        "gpt_neox",
        vocab_size=40,
        hidden_size=2048,
        num_hidden_layers=1,
        num_attention_heads=16,
        intermediate_size=8,
        max_position_embeddings=16,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    heads = all_heads(model)
    assert len(heads) == 16
    taken = sum(stored(masks, name) for masks in heads.values() for name in masks)
    elements = sum(m.numel() for masks in heads.values() for m in masks.values() if m is not None)
    assert taken == 16 * (3 * 2048 + 3 * 2048 + 2048)
    assert 25 * taken < 10e6
    assert elements == 16 * (4 * 2048**2 + 3 * 2048)


# Errors


@pytest.mark.parametrize(
    ("restriction", "kind", "message"),
    [
        ("l2", ValueError, "'l2': layer 2 is out of range, the model has layers 0 to 1"),
        ("l7 mlp", ValueError, "'l7 mlp': layer 7 is out of range, the model has layers 0 to 1"),
        ("L1 H4", ValueError, "'L1 H4': head 4 is out of range, the layer has heads 0 to 3"),
        ("l0g2", ValueError, "'l0g2': group 2 is out of range, the layer has groups 0 to 1"),
        (
            "l0 head 1",
            ValueError,
            "unknown restriction 'l0 head 1'; valid are 'full', 'l0', 'l0h1', 'l0g0', 'l0 attn', "
            "'l0 mlp', 'embed', 'unembed', or the name of a parameter",
        ),
        ("", ValueError, "unknown restriction ''; valid are 'full'"),
        ("l-1", ValueError, "unknown restriction 'l-1'; valid are 'full'"),
        ("l0h1x", ValueError, "unknown restriction 'l0h1x'; valid are 'full'"),
        ("l0h1 attn", ValueError, "unknown restriction 'l0h1 attn'; valid are 'full'"),
        (
            "model.norm.wieght",
            ValueError,
            "or the name of a parameter (did you mean 'model.norm.weight'",
        ),
        (
            "model.layers.0.mlp.up_proj",
            ValueError,
            "(did you mean 'model.layers.0.mlp.up_proj.weight' or 'model.layers.",
        ),
        (
            "lm_head.wieght",
            ValueError,
            "or the name of a parameter (did you mean 'lm_head.weight'?)",
        ),
        (["l0", "full"], ValueError, "'full' is everything and cannot be combined with other"),
        ([" FULL", "l0"], ValueError, "restrictions; use it alone"),
        ([], ValueError, "the list of restrictions is empty; name some of 'full', 'l0'"),
        ((), ValueError, "the list of restrictions is empty"),
        (["l0", "l9"], ValueError, "layer 9 is out of range"),
        (["l0", "nothing"], ValueError, "unknown restriction 'nothing'"),
        (3, TypeError, "restriction must be a string or a list of strings; got 3"),
        (None, TypeError, "restriction must be a string or a list of strings; got None"),
        ({"l0"}, TypeError, "must be a string or a list of strings; got {'l0'}"),
        ({"l0": None}, TypeError, "must be a string or a list of strings"),
        (["l0", 1], TypeError, "must be a string or a list of strings; got ['l0', 1]"),
        (b"l0", TypeError, "must be a string or a list of strings; got b'l0'"),
    ],
)
def test_what_is_refused(
    llama: nn.Module, restriction: Any, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind) as caught:
        create_param_masks(llama, restriction)
    assert message in str(caught.value)


def test_a_part_that_is_not_there_selects_nothing() -> None:
    model = tiny_model("llama")
    model.get_output_embeddings = lambda: None  # type: ignore[assignment]
    with pytest.raises(ValueError, match="'unembed' selects nothing: LlamaForCausalLM has no such"):
        create_param_masks(model, "unembed")


def test_a_model_of_unknown_architecture() -> None:
    model = RawModel()
    for restriction in ("l0", "embed", ["l0h0"]):
        with pytest.raises(UnknownStructureError) as caught:
            create_param_masks(model, restriction)
        assert "RawModel has no list of layers with attention in it" in str(caught.value)
        assert "sample(param_masks={parameter name: bool tensor" in str(caught.value)
    assert create_param_masks(model, ["head.weight", "head.bias"]) == {
        "head.weight": None,
        "head.bias": None,
    }


def heads_unknown() -> nn.Module:
    model = tiny_model("llama")
    model.config.num_attention_heads = 3  # type: ignore[union-attr]
    return model


@pytest.mark.parametrize("restriction", ["l1h0", "l1g0"])
def test_an_attention_whose_heads_are_not_understood(restriction: str) -> None:
    model = heads_unknown()
    with pytest.raises(UnknownStructureError) as caught:
        create_param_masks(model, restriction)
    message = str(caught.value)
    assert message.startswith(
        f"'{restriction}': the heads of layer 1 of LlamaForCausalLM cannot be"
    )
    assert "model.layers.1.self_attn.k_proj (8, 16)" in message
    assert "Pass masks by hand" in message


def test_parts_are_found_where_heads_are_not() -> None:
    model = heads_unknown()
    assert list(create_param_masks(model, "l1 attn")) == ATTENTION
    assert list(create_param_masks(model, "l1 mlp")) == MLP
    assert all_layers(model).keys() == {"l0", "l1"}
    with pytest.raises(UnknownStructureError, match="the heads of layer 0"):
        all_heads(model)


# All of them


def test_all_heads_are_named_layer_by_layer(llama: nn.Module) -> None:
    heads = all_heads(llama)
    assert list(heads) == [f"l{layer}h{head}" for layer in range(2) for head in range(4)]
    for name, masks in heads.items():
        assert_same(masks, create_param_masks(llama, name))


def test_all_layers_and_parts_of_them(llama: nn.Module) -> None:
    assert list(all_layers(llama)) == ["l0", "l1"]
    assert list(all_layers(llama, "attn")) == ["l0 attn", "l1 attn"]
    assert list(all_layers(llama, "mlp")) == ["l0 mlp", "l1 mlp"]
    for part in ("", "attn", "mlp"):
        for name, masks in all_layers(llama, part).items():
            assert_same(masks, create_param_masks(llama, name))
    with pytest.raises(ValueError, match="unknown restriction 'l0 heads'"):
        all_layers(llama, "heads")


def test_layers_without_attention_are_left_out() -> None:
    config = AutoConfig.for_model(
        "lfm2",
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=8,
        layer_types=["conv", "full_attention"],
        pad_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config)
    assert list(all_layers(model)) == ["l0", "l1"]
    assert list(all_layers(model, "attn")) == ["l1 attn"]
    assert list(all_heads(model)) == ["l1h0", "l1h1"]


def test_a_structure_is_looked_for_once_and_again_when_parameters_change(llama: nn.Module) -> None:
    first = structure_of(llama)
    assert structure_of(llama) is first
    llama.resize_token_embeddings(41)  # type: ignore[operator]
    second = structure_of(llama)
    assert second is not first
    llama.get_submodule("model.layers").pop(1)  # type: ignore[operator]
    with pytest.raises(ValueError, match="layers 0 to 0"):
        create_param_masks(llama, "l1")


# In use


def test_public_names() -> None:
    assert basinscope.create_param_masks is create_param_masks
    assert basinscope.all_heads is all_heads
    assert basinscope.all_layers is all_layers


@pytest.mark.parametrize("restriction", ["l0h1", "l1g0", "l1 mlp", ["l0h0", "l0h3", "embed"]])
def test_sampling_moves_exactly_what_is_selected(restriction: Any, tmp_path: Path) -> None:
    model = tiny_model("llama")
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    masks = create_param_masks(model, restriction)
    seen: list[dict[str, Tensor]] = []

    def spy(model: nn.Module, ids: Tensor) -> Tensor:
        seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return next_token_loss(model, ids)

    sample(
        model,
        token_rows(12, 9, seed=1),
        {"first": token_rows(12, 9, seed=2)},
        lr=1e-3,
        n_beta=10.0,
        num_chains=1,
        num_draws=2,
        batch_size=4,
        num_init_loss_batches=1,
        init_noise=0.01,
        param_masks=masks,
        loss_fn=spy,
        device="cpu",
        output_path=tmp_path / "s.zarr",
        progress=False,
    )
    for name, value in seen[-1].items():
        moved = value != start[name]
        mask = masks.get(name, torch.tensor(False))
        if mask is None:
            mask = torch.tensor(True)
        assert torch.equal(moved, mask.expand(moved.shape)), name
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, start[name])
