"""Final norm and unembedding: what is found makes the model's own logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2LMHeadModel

from basinscope.models.forward import token_logits
from basinscope.models.structure import UnknownStructureError, layer_modules
from basinscope.models.unembedding import (
    _norm_numbers,
    find_final_norm,
    find_unembedding,
    project,
)
from tests.models.models_lens import (
    GPT2,
    MODELS,
    SIZES,
    VOCABULARY,
    RunningHooked,
    built,
    perturbed,
    some_ids,
)
from tests.models.test_head import unchanged
from tests.models_small import RawModel
from tests.reference import logit_lens as reference


def last_stream(model: nn.Module, ids: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """What the last layer returns, and the logits."""
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        kept.append((output[0] if isinstance(output, tuple) else output).clone())

    layer = model.get_submodule(layer_modules(model)[-1])
    handle = layer.register_forward_hook(keep)
    with torch.no_grad():
        logits = token_logits(model, ids)
    handle.remove()
    return kept[0].float().numpy(), logits.float().numpy()


@pytest.mark.parametrize("kind", MODELS)
def test_what_is_found_makes_the_models_logits(kind: str) -> None:
    model = built(kind)
    with unchanged(model):
        found = find_unembedding(model)
    stream, logits = last_stream(model, some_ids())
    expected = np.apply_along_axis(reference.logits, -1, stream, found)
    np.testing.assert_allclose(expected, logits, atol=1e-4 * np.abs(logits).max())
    np.testing.assert_allclose(project(found, stream), expected, atol=1e-5 * np.abs(logits).max())
    quiet = 1e-3 * stream  # where epsilon matters
    expected = np.apply_along_axis(reference.logits, -1, quiet, found)
    np.testing.assert_allclose(project(found, quiet), expected, atol=1e-5 * np.abs(expected).max())
    assert found.weight.shape == (VOCABULARY, stream.shape[-1])
    assert all(v.dtype == np.float32 for v in vars(found).values() if isinstance(v, np.ndarray))


@pytest.mark.parametrize("kind", MODELS)
def test_its_numbers_are_the_models(kind: str) -> None:
    model = built(kind)
    found = find_unembedding(model)
    _, _, (norm, eps, module), scale, softcap = MODELS[kind]
    assert (found.norm, found.softcap) == (norm, softcap)
    assert found.eps == pytest.approx(eps, rel=1e-9, abs=0)
    assert found.scale == pytest.approx(scale, rel=1e-6)
    assert find_final_norm(model) == module
    if module is None or kind == "olmo":  # whose norm has no weight
        assert found.norm_weight is None
        return
    own = model.get_submodule(module)
    added = 1 if kind in ("gemma", "gemma2", "nemotron") else 0
    weight = own.weight.detach().numpy() + added  # type: ignore[operator, union-attr]
    np.testing.assert_allclose(found.norm_weight, weight, rtol=2e-6, atol=1e-6)
    bias = getattr(own, "bias", None)
    if bias is None:
        assert found.norm_bias is None
    else:
        np.testing.assert_array_equal(found.norm_bias, bias.detach().numpy())
    assert (found.bias is not None) == (kind in ("phi", "gptj"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2", "granite", "opt, projected"])
def test_sixteen_bit_models_are_read_as_exactly(kind: str, dtype: torch.dtype) -> None:
    model = built(kind, dtype)
    found, full = find_unembedding(model), find_unembedding(model.float())
    _, _, (norm, eps, _), scale, softcap = MODELS[kind]
    assert (found.norm, found.softcap) == (norm, softcap)
    assert found.eps == pytest.approx(eps, rel=1e-9, abs=0)
    assert found.scale == pytest.approx(scale, rel=1e-6)
    atol = 0.1 if kind == "opt, projected" else 1e-6
    np.testing.assert_allclose(found.weight, full.weight, atol=atol)
    assert found.norm_weight is not None
    np.testing.assert_allclose(found.norm_weight, full.norm_weight, rtol=1e-5)


def test_a_hooked_model() -> None:
    torch.manual_seed(0)
    model = perturbed(RunningHooked())
    found = find_unembedding(model)
    assert find_final_norm(model) == "ln_final"
    assert (found.norm, found.eps, found.scale, found.softcap) == ("layer", 2e-4, 1.0, 7.0)
    np.testing.assert_array_equal(found.weight, model.unembed.W_U.detach().numpy().T)
    np.testing.assert_array_equal(found.bias, model.unembed.b_U.detach().numpy())
    stream, logits = last_stream(model, some_ids())
    np.testing.assert_allclose(project(found, stream), logits, atol=1e-5)


class OddNorm(nn.Module):
    """A norm whose epsilon is no attribute, or one of that name."""

    def __init__(self, eps: float, centred: bool, told: bool) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(31)), nn.Parameter(torch.randn(31))
        self.centred, self.numbers = centred, (eps,)
        if told:
            self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True) if self.centred else x
        root = torch.sqrt(x.pow(2).mean(-1, keepdim=True) + self.numbers[0])
        return x / root * self.weight + self.bias


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("eps", [1e-12, 1.1920929e-07, 1e-6, 3.3e-4, 0.1, 2.0])
def test_a_norm_is_measured(eps: float, centred: bool) -> None:
    torch.manual_seed(0)
    for told, precision in ((True, 1e-12), (False, 1e-6)):
        norm = OddNorm(eps, centred, told)
        with torch.no_grad():
            found = _norm_numbers(norm, 31)
        assert found is not None
        assert found.norm == ("layer" if centred else "rms")
        assert found.eps == pytest.approx(eps, rel=precision, abs=0)
        np.testing.assert_allclose(found.weight, norm.weight.detach(), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(found.bias, norm.bias.detach())


@pytest.mark.parametrize(
    "module",
    [nn.Identity(), nn.Dropout(0.5), nn.Tanh(), nn.ReLU(), nn.Softmax(-1), nn.Linear(31, 31),
     nn.GroupNorm(1, 31), nn.Hardtanh()],
)  # fmt: skip
def test_other_modules_are_no_norm(module: nn.Module) -> None:
    with torch.no_grad():
        assert _norm_numbers(module.eval(), 31) is None


def test_it_is_a_copy() -> None:
    model = built("gpt2")
    found = find_unembedding(model)
    before = found.weight.copy(), found.norm_bias.copy()  # type: ignore[union-attr]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    np.testing.assert_array_equal(found.weight, before[0])
    np.testing.assert_array_equal(found.norm_bias, before[1])


def test_a_model_in_training_and_with_wrapped_modules_is_read_as_well() -> None:
    """As libraries that move layers between devices wrap them."""
    model = built("gpt2").train()
    expected = find_unembedding(model)
    head = model.lm_head
    forward = head.forward  # type: ignore[union-attr]
    vars(head)["forward"] = lambda hidden: forward(hidden)
    head.register_forward_hook(lambda *_: None)  # type: ignore[union-attr]
    found = find_unembedding(model)
    assert (found.eps, found.scale) == (expected.eps, expected.scale)
    np.testing.assert_array_equal(found.weight, expected.weight)
    assert model.training


class Changed(GPT2LMHeadModel):  # type: ignore[misc]
    """Does something to its logits."""

    def forward(self, input_ids: Tensor, **options: Any) -> tuple[Tensor]:
        return (super().forward(input_ids, **options)[0] + 0.5,)


class Between(nn.Module):
    """Stands between the layers and the final norm."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden + hidden.roll(1, -1))


class Bent(nn.Linear):
    """A head that does more than multiply."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(torch.relu(input))


def test_what_is_no_unembedding_is_refused() -> None:
    model = perturbed(Changed(AutoConfig.for_model("gpt2", vocab_size=VOCABULARY, **GPT2)).eval())
    with unchanged(model), pytest.raises(UnknownStructureError, match=r"of Changed .* its logits"):
        find_unembedding(model)
    model = built("gpt2")
    model.transformer.ln_f = Between(model.transformer.ln_f)  # type: ignore[union-attr]
    with pytest.raises(UnknownStructureError, match=r"norm transformer\.ln_f\.norm is not given"):
        find_unembedding(model)
    model = built("llama")
    bent = Bent(32, VOCABULARY, bias=False)
    bent.weight = model.lm_head.weight  # type: ignore[union-attr]
    model.lm_head = bent
    found = r"differ from its own by up to .* Found: norm 'rms' \(model\.norm\), eps 1e-06, scale 1"
    with unchanged(model), pytest.raises(UnknownStructureError, match=found):
        find_unembedding(model)
    config = AutoConfig.for_model("bert", vocab_size=VOCABULARY, is_decoder=True, **SIZES)
    with pytest.raises(UnknownStructureError, match=r"transform\.LayerNorm is not given what"):
        find_unembedding(AutoModelForCausalLM.from_config(config))
    with pytest.raises(UnknownStructureError, match="RawModel has no list of layers"):
        find_unembedding(RawModel())


def test_an_affine_map_between_norm_and_head_is_multiplied_in() -> None:
    model = built("llama")
    norm = model.model.norm  # type: ignore[union-attr]
    model.model.norm = nn.Sequential(norm, nn.Linear(32, 32))  # type: ignore[union-attr]
    found = find_unembedding(model)
    stream, logits = last_stream(model, some_ids())
    np.testing.assert_allclose(project(found, stream), logits, atol=1e-4)
    assert found.bias is not None
    model.model.norm.append(nn.Tanh())  # type: ignore[union-attr, operator]
    with pytest.raises(UnknownStructureError, match="no affine map of what model"):
        find_unembedding(model)
