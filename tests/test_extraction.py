"""Activations of whole data sets: the store against batches in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from basinscope import extraction
from basinscope.extraction import extract_dataset
from basinscope.io.activation_metadata import plain
from basinscope.io.activation_store import ActivationWriter, open_activations
from basinscope.io.activations import ActivationLoader, ActivationSaver
from basinscope.io.store import StoreMismatchError
from basinscope.io.verify import verify
from basinscope.lens import LogitLens
from basinscope.models.extraction import ExtractionConfig, Extractor, extract
from basinscope.models.interventions import Intervention
from basinscope.models.positions import described
from tests.models.models_tiny import VOCABULARY, tiny

ROWS, LENGTH = 21, 6
CONFIG = ExtractionConfig(
    resid_out=True, head_out=True, last_layernorm=True, target_token_positions=[1, -1]
)


def ids() -> np.ndarray:
    return np.random.default_rng(4).integers(0, VOCABULARY, (ROWS, LENGTH))


def dataset() -> Dataset:
    return Dataset.from_dict({"input_ids": ids()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_store_holds_what_one_batch_would(tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny("llama").to(dtype)
    tree = extract_dataset(model, dataset(), CONFIG, output=tmp_path / "a.zarr", batch_size=4)
    cache = extract(model, torch.from_numpy(ids()), CONFIG)
    assert set(tree.data_vars) == set(cache)
    for name in cache:
        assert tree[name].dims == cache.dims[name]
        expected = cache.to_dataset()[name].values
        tolerance = 1e-5 if dtype == torch.float32 else 0.05
        np.testing.assert_allclose(tree[name].values, expected, rtol=tolerance, atol=tolerance)
    assert tree.coords["position"].values.tolist() == [1, 5]
    assert tree.attrs["completed"] == 1
    assert tree.attrs["extraction_config"]["target_token_positions"] == [1, -1]
    assert tree["unembedding"]["weight"].shape == (VOCABULARY, 16)
    assert tree["unembedding"].attrs["norm"] == "rms"


def test_a_stopped_run_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("gpt2")
    whole = extract_dataset(model, dataset(), CONFIG, output=tmp_path / "whole.zarr", batch_size=4)
    append = ActivationWriter.append
    seen: list[int] = []

    def stop_in_the_middle(self: ActivationWriter, arrays: Any) -> None:
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(self.examples_done)
        append(self, arrays)

    monkeypatch.setattr(ActivationWriter, "append", stop_in_the_middle)
    monkeypatch.setattr("basinscope.io.activation_layout.CHUNK_EXAMPLES", 4)
    path = tmp_path / "stopped.zarr"
    with pytest.raises(KeyboardInterrupt):
        extract_dataset(model, dataset(), CONFIG, output=path, batch_size=4)
    with pytest.raises(ValueError, match="is incomplete: it has 12 of 21 examples"):
        open_activations(path)
    seen.clear()
    seen.extend([-3, -2])
    monkeypatch.setattr(
        ActivationWriter, "append", lambda s, a: (seen.append(s.examples_done), append(s, a))[1]
    )
    tree = extract_dataset(model, dataset(), CONFIG, output=path, batch_size=4)
    assert seen[2:] == [12, 16, 20]
    for name in whole.data_vars:
        np.testing.assert_allclose(tree[name].values, whole[name].values, rtol=1e-5, atol=1e-5)
    assert extract_dataset(model, dataset(), CONFIG, output=path).attrs["completed"] == 1


def test_a_continued_run_has_the_batches_of_one_that_was_not_stopped(tmp_path: Path) -> None:
    """Also where a store's chunks end inside a batch; a mean over examples shows it."""
    model, path = tiny("gpt2"), tmp_path / "stopped.zarr"
    mean = [Intervention("mean", "attn_out_0"), Intervention("patch", "mlp_out_0", source=0)]
    settings: dict[str, Any] = {"batch_size": 5, "interventions": mean}
    whole = extract_dataset(model, dataset(), CONFIG, output=tmp_path / "whole.zarr", **settings)
    first_of_a_batch = torch.from_numpy(ids()[15])

    def stop(module: Any, args: Any) -> None:
        if torch.equal(args[0][0], first_of_a_batch):
            raise KeyboardInterrupt

    handle = model.get_submodule("transformer.wte").register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        extract_dataset(model, dataset(), CONFIG, output=path, **settings)
    handle.remove()
    with pytest.raises(ValueError, match="it has 14 of 21 examples"):
        open_activations(path)
    with pytest.raises(StoreMismatchError, match="batch_size"):
        extract_dataset(model, dataset(), CONFIG, output=path, batch_size=7, interventions=mean)
    tree = extract_dataset(model, dataset(), CONFIG, output=path, **settings)
    for name in whole.data_vars:
        np.testing.assert_array_equal(tree[name].values, whole[name].values)


def test_an_intervention_that_does_not_fit_the_last_batch_is_refused_first(tmp_path: Path) -> None:
    patch = [Intervention("patch", "attn_out_0", source=3)]
    with pytest.raises(ValueError, match="source=3: the batch has examples 0 to 0"):
        extract_dataset(
            tiny("gpt2"),
            dataset(),
            CONFIG,
            output=tmp_path / "a",
            batch_size=4,
            interventions=patch,
        )
    assert not (tmp_path / "a").exists()


def test_other_settings_or_data_are_refused(tmp_path: Path) -> None:
    model, path = tiny("gpt2"), tmp_path / "a.zarr"
    extract_dataset(model, dataset(), CONFIG, output=path)
    zero = [Intervention("zero", "attn_out_0")]
    with pytest.raises(StoreMismatchError, match="interventions"):
        extract_dataset(model, dataset(), CONFIG, output=path, interventions=zero)
    other = Dataset.from_dict({"input_ids": ids()[::-1]})
    with pytest.raises(StoreMismatchError, match="dataset"):
        extract_dataset(model, other, CONFIG, output=path)
    moved = tiny("gpt2")
    with torch.no_grad():
        moved.get_parameter("transformer.h.0.mlp.c_fc.weight")[0, 0] += 1
    with pytest.raises(StoreMismatchError, match="model"):
        extract_dataset(moved, dataset(), CONFIG, output=path)
    wrong: list[Any] = [0, "4", 2.5, True]
    for size in wrong:
        with pytest.raises(ValueError, match=f"batch_size={size!r} must be a whole number"):
            extract_dataset(model, dataset(), CONFIG, output=path, batch_size=size)
    with pytest.raises(TypeError, match="must be a list of Intervention"):
        extract_dataset(model, dataset(), CONFIG, output=path, interventions=zero[0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no column 'input_ids'"):
        extract_dataset(model, Dataset.from_dict({"text": ["a"]}), CONFIG, output=path)


@pytest.mark.parametrize("first", [True, False])
def test_an_embedding_of_another_width_is_stored_and_saved(tmp_path: Path, first: bool) -> None:
    model = tiny("opt", word_embed_proj_dim=8, do_layer_norm_before=first)
    config = ExtractionConfig(embed=True, resid_out=True, last_layernorm=True)
    tree = extract_dataset(model, dataset(), config, output=tmp_path / "a.zarr")
    cache = extract(model, torch.from_numpy(ids()), config)
    ActivationSaver(tmp_path).save_cache(cache)
    ActivationSaver(tmp_path).save(dict(cache), model, "all", [], config)
    found = ActivationLoader(tmp_path).query(model_name=model)
    for stored in (tree, found.load(0)[0], found.load(1)[0]):
        assert stored["embed"].dims == ("example", "position", "d_embed")
        assert stored["resid_out_0"].dims == ("example", "position", "d_model")
        np.testing.assert_allclose(stored["embed"], cache["embed"], rtol=1e-5, atol=1e-5)
    lens = LogitLens.from_model(model)
    of_cache = lens.compute(cache, "resid_out_1")["logit_lens_resid_out_1"]
    of_store = lens.compute(tree, "resid_out_1")["logit_lens_resid_out_1"]
    np.testing.assert_allclose(of_cache, of_store, rtol=1e-4, atol=1e-4)
    with pytest.raises(KeyError, match=r"embed has axes .*d_embed.*: the lens takes arrays"):
        lens.compute(cache, "embed")


@pytest.mark.filterwarnings("error")
def test_rows_that_cannot_be_written_to_raise_no_warning(tmp_path: Path) -> None:
    dataset().to_json(tmp_path / "rows.json")
    read = Dataset.from_json(str(tmp_path / "rows.json"), cache_dir=str(tmp_path))
    torch.set_warn_always(True)
    try:
        extract_dataset(tiny("gpt2"), read, CONFIG, output=tmp_path / "a.zarr")
    finally:
        torch.set_warn_always(False)


def test_a_model_without_a_known_unembedding_is_stored_without(tmp_path: Path) -> None:
    model = tiny("gpt2")
    model.lm_head = torch.nn.Sequential(model.lm_head, torch.nn.Softmax(-1))
    with pytest.warns(UserWarning, match="stored without an unembedding"):
        tree = extract_dataset(model, dataset(), CONFIG, output=tmp_path / "a.zarr")
    assert "unembedding" not in tree.children
    plain = extract_dataset(
        tiny("gpt2"), dataset(), CONFIG, output=tmp_path / "b.zarr", save_unembedding=False
    )
    assert "unembedding" not in plain.children


LENGTHS = np.random.default_rng(5).integers(3, 8, ROWS)


def sequences() -> list[list[int]]:
    rows = np.random.default_rng(6).integers(0, VOCABULARY, (ROWS, 8))
    return [row[:length].tolist() for row, length in zip(rows, LENGTHS, strict=True)]


def uneven(rows: Any = None) -> Dataset:
    return Dataset.from_dict({"input_ids": sequences() if rows is None else rows})


def taking(positions: Any, **others: Any) -> ExtractionConfig:
    return ExtractionConfig(
        resid_out=True, head_out=True, last_layernorm=True, logits=True,
        target_token_positions=positions, **others,
    )  # fmt: skip


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of what runs, as it runs."""
    shapes: list[tuple[int, ...]] = []
    run = Extractor.__call__

    def noted(self: Extractor, input_ids: torch.Tensor) -> Any:
        shapes.append(tuple(input_ids.shape))
        return run(self, input_ids)

    monkeypatch.setattr(Extractor, "__call__", noted)
    return shapes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("positions", "average", "coords"),
    [
        ([-3, -1], False, {"from_end": [-3, -1]}),
        ([2, 0], False, {"position": [2, 0]}),
        ("all", True, {"position": [-1]}),
    ],
)
def test_rows_of_several_lengths_have_what_each_has_alone(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    positions: Any,
    average: bool,
    coords: dict[str, list[int]],
) -> None:
    monkeypatch.setattr(extraction, "WINDOW_BATCHES", 2)
    model, config = tiny("llama").to(dtype), taking(positions, average=average)
    path = tmp_path / "a.zarr"
    extract_dataset(model, uneven(), config, output=path, batch_size=4)
    assert verify(path).complete
    assert not verify(path).damaged
    tree = open_activations(path).load()
    assert {name: numbers.values.tolist() for name, numbers in tree.coords.items()} == coords
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    for number, ids in enumerate(sequences()):
        alone = extract(model, torch.tensor([ids]), config).to_dataset()
        assert list(tree.data_vars) == list(alone)
        for name in set(alone) - {"input_ids"}:
            found = tree[name][number]
            assert found.dims == alone[name].dims[1:]
            np.testing.assert_allclose(
                found.values, alone[name].values[0], rtol=tolerance, atol=tolerance
            )
        none = [-1] * (LENGTHS.max() - len(ids))
        padded = [*none, *ids] if "from_end" in coords else [*ids, *none]
        assert tree["input_ids"][number].values.tolist() == padded


def test_rows_of_one_length_that_are_near_run_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batches: list[tuple[int, ...]]
) -> None:
    def shapes(window: int) -> list[tuple[int, ...]]:
        found = [(1, len(sequences()[0]))]  # what the store's arrays are
        for start in range(0, ROWS, window):
            counts: dict[int, int] = {}
            for length in LENGTHS[start : start + window]:
                counts[length] = counts.get(length, 0) + 1
            for length, count in counts.items():
                found += [(min(4, count - i), int(length)) for i in range(0, count, 4)]
        return found

    model, config = tiny("gpt2"), taking("last")
    extract_dataset(model, uneven(), config, output=tmp_path / "a", batch_size=4)
    assert batches == shapes(ROWS)
    batches.clear()
    monkeypatch.setattr(extraction, "WINDOW_BATCHES", 2)
    extract_dataset(model, uneven(), config, output=tmp_path / "b", batch_size=4)
    assert batches == shapes(8)
    batches.clear()
    monkeypatch.setattr(extraction, "WINDOW_BYTES", 1)  # a batch is more
    extract_dataset(model, uneven(), config, output=tmp_path / "c", batch_size=4)
    assert batches == shapes(4)
    batches.clear()
    extract_dataset(model, dataset(), config, output=tmp_path / "d", batch_size=8)
    assert batches == [(8, LENGTH), (8, LENGTH), (5, LENGTH)], "those of one length, as they come"


@pytest.mark.parametrize("stopped_at", [2, 7, 14])
def test_a_stopped_store_of_several_lengths_goes_on_bit_by_bit(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    batches: list[tuple[int, ...]],
    stopped_at: int,
) -> None:
    """Windows of 6 rows and chunks of 4: what is on disk may end inside a window."""
    monkeypatch.setattr(extraction, "WINDOW_BATCHES", 2)
    monkeypatch.setattr("basinscope.io.activation_store.PARTS", 4)
    model, config, path = tiny("gpt2"), taking([-2, -1]), tmp_path / "stopped.zarr"
    whole = extract_dataset(model, uneven(), config, output=tmp_path / "whole.zarr", batch_size=3)
    uninterrupted = batches[1:]
    batches.clear()

    def stop(module: Any, args: Any) -> None:
        if len(batches) == stopped_at:
            raise KeyboardInterrupt

    handle = model.get_submodule("transformer.wte").register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        extract_dataset(model, uneven(), config, output=path, batch_size=3)
    handle.remove()
    batches.clear()
    kept = len(open_activations(path, allow_incomplete=True)["input_ids"])
    assert kept == {2: 0, 7: 4, 14: 16}[stopped_at]
    left = {2: 0, 7: 0, 14: 8}[stopped_at]  # batches of windows that were whole before
    tree = extract_dataset(model, uneven(), config, output=path, batch_size=3)
    assert batches[1:] == uninterrupted[left:]
    for name in whole.variables:
        np.testing.assert_array_equal(tree[name].values, whole[name].values)
    batches.clear()
    again = extract_dataset(model, uneven(), config, output=path, batch_size=3)
    assert again.attrs == tree.attrs
    assert batches == [(1, LENGTHS[0])]
    with pytest.raises(StoreMismatchError, match="dataset"):
        extract_dataset(model, uneven(sequences()[::-1]), config, output=path)


def test_changes_that_need_no_neighbours_are_made_in_every_row(tmp_path: Path) -> None:
    model = tiny("llama")
    changes = [
        Intervention("zero", "attn_out_0", "last"),
        Intervention("patch", "mlp_out_0", [0, -1], source=torch.ones(2, 16)),
        Intervention("knockout", "attn_pattern_1", "last", key_positions=[0]),
    ]
    tree = extract_dataset(
        model, uneven(), taking("last"), output=tmp_path / "a.zarr", interventions=changes
    )
    for number, ids in enumerate(sequences()):
        alone = extract(model, torch.tensor([ids]), taking("last"), changes)
        np.testing.assert_allclose(
            tree["resid_out_1"][number], alone["resid_out_1"][0], rtol=1e-5, atol=1e-5
        )


def test_a_lens_reads_a_store_of_several_lengths(tmp_path: Path) -> None:
    model, path = tiny("llama"), tmp_path / "a.zarr"
    tree = extract_dataset(model, uneven(), taking([-2, -1]), output=path)
    lens = LogitLens.from_store(path)
    found = lens.measures(path, "resid_out_{i}")["cross_entropy"].isel(layer=-1).compute()
    assert np.isnan(found.isel(position=1)).all(), "nothing follows the last token"
    logits = torch.from_numpy(tree["logits"].values[:, 0])
    for number, ids in enumerate(sequences()):
        expected = -torch.log_softmax(logits[number], -1)[ids[-1]]
        np.testing.assert_allclose(found[number, 0], expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": "all"}, "are other ones in each of sequences of 3 to 7 tokens"),
        ({"positions": [0, -1]}, "count all of them from the start .* or from the end"),
        ({"positions": 3}, "position 3 is out of range: a sequence has 3 tokens"),
        ({"attn_pattern": True}, "attn_pattern has as many key positions"),
        ({"interventions": [Intervention("mean", "mlp_out_0")]}, "takes something from other"),
        ({"interventions": [Intervention("patch", "embed", source=1)]}, "takes something from"),
        (
            {"interventions": [Intervention("zero", "embed", 3)]},
            "position 3 is out of range: a sequence has 3 tokens",
        ),
        (
            {"interventions": [Intervention("patch", "embed", source=torch.ones(3, 16))]},
            "the source of 'embed' has 3 positions; 'all' are 4 of a sequence of 4 tokens",
        ),
        ({"rows": [[1, 2, 3], [4, 5], []]}, "row 2 of dataset has no tokens"),
        ({"rows": [[1, 2, 3], [4, None]]}, r"row 1 of dataset has a missing id \(null\)"),
        ({"rows": [[1, 2, 3], [4, 5], [6, 64]]}, "row 2: dataset has token ids from 6 to 64"),
        ({"rows": [[1, 2, 3], [-1, 5]]}, "row 1: dataset has token ids from -1 to 5"),
        ({"rows": [[1, 2], [3] * 33]}, "input_ids have 33 tokens, and GPT2LMHeadModel takes at"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_rows_that_cannot_be_stored_together_are_refused_before_any_runs(
    tmp_path: Path, batches: list[tuple[int, ...]], change: dict[str, Any], message: str
) -> None:
    given = {"positions": "last", "rows": None, "interventions": (), **change}
    config = taking(given["positions"], attn_pattern=given.get("attn_pattern", False))
    with pytest.raises(ValueError, match=message):
        extract_dataset(
            tiny("gpt2"),
            uneven(given["rows"]),
            config,
            output=tmp_path / "a.zarr",
            interventions=given["interventions"],
        )
    assert not batches
    assert not (tmp_path / "a.zarr").exists()


def test_progress_is_told_inside_a_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("basinscope.sampling.progress.LINE_SECONDS", 0.0)
    extract_dataset(
        tiny("gpt2"), uneven(), taking("last"), output=tmp_path / "a", batch_size=2, progress=True
    )
    lines = capsys.readouterr().err.splitlines()
    done = [int(line.split()[1]) for line in lines if line.startswith("example ")]
    assert len(set(done)) > 8
    assert done == sorted(done)
    assert done.count(ROWS) == 1


@pytest.mark.parametrize(
    "positions",
    [
        slice(0, 2),
        slice(None, np.int64(-1), 2),
        [slice(1, 3), "last", np.int64(0)],
        np.array([1, 2]),
        "all",
        (0, 1),
    ],
)
def test_positions_are_described_alike_by_who_extracts_and_by_who_saves(positions: Any) -> None:
    assert plain(positions, "target_token_positions") == described(positions)


@pytest.mark.parametrize("positions", [slice(0, 2), [slice(0, 1), "last"]])
def test_a_run_is_found_by_the_slices_that_it_was_taken_at(tmp_path: Path, positions: Any) -> None:
    config = ExtractionConfig(resid_out=True, target_token_positions=positions)
    zero = [Intervention("zero", "resid_in_0", positions)]
    cache = extract(tiny("gpt2"), torch.from_numpy(ids()), config, zero)
    saver = ActivationSaver(tmp_path)
    saver.save_cache(cache)
    saver.save(dict(cache), tiny("gpt2"), positions, zero, config)
    loader = ActivationLoader.from_saver(saver)
    assert len(loader.query(target_token_positions=positions)) == 2
    assert len(loader.query(extraction_config=config, interventions=zero)) == 2
    assert len(loader.query(target_token_positions=slice(0, 3))) == 0
