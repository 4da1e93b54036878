"""Runs of activations: saved whole or not at all, found by what they are, and never lost."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from rich.console import Console
from typer.testing import CliRunner

from basinscope.cli_activations import app
from basinscope.io import activation_index
from basinscope.io.activation_index import INDEX
from basinscope.io.activation_layout import write_activations
from basinscope.io.activation_sources import sources_of
from basinscope.io.activation_store import open_activations
from basinscope.io.activations import ActivationLoader, ActivationSaver

CONFIG = {"extract_resid_out": True, "avg": False}
RUNS = 10_000


def save(base: Path, number: int = 0, experiment: str = "default", **changes: Any) -> Path:
    fields: dict[str, Any] = {
        "activations": {"resid_out_0": np.full((2, 3, 4), number, np.float32)},
        "model": "org/tiny",
        "target_token_positions": ["last", number],
        "interventions": None,
        "extraction_config": CONFIG,
    }
    return ActivationSaver(base, experiment).save(**(fields | changes))


def loader(base: Path, experiment: str = "default") -> ActivationLoader:
    return ActivationLoader(base, experiment)


def numbers(base: Path, experiment: str = "default", **filters: Any) -> list[int]:
    """The runs that a query finds, by the number they were saved with."""
    found = loader(base, experiment).query(**filters)
    return [run.metadata["target_token_positions"][1] for run in found]


def test_a_home_is_expanded_and_what_is_no_path_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ActivationSaver("~/runs").base_dir == tmp_path / "runs"
    assert ActivationLoader("~/runs").base_dir == tmp_path / "runs"
    for kind in (ActivationSaver, ActivationLoader):
        with pytest.raises(TypeError, match=r"path of a base directory, a str or .*; got int"):
            kind(3)  # type: ignore[arg-type]


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = save(tmp_path, 7, other_metadata={"lr": 0.1}, tag="first")
    assert path.parent == tmp_path / "default" / "org_tiny"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d_\d\d_\d\d_\d{6}", path.name)
    tree, metadata = loader(tmp_path).query().load()
    assert tree["resid_out_0"].chunks is not None
    assert tree["resid_out_0"].dims == ("example", "position", "d_model")
    assert tree["resid_out_0"].dtype == np.float32
    assert (tree["resid_out_0"] == 7).all()
    expected = {
        "tag": "first",
        "lr": 0.1,
        "model_name": "org/tiny",
        "experiment_name": "default",
        "target_token_positions": ["last", 7],
        "interventions": None,
        "extraction_config": CONFIG,
        "arrays": "resid_out_* (2, 3, 4)",
    }
    assert expected.items() <= metadata.items()
    assert datetime.fromisoformat(metadata["save_time"]).tzinfo == UTC
    with xr.open_datatree(path / "activations.zarr", engine="zarr", consolidated=False) as plain:
        assert plain.attrs["tag"] == "first"
        assert (plain["resid_out_0"] == 7).all()


class Cache(dict[str, Any]):
    """What an extraction gives: tensors with dims, coordinates and metadata."""

    def __init__(self, arrays: dict[str, Any], metadata: dict[str, Any] | None = None) -> None:
        super().__init__(arrays)
        self.dims = {name: ("example", "position", "d_model")[: v.ndim] for name, v in self.items()}
        self.coords = {"position": np.array([4, 9, 2])}
        self.metadata = metadata


METADATA = {
    "created_by": "an extraction",
    "model": {"class": "Tiny", "name_or_path": "org/tiny", "num_layers": 2},
    "target_token_positions": ["last"],
    "interventions": [],
    "extraction_config": CONFIG,
    "dataset": "pile",
}


def test_a_cache_brings_its_metadata_dims_and_coordinates(tmp_path: Path) -> None:
    cache = Cache({"custom": torch.randn(2, 3, 4), "per_position": torch.ones(2, 3)}, METADATA)
    path = ActivationSaver(tmp_path).save_cache(cache, {"lr": 0.1}, tag="c")
    tree, metadata = loader(tmp_path).query(tag="c", custom_keys={"dataset": "pile"}).load()
    assert path.parent.name == "org_tiny"
    assert tree["custom"].dims == ("example", "position", "d_model")
    assert tree["per_position"].dims == ("example", "position")
    np.testing.assert_array_equal(tree["position"], [4, 9, 2])
    np.testing.assert_array_equal(tree["custom"], cache["custom"])
    assert metadata["model"] == METADATA["model"]
    assert metadata["lr"] == 0.1
    assert metadata["created_by"].startswith("basinscope ")


def test_a_cache_that_lacks_metadata_is_refused(tmp_path: Path) -> None:
    saver, arrays = ActivationSaver(tmp_path), {"custom": torch.zeros(2)}
    with pytest.raises(ValueError, match="lacks model, target_token_positions, interv"):
        saver.save_cache(Cache(arrays))
    without = {name: value for name, value in METADATA.items() if name != "interventions"}
    with pytest.raises(ValueError, match=r"lacks interventions: add it"):
        saver.save_cache(Cache(arrays, without))
    named = {**without, "interventions": [], "model_name": "tiny"}
    del named["model"]
    assert saver.save_cache(Cache(arrays, named)).parent.name == "tiny"


@pytest.mark.parametrize(
    "dtype",
    ["float32", "float16", "bfloat16", "float64", "int64", "uint8", "bool"],
)
def test_tensors_of_every_type_are_saved_exactly(dtype: str, tmp_path: Path) -> None:
    kind = getattr(torch, dtype)
    tensor = (torch.randn(5, 3) * 100).to(kind).requires_grad_(kind.is_floating_point)
    save(tmp_path, activations={"custom": tensor, "turned": tensor.T, "one": tensor[0, 0]})
    tree, _ = loader(tmp_path).query().load()
    exact = tensor.detach().float() if dtype == "bfloat16" else tensor.detach()
    np.testing.assert_array_equal(tree["custom"], exact.numpy())
    np.testing.assert_array_equal(tree["turned"], exact.numpy().T)
    np.testing.assert_array_equal(tree["one"], exact.numpy()[0, 0])
    assert str(tree["custom"].dtype) == ("float32" if dtype == "bfloat16" else dtype)
    assert tree["custom"].attrs.get("source_dtype") == ("bfloat16" if dtype == "bfloat16" else None)


def test_datasets_trees_and_single_arrays_are_saved(tmp_path: Path) -> None:
    dataset = xr.Dataset(
        {"a": (("example", "layer"), np.arange(6.0).reshape(3, 2)), "b": ((), 3)},
        coords={"layer": ["first", "second"], "prompt": ("example", ["x", "yy", "z"])},
        attrs={"model": {"class": "Tiny"}, "tag": "not this one"},
    )
    unembedding = xr.Dataset(
        {"weight": (("vocab", "d_model"), np.ones((4, 2)))}, attrs={"norm": "none"}
    )
    save(tmp_path, activations=dataset.chunk(example=2), tag="dataset")
    save(tmp_path, activations=xr.DataTree.from_dict({"/": dataset, "/unembedding": unembedding}))
    save(tmp_path, activations=dataset["a"].rename("named"))
    save(tmp_path, activations=torch.ones(2, 2))
    found = loader(tmp_path).query()
    for number in (0, 1):
        tree, metadata = found.load(number)
        xr.testing.assert_equal(tree.to_dataset().compute(), dataset)
        assert metadata["model"] == {"class": "Tiny"}
    assert found[0].metadata["tag"] == "dataset"
    assert found[1].metadata["tag"] is None
    child = found.load(1)[0]["unembedding"]
    xr.testing.assert_equal(child.to_dataset(inherit=False).compute(), unembedding)
    assert child.attrs == {"norm": "none"}
    xr.testing.assert_equal(found.load(2)[0]["named"].compute(), dataset["a"].rename("named"))
    np.testing.assert_array_equal(found.load(3)[0]["activations"], np.ones((2, 2)))
    again = save(tmp_path, activations=found.load(1)[0])  # what was loaded can be saved
    assert (again / "activations.zarr" / "unembedding" / "weight").is_dir()


@pytest.mark.parametrize(
    "values", [np.zeros((4, 5), int), np.zeros(7, bool), np.full((2, 3, 4), np.nan), np.zeros(())]
)
def test_what_a_chunk_without_a_file_would_be_is_saved_too(values: Any, tmp_path: Path) -> None:
    save(tmp_path, activations={"custom": values})
    tree, _ = loader(tmp_path).query().load()
    np.testing.assert_array_equal(tree["custom"], values)


def test_arrays_of_other_sizes_get_dims_of_their_own(tmp_path: Path) -> None:
    labelled = xr.DataArray(np.ones((7, 1)), dims=("vocab", "one"))
    arrays = {"resid_out_0": np.ones((2, 3, 4)), "resid_out_1": np.ones((2, 5, 4)), "x": [1, 2]}
    arrays |= {"logits": np.ones((2, 3, 9)), "labelled": labelled}
    save(tmp_path, activations=arrays)
    tree, _ = loader(tmp_path).query().load()
    assert tree["resid_out_0"].dims == ("example", "position", "d_model")
    assert tree["resid_out_1"].dims == tuple(f"resid_out_1_dim_{i}" for i in range(3))
    assert tree["x"].dims == ("x_dim_0",)
    assert tree["logits"].dims == tuple(f"logits_dim_{i}" for i in range(3))


@pytest.mark.parametrize("order", [("embed", "resid_out_0"), ("resid_out_0", "embed")])
def test_an_embedding_of_another_width_leaves_the_stream_its_axis(
    order: tuple[str, ...], tmp_path: Path
) -> None:
    shapes = {"embed": (2, 3, 8), "resid_out_0": (2, 3, 4)}
    arrays = {name: np.ones(shapes[name]) for name in order}
    assert list(sources_of(arrays)[0]) == list(order)
    save(tmp_path, activations=arrays)
    tree, _ = loader(tmp_path).query().load()
    assert tree["embed"].dims == ("example", "position", "d_embed")
    assert tree["resid_out_0"].dims == ("example", "position", "d_model")
    save(tmp_path, activations={"embed": np.ones((2, 3, 8))})
    assert loader(tmp_path).query().load()[0]["embed"].dims[-1] == "d_model"


NO_ARRAYS = [{"a": 1}, "text", None, [[1, 2], [3]], [object()], 1j, np.array(["a"])]


NO_NUMBERS = [torch.ones(2, dtype=torch.complex64), torch.eye(2).to_sparse()]


@pytest.mark.parametrize("value", [*NO_ARRAYS, *NO_NUMBERS, torch.ones(2, device="meta")])
def test_what_is_no_array_is_refused_by_name(value: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="mapping_index"):
        save(tmp_path, activations={"resid_out_0": np.ones((2, 3, 4)), "mapping_index": value})
    assert not list(tmp_path.rglob("*.zarr"))


@dataclass
class Settings:
    avg: bool
    heads: tuple[int, ...]


def test_metadata_may_be_objects(tmp_path: Path) -> None:
    config = SimpleNamespace(to_dict=lambda: {"a": (1, 2)})
    settings = [Settings(True, (1, 2))]
    metadata = {
        "size": np.int64(3), "rates": np.array([0.5, 1]), "file": Path("x"), "t": torch.ones(2),
        "ids": {3, 1},
    }  # fmt: skip
    save(tmp_path, interventions=settings, extraction_config=config, other_metadata=metadata)
    found = loader(tmp_path).query(interventions=settings, extraction_config=config)
    assert found[0].metadata["interventions"] == [{"avg": True, "heads": [1, 2]}]
    assert found[0].metadata["extraction_config"] == {"a": [1, 2]}
    assert found[0].metadata["size"] == 3
    assert found[0].metadata["rates"] == [0.5, 1.0]
    assert found[0].metadata["ids"] == [1, 3]
    with pytest.raises(TypeError, match="interventions is metadata, which is stored as JSON"):
        save(tmp_path, interventions=object())
    with pytest.raises(TypeError, match=r"big is metadata.*belongs to the activations"):
        save(tmp_path, other_metadata={"big": np.ones(100_000)})
    with pytest.raises(ValueError, match="other_metadata has tag: give"):
        save(tmp_path, other_metadata={"tag": "x"})
    assert len(loader(tmp_path).query()) == 1


class Loaded(torch.nn.Module):
    """A model that one can call, with a name or without."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.config = SimpleNamespace(name_or_path=name)

    def forward(self, name: str) -> bool:
        raise AssertionError("the model was run on its name")


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("org/tiny", "org/tiny"),
        (SimpleNamespace(name_or_path="a", config=SimpleNamespace(name_or_path="b")), "a"),
        (SimpleNamespace(name_or_path="", config=SimpleNamespace(name_or_path="b")), "b"),
        (torch.nn.Linear(1, 1), "Linear"),
        (SimpleNamespace(cfg=SimpleNamespace(model_name="gpt2")), "gpt2"),
        (Loaded("org/loaded"), "org/loaded"),
        (Loaded(""), "Loaded"),
        ("./local/model", "./local/model"),
    ],
)
def test_a_model_is_named(model: Any, name: str, tmp_path: Path) -> None:
    path = save(tmp_path, model=model)
    save(tmp_path, model="other")
    assert not path.parent.name.startswith(".")
    assert path.parent.parent.parent == tmp_path
    for wanted in (name, model, lambda found: found == name):
        (run,) = loader(tmp_path).query(model_name=wanted)
        assert run.metadata["model_name"] == name


def test_filters_are_values_or_functions(tmp_path: Path) -> None:
    save(tmp_path, 0, tag="a", other_metadata={"lr": 0.1, "pivot_positions": [3]})
    save(tmp_path, 1, tag="b", other_metadata={"lr": 0.2})
    save(tmp_path, 2, model="org/large", interventions=[{"layer": 1}])
    save(tmp_path, 3, extraction_config={"avg": True})
    save(tmp_path, 4, "elsewhere", tag="a")
    assert numbers(tmp_path) == [0, 1, 2, 3]
    assert numbers(tmp_path, experiment_name="elsewhere") == [4]
    assert numbers(tmp_path, experiment_name="*") == [0, 1, 2, 3, 4]
    assert numbers(tmp_path, experiment_name=lambda name: name != "default") == [4]
    assert numbers(tmp_path, "elsewhere") == [4]
    assert numbers(tmp_path, tag="a") == [0]
    assert numbers(tmp_path, experiment_name="*", tag="a") == [0, 4]
    assert numbers(tmp_path, tag=lambda tag: tag is None) == [2, 3]
    assert numbers(tmp_path, model_name="org/large") == [2]
    assert numbers(tmp_path, model_name="org_large") == [2]
    assert numbers(tmp_path, model_name=lambda name: name.endswith("tiny")) == [0, 1, 3]
    assert numbers(tmp_path, target_token_positions=["last", 3]) == [3]
    assert numbers(tmp_path, target_token_positions=("last", 3)) == [3]
    assert numbers(tmp_path, pivot_positions=[3]) == [0]
    assert numbers(tmp_path, pivot_positions=lambda positions: True) == [0]
    assert numbers(tmp_path, interventions=[{"layer": 1}]) == [2]
    assert numbers(tmp_path, extraction_config={"avg": True}) == [3]
    assert numbers(tmp_path, extraction_config=lambda config: config["avg"]) == [3]
    assert numbers(tmp_path, custom_keys={"lr": 0.2}) == [1]
    assert numbers(tmp_path, custom_keys={"lr": lambda lr: lr < 0.15}) == [0]
    assert numbers(tmp_path, custom_keys={"lr": None}) == [2, 3]
    assert numbers(tmp_path, custom_keys={"lr": 0.1, "tag": "b"}) == []
    assert numbers(tmp_path, tag="a", model_name="org/tiny", custom_keys={"lr": 0.1}) == [0]


def test_names_of_models_are_directories(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the model's name is empty"):
        save(tmp_path, model="")
    assert not list(tmp_path.rglob("*.zarr"))
    long = "/home/someone" * 40 + "/größe"
    path = save(tmp_path, 3, model=long)
    assert path.parent.name.endswith("_größe")
    assert numbers(tmp_path, model_name=long) == [3]


def test_a_filter_that_raises_says_for_which_run(tmp_path: Path) -> None:
    path = save(tmp_path, 0, other_metadata={"seed": None})
    with pytest.raises(TypeError) as caught:
        loader(tmp_path).query(custom_keys={"seed": lambda seed: seed < 5})
    assert str(path) in caught.value.__notes__[0]


def test_times_are_utc_and_may_be_ranges(tmp_path: Path) -> None:
    noon = datetime(2025, 1, 31, 12, tzinfo=UTC)
    for number in range(4):
        save(tmp_path, number, save_time=noon + number * timedelta(hours=1))
    assert [r.time for r in loader(tmp_path).query()][1] == "2025-01-31_13_00_00_000000"
    assert numbers(tmp_path, save_time="2025-01-31T13:00") == [1]
    assert numbers(tmp_path, save_time="2025-01-31_13_00_00_000000") == [1]
    assert numbers(tmp_path, save_time="2025-01-31T14:00+01:00") == [1]
    berlin = timezone(timedelta(hours=1))
    assert numbers(tmp_path, save_time=datetime(2025, 1, 31, 14, tzinfo=berlin)) == [1]
    assert numbers(tmp_path, save_time=("2025-01-31T13:00", "2025-01-31 14:00")) == [1, 2]
    assert numbers(tmp_path, save_time=("2025-01-31T14:30", None)) == [3]
    assert numbers(tmp_path, save_time=(None, datetime(2025, 1, 31, 12))) == [0]
    assert numbers(tmp_path, save_time=lambda time: "T14" in time) == [2]
    with pytest.raises(ValueError, match="'yesterday' is no time"):
        loader(tmp_path).query(save_time="yesterday")
    with pytest.raises(ValueError, match="a pair"):
        loader(tmp_path).query(save_time=("2025-01-31",))


def test_runs_of_one_microsecond_are_all_kept(tmp_path: Path) -> None:
    moment = datetime(2025, 1, 31, 12, 0, 0, 999_998, tzinfo=UTC)
    for number in range(4):
        save(tmp_path, number, save_time=moment)
    assert numbers(tmp_path) == [0, 1, 2, 3]
    assert [run.time[-9:] for run in loader(tmp_path).query()] == [
        "00_999998", "00_999999", "01_000000", "01_000001",
    ]  # fmt: skip
    for run in loader(tmp_path).query():
        assert run.metadata["save_time"][17:26] == run.time[-9:].replace("_", ".")


def test_a_result_is_a_sequence_that_prints_what_it_holds(tmp_path: Path) -> None:
    for number in range(3):
        save(tmp_path, number, tag=f"t{number}")
    found = loader(tmp_path).query()
    assert len(found) == 3
    assert found[-1].time == found[2].time == found.get_paths()[2].name
    experiment, model_dir, path, metadata = found[1]
    assert (experiment, model_dir, path) == ("default", found[1].model_dir, found[1].path)
    assert metadata["tag"] == "t1"
    assert [run.metadata["tag"] for run in found[1:]] == ["t1", "t2"]
    assert len(found[:2]) == 2
    lines = str(found).splitlines()
    assert lines[1] == f"1  default  org/tiny  {found[1].time}  tag=t1  resid_out_* (2, 3, 4)"
    assert repr(found).splitlines() == ["<QueryResult of 3 runs>", *lines]
    assert "and 2 more" in repr(type(found)([found[0]] * 42, {}))


def test_a_run_that_is_not_there_is_an_error_that_lists_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no directory"):
        loader(tmp_path / "nothing").query()
    with pytest.raises(FileNotFoundError, match=r"no experiment 'default'; it has none"):
        loader(tmp_path).query()
    path = save(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no experiment 'other'; it has default"):
        loader(tmp_path).query("other")
    found = loader(tmp_path).query()
    for action in (found.load, found.remove, found.__getitem__):
        with pytest.raises(IndexError, match="no run 1; there are 0 to 0"):
            action(1)
    with pytest.raises(KeyError, match=f"no run of '2020'; the latest here: {path.name}"):
        found.load("2020")
    with pytest.raises(IndexError, match="nothing fits the query"):
        loader(tmp_path).query(tag="x").load()


@pytest.mark.parametrize("name", ["", "a/b", "../x", ".hidden", "*"])
def test_names_that_are_no_directory_are_refused(name: str, tmp_path: Path) -> None:
    for make in (ActivationSaver, ActivationLoader):
        with pytest.raises(ValueError, match="cannot be the name of an experiment"):
            make(tmp_path, name)


def test_the_environment_names_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACTIVATION_BASE_DIR", raising=False)
    for make in (ActivationSaver, ActivationLoader):
        with pytest.raises(ValueError, match="ACTIVATION_BASE_DIR is not set"):
            make.from_env()
    monkeypatch.setenv("ACTIVATION_BASE_DIR", str(tmp_path))
    saver = ActivationSaver.from_env("mine")
    assert (saver.base_dir, saver.experiment_name) == (tmp_path, "mine")
    found = ActivationLoader.from_saver(saver)
    assert (found.base_dir, found.experiment_name) == (tmp_path, "mine")
    assert ActivationLoader.from_env().experiment_name == "default"


def test_runs_of_one_time_need_a_number(tmp_path: Path) -> None:
    moment = datetime(2025, 1, 31, tzinfo=UTC)
    save(tmp_path, 0, save_time=moment)
    save(tmp_path, 1, save_time=moment, model="other")
    found = loader(tmp_path).query()
    with pytest.raises(ValueError, match=r"2 runs are of .*: give the number of one, 0, 1"):
        found.load(found[0].time)
    assert found.load(1)[1]["model_name"] == "other"


def test_a_time_that_a_damaged_run_shares_removes_neither(tmp_path: Path) -> None:
    moment = datetime(2025, 1, 2, tzinfo=UTC)
    paths = [save(tmp_path, n, model=f"m{n}", save_time=moment) for n in range(2)]
    (paths[0] / "activations.zarr" / "zarr.json").write_text("{")
    os.utime(paths[0])  # the index noted it while it was whole
    found = loader(tmp_path).query()
    assert list(found.not_whole) == paths[:1]
    with pytest.raises(ValueError, match="2 directories are of 2025-01-02"):
        found.remove(paths[0].name)
    assert all(path.exists() for path in paths)
    found.remove(0)
    assert [path.exists() for path in paths] == [True, False]
    found.remove(paths[0].name)
    assert not paths[0].exists()


def test_removing_deletes_one_run_and_nothing_else(tmp_path: Path) -> None:
    paths = [save(tmp_path, number) for number in range(3)]
    (paths[1] / "notes.txt").write_text("goes too")
    found = loader(tmp_path).query()
    found.remove(paths[1].name)
    assert found.get_paths() == [paths[0], paths[2]]
    assert not paths[1].exists()
    assert numbers(tmp_path) == [0, 2]
    found.remove(-1)
    assert numbers(tmp_path) == [0]
    assert sorted(p.name for p in paths[0].parent.iterdir()) == [paths[0].name]


def test_a_removal_that_was_cut_short_is_no_run_and_is_finished_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [save(tmp_path, number) for number in range(2)]
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", killed)
        with pytest.raises(PowerCutError):
            loader(tmp_path).query().remove(0)
    assert numbers(tmp_path) == [1]
    assert not loader(tmp_path).query().not_whole
    assert len(list(paths[0].parent.iterdir())) == 2
    loader(tmp_path).query().remove(0)
    assert list(paths[0].parent.iterdir()) == []


class PowerCutError(BaseException):
    pass


def killed(*_: Any, **__: Any) -> None:
    raise PowerCutError


def test_a_run_moves_to_another_experiment(tmp_path: Path) -> None:
    paths = [save(tmp_path, number) for number in range(2)]
    found = loader(tmp_path).query()
    moved = found.update_run_experiment(0, "later")
    assert moved == tmp_path / "later" / "org_tiny" / paths[0].name
    assert not paths[0].exists()
    assert found[0].experiment_name == "later"
    assert found.load(0)[1]["experiment_name"] == "later"
    assert numbers(tmp_path) == [1]
    assert numbers(tmp_path, "later") == [0]
    shutil.copytree(moved, paths[0])
    with pytest.raises(FileExistsError, match="exists already"):
        loader(tmp_path).query().update_run_experiment(0, "later")
    assert numbers(tmp_path) == [0, 1]


def test_an_experiment_is_renamed_in_one_step(tmp_path: Path) -> None:
    for number in range(2):
        save(tmp_path, number)
    save(tmp_path, 2, "taken")
    saver = ActivationSaver(tmp_path)
    with pytest.raises(FileExistsError, match="taken exists already"):
        saver.rename_experiment("taken")
    assert saver.experiment_name == "default"
    saver.rename_experiment("better")
    assert saver.experiment_name == "better"
    assert numbers(tmp_path, "better") == [0, 1]
    assert loader(tmp_path, "better").query()[0].metadata["experiment_name"] == "better"
    with pytest.raises(FileNotFoundError, match=r"no experiment 'default'; it has better, taken"):
        ActivationSaver(tmp_path).rename_experiment("x")


PROCESS = """
import sys, time
from datetime import datetime
from pathlib import Path
import numpy as np
from basinscope.io import activation_layout
from basinscope.io.activations import ActivationLoader, ActivationSaver
base, first = Path(sys.argv[1]), int(sys.argv[2])
def save(number, save_time=None):
    activations = {"resid_out_0": np.full((2, 3, 4), number, np.float32)}
    ActivationSaver(base).save(
        activations, "org/tiny", ["last", number], None, {}, save_time=save_time
    )
def number_of(run):
    return run.metadata["target_token_positions"][1]
"""
"""What the processes of these tests begin with; without torch, which takes seconds to import."""

HOLD = """
def wait(path):
    print("writing", flush=True)
    time.sleep(60)
activation_layout.mark_completed = wait
save(9)
"""


def begin(base: Path, code: str, first: int = 0) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROCESS + code, str(base), str(first)],
        stdout=subprocess.PIPE,
        text=True,
    )


def hold_a_save(base: Path) -> subprocess.Popen[str]:
    process = begin(base, HOLD)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    return process


def test_a_killed_save_is_named_and_harms_no_other_run(tmp_path: Path) -> None:
    whole = save(tmp_path, 1)
    process = hold_a_save(tmp_path)
    try:
        found = loader(tmp_path).query()
        ((half, why),) = found.not_whole.items()
        time = half.name.removeprefix(".").removesuffix(".partial")
        assert "is being saved right now" in why
        with pytest.raises(RuntimeError, match="is being saved right now"):
            found.remove(time)
        with pytest.raises(RuntimeError, match="is being saved right now"):
            ActivationSaver(tmp_path).rename_experiment("other")
    finally:
        process.kill()
        process.communicate()
    found = loader(tmp_path).query()
    assert found.get_paths() == [whole]
    assert found.load()[0]["resid_out_0"].mean() == 1
    with pytest.raises(ValueError, match="is incomplete: it has 2"):
        open_activations(half)
    assert f"!  {half}: it is half-written: its save was stopped" in str(found)
    assert str(half) in repr(found)
    with pytest.raises(ValueError, match=rf"{half} cannot be loaded: it is half-written"):
        found.load(time)
    save(tmp_path, 2)
    assert numbers(tmp_path) == [1, 2]
    found.remove(time)
    assert not half.exists()
    assert not loader(tmp_path).query().not_whole


def test_a_half_written_store_without_examples_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("basinscope.io.activation_layout.mark_completed", lambda path: None)
    sources = sources_of({"mine": np.ones(3), "one": 2.0})[0]
    write_activations(tmp_path / "a.zarr", sources, {}, {})
    with pytest.raises(ValueError, match="is incomplete: it has 0"):
        open_activations(tmp_path / "a.zarr")


def test_a_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("basinscope.io.activation_layout.mark_completed", killed)
    with pytest.raises(PowerCutError):
        save(tmp_path)
    assert list((tmp_path / "default" / "org_tiny").iterdir()) == []


def test_a_run_whose_experiment_moved_meanwhile_is_not_half_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def move(path: Path) -> None:
        (tmp_path / "default").rename(tmp_path / "moved")

    monkeypatch.setattr("basinscope.io.activation_layout.mark_completed", move)
    with pytest.raises(RuntimeError, match="was moved away"):
        save(tmp_path)
    assert len(loader(tmp_path, "moved").query()) == 0


def test_processes_that_save_at_once_lose_nothing(tmp_path: Path) -> None:
    """The same microseconds for all of them, and queries in between."""
    code = """
for number in range(first, first + 12):
    save(number, datetime(2025, 1, 1, 0, 0, 0, number % 3))
    assert number in map(number_of, ActivationLoader(base).query())
"""
    processes = [begin(tmp_path, code, 100 * n) for n in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    expected = sorted(100 * n + i for n in range(3) for i in range(12))
    assert sorted(numbers(tmp_path)) == expected
    assert sorted(set(noted(tmp_path))) == expected
    times = [run.time for run in loader(tmp_path).query()]
    assert len(set(times)) == len(expected)


def noted(base: Path) -> list[int]:
    lines = (base / "default" / INDEX).read_text().splitlines()
    return [json.loads(line)["metadata"]["target_token_positions"][1] for line in lines]


def test_kills_at_any_moment_leave_every_run_that_was_reported(tmp_path: Path) -> None:
    """A process saves, removes and moves runs until it is killed."""
    code = """
print("begun", flush=True)
number = first
while True:
    save(number)
    print(number, flush=True)
    if number % 4 == 1:
        ActivationLoader(base).query().update_run_experiment(-1, "moved")
    if number % 4 == 2:
        found = ActivationLoader(base).query()
        print(-number_of(found[-1]), flush=True)
        found.remove(-1)
    number += 1
"""
    moments, next_number = random.Random(5), 1
    reported: set[int] = set()
    removed: set[int] = set()
    for _ in range(4):
        process = begin(tmp_path, code, next_number)
        assert process.stdout is not None
        process.stdout.readline()
        try:
            process.wait(moments.uniform(0.1, 0.7))
        except subprocess.TimeoutExpired:
            process.kill()
        said = [int(word) for word in process.communicate()[0].split()]
        assert process.returncode == -signal.SIGKILL
        reported |= {number for number in said if number > 0}
        removed |= {-number for number in said if number < 0}
        next_number = max(reported, default=0) + 10
        found = loader(tmp_path).query("*")
        there = [run.metadata["target_token_positions"][1] for run in found]
        assert len(there) == len(set(there))
        assert set(there) >= reported - removed
        for number, run in enumerate(found):
            tree, metadata = found.load(number)
            assert tree["resid_out_0"].mean() == metadata["target_token_positions"][1]
            assert metadata["experiment_name"] == run.path.parents[1].name
    assert len(reported) > 5


DAMAGE = ["missing", "empty", "torn", "binary", "other json", "not to be written"]


@pytest.mark.parametrize("damage", DAMAGE)
def test_an_index_is_only_a_copy(damage: str, tmp_path: Path) -> None:
    for number in range(4):
        save(tmp_path, number)
    index = tmp_path / "default" / INDEX
    whole = index.read_bytes()
    if damage == "missing":
        index.unlink()
    elif damage == "empty":
        index.write_bytes(b"")
    elif damage == "torn":
        index.write_bytes(whole[: int(len(whole) * 0.6)])
    elif damage == "binary":
        index.write_bytes(os.urandom(1000))
    elif damage == "other json":
        index.write_text('[1]\n{"model": "org_tiny"}\n7\nnull\n')
    else:
        index.unlink()
        index.mkdir()  # nothing can be written there
    assert numbers(tmp_path) == [0, 1, 2, 3]
    save(tmp_path, 4)
    assert numbers(tmp_path) == [0, 1, 2, 3, 4]
    if damage != DAMAGE[-1]:
        assert {4, 0, 1, 2, 3} <= {
            json.loads(line)["metadata"]["target_token_positions"][1]
            for line in index.read_bytes().splitlines()
            if line.startswith(b'{"model": "org_tiny", "time"') and line.endswith(b"}")
        }


def test_runs_that_came_or_changed_without_the_index_are_found(tmp_path: Path) -> None:
    paths = [save(tmp_path, number) for number in range(3)]
    other = save(tmp_path / "copied from", 8)
    assert numbers(tmp_path) == [0, 1, 2]
    shutil.copytree(other, tmp_path / "default" / "org_tiny" / other.name)
    assert numbers(tmp_path) == [0, 1, 2, 8]
    shutil.rmtree(paths[1])
    assert numbers(tmp_path) == [0, 2, 8]
    shutil.rmtree(paths[0])
    shutil.copytree(other, paths[0])  # another run under a known time
    assert numbers(tmp_path) == [8, 2, 8]


def test_the_index_does_not_grow_with_runs_that_are_gone(tmp_path: Path) -> None:
    save(tmp_path, 0)
    index = tmp_path / "default" / INDEX
    line = json.loads(index.read_text())
    with index.open("a") as file:
        for number in range(500):
            file.write(json.dumps({**line, "time": f"gone {number}"}) + "\n")
    assert numbers(tmp_path) == [0]
    assert len(index.read_text().splitlines()) == 1
    assert numbers(tmp_path) == [0]


def test_a_query_reads_no_run_that_the_index_knows(tmp_path: Path) -> None:
    path = save(tmp_path, 0)
    (path / "activations.zarr" / "zarr.json").write_text("damaged: reading it is an error")
    assert numbers(tmp_path) == [0]
    (tmp_path / "default" / INDEX).unlink()
    found = loader(tmp_path).query()
    assert len(found) == 0
    assert "zarr.json is damaged" in found.not_whole[path]


def test_a_run_that_goes_while_a_query_looks_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone, _ = save(tmp_path, 0), save(tmp_path, 1)
    listed = activation_index._directories

    def slow(path: Path, hidden: bool = False) -> Any:
        entries = list(listed(path, hidden))
        if hidden and gone.exists():
            shutil.rmtree(gone)
        return entries

    monkeypatch.setattr(activation_index, "_directories", slow)
    assert numbers(tmp_path) == [1]


def test_what_is_no_run_is_left_alone(tmp_path: Path) -> None:
    path = save(tmp_path, 0)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "default" / "notes.txt").write_text("mine")
    (path.parent / "figures").mkdir()
    (path / "more").mkdir()
    old = path.parent / "2024-01-01_10_00_00"
    old.mkdir()
    (old / "tensor.pt").write_bytes(b"")
    found = loader(tmp_path).query("*")
    assert found.get_paths() == [path]
    assert list(found.not_whole) == [old]
    assert "import_easyroutine" in found.not_whole[old]
    with pytest.raises(ValueError, match="cannot be loaded: it was saved by easyroutine"):
        found.load(old.name)


def test_ten_thousand_runs_are_queried_within_a_second(tmp_path: Path) -> None:
    make_runs(tmp_path, RUNS)
    code = """
import sys, time
start = time.perf_counter()
from pathlib import Path
from basinscope.io.activations import ActivationLoader
found = ActivationLoader(Path(sys.argv[1])).query(custom_keys={"lr": lambda lr: lr < 0.5})
print(time.perf_counter() - start, len(found), found.get_paths()[-1].name)
loaded = {"torch", "xarray", "zarr", "dask", "numpy"} & set(sys.modules)
assert not loaded, loaded
"""
    assert min(_timed(code, tmp_path) for _ in range(3)) < 1


def _timed(code: str, base: Path) -> float:
    done = subprocess.run(
        [sys.executable, "-c", code, str(base)], capture_output=True, text=True, check=True
    )
    seconds, count, last = done.stdout.split()
    assert int(count) == RUNS // 2
    assert last == f"2025-01-01_00_00_00_{RUNS // 2 * 2 - 2:06d}"
    return float(seconds)


def make_runs(base: Path, count: int) -> None:
    """What saving leaves of so many runs, as far as a query reads it: directories and an index."""
    config = {f"extract_{number}": False for number in range(20)}
    path = save(base, extraction_config=config, save_time=datetime(2025, 1, 1))
    index = base / "default" / INDEX
    line = json.loads(index.read_text())
    shutil.rmtree(path)
    lines = []
    for number in range(count):
        run = path.with_name(f"2025-01-01_00_00_00_{number:06d}")
        run.mkdir()
        line["metadata"]["lr"] = float(number % 2)
        lines.append(json.dumps({**line, "time": run.name, "changed": run.stat().st_mtime_ns}))
    index.write_text("\n".join(lines) + "\n")


def command(*arguments: Any) -> Any:
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_the_command_line_lists_shows_and_removes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("basinscope.cli_activations.out", Console(width=200))
    paths = [save(tmp_path, n, experiment, tag=f"t{n}") for n, experiment in enumerate("aab")]
    listed = command("list", tmp_path)
    assert listed.exit_code == 0
    for n, path in enumerate(paths):
        words = (n, "aab"[n], "org/tiny", path.name, f"t{n}", "resid_out")
        assert re.search(r"\s+".join(map(str, words)), listed.output)
    found = json.loads(command("list", tmp_path, "--experiment", "a", "--json").output)
    assert [run["path"] for run in found] == list(map(str, paths[:2]))
    assert found[0]["arrays"] == "resid_out_* (2, 3, 4)"
    assert json.loads(command("list", tmp_path, "--tag", "t2", "--json").output)[0]["tag"] == "t2"
    store = paths[2] / "activations.zarr"
    for of_one in ([tmp_path, paths[2].name], [tmp_path], [paths[2]], [store]):
        shown = json.loads(command("show", *of_one, "--json").output)
        assert shown["metadata"]["tag"] == "t2"
        assert shown["arrays"]["resid_out_0"] == {
            "dims": ["example", "position", "d_model"], "shape": [2, 3, 4], "dtype": "float32",
        }  # fmt: skip
    text = command("show", tmp_path, 0).output
    assert 'model_name: "org/tiny"' in text
    assert re.search(r"resid_out_0\s+example, position, d_model\s+2, 3, 4\s+float32", text)
    assert CliRunner().invoke(app, ["rm", str(tmp_path), "1"], input="n\n").exit_code == 1
    assert paths[1].exists()
    assert command("rm", tmp_path, 1, "--yes").exit_code == 0
    assert CliRunner().invoke(app, ["rm", str(tmp_path), "0"], input="y\n").exit_code == 0
    assert [path.exists() for path in paths] == [False, False, True]


def test_runs_may_be_counted_from_the_latest(tmp_path: Path) -> None:
    paths = [save(tmp_path, 0), save(tmp_path, 1)]
    assert json.loads(command("show", tmp_path, -1, "--json").output)["path"] == str(paths[1])
    assert command("rm", tmp_path, -1, "--yes").exit_code == 0
    assert [path.exists() for path in paths] == [True, False]


def test_json_has_no_numbers_that_json_has_not(tmp_path: Path) -> None:
    save(tmp_path, tag="NaN", other_metadata={"loss": float("nan"), "most": [float("inf"), 1.5]})
    shown = json.loads(command("show", tmp_path, "--json").output, parse_constant=pytest.fail)
    found = [shown["metadata"][name] for name in ("loss", "most", "tag")]
    assert found == [None, [None, 1.5], "NaN"]


def test_a_narrow_terminal_shows_how_to_name_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("basinscope.cli_activations.out", Console(width=46))
    path = save(tmp_path, model="organisation/model", tag=3)
    lines = command("list", tmp_path).output.splitlines()
    assert any(line.split()[0] == "0" and path.name in line for line in lines if line.strip())


REFUSED: dict[str, Callable[[Path], tuple[Any, ...]]] = {
    "there is no directory": lambda base: ("list", base / "nothing"),
    "no experiment 'x'": lambda base: ("list", base, "--experiment", "x"),
    "no run 7; there are 0 to 0": lambda base: ("show", base, 7),
    "no run of '2020-01'": lambda base: ("rm", base, "2020-01", "--yes"),
    "is one run": lambda base: ("list", next((base / "default" / "org_tiny").iterdir())),
    "give its base directory": lambda base: (
        "rm", next((base / "default" / "org_tiny").iterdir()), "0", "--yes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("said", REFUSED)
def test_the_command_line_says_what_is_wrong(said: str, tmp_path: Path) -> None:
    path = save(tmp_path)
    done = command(*REFUSED[said](tmp_path))
    assert done.exit_code == 2
    assert said in done.output
    assert path.exists()
