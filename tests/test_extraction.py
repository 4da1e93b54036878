"""Activations of whole data sets: the store against batches in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from basinscope.extraction import extract_dataset
from basinscope.io.activation_metadata import plain
from basinscope.io.activation_store import ActivationWriter, open_activations
from basinscope.io.activations import ActivationLoader, ActivationSaver
from basinscope.io.store import StoreMismatchError
from basinscope.lens import LogitLens
from basinscope.models.extraction import ExtractionConfig, extract
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
