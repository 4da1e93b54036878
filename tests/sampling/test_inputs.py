"""Every bad input is one clear paragraph before any work, and leaves nothing behind."""

from __future__ import annotations

import dataclasses
import inspect
import math
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from torch import nn

import basinscope
from basinscope.io.store import SampleStore
from basinscope.sampling.config import REQUIRED, RMSPROP_DEFAULTS, SamplerConfig
from basinscope.sampling.job import next_token_loss
from basinscope.sampling.sample import sample
from tests.conftest import token_rows
from tests.models_small import RawModel, tiny_model

GOOD: dict[str, Any] = {
    "lr": 1e-3,
    "n_beta": 10.0,
    "num_chains": 2,
    "num_draws": 3,
    "batch_size": 4,
    "num_init_loss_batches": 2,
    "batches_per_draw": 2,
    "device": "cpu",
    "progress": False,
}
COUNTS = [
    *("num_chains", "num_draws", "batch_size", "num_steps_bw_draws", "num_init_loss_batches"),
    *("gradient_accumulation_steps", "batches_per_draw"),
]
COUNTS_FROM_ZERO = ["num_burnin_steps", "init_seed", "obs_seed"]
POSITIVE = ["lr"]
NUMBERS = ["n_beta", "localization", "noise_level", "llc_weight_decay"]
NUMBERS_OR_NONE = ["bounding_box_size", "init_noise"]
FLAGS = [
    *("shuffle", "match_sampling_input_ids_across_chains"),
    *("save_metrics", "save_sampling_input_ids", "train_mode"),
]
METHOD = ["sampling_method", "sampling_method_kwargs"]
BITS = ["loss_keep_bits"]
ROUNDING, AUTOCAST = ["weight_rounding"], ["autocast"]

NOT_A_COUNT = [0, -1, 1.0, 2.5, "3", True, None, [1], math.nan, 2**63]
NOT_A_COUNT_FROM_ZERO = [-1, 1.0, "3", False, None, 2**63]
NOT_A_NUMBER = [-1e-9, math.nan, math.inf, -math.inf, "0.1", None, True, 1j, [0.1]]
NOT_POSITIVE = [0, 0.0, *NOT_A_NUMBER]
NOT_A_NUMBER_OR_NONE = [-1.0, math.nan, math.inf, "0.1", True]
NOT_A_FLAG = [0, 1, "yes", None]
NOT_BITS = [0, 24, -3, 2.0, "7", True]


def test_every_setting_is_in_the_tables_below() -> None:
    tables = [
        *COUNTS,
        *COUNTS_FROM_ZERO,
        *POSITIVE,
        *NUMBERS,
        *NUMBERS_OR_NONE,
        *FLAGS,
        *METHOD,
        *BITS,
        *ROUNDING,
        *AUTOCAST,
    ]
    assert sorted(tables) == sorted(field.name for field in dataclasses.fields(SamplerConfig))


def bad_settings() -> Iterator[Any]:
    for names, values, wanted in [
        (COUNTS, NOT_A_COUNT, "a whole number of at least 1"),
        (COUNTS_FROM_ZERO, NOT_A_COUNT_FROM_ZERO, "a whole number of at least 0"),
        (POSITIVE, NOT_POSITIVE, "a finite number above 0"),
        (NUMBERS, NOT_A_NUMBER, "a finite number, 0 or more"),
        (ROUNDING, ["up", None, True], "one of nearest, stochastic"),
        (AUTOCAST, ["float16", True, 16], "'bfloat16', or None"),
        (NUMBERS_OR_NONE, NOT_A_NUMBER_OR_NONE, "a finite number, 0 or more, or None"),
        (FLAGS, NOT_A_FLAG, "True or False"),
        (BITS, NOT_BITS, "or None"),
    ]:
        for name in names:
            for value in values:
                yield pytest.param(name, value, wanted, id=f"{name}={value!r}")


@pytest.mark.parametrize(("name", "value", "wanted"), list(bad_settings()))
def test_a_bad_setting_is_named_with_what_was_got_and_what_is_valid(
    name: str, value: Any, wanted: str, refused: Refused
) -> None:
    with refused(ValueError, name, wanted, got(value)) as call:
        call(**{name: value})


@pytest.mark.parametrize("value", ["sgld", None, 3, "SGMCMC_SGLD", ""])
def test_an_unknown_method_lists_the_known_ones(value: Any, refused: Refused) -> None:
    with refused(ValueError, "sampling_method", repr(value), "sgmcmc_sgld", "rmsprop_sgld") as call:
        call(sampling_method=value)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"sampling_method_kwargs": [0.1]}, ["sampling_method_kwargs", "a dict, or None", "[0.1]"]),
        ({"sampling_method_kwargs": {"eps": 0.1}}, ["'eps': 0.1", "rmsprop_sgld"]),
        ({"rmsprop_eps": 0.1}, ["rmsprop_eps=0.1", "sgmcmc_sgld", "rmsprop_sgld"]),
        ({"rmsprop_alpha": 0.9}, ["rmsprop_alpha=0.9", "sgmcmc_sgld", "rmsprop_sgld"]),
    ],
)
def test_settings_of_rmsprop_need_rmsprop(
    settings: dict[str, Any], parts: list[str], refused: Refused
) -> None:
    with refused(ValueError, *parts) as call:
        call(**settings)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (
            {"rmsprop_eps": 0.1, "sampling_method_kwargs": {"eps": 0.1}},
            ["rmsprop_eps=0.1", "sampling_method_kwargs['eps']", "one of them"],
        ),
        (
            {"rmsprop_alpha": 0.9, "sampling_method_kwargs": {"alpha": 0.8}},
            ["rmsprop_alpha=0.9", "sampling_method_kwargs['alpha']", "one of them"],
        ),
        ({"sampling_method_kwargs": {"beta": 1}}, ["'beta'", "'alpha'", "'eps'"]),
        ({"rmsprop_alpha": 1.5}, ["alpha", "from 0 to 1", "1.5"]),
        ({"rmsprop_alpha": -0.1}, ["alpha", "from 0 to 1", "-0.1"]),
        ({"rmsprop_alpha": "a"}, ["alpha", "from 0 to 1", "'a'"]),
        ({"rmsprop_eps": 0}, ["eps", "above 0", "0"]),
        ({"rmsprop_eps": math.nan}, ["eps", "above 0", "nan"]),
        ({"rmsprop_eps": "b"}, ["eps", "above 0", "'b'"]),
        (
            {"rmsprop_eps": 0.1, "sampling_method_kwargs": [1]},
            ["sampling_method_kwargs", "a dict, or None", "[1]"],
        ),
    ],
)
def test_bad_settings_of_rmsprop(
    settings: dict[str, Any], parts: list[str], refused: Refused
) -> None:
    with refused(ValueError, *parts) as call:
        call(sampling_method="rmsprop_sgld", **settings)


def test_rmsprop_s_settings_may_be_given_either_way() -> None:
    both = {"sampling_method": "rmsprop_sgld", "lr": 1, "n_beta": 1}
    assert SamplerConfig(**both).rmsprop == RMSPROP_DEFAULTS == {"alpha": 0.99, "eps": 0.1}
    given = SamplerConfig(**both, sampling_method_kwargs={"eps": 0.5})
    assert given.rmsprop == {"alpha": 0.99, "eps": 0.5}


@pytest.mark.parametrize("alpha", [0, 1])
def test_rmsprop_s_alpha_may_reach_either_end(alpha: int) -> None:
    both = {"sampling_method": "rmsprop_sgld", "lr": 1, "n_beta": 1}
    given = SamplerConfig(**both, sampling_method_kwargs={"alpha": alpha})
    assert given.rmsprop == {"alpha": float(alpha), "eps": 0.1}


@pytest.mark.parametrize("name", ["workers", "checkpoint_every"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "2", True, [1]])
def test_bad_numbers_of_the_run_itself(name: str, value: Any, refused: Refused) -> None:
    with refused(ValueError, name, "a whole number of at least 1", got(value)) as call:
        call(**{name: value})


@pytest.mark.parametrize("value", [[2], [-1], [], [0, 5], ["0"], [0.5], "0", 1])
def test_chains_must_be_chains_of_the_store(value: Any, refused: Refused) -> None:
    with refused((ValueError, TypeError), "chains", "0 to 1", "num_chains=2", repr(value)) as call:
        call(chains=value)


def test_profile_and_workers_exclude_each_other(refused: Refused, tmp_path: Path) -> None:
    with refused(ValueError, "profile", "workers=1") as call:
        call(workers=2, profile=tmp_path / "trace.json")


@pytest.mark.parametrize(
    "window", ["ab", 5, (1,), (0, 1, 2), (2, 1), (1, 1), (-1, 2), (3, 9), (1.0, 2), (False, 2)]
)
def test_a_profile_must_trace_steps_of_the_run(
    window: Any, refused: Refused, tmp_path: Path
) -> None:
    with refused(ValueError, "profile_steps", "(0, 3)", "run of 3 steps", got(window)) as call:
        call(profile=tmp_path / "trace.json", profile_steps=window)


def test_a_short_run_is_told_which_steps_a_profile_may_trace(
    refused: Refused, tmp_path: Path
) -> None:
    with refused(ValueError, "profile_steps", "(0, 3)", "got (5, 15)") as call:
        call(profile=tmp_path / "trace.json")


@pytest.mark.parametrize("device", ["gpu", "cuda:99", 3.5, "cpu:x", ""])
def test_an_unusable_device_lists_the_usable_ones(device: Any, refused: Refused) -> None:
    with refused(ValueError, f"device={device!r}", "available: cpu") as call:
        call(device=device)


@pytest.mark.parametrize("model", [None, "gpt2", torch.ones(3), lambda ids: ids, nn.Linear])
def test_a_model_that_is_none(model: Any, refused: Refused) -> None:
    with refused(TypeError, "torch.nn.Module", type(model).__name__) as call:
        call(model)


def test_a_model_without_parameters(refused: Refused) -> None:
    with refused(ValueError, "Identity", "no parameters") as call:
        call(nn.Identity())


def test_a_frozen_model_says_how_to_thaw_it(refused: Refused) -> None:
    model = RawModel().requires_grad_(False)
    with refused(ValueError, "requires a gradient", "requires_grad_(True)", "param_masks") as call:
        call(model)


def test_quantised_weights_are_named(refused: Refused) -> None:
    model = RawModel()
    model.head.weight = nn.Parameter(torch.zeros(40, 12, dtype=torch.int8), requires_grad=False)
    with refused(ValueError, "'head.weight'", "torch.int8", "quantised", "bfloat16") as call:
        call(model, param_masks={"embed.weight": None, "head.weight": None})


def test_a_model_that_returns_no_logits(refused: Refused) -> None:
    class Strange(RawModel):
        def forward(self, input_ids: torch.Tensor) -> Any:
            return {"scores": super().forward(input_ids)}

    with refused(TypeError, "Strange returned dict", "logits", "loss_fn") as call:
        call(Strange())


def test_a_model_that_cannot_be_copied(refused: Refused) -> None:
    model = RawModel()
    model.kept = model.head.weight * 2  # type: ignore[assignment]
    with refused(TypeError, "RawModel cannot be copied", "detach") as call:
        call(model)


def test_an_unknown_parameter_in_the_masks_suggests_near_ones(refused: Refused) -> None:
    with refused(ValueError, "'head.wieght'", "RawModel", "head.weight") as call:
        call(param_masks={"head.wieght": None})
    with refused(ValueError, "'xyzzy'", "named_parameters()") as call:
        call(param_masks={"xyzzy": None})


@pytest.mark.parametrize(
    ("masks", "kind", "parts"),
    [
        (["head.weight"], TypeError, ["dict of parameter name", "list"]),
        ({"head.bias": torch.ones(40)}, TypeError, ["'head.bias'", "bool", "torch.float32"]),
        ({"head.bias": [True] * 40}, TypeError, ["'head.bias'", "bool tensor or None", "list"]),
        ({"head.bias": True}, TypeError, ["'head.bias'", "bool tensor or None", "got bool"]),
        (
            {"head.bias": torch.ones(41, dtype=torch.bool)},
            ValueError,
            ["'head.bias'", "(41,)", "(40,)"],
        ),
        ({"head.bias": torch.zeros(40, dtype=torch.bool)}, ValueError, ["selects no weight"]),
        ({}, ValueError, ["selects no weight"]),
    ],
)
def test_bad_masks(masks: Any, kind: Any, parts: list[str], refused: Refused) -> None:
    with refused(kind, "mask", *parts) as call:
        call(param_masks=masks)


def rows(*given: Any, **features: Any) -> Dataset:
    return Dataset.from_dict({"input_ids": list(given)}, **features)


def eight(length: int) -> list[list[int]]:
    return [[1] * length for _ in range(8)]


IDS = datasets.Features({"input_ids": datasets.List(datasets.Value("int64"))})
BAD_DATASETS: dict[str, tuple[Any, Any, list[str]]] = {
    "a list": ([[1, 2, 3]], TypeError, ["datasets.Dataset", "list", "from_dict"]),
    "None": (None, TypeError, ["datasets.Dataset", "NoneType"]),
    "a tensor": (torch.ones(8, 5), TypeError, ["datasets.Dataset", "Tensor"]),
    "splits": (
        DatasetDict({"train": rows(*eight(5)), "test": rows(*eight(5))}),
        TypeError,
        ["DatasetDict", "train, test", "['train']"],
    ),
    "another column": (
        Dataset.from_dict({"text": ["a"], "n": [1]}),
        ValueError,
        ["no column 'input_ids'", "text, n", "tokenize_and_concatenate"],
    ),
    "no rows": (Dataset.from_dict({"input_ids": []}), ValueError, ["no rows"]),
    "no lists": (rows(1, 2, 3, 4), ValueError, ["lists of token ids", "it holds int"]),
    "texts": (rows("a", "b"), ValueError, ["lists of token ids", "string"]),
    "floats": (rows(*[[0.5, 1.5]] * 8), ValueError, ["integers", "double"]),
    "nested lists": (rows(*[[[1, 2], [3, 4]]] * 8), ValueError, ["integers", "list"]),
    "unequal rows": (
        rows(*eight(5), [1, 2, 3]),
        ValueError,
        ["one length", "row 0 has 5", "row 8 has 3", "padding"],
    ),
    "one token": (rows(*eight(1)), ValueError, ["1 token", "at least 2"]),
    "no tokens": (rows(*[[]] * 8, features=IDS), ValueError, ["0 token", "at least 2"]),
}


@pytest.mark.parametrize("case", BAD_DATASETS)
def test_bad_data_sets(case: str, refused: Refused) -> None:
    dataset, kind, parts = BAD_DATASETS[case]
    with refused(kind, "dataset", *parts) as call:
        call(dataset=dataset)


@pytest.mark.parametrize("case", BAD_DATASETS)
def test_bad_data_sets_of_observables_are_named(case: str, refused: Refused) -> None:
    dataset, kind, parts = BAD_DATASETS[case]
    with refused(kind, "observable 'pile'", *parts) as call:
        call(observables={"good": token_rows(8, 9, 1), "pile": dataset})


def test_fewer_rows_than_a_batch(refused: Refused) -> None:
    with refused(ValueError, "dataset has 3 rows", "batch_size=4") as call:
        call(dataset=token_rows(3, 9, 1))


@pytest.mark.parametrize(("low", "high"), [(0, 40), (-1, 39), (0, 2**31), (-(2**40), 3)])
@pytest.mark.parametrize("kind", ["raw", "gpt2", "hooked"])
def test_ids_outside_the_vocabulary(low: int, high: int, kind: str, refused: Refused) -> None:
    ids = np.full((8, 9), high)
    ids[0, 0], ids[7, 8] = low, high  # the last row: every row must be looked at
    dataset = Dataset.from_dict({"input_ids": ids})
    parts = (f"{low} to {high}", "0 to 39", "tokenizer")
    with refused(ValueError, "dataset has token ids", *parts) as call:
        call(tiny_model(kind), dataset=dataset)
    with refused(ValueError, "observable 'pile' has token ids", *parts) as call:
        call(tiny_model(kind), observables={"pile": dataset})


def test_ids_that_only_the_model_itself_finds_too_large(refused: Refused) -> None:
    """Two embeddings: the vocabulary cannot be told without running the model."""

    class TwoEmbeddings(RawModel):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Embedding(3, 3)

    with refused(ValueError, "TwoEmbeddings", "50", "tokenizer") as call:
        call(TwoEmbeddings(), dataset=rows(*[[50] * 9] * 8), observables={})


def test_a_data_set_that_is_transformed_when_read(refused: Refused) -> None:
    changed = token_rows(48, 9, 1).with_transform(lambda rows: {"input_ids": [[7] * 9]})
    with refused(ValueError, "dataset has a transform", "dataset.map") as call:
        call(dataset=changed)


def test_padding_is_said_to_count(tmp_path: Path) -> None:
    mask = [[1] * 5 + [0] * 4] * 48
    padded = token_rows(48, 9, 1).with_format(None).add_column("attention_mask", mask)
    with pytest.warns(UserWarning, match="dataset has an attention_mask with zeros"):
        sample(RawModel(), padded, {}, **GOOD, output_path=tmp_path / "s.zarr")
    whole = padded.remove_columns("attention_mask").add_column("attention_mask", [[1] * 9] * 48)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample(RawModel(), whole, {}, **GOOD, output_path=tmp_path / "t.zarr")


def test_a_tied_parameter_goes_by_its_first_name(refused: Refused) -> None:
    first = r"tied to 'transformer.wte.weight'"
    with refused(ValueError, "'lm_head.weight'", first, "one tensor") as call:
        call(tiny_model("gpt2"), param_masks={"lm_head.weight": None})
    with pytest.raises(ValueError, match=first):
        basinscope.create_param_masks(tiny_model("gpt2"), "lm_head.weight")


def test_weights_without_values(refused: Refused) -> None:
    with torch.device("meta"):
        model = RawModel()
    with refused(ValueError, "meta device", "embed.weight", "without offloading") as call:
        call(model)


def test_longer_sequences_than_a_rotary_model_was_trained_on(tmp_path: Path) -> None:
    tree = sample(
        tiny_model("gpt_neox"), token_rows(8, 17, 1), {}, **GOOD, output_path=tmp_path / "s.zarr"
    )
    assert tree.sizes["token_pos"] == 16


@pytest.mark.parametrize("kind", ["gpt2", "hooked"])
def test_sequences_longer_than_the_model_s_positions(kind: str, refused: Refused) -> None:
    with refused(ValueError, "17 tokens", "at most 16", "max_length=16") as call:
        call(tiny_model(kind), dataset=token_rows(8, 17, 1), observables={})


@pytest.mark.parametrize(
    ("observables", "kind", "parts"),
    [
        ([token_rows(8, 9, 1)], TypeError, ["must be a dict", "list"]),
        (None, TypeError, ["must be a dict", "NoneType"]),
        (token_rows(8, 9, 1), TypeError, ["must be a dict", "Dataset"]),
        ({3: token_rows(8, 9, 1)}, TypeError, ["non-empty string", "3"]),
        ({"": token_rows(8, 9, 1)}, TypeError, ["non-empty string", "''"]),
        ({"p" * 300: token_rows(8, 9, 1)}, ValueError, ["'pppp", "300 bytes", "at most 245"]),
        ({"é" * 123: token_rows(8, 9, 1)}, ValueError, ["'éééé", "246 bytes", "rename it"]),
        ({"p": token_rows(7, 9, 1)}, ValueError, ["'p'", "7 rows", "4 * 2 = 8"]),
        ({"p": (token_rows(8, 9, 1), 3)}, ValueError, ["'p'", "8 rows", "4 * 3 = 12"]),
        ({"p": token_rows(8, 8, 1)}, ValueError, ["'p'", "8 tokens", "9"]),
        (
            {"a b": token_rows(8, 9, 1), "a/b": token_rows(8, 9, 2)},
            ValueError,
            ["'a b'", "'a/b'", "loss_a_b", "rename"],
        ),
        ({"sampling": token_rows(8, 9, 1)}, ValueError, ["'sampling'", "batch_sampling", "rename"]),
        ({"p": (token_rows(8, 9, 1), 0)}, ValueError, ["'p'", "at least 1", "got 0"]),
        ({"p": (token_rows(8, 9, 1), 1.5)}, ValueError, ["'p'", "at least 1", "got 1.5"]),
        ({"p": (token_rows(8, 9, 1), None)}, ValueError, ["'p'", "at least 1", "got None"]),
        ({"p": (token_rows(8, 9, 1),)}, (TypeError, ValueError), ["'p'", "batches_per_draw"]),
        ({"p": ()}, (TypeError, ValueError), ["'p'", "batches_per_draw"]),
        ({"p": (token_rows(8, 9, 1), 1, 2)}, TypeError, ["'p'", "loss_fn", "got int"]),
        ({"p": (token_rows(8, 9, 1), 1, len, 2)}, ValueError, ["'p'", "loss_fn", "a tuple of 4"]),
    ],
)
def test_bad_observables(observables: Any, kind: Any, parts: list[str], refused: Refused) -> None:
    with refused(kind, "observable", *parts) as call:
        call(observables=observables)


def wrong_shape(model: nn.Module, ids: torch.Tensor) -> Any:
    return next_token_loss(model, ids).mean()


def too_long(model: nn.Module, ids: torch.Tensor) -> Any:
    return model(ids).mean(-1)


def a_number(model: nn.Module, ids: torch.Tensor) -> Any:
    return 1.0


def detached(model: nn.Module, ids: torch.Tensor) -> Any:
    return next_token_loss(model, ids).detach()


def infinite(model: nn.Module, ids: torch.Tensor) -> Any:
    return next_token_loss(model, ids) * math.inf


@pytest.mark.parametrize(
    ("loss_fn", "kind", "parts"),
    [
        (3, TypeError, ["function (model, input_ids)", "int"]),
        ("cross_entropy", TypeError, ["function (model, input_ids)", "str"]),
        (wrong_shape, ValueError, ["(4, 8)", "got ()"]),
        (too_long, ValueError, ["(4, 8)", "got (4, 9)"]),
        (a_number, ValueError, ["(4, 8)", "got float"]),
        (detached, ValueError, ["no gradient", "detached"]),
        (infinite, ValueError, ["not finite at the checkpoint"]),
    ],
)
def test_bad_losses(loss_fn: Any, kind: Any, parts: list[str], refused: Refused) -> None:
    with refused(kind, "loss_fn", *parts) as call:
        call(loss_fn=loss_fn)


def test_a_checkpoint_with_nan_weights(refused: Refused) -> None:
    model = RawModel()
    with torch.no_grad():
        model.head.weight[0, 0] = math.nan
    with refused(ValueError, "model's loss is not finite at the checkpoint", "weights") as call:
        call(model)


def test_masks_that_the_loss_does_not_depend_on(refused: Refused) -> None:
    model = RawModel()
    model.unused = nn.Linear(3, 3)  # type: ignore[assignment]
    with refused(ValueError, "no gradient", "does not depend") as call:
        call(model, param_masks={"unused.weight": None})


@pytest.mark.parametrize("kind", ["file", "directory", "another group"])
def test_what_is_at_output_path_stays_as_it_is(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "mine"
    if kind == "file":
        path.write_text("my notes")
    else:
        path.mkdir()
        (path / "notes.txt").write_text("my notes")
        if kind == "another group":
            (path / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group"}')
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match="mine exists and is not a sampling store"):
        sample(RawModel(), token_rows(48, 9, 1), {}, **GOOD, output_path=path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("option", ["output_path", "profile"])
def test_a_directory_that_cannot_be_made_is_an_error_before_any_work(
    option: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    never = Mock()
    with pytest.raises(NotADirectoryError, match=r"s\.zarr cannot be made, as .*file is no dir"):
        sample(
            RawModel(),
            token_rows(48, 9, 1),
            {},
            **GOOD,
            loss_fn=never,
            **{option: tmp_path / "file" / "s.zarr"},
        )
    never.assert_not_called()
    assert contents(tmp_path) == {"file": b"mine"}


def test_the_longest_name_of_an_observable_is_written(tmp_path: Path) -> None:
    name = "p" * 245
    sample(
        RawModel(),
        token_rows(48, 9, 1),
        {name: token_rows(8, 9, 2)},
        **GOOD,
        output_path=tmp_path / "s.zarr",
    )
    assert (tmp_path / "s.zarr" / f"input_ids_{name}").is_dir()


def test_an_empty_directory_is_taken(tmp_path: Path) -> None:
    sample(RawModel(), token_rows(48, 9, 1), {}, **GOOD, output_path=tmp_path)
    assert SampleStore(tmp_path).attributes["completed"] == 1


def test_defaults_of_sample_are_those_of_the_config() -> None:
    parameters = inspect.signature(sample).parameters
    for field in dataclasses.fields(SamplerConfig):
        default = inspect.Parameter.empty if field.default is REQUIRED else field.default
        assert parameters[field.name].default == default, field.name
        assert type(parameters[field.name].default) is type(default), field.name


def test_defaults_are_those_of_the_specification() -> None:
    defaults = {name: p.default for name, p in inspect.signature(sample).parameters.items()}
    expected = {
        **{"num_chains": 4, "num_draws": 200, "batch_size": 32, "num_burnin_steps": 0},
        **{"num_steps_bw_draws": 1, "gradient_accumulation_steps": 1},
        **{"num_init_loss_batches": 32, "batches_per_draw": 3, "init_seed": 100, "obs_seed": 1337},
        **{"localization": 0, "noise_level": 1, "llc_weight_decay": 0, "bounding_box_size": None},
        **{"init_noise": None, "sampling_method": "sgmcmc_sgld", "sampling_method_kwargs": None},
        **{"rmsprop_eps": None, "rmsprop_alpha": None, "shuffle": True, "param_masks": None},
        **{"match_sampling_input_ids_across_chains": True, "device": None, "save_metrics": False},
        **{"output_path": None, "loss_fn": None, "train_mode": False},
        **{"save_sampling_input_ids": False, "loss_keep_bits": None},
    }
    assert {name: defaults[name] for name in expected} == expected


def test_numbers_of_numpy_are_numbers() -> None:
    config = SamplerConfig(lr=np.float32(0.5), n_beta=np.int64(3), num_draws=np.int32(7))  # type: ignore[arg-type]
    assert (config.lr, config.n_beta, config.num_draws) == (0.5, 3, 7)
    assert type(config.lr) is float
    assert type(config.num_draws) is int


Refused = Any
DEFAULT = object()


@pytest.fixture
def refused(tmp_path: Path) -> Refused:
    """A context in which one call to sample() must fail in one paragraph and write nothing."""

    @contextmanager
    def context(kind: Any, *parts: str) -> Iterator[Any]:
        before = contents(tmp_path)

        def call(model: Any = DEFAULT, **changes: Any) -> None:
            dataset = changes.pop("dataset", token_rows(48, 9, 1))
            observables = changes.pop("observables", {"first": token_rows(30, 9, 2)})
            sample(
                RawModel() if model is DEFAULT else model,
                dataset,
                observables,
                **{**GOOD, "output_path": tmp_path / "runs" / "s.zarr", **changes},
            )

        with pytest.raises(kind) as caught:
            yield call
        message = str(caught.value)
        for part in parts:
            assert part in message, f"{part!r} is not in {message!r}"
        assert "\n" not in message
        assert len(message) < 500
        assert contents(tmp_path) == before

    return context


def got(value: Any) -> str:
    return f"got {value}" if type(value) is int else f"got {value!r}"


def contents(path: Path) -> dict[str, bytes]:
    files = (p for p in path.rglob("*") if p.is_file())
    directories = {str(p.relative_to(path)): b"" for p in path.rglob("*") if p.is_dir()}
    return {**directories, **{str(p.relative_to(path)): p.read_bytes() for p in files}}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_callers_gradient_mode_is_no_matter(mode: Any) -> None:
    model, data = tiny_model("gpt2"), token_rows(16, 9, 1)

    def loss(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        logits = model(ids).logits[:, :-1].transpose(1, 2)
        return nn.functional.cross_entropy(logits, ids[:, 1:], reduction="none")

    with mode():
        inside = sample(model, data, {"a": data}, loss_fn=loss, **GOOD)
        assert not torch.is_grad_enabled()
    outside = sample(model, data, {"a": data}, loss_fn=loss, **GOOD)
    np.testing.assert_array_equal(inside["loss_a"], outside["loss_a"])


def test_whole_numbers_of_numpy_are_whole_numbers() -> None:
    model, data, two = tiny_model("gpt2"), token_rows(16, 9, 1), np.int64(2)
    counts: dict[str, Any] = dict.fromkeys(("checkpoint_every", "chains_at_once"), two)
    got = sample(model, data, {"a": (data, two)}, prefix_cache_bytes=two, **counts, **GOOD)
    assert got["loss_a"].shape[2] == 8


def test_a_failed_call_leaves_no_temporary_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def broken(*_: object) -> torch.Tensor:
        raise RuntimeError("a bug of the caller's")

    with pytest.raises(RuntimeError, match="a bug of the caller's"):
        sample(
            tiny_model("gpt2"),
            token_rows(16, 9, 1),
            {"a": token_rows(16, 9, 1)},
            loss_fn=broken,
            **GOOD,
        )
    assert not [*tmp_path.iterdir()]


def test_a_number_that_yaml_takes_for_text_is_explained() -> None:
    with pytest.raises(ValueError, match=r"got '1e-3': YAML reads this as text, write 1\.0e-03"):
        SamplerConfig(lr="1e-3", n_beta=1.0)  # type: ignore[arg-type]
