"""Tensors of stored runs, and runs that easyroutine saved: exact, and without running a pickle."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import basinscope.activations as public
from basinscope.activations import (
    ActivationLoader,
    ActivationSaver,
    as_tensors,
    import_easyroutine,
)

OLD = "easyroutine.interpretability"


def test_tensors_come_back_bit_for_bit(tmp_path: Path) -> None:
    saved = {
        "resid_out_0": torch.randn(5, 3, 8).bfloat16(),
        "resid_out_1": torch.randn(5, 3, 8),
        "half": torch.randn(5).half(),
        "input_ids": torch.randint(0, 50_000, (5, 7)),
        "one": torch.tensor(True),
    }
    ActivationSaver(tmp_path).save(saved, "tiny", [], None, {})
    tree, _ = ActivationLoader(tmp_path).query().load()
    for activations in (tree, tree.to_dataset()):
        found = as_tensors(activations)
        assert found.keys() == saved.keys()
        for name, tensor in saved.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor)
    part = as_tensors(tree.isel(example=slice(1, 3)), ["resid_out_0"])
    assert list(part) == ["resid_out_0"]
    assert torch.equal(part["resid_out_0"], saved["resid_out_0"][1:3])
    part["resid_out_0"][0] = 0  # ours to change
    with pytest.raises(KeyError, match="no activations nothing; there are resid_out_0"):
        as_tensors(tree, ["nothing"])


def test_runs_load_as_tensors(tmp_path: Path) -> None:
    saver = ActivationSaver(tmp_path)
    values = torch.arange(6.0).view(2, 3).to(torch.bfloat16)
    saver.save({"x": values}, "model", "all", [], {})
    found = ActivationLoader.from_saver(saver).query()
    for result in (found, found[:]):
        tensors, metadata = result.load(torch=True)
        assert tensors["x"].dtype == torch.bfloat16
        assert torch.equal(tensors["x"], values)
        assert metadata["model_name"] == "model"
    tree, _ = found.load()
    assert tree["x"].shape == (2, 3)


class OldCache:
    """A cache as easyroutine 1.1.5 pickles it: a state with regular expressions in it."""

    def __init__(self, cache: dict[str, Any]) -> None:
        self.cache = cache
        self.valid_keys = (re.compile(r"resid_out_\d+"), re.compile("logits"))
        self.aggregation_strategies: dict[str, Any] = {}
        self.deferred_cache = False

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "aggregation_strategies"}


class OldValueWithInfo:
    __slots__ = ("_info", "_value")

    def __init__(self, value: Any, info: str) -> None:
        self._value, self._info = value, info


class OldIntervention:
    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)


@pytest.fixture
def _old_library() -> Iterator[None]:
    """Give the classes above the names under which easyroutine's are pickled, while writing."""
    homes: dict[str, tuple[tuple[type, str], ...]] = {
        "activation_cache": ((OldCache, "ActivationCache"), (OldValueWithInfo, "ValueWithInfo")),
        "interventions": ((OldIntervention, "Intervention"),),
    }
    for name in ("easyroutine", OLD):
        sys.modules[name] = ModuleType(name)
    for home, classes in homes.items():
        module = sys.modules[f"{OLD}.{home}"] = ModuleType(home)
        for kind, name in classes:
            kind.__module__, kind.__name__, kind.__qualname__ = f"{OLD}.{home}", name, name
            setattr(module, name, kind)
    yield
    for name in [n for n in sys.modules if n.startswith("easyroutine")]:
        del sys.modules[name]


HEADS, LAYERS = 3, 2
METADATA = {
    "tag": "old",
    "save_time": "2024-05-06 07:08:09",
    "experiment_name": "paper",
    "model_name": "org/tiny",
    "target_token_positions": ["last"],
    "interventions": None,
    "extraction_config": {"avg": False},
    "pivot_positions": [4],
}


def old_arrays() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    found = {f"resid_out_{i}": torch.randn(4, 2, 8).bfloat16() for i in range(LAYERS)}
    for layer in range(LAYERS):
        for head in range(HEADS):
            found[f"pattern_L{layer}H{head}"] = torch.rand(4, 2, 9)
            found[f"head_out_L{layer}H{head}"] = torch.randn(4, 2, 8)
            found[f"head_queries_L{layer}H{head}"] = torch.randn(4, 2, 5)
    for head in range(HEADS):  # head 0's, whatever their names say
        found[f"head_values_L0H{head}"] = torch.ones(4, 2, 5)
    found["resid_mid_0"] = torch.randn(4, 2, 8)  # normed already
    found["my_own"] = torch.arange(6).reshape(2, 3)
    found["logits"] = torch.randn(4, 2, 11)
    return found


def write_old(directory: Path, obj: Any, **metadata: Any) -> Path:
    directory.mkdir(parents=True)
    torch.save(obj, directory / "tensor.pt")
    (directory / "metadata.json").write_text(json.dumps({**METADATA, **metadata}))
    return directory


def require_imported(base: Path, arrays: dict[str, torch.Tensor]) -> dict[str, Any]:
    tree, metadata = ActivationLoader(base, "paper").query().load()
    tensors = as_tensors(tree)
    for layer in range(LAYERS):
        assert torch.equal(tensors[f"resid_out_{layer}"], arrays[f"resid_out_{layer}"])
        for old, ours, dim in (
            ("pattern", "attn_pattern", "head"),
            ("head_out", "head_out", "head"),
            ("head_queries", "queries", "head"),
        ):
            stacked = tree[f"{ours}_{layer}"]
            assert stacked.sizes["head"] == HEADS
            for head in range(HEADS):
                expected = arrays[f"{old}_L{layer}H{head}"]
                np.testing.assert_array_equal(stacked.isel({dim: head}), expected)
                assert f"{ours}_L{layer}H{head}" not in tensors
    assert tree["attn_pattern_0"].dims == ("example", "head", "position", "key_position")
    assert tree["queries_1"].dims == ("example", "position", "head", "d_head")
    assert torch.equal(tensors["head_values_L0H1"], arrays["head_values_L0H1"])
    assert torch.equal(tensors["mlp_in_0"], arrays["resid_mid_0"])
    assert not {"values_0", "values_L0H1", "resid_mid_0"} & tensors.keys()
    assert torch.equal(tensors["my_own"], arrays["my_own"])
    assert metadata["tag"] == "old"
    assert metadata["save_time"] == "2024-05-06T07:08:09.000000+00:00"
    assert metadata["model_name"] == "org/tiny"
    assert metadata["extraction_config"] == {"avg": False}
    assert metadata["pivot_positions"] == [4]
    assert metadata["experiment_name"] == "paper"
    return metadata


def test_a_dict_of_tensors_is_imported(tmp_path: Path) -> None:
    arrays = old_arrays()
    old = write_old(tmp_path / "old" / "paper" / "org_tiny" / "2024-05-06_07_08_09", arrays)
    (path,) = import_easyroutine(tmp_path / "old", tmp_path / "new")
    assert path == tmp_path / "new" / "paper" / "org_tiny" / "2024-05-06_07_08_09_000000"
    require_imported(tmp_path / "new", arrays)
    assert import_easyroutine(old, tmp_path / "new") == [path]  # once
    assert sorted(p.name for p in old.iterdir()) == ["metadata.json", "tensor.pt"]


def test_a_single_tensor_is_imported_from_and_to_a_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_old(tmp_path / "run", torch.ones(2, 3))
    import_easyroutine("~/run", "~/new")
    tree, _ = ActivationLoader(tmp_path / "new", "paper").query().load()
    np.testing.assert_array_equal(tree["activations"], np.ones((2, 3)))


@pytest.mark.usefixtures("_old_library")
def test_a_cache_is_imported_without_its_library(tmp_path: Path) -> None:
    arrays = old_arrays()
    norms = {"mean": torch.randn(4, 2), "variance": torch.rand(4, 2)}
    cache: dict[str, Any] = {
        **arrays,
        **{n: OldValueWithInfo(v, "shape") for n, v in arrays.items() if n.startswith("head_out")},
        "last_layernorm": norms,
        "input_ids": [torch.tensor([[1, 2]]), torch.tensor([[3, 4], [5, 6]])],
        "mapping_index": {"last": [0], "info": "avg"},
        "token_dict": [{"last": [5]}],
        "metadata": {"interventions": [OldIntervention(type="full", activation="resid_out_0")]},
    }
    write_old(tmp_path / "old" / "run", OldCache(cache))
    for name in [n for n in sys.modules if n.startswith("easyroutine")]:
        del sys.modules[name]
    import_easyroutine(tmp_path / "old", tmp_path / "new")
    metadata = require_imported(tmp_path / "new", arrays)
    assert metadata["easyroutine"] == {
        "mapping_index": {"last": [0], "info": "avg"},
        "token_dict": [{"last": [5]}],
    }
    tree, _ = ActivationLoader(tmp_path / "new", "paper").query().load()
    np.testing.assert_array_equal(tree["last_layernorm_mean"], norms["mean"])
    np.testing.assert_array_equal(tree["input_ids"], [[1, 2], [3, 4], [5, 6]])


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.directory),)

    def __init__(self, directory: Path) -> None:
        self.directory = directory


def test_a_pickle_that_runs_code_is_refused_and_the_others_imported(tmp_path: Path) -> None:
    struck = tmp_path / "struck"
    bad = write_old(tmp_path / "old" / "a", {"x": torch.ones(2), "y": Malicious(struck)})
    write_old(tmp_path / "old" / "b", {"x": torch.ones(2)})
    with pytest.raises(ValueError, match=r"1 of 2 runs could not be imported") as caught:
        import_easyroutine(tmp_path / "old", tmp_path / "new")
    message = str(caught.value)
    assert str(bad) in message
    assert "mkdir" in message
    assert "save a plain dict of its tensors" in message
    assert not struck.exists()
    assert len(ActivationLoader(tmp_path / "new", "paper").query()) == 1


def test_what_cannot_be_imported_says_why(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no tensor\.pt"):
        import_easyroutine(tmp_path, tmp_path / "new")
    run = write_old(tmp_path / "old" / "a", {"x": torch.ones(2)})
    (run / "metadata.json").unlink()
    with pytest.raises(ValueError, match=r"metadata\.json"):
        import_easyroutine(tmp_path / "old", tmp_path / "new")
    (run / "metadata.json").write_text("{")
    with pytest.raises(ValueError, match="could not be imported"):
        import_easyroutine(tmp_path / "old", tmp_path / "new")
    (run / "metadata.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"metadata\.json holds a list, not fields"):
        import_easyroutine(tmp_path / "old", tmp_path / "new")


@pytest.mark.parametrize("left", [0, 300])
def test_a_damaged_run_is_named_and_the_others_imported(left: int, tmp_path: Path) -> None:
    bad = write_old(tmp_path / "old" / "a", {"x": torch.ones(2)})
    write_old(tmp_path / "old" / "b", {"x": torch.ones(2)})
    (bad / "tensor.pt").write_bytes((bad / "tensor.pt").read_bytes()[:left])
    with pytest.raises(ValueError, match=r"tensor\.pt is damaged .*: restore it") as caught:
        import_easyroutine(tmp_path / "old", tmp_path / "new")
    assert str(bad) in str(caught.value)
    assert len(ActivationLoader(tmp_path / "new", "paper").query()) == 1


@pytest.mark.parametrize("time", [None, 12.5, "yesterday"])
def test_without_a_time_a_run_has_that_of_its_file(time: Any, tmp_path: Path) -> None:
    run = write_old(tmp_path / "old" / "a", {"x": torch.ones(2)}, save_time=time)
    os.utime(run / "tensor.pt", (1_700_000_000, 1_700_000_000))
    (path,) = import_easyroutine(tmp_path / "old", tmp_path / "new")
    assert path.name == "2023-11-14_22_13_20_000000"


def test_public_names_are_there() -> None:
    for name in public.__all__:
        assert getattr(public, name) is not None
