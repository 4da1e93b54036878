"""Models from torch.compile: taken as they are written, and compiled again afterwards."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import nn

import basinscope
from basinscope.models.components import neurons
from tests.models.models_tiny import VOCABULARY, tiny

IDS = np.random.default_rng(4).integers(0, VOCABULARY, (12, 6))
DATASET = Dataset.from_dict({"input_ids": IDS})


def fail(graph: Any, inputs: Any) -> Any:
    raise AssertionError("the model was compiled")


def wrapped(model: nn.Module) -> nn.Module:
    compiled: Any = torch.compile(model, backend=fail)
    return compiled


def in_place(model: nn.Module) -> nn.Module:
    compiled = copy.deepcopy(model)
    compiled.compile(backend=fail)
    return compiled


@pytest.fixture(params=[wrapped, in_place])
def compiled(request: pytest.FixtureRequest) -> Any:
    return request.param


def still_compiled(model: nn.Module) -> bool:
    try:
        model(torch.from_numpy(IDS))
    except Exception as error:  # torch wraps a backend's error in one of its own
        return "the model was compiled" in str(error)
    return False


def test_sampling_is_of_the_model_itself(tmp_path: Path, compiled: Any) -> None:
    model = tiny("llama")
    settings = {"lr": 1e-4, "n_beta": 10.0, "batch_size": 4, "num_init_loss_batches": 1}
    settings |= {"num_draws": 2, "output_path": tmp_path / "a.zarr", "progress": False}
    other = compiled(model)
    for chain, each in enumerate((other, model)):  # the second call would refuse another model
        basinscope.sample(
            each,
            DATASET,
            {"same": DATASET},
            param_masks=basinscope.create_param_masks(each, "l0h1"),
            num_chains=2,
            chains=[chain],
            **settings,
        )
    assert still_compiled(other)


def test_restrictions_have_the_model_s_own_names(
    compiled: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny("llama")
    other = compiled(model)
    for wanted in ("full", "l0h1", "l1 attn", "model.layers.0.mlp.up_proj.weight"):
        masks = basinscope.create_param_masks(model, wanted)
        assert basinscope.create_param_masks(other, wanted).keys() == masks.keys()
    assert basinscope.all_heads(other).keys() == basinscope.all_heads(model).keys()
    assert basinscope.all_layers(other).keys() == basinscope.all_layers(model).keys()
    shown = []
    for each in (model, other):
        basinscope.preview_weight_restriction(each, "l0 mlp")
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    report = basinscope.check_model(other, DATASET)
    assert report.findings == basinscope.check_model(model, DATASET).findings


def test_extraction_and_lens_give_the_model_s_own(tmp_path: Path, compiled: Any) -> None:
    model = tiny("llama")
    other = compiled(model)
    config = basinscope.ExtractionConfig(resid_out=True, attn_pattern=True, logits=True)
    expected = basinscope.extract(model, torch.from_numpy(IDS), config)
    found = basinscope.extract(other, torch.from_numpy(IDS), config)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    basinscope.extract_dataset(other, DATASET, config, output=tmp_path / "a.zarr", batch_size=4)
    lens = basinscope.LogitLens.from_model(other)
    assert lens.d_model == basinscope.LogitLens.from_model(model).d_model
    assert still_compiled(other)


def test_attributions_are_of_the_model_itself(tmp_path: Path, compiled: Any) -> None:
    model = tiny("llama")
    other = compiled(model)
    for each in (other, model):
        path = basinscope.harvest_attributions(
            each,
            DATASET,
            output_path=tmp_path / "a.zarr",
            batch_size=4,
            components=neurons(each),
            progress=False,
        )
    assert path == tmp_path / "a.zarr"
    assert still_compiled(other)
