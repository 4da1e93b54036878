"""Models and losses that are not what they look like: wrapped, patched, checkpointed, caching."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel

import basinscope
from basinscope.io.store import SampleStore
from basinscope.models.entry import NoEntryError, find_entry
from basinscope.sampling.losses import next_token_loss
from basinscope.sampling.workers import _arithmetic, _set_arithmetic
from tests.conftest import token_rows
from tests.models_small import RawModel, tiny_model

SETTINGS: dict[str, Any] = {
    "lr": 1e-2, "n_beta": 100.0, "noise_level": 0.0, "num_chains": 1, "num_draws": 4,
    "batch_size": 4, "num_init_loss_batches": 2, "batches_per_draw": 2, "save_metrics": True,
    "device": "cpu", "progress": False,
}  # fmt: skip


def run(path: Path, model: nn.Module, **changes: Any) -> xr.DataTree:
    observables = {"first": token_rows(30, 9, seed=2)}
    return basinscope.sample(
        model, changes.pop("dataset", token_rows(48, 9, seed=1)), observables,
        output_path=path / "s.zarr", **{**SETTINGS, **changes},
    )  # fmt: skip


def test_a_model_whose_own_to_belongs_to_the_original_is_still_copied(tmp_path: Path) -> None:
    model = tiny_model("gpt_neox")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def to(*args: Any, **kwargs: Any) -> nn.Module:
        return nn.Module.to(model, *args, **kwargs)

    model.to = to  # type: ignore[method-assign, assignment]
    tree = run(tmp_path / "wrapped", model)
    plain = run(tmp_path / "plain", tiny_model("gpt_neox"))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    np.testing.assert_array_equal(tree.loss_first, plain.loss_first)
    assert (tree.metrics_distance[:, 1:] > 0).all()


@pytest.mark.parametrize("how", ["loss", "forward", "decorated"])
def test_a_loss_of_the_original_is_refused(how: str, tmp_path: Path) -> None:
    model = RawModel()
    whole, loss_fn = model.forward, None
    if how == "loss":
        loss_fn = lambda _, ids: next_token_loss(model, ids)  # noqa: E731
    elif how == "forward":
        model.forward = lambda ids: whole(ids)  # type: ignore[method-assign]
    else:
        model.forward = torch.autocast("cpu", dtype=torch.bfloat16)(whole)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"weights of the model that you passed \(embed"):
        run(tmp_path, model, loss_fn=loss_fn)
    assert not list(tmp_path.iterdir())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_part_that_stays_the_original_is_refused(tmp_path: Path) -> None:
    model = RawModel()
    head = model.head.forward
    model.head.forward = lambda hidden: head(hidden)  # type: ignore[method-assign]
    with pytest.raises(
        ValueError, match=r"of the model that you passed \(head.weight, head.bias\)"
    ):
        run(tmp_path, model)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("how", ["kept", "no_grad", "detached"])
def test_a_checkpoint_that_stays_one_may_be_part_of_a_loss(how: str, tmp_path: Path) -> None:
    model = RawModel()
    names = dict(model.named_parameters())

    def loss_fn(moving: nn.Module, ids: Tensor) -> Tensor:
        with torch.set_grad_enabled(how != "no_grad"):
            checkpoint = [p.detach() if how == "detached" else p * 1 for p in names.values()]
        pairs = zip(moving.parameters(), checkpoint, strict=True)
        away = torch.stack([(p - start).square().sum() for p, start in pairs]).sum()
        return next_token_loss(moving, ids) + away

    if how == "kept":
        with pytest.raises(ValueError, match=r"detach those that are meant to stay.*no_grad"):
            run(tmp_path, model, loss_fn=loss_fn)
        return
    assert (run(tmp_path, model, loss_fn=loss_fn).metrics_distance[:, 1:] > 0).all()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_loss_of_another_model_is_refused(tmp_path: Path) -> None:
    other = RawModel()
    with pytest.raises(ValueError, match="does not depend on the weights of the model it is given"):
        run(tmp_path, RawModel(), loss_fn=lambda _, ids: next_token_loss(other, ids))


def test_parameters_without_a_gradient_are_named(tmp_path: Path) -> None:
    model = RawModel()
    model.spare = nn.Linear(2, 2)
    with pytest.warns(UserWarning, match=r"2 of \d+ parameters have no gradient.*spare\.weight"):
        run(tmp_path, model)


def test_a_sparse_gradient_is_refused(tmp_path: Path) -> None:
    model = RawModel()
    model.embed = nn.Embedding(40, 12, sparse=True)
    with pytest.raises(ValueError, match=r"embed\.weight has a sparse gradient.*sparse=False"):
        run(tmp_path, model)


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 2, width // 2
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        projected = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        heads = (y.view(*x.shape[:2], 2, -1).transpose(1, 2) for y in projected)
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.self_attn = nn.LayerNorm(width), Attention(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.self_attn(self.norm(x))


class Layered(nn.Module):
    """Three layers, which may be run again in the backward pass."""

    def __init__(self, again: bool = False) -> None:
        super().__init__()
        self.again = again
        self.embed = nn.Embedding(40, 12)
        self.layers = nn.ModuleList([Block(12) for _ in range(3)])
        self.head = nn.Linear(12, 40)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            if self.again and torch.is_grad_enabled():
                x = checkpoint(layer, x, use_reentrant=False)
            else:
                x = layer(x)
        return self.head(x)


def only_the_last_layer_moves(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.2" in name)
    return model


def test_checkpointed_layers_are_recomputed_from_where_they_were_entered(tmp_path: Path) -> None:
    found = []
    for again in (False, True):
        torch.manual_seed(0)
        model = only_the_last_layer_moves(Layered(again))
        assert find_entry(model, torch.randint(40, (1, 9))) is not None
        found.append(run(tmp_path / str(again), model))
    np.testing.assert_allclose(found[1].metrics_scaled_grad, found[0].metrics_scaled_grad, 1e-5)
    np.testing.assert_allclose(found[1].loss_first, found[0].loss_first, 1e-5)


def test_reentrant_checkpoints_can_be_sampled(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    tree = run(tmp_path, model, train_mode=True)
    plain = run(tmp_path / "plain", tiny_model("llama"), train_mode=True)
    np.testing.assert_allclose(tree.loss_first, plain.loss_first, 1e-5)


class Handing(Layered):
    """Its first layer keeps what it was given, and its last one adds that."""

    def __init__(self, once: bool) -> None:
        super().__init__()
        kept: list[Tensor] = []
        first, last = self.layers[0].forward, self.layers[2].forward

        def keeps(x: Tensor) -> Tensor:
            kept[:] = [x]
            return first(x)

        def adds(x: Tensor) -> Tensor:
            return last(x) + (kept.pop() if once else kept[0])

        self.layers[0].forward, self.layers[2].forward = keeps, adds


@pytest.mark.parametrize(
    ("once", "reason"),
    [(False, "its logits change"), (True, "it fails when layers before layer 2 are left out")],
)
def test_what_a_layer_keeps_for_a_later_one_keeps_the_model_whole(once: bool, reason: str) -> None:
    with pytest.raises(NoEntryError, match=reason):
        find_entry(only_the_last_layer_moves(Handing(once)), torch.randint(40, (1, 9)))


class Scaled(GPT2LMHeadModel):
    """A GPT-2 whose logits are multiplied with a parameter."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        self.logit_scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        out = super().forward(input_ids, **{**options, "return_dict": True})
        return (out.logits * self.logit_scale,)


def test_a_parameter_behind_the_head_moves(tmp_path: Path) -> None:
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": 40}
    model = Scaled(GPT2Config(**sizes))
    tree = run(tmp_path / "own", model)
    through_logits = run(tmp_path / "logits", model, loss_fn=next_token_loss)
    assert tree.attrs["loss"] == "logits"
    np.testing.assert_allclose(tree.loss_first, through_logits.loss_first, atol=1e-5)
    alone = run(tmp_path / "alone", model, param_masks={"logit_scale": None})
    assert (alone.metrics_distance[:, 1:] > 0).all()


def test_cached_layers_do_not_depend_on_which_chain_came_first(tmp_path: Path) -> None:
    model = tiny_model("gpt_neox")
    settings = {
        "param_masks": basinscope.create_param_masks(model, "l1"), "num_chains": 3,
        "noise_level": 1.0, "match_sampling_input_ids_across_chains": False, "batch_size": 5,
        "dataset": token_rows(23, 9, seed=1),
    }  # fmt: skip
    whole = run(tmp_path / "whole", model, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # chains that are still missing
        for chain in (2, 0, 1):
            parts = run(tmp_path / "parts", model, **settings, chains=[chain])
    np.testing.assert_array_equal(parts.sampling_loss_micro, whole.sampling_loss_micro)
    np.testing.assert_array_equal(parts.loss_first, whole.loss_first)


def test_a_configuration_named_cfg_makes_no_transformer_lens_model(tmp_path: Path) -> None:
    model = RawModel()
    model.cfg = type("Config", (), {"n_heads": 2, "n_ctx": 16, "d_vocab": 40})()
    run(tmp_path, model)


class Caching(RawModel):
    """Keeps what it makes of a batch's shape, as models do with masks and rotary tables."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("once", None)
        self.register_buffer("largest", torch.ones(1, 1))

    def forward(self, input_ids: Tensor) -> Tensor:
        if self.once is None:
            self.once = torch.ones(1)
        if len(self.largest) < len(input_ids):
            self.largest = torch.ones(len(input_ids), 1)
        weight = self.largest[: len(input_ids), :, None] * self.once
        return super().forward(input_ids) * weight


@pytest.mark.parametrize("checkpoint_every", [None, 2])
def test_buffers_that_a_model_makes_on_the_way(
    checkpoint_every: int | None, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    plain = RawModel()
    torch.manual_seed(0)
    caching = Caching()
    changes = {"num_chains": 2, "checkpoint_every": checkpoint_every}
    expected = run(tmp_path / "plain", plain, **changes)
    tree = run(tmp_path / "caching", caching, **changes)
    np.testing.assert_array_equal(tree.loss_first, expected.loss_first)
    assert caching.once is None
    assert caching.largest.shape == (1, 1)


@pytest.mark.parametrize("how", ["chains_at_once", "workers"])
def test_a_resumed_chain_has_the_threads_that_it_would_have_had(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr(SampleStore, "unfinished", lambda self: [2])
    try:
        torch.set_num_threads(4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            run(tmp_path, RawModel(), num_chains=3, **{how: 2})
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(threads)
    assert SampleStore(tmp_path / "s.zarr").record(2)["threads"] == 2


def test_workers_compute_as_their_caller_does() -> None:
    before = _arithmetic()
    other = {
        "onednn": not before["onednn"], "matmul_precision": "medium", "deterministic": True,
        "default_dtype": "float64",
    }  # fmt: skip
    try:
        _set_arithmetic(**other)
        assert _arithmetic() == other
    finally:
        _set_arithmetic(**before)


def scaled_loss(model: nn.Module, ids: Tensor, temperature: float = 1.0) -> Tensor:
    logits = model(ids)[:, :-1] / temperature
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses.view(len(ids), -1)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (partial(scaled_loss, temperature=1.0), partial(scaled_loss, temperature=5.0)),
        (partial(scaled_loss), partial(next_token_loss)),
        (lambda m, i: scaled_loss(m, i), lambda m, i: scaled_loss(m, i, 5.0)),
    ],
)
def test_another_loss_does_not_get_the_store_of_this_one(
    one: Any, other: Any, tmp_path: Path
) -> None:
    run(tmp_path, RawModel(), loss_fn=one)
    with pytest.raises(ValueError, match="loss_fn: the store has"):
        run(tmp_path, RawModel(), loss_fn=other)


def test_another_number_of_heads_is_another_model(tmp_path: Path) -> None:
    def model(heads: int) -> nn.Module:
        torch.manual_seed(0)
        sizes = {"n_embd": 16, "n_layer": 1, "n_positions": 16, "vocab_size": 40}
        return GPT2LMHeadModel(GPT2Config(n_head=heads, **sizes))

    run(tmp_path, model(2))
    run(tmp_path, model(2))
    with pytest.raises(ValueError, match="config_sha256"):
        run(tmp_path, model(4))


def test_a_saved_model_is_the_same_when_it_is_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": 40}
    model = GPT2LMHeadModel(GPT2Config(**sizes))
    run(tmp_path, model)
    model.save_pretrained(tmp_path / "model")
    run(tmp_path, GPT2LMHeadModel.from_pretrained(tmp_path / "model"))  # refused, were it another


def test_frozen_integers_are_left_alone(tmp_path: Path) -> None:
    model = RawModel()
    codes = nn.Parameter(torch.arange(4, dtype=torch.uint8), requires_grad=False)
    model.codes = codes
    run(tmp_path, model, param_masks={"head.weight": None})
    assert torch.equal(model.codes, torch.arange(4, dtype=torch.uint8))
