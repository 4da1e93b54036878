"""sample(): what moves and what does not, what is equal to what, and how runs fail."""

from __future__ import annotations

import errno
import math
import os
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
import zarr
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional as F

import basinscope
from basinscope.io.store import DONE, FAILED, PENDING, SampleStore, StoreMismatchError
from basinscope.io.stored import DamagedStoreError
from basinscope.io.writer import StoreWriteError
from basinscope.kernels.noise import INIT, LANGEVIN, fill_normal
from basinscope.sampling.chain import working_copy
from basinscope.sampling.init_loss import init_losses
from basinscope.sampling.job import SamplingJob, next_token_loss
from basinscope.sampling.sample import ChainFailedWarning, sample
from tests.conftest import token_rows
from tests.models_small import KINDS, RawModel, tiny_model

COMMON: dict[str, Any] = {
    "lr": 1e-3,
    "n_beta": 10.0,
    "num_chains": 2,
    "num_draws": 4,
    "batch_size": 4,
    "num_init_loss_batches": 3,
    "batches_per_draw": 2,
    "device": "cpu",
    "progress": False,
}
METHODS = ["sgmcmc_sgld", "rmsprop_sgld"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_gives_finite_losses(kind: str, tmp_path: Path) -> None:
    tree = run(tmp_path, tiny_model(kind), save_metrics=True, save_sampling_input_ids=True)
    for name, array in tree.data_vars.items():
        assert np.isfinite(array).all(), name
    assert tree.attrs["completed"] == 1
    ids = token_ids(48, 1)[tree.sampling_rows.to_numpy()]
    for chain in range(2):
        np.testing.assert_array_equal(tree.sampling_input_ids_micro[chain], ids)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_give_float32_losses(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model("gpt_neox").to(dtype)
    tree = run(tmp_path, model, lr=1e-2)
    for name in ("init_loss", "sampling_loss", "sampling_loss_micro", "loss_first"):
        assert tree[name].dtype == np.float32, name
    losses = tree.loss_first.to_numpy()
    assert np.isfinite(losses).all()
    kept = torch.from_numpy(losses).to(dtype).float().numpy()
    assert (kept != losses).mean() > 0.9, "losses were rounded to the model's own type"


@pytest.mark.parametrize("ending", ["success", "exception", "keyboard"])
@pytest.mark.parametrize("method", METHODS)
def test_the_caller_s_model_is_untouched(ending: str, method: str, tmp_path: Path) -> None:
    model = RawModel(dropout=0.3)
    model.train()
    model.head.bias.requires_grad_(False)
    model(torch.zeros(1, 3, dtype=torch.long)).sum().backward()
    grad = model.head.weight.grad
    before, state = snapshot(model), torch.get_rng_state()
    errors = {"exception": ZeroDivisionError, "keyboard": KeyboardInterrupt}

    def loss_fn(copied: nn.Module, ids: Tensor) -> Tensor:
        loss_fn.calls += 1  # type: ignore[attr-defined]
        if loss_fn.calls == 20 and ending in errors:  # type: ignore[attr-defined]
            raise errors[ending]
        return next_token_loss(copied, ids)

    loss_fn.calls = 0  # type: ignore[attr-defined]
    settings = {"sampling_method": method, "loss_fn": loss_fn, "init_noise": 0.1, "lr": 0.1}
    if ending in errors:
        with pytest.raises(errors[ending]):
            run(tmp_path, model, **settings, train_mode=True)
    else:
        run(tmp_path, model, **settings, train_mode=True)

    assert loss_fn.calls >= 20  # type: ignore[attr-defined]
    after = snapshot(model)
    assert before.keys() == after.keys()
    for name in before:
        assert before[name] == after[name], name
    assert model.head.weight.grad is grad
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("error", [IndexError, StopIteration, MemoryError])
def test_an_error_of_the_loss_is_raised_whatever_its_kind(
    error: type[Exception], tmp_path: Path
) -> None:
    spy = WeightSpy()

    def loss_fn(model: nn.Module, ids: Tensor) -> Tensor:
        if len(spy.seen) > 10:
            raise error("from the loss")
        return spy(model, ids)

    with pytest.raises(error, match="from the loss"):
        run(tmp_path, loss_fn=loss_fn)
    assert SampleStore(tmp_path / "s.zarr").unfinished() == [0, 1]


def test_other_generators_are_untouched(tmp_path: Path) -> None:
    import random

    states = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    run(tmp_path, train_mode=True)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states  # noqa: NPY002


@pytest.mark.parametrize("method", METHODS)
def test_only_masked_elements_move(method: str, tmp_path: Path) -> None:
    model = tiny_model("raw")
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    mask = torch.rand(40, 12, generator=torch.Generator().manual_seed(1)) < 0.3
    spy = WeightSpy()
    run(
        tmp_path,
        model,
        param_masks={"head.weight": mask, "mix.bias_ih_l0": None},
        loss_fn=spy,
        sampling_method=method,
        localization=5.0,
        llc_weight_decay=3.0,
        init_noise=0.01,
    )
    for weights in spy.seen[-3:]:
        for name, value in weights.items():
            moved = value != start[name]
            if name == "head.weight":
                assert torch.equal(moved, mask)
            elif name == "mix.bias_ih_l0":
                assert moved.all()
            else:
                assert not moved.any(), name


def test_parameters_that_need_no_gradient_stay_unless_masks_name_them(tmp_path: Path) -> None:
    model = tiny_model("raw")
    model.get_submodule("head").requires_grad_(False)
    spy = WeightSpy()
    run(tmp_path / "a", model, loss_fn=spy)
    assert torch.equal(spy.seen[-1]["head.weight"], model.get_parameter("head.weight"))
    assert not torch.equal(spy.seen[-1]["embed.weight"], model.get_parameter("embed.weight"))
    run(tmp_path / "b", model, loss_fn=spy, param_masks={"head.weight": None})
    assert not torch.equal(spy.seen[-1]["head.weight"], model.get_parameter("head.weight"))
    assert torch.equal(spy.seen[-1]["embed.weight"], model.get_parameter("embed.weight"))


def test_dropout_is_off_unless_asked_for(tmp_path: Path) -> None:
    model = RawModel(dropout=0.5).train()
    plain = run(tmp_path / "plain", RawModelLike(model, 0.0))
    off = run(tmp_path / "off", model)
    on = run(tmp_path / "on", model, train_mode=True)
    assert_equal(off, plain)
    assert not np.allclose(on.sampling_loss_micro[:, 0], plain.sampling_loss_micro[:, 0])
    assert not np.allclose(on.loss_first, plain.loss_first)
    assert not np.allclose(on.init_loss, plain.init_loss)


def test_dropout_repeats_with_the_seed_whatever_torch_s_own_seed(tmp_path: Path) -> None:
    model = RawModel(dropout=0.5)
    torch.manual_seed(1)
    first = run(tmp_path / "first", model, train_mode=True)
    torch.manual_seed(2)
    assert_equal(run(tmp_path / "again", model, train_mode=True), first)


def test_gradient_accumulation_equals_one_large_batch(tmp_path: Path) -> None:
    settings = {"num_init_loss_batches": 2, "save_metrics": True}
    four = run(tmp_path / "four", batch_size=2, gradient_accumulation_steps=4, **settings)
    one = run(tmp_path / "one", batch_size=8, batches_per_draw=1, **settings)
    for name in ("sampling_loss_micro", "metrics_scaled_grad", "metrics_distance", "init_loss"):
        np.testing.assert_allclose(four[name], one[name], rtol=2e-4, atol=1e-5, err_msg=name)
    micro = four.sampling_loss_micro.to_numpy().reshape(2, 4, 4, 2, 8)
    np.testing.assert_allclose(four.sampling_loss, micro.mean(2), rtol=1e-6)


def test_draws_are_the_steps_that_the_settings_say(tmp_path: Path) -> None:
    tree = run(tmp_path, num_burnin_steps=3, num_steps_bw_draws=2, num_draws=3)
    micro = tree.sampling_loss_micro.to_numpy()
    assert micro.shape[1] == 3 + 3 * 2
    np.testing.assert_array_equal(tree.sampling_loss, micro[:, [3, 5, 7]])


def test_observables_see_the_weights_after_the_update(tmp_path: Path) -> None:
    """With the sampling rows as observable, draw i's loss is not yet known in step i."""
    spy = WeightSpy()
    observables = {"first": token_rows(30, 9, seed=2)}
    tree = run(tmp_path, observables=observables, loss_fn=spy, num_chains=1, num_draws=2)
    model = tiny_model("raw")
    for draw in range(2):
        at = spy.seen[1 + 2 + 3 + draw * 3 + 1]  # check, start (2 + 3); step, 2 batches
        model.load_state_dict(at)
        ids = torch.from_numpy(tree.input_ids_first.to_numpy().astype(np.int64))
        expected = torch.cat([next_token_loss(model, part) for part in ids.split(4)])
        torch.testing.assert_close(
            torch.from_numpy(tree.loss_first[0, draw].to_numpy()), expected.detach()
        )


def test_a_complete_store_is_returned_without_sampling(tmp_path: Path) -> None:
    spy = WeightSpy()
    first = run(tmp_path, loss_fn=spy)
    spy.error = AssertionError("sampled again")
    before = contents(tmp_path)
    assert_equal(run(tmp_path, loss_fn=spy), first)
    assert contents(tmp_path) == before


def test_other_settings_are_refused_and_the_store_stays(tmp_path: Path) -> None:
    run(tmp_path)
    before = contents(tmp_path)
    other = tiny_model("raw")
    with torch.no_grad():
        other.get_parameter("head.bias")[0] += 1
    half = torch.zeros(40, dtype=torch.bool).index_fill_(0, torch.arange(20), True)
    for changes, named in [
        ({"lr": 2e-3}, ["sampler.lr", "0.001", "0.002"]),
        ({"num_draws": 5, "init_seed": 1}, ["sampler.num_draws", "sampler.init_seed"]),
        ({"dataset": token_rows(48, 9, seed=9)}, ["datasets.sampling.sha256"]),
        ({"observables": {"first": token_rows(30, 9, 7)}}, ["observable first.sha256"]),
        ({"observables": {}}, ["observables", "datasets.observable first"]),
        ({"model": other}, ["model.sha256"]),
        ({"param_masks": {"head.bias": half}}, ["param_masks.elements", "20"]),
        ({"loss_fn": mean_of_logits}, ["loss_fn", "mean_of_logits"]),
        ({"train_mode": True}, ["sampler.train_mode"]),
    ]:
        with pytest.raises(StoreMismatchError, match="left as it is") as caught:
            run(tmp_path, **changes)
        for part in named:
            assert part in str(caught.value), changes
        assert contents(tmp_path) == before, changes


def test_a_store_that_another_process_made_meanwhile_is_compared_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the comparison of settings and the store, a large model is copied and tried."""

    def slowly(job: SamplingJob) -> nn.Module:
        monkeypatch.undo()
        run(tmp_path, chains=[0])  # the other process
        return working_copy(job)

    monkeypatch.setattr("basinscope.sampling.sample.working_copy", slowly)
    with pytest.raises(StoreMismatchError, match=r"sampler\.lr: the store has 0\.001"):
        run(tmp_path, lr=2e-3, chains=[1])
    states = [record["state"] for record in SampleStore(tmp_path / "s.zarr").records().values()]
    assert states[:2] == [DONE, PENDING]


def test_losses_are_read_wherever_the_working_directory_is_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    expected = run(tmp_path)
    tree = basinscope.open_store("s.zarr")
    part = tree.isel(draw=slice(1, None))
    monkeypatch.chdir("/")
    assert_equal(tree, expected)
    assert np.isfinite(basinscope.compute_llc(part)["llc_first"].values).all()


def test_a_chunk_that_is_gone_is_an_error_in_a_selection_too(tmp_path: Path) -> None:
    tree = run(tmp_path)
    (tmp_path / "s.zarr" / "loss_first" / "c" / "1" / "0" / "0" / "0").unlink()
    with pytest.raises(DamagedStoreError, match="lacks chunk"):
        tree["loss_first"].mean().compute()
    part = tree.isel(draw=slice(0, None, 2))
    with pytest.raises(DamagedStoreError, match="lacks chunk"):
        basinscope.compute_llc(part)["llc_first"].compute()


def test_losses_that_are_gone_are_an_error_never_nan(tmp_path: Path) -> None:
    tree = run(tmp_path)
    for name in ("init_loss", "init_loss_first", "sampling_loss", "sampling_loss_micro"):
        next(f for f in (tmp_path / "s.zarr" / name / "c").rglob("*") if f.is_file()).unlink()
        with pytest.raises(DamagedStoreError, match="lacks chunk"):
            tree[name].compute()


def test_a_chain_that_another_process_ended_meanwhile_keeps_its_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process is still at the loss at the checkpoint when the other is through."""

    def slowly(*arguments: Any) -> dict[int, np.ndarray]:
        monkeypatch.undo()
        run(tmp_path)  # the other process
        return init_losses(*arguments)

    monkeypatch.setattr("basinscope.sampling.sample.init_losses", slowly)
    run(tmp_path)
    for record in SampleStore(tmp_path / "s.zarr").records().values():
        assert record["state"] == DONE
        assert {"init_loss", "forward", "backward"} <= record["seconds"].keys()


def mean_of_logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids)[:, :-1].square().mean(-1)


class Doubled(RawModel):
    """Only the test module knows this class; worker processes must get it too."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return 2 * super().forward(input_ids)


class CountingModel(RawModel):
    """Its logits depend on how often it ran, which a buffer counts."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("forwards", torch.zeros(()))

    def forward(self, input_ids: Tensor) -> Tensor:
        self.forwards += 1
        return super().forward(input_ids) * (1 + 0.01 * self.forwards)


def test_workers_give_the_same_bits(tmp_path: Path) -> None:
    torch.manual_seed(4)
    model = Doubled(dropout=0.2)
    settings = {"loss_fn": mean_of_logits, "num_chains": 3, "train_mode": True}
    alone = run(tmp_path / "alone", model, **settings)
    shared = run(tmp_path / "shared", model, **settings, workers=2)
    assert_equal(shared, alone)
    assert shared.attrs["completed"] == 1


@pytest.mark.parametrize("matched", [True, False])
def test_chains_one_by_one_equal_all_at_once(matched: bool, tmp_path: Path) -> None:
    model = RawModel(dropout=0.2)
    settings = {
        "match_sampling_input_ids_across_chains": matched,
        "num_chains": 3,
        "train_mode": True,
    }
    whole = run(tmp_path / "whole", model, **settings)
    for done, chain in enumerate([1, 2, 0], start=1):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = run(tmp_path / "parts", model, **settings, chains=[chain])
        records = SampleStore(tmp_path / "parts" / "s.zarr").records()
        assert [r["state"] for r in records.values()].count(DONE) == done
        assert tree.attrs["completed"] == (done == 3)
    assert_equal(tree, whole)


def test_a_chain_does_not_depend_on_how_many_there_are(tmp_path: Path) -> None:
    few = run(tmp_path / "few", num_chains=1, train_mode=True)
    many = run(tmp_path / "many", num_chains=3, train_mode=True)
    np.testing.assert_array_equal(few.loss_first[0], many.loss_first[0])


@pytest.mark.parametrize("method", METHODS)
def test_a_chain_does_not_depend_on_those_before_it(method: str, tmp_path: Path) -> None:
    settings = {"sampling_method": method, "num_chains": 2, "chains_at_once": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # chain 0 is not sampled
        alone = run(tmp_path / "alone", **settings, chains=[1])
    after = run(tmp_path / "after", **settings)
    for name in ("sampling_loss_micro", "loss_first"):
        np.testing.assert_array_equal(alone[name][1], after[name][1])


def test_buffers_start_every_chain_as_they_are_in_the_checkpoint(tmp_path: Path) -> None:
    model = CountingModel()
    many = run(tmp_path / "many", model, num_chains=3)
    last = run(tmp_path / "last", model, num_chains=3, chains=[2])
    np.testing.assert_array_equal(many.loss_first[2], last.loss_first[2])
    assert int(model.forwards) == 0


def test_buffers_go_on_as_they_were_at_the_checkpoint(tmp_path: Path) -> None:
    model, settings = CountingModel(), {"num_chains": 1, "num_draws": 5, "checkpoint_every": 2}
    whole = run(tmp_path / "whole", model, loss_fn=FailsOnce(0), **settings)
    failing = FailsOnce(5)  # the first call is a trial
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "again", model, loss_fn=failing, **settings)
    assert SampleStore(tmp_path / "again" / "s.zarr").record(0)["steps_written"] == 2
    again = run(tmp_path / "again", model, loss_fn=failing, **settings)
    assert_equal(again, whole)


def test_chains_differ_by_their_noise_and_repeat_by_their_seed(tmp_path: Path) -> None:
    first = run(tmp_path / "first", num_chains=3)
    again = run(tmp_path / "again", num_chains=3)
    other = run(tmp_path / "other", num_chains=3, init_seed=7, shuffle=False)
    quiet = run(tmp_path / "quiet", num_chains=3, noise_level=0.0)
    assert_equal(again, first)
    losses = first.sampling_loss_micro.to_numpy()
    assert (losses[0, 0] == losses[1, 0]).all(), "the first step sees the checkpoint"
    for one, two in [(0, 1), (0, 2), (1, 2)]:
        assert not np.allclose(losses[one, 1:], losses[two, 1:])
        np.testing.assert_array_equal(quiet.loss_first[one], quiet.loss_first[two])
    assert not np.allclose(first.loss_first, other.loss_first)


def test_noise_is_that_of_the_chain_s_seed_and_the_parameter_s_place(tmp_path: Path) -> None:
    """Without a gradient a chain is its noise; what else moves, and in what order, is no matter."""
    model = tiny_model("gpt_neox")
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    moved = [*parameters][:5:-2]
    seen: list[dict[str, Tensor]] = []

    def loss(model: nn.Module, ids: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return next_token_loss(model, ids)

    masks = dict.fromkeys(moved)
    run(tmp_path, model, loss_fn=loss, param_masks=masks, n_beta=0.0, init_noise=0.1, num_draws=2)
    starts, ends = seen[1::2], seen[2::2]  # the first was a trial
    for chain, (start, end) in enumerate(zip(starts, ends, strict=True)):
        for index, (name, weight) in enumerate(parameters.items()):
            expected = weight.clone()
            for at, stream, std in ((start, INIT, 0.1), (end, LANGEVIN, math.sqrt(1e-3))):
                noise = torch.empty_like(weight)
                place = {"chain": chain, "step": 0, "param_index": index}
                fill_normal(noise, seed=100 + chain, **place, stream=stream)
                expected = expected + std * noise if name in masks else expected
                torch.testing.assert_close(at[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_losses_of_any_dtype_are_stored_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    def loss(model: nn.Module, ids: Tensor) -> Tensor:
        return next_token_loss(model, ids).to(dtype)

    given = run(tmp_path / "given", loss_fn=loss)
    plain = run(tmp_path / "plain")
    for name in ("init_loss", "init_loss_first", "loss_first", "sampling_loss"):
        assert given[name].dtype == np.float32
        np.testing.assert_allclose(given[name], plain[name], rtol=0.02)


def test_a_model_of_no_language_has_a_loss_of_each_example(tmp_path: Path) -> None:
    """Rows of the data set are numbers of examples, as docs/sampling.md has them."""
    torch.manual_seed(0)
    inputs, labels = torch.randn(40, 5), torch.randint(3, (40,))
    rows = Dataset.from_dict({"input_ids": [[i, 0] for i in range(40)]}).with_format("torch")
    model = nn.Linear(5, 3)

    def loss(model: nn.Module, ids: Tensor) -> Tensor:
        chosen = ids[:, 0]
        return F.cross_entropy(model(inputs[chosen]), labels[chosen], reduction="none")[:, None]

    settings = {**COMMON, "loss_fn": loss, "num_init_loss_batches": 10}
    tree = basinscope.sample(
        model, rows, {"all": (rows, 10)}, **settings, output_path=tmp_path / "s"
    )
    with torch.no_grad():
        expected = F.cross_entropy(model(inputs), labels, reduction="none").numpy()
    seen = tree["sampling_rows"].to_numpy()
    np.testing.assert_allclose(
        tree["sampling_loss_micro"][0, 0, :, 0], expected[seen[0]], atol=1e-6
    )
    np.testing.assert_allclose(tree["init_loss"][:, 0], [expected.mean()] * 2, atol=1e-6)
    assert not np.allclose(tree["sampling_loss_micro"][0, -1, :, 0], expected[seen[-1]])


@pytest.mark.parametrize("matched", [True, False])
def test_chains_see_the_batches_that_the_settings_say(matched: bool, tmp_path: Path) -> None:
    own = {"match_sampling_input_ids_across_chains": matched, "save_sampling_input_ids": True}
    tree = run(tmp_path, num_chains=2, num_draws=30, **own)
    rows = tree.sampling_rows
    assert rows.dims == (("step",) if matched else ("chain", "step")) + ("batch_sampling",)
    for chain in range(2):
        seed = 100 + (0 if matched else chain)
        loader = torch.utils.data.DataLoader(
            range(48),  # type: ignore[arg-type]
            4,
            shuffle=True,
            drop_last=True,
            generator=torch.Generator().manual_seed(seed),
        )
        epoch = np.stack([batch.numpy() for batch in loader])
        ours = rows.to_numpy() if matched else rows[chain].to_numpy()
        np.testing.assert_array_equal(ours, np.concatenate([epoch] * 3)[:30])
        seen = tree.sampling_input_ids_micro[chain]
        np.testing.assert_array_equal(seen, token_ids(48, 1)[ours])


@pytest.mark.parametrize("method", METHODS)
def test_the_box_is_never_left(method: str, tmp_path: Path) -> None:
    model, spy = tiny_model("raw"), WeightSpy()
    box = 1e-3
    run(
        tmp_path,
        model,
        loss_fn=spy,
        bounding_box_size=box,
        lr=0.1,
        sampling_method=method,
        init_noise=1e-4,
    )
    start = dict(model.named_parameters())
    farthest = max(
        float((weights[name] - start[name].detach()).abs().max())
        for weights in spy.seen
        for name in start
    )
    assert 0.9 * box < farthest <= box * (1 + 1e-4)


def test_init_noise_moves_each_chain_s_start_by_its_std(tmp_path: Path) -> None:
    model, spy = tiny_model("raw"), WeightSpy()
    std = 0.05
    tree = run(tmp_path, model, loss_fn=spy, init_noise=std, noise_level=0.0, num_draws=1, lr=1e-9)
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    places = [torch.cat([w.flatten() for w in weights.values()]) - start for weights in spy.seen]
    chains = [places[-6], places[-1]]  # a step and two observable batches for each chain
    for moved in chains:
        # 4 standard errors of mean and std of n normal numbers: false alarm 1 in 10,000
        assert abs(float(moved.mean())) < 4 * std / math.sqrt(moved.numel())
        assert abs(float(moved.std()) / std - 1) < 4 / math.sqrt(2 * moved.numel())
    correlation = float(torch.corrcoef(torch.stack(chains))[0, 1])
    assert abs(correlation) < 4 / math.sqrt(start.numel())
    assert not np.allclose(tree.init_loss[0], tree.init_loss[1])


def test_init_loss_is_the_mean_over_the_first_batches(tmp_path: Path) -> None:
    settings = {"gradient_accumulation_steps": 2, "num_init_loss_batches": 9}  # 18 of 12 batches
    tree = run(tmp_path, num_draws=6, **settings)
    model = tiny_model("raw")
    epoch = tree.sampling_rows.to_numpy().reshape(12, 4)
    batches = np.concatenate([epoch, epoch])[:18].astype(np.int64)
    ids = torch.from_numpy(token_ids(48, 1))
    with torch.no_grad():
        expected = torch.stack([next_token_loss(model, ids[b]) for b in batches]).mean((0, 1))
    for chain in range(2):
        np.testing.assert_allclose(tree.init_loss[chain], expected, rtol=1e-5)


@pytest.mark.parametrize("where", ["sampling", "observable"])
def test_a_chain_whose_loss_becomes_nan_fails_alone(where: str, tmp_path: Path) -> None:
    bad = NanOnce(chain_start=2, step=3, observing=where == "observable")
    with pytest.warns(ChainFailedWarning, match=r"1 of 3 chains failed .*chain 1 at step 3"):
        tree = run(tmp_path, loss_fn=bad, num_chains=3, num_draws=6)
    records = SampleStore(tmp_path / "s.zarr").records()
    assert [records[c]["state"] for c in range(3)] == [DONE, FAILED, DONE]
    assert records[1]["failed_step"] == 3
    reason = "the loss of observable first" if where == "observable" else "the sampling loss"
    assert records[1]["reason"] == f"{reason} is not finite"
    assert (records[1]["steps_written"], records[1]["draws_written"]) == (3, 3)
    assert tree.attrs["failed_chains"] == [1]
    assert tree.attrs["completed"] == 1

    good = tree.dataset.isel(chain=[0, 2])
    for name in ("sampling_loss_micro", "loss_first", "init_loss"):
        assert np.isfinite(good[name]).all(), name
    np.testing.assert_array_equal(
        np.isfinite(tree.sampling_loss_micro[1]).all(("batch_sampling", "token_pos")),
        [True] * 3 + [False] * 3,
    )
    with pytest.warns(UserWarning, match=r"left out.*chain 1 failed at step 3"):
        llc = basinscope.compute_llc(tree).compute()
    assert llc.chain.to_numpy().tolist() == [0, 2]
    assert np.isfinite(llc.llc_mean)
    assert float(llc.llc_mean) == pytest.approx(float(llc.llc_per_chain.mean()))


def test_a_chain_is_held_until_its_record_says_that_it_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = []
    really = SampleStore.update_record

    def update(store: SampleStore, chain: int, **fields: Any) -> None:
        if fields.get("state") == DONE:
            time.sleep(0.05)  # in which the chain itself has ended
            held.append(store.is_locked(chain))
        really(store, chain, **fields)

    monkeypatch.setattr(SampleStore, "update_record", update)
    run(tmp_path)
    assert held == [True, True]


def test_a_chain_that_fails_at_its_first_step_reads_as_nan(tmp_path: Path) -> None:
    bad = NanOnce(chain_start=2, step=0, observing=False)
    with pytest.warns(ChainFailedWarning, match="chain 1 at step 0"):
        tree = run(tmp_path, loss_fn=bad, num_draws=4)
    for name in ("sampling_loss_micro", "sampling_loss", "loss_first"):
        assert np.isnan(tree[name][1]).all()
        assert np.isfinite(tree[name][0]).all()


def test_a_failed_chain_is_not_sampled_again(tmp_path: Path) -> None:
    bad = NanOnce(chain_start=1, step=2, observing=False)
    with pytest.warns(ChainFailedWarning):
        run(tmp_path, loss_fn=bad, num_chains=1, num_draws=4)
    before = contents(tmp_path)
    with pytest.warns(UserWarning, match="chain 0 failed at step 2"):
        tree = run(tmp_path, loss_fn=bad, num_chains=1, num_draws=4)
    assert contents(tmp_path) == before
    with pytest.raises(ValueError, match=r"no chain .* can be analysed.*failed at step 2"):
        basinscope.compute_llc(tree)


def test_a_write_error_stops_the_run_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = zarr.AsyncArray.setitem
    fail = {"on": True}

    async def full_disk(array: Any, region: Any, values: Any) -> None:
        if fail["on"] and array.path == "sampling_loss_micro":
            raise OSError(errno.ENOSPC, "No space left on device")
        await write(array, region, values)

    monkeypatch.setattr(zarr.AsyncArray, "setitem", full_disk)
    steps: list[int] = []

    def loss_fn(model: nn.Module, ids: Tensor) -> Tensor:
        steps.append(len(steps))
        return next_token_loss(model, ids)

    settings: dict[str, Any] = {"num_draws": 4000, "loss_fn": loss_fn, "observables": {}}
    with pytest.raises(StoreWriteError, match=r"No space left.*same call again") as caught:
        run(tmp_path, **settings)
    assert isinstance(caught.value.__cause__, OSError)
    assert len(steps) < 1000, "sampling went on after the disk was full"
    store = SampleStore(tmp_path / "s.zarr")
    assert store.unfinished() == [0, 1]
    assert not store.is_locked(0)

    settings["num_draws"] = 60
    with pytest.raises(StoreWriteError):
        run(tmp_path / "again", **settings)
    fail["on"] = False
    continued = run(tmp_path / "again", **settings)
    assert_equal(continued, run(tmp_path / "whole", **settings))


def test_a_temporary_store_is_announced_when_it_is_worth_keeping() -> None:
    rows = token_rows(48, 9, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        basinscope.sample(tiny_model("raw"), rows, {}, **COMMON)
    with pytest.warns(UserWarning, match=r"no output_path .*1280 sampled sequences.*output_path="):
        sample(tiny_model("raw"), rows, {}, **{**COMMON, "num_draws": 16, "batch_size": 40})


def test_time_is_recorded_per_phase(tmp_path: Path) -> None:
    tree = run(tmp_path, checkpoint_every=2)
    seconds = tree.attrs["seconds"]
    assert {"init_loss", "forward", "backward", "update", "observe", "checkpoint"} <= set(seconds)
    assert all(value >= 0 for value in seconds.values())
    assert tree.attrs["metadata"]["config"]["sampler"]["lr"] == 1e-3
    assert float(tree.n_beta) == 10.0


def test_no_second_is_recorded_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints wait for the disk; that time is of the stall, and not of the checkpoint too."""
    monkeypatch.setattr("basinscope.io.writer.settle", lambda file: time.sleep(0.05))
    start = time.perf_counter()
    tree = run(tmp_path, checkpoint_every=1, num_chains=1, num_draws=6)
    elapsed = time.perf_counter() - start
    seconds = tree.attrs["seconds"]
    assert seconds["stall"] > 0.5
    assert sum(s for phase, s in seconds.items() if "background" not in phase) < elapsed


def test_a_profile_of_the_first_steps_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    tree = run(tmp_path, profile="~/new/trace.json", profile_steps=(1, 3))
    trace = (tmp_path / "new" / "trace.json").read_text()
    for phase in ("forward", "backward", "update", "observe"):
        assert f'"{phase}"' in trace
    assert tree.attrs["seconds"]["profile"] > 0


def test_each_metric_is_stored_under_its_own_name(tmp_path: Path) -> None:
    """The noise has the norm of as many normal numbers to ten standard deviations."""
    tree = run(tmp_path, save_metrics=True)
    found = {str(n): tree[n].to_numpy() for n in tree.data_vars if str(n).startswith("metrics_")}
    zero = {"localization", "weight_decay", "dot_grad_prior", "dot_prior_noise"}
    assert {name for name, values in found.items() if not values.any()} == {
        f"metrics_{name}" for name in zero
    }
    assert (found["metrics_distance"][:, 0] == 0).all()
    assert (found["metrics_distance"][:, 1:] > 0).all()
    np.testing.assert_array_equal(found["metrics_scaled_grad"], found["metrics_unscaled_grad"])
    norms = found["metrics_noise"] / math.sqrt(1e-3)
    assert np.abs(norms - math.sqrt(tree.attrs["metrics_numel"])).max() < 10 / math.sqrt(2)
    np.testing.assert_allclose(found["metrics_distance"][:, 1], found["metrics_noise"][:, 0], 0.5)
    largest = found["metrics_scaled_grad"] * found["metrics_noise"]
    assert (np.abs(found["metrics_dot_grad_noise"]) < largest).all()


@pytest.mark.parametrize("changes", [{"alpha": 0.5}, {"eps": 0.3}], ids=str)
def test_settings_of_rmsprop_reach_the_update(changes: dict[str, float], tmp_path: Path) -> None:
    losses = []
    for number, kwargs in enumerate([{}, {"alpha": 0.99, "eps": 0.1}, changes]):
        method = {"sampling_method": "rmsprop_sgld", "sampling_method_kwargs": kwargs}
        losses.append(run(tmp_path / str(number), num_chains=1, **method).loss_first.to_numpy())
    np.testing.assert_array_equal(losses[0], losses[1])
    assert not np.allclose(losses[0], losses[2], rtol=1e-5)


def test_metrics_numel_counts_what_moves(tmp_path: Path) -> None:
    mask = torch.zeros(40, 12, dtype=torch.bool)
    mask[:3] = True
    masks = {"head.weight": mask, "head.bias": None}
    tree = run(tmp_path, save_metrics=True, param_masks=masks)
    assert tree.attrs["metrics_numel"] == 36 + 40


def test_rounded_losses_stay_within_their_stated_error(tmp_path: Path) -> None:
    exact = run(tmp_path / "exact")
    rounded = run(tmp_path / "rounded", loss_keep_bits=8)
    bound = rounded.attrs["loss_relative_error"]
    assert bound == 2.0**-9
    for name in ("sampling_loss_micro", "loss_first"):
        error = abs(rounded[name] / exact[name] - 1).to_numpy()
        assert 0 < error.max() <= bound * (1 + 1e-6), name


class WeightSpy:
    """The usual loss, remembering the weights of every call."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []
        self.error: Exception | None = None

    def __call__(self, model: nn.Module, ids: Tensor) -> Tensor:
        if self.error is not None:
            raise self.error
        self.seen.append({n: p.detach().clone() for n, p in model.named_parameters()})
        return next_token_loss(model, ids)


class FailsOnce:
    """Fails when a gradient is wanted for the n-th time."""

    def __init__(self, at: int) -> None:
        self.at, self.steps = at, 0

    def __call__(self, model: nn.Module, ids: Tensor) -> Tensor:
        self.steps += torch.is_grad_enabled()
        if torch.is_grad_enabled() and self.steps == self.at:
            raise ZeroDivisionError
        return next_token_loss(model, ids)


class NanOnce:
    """The usual loss, but NaN from one step of one chain on.

    A chain starts when the weights are at the checkpoint again while gradients are on.
    """

    def __init__(self, chain_start: int, step: int, observing: bool) -> None:
        self.chain_start, self.step, self.observing = chain_start, step, observing
        self.starts, self.steps, self.first = -1, 0, None  # the check before the run is start 0

    def __call__(self, model: nn.Module, ids: Tensor) -> Tensor:
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        if torch.is_grad_enabled():
            if self.first is None:
                self.first = weights.clone()
            if torch.equal(weights, self.first):
                self.starts, self.steps = self.starts + 1, -1
            self.steps += 1
        reached = self.starts == self.chain_start and self.steps == self.step
        bad = reached and torch.is_grad_enabled() != self.observing
        return next_token_loss(model, ids) * (math.nan if bad else 1.0)


def RawModelLike(model: RawModel, dropout: float) -> RawModel:
    same = RawModel(dropout)
    same.load_state_dict(model.state_dict())
    return same


def test_observables_are_evaluated_at_the_checkpoint_too(tmp_path: Path) -> None:
    model = tiny_model("gpt_neox")
    tree = run(tmp_path, model, init_noise=0.5)
    ids = torch.from_numpy(tree.input_ids_first.to_numpy().astype(np.int64))
    with torch.no_grad():
        expected = next_token_loss(model, ids)
    assert tree.init_loss_first.dims == ("batch_first", "token_pos")
    torch.testing.assert_close(torch.from_numpy(tree.init_loss_first.to_numpy()), expected)


def run(tmp_path: Path, model: nn.Module | None = None, **changes: Any) -> xr.DataTree:
    dataset = changes.pop("dataset", token_rows(48, 9, seed=1))
    observables = changes.pop("observables", {"first": token_rows(30, 9, seed=2)})
    chosen = tiny_model("raw") if model is None else model
    settings = {**COMMON, "output_path": tmp_path / "s.zarr", **changes}
    return sample(chosen, dataset, observables, **settings)


def token_ids(rows: int, seed: int) -> np.ndarray:
    return np.asarray(token_rows(rows, 9, seed)["input_ids"][:], dtype=np.int64)


def snapshot(model: nn.Module) -> dict[str, Any]:
    state: dict[str, Any] = {"training": [m.training for m in model.modules()]}
    for name, p in model.named_parameters():
        grad = None if p.grad is None else p.grad.numpy().tobytes()
        values = p.detach().numpy().tobytes()
        state[name] = (p.device, p.dtype, p.requires_grad, values, grad, id(p.grad))
    for name, b in model.named_buffers():
        state[f"buffer {name}"] = b.numpy().tobytes()
    return state


def assert_equal(ours: xr.DataTree, theirs: xr.DataTree) -> None:
    assert set(ours.data_vars) == set(theirs.data_vars)
    for name in ours.data_vars:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=str(name))


def contents(path: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(p.relative_to(path)): (p.read_bytes(), os.stat(p).st_mtime_ns)
        for p in path.rglob("*")
        if p.is_file()
    }
