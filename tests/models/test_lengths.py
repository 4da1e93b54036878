"""Sequences of several lengths: each has the activations that it has alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import basinscope
from basinscope import ActivationCache, ExtractionConfig, Intervention, extract
from tests.conftest import token_rows
from tests.models_small import tiny_model

LENGTHS = (5, 8, 5, 3, 8)


def sequences() -> list[Tensor]:
    ids = torch.as_tensor(np.asarray(token_rows(len(LENGTHS), 8, seed=3)["input_ids"]))
    return [row[:length] for row, length in zip(ids, LENGTHS, strict=True)]


def taking(positions: Any, **others: Any) -> ExtractionConfig:
    return ExtractionConfig(
        resid_out=True, head_out=True, last_layernorm=True, logits=True,
        target_token_positions=positions, **others,
    )  # fmt: skip


@pytest.mark.parametrize("batch_size", [None, 1])
@pytest.mark.parametrize(
    ("positions", "average", "coords"),
    [
        ("last", False, {"from_end": [-1]}),
        ([-3, -1], False, {"from_end": [-3, -1]}),
        (slice(-2, None), False, {"from_end": [-2, -1]}),
        ([2, 0], False, {"position": [2, 0]}),
        ("all", True, {"position": [-1]}),
    ],
)
def test_each_sequence_has_what_it_has_alone(
    positions: Any, average: bool, coords: dict[str, list[int]], batch_size: int | None
) -> None:
    model = tiny_model("gpt_neox")
    config = taking(positions, average=average)
    cache = extract(model, sequences(), config, batch_size=batch_size)
    assert {name: numbers.tolist() for name, numbers in cache.coords.items()} == coords
    for number, ids in enumerate(sequences()):
        alone = extract(model, ids[None], config)
        assert list(alone) == list(cache)
        for name in set(cache) - {"input_ids"}:
            torch.testing.assert_close(cache[name][number], alone[name][0], rtol=1e-5, atol=1e-5)


def test_ids_are_where_positions_count_from() -> None:
    model = tiny_model("gpt_neox")
    for positions, padded in (("last", slice(3, None)), (0, slice(5))):
        cache = extract(model, [ids.tolist() for ids in sequences()], taking(positions))
        expected = torch.full((8,), -1)
        expected[padded] = sequences()[0]
        assert torch.equal(cache["input_ids"][0], expected)


def test_sequences_of_one_length_are_a_batch() -> None:
    model = tiny_model("gpt_neox")
    rows = [ids for ids in sequences() if len(ids) == 5]
    change = [Intervention("mean", "mlp_out_0")]
    expected = extract(model, torch.stack(rows), taking("all"), change)
    found = extract(model, rows, taking("all"), change)
    for name in expected:
        assert torch.equal(found[name], expected[name])
    in_parts = extract(model, torch.stack(rows), taking("all"), batch_size=1)
    assert in_parts.coords["position"].tolist() == [0, 1, 2, 3, 4]


def test_a_lens_reads_the_token_that_follows(tmp_path: Path) -> None:
    """Of positions that count from the end, in memory and from a store of them."""
    model = tiny_model("gpt_neox")
    cache = extract(model, sequences(), taking([-2, -1]))
    basinscope.ActivationSaver(tmp_path).save_cache(cache)
    stored, _ = basinscope.ActivationLoader(tmp_path).query().load()
    lens = basinscope.LogitLens.from_model(model)
    for activations in (cache, stored):
        found = lens.measures(activations, "resid_out_{i}")["cross_entropy"].compute()
        assert np.isnan(found.isel(position=1)).all()  # nothing follows the last token
        for number, ids in enumerate(sequences()):
            expected = -torch.log_softmax(cache["logits"][number, 0], -1)[ids[-1]]
            at = found.isel(example=number, position=0, layer=-1)
            np.testing.assert_allclose(at, expected.detach(), rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": "all"}, "are other ones in each of sequences of 3 to 8 tokens"),
        ({"positions": [0, -1]}, "count all of them from the start .* or from the end"),
        ({"positions": 4}, "position 4 is out of range: a sequence has 3 tokens"),
        ({"attn_pattern": True}, "attn_pattern has as many key positions as a sequence"),
        ({"interventions": [Intervention("mean", "mlp_out_0")]}, "takes something from other"),
        ({"interventions": [Intervention("patch", "embed", source=1)]}, "takes something from"),
        (
            {"interventions": [Intervention("patch", "queries_0", source=torch.ones(5, 1, 2, 8))]},
            "takes something from",
        ),
        (
            {"interventions": [Intervention("patch", "queries_0", source=torch.ones(5, 2, 8))]},
            "the source of 'queries_0' has 5 positions; 'all' are 3 of a sequence of 3 tokens",
        ),
        (
            {"interventions": [Intervention("zero", "embed", positions=[0, 4])]},
            "position 4 is out of range: a sequence has 3 tokens",
        ),
        ({"input_ids": []}, "got an empty list"),
        ({"input_ids": "text"}, "a list of sequences of ids; got 'text'"),
        ({"input_ids": [[1, 2], []]}, "sequence 1 of input_ids: input_ids"),
        ({"input_ids": [[1, 2], [1, 99999]]}, "sequence 1 of input_ids: token id 99999"),
        ({"input_ids": [[1, 2], [0.5]]}, "sequence 1 of input_ids: input_ids must be integers"),
        ({"batch_size": 0}, "batch_size=0: give a number of examples"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_does_not_belong_together_is_refused(change: dict[str, Any], message: str) -> None:
    given = {"positions": "last", "input_ids": sequences(), "interventions": (), **change}
    config = taking(given.pop("positions"), attn_pattern=given.pop("attn_pattern", False))
    with pytest.raises(ValueError, match=message):
        extract(tiny_model("gpt_neox"), config=config, **given)


@pytest.mark.parametrize(
    ("target", "shape"), [("mlp_out_0", (1, 1, 16)), ("queries_0", (1, 2, 8)), ("embed", (16,))]
)
def test_a_source_that_is_the_same_for_all_is_put_into_each(
    target: str, shape: tuple[int, ...]
) -> None:
    model = tiny_model("gpt_neox")
    change = [Intervention("patch", target, "last", source=torch.ones(shape))]
    cache = extract(model, sequences(), taking("last"), change)
    for number, ids in enumerate(sequences()):
        alone = extract(model, ids[None], taking("last"), change)
        torch.testing.assert_close(cache["logits"][number], alone["logits"][0])


def test_caches_that_count_from_the_end_are_put_together() -> None:
    model = tiny_model("gpt_neox")
    config = taking("last", input_ids=False)
    parts = [extract(model, part, config) for part in (sequences()[:2], sequences()[1:])]
    whole = ActivationCache.cat(parts)
    assert whole.num_examples == 6
    assert whole.coords["from_end"].tolist() == [-1]
    assert torch.equal(whole["resid_out_1"][2:], parts[1]["resid_out_1"])
