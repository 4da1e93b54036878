"""Observables: each sequence is evaluated once, and every loss is what it would be alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from basinscope.io.dims import observable_id
from basinscope.sampling.data import observable_rows
from basinscope.sampling.job import next_token_loss
from basinscope.sampling.observables import (
    Observable,
    ObservableEvaluator,
    read_observables,
)
from tests.conftest import token_rows
from tests.models_small import tiny_model

BATCH = 4
SHARED = token_rows(60, 9, seed=2)
OTHER = token_rows(40, 9, seed=3)


def test_rows_are_the_ones_of_the_seed() -> None:
    (found,) = read({"pile": (SHARED, 3)}, seed=11)
    assert found.rows == observable_rows(60, 3 * BATCH, 11)
    np.testing.assert_array_equal(found.input_ids, np.asarray(SHARED["input_ids"][:])[found.rows])
    assert found.describe() == {"obs_id": "pile", "name": "pile", "batches_per_draw": 3}


def test_batches_per_draw_is_the_call_s_unless_given() -> None:
    lengths = {o.name: len(o.input_ids) for o in read({"a": SHARED, "b": (OTHER, 1)})}
    assert lengths == {"a": 2 * BATCH, "b": BATCH}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pile", "pile"),
        ("pile/github", "pile_github"),
        ("2nd set", "_2nd_set"),
        ("a-b.c:d", "a_b_c_d"),
        ("_x", "_x"),
        ("état", "état"),
        ("9", "_9"),
    ],
)
def test_names_become_ids(name: str, expected: str) -> None:
    assert observable_id(name) == expected


def test_shared_sequences_are_evaluated_once() -> None:
    found = read({"a": (SHARED, 3), "same": (SHARED, 3), "fewer": (SHARED, 2), "other": (OTHER, 2)})
    model, spy = Spy.around("gpt_neox")
    losses = evaluator(found)(model)
    seen = np.concatenate(spy.batches)
    distinct = np.unique(np.concatenate([o.input_ids for o in found]), axis=0)
    assert len(seen) == len(distinct) == len(np.unique(seen, axis=0))
    assert torch.equal(losses["a"], losses["same"])


def test_a_sequence_repeated_within_an_observable_is_evaluated_once() -> None:
    repeated = SHARED.select([0] * 10 + [1] * 10)
    found = read({"a": (repeated, 3)})
    model, spy = Spy.around("raw")
    losses = evaluator(found)(model)["a"]
    assert sum(map(len, spy.batches)) == 2
    torch.testing.assert_close(losses, alone(found[0], tiny_model("raw")), rtol=1e-5, atol=1e-6)


def test_forwards_are_large_and_few() -> None:
    found = read({"a": (SHARED, 5), "b": (OTHER, 5)})
    model, spy = Spy.around("raw")
    evaluator(found)(model)
    assert [len(b) for b in spy.batches] == [40], "40 sequences of 9 tokens are one forward"

    model, spy = Spy.around("raw")
    evaluator(found, per_forward=15)(model)
    assert [len(b) for b in spy.batches] == [14, 14, 12], "at most 15, evenly"


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "llama", "raw", "object", "hooked"])
def test_losses_are_those_of_each_observable_alone(kind: str) -> None:
    found = read({"a": (SHARED, 3), "b": (SHARED, 2), "c": (OTHER, 2), "a again": (SHARED, 3)})
    model = tiny_model(kind)
    with torch.inference_mode():
        losses = evaluator(found)(model)
    assert list(losses) == ["a", "b", "c", "a_again"]
    for observable in found:
        got = losses[observable.obs_id]
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, alone(observable, model), rtol=1e-5, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    picks=st.lists(
        st.lists(st.integers(0, 11), min_size=1, max_size=6).map(lambda p: p * BATCH),
        min_size=1,
        max_size=4,
    ),
    regroup=st.booleans(),
)
def test_any_sharing_gives_every_sequence_its_own_loss(
    picks: list[list[int]], regroup: bool
) -> None:
    pool = np.arange(12 * 5).reshape(12, 5)
    found = [Observable(f"o{i}", f"o{i}", pool[p], p, len(p) // BATCH) for i, p in enumerate(picks)]
    calls: list[int] = []

    def first_token(model: nn.Module, ids: Tensor) -> Tensor:
        calls.append(len(ids))
        return ids[:, 1:].float() - 0.5

    evaluate = ObservableEvaluator(
        found,
        lambda own: own or first_token,
        batch_size=BATCH,
        per_forward=200 if regroup else None,
        device=torch.device("cpu"),
    )
    losses = evaluate(nn.Identity())
    for observable in found:
        expected = observable.input_ids[:, 1:] - 0.5
        np.testing.assert_array_equal(losses[observable.obs_id], expected)
    if regroup:
        assert sum(calls) == len({row for p in picks for row in p})
    else:
        assert set(calls) == {BATCH}


def test_a_custom_loss_sees_batches_of_batch_size_in_order() -> None:
    """It may depend on the whole batch, so only whole batches are shared."""
    found = read({"a": (SHARED, 3), "b": (OTHER, 2), "fewer": (SHARED, 1), "a again": (SHARED, 3)})
    seen: list[np.ndarray] = []

    def centred(model: nn.Module, ids: Tensor) -> Tensor:
        seen.append(ids.numpy())
        losses = next_token_loss(model, ids)
        return losses - losses.mean()

    model = tiny_model("raw")
    with torch.inference_mode():
        losses = evaluator(found, centred)(model)
    assert {len(batch) for batch in seen} == {BATCH}
    a, b = found[0].input_ids, found[1].input_ids
    whole = [a[:4], a[4:8], a[8:], b[:4], b[4:]]
    fewer = found[2].input_ids
    if not np.array_equal(fewer, a[:4]):
        whole.append(fewer)
    assert [batch.tolist() for batch in seen] == [batch.tolist() for batch in whole]
    for observable in found:
        expected = alone(observable, model, centred)
        torch.testing.assert_close(losses[observable.obs_id], expected, rtol=0, atol=0)


def test_no_observables_is_no_work() -> None:
    model, spy = Spy.around("raw")
    assert evaluator(read({}))(model) == {}
    assert spy.batches == []


class Spy:
    """Counts what a model is asked to evaluate."""

    def __init__(self) -> None:
        self.batches: list[np.ndarray] = []

    @classmethod
    def around(cls, kind: str) -> tuple[nn.Module, Spy]:
        spy, model = cls(), tiny_model(kind)

        def note(module: nn.Module, args: Any, kwargs: Any) -> None:
            ids = args[0] if args else kwargs["input_ids"]
            spy.batches.append(ids.numpy())

        model.register_forward_pre_hook(note, with_kwargs=True)
        return model, spy


def read(observables: dict[str, Dataset | tuple[Dataset, int]], seed: int = 7) -> list[Observable]:
    return read_observables(
        observables, batch_size=BATCH, batches_per_draw=2, seed=seed, sequence_length=9
    )


def evaluator(
    found: list[Observable], loss_fn: Any = None, per_forward: int = 200
) -> ObservableEvaluator:
    return ObservableEvaluator(
        found,
        lambda own: own or loss_fn or next_token_loss,
        batch_size=BATCH,
        per_forward=per_forward if loss_fn is None else None,
        device=torch.device("cpu"),
    )


def alone(observable: Observable, model: nn.Module, loss_fn: Any = next_token_loss) -> Tensor:
    """What the observable's batches give one by one."""
    with torch.inference_mode():
        batches = torch.from_numpy(observable.input_ids).split(BATCH)
        return torch.cat([loss_fn(model, ids) for ids in batches])
