"""Observables with a function of their own: another number per token, at every draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import basinscope
from basinscope.io.store import StoreMismatchError
from basinscope.sampling import job as job_module
from basinscope.sampling.config import SamplerConfig
from basinscope.sampling.execution import check_execution
from basinscope.sampling.job import prepare_job
from basinscope.sampling.losses import next_token_loss
from tests.conftest import token_rows
from tests.models_small import RawModel, tiny_model

SETTINGS: dict[str, Any] = {
    "lr": 1e-3, "n_beta": 3.0, "localization": 10.0, "num_chains": 2, "num_draws": 6,
    "batch_size": 4, "num_init_loss_batches": 2, "progress": False, "device": "cpu",
}  # fmt: skip
DATA = token_rows(24, 9, seed=1)
OTHER = token_rows(30, 9, seed=2)


def scaled(model: nn.Module, input_ids: Tensor) -> Tensor:
    """The loss, so that it can be compared with the loss, but not the loss."""
    return 1.5 * next_token_loss(model, input_ids) + 1


def correct(model: nn.Module, input_ids: Tensor) -> Tensor:
    return (model(input_ids)[:, :-1].argmax(-1) == input_ids[:, 1:]).float()


def run(path: Path, kind: str = "gpt_neox", own: Any = scaled, **changes: Any) -> Any:
    model = tiny_model(kind)
    observables = {"plain": (OTHER, 2), "own": (OTHER, 2, own), "more": (DATA, 1)}
    given = {**SETTINGS, **changes}
    if restriction := given.pop("restriction", None):
        given["param_masks"] = basinscope.create_param_masks(model, restriction)
    return basinscope.sample(model, DATA, observables, output_path=path, **given)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"workers": 2},
        {"chains_at_once": 2},
        {"restriction": "l1"},  # what enters layer 1 is kept, for the loss of the run alone
        {"autocast": "bfloat16"},
        {"kind": "hooked"},
        {"loss_fn": next_token_loss},
    ],
    ids=str,
)
def test_draws_record_the_function_at_the_weights_of_the_draw(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    tree = run(tmp_path / "s.zarr", **changes)
    close = {"rtol": 2e-2, "atol": 2e-2} if "autocast" in changes else {"rtol": 1e-5, "atol": 1e-5}
    plain, own = tree["loss_plain"].values, tree["loss_own"].values
    assert np.abs(np.diff(plain, axis=1)).max() > 1e-3, "the weights move"
    np.testing.assert_allclose(own, 1.5 * plain + 1, **close)
    start = tree["init_loss_plain"].values
    np.testing.assert_allclose(tree["init_loss_own"], 1.5 * start + 1, **close)
    np.testing.assert_array_equal(tree["input_ids_own"], tree["input_ids_plain"])


def test_other_losses_are_what_they_are_without_it(tmp_path: Path) -> None:
    with_it, without = run(tmp_path / "a.zarr"), run(tmp_path / "b.zarr", own=None)
    for name in ["sampling_loss", "loss_plain", "loss_more"]:
        np.testing.assert_array_equal(with_it[name], without[name])
    np.testing.assert_array_equal(without["loss_own"], without["loss_plain"])


def test_it_sees_its_batches_in_order_without_gradients(tmp_path: Path) -> None:
    seen: list[Tensor] = []

    def noted(model: nn.Module, input_ids: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        assert not model.training
        seen.append(input_ids.clone())
        return correct(model, input_ids)

    tree = run(tmp_path / "s.zarr", "raw", noted, num_chains=1)
    batches = torch.from_numpy(tree["input_ids_own"].values.astype(np.int64)).split(4)
    tried, rest = seen[0], seen[1:]
    assert torch.equal(tried, batches[0])
    assert len(rest) == 2 * (1 + 6), "two batches at the checkpoint and at each draw"
    for i, batch in enumerate(rest):
        assert torch.equal(batch, batches[i % 2])
    assert set(np.unique(tree["loss_own"])) <= {0.0, 1.0}


def leaves_gradients(model: nn.Module, input_ids: Tensor) -> Tensor:
    with torch.enable_grad():
        losses = next_token_loss(model, input_ids)
        losses.mean().backward()
    return losses


def leaves_another_mode(model: nn.Module, input_ids: Tensor) -> Tensor:
    model.train(not model.training)
    return torch.zeros(len(input_ids), 8)


def freezes(model: nn.Module, input_ids: Tensor) -> Tensor:
    next(model.parameters()).requires_grad_(False)
    return next_token_loss(model, input_ids)


def takes_weights_elsewhere(model: nn.Module, input_ids: Tensor) -> Tensor:
    weights = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(0.5 * weights, model.parameters())
    losses = next_token_loss(model, input_ids)
    nn.utils.vector_to_parameters(weights, model.parameters())
    return losses


def writes_to_its_ids(model: nn.Module, input_ids: Tensor) -> Tensor:
    input_ids[:, 2] = (input_ids[:, 2] + 1) % 40
    return next_token_loss(model, input_ids)


@pytest.mark.parametrize(
    ("own", "train_mode"),
    [
        (leaves_gradients, False),
        (leaves_another_mode, False),
        (leaves_another_mode, True),
        (freezes, False),
        (takes_weights_elsewhere, False),
        (writes_to_its_ids, False),
    ],
)
def test_what_it_leaves_behind_does_not_reach_the_chain(
    tmp_path: Path, own: Any, train_mode: bool
) -> None:
    trees = []
    for name, one in [("with", own), ("without", lambda *_: torch.zeros(4, 8))]:
        torch.manual_seed(3)
        model = RawModel(dropout=0.3).eval()
        observables = {"own": (OTHER, 2, one), "plain": (OTHER, 2)}
        path = tmp_path / f"{name}.zarr"
        trees.append(basinscope.sample(model, DATA, observables, output_path=path,
                                       train_mode=train_mode, **SETTINGS))  # fmt: skip
    for name in ["sampling_loss", "loss_plain", "input_ids_own"]:
        np.testing.assert_array_equal(*(tree[name] for tree in trees))


def test_writing_to_ids_changes_those_of_one_call_alone(tmp_path: Path) -> None:
    still = {"own": writes_to_its_ids, "lr": 1e-20, "noise_level": 0.0}
    losses = run(tmp_path / "s.zarr", "raw", **still)["loss_own"].values
    np.testing.assert_array_equal(losses, np.broadcast_to(losses[:, :1], losses.shape))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float64, torch.float16])
def test_numbers_of_any_kind_are_stored_as_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    tree = run(tmp_path / "s.zarr", "raw", lambda *given: correct(*given).to(dtype))
    same = run(tmp_path / "same.zarr", "raw", correct)
    assert tree["loss_own"].dtype == np.float32
    np.testing.assert_array_equal(tree["loss_own"], same["loss_own"])


class Notes(list):  # type: ignore[type-arg]
    """A function that is false as long as it has no notes."""

    def __call__(self, model: nn.Module, input_ids: Tensor) -> Tensor:
        return scaled(model, input_ids)


def test_a_function_may_be_an_object_that_is_false(tmp_path: Path) -> None:
    tree = run(tmp_path / "s.zarr", "raw", Notes())
    np.testing.assert_allclose(tree["loss_own"], 1.5 * tree["loss_plain"] + 1, rtol=1e-5)
    tree = run(tmp_path / "run.zarr", "raw", None, loss_fn=Notes())
    assert tree.attrs["loss"] == "loss_fn"
    assert "Notes" in tree.attrs["metadata"]["config"]["loss_fn"]


def test_a_chain_goes_on_from_where_it_failed(tmp_path: Path) -> None:
    left = [9]

    def fails_once(model: nn.Module, input_ids: Tensor) -> Tensor:
        left[0] -= 1
        if not left[0]:
            raise OSError("no more of this")
        return scaled(model, input_ids)

    path = tmp_path / "s.zarr"
    with pytest.raises(OSError, match="no more of this"):
        run(path, "raw", fails_once, checkpoint_every=2)
    resumed = run(path, "raw", fails_once, checkpoint_every=2)
    np.testing.assert_array_equal(resumed["loss_own"], run(tmp_path / "w.zarr", "raw")["loss_own"])


def test_analyses_take_it_as_an_observable(tmp_path: Path) -> None:
    tree = run(tmp_path / "s.zarr")
    influences = basinscope.compute_bif(tree)["influences"].values
    own, plain = slice(4, 12), slice(12, 20)  # after the 4 sequences of "more"
    expected = influences[plain, plain]
    assert np.abs(expected).max() > 0.1
    for block in [influences[own, own], influences[own, plain]]:  # scale and shift do not count
        np.testing.assert_allclose(block, expected, atol=1e-4)
    llc = basinscope.compute_llc(tree)
    assert float(llc["llc_own"]) == pytest.approx(1.5 * float(llc["llc_plain"]), rel=1e-3)


def test_chains_run_alone_as_it_may_keep_notes(tmp_path: Path) -> None:
    config = SamplerConfig(**{k: SETTINGS[k] for k in SETTINGS if k not in ("progress", "device")})
    execution = check_execution(
        config, own_loss=False, chains=None, chains_at_once=None, workers=1,
        checkpoint_every=None, cuda_graph=False, prefix_cache_bytes=0, profile=None,
        profile_steps=(5, 15), progress=False,
    )  # fmt: skip
    counts = {}
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for own in (None, correct):
            job = prepare_job(
                tiny_model("raw"), DATA, {"own": (OTHER, 2, own)}, config,
                param_masks=None, loss_fn=None, device="cpu",
            )  # fmt: skip
            counts[own] = execution.at_once(job)
    finally:
        torch.set_num_threads(before)
    assert counts == {None: 2, correct: 1}


def test_it_belongs_to_the_run_s_identity(tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    first = run(path, "raw", correct)
    again = run(path, "raw", correct)
    np.testing.assert_array_equal(first["loss_own"], again["loss_own"])
    with pytest.raises(StoreMismatchError, match="observables"):
        run(path, "raw", scaled)
    with pytest.raises(StoreMismatchError, match="observables"):
        run(path, "raw", None)


def test_with_a_cuda_graph_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_module, "choose_device", lambda device: torch.device("cuda"))
    with pytest.raises(ValueError, match="observable 'own' has a loss_fn"):
        prepare_job(
            tiny_model("raw"), DATA, {"own": (OTHER, 1, correct)},
            SamplerConfig(lr=1e-3, n_beta=1.0, batch_size=4, num_init_loss_batches=2),
            param_masks=None, loss_fn=None, device=None, cuda_graph=True,
        )  # fmt: skip


def of_sequences(model: nn.Module, input_ids: Tensor) -> Tensor:
    return correct(model, input_ids).mean(1)


def a_number(model: nn.Module, input_ids: Tensor) -> float:
    return 1.0


def too_large(model: nn.Module, input_ids: Tensor) -> Tensor:
    return correct(model, input_ids).double() + 1e300


def log_of_nothing(model: nn.Module, input_ids: Tensor) -> Tensor:
    return (correct(model, input_ids) * 0).log()


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (of_sequences, r"loss_fn of observable 'own' must have shape .* = \(4, 8\).* got \(4,\)"),
        (a_number, r"loss_fn of observable 'own' must have shape .* got float"),
        (log_of_nothing, "loss_fn of observable 'own' is not finite at the checkpoint"),
        (too_large, "loss_fn of observable 'own' is not finite at the checkpoint"),
        (7, "observable 'own': loss_fn must be a function .* got int"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    tmp_path: Path, own: Any, message: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        run(tmp_path / "s.zarr", "raw", own)
    assert not list(tmp_path.iterdir())


def test_a_tuple_has_two_or_three_parts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"observable 'own' must be .* a tuple of 4"):
        basinscope.sample(
            tiny_model("raw"), DATA, {"own": (OTHER, 2, correct, 1)},  # type: ignore[dict-item]
            **SETTINGS,
        )  # fmt: skip
