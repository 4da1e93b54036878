"""The linear head of Hugging Face models: what is found, what it is good for, what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GPTNeoXForCausalLM, GPTNeoXModel

from basinscope.models.forward import token_logits
from basinscope.models.head import (
    LinearHead,
    NoLinearHeadError,
    find_linear_head,
    hidden_states,
    linear_of,
)
from basinscope.sampling.losses import next_token_loss
from tests.models_small import RawModel

VOCABULARY = 40
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
OPT = {"ffn_dim": 32, "word_embed_proj_dim": 16}
GEMMA = {"num_key_value_heads": 1, "head_dim": 8, "query_pre_attn_scalar": 8}

# What a configuration says, and with it the head's scale and soft cap
MODELS: dict[str, tuple[str, dict[str, Any], float, float | None]] = {
    "gpt_neox": ("gpt_neox", SIZES, 1.0, None),
    "gpt2, tied": ("gpt2", {**GPT2, "bos_token_id": 0, "eos_token_id": 0}, 1.0, None),
    "llama": ("llama", SIZES, 1.0, None),
    "gemma2, capped": ("gemma2", {**SIZES, **GEMMA, "final_logit_softcapping": 5.0}, 1.0, 5.0),
    "gemma2, no cap": ("gemma2", {**SIZES, **GEMMA, "final_logit_softcapping": None}, 1.0, None),
    "cohere, scaled": ("cohere", {**SIZES, "logit_scale": 0.0625}, 0.0625, None),
    "cohere, oddly": ("cohere", {**SIZES, "logit_scale": 0.1768}, 0.1768, None),
    "granite, scaled": ("granite", {**SIZES, "logits_scaling": 6.0}, 1 / 6, None),
    "phi, with bias": ("phi", SIZES, 1.0, None),
    "opt, tied": ("opt", {**SIZES, **OPT}, 1.0, None),
    "mixtral": ("mixtral", {**SIZES, "num_local_experts": 2, "num_key_value_heads": 2}, 1.0, None),
}
TIED = {"gpt2, tied", "opt, tied", "gemma2, capped", "cohere, scaled"}


def built(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """With weights large enough for logits to differ, and for a soft cap to matter."""
    name, settings, _, _ = MODELS[kind]
    torch.manual_seed(3)
    config = AutoConfig.for_model(name, vocab_size=VOCABULARY, **settings)
    model: nn.Module = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model.to(dtype)


def some_ids(rows: int = 3) -> Tensor:
    return torch.randint(VOCABULARY, (rows, 9), generator=torch.Generator().manual_seed(1))


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Assert that a model is afterwards as it was."""

    def state() -> list[Any]:
        attributes = [
            (name, module.training, sorted(vars(module)), dict(module._forward_hooks))
            for name, module in model.named_modules()
        ]
        grads = [(name, p.requires_grad, p.grad) for name, p in model.named_parameters()]
        return [attributes, grads]

    before, values = state(), {k: v.clone() for k, v in model.state_dict().items()}
    yield
    assert state() == before
    assert values.keys() == model.state_dict().keys()
    assert all(torch.equal(v, values[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_scale_and_soft_cap_are_those_of_the_configuration(kind: str, training: bool) -> None:
    model = built(kind).train(training)
    with unchanged(model):
        head = find_linear_head(model, some_ids(1))
    _, _, scale, softcap = MODELS[kind]
    assert linear_of(model, head) is model.get_output_embeddings()  # type: ignore[operator]
    assert head.scale == pytest.approx(scale, rel=1e-6)
    assert head.softcap == (None if softcap is None else pytest.approx(softcap, rel=1e-6))
    weights = {id(p) for p in model.get_input_embeddings().parameters()}  # type: ignore[operator]
    tied = id(linear_of(model, head).weight) in weights
    assert tied >= (kind in TIED)
    assert (linear_of(model, head).bias is not None) == (kind == "phi, with bias")


@pytest.mark.parametrize("kind", MODELS)
def test_losses_and_gradients_are_those_of_the_logits(kind: str) -> None:
    model, ids = built(kind), some_ids()
    head = find_linear_head(model, ids[:1])
    results = []
    for found in (head, None):
        model.zero_grad()
        with torch.no_grad():
            alone = next_token_loss(model, ids, found)
        loss = next_token_loss(model, ids, found)
        torch.testing.assert_close(alone, loss)
        (loss * torch.linspace(0.5, 2, 8)).mean().backward()
        results.append((loss, {name: p.grad for name, p in model.named_parameters()}))
    (loss, gradients), (expected, expected_gradients) = results
    assert loss.shape == (3, 8)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert float(expected.detach().std()) > 0.01
    assert any(g is not None and g.any() for g in gradients.values())
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", MODELS)
def test_hidden_states_are_what_the_head_is_given(kind: str) -> None:
    model, ids = built(kind), some_ids()
    head = find_linear_head(model, ids[:1])
    with unchanged(model):
        hidden = hidden_states(model, head, ids)
    assert hidden.shape == (3, 9, 16)
    assert hidden.requires_grad
    linear = linear_of(model, head)
    logits = head.scale * nn.functional.linear(hidden, linear.weight, linear.bias)
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    torch.testing.assert_close(logits, token_logits(model, ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_models_agree_within_rounding(kind: str, dtype: torch.dtype) -> None:
    """The scale is found to float32's precision: nothing of it is measured in 16 bits."""
    model, ids = built(kind, dtype), some_ids()
    with unchanged(model):
        head = find_linear_head(model, ids[:1])
    _, _, scale, softcap = MODELS[kind]
    assert head.scale == pytest.approx(scale, rel=1e-6)
    assert head.softcap == (None if softcap is None else pytest.approx(softcap, rel=1e-6))
    with torch.no_grad():
        loss, expected = next_token_loss(model, ids, head), next_token_loss(model, ids)
        largest = float(token_logits(model, ids).abs().max())
    assert loss.dtype == torch.float32
    atol = 4 * torch.finfo(dtype).eps * max(1.0, largest)
    torch.testing.assert_close(loss, expected, rtol=0, atol=atol)


def test_a_float64_model_is_scaled_to_float64() -> None:
    model, ids = built("granite, scaled", torch.float64), some_ids()
    head = find_linear_head(model, ids[:1])
    assert head.scale == pytest.approx(1 / 6, rel=1e-6)
    loss, expected = next_token_loss(model, ids, head), next_token_loss(model, ids)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


class Changed(GPTNeoXForCausalLM):  # type: ignore[misc]
    """A GPT-NeoX that does something to its logits."""

    after: Callable[[Tensor], Tensor]

    def forward(self, input_ids: Tensor, **options: Any) -> tuple[Tensor]:
        return (type(self).after(super().forward(input_ids, **options)[0]),)


def changed(after: Callable[[Tensor], Tensor]) -> nn.Module:
    kind = type("Changed", (Changed,), {"after": staticmethod(after)})
    config = AutoConfig.for_model("gpt_neox", vocab_size=VOCABULARY, **SIZES)
    model: nn.Module = kind(config).eval()
    return model


@pytest.mark.parametrize(
    ("after", "scale", "softcap"),
    [
        (lambda z: -2 * z, -2.0, None),
        (lambda z: 3.7 * torch.tanh(0.31 * z / 3.7), 0.31, 3.7),
        (lambda z: 50 * torch.tanh(z / 50), 1.0, 50.0),
        (lambda z: -30 * torch.tanh(z / 30), -1.0, 30.0),
        (lambda z: z.double(), 1.0, None),
        (lambda z: z.clone().view_as(z), 1.0, None),
    ],
)
def test_scales_and_caps_that_no_configuration_has(
    after: Callable[[Tensor], Tensor], scale: float, softcap: float | None
) -> None:
    model, ids = changed(after), some_ids()
    with unchanged(model):
        head = find_linear_head(model, ids[:1])
    assert head == LinearHead("lm_head", scale, softcap)
    loss, expected = next_token_loss(model, ids, head), next_token_loss(model, ids)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("divisor", [3.0, 6.0, 0.3, 71.55417527999327])
def test_a_scale_with_many_digits_is_as_precise_as_a_float32(divisor: float) -> None:
    head = find_linear_head(changed(lambda z: z / divisor), some_ids(1))
    assert head.scale == pytest.approx(1 / divisor, rel=1.2e-7)


def masked(logits: Tensor) -> Tensor:
    logits = logits.clone()
    logits[..., 7] = torch.finfo(logits.dtype).min
    return logits


FAILS = r"it fails with a head replaced \(no luck\)"
NEITHER = "no scaled or soft-capped output of its head"


def no_luck(logits: Tensor) -> Tensor:
    if logits.abs().max() > 1000:
        raise RuntimeError("no luck\nand a second line")
    return logits


@pytest.mark.parametrize(
    ("after", "reason"),
    [
        (lambda z: z + 0.01, NEITHER),
        (lambda z: z - z[:, :1], NEITHER),
        (lambda z: z + torch.arange(float(VOCABULARY)), NEITHER),
        (lambda z: z.roll(1, -1), NEITHER),
        (lambda z: z.roll(1, 1), NEITHER),
        (lambda z: z.flip(-1), NEITHER),
        (lambda z: z.log_softmax(-1), NEITHER),
        (lambda z: 30 * torch.nn.functional.softsign(z / 30), NEITHER),
        (lambda z: z.clamp(-100, 100), NEITHER),
        (lambda z: 0 * z, NEITHER),
        (lambda z: z * torch.nan, NEITHER),
        (masked, NEITHER),
        (lambda z: z[..., :-1], r"its logits have shape \(1, 9, 39\)"),
        (lambda z: z[:, -1:], r"its logits have shape \(1, 1, 40\)"),
        (lambda z: z.transpose(1, 2), r"its logits have shape \(1, 40, 9\)"),
        (lambda z: z.bfloat16() / 3, r"scaled or capped in torch\.bfloat16"),
        (no_luck, FAILS),
    ],
)
def test_logits_that_are_something_else_are_refused(
    after: Callable[[Tensor], Tensor], reason: str
) -> None:
    model = changed(after)
    with unchanged(model), pytest.raises(NoLinearHeadError, match=reason):
        find_linear_head(model, some_ids(1))


def test_logits_that_are_scaled_in_place() -> None:
    model, ids = changed(lambda z: z.mul_(0.5)), some_ids()
    head = find_linear_head(model, ids[:1])
    assert head.scale == 0.5
    loss, expected = next_token_loss(model, ids, head), next_token_loss(model, ids)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


class Twice(GPTNeoXForCausalLM):  # type: ignore[misc]
    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        super().forward(input_ids, **options)
        return super().forward(input_ids, **options)


class Never(GPTNeoXForCausalLM):  # type: ignore[misc]
    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        hidden = self.gpt_neox(input_ids)[0]
        return (hidden @ self.lm_head.weight.t(),)


class Last(GPTNeoXForCausalLM):  # type: ignore[misc]
    """Applies its head to the last position only, and repeats what comes of it."""

    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        logits = super().forward(input_ids, logits_to_keep=1, **options)[0]
        return (logits.expand(-1, input_ids.shape[1], -1),)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Twice, "its head runs 2 times per forward pass"),
        (Never, "its head runs 0 times per forward pass"),
        (Last, r"its head is given \(1, 1, 16\) for ids of shape \(1, 9\)"),
        (GPTNeoXModel, "GPTNeoXModel names no output embeddings"),
    ],
)
def test_models_that_use_their_head_otherwise_are_refused(
    kind: type[nn.Module], reason: str
) -> None:
    model = kind(AutoConfig.for_model("gpt_neox", vocab_size=VOCABULARY, **SIZES)).eval()
    with unchanged(model), pytest.raises(NoLinearHeadError, match=reason):
        find_linear_head(model, some_ids(1))


def test_a_model_of_another_kind_is_refused() -> None:
    model = RawModel()
    with unchanged(model), pytest.raises(NoLinearHeadError, match="RawModel is no Hugging Face"):
        find_linear_head(model, some_ids(1))


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Renamed(nn.Linear):
    """A subclass that does what a linear layer does."""


def test_a_head_of_another_kind_is_refused() -> None:
    model = built("gpt_neox")
    model.lm_head = Doubled(16, VOCABULARY)
    with unchanged(model), pytest.raises(NoLinearHeadError, match="a Doubled, not an nn"):
        find_linear_head(model, some_ids(1))
    model.lm_head = nn.Sequential(nn.Linear(16, VOCABULARY))
    with unchanged(model), pytest.raises(NoLinearHeadError, match="a Sequential, not an nn"):
        find_linear_head(model, some_ids(1))
    model.lm_head = Renamed(16, VOCABULARY)
    assert find_linear_head(model, some_ids(1)) == LinearHead("lm_head", 1.0, None)


def wrap_forward(head: nn.Linear) -> None:
    """As libraries that move layers between devices do."""
    forward = head.forward
    vars(head)["forward"] = lambda hidden: forward(hidden)


HOOKS: dict[str, Callable[[nn.Linear], object]] = {
    "forward": lambda head: head.register_forward_hook(lambda *_: None),
    "before forward": lambda head: head.register_forward_pre_hook(lambda *_: None),
    "backward": lambda head: head.register_full_backward_hook(lambda *_: None),
    "before backward": lambda head: head.register_full_backward_pre_hook(lambda *_: None),
    "replaced forward": wrap_forward,
    "weight norm": lambda head: nn.utils.parametrizations.weight_norm(head),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_a_head_with_hooks_is_refused_or_does_what_it_did(kind: str) -> None:
    """A head whose weight is made from other parameters is a linear layer, too."""
    model, ids = built("gpt_neox"), some_ids()
    HOOKS[kind](model.lm_head)  # type: ignore[arg-type]
    if kind != "weight norm":
        with unchanged(model), pytest.raises(NoLinearHeadError, match="its head has hooks"):
            find_linear_head(model, ids[:1])
        return
    head = find_linear_head(model, ids[:1])
    expected = next_token_loss(model, ids)
    loss = next_token_loss(model, ids, head)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    (loss - expected).sum().backward()
    assert all(p.grad is not None for p in model.lm_head.parameters())  # type: ignore[union-attr]


def test_a_model_is_whole_again_after_an_error_in_its_forward_pass() -> None:
    model = built("gpt_neox")
    head = find_linear_head(model, some_ids(1))
    with unchanged(model), pytest.raises(IndexError):
        hidden_states(model, head, some_ids() + VOCABULARY)
    with unchanged(model), pytest.raises(NoLinearHeadError, match="it fails with a head replaced"):
        find_linear_head(model, some_ids(1) + VOCABULARY)


def test_a_head_can_be_found_where_no_gradient_is_taken() -> None:
    model = built("gpt_neox")
    with torch.inference_mode():
        inside = find_linear_head(model, some_ids(1))
    assert inside == find_linear_head(model, some_ids(1))
    loss = next_token_loss(model, some_ids(), inside)
    loss.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
