"""The model's own loss: by its linear head or by its logits, which may be written over."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from basinscope.models.forward import token_logits
from basinscope.models.head import find_linear_head
from basinscope.sampling.losses import _nobody_reads, head_or_none, next_token_loss
from basinscope.sampling.sample import sample
from tests.conftest import token_rows
from tests.models_small import RawModel, tiny_model

FROM_LOGITS = "the loss is taken from the model's logits, all at once: "
STORED = ["init_loss", "sampling_loss", "sampling_loss_micro", "loss_first"]


def run(directory: Path, model: nn.Module, **changes: Any) -> xr.DataTree:
    settings: dict[str, Any] = {
        "lr": 1e-3,
        "n_beta": 10.0,
        "num_chains": 2,
        "num_draws": 4,
        "batch_size": 4,
        "num_init_loss_batches": 3,
        "device": "cpu",
        "progress": False,
    }
    observables = {"first": token_rows(30, 9, seed=2)}
    path = directory / "s.zarr"
    return sample(
        model, token_rows(48, 9, seed=1), observables, **{**settings, **changes}, output_path=path
    )


def with_dropout() -> nn.Module:
    config = AutoConfig.for_model(
        "gpt_neox", vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16, hidden_dropout=0.3,
    )  # fmt: skip
    torch.manual_seed(3)
    model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model


def hooked(model: nn.Module) -> nn.Module:
    """The same model with a head that is not to be taken apart."""
    model = copy.deepcopy(model)
    model.get_output_embeddings().register_forward_hook(nothing)  # type: ignore[operator]
    return model


def nothing(*_: Any) -> None: ...


@pytest.mark.parametrize("kind", ["gpt_neox", "gpt2", "llama"])
@pytest.mark.parametrize("method", ["sgmcmc_sgld", "rmsprop_sgld"])
def test_a_linear_head_changes_no_stored_loss(kind: str, method: str, tmp_path: Path) -> None:
    model = tiny_model(kind)
    by_head = run(tmp_path / "head", model, sampling_method=method, batches_per_draw=2)
    by_logits = run(tmp_path / "logits", hooked(model), sampling_method=method, batches_per_draw=2)
    assert (by_head.attrs["loss"], by_logits.attrs["loss"]) == ("linear head", "logits")
    assert_close(by_head, by_logits)
    assert float(by_head["sampling_loss"].std()) > 0


def test_so_with_dropout(tmp_path: Path) -> None:
    model = with_dropout()
    by_head = run(tmp_path / "head", model, train_mode=True)
    by_logits = run(tmp_path / "logits", hooked(model), train_mode=True)
    assert (by_head.attrs["loss"], by_logits.attrs["loss"]) == ("linear head", "logits")
    assert_close(by_head, by_logits)
    without = run(tmp_path / "none", model)
    assert np.abs(by_head["sampling_loss"].to_numpy() - without["sampling_loss"]).max() > 1e-3


def test_dropout_of_a_plain_model(tmp_path: Path) -> None:
    tree = run(tmp_path, RawModel(dropout=0.3), train_mode=True)
    assert tree.attrs["loss"] == "logits"
    assert all(np.isfinite(tree[name]).all() for name in STORED)


def assert_close(ours: xr.DataTree, theirs: xr.DataTree) -> None:
    for name in STORED:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=1e-5, err_msg=name)


def test_the_log_says_once_why_there_is_no_linear_head(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "basinscope")
    tree = run(tmp_path / "raw", RawModel())
    said = [r.getMessage() for r in caplog.records if r.getMessage().startswith(FROM_LOGITS)]
    assert said == [FROM_LOGITS + "RawModel is no Hugging Face model"]
    assert tree.attrs["loss"] == "logits"

    caplog.clear()
    run(tmp_path / "neox", tiny_model("gpt_neox"))
    assert FROM_LOGITS not in caplog.text


def test_a_loss_function_leaves_the_head_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "basinscope")
    model = tiny_model("gpt_neox")
    tree = run(tmp_path / "own", model, loss_fn=own_loss)
    assert tree.attrs["loss"] == "loss_fn"
    assert FROM_LOGITS not in caplog.text
    assert_close(tree, run(tmp_path / "head", model))


def own_loss(model: nn.Module, input_ids: Tensor) -> Tensor:
    logits = model(input_ids).logits[:, :-1].transpose(1, 2)
    return F.cross_entropy(logits, input_ids[:, 1:], reduction="none")


def test_no_head_is_said_and_none_is_returned(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "basinscope")
    ids = torch.randint(40, (1, 9))
    assert head_or_none(RawModel(), ids) is None
    assert "RawModel is no Hugging Face model" in caplog.text
    model = tiny_model("gpt_neox")
    assert head_or_none(model, ids) == find_linear_head(model, ids)


class Ending(nn.Module):
    """A model whose logits come from a given operation on h W^T."""

    def __init__(self, end: Callable[[Tensor], Tensor], bias: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 12)
        self.head = nn.Linear(12, 40, bias=bias)
        self.end = end

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.end(self.head(self.embed(input_ids)))


READ_AGAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "log_softmax": lambda z: z.log_softmax(-1),
    "softmax": lambda z: z.softmax(-1),
    "tanh": torch.tanh,
    "exp": torch.exp,
    "relu": torch.relu,
    "in-place relu": torch.relu_,
    "a view of tanh": lambda z: torch.tanh(z).view(z.shape),
    "an expanded view": lambda z: (z + 1)[:, :1].expand(z.shape),
}
FORGOTTEN: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda z: z,
    "a view": lambda z: z.view(1, *z.shape).view(z.shape),
    "scaled": lambda z: 0.5 * z,
    "divided": lambda z: z / 3,
    "capped": lambda z: 5 * torch.tanh(z / 5),
    "shifted": lambda z: z + 1,
    "another dtype": lambda z: z.bfloat16(),
}


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("end", [*READ_AGAIN, *FORGOTTEN])
def test_logits_are_written_over_only_where_nobody_reads_them(end: str, bias: bool) -> None:
    model, ids = Ending({**READ_AGAIN, **FORGOTTEN}[end], bias), torch.randint(40, (3, 9))
    logits = token_logits(model, ids)
    assert _nobody_reads(logits) == (end in FORGOTTEN)

    results = []
    for ours in (True, False):
        model.zero_grad()
        if ours:
            loss = next_token_loss(model, ids)
        else:
            flat = model(ids)[:, :-1].float().transpose(1, 2)
            loss = F.cross_entropy(flat, ids[:, 1:], reduction="none")
        (loss * torch.linspace(0.5, 2, 8)).mean().backward()
        results.append((loss, [p.grad for p in model.parameters()]))
    (loss, gradients), (expected, expected_gradients) = results
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for ours_grad, theirs in zip(gradients, expected_gradients, strict=True):
        unit = 1e-2 if end == "another dtype" else 1e-5
        torch.testing.assert_close(ours_grad, theirs, rtol=unit, atol=1e-3 * unit)


def test_the_memory_of_forgotten_logits_holds_their_gradient() -> None:
    kept: list[Tensor] = []

    def keep(logits: Tensor) -> Tensor:
        kept.append(logits)
        return logits

    model, ids = Ending(keep), torch.randint(40, (3, 9))
    loss = next_token_loss(model, ids)
    before = kept[0].detach().clone()
    loss.sum().backward()
    assert not torch.equal(kept[0], before)
    assert not kept[0][:, -1].any()


def test_logits_without_a_history_are_left_alone() -> None:
    model, ids = Ending(lambda z: z), torch.randint(40, (3, 9))
    with torch.no_grad():
        assert not _nobody_reads(token_logits(model, ids))
    assert not _nobody_reads(torch.randn(3, 9, 40, requires_grad=True))


@pytest.mark.parametrize("kind", ["gpt_neox", "gpt2", "llama", "raw"])
def test_the_usual_models_make_logits_that_nobody_reads(kind: str) -> None:
    assert _nobody_reads(token_logits(tiny_model(kind), torch.randint(40, (3, 9))))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = token_logits(tiny_model(kind), torch.randint(40, (3, 9)))
    assert _nobody_reads(logits)


@pytest.mark.parametrize("end", ["log_softmax", "tanh", "linear"])
def test_plain_models_of_either_kind_are_sampled(end: str, tmp_path: Path) -> None:
    model = Ending({**READ_AGAIN, **FORGOTTEN}[end])
    ours = run(tmp_path / "ours", model)
    assert ours.attrs["loss"] == "logits"
    assert_close(ours, run(tmp_path / "own", model, loss_fn=own_plain_loss))


def own_plain_loss(model: nn.Module, input_ids: Tensor) -> Tensor:
    logits = model(input_ids)[:, :-1].transpose(1, 2)
    return F.cross_entropy(logits, input_ids[:, 1:], reduction="none")
