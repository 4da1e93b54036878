"""compute_susceptibilities: lazy, by the formula, from runs that are alike, and streamed."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
import xarray as xr

import basinscope
from basinscope.analysis import plan, susceptibilities
from basinscope.analysis import stores as samples
from basinscope.analysis.susceptibilities import plan_of_susceptibilities
from basinscope.io import results, stored
from basinscope.io.store import StoreMismatchError
from basinscope.sampling.config import SamplerConfig
from tests.analysis.stores_random import random_tree, write_tree
from tests.analysis.stores_recorded import fail, recorded_store
from tests.reference import analysis as reference

SIZES: dict[str, Any] = {"draws": 60, "steps": 60, "chains": 3}
OBSERVABLES = {"task": 3, "github": 4, "pile": 2}
TREES = {
    name: random_tree(seed, observables=OBSERVABLES, **SIZES)
    for seed, name in enumerate(["l0h1", "full", "embed"])
}
RESTRICTIONS = ["l0h1", "embed"]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("susceptibilities")
    return {name: recorded_store(directory / f"{name}.zarr", tree) for name, tree in TREES.items()}


@pytest.mark.parametrize("source", ["path", "store", "xarray", "memory"])
def test_building_reads_nothing(
    source: str, stores: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(path: Path) -> xr.DataTree:
        return xr.open_datatree(path, engine="zarr", consolidated=False)

    runs: dict[str, Any] = {
        "path": lambda: {name: str(path) for name, path in stores.items()},
        "store": lambda: {name: basinscope.open_store(path) for name, path in stores.items()},
        "xarray": lambda: {name: opened(path) for name, path in stores.items()},
        "memory": lambda: TREES,
    }[source]()

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something was computed")

    monkeypatch.setattr(stored, "decode", refuse)
    with dask.config.set(scheduler=refuse):
        lazy = basinscope.compute_susceptibilities(runs, "task")
        read = {"susceptibilities/sus", "context/input_ids"}
        for name in read - ({"context/input_ids"} if source == "memory" else set()):
            with pytest.raises(AssertionError, match="something was computed"):
                lazy[name].compute()
    if source == "xarray":
        assert not any(run["loss_pile"].variable._in_memory for run in runs.values())


def test_every_token_of_every_observable_is_labelled(stores: Mapping[str, Path]) -> None:
    got = basinscope.compute_susceptibilities(
        stores, "task", observable_names=["pile", "github", "pile"]
    )
    sus, context = got["susceptibilities"], got["context"]
    assert sus["wr"].values.tolist() == RESTRICTIONS
    assert sus["sus"].dims == ("sus_flat", "wr")
    assert sus["sus"].dtype == np.float64
    assert sus["sus"].attrs["units"] == "nats2"
    for node in (sus, context):
        assert node.attrs["dataset_id_to_name"] == ["github", "pile"]
    expected = {
        (number, batch, position): position
        for number, count in enumerate([4, 2])
        for batch in range(count)
        for position in range(1, 5)
    }
    names = ("dataset_id", "batch", "target_position")
    assert [*zip(*(sus[name].values.tolist() for name in names), strict=True)] == [*expected]
    for at, (number, batch, position) in enumerate(
        zip(*(context[name].values for name in ("dataset_id", "batch", "position")), strict=True)
    ):
        ids = TREES["full"][f"input_ids_{['github', 'pile'][number]}"]
        assert context["input_ids"][at] == ids[batch, position]
    assert context.sizes["ctx_flat"] == 6 * 5


@pytest.mark.parametrize("written", [[60, 60, 60], [60, 30, 0]])
def test_each_is_the_formula_over_what_is_recorded(
    written: list[int], stores: Mapping[str, Path], tmp_path: Path
) -> None:
    partly = {
        name: recorded_store(tmp_path / f"{name}.zarr", tree, written)
        for name, tree in TREES.items()
    }
    if min(written) == 0:
        with pytest.warns(UserWarning, match="chain 2 was not started"):
            got = basinscope.compute_susceptibilities(partly, "task", allow_incomplete=True)
    else:
        got = basinscope.compute_susceptibilities(partly, "task")
    for column, name in enumerate(RESTRICTIONS):
        for number, observable in enumerate(["github", "pile"]):
            losses = [
                pooled(TREES[run][f"loss_{of}"], written)
                for run in (name, "full")
                for of in ("task", observable)
            ]
            init_loss = TREES["full"]["init_loss"].to_numpy()[[w > 0 for w in written]]
            expected = reference.susceptibility(*losses, init_loss).ravel()
            found = got["susceptibilities"]["sus"].to_numpy()
            mine = got["susceptibilities"]["dataset_id"].to_numpy() == number
            np.testing.assert_allclose(found[mine, column], expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("written", "paired"),
    [([60, 60, 60], True), ([60, 60, 60], False), ([60, 30, 0], True), ([60, 0, 0], True)],
)
def test_the_error_is_what_differs_between_chains(
    written: list[int], paired: bool, tmp_path: Path
) -> None:
    runs: dict[str, Any] = {
        name: recorded_store(tmp_path / f"{name}.zarr", tree, written)
        for name, tree in TREES.items()
    }
    if not paired:
        runs["full"] = xr.DataTree(TREES["full"].dataset.assign_coords(chain=[7, 8, 9]))
    with warnings.catch_warnings(action="ignore"):
        got = basinscope.compute_susceptibilities(runs, "task", allow_incomplete=True)
    kept = [rows for rows in written if rows]
    start = TREES["full"]["init_loss"].to_numpy()[: len(kept)].astype(np.float64).mean()

    def means(run: str) -> list[tuple[np.ndarray, ...]]:
        """E[φ], E[φ (P - ℓ)] and E[P - ℓ] of each chain."""
        found = []
        for chain, rows in enumerate(kept):
            of_task, *probes = (
                TREES[run][f"loss_{obs}"][chain, :rows].to_numpy().astype(np.float64)
                for obs in ("task", "github", "pile")
            )
            p = of_task.mean(axis=(1, 2))[:, None]
            gap = p - np.concatenate([loss.reshape(rows, -1) for loss in probes], axis=1)
            found.append(((p - start).mean(), ((p - start) * gap).mean(0), gap.mean(0)))
        return found

    def squared_error(values: list[np.ndarray]) -> np.ndarray:
        mean = np.average(values, axis=0, weights=kept)
        apart = [
            (rows / sum(kept) * (own - mean)) ** 2 for rows, own in zip(kept, values, strict=True)
        ]
        return sum(apart) * len(kept) / (len(kept) - 1)

    for column, name in enumerate(RESTRICTIONS):
        found = got["susceptibilities"]["sus_mcse"].to_numpy()[:, column]
        if len(kept) == 1:
            assert np.isnan(found).all()
            continue
        below = np.average([gap for *_, gap in means("full")], axis=0, weights=kept)
        rise = np.average([phi for phi, *_ in means(name)], weights=kept)
        own = [both - phi * below for phi, both, _ in means(name)]
        of_full = [rise * gap for *_, gap in means("full")]
        if paired:
            expected = squared_error([a - b for a, b in zip(own, of_full, strict=True)])
        else:
            expected = squared_error(own) + squared_error(of_full)
        np.testing.assert_allclose(found, np.sqrt(expected), rtol=1e-6)


def test_the_error_is_the_spread_of_repeated_runs() -> None:
    """Of 60 runs and 24 tokens, the ratio is known to 10% at most; bounds are 2.5 of that."""
    rng = np.random.default_rng(0)
    loadings = {name: rng.normal(1, 0.5, (count, 4)) for name, count in OBSERVABLES.items()}

    def run(seed: int, scale: float) -> xr.DataTree:
        tree = random_tree(seed, observables=OBSERVABLES, **{**SIZES, "chains": 4})
        factor = rng.standard_normal((4, 60))
        for draw in range(1, 60):
            factor[:, draw] += 0.9 * factor[:, draw - 1]
        losses = {
            f"loss_{name}": (
                tree[f"loss_{name}"].dims,
                3
                + scale * factor[:, :, None, None] ** 2 * loading
                + 0.1 * rng.standard_normal((4, 60, *loading.shape)),
            )
            for name, loading in loadings.items()
        }
        tree.dataset = tree.to_dataset().assign(losses)
        return tree

    found, errors = [], []
    for _ in range(60):
        runs = {"full": run(0, 0.05), "l0": run(0, 0.03)}
        got = basinscope.compute_susceptibilities(runs, "task")["susceptibilities"]
        found.append(got["sus"].to_numpy())
        errors.append(got["sus_mcse"].to_numpy())
    ratio = np.sqrt(np.mean(np.square(errors)) / np.var(found, axis=0, ddof=1).mean())
    assert 0.75 < ratio < 1.33


@pytest.mark.parametrize("at_hand", [True, False])
@pytest.mark.parametrize("on_disk", [True, False])
def test_the_task_s_own_sequences_may_be_the_baseline(
    on_disk: bool, at_hand: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the loss of the sampling batches at the checkpoint were theirs."""
    if not at_hand:
        monkeypatch.setattr(susceptibilities, "RUN_BYTES", 0)
    trees = {
        name: random_tree(seed, observables=OBSERVABLES, init_losses=True, **SIZES)
        for seed, name in enumerate(["l0h1", "full"])
    }
    runs: dict[str, Any] = dict(trees)
    if on_disk:
        runs = {name: write_tree(tree, tmp_path / name) for name, tree in trees.items()}
    got = basinscope.compute_susceptibilities(runs, "task", baseline="task").compute()
    full = trees["full"].to_dataset()
    own = float(full["init_loss_task"].mean(dtype=float))
    full["init_loss"] = full["init_loss"].astype(float) * 0 + own
    as_if = {**trees, "full": xr.DataTree(full)}
    expected = basinscope.compute_susceptibilities(as_if, "task").compute()
    for name in ("sus", "sus_mcse"):
        found, wanted = (tree[f"susceptibilities/{name}"] for tree in (got, expected))
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-9)
    plain = basinscope.compute_susceptibilities(runs, "task").compute()
    assert not np.allclose(plain["susceptibilities/sus"], got["susceptibilities/sus"], rtol=1e-3)


def test_a_baseline_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="baseline='own': choose 'sampling' or 'task'"):
        basinscope.compute_susceptibilities(TREES, "task", baseline="own")  # type: ignore[arg-type]
    for call in (basinscope.compute_susceptibilities, plan_of_susceptibilities):
        with pytest.raises(ValueError, match=r"needs init_loss_task, which .* has not"):
            call(TREES, "task", baseline="task")


def test_responses_a_millionth_of_the_losses_are_not_lost_in_rounding() -> None:
    sizes: dict[str, Any] = {"observables": {"task": 64, "a": 64}, "tokens": 64, "draws": 200}
    both = random_tree(0, fluctuation=1e-3, **sizes).dataset
    trees = {
        name: xr.DataTree(both.isel(draw=draws))
        for name, draws in {"full": slice(100), "l0": slice(100, None)}.items()
    }
    losses = [trees[run][f"loss_{of}"].to_numpy() for run in ("l0", "full") for of in ("task", "a")]
    expected = reference.susceptibility(*losses, trees["full"]["init_loss"].to_numpy()).ravel()
    got = basinscope.compute_susceptibilities(trees, "task")["susceptibilities"]["sus"]
    scale = expected.std()
    assert scale < 1e-6 * 3**2
    np.testing.assert_allclose(got[:, 0], expected, rtol=0, atol=1e-4 * scale)


def test_an_observable_goes_by_its_name_or_its_id(tmp_path: Path) -> None:
    sizes = {"pile_github": 3, "_2nd": 2}
    trees = {n: random_tree(s, observables=sizes) for s, n in enumerate(["full", "l0"])}
    by_name = basinscope.compute_susceptibilities(trees, "pile/github", ["2nd"])
    by_id = basinscope.compute_susceptibilities(trees, "pile_github", ["_2nd"])
    xr.testing.assert_equal(by_name.compute(), by_id.compute())


@pytest.mark.parametrize("function", ["compute", "plan"])
@pytest.mark.parametrize(
    ("names", "task", "options", "said"),
    [
        (["l0h1", "embed"], "task", {}, "wr_map lacks 'full'.*it has l0h1, embed"),
        (["full"], "task", {}, "wr_map has 'full' only"),
        ([], "task", {}, "wr_map lacks 'full'"),
        (["full", "embed"], "wiki", {}, "no observable 'wiki'; it has github, pile, task"),
        (["full", "embed"], "task", {"observable_names": ["pile", "wiki"]}, "'wiki'; it has"),
        (["full", "embed"], "task", {"observable_names": []}, "observable"),
    ],
)
def test_a_wrong_argument_is_named_with_what_there_is(
    names: list[str], task: str, options: dict[str, Any], said: str, function: str
) -> None:
    runs = {name: TREES[name] for name in names}
    call = {
        "compute": basinscope.compute_susceptibilities,
        "plan": plan_of_susceptibilities,
    }[function]
    with pytest.raises(ValueError, match=said):
        call(runs, task, **options)


def test_the_task_alone_is_refused_unless_it_is_asked_about() -> None:
    runs = {name: random_tree(seed, observables={"a": 2}) for seed, name in enumerate("xy")}
    runs = {"full": runs["x"], "l0": runs["y"]}
    with pytest.raises(ValueError, match=r"has a and 'a' is the sampling task.*include_sampling"):
        basinscope.compute_susceptibilities(runs, "a")
    got = basinscope.compute_susceptibilities(runs, "a", include_sampling_task=True)
    assert got["susceptibilities"].sizes == {"sus_flat": 8, "wr": 1}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"sampler": {"n_beta": 20.0}}, r"sampler n_beta: 10.0 in 'full', 20.0 in 'embed'"),
        (
            {"sampler": {"n_beta": 10.0, "lr": 2.0}, "model": {"class": "B"}},
            r"sampler lr: 1.0 in 'full', 2.0 in 'embed'\n  model class: 'A' in 'full', 'B' in 'em",
        ),
        ({"datasets": {"b": "22"}}, r"datasets b: '11' in 'full', '22' in 'embed'"),
        ({"loss_fn": "mine 12"}, r"loss_fn: none in 'full', mine 12 in 'embed'"),
        (
            {"observables": [{"obs_id": "pile", "loss_fn": "right 34"}, {"obs_id": "task"}]},
            r"loss_fn of observable 'pile': none in 'full', right 34 in 'embed'",
        ),
        (
            {"observables": [{"obs_id": "pile"}, {"obs_id": "task", "loss_fn": "right 34"}]},
            r"loss_fn of observable 'task': none in 'full', right 34 in 'embed'",
        ),
    ],
)
def test_settings_that_differ_are_named_with_both_sides(config: dict[str, Any], said: str) -> None:
    own = {"sampler": {"n_beta": 10.0, "lr": 1.0}, "model": {"class": "A"}, "datasets": {"b": "11"}}
    own |= {"observables": [{"obs_id": "pile"}, {"obs_id": "task"}], "loss_fn": None}
    runs = {"full": with_config(TREES["full"], own), "l0h1": with_config(TREES["l0h1"], own)}
    runs["embed"] = with_config(TREES["embed"], {**own, **config})
    with pytest.raises(ValueError, match=said) as caught:
        basinscope.compute_susceptibilities(runs, "task")
    assert "l0h1" not in str(caught.value)


def test_every_setting_that_is_not_known_to_be_harmless_is_compared() -> None:
    harmless = {
        "init_seed", "num_chains", "num_draws", "num_init_loss_batches", "save_metrics",
        "save_sampling_input_ids", "loss_keep_bits",
    }  # fmt: skip
    settings = {field.name for field in fields(SamplerConfig)}
    assert harmless < settings
    for name in settings:
        runs = {
            run: with_config(TREES[of], {"sampler": {"n_beta": 10.0, name: value}})
            for run, of, value in (("full", "full", 1.0), ("l0", "embed", 2.0))
        }
        if name in harmless:
            basinscope.compute_susceptibilities(runs, "task")
            continue
        with pytest.raises(ValueError, match=f"sampler {name}: 1.0 in 'full', 2.0 in 'l0'"):
            basinscope.compute_susceptibilities(runs, "task")


def test_a_full_run_that_moves_less_than_a_part_is_refused() -> None:
    settings = {"sampler": {"n_beta": 10.0}}
    runs = {
        "full": with_config(TREES["full"], {**settings, "param_masks": {"elements": 1200}}),
        "l0": with_config(TREES["embed"], {**settings, "param_masks": {"elements": 9000}}),
    }
    with pytest.raises(ValueError, match=r"weights that move: 1,200 in 'full'.*, 9,000 in 'l0'"):
        basinscope.compute_susceptibilities(runs, "task")
    swapped = {"full": runs["l0"], "l0": runs["full"]}
    basinscope.compute_susceptibilities(swapped, "task")


def test_settings_that_change_no_comparison_may_differ() -> None:
    own = {"sampler": {"n_beta": 10.0, "cores": 1, "init_seed": 5, "save_metrics": False}}
    other = {"sampler": {"n_beta": 10.0, "cores": 8, "init_seed": 6, "save_metrics": True}}
    runs = {"full": with_config(TREES["full"], own), "l0": with_config(TREES["embed"], other)}
    got = basinscope.compute_susceptibilities(runs, "task")
    assert np.isfinite(got["susceptibilities"]["sus"]).all()


@pytest.mark.parametrize(
    ("observables", "tokens", "said"),
    [
        ({**OBSERVABLES, "pile": 3}, 4, r"'pile': \(2, 4\) in 'full', \(3, 4\) in 'embed'"),
        ({**OBSERVABLES, "task": 4}, 4, r"'task': \(3, 4\) in 'full', \(4, 4\) in 'embed'"),
        (OBSERVABLES, 5, r"'github': \(4, 4\) in 'full', \(4, 5\) in 'embed'"),
        ({"task": 3, "pile": 2}, 4, r"'github': in 'full', not in 'embed', which has task, pile"),
        ({"github": 4, "pile": 2}, 4, "'task': in 'full', not in 'embed', which has github"),
    ],
)
def test_shapes_that_differ_are_named_with_both_sides(
    observables: dict[str, int], tokens: int, said: str
) -> None:
    other = random_tree(5, observables=observables, tokens=tokens, **SIZES)
    with pytest.raises(ValueError, match=said):
        basinscope.compute_susceptibilities({**TREES, "embed": other}, "task")


def test_what_is_not_asked_about_may_differ() -> None:
    other = random_tree(5, observables={**OBSERVABLES, "pile": 3}, **SIZES)
    runs = {"full": TREES["full"], "l0": other}
    got = basinscope.compute_susceptibilities(runs, "task", ["github"]).compute()
    assert got["susceptibilities"].sizes["sus_flat"] == 16


def test_token_ids_that_differ_are_found_when_they_are_read(tmp_path: Path) -> None:
    other = random_tree(5, observables=OBSERVABLES, **SIZES)
    ids = other["input_ids_pile"].to_numpy().copy()
    ids[1, 3] += 1
    other["input_ids_pile"] = other["input_ids_pile"].copy(data=ids)
    trees = {**TREES, "embed": other}
    said = r"'pile' differ between 'full' and 'embed' \(first at \[1, 3\]\)"
    with pytest.raises(ValueError, match=said):  # in memory, read they are
        basinscope.compute_susceptibilities(trees, "task")
    runs = {name: write_tree(tree, tmp_path / name) for name, tree in trees.items()}
    lazy = basinscope.compute_susceptibilities(runs, "task")
    for name in ("susceptibilities/sus", "context/input_ids"):
        with pytest.raises(ValueError, match=said):
            lazy[name].compute()
    with pytest.raises(ValueError, match=said):
        basinscope.compute_susceptibilities(runs, "task", output_path=tmp_path / "r")
    got = basinscope.compute_susceptibilities(runs, "task", ["github"])
    assert got.compute()["context"].sizes["ctx_flat"] == 20


@pytest.mark.parametrize("in_blocks", [[], ["full"], RESTRICTIONS, list(TREES)], ids=str)
@pytest.mark.parametrize("file_bytes", [2**25, 1])
def test_runs_at_hand_give_what_those_in_blocks_give(
    file_bytes: int,
    in_blocks: list[str],
    stores: Mapping[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = basinscope.compute_susceptibilities(stores, "task").compute()
    monkeypatch.setattr(samples, "FILE_BYTES", file_bytes)  # of 1: in memory, but not at hand
    monkeypatch.setattr(plan, "SEQUENCES_BYTES", 1)
    runs = dict(TREES)
    for name in in_blocks:
        tree = TREES[name].copy()
        tree.dataset = tree.to_dataset().chunk({f"batch_{obs_id}": 1 for obs_id in OBSERVABLES})
        runs[name] = tree
    got = basinscope.compute_susceptibilities(runs, "task")
    sizes = got["susceptibilities"]["sus"].chunks[0]
    assert sizes == ((16, 8) if file_bytes > 1 and "full" not in in_blocks else (4,) * 6)
    for name in ("susceptibilities", "context"):
        xr.testing.assert_allclose(got[name].compute(), expected[name], rtol=0, atol=1e-12)


def test_a_result_of_what_is_in_memory_can_be_written(tmp_path: Path) -> None:
    written = basinscope.compute_susceptibilities(TREES, "task", output_path=tmp_path / "r")
    expected = basinscope.compute_susceptibilities(TREES, "task")
    for name in ("susceptibilities", "context"):
        xr.testing.assert_equal(written[name].to_dataset(), expected[name].to_dataset())
    names = json.loads((tmp_path / "r" / "susceptibilities" / "wr" / "zarr.json").read_text())
    assert names["data_type"] == "string"  # which other readers know


def test_a_stopped_stream_is_continued_with_what_is_missing(
    stores: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = basinscope.compute_susceptibilities(stores, "task").compute()
    write, written, most = results._write_block, [], 1

    def stop(*arguments: Any) -> None:
        if len(written) == most:
            raise KeyboardInterrupt
        write(*arguments)
        written.append(arguments[:2])

    monkeypatch.setattr(results, "_write_block", stop)
    path = tmp_path / "r.zarr"
    with dask.config.set(scheduler="synchronous"), pytest.raises(KeyboardInterrupt):
        basinscope.compute_susceptibilities(stores, "task", output_path=path)
    most = 100
    got = basinscope.compute_susceptibilities(stores, "task", output_path=path)
    plain = xr.open_datatree(path, engine="zarr", consolidated=False)
    for found in (got, plain):
        for name in ("susceptibilities", "context"):
            xr.testing.assert_equal(found[name].to_dataset().compute(), expected[name].to_dataset())
            assert found[name].attrs == expected[name].attrs
        assert found.attrs["metadata"] == expected.attrs["metadata"]
    assert 1 < len(written) == len(set(written))
    with dask.config.set(scheduler=lambda *_, **__: pytest.fail("computed again")):
        basinscope.compute_susceptibilities(stores, "task", output_path=path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("task", "task: the store has 'task', this call has 'pile'"),
        ("observables", r"observables: the store has \['github', 'pile'\], this call has \['pile"),
        ("restrictions", r"restrictions: the store has \['l0h1', 'embed'\], this call has \['emb"),
        ("store", "the store has 'when embed.zarr was made', this call has 'when other.zarr was"),
    ],
)
def test_another_result_is_never_continued(
    change: str, said: str, stores: Mapping[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "r.zarr"
    basinscope.compute_susceptibilities(stores, "task", output_path=path)
    runs, task, names = dict(stores), "task", None
    if change == "task":
        task = "pile"
    elif change == "observables":
        names = ["pile"]
    elif change == "restrictions":
        del runs["l0h1"]
    else:
        runs["embed"] = recorded_store(tmp_path / "other.zarr", TREES["embed"])
    with pytest.raises(StoreMismatchError, match=said):
        basinscope.compute_susceptibilities(runs, task, names, output_path=path)


@pytest.mark.parametrize("observable", ["task", "pile"])
def test_a_result_of_other_losses_is_never_continued(
    observable: str, stores: Mapping[str, Path], tmp_path: Path
) -> None:
    basinscope.compute_susceptibilities(stores, "task", output_path=tmp_path / "r.zarr")
    name = f"loss_{observable}"
    changed = TREES["embed"].to_dataset().assign({name: TREES["embed"][name] + 1})
    other = recorded_store(tmp_path / "embed.zarr", xr.DataTree(changed))  # the same in all else
    with pytest.raises(StoreMismatchError, match=r"sources\.embed\.losses"):
        basinscope.compute_susceptibilities(
            {**stores, "embed": other}, "task", output_path=tmp_path / "r.zarr"
        )


@pytest.mark.parametrize("run", ["full", "embed"])
def test_a_failed_chain_is_left_out_and_named(
    run: str, stores: Mapping[str, Path], tmp_path: Path
) -> None:
    changed = tmp_path / "failed.zarr"
    shutil.copytree(stores[run], changed)
    fail(changed, 1)
    for observable in OBSERVABLES:  # what a failed chain wrote is never read
        shutil.rmtree(changed / f"loss_{observable}" / "c" / "1")
    said = r"left out.*chain 1 failed at step 7 \(the loss is not finite\)"
    with pytest.warns(UserWarning, match=said):
        got = basinscope.compute_susceptibilities({**stores, run: changed}, "task").compute()
    others = xr.DataTree(TREES[run].dataset.isel(chain=[0, 2]))
    expected = basinscope.compute_susceptibilities({**TREES, run: others}, "task")
    np.testing.assert_allclose(
        got["susceptibilities"]["sus"], expected["susceptibilities"]["sus"], rtol=0, atol=1e-11
    )


def test_an_incomplete_store_is_refused_by_its_path(
    stores: Mapping[str, Path], tmp_path: Path
) -> None:
    path = recorded_store(tmp_path / "s.zarr", TREES["embed"], [60, 30, 0])
    said = rf"{re.escape(str(path))} is not complete: chain 1 is unfinished.*chain 2 was not"
    with pytest.raises(ValueError, match=said):
        basinscope.compute_susceptibilities({**stores, "embed": path}, "task")


def with_config(tree: xr.DataTree, config: dict[str, Any]) -> xr.DataTree:
    dataset = tree.to_dataset()
    dataset.attrs = {**dataset.attrs, "metadata": {"config": config}}
    return xr.DataTree(dataset)


def pooled(losses: xr.DataArray, written: list[int]) -> np.ndarray:
    """Join the draws that were written, as those of one chain."""
    parts = [losses[chain, :rows].to_numpy() for chain, rows in enumerate(written)]
    return np.concatenate(parts)[None]
