"""Calls that sample first: what they pass on, what they refuse before anything is sampled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import basinscope
from tests.conftest import token_rows
from tests.models_small import tiny_model

SETTINGS: dict[str, Any] = {
    "lr": 1e-3, "n_beta": 12.0, "num_chains": 2, "num_draws": 6, "batch_size": 4, "device": "cpu",
    "num_init_loss_batches": 2, "noise_level": 0.0,
}  # fmt: skip


@pytest.fixture
def problem() -> tuple[torch.nn.Module, Any, dict[str, Any]]:
    observables = {"the task": token_rows(30, 9, seed=2), "b": token_rows(30, 9, seed=3)}
    return tiny_model("gpt_neox"), token_rows(40, 9, seed=1), observables


def restrictions(model: torch.nn.Module) -> dict[str, Any]:
    names = [name for name, _ in model.named_parameters()]
    first = {name: None for name in names if "layers.0" in name}
    return {"full": None, "l0": first, "embed in": {n: None for n in names if "embed_in" in n}}


def test_bif_samples_and_correlates(problem: Any, tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    options: dict[str, Any] = {"correlation_method": "sequence", "compute_covariance": True}
    got = basinscope.bif(
        *problem, **SETTINGS, **options, bif_batch_size=3, output_path=path, progress=False
    )
    expected = basinscope.compute_bif(path, **options)
    np.testing.assert_array_equal(got["influences"], expected["influences"])
    assert got["influences"].shape == (24, 24)


def test_bif_gives_the_strongest_partners(problem: Any, tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    options: dict[str, Any] = {"top_k": 3, "queries": [(0, 1), (5, 8)]}
    got = basinscope.bif(*problem, **SETTINGS, **options, output_path=path, progress=False)
    expected = basinscope.compute_bif(path, **options)
    for name in ("influences", "partner_batch", "partner_target_position"):
        np.testing.assert_array_equal(got[name], expected[name])
    assert got["influences"].shape == (2, 2, 3)
    with pytest.raises(ValueError, match="top_k looks for partners of single tokens"):
        basinscope.bif(
            *problem, **SETTINGS, top_k=3, correlation_method="sequence",
            output_path=tmp_path / "never.zarr",
        )  # fmt: skip
    assert not (tmp_path / "never.zarr").exists()


@pytest.mark.peer
def test_susceptibilities_equal_the_peers(problem: Any, tmp_path: Path) -> None:
    from devinterp.slt.susceptibilities import susceptibilities as by_peer

    masks = restrictions(problem[0])
    options: dict[str, Any] = {"sampling_task": "the task", **SETTINGS}
    got = basinscope.susceptibilities(
        *problem, masks, **options, output_path=tmp_path / "s.zarr", progress=False
    )
    stores = sorted(path.name for path in tmp_path.iterdir())
    assert stores == ["s_embed in.zarr", "s_full.zarr", "s_l0.zarr"]
    expected = by_peer(*problem, masks, **options)
    ours, theirs = got["susceptibilities"], expected["susceptibilities"]
    assert ours["wr"].values.tolist() == ["l0", "embed in"]
    assert ours.attrs["dataset_id_to_name"] == ["b"]
    np.testing.assert_allclose(ours["sus"], theirs["sus"], atol=1e-6)
    np.testing.assert_array_equal(got["context"]["input_ids"], expected["context"]["input_ids"])


def test_the_same_call_takes_what_was_sampled(problem: Any, tmp_path: Path) -> None:
    masks = restrictions(problem[0])
    options: dict[str, Any] = {
        **SETTINGS, "sampling_task": "the task", "include_sampling_task": True,
        "output_path": tmp_path / "s.zarr", "progress": False,
    }  # fmt: skip
    first = basinscope.susceptibilities(*problem, masks, **options).compute()
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    again = basinscope.susceptibilities(*problem, masks, **options)
    np.testing.assert_array_equal(first["susceptibilities/sus"], again["susceptibilities/sus"])
    assert written == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    own = basinscope.susceptibilities(*problem, masks, **options, baseline="task").compute()
    assert not np.allclose(first["susceptibilities/sus"], own["susceptibilities/sus"])
    with pytest.raises(ValueError, match="baseline='own': choose 'sampling' or 'task'"):
        basinscope.susceptibilities(*problem, masks, **options, baseline="own")
    assert first["susceptibilities"].attrs["dataset_id_to_name"] == ["b", "the_task"]


def test_restrictions_may_be_named(
    problem: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A list of names, or names of one's own for restrictions and unions of them."""
    model = problem[0]
    options: dict[str, Any] = {**SETTINGS, "sampling_task": "the task"}
    masks = {"full": None, "l0h1": basinscope.create_param_masks(model, "l0h1")}
    made = basinscope.susceptibilities(*problem, masks, progress=False, **options).compute()
    named = basinscope.susceptibilities(
        *problem, ["full", "l0h1"], output_path=tmp_path / "s.zarr", progress=True, **options
    ).compute()
    np.testing.assert_array_equal(
        named["susceptibilities/sus"], made["susceptibilities/sus"], strict=True
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s_full.zarr", "s_l0h1.zarr"]
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == ["restriction 2 of 2"]
    both = {"full": "full", "heads": ["l0h0", "l0h1"]}
    tree = basinscope.susceptibilities(*problem, both, progress=False, **options)
    assert tree["susceptibilities"].wr.to_numpy().tolist() == ["heads"]
    with pytest.raises(ValueError, match="'l7': layer 7 is out of range"):
        basinscope.susceptibilities(*problem, ["full", "l7"], progress=False, **options)


def test_restrictions_are_sampled_on_a_cluster(
    problem: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distributed = pytest.importorskip("distributed")
    options: dict[str, Any] = {**SETTINGS, "sampling_task": "the task", "progress": False}
    here = basinscope.susceptibilities(*problem, ["full", "l0", "l1h0"], **options).compute()
    with distributed.Client(processes=False, n_workers=2, threads_per_worker=1) as client:
        options |= {"output_path": tmp_path / "s.zarr", "client": client}
        there = basinscope.susceptibilities(*problem, ["full", "l0", "l1h0"], **options).compute()
    np.testing.assert_array_equal(here["susceptibilities/sus"], there["susceptibilities/sus"])
    stores = sorted(path.name for path in tmp_path.iterdir())
    assert stores == ["s_full.zarr", "s_l0.zarr", "s_l1h0.zarr"]


def test_a_cluster_of_processes_samples_the_same_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tied weights stay tied, in a loss too, and a relative path is of this process."""
    distributed = pytest.importorskip("distributed")
    observables = {"task": token_rows(30, 9, seed=2), "b": token_rows(30, 9, seed=3)}
    problem = (tiny_model("gpt2"), token_rows(40, 9, seed=1), observables, ["full", "embed"])
    options: dict[str, Any] = {**SETTINGS, "sampling_task": "task", "progress": False}
    with distributed.Client(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
    ) as client:
        monkeypatch.chdir(tmp_path)  # which the workers do not see
        for name, loss_fn in {"own": None, "kl": divergence_from(tiny_model("gpt2"))}.items():
            options |= {"loss_fn": loss_fn}
            here = basinscope.susceptibilities(*problem, **options).compute()
            there = basinscope.susceptibilities(
                *problem, **options, output_path=f"{name}.zarr", client=client
            ).compute()
            np.testing.assert_array_equal(
                here["susceptibilities/sus"], there["susceptibilities/sus"]
            )
    stores = sorted(path.name for path in tmp_path.iterdir())
    assert stores == ["kl_embed.zarr", "kl_full.zarr", "own_embed.zarr", "own_full.zarr"]
    parameters = sum(p.numel() for p in problem[0].parameters())
    config = basinscope.open_store(tmp_path / "own_full.zarr").attrs["metadata"]["config"]
    assert config["model"]["parameters"] == parameters


def divergence_from(reference: torch.nn.Module) -> Callable[[torch.nn.Module, Any], Any]:
    def loss_fn(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            at = reference(ids).logits[:, :-1].log_softmax(-1)
        apart = at - model(ids).logits[:, :-1].log_softmax(-1)
        return (at.exp() * apart).sum(-1) + apart.square().sum(-1)

    return loss_fn


ONE_SAMPLE = {"num_chains": 1, "num_draws": 1}


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda *a: wanted(a, {"full": None, "l0": None}, client=object()), "give output_path"),
        (lambda *a: basinscope.bif(*a, **SETTINGS, correlation_method="pairs"), "correlation_meth"),
        (lambda *a: basinscope.bif(*a, **SETTINGS, bif_batch_size=0), "batch_size=0"),
        (lambda *a: basinscope.bif(*a[:2], {}, **SETTINGS), "observables is empty"),
        (lambda *a: basinscope.bif(*a, **{**SETTINGS, **ONE_SAMPLE}), "a correlation needs two"),
        (lambda *a: wanted(a, {"full": "l0", "l1": "l1"}), "got the restriction 'l0' for it"),
        (lambda *a: wanted(a, {"l0": None}), "lacks 'full'"),
        (lambda *a: wanted(a, {"full": None}), "'full' only"),
        (lambda *a: wanted(a, {"full": None, "a/b": None}, output_path="s.zarr"), "'a/b' cannot"),
        (lambda *a: wanted(a, {"full": None, "l0": None}, task="c"), "sampling_task='c'"),
    ],
)
def test_what_cannot_be_analysed_is_not_sampled(
    problem: Any, call: Callable[..., object], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something was sampled")

    monkeypatch.setattr("basinscope.sampling.sample.sample", refuse)
    with pytest.raises(ValueError, match=said):
        call(*problem)


def wanted(problem: Any, masks: dict[str, Any], task: str = "b", **more: Any) -> object:
    return basinscope.susceptibilities(*problem, masks, sampling_task=task, **SETTINGS, **more)


def test_a_task_alone_leaves_nothing_to_ask_about(problem: Any) -> None:
    model, dataset, observables = problem
    alone = {"b": observables["b"]}
    with pytest.raises(ValueError, match="only observable"):
        wanted((model, dataset, alone), {"full": None, "l0": None})


def test_plans_of_all_estimators_are_made_by_one_call(problem: Any, tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    tree = basinscope.sample(*problem, **SETTINGS, output_path=path, progress=False)
    losses = sum(tree[name].nbytes for name in ("loss_b", "loss_the_task"))
    assert basinscope.plan("bif", path).bytes_to_read == losses
    assert basinscope.plan("bif_reliability", path).bytes_to_read == losses
    micro = tree["sampling_loss_micro"].nbytes
    assert basinscope.plan("llc", tree).bytes_to_read == losses + micro
    pair = {"full": path, "l0": tree}
    assert basinscope.plan("susceptibilities", pair, "b").bytes_to_read == 2 * losses
    with pytest.raises(ValueError, match="choose one of llc, bif, bif_reliability, susc"):
        basinscope.plan("rlct", path)  # type: ignore[arg-type]


def test_masks_are_given_by_name(problem: Any) -> None:
    with pytest.raises(TypeError, match="not as param_masks"):
        wanted(problem, restrictions(problem[0]), param_masks={})
    with pytest.raises(TypeError, match=r"such as \['full', 'l0'\]; got one string"):
        wanted(problem, "l0")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="wr_map must map names"):
        basinscope.compute_susceptibilities("runs/*.zarr", "b")  # type: ignore[arg-type]
