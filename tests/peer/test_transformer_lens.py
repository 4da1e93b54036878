"""Against TransformerLens's own ``HookedTransformer``, built from a configuration.

The class is in TransformerLens up to 3.9; version 4 has bridges to Hugging Face models instead.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import basinscope
from basinscope.models.entry import find_entry
from basinscope.models.forward import max_sequence_length, token_logits, vocabulary_size
from basinscope.sampling.losses import next_token_loss
from tests.conftest import token_rows
from tests.models import models_hooked

pytest.importorskip("transformer_lens.HookedTransformer")

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

LAYERS, HEADS, HEAD_SIZE = models_hooked.LAYERS, models_hooked.HEADS, models_hooked.HEAD_SIZE
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {"n_key_value_heads": 2},
    "one group": {"n_key_value_heads": 1},
    "rotary": {
        "n_key_value_heads": 2, "positional_embedding_type": "rotary", "rotary_dim": 2,
        "normalization_type": "RMS", "gated_mlp": True, "act_fn": "silu",
    },
    "experts": {"num_experts": 3, "experts_per_token": 2, "gated_mlp": True, "act_fn": "silu"},
    "without MLP": {"attn_only": True},
    "without norm": {"normalization_type": None},
    "parallel": {"parallel_attn_mlp": True},
    "solu": {"act_fn": "solu_ln"},
}  # fmt: skip
STAND_INS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {"groups": 2},
    "experts": {"experts": 3},
}
SETTINGS: dict[str, Any] = {
    "lr": 1e-3, "n_beta": 10.0, "num_chains": 2, "num_draws": 4, "batch_size": 4,
    "num_init_loss_batches": 2, "batches_per_draw": 2, "device": "cpu", "progress": False,
}  # fmt: skip


def hooked(kind: str, **changes: Any) -> Any:
    """A random model of the sizes of the stand-in, with biases that are not zero."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    sizes = {
        "n_layers": LAYERS, "n_heads": HEADS, "d_head": HEAD_SIZE, "d_model": models_hooked.HIDDEN,
        "d_mlp": models_hooked.WIDE, "d_vocab": models_hooked.VOCABULARY,
        "n_ctx": models_hooked.CONTEXT, "act_fn": "gelu", "seed": 1, "init_weights": True,
    }  # fmt: skip
    model = HookedTransformer(HookedTransformerConfig(**{**sizes, **KINDS[kind], **changes}))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture
def ids() -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, models_hooked.VOCABULARY, (3, 9)))


@pytest.mark.parametrize("kind", STAND_INS)
def test_the_stand_in_has_the_same_parameters(kind: str) -> None:
    ours, theirs = models_hooked.HookedTransformer(**STAND_INS[kind]), hooked(kind)
    shapes = [
        [(n, tuple(p.shape)) for n, p in model.named_parameters()] for model in (ours, theirs)
    ]
    assert shapes[0] == shapes[1]
    for restriction in ("l0", "l1 attn", "l0 mlp", "l1h3", "l0g0", "embed", "unembed"):
        masks = [basinscope.create_param_masks(model, restriction) for model in (ours, theirs)]
        assert list(masks[0]) == list(masks[1])
        for one, other in zip(masks[0].values(), masks[1].values(), strict=True):
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_its_own(kind: str, ids: Tensor) -> None:
    model = hooked(kind)
    with torch.no_grad():
        assert torch.equal(token_logits(model, ids), model(ids, return_type="logits"))
        own = model(ids, return_type="loss", loss_per_token=True)
        torch.testing.assert_close(next_token_loss(model, ids), own, rtol=1e-5, atol=1e-5)
    assert (vocabulary_size(model), max_sequence_length(model)) == (
        models_hooked.VOCABULARY,
        models_hooked.CONTEXT,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_is_what_changes_its_output_and_no_other(kind: str, ids: Tensor) -> None:
    """Moving what "l0h{h}" selects changes what head h hands on, and its group's if it shares."""
    model = hooked(kind)
    groups = KINDS[kind].get("n_key_value_heads", HEADS)
    for head in range(HEADS):
        masks = basinscope.create_param_masks(model, f"l0h{head}")
        assert not any(name.endswith("b_O") for name in masks)
        queries = {n: m for n, m in masks.items() if n.endswith(("W_Q", "b_Q"))}
        assert changed_heads(model, queries, ids) == {head}
        of_group = {h for h in range(HEADS) if h * groups // HEADS == head * groups // HEADS}
        inside = {n: m for n, m in masks.items() if not n.endswith("W_O")}
        assert changed_heads(model, inside, ids) == of_group
        written = {n: m for n, m in masks.items() if n.endswith("W_O")}
        assert changed_heads(model, written, ids) == set()
        assert changed_heads(model, written, ids, hook="hook_result") == {head}


@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_what_a_layer_is_made_of(kind: str) -> None:
    model = hooked(kind)
    masks = {name: basinscope.create_param_masks(model, name) for name in ("l0", "l0 attn")}
    norms = {n for n in masks["l0"] if ".ln" in n}
    experts = set(basinscope.all_layers(model, "mlp").get("l0 mlp", {}))
    assert set(masks["l0"]) == norms | set(masks["l0 attn"]) | experts
    assert bool(experts) == (kind != "without MLP")
    heads = basinscope.all_heads(model)
    assert list(heads) == [f"l{n}h{h}" for n in range(LAYERS) for h in range(HEADS)]
    union = basinscope.create_param_masks(model, [f"l0h{h}" for h in range(HEADS)])
    assert set(masks["l0 attn"]) - set(union) == {"blocks.0.attn.b_O"}
    assert all(mask is None or bool(mask.all()) for mask in union.values())


@pytest.mark.parametrize("kind", ["plain", "grouped", "rotary", "experts"])
def test_sampling_moves_only_the_restriction(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = hooked(kind)
    before = copy.deepcopy(model.state_dict())
    capsys.readouterr()
    trees = {
        cached: basinscope.sample(
            model,
            token_rows(24, 9, seed=1),
            {"seen": token_rows(20, 9, seed=2)},
            param_masks=basinscope.create_param_masks(model, ["l1h0", "l1 mlp"]),
            output_path=tmp_path / f"{cached}.zarr",
            prefix_cache_bytes=2**20 if cached else 0,
            **SETTINGS,
        ).to_dataset()
        for cached in (False, True)
    }
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    for name in ("loss_seen", "sampling_loss", "init_loss"):
        np.testing.assert_allclose(trees[True][name], trees[False][name], rtol=1e-5, atol=1e-5)
    losses = trees[True]["loss_seen"].to_numpy()
    assert np.isfinite(losses).all()
    assert np.ptp(losses, axis=1).max() > 1e-4
    assert capsys.readouterr().out == ""


def test_init_loss_is_that_of_the_model_itself(tmp_path: Path) -> None:
    model, data = hooked("grouped"), token_rows(24, 9, seed=1)
    tree = basinscope.sample(
        model, data, {"seen": data}, output_path=tmp_path / "s.zarr",
        **{**SETTINGS, "num_init_loss_batches": 6},
    )  # fmt: skip
    with torch.no_grad():
        own = model(data[:]["input_ids"], return_type="loss", loss_per_token=True).mean(0)
    np.testing.assert_allclose(tree["init_loss"][0], own, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_forward_passes_enter_at_the_layer_that_moves(kind: str, ids: Tensor) -> None:
    model = hooked(kind).requires_grad_(False)
    model.blocks[LAYERS - 1].requires_grad_(True)
    entry = find_entry(model, ids)
    assert entry is not None
    assert entry.first == LAYERS - 1


def test_previews_and_checks_show_it(capsys: pytest.CaptureFixture[str]) -> None:
    model = hooked("grouped")
    capsys.readouterr()
    basinscope.preview_weight_restriction(model, "l0h1")
    shown = capsys.readouterr().out
    assert "blocks.0.attn" in shown
    assert f"{models_hooked.HIDDEN * HEAD_SIZE} of {HEADS * models_hooked.HIDDEN * HEAD_SIZE}" in (
        shown
    )
    report = basinscope.check_model(model, token_rows(20, 9, seed=1))
    assert report["structure"].values["num_groups"] == [2] * LAYERS
    assert report["batch"].level == report["entry"].level == "ok"


def changed_heads(
    model: Any, masks: dict[str, Tensor | None], ids: Tensor, hook: str = "hook_z"
) -> set[int]:
    """The heads of layer 0 whose output changes when the selected weights do."""
    moved = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, mask in masks.items():
            parameter: nn.Parameter = moved.get_parameter(name)
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise if mask is None else noise * mask)
    outputs = [_heads_of(each, ids, hook) for each in (model, moved)]
    different = (outputs[0] - outputs[1]).abs().amax(dim=(0, 1, 3)) > 1e-6
    return set(different.nonzero().flatten().tolist())


def _heads_of(model: Any, ids: Tensor, hook: str) -> Tensor:
    """(sequence, token, head, width)."""
    model.set_use_attn_result(hook == "hook_result")
    with torch.no_grad():
        _, cache = model.run_with_cache(ids, return_type="logits")
    return cache[f"blocks.0.attn.{hook}"]
