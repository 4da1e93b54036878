"""A stand-in for TransformerLens models: its parameters' names and shapes, without its maths.

Names, shapes and order are those of ``HookedTransformer`` 3.9, with which
``tests/peer/test_transformer_lens.py`` compares them where it is installed.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

LAYERS, HEADS, HEAD_SIZE, HIDDEN, WIDE, VOCABULARY, CONTEXT = 2, 4, 3, 20, 32, 40, 16


class HookedTransformer(nn.Module):
    """Parameters of a model whose heads are the first axis, grouped or not, with experts or not."""

    def __init__(self, groups: int | None = None, gated: bool = False, experts: int = 0) -> None:
        super().__init__()
        self.cfg = SimpleNamespace(
            n_layers=LAYERS,
            n_heads=HEADS,
            n_key_value_heads=groups,
            d_head=HEAD_SIZE,
            d_model=HIDDEN,
            d_vocab=VOCABULARY,
            n_ctx=CONTEXT,
        )
        self.embed = _module(W_E=(VOCABULARY, HIDDEN))
        self.pos_embed = _module(W_pos=(CONTEXT, HIDDEN))
        blocks = []
        for _ in range(LAYERS):
            block = _module()
            block.ln1 = _module(w=(HIDDEN,), b=(HIDDEN,))
            block.ln2 = _module(w=(HIDDEN,), b=(HIDDEN,))
            block.attn = _attention(groups)
            block.mlp = _experts(experts) if experts else _mlp(gated)
            blocks.append(block)
        self.blocks = nn.ModuleList(blocks)
        self.ln_final = _module(w=(HIDDEN,), b=(HIDDEN,))
        self.unembed = _module(W_U=(HIDDEN, VOCABULARY), b_U=(VOCABULARY,))

    def forward(self, input_ids: torch.Tensor, return_type: str = "logits") -> torch.Tensor:
        raise NotImplementedError


def _attention(groups: int | None) -> nn.Module:
    own = {
        "W_Q": (HEADS, HIDDEN, HEAD_SIZE),
        "W_O": (HEADS, HEAD_SIZE, HIDDEN),
        "b_Q": (HEADS, HEAD_SIZE),
        "b_O": (HIDDEN,),
    }
    underscore, count = ("", HEADS) if groups is None else ("_", groups)
    shared = {f"{underscore}W_{name}": (count, HIDDEN, HEAD_SIZE) for name in "KV"}
    biases = {f"{underscore}b_{name}": (count, HEAD_SIZE) for name in "KV"}
    return _module(**own, **shared, **biases)


def _mlp(gated: bool) -> nn.Module:
    into, out = (HIDDEN, WIDE), (WIDE, HIDDEN)
    if gated:
        return _module(W_in=into, W_out=out, W_gate=into, b_in=(WIDE,), b_out=(HIDDEN,))
    return _module(W_in=into, b_in=(WIDE,), W_out=out, b_out=(HIDDEN,))


def _experts(count: int) -> nn.Module:
    module = _module()
    module.experts = nn.ModuleList()
    for _ in range(count):
        expert = _module()
        expert.W_in = nn.Linear(HIDDEN, WIDE, bias=False)
        expert.W_out = nn.Linear(WIDE, HIDDEN, bias=False)
        expert.W_gate = nn.Linear(HIDDEN, WIDE, bias=False)
        module.experts.append(expert)
    module.W_gate = nn.Linear(HIDDEN, count, bias=False)
    return module


def _module(**shapes: tuple[int, ...]) -> nn.Module:
    module = nn.Module()
    for name, shape in shapes.items():
        module.register_parameter(name, nn.Parameter(torch.zeros(shape)))
    return module
