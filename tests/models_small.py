"""Small models of each kind that the sampler takes, seeded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 40


def tiny_model(kind: str) -> nn.Module:
    """Build one of ``KINDS``; every one is float32, without dropout, with 40 token ids."""
    torch.manual_seed(3)
    return KINDS[kind]().eval()


def _hugging_face(name: str, **extra: Any) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(name, vocab_size=VOCABULARY, **extra)
    return AutoModelForCausalLM.from_config(config)


def _gpt2() -> nn.Module:
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
    return _hugging_face(
        "gpt2",
        **sizes,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )


def _gpt_neox() -> nn.Module:
    return _hugging_face(
        "gpt_neox",
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )


def _llama() -> nn.Module:
    return _hugging_face(
        "llama",
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
    )


class RawModel(nn.Module):
    """Maps ids to a logits tensor."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 12)
        self.mix = nn.GRU(12, 12, batch_first=True)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(12, VOCABULARY)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden, _ = self.mix(self.embed(input_ids))
        return self.head(self.drop(hidden))


class ObjectModel(RawModel):
    """Maps ids to an object with ``.logits``."""

    def forward(self, input_ids: Tensor) -> SimpleNamespace:  # type: ignore[override]
        return SimpleNamespace(logits=super().forward(input_ids))


class HookedStandIn(RawModel):
    """Looks like a TransformerLens model: ``cfg``, ``return_type`` and a chatty ``to``."""

    def __init__(self) -> None:
        super().__init__()
        self.cfg = SimpleNamespace(n_heads=2, d_vocab=VOCABULARY, n_ctx=16)

    def forward(self, input_ids: Tensor, return_type: str = "both") -> Any:  # type: ignore[override]
        logits = super().forward(input_ids)
        return logits if return_type == "logits" else (logits, logits.mean())

    def to(self, device: Any, print_details: bool = True) -> HookedStandIn:  # type: ignore[override]
        assert not print_details, "moving a TransformerLens model must not print"
        return super().to(device)


KINDS = {
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "llama": _llama,
    "raw": RawModel,
    "object": ObjectModel,
    "hooked": HookedStandIn,
}
