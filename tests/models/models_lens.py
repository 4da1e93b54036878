"""Small models of every way to make logits, with norms and biases that are neither 1 nor 0."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from tests.models.models_hooked import HIDDEN, VOCABULARY, HookedTransformer

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16, "bos_token_id": 0,
        "eos_token_id": 0}  # fmt: skip
OPT = {**SIZES, "ffn_dim": 24, "word_embed_proj_dim": 32}
GEMMA = {**GROUPED, "head_dim": 8}
MPT = {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 16}

# Settings; then norm, epsilon, its module; scale and soft cap
MODELS: dict[str, tuple[str, dict[str, Any], tuple[str, float, str | None], float, float | None]]
MODELS = {
    "gpt2": ("gpt2", GPT2, ("layer", 1e-5, "transformer.ln_f"), 1, None),
    "gpt2, eps": (
        "gpt2",
        {**GPT2, "layer_norm_epsilon": 3e-3},
        ("layer", 3e-3, "transformer.ln_f"),
        1,
        None,
    ),
    "gpt_neox": ("gpt_neox", SIZES, ("layer", 1e-5, "gpt_neox.final_layer_norm"), 1, None),
    "gptj": ("gptj", {**GPT2, "rotary_dim": 4}, ("layer", 1e-5, "transformer.ln_f"), 1, None),
    "llama": ("llama", GROUPED, ("rms", 1e-6, "model.norm"), 1, None),
    "qwen2": ("qwen2", GROUPED, ("rms", 1e-6, "model.norm"), 1, None),
    "qwen3": (
        "qwen3",
        {**GROUPED, "head_dim": 16, "rms_norm_eps": 1e-12},
        ("rms", 1e-12, "model.norm"),
        1,
        None,
    ),
    "mistral": ("mistral", GROUPED, ("rms", 1e-6, "model.norm"), 1, None),
    "gemma": ("gemma", GEMMA, ("rms", 1e-6, "model.norm"), 1, None),
    "gemma2": (
        "gemma2",
        {**GEMMA, "final_logit_softcapping": 5.0},
        ("rms", 1e-6, "model.norm"),
        1,
        5.0,
    ),
    "phi": ("phi", SIZES, ("layer", 1e-5, "model.final_layernorm"), 1, None),
    "opt": ("opt", OPT, ("layer", 1e-5, "model.decoder.final_layer_norm"), 1, None),
    "opt, projected": (
        "opt",
        {**OPT, "word_embed_proj_dim": 12},
        ("layer", 1e-5, "model.decoder.final_layer_norm"),
        1,
        None,
    ),
    "opt, projected, no norm": (
        "opt",
        {**OPT, "word_embed_proj_dim": 12, "do_layer_norm_before": False},
        ("none", 0, None),
        1,
        None,
    ),
    "falcon": (
        "falcon",
        {k: v for k, v in SIZES.items() if k != "intermediate_size"},
        ("layer", 1e-5, "transformer.ln_f"),
        1,
        None,
    ),
    "mpt": ("mpt", MPT, ("layer", 1e-5, "transformer.norm_f"), 1, None),
    "bloom": (
        "bloom",
        {"hidden_size": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0},
        ("layer", 1e-5, "transformer.ln_f"),
        1,
        None,
    ),
    "cohere": (
        "cohere",
        {**SIZES, "logit_scale": 0.0625},
        ("layer", 1e-5, "model.norm"),
        0.0625,
        None,
    ),
    "granite": (
        "granite",
        {**SIZES, "logits_scaling": 6.0},
        ("rms", 1e-6, "model.norm"),
        1 / 6,
        None,
    ),
    "olmo": ("olmo", SIZES, ("layer", 1e-5, "model.norm"), 1, None),
    "olmo2": ("olmo2", SIZES, ("rms", 1e-5, "model.norm"), 1, None),
    "nemotron": ("nemotron", GROUPED, ("layer", 1e-5, "model.norm"), 1, None),
}


def built(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """One of ``MODELS``, seeded."""
    name, settings, *_ = MODELS[kind]
    torch.manual_seed(3)
    config = AutoConfig.for_model(name, vocab_size=VOCABULARY, **settings)
    return perturbed(AutoModelForCausalLM.from_config(config).eval()).to(dtype)


def perturbed(model: nn.Module) -> nn.Module:
    """The same with everything a little off."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def some_ids(rows: int = 3, tokens: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(VOCABULARY, (rows, tokens), generator=generator)


class RunningHooked(HookedTransformer):
    """A TransformerLens stand-in that runs, with a norm and an unembedding as that has them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block() for _ in range(2))
        self.ln_final = _Norm()
        self.unembed = _Unembed()

    def forward(self, input_ids: Tensor, return_type: str = "both") -> Any:
        stream = self.embed.W_E[input_ids] + self.pos_embed.W_pos[: input_ids.shape[1]]
        for block in self.blocks:
            stream = block(stream)
        logits = 7 * torch.tanh(self.unembed(self.ln_final(stream)) / 7)
        assert return_type == "logits"
        return logits


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(HIDDEN, HIDDEN) / HIDDEN)

    def forward(self, stream: Tensor) -> Tensor:
        return stream + torch.tanh(stream @ self.W)


class _Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.eps = 2e-4
        self.w, self.b = nn.Parameter(torch.ones(HIDDEN)), nn.Parameter(torch.zeros(HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt() * self.w + self.b


class _Unembed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.W_U = nn.Parameter(torch.zeros(HIDDEN, VOCABULARY))
        self.b_U = nn.Parameter(torch.zeros(VOCABULARY))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.W_U + self.b_U
