"""Where a TransformerLens model's activations are: norms before attention, behind it, or both."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from basinscope.models.extraction import ExtractionConfig, extract
from basinscope.models.sites import find_sites

pytest.importorskip("transformer_lens.HookedTransformer")

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

NORMS: dict[str, tuple[dict[str, Any], str | None]] = {
    "before": ({}, None),
    "before and after": ({"use_normalization_before_and_after": True}, "ln1_post"),
    "after": ({"original_architecture": "Olmo2ForCausalLM"}, "ln1"),
    "none": ({"normalization_type": None, "use_normalization_before_and_after": True}, "ln1_post"),
}


def hooked(**settings: Any) -> Any:
    """A random model whose weights, biases of the projections included, are not special."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    sizes: dict[str, Any] = {
        "n_layers": 2, "n_heads": 4, "d_head": 4, "d_model": 16, "d_mlp": 32, "d_vocab": 40,
        "n_ctx": 8, "act_fn": "gelu", "seed": 1, "normalization_type": "RMS", "gated_mlp": True,
        "positional_embedding_type": "rotary", "rotary_dim": 4,
    }  # fmt: skip
    model = HookedTransformer(HookedTransformerConfig(**{**sizes, **settings}))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize("norms", NORMS)
def test_heads_and_the_bias_are_scaled_by_the_norm_behind_attention(norms: str) -> None:
    settings, name = NORMS[norms]
    model = hooked(**settings)
    ids = torch.randint(40, (3, 7), generator=torch.Generator().manual_seed(3))
    config = ExtractionConfig(resid_in=True, attn_in=True, attn_out=True, head_out=True)
    cache = extract(model, ids, config)
    _, theirs = model.run_with_cache(ids)
    for layer in range(2):
        block = model.blocks[layer]
        norm = block.get_submodule(name) if name else torch.nn.Identity()
        with torch.no_grad():
            bias = block.attn.b_O.expand_as(cache["attn_out_0"])
            heads = torch.einsum(
                "bphs,hsd->bphd", theirs[f"blocks.{layer}.attn.hook_z"], block.attn.W_O
            )
            written = heads.sum(-2) + bias
            factor = norm(written) / written
        torch.testing.assert_close(cache[f"attn_out_{layer}"], norm(written).detach())
        torch.testing.assert_close(
            cache[f"head_out_{layer}"], heads * factor.unsqueeze(-2), rtol=1e-3, atol=1e-5
        )
        torch.testing.assert_close(
            cache[f"head_out_{layer}"].sum(-2) + bias * factor,
            cache[f"attn_out_{layer}"],
            rtol=1e-3,
            atol=1e-5,
        )
    with torch.no_grad():
        normed = model.blocks[1].ln1(cache["resid_in_1"])
    expected = cache["resid_in_1"] if norms == "after" else normed
    torch.testing.assert_close(cache["attn_in_1"], expected)


def test_weights_that_are_zero_and_a_short_context_change_nothing() -> None:
    model = hooked(use_normalization_before_and_after=True, n_ctx=1)
    found = [heads.after for heads in find_sites(model).heads.values()]
    assert found == [("blocks.0.ln1_post",), ("blocks.1.ln1_post",)]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert [heads.after for heads in find_sites(model).heads.values()] == found
    assert not any(module._forward_hooks for module in model.modules())
