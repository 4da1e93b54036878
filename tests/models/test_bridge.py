"""TransformerLens's bridges: the Hugging Face model inside, with its modules hooked in place."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import Phi3Config, Phi3ForCausalLM

import basinscope
from basinscope.models.extraction import ExtractionConfig, extract
from basinscope.models.forward import inside_bridge
from basinscope.models.unembedding import find_unembedding
from tests.conftest import token_rows
from tests.models_small import VOCABULARY, tiny_model

builder = pytest.importorskip("transformer_lens.model_bridge.sources._bridge_builder")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

KINDS = ("gpt2", "gpt_neox", "llama", "phi3")  # queries, keys and values fused, mixed, apart, fused
SETTINGS: dict[str, Any] = {
    "lr": 1e-2, "n_beta": 100.0, "noise_level": 0.0, "num_chains": 1, "num_draws": 3,
    "batch_size": 4, "num_init_loss_batches": 2, "device": "cpu", "progress": False,
}  # fmt: skip


def plain(kind: str) -> Any:
    if kind != "phi3":
        return tiny_model(kind)
    torch.manual_seed(3)
    config = Phi3Config(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16, pad_token_id=0,
    )  # fmt: skip
    return Phi3ForCausalLM(config).eval()


def bridge(kind: str) -> nn.Module:
    model = plain(kind)
    made = builder.build_bridge_from_module(model, type(model).__name__, hf_config=model.config)
    return cast(nn.Module, made)


def losses(model: nn.Module, path: Path, **changes: Any) -> np.ndarray:
    tree = basinscope.sample(
        model, token_rows(48, 9, seed=1), {"first": token_rows(30, 9, seed=2)},
        output_path=path, **{**SETTINGS, **changes},
    )  # fmt: skip
    found: np.ndarray = tree["loss_first"].to_numpy()
    return found


@pytest.fixture
def ids() -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, VOCABULARY, (3, 9)))


@pytest.mark.parametrize("restriction", ["l0", "l1", "l1 attn", "l0 mlp", "l1h1", "l0g0", "embed"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_restriction_moves_what_it_moves_without_the_bridge(
    kind: str, restriction: str, tmp_path: Path
) -> None:
    found = []
    for model, name in ((bridge(kind), "bridge.zarr"), (plain(kind), "plain.zarr")):
        masks = basinscope.create_param_masks(model, restriction)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # such as: parameters have no gradient
            found.append(losses(model, tmp_path / name, param_masks=masks))
    assert np.abs(found[1][:, -1] - found[1][:, 0]).max() > 1e-4
    np.testing.assert_allclose(found[0], found[1], rtol=0, atol=2e-6)


@pytest.mark.parametrize("masks", [None, "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_sampled_whole_and_stays_as_it_is(
    kind: str, masks: str | None, ids: Tensor, tmp_path: Path
) -> None:
    model = bridge(kind)
    param_masks = None if masks is None else basinscope.create_param_masks(model, masks)
    inside = inside_bridge(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    logits = model(ids)  # of which it keeps attention patterns, with their graph
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        moved = losses(model, tmp_path / "s.zarr", param_masks=param_masks)
    assert np.abs(moved[:, -1] - moved[:, 0]).max() > 1e-3
    assert inside_bridge(model) is inside
    assert inside is not model
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.requires_grad
        assert parameter.grad is None
    torch.testing.assert_close(model(ids), logits)


class FusedAttention(nn.Module):
    """An attention of no bridge that also has modules named q, k and v, behind its projection."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.q, self.k, self.v = nn.Identity(), nn.Identity(), nn.Identity()


class FusedAttentions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"attn": FusedAttention()}) for _ in range(2)])


def test_a_fused_projection_of_a_model_that_is_no_bridge_is_kept() -> None:
    masks = basinscope.create_param_masks(FusedAttentions(), "l1 attn")
    names = ("qkv.weight", "qkv.bias", "out.weight", "out.bias")
    assert [*masks] == [f"layers.1.attn.{name}" for name in names]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_used_any_more_is_left_out_of_a_report(kind: str) -> None:
    rows = token_rows(48, 9, seed=1)
    reports = [
        {finding.topic: finding for finding in basinscope.check_model(model, rows).findings}
        for model in (bridge(kind), plain(kind))
    ]
    for topic in ("structure", "dtypes", "tied", "entry"):
        assert reports[0][topic].level == reports[1][topic].level
    ours, theirs = (len(report["tied"].values["tied"]) for report in reports)
    assert ours == theirs
    ours, theirs = (report["restrictions"].values["weights"] for report in reports)
    assert ours == theirs


@pytest.mark.parametrize("kind", KINDS)
def test_activations_and_unembedding_are_those_without_the_bridge(kind: str, ids: Tensor) -> None:
    hooked, bare = bridge(kind), plain(kind)
    kinds = (
        "resid_in", "resid_mid", "resid_out", "attn_in", "attn_out", "mlp_out", "head_out",
        "queries", "keys", "values", "attn_pattern", "embed", "last_layernorm", "logits",
    )  # fmt: skip
    if kind == "gpt_neox":
        kinds = tuple(name for name in kinds if name != "resid_mid")  # attention beside the MLP
    config = ExtractionConfig(**dict.fromkeys(kinds, True))  # type: ignore[arg-type]
    got, expected = (extract(model, ids, config) for model in (hooked, bare))
    assert list(got) == list(expected)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-6)
    ours, theirs = (find_unembedding(model) for model in (hooked, bare))
    np.testing.assert_allclose(ours.weight, theirs.weight, rtol=1e-5, atol=1e-7)
    assert (ours.norm, ours.num_layers) == (theirs.norm, theirs.num_layers)
