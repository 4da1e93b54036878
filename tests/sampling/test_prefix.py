"""Layers that no draw changes run once; the numbers are those of running them always."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import basinscope
from basinscope.io.store import SampleStore
from basinscope.models.entry import NoEntryError, entered, find_entry, hidden_states_at
from basinscope.models.structure import layer_modules
from basinscope.sampling import chain as chain_module
from basinscope.sampling.losses import head_or_none, next_token_loss
from tests.conftest import token_rows
from tests.models_small import tiny_model

KINDS = ["gpt_neox", "gpt2", "llama"]
SETTINGS: dict[str, Any] = {
    "lr": 1e-3, "n_beta": 3.0, "localization": 10.0, "num_chains": 2, "num_draws": 8,
    "batch_size": 4, "num_init_loss_batches": 2, "progress": False, "device": "cpu",
}  # fmt: skip


def restricted(kind: str, layer: int) -> nn.Module:
    model = tiny_model(kind)
    prefix = f"{layer_modules(model)[layer]}."
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(prefix))
    return model


def run(path: Path, kind: str, restriction: Any, **changes: Any) -> SampleStore:
    model = tiny_model(kind)
    data, other = token_rows(24, 9, seed=1), token_rows(30, 9, seed=2)
    basinscope.sample(
        model, data, {"a": (data, 1), "b": (other, 2)},
        param_masks=basinscope.create_param_masks(model, restriction),
        output_path=path, **{**SETTINGS, **changes},
    )  # fmt: skip
    return SampleStore(path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inference", [False, True])
def test_a_pass_from_the_entry_is_the_whole_pass(kind: str, inference: bool) -> None:
    model, ids = restricted(kind, 1), torch.randint(40, (3, 9))
    entry = find_entry(model, ids[:1])
    assert entry is not None
    assert entry.first == 1
    hidden = hidden_states_at(model, entry, ids)
    head = head_or_none(model, ids[:1])
    with torch.inference_mode(inference):
        whole = next_token_loss(model, ids, head)
        with entered(model, entry, hidden):
            short = next_token_loss(model, ids, head)
    torch.testing.assert_close(short, whole, rtol=1e-6, atol=1e-6)
    if not inference:
        moved = [p for p in model.parameters() if p.requires_grad]
        for ours, theirs in zip(
            torch.autograd.grad(short.sum(), moved),
            torch.autograd.grad(whole.sum(), moved),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_saved_where_the_first_layer_moves(kind: str) -> None:
    assert find_entry(restricted(kind, 0), torch.randint(40, (1, 9))) is None
    model = tiny_model(kind).requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)  # type: ignore[operator]
    assert find_entry(model, torch.randint(40, (1, 9))) is None


class Remembering(nn.Module):
    """A last layer that looks at what the first one left behind."""

    def __init__(self, inner: nn.Module, model: nn.Module) -> None:
        super().__init__()
        self.inner, self.outside = inner, [model]

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = self.inner(hidden, *args, **kwargs)
        return out + self.outside[0].seen if isinstance(out, Tensor) else out


def test_layers_that_are_tied_together_are_all_run() -> None:
    model = restricted("gpt_neox", 1)
    layers = model.gpt_neox.layers  # type: ignore[union-attr]
    layers[0].register_forward_hook(lambda m, a, out: setattr(model, "seen", out))
    layers[1] = Remembering(layers[1], model)  # type: ignore[index]
    with pytest.raises(NoEntryError, match="its logits change when layers before layer 1"):
        find_entry(model, torch.randint(40, (1, 9)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("restriction", ["l1", "l1h0", ["l1 mlp", "l1h1"]], ids=str)
@pytest.mark.parametrize("batches", [1, 2], ids=["one batch", "accumulated"])
def test_stores_are_equal_with_and_without(
    kind: str, restriction: Any, batches: int, tmp_path: Path
) -> None:
    settings = {"gradient_accumulation_steps": batches}
    plain = run(tmp_path / "all.zarr", kind, restriction, prefix_cache_bytes=0, **settings)
    short = run(tmp_path / "short.zarr", kind, restriction, **settings)
    for name, array in plain.arrays.items():
        np.testing.assert_allclose(
            short.arrays[name][...], array[...], rtol=1e-5, atol=1e-6, err_msg=name
        )


def test_layers_below_run_once_per_sequence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """24 sampling rows and 12 observed ones, whatever the number of draws and chains."""
    passes: Counter[int] = Counter()
    copies = chain_module.working_copy

    def counted(job: Any) -> nn.Module:
        model = copies(job)
        for number, name in enumerate(layer_modules(model)):
            model.get_submodule(name).self_attn.q_proj.register_forward_hook(  # type: ignore[union-attr]
                lambda m, args, out, number=number: passes.update({number: len(args[0])})
            )
        return model

    monkeypatch.setattr("basinscope.sampling.sample.working_copy", counted)
    run(tmp_path / "s.zarr", "llama", "l1", num_draws=12, chains_at_once=1)
    below, above = passes[0], passes[1]
    # at the start come 8 rows of initial loss, the 12 observed, and few to try the model with
    assert 24 + 12 + 8 + 12 <= below <= 24 + 12 + 8 + 12 + 8
    assert above >= 2 * 12 * (4 + 12)


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        (10**6, "run once for observables and sampling batches"),
        (12 * 9 * 16 * 4, "run once for observables"),
        (10, "run once for nothing, for prefix_cache_bytes is too small"),
    ],
)
def test_activations_are_kept_within_a_budget(
    budget: int, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """12 observed sequences of 9 tokens of width 16 in float32 come first."""
    with caplog.at_level(logging.INFO, logger="basinscope"):
        run(tmp_path / "s.zarr", "gpt_neox", "l1", prefix_cache_bytes=budget)
    lines = [r.message for r in caplog.records if "layers below layer 1" in r.message]
    assert len(lines) == 1
    assert lines[0].endswith(said)


def test_a_budget_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="prefix_cache_bytes must be a number of bytes"):
        run(tmp_path / "s.zarr", "gpt_neox", "l1", prefix_cache_bytes=-1)
