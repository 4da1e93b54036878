"""Tiny Hugging Face causal LMs of many architectures, with no weight at a special value."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

VOCABULARY = 64
_SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_GPT = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32}
_OPT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 32,
    "max_position_embeddings": 32,
    "word_embed_proj_dim": 16,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 4},
    "codegen": {**_GPT, "rotary_dim": 4},
    "cohere": _GROUPED,
    "falcon": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4},
    "gemma2": {**_GROUPED, "head_dim": 8},
    "gemma3_text": {**_GROUPED, "head_dim": 8},
    "gpt2": _GPT,
    "gpt_neo": {
        "hidden_size": 16,
        "num_layers": 2,
        "num_heads": 4,
        "intermediate_size": 32,
        "attention_types": [[["global"], 2]],
        "max_position_embeddings": 32,
    },
    "gpt_neox": _SIZES,
    "gptj": {**_GPT, "rotary_dim": 4},
    "granite": {**_GROUPED, "residual_multiplier": 0.22},
    "llama": _GROUPED,
    "mistral": _GROUPED,
    "mixtral": {**_GROUPED, "num_local_experts": 2},
    "mpt": {"d_model": 16, "n_layers": 2, "n_heads": 4, "max_seq_len": 32},
    "olmo2": _GROUPED,
    "opt": _OPT,
    "phi": _SIZES,
    "phi3": {**_GROUPED, "pad_token_id": 0},
    "qwen2": _GROUPED,
    "qwen3": {**_GROUPED, "head_dim": 8},
    "stablelm": _GROUPED,
}


def tiny(name: str, **settings: Any) -> nn.Module:
    """Build one of ``CONFIGS``: 2 layers of 4 heads, 64 token ids, seeded, norms and biases too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(7)
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    config = AutoConfig.for_model(
        name, vocab_size=VOCABULARY, **{**ends, **CONFIGS[name], **settings}
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model
