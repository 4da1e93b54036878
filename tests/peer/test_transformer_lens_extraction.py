"""Activations of TransformerLens's own ``HookedTransformer``, against its own cache."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from basinscope.models.extraction import ExtractionConfig, extract
from basinscope.models.interventions import Intervention
from tests.peer.test_transformer_lens import HEADS, KINDS, LAYERS, hooked, ids

pytest.importorskip("transformer_lens.HookedTransformer")

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

__all__ = ["ids"]  # the fixture
THEIRS = {
    "resid_in": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_out": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "queries": "attn.hook_q",
    "keys": "attn.hook_k",
    "values": "attn.hook_v",
    "attn_pattern": "attn.hook_pattern",
}


@pytest.mark.parametrize("kind", KINDS)
def test_activations_are_those_of_its_own_cache(kind: str, ids: Tensor) -> None:
    model = hooked(kind)
    with torch.no_grad():
        logits, theirs = model.run_with_cache(ids)
    names = set(THEIRS) - ({"mlp_out"} if kind == "without MLP" else set())
    config = ExtractionConfig(
        **dict.fromkeys(names, True), head_out=True, embed=True, attn_in=True, last_layernorm=True,
        logits=True,
    )  # fmt: skip
    cache = extract(model, ids, config)
    torch.testing.assert_close(cache["logits"], logits)
    torch.testing.assert_close(cache["embed"], theirs["hook_embed"])
    for layer in range(LAYERS):
        for name in names:
            key = f"blocks.{layer}.{THEIRS[name]}"
            if key in theirs:  # no resid_mid where attention and MLP are side by side
                torch.testing.assert_close(cache[f"{name}_{layer}"], theirs[key])
            else:
                assert name == "resid_mid"
        shares = cache[f"head_out_{layer}"].sum(-2) + model.blocks[layer].attn.b_O
        torch.testing.assert_close(shares, cache[f"attn_out_{layer}"], rtol=1e-4, atol=1e-5)
    final = cache[f"resid_out_{LAYERS - 1}"]
    torch.testing.assert_close(cache["last_layernorm_second_moment"], final.square().mean(-1))


def test_interventions_reach_it(ids: Tensor) -> None:
    model = hooked("plain")
    config = ExtractionConfig(resid_out=True, attn_out=True, head_out=True, logits=True)
    plain = extract(model, ids, config)
    heads = [Intervention("zero", f"head_out_L0H{head}") for head in range(HEADS)]
    cache = extract(model, ids, config, heads)
    bias = model.blocks[0].attn.b_O.expand_as(cache["attn_out_0"])
    torch.testing.assert_close(cache["attn_out_0"], bias)
    patched = extract(model, ids, config, [Intervention("patch", "resid_out_0", source=1)])
    torch.testing.assert_close(patched["logits"][0], plain["logits"][1])
