"""The commands a person types: what they print, what they write, how they end."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
import xarray as xr
import yaml
from tokenizers import Tokenizer, models
from typer.testing import CliRunner, Result

import basinscope
from basinscope.cli import CHAIN_FAILED, DAMAGED, app
from basinscope.io.activations import ActivationSaver
from basinscope.io.store import SampleStore
from basinscope.report.console import readable_errors, short_warnings
from tests.analysis.stores_random import random_tree, write_tree
from tests.conftest import token_rows
from tests.io.attributions_random import random_store
from tests.models_small import tiny_model

SAMPLER = {"lr": 1e-3, "n_beta": 10, "num_chains": 3, "num_draws": 6, "batch_size": 4,
           "num_init_loss_batches": 2}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model("gpt_neox").save_pretrained(tmp_path / "model")
    token_rows(40, 9, seed=1).save_to_disk(tmp_path / "data")
    token_rows(30, 9, seed=2).to_parquet(tmp_path / "observed.parquet")
    (tmp_path / "text.txt").write_text("some words")
    return tmp_path


def test_sample_llc_and_info_work_together(folder: Path) -> None:
    store = folder / "runs" / "samples.zarr"
    done = invoke("sample", write_plan(folder))
    assert done.exit_code == 0, done.output
    assert "is complete" in done.output
    assert set(basinscope.open_store(store).data_vars) >= {"loss_first", "loss_second"}

    shown = invoke("llc", store, "--json")
    figures = json.loads(shown.stdout)
    expected = basinscope.compute_llc(store).compute()
    assert figures["llc_mean"] == pytest.approx(float(expected["llc_mean"]))
    assert len(figures["llc_per_chain"]) == 3
    assert {"rhat", "ess_bulk", "llc_error"} <= set(figures)
    table = invoke("llc", store).output
    assert f"{figures['llc_mean']:.2f} ± {figures['llc_error']:.2f}" in table

    info = invoke("info", store).output
    assert "GPTNeoXForCausalLM" in info
    for word in ("loss_second", "init_loss", "done", "backward", "write (background)"):
        assert word in info


def test_a_page_about_a_store(folder: Path) -> None:
    assert invoke("sample", write_plan(folder)).exit_code == 0
    store, page = folder / "runs" / "samples.zarr", folder / "page.html"
    done = invoke("report", store, "--out", page)
    assert done.exit_code == 0, done.output
    assert "GPTNeoXForCausalLM" in page.read_text()
    assert "Leaves out" not in page.read_text()
    settled = folder / "settled.html"
    assert invoke("report", store, "--burn-in", 2, "--out", settled).exit_code == 0
    assert "Leaves out the first 2 steps of each chain." in settled.read_text()
    again = invoke("report", store, "--out", page)
    assert again.exit_code == 2
    assert "left as it is" in again.output


def test_chains_of_an_array_job_make_one_store(folder: Path) -> None:
    plan = write_plan(folder)
    store = folder / "runs" / "samples.zarr"
    first = invoke("sample", plan, "--chains", "0:2")
    assert first.exit_code == 0, first.output
    assert "not complete yet" in first.output
    assert f"Next: basinscope info {store}" in flat(first)
    states = [record["state"] for record in SampleStore(store).records().values()]
    assert states == ["done", "done", "pending"]
    assert "pending" in invoke("info", store).output
    assert "is complete" in invoke("sample", plan, "--chains", "2").output


def test_a_restriction_from_the_file_or_the_shell(folder: Path) -> None:
    plan = write_plan(folder, restriction=["l0h0", "l1 mlp"])
    assert invoke("sample", plan).exit_code == 0
    assert (
        invoke("sample", plan, "--restriction", "L1H0", "--out", folder / "h.zarr").exit_code == 0
    )
    elements = [
        basinscope.open_store(path).attrs["metadata"]["config"]["param_masks"]["elements"]
        for path in (folder / "runs" / "samples.zarr", folder / "h.zarr")
    ]
    assert elements[0] > elements[1] > 0
    wrong = invoke("sample", plan, "--restriction", "l9", "--out", folder / "w.zarr")
    assert wrong.exit_code == 2
    assert "layer 9 is out of range, the model has layers 0 to 1" in wrong.output.replace("\n", " ")
    assert not (folder / "w.zarr").exists()


def test_checkpoints_are_sampled_as_one_file_says_and_compared(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that is given counts from here, and leaves the file's where it is."""
    later = tiny_model("gpt_neox")
    with torch.no_grad():
        later.get_parameter("gpt_neox.layers.0.mlp.dense_h_to_4h.weight").mul_(1.5)
    later.save_pretrained(folder / "elsewhere" / "step_20")
    plan, stores = write_plan(folder), [folder / f"step_{step}.zarr" for step in (0, 20)]
    monkeypatch.chdir(folder / "elsewhere")
    assert invoke("check", plan, "--model", "step_20").exit_code in (0, 1)
    assert invoke("sample", plan, "--out", stores[0]).exit_code == 0
    assert invoke("sample", plan, "--model", "step_20", "--out", stores[1]).exit_code == 0
    first, second = json.loads(invoke("compare", *stores, "--json").stdout)
    assert (first["run"], second["run"], second["paired"]) == (0, 20, True)
    assert first["init_loss"] != second["init_loss"]
    refused = invoke("sample", plan, "--model", "step_20", "--out", stores[0])
    assert refused.exit_code == 2
    assert "model.sha256" in flat(refused)
    missing = invoke("sample", plan, "--model", "step_30", "--out", folder / "new.zarr")
    assert "no model 'step_30'" in flat(missing)


def test_verify_names_what_is_damaged(folder: Path) -> None:
    store = folder / "v.zarr"
    assert invoke("sample", write_plan(folder), "--out", store).exit_code == 0
    sound = invoke("verify", store)
    assert sound.exit_code == 0, sound.output
    assert "as they were written" in sound.output
    shard = next(f for f in (store / "sampling_loss" / "c" / "0").rglob("*") if f.is_file())
    shard.write_bytes(shard.read_bytes()[:-7])
    damaged = invoke("verify", store)
    assert damaged.exit_code == DAMAGED
    assert "1 damaged or missing" in damaged.output
    assert str(shard) in damaged.output.replace("\n", "")
    as_json = invoke("verify", store, "--json")
    assert as_json.exit_code == DAMAGED
    (found,) = json.loads(as_json.output)
    assert len(found["damaged"]) == 1
    assert invoke("verify", folder / "none.zarr").exit_code == 2


def test_a_result_of_an_earlier_state_of_a_store_is_not_taken_for_this_one(folder: Path) -> None:
    plan, store, result = write_plan(folder), folder / "runs" / "samples.zarr", folder / "llc.zarr"
    estimate = ("llc", store, "--allow-incomplete", "-o", result, "--json")
    assert invoke("sample", plan, "--chains", "0:2").exit_code == 0
    first = invoke(*estimate)
    written = float(xr.open_datatree(result, engine="zarr", consolidated=False)["llc_mean"])
    assert json.loads(first.stdout)["llc_mean"] == pytest.approx(written)
    assert invoke(*estimate).exit_code == 0
    assert invoke("sample", plan).exit_code == 0
    refused = invoke(*estimate)
    assert refused.exit_code == 2
    assert f"stores.{store}.chains: the store has [0, 1], this call has [0, 1, 2]" in flat(refused)


def test_warnings_of_a_run_are_said_before_it_ends(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*arguments: object) -> None:
        warnings.warn("half of the weights cannot move", stacklevel=1)
        raise KeyboardInterrupt

    monkeypatch.setattr("basinscope.sampling.run_file.run_from_file", stopped)
    done = invoke("sample", write_plan(folder))
    assert done.exit_code == 130
    assert "warning: half of the weights cannot move" in done.output


def test_a_chain_that_is_taken_is_said_in_one_paragraph(folder: Path) -> None:
    plan, store = write_plan(folder), folder / "runs" / "samples.zarr"
    assert invoke("sample", plan, "--chains", "0:1").exit_code == 0
    with SampleStore(store).lock(1):
        done = invoke("sample", plan)
    assert done.exit_code == 2
    assert "chain 1" in flat(done)
    assert "is being sampled by another process" in flat(done)


def test_a_failed_chain_shows_in_exit_code_and_summary(folder: Path) -> None:
    plan = write_plan(folder, sampler={**SAMPLER, "lr": 1e12})
    done = invoke("sample", plan, "--out", folder / "wild.zarr")
    assert done.exit_code == CHAIN_FAILED
    assert "3 of 3 chains failed" in done.output.replace("\n", " ")
    assert f"no chain of it can be analysed. See basinscope info {folder}" in flat(done)
    again = invoke("sample", plan, "--out", folder / "wild.zarr")  # complete: nothing to do
    assert again.exit_code == CHAIN_FAILED
    assert "failed" in invoke("info", folder / "wild.zarr").output
    llc = invoke("llc", folder / "wild.zarr")
    assert llc.exit_code == 2
    assert "wild.zarr can be analysed: chain 0 failed" in llc.output.replace("\n", " ")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sampler": {"n_beta": 10}}, "sampler needs lr"),
        ({"sampler": {**SAMPLER, "lrr": 1}}, "unknown lrr: did you mean lr? It takes autocast,"),
        ({"sampler": {**SAMPLER, "batch_size": 0}}, "batch_size"),
        ({"sampler": ["lr"]}, "sampler must be a mapping of name to value; got a list"),
        ({"sampler": None}, "run.yaml lacks sampler"),
        ({"colour": "red"}, "unknown colour. It takes dataset,"),
        ({"model": ["model"]}, "model must be a directory or a name; got ['model']"),
        ({"model": "models/none"}, "no model 'models/none': there is no such directory here, and"),
        ({"restriction": ["l0", 1]}, "restriction must be one such as l0h1, or a list; got ['l0'"),
        ({"output": 3}, "run.yaml, output: expected the path of a store"),
        ({"observables": ["data"]}, "observables must be a mapping of name to path; got a list"),
        ({"observables": {3: "data"}}, "observables has the name 3, no text: put it in quotes"),
        ({"dtype": "int4"}, "dtype must be one of"),
        ({"dataset": "nowhere"}, "run.yaml, dataset: '"),
        ({"dataset": "nowhere"}, "nowhere' does not exist: it must be a directory of Dataset"),
        ({"observables": {"a": {"path": "nowhere"}}}, "run.yaml, observables.a.path: '"),
        ({"dataset": {"path": 3}}, "dataset.path: expected the path of a data set"),
        ({"dataset": 3}, "dataset must be a path, or a mapping with 'path'; got 3"),
        ({"dataset": {"path": "text.txt", "max_length": 5}}, "is text, and no tokenizer was found"),
        ({"dataset": {"path": "text.txt", "max_length": "5"}}, "dataset.max_length must be a"),
        ({"observables": {"a": {"path": "data", "batches_per_draw": 0}}}, "a.batches_per_draw"),
        ({"dataset": {"max_length": 5}}, "dataset needs a path"),
        ({"observables": {"a": {"path": "data", "rows": 3}}}, "unknown rows"),
    ],
)
def test_a_bad_file_is_one_clear_error(folder: Path, changes: dict, said: str) -> None:
    done = invoke("sample", write_plan(folder, **changes))
    assert done.exit_code == 2
    assert said in done.output.replace("\n", " ")
    assert "Traceback" not in done.output
    assert not (folder / "runs").exists()


def test_a_wrong_file_is_found_before_its_model_is_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("basinscope.sampling.run_file.load_model", pytest.fail)
    for changes in ({"dataset": "none"}, {"observables": {"a": "none"}}, {"sampler": {"lr": -1}}):
        assert invoke("sample", write_plan(folder, **changes)).exit_code == 2
    assert "is a directory: give the YAML file" in flat(invoke("sample", folder))


def test_an_option_is_called_by_its_name(folder: Path) -> None:
    store = folder / "s.zarr"
    write_tree(random_tree(1), store)
    for options, said in (
        (["--chains", "0:1"], "--chains '0:1': choose of stack, mean"),
        (["--method", "pearson"], "--method 'pearson': choose of token, sequence"),
        (["--average", "--page", "p.html"], "--page shows the tokens of --top-k"),
        (["--average", "--tokenizer", "t"], "--tokenizer shows the tokens of --top-k"),
        (["--top-k", "2", "--tokenizer", "no-such"], "no-such"),
        (["--top-k", "2", "--average"], "--top-k goes neither with --method sequence nor with"),
        (["--average", "--query", "1:2"], "--query asks for the strongest partners"),
        (["--average", "--memory-limit", "10"], "From the shell: --memory-limit, --threads 1"),
    ):
        refused = invoke("bif", store, *options)
        assert refused.exit_code == 2
        assert said in flat(refused)
    assert "'--workers'" in invoke("sample", write_plan(folder), "--workers", 0).output


def test_what_is_no_store_is_said_so(tmp_path: Path) -> None:
    for command in ("llc", "info"):
        missing = invoke(command, tmp_path / "none.zarr")
        assert missing.exit_code == 2
        assert "no store at" in missing.output
        other = invoke(command, tmp_path)
        assert other.exit_code == 2
        assert "is not a sampling store" in other.output


def test_info_says_what_holds_no_samples(folder: Path) -> None:
    store = folder / "runs" / "samples.zarr"
    assert invoke("sample", write_plan(folder)).exit_code == 0
    assert invoke("bif", store, "--average", "-o", folder / "bif.zarr").exit_code == 0
    arrays = {"resid_out_0": np.zeros((2, 3, 4), np.float32)}
    run = ActivationSaver(folder / "saved").save(arrays, "tiny", "all", None, {})
    attributions = random_store(folder / "attributions.zarr")
    for path, said in (
        (run, f"is a store of activations: see it with basinscope activations show {run}"),
        (run / "activations.zarr", "is a store of activations: see it with basinscope activations"),
        (attributions, "is a store of attributions: see it with basinscope attribute report"),
        (folder / "bif.zarr", "is the result of an analysis: open it in Python with xarray.open"),
    ):
        for command in (
            ["info", path],
            ["llc", path],
            ["bif", path, "--average"],
            ["susceptibilities", f"full={path}", "--task", "first"],
            ["report", path, "-o", folder / "page.html"],
        ):
            shown = invoke(*command)
            assert shown.exit_code == 2
            assert said in flat(shown)


def test_paths_of_a_run_file_may_be_in_a_home(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(folder))
    observed = {"first": {"path": "~/observed.parquet", "batches_per_draw": 2}}
    given = {"model": "~/model", "dataset": "~/data", "output": "~/home.zarr"}
    done = invoke("sample", write_plan(folder, observables=observed, **given))
    assert done.exit_code == 0, done.output
    assert "loss_first" in basinscope.open_store(folder / "home.zarr")


def test_help_names_every_command_and_doctor_the_paths() -> None:
    shown = invoke("--help").output
    for command in ("demo", "sample", "llc", "info", "doctor"):
        assert command in shown
        assert invoke(command, "--help").exit_code == 0
    assert invoke("--version").output == f"basinscope {basinscope.__version__}\n"
    doctor = invoke("doctor").output
    for word in ("torch", "numba", "cpu", "kernel path"):
        assert word in doctor


def test_chains_are_numbers_and_ranges_or_all(folder: Path) -> None:
    plan, store = write_plan(folder), folder / "runs" / "samples.zarr"
    for text in ("1:", ":2", "a:b"):
        refused = invoke("sample", plan, "--chains", text)
        assert refused.exit_code == 2
        assert f"chains {text!r}: give all, or numbers such as 0,4:8" in flat(refused)
    assert not store.exists()
    assert invoke("sample", plan, "--chains", "0,2:3").exit_code == 0
    states = [record["state"] for record in SampleStore(store).records().values()]
    assert states == ["done", "pending", "done"]
    assert "is complete" in invoke("sample", plan, "--chains", "all").output


def test_analyses_from_the_shell_are_those_from_python(folder: Path) -> None:
    store = folder / "runs" / "samples.zarr"
    assert invoke("sample", write_plan(folder)).exit_code == 0

    averaged = json.loads(invoke("bif", store, "--average", "--json").stdout)
    influences = basinscope.compute_bif(store, average_tokenwise_bif=True).compute().influences
    pairs = np.triu(np.abs(influences.to_numpy()), 1)
    assert abs(averaged[0]["influence"]) == pytest.approx(pairs.max())
    assert f"{averaged[0]['influence']:+.4f}" in invoke("bif", store, "--average").output

    asked = ("bif", store, "--top-k", "2", "--query", "1:3", "--observable", "first")
    found = json.loads(invoke(*asked, "--json").stdout)
    expected = basinscope.compute_bif(store, top_k=2, queries=[(1, 3)], loss_keys=["first"])
    assert np.shape(found["influences"]) == (2, 1, 2)
    np.testing.assert_allclose(found["influences"], expected.influences, rtol=1e-5)
    chance = basinscope.bif_chance(store, [(1, 3)], loss_keys=["first"]).compute()
    for name in ("by_chance", "noise", "reliability"):
        assert found[name] == pytest.approx(chance[name].values.tolist(), rel=1e-5)
    assert (found["query_batch"], found["query_target_position"]) == ([1], [3])
    assert found["observables"] == expected.attrs["observables"]
    shown = invoke(*asked).output
    assert "1:3" in shown
    assert f"±{found['by_chance'][0]:.3f}" in shown
    assert "By chance: what the strongest of as many unrelated tokens reaches." in shown
    assert "by chance" not in invoke(*asked, "--chains", "mean").output
    assert f"Sequences: 0 to {found['observables']['first'] - 1} first." in shown

    written = folder / "bif.zarr"
    all_pairs = invoke("bif", store, "--rows-1", "0:2,4", "-o", written)
    assert all_pairs.exit_code == 0, all_pairs.output
    again = xr.open_dataset(written, engine="zarr", consolidated=False)
    assert again["batch_1"].values.tolist() == [0, 1, 4]
    assert "four dimensions" in invoke("bif", store).output

    assert invoke("llc", store, "--burn-in", "2", "-o", folder / "llc.zarr").exit_code == 0
    kept = xr.open_dataset(folder / "llc.zarr", engine="zarr", consolidated=False)
    expected_llc = basinscope.compute_llc(store, burn_in=2)
    np.testing.assert_allclose(kept["llc_mean"], expected_llc["llc_mean"])
    both = json.loads(invoke("llc", store, store, "--json").stdout)
    assert [row["store"] for row in both] == [str(store)] * 2


def test_tokens_of_a_selection_are_shown_in_their_own_text(tmp_path: Path) -> None:
    tree = random_tree(0, tokens=8)
    whole = basinscope.open_store(write_tree(tree, tmp_path / "s.zarr"))
    whole.isel(token_pos=slice(4, None)).to_zarr(tmp_path / "late.zarr", consolidated=False)
    Tokenizer(models.WordLevel({"?": 0}, unk_token="?")).save(str(tmp_path / "tokenizer.json"))
    asked = ("bif", tmp_path / "late.zarr", "--top-k", "2", "--query", "1:6")
    answer = invoke(*asked, "--observable", "a", "--tokenizer", tmp_path, "--json")
    assert answer.exit_code == 0, answer.output
    found = json.loads(answer.stdout)
    ids = tree["input_ids_a"].to_numpy()
    assert (found["query_target_position"], found["query_token"]) == ([6], [str(ids[1, 6])])
    places = (np.ravel(found[f"partner_{name}"]) for name in ("batch", "target_position", "token"))
    for batch, position, text in zip(*places, strict=True):
        assert position in range(5, 9)
        assert text == str(ids[batch, position])
    refused = flat(invoke(*asked[:-1], "1:4"))
    assert "there are sequences 0 to 4 and positions 5 to 8" in refused


def test_stores_of_one_name_are_refused_before_any_work(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores = [folder / name / "s.zarr" for name in ("a", "b")]
    for store in stores:
        write_tree(random_tree(1), store)
    assert invoke("llc", *stores).exit_code == 0
    monkeypatch.setattr("basinscope.analysis.llc.compute_llc", pytest.fail)
    for option in ("--out", "--profile"):
        refused = invoke("llc", *stores, option, folder / "result")
        assert refused.exit_code == 2
        assert "several stores have the same name, s: with --out and" in flat(refused)
        assert not (folder / "result").exists()


def test_a_place_that_is_taken_is_refused_before_any_work(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, result = folder / "s.zarr", folder / "llc.zarr"
    write_tree(random_tree(1), store)
    for _ in range(2):  # the same result again
        assert invoke("llc", store, "-o", result).exit_code == 0
    monkeypatch.setattr("basinscope.analysis.llc.compute_llc", pytest.fail)
    for place, options, said in (
        (folder, (), "exists and is no result"),
        (folder / "text.txt" / "llc.zarr", (), "text.txt is no directory"),
        (result, ("--burn-in", 1), "the store has 0, this call has 1"),
    ):
        refused = invoke("llc", store, "-o", place, *options)
        assert refused.exit_code == 2
        assert said in flat(refused)


@pytest.mark.parametrize("reference", ["checkpoint", "first draw"])
def test_an_llc_says_what_it_is_taken_against(folder: Path, reference: str) -> None:
    store, known = folder / "s.zarr", reference == "checkpoint"
    write_tree(random_tree(1, observables={"pile": 3}, init_losses=known), store)
    figures = json.loads(invoke("llc", store, "--json").stdout)
    assert figures["llc_observables_reference"] == {"pile": reference}
    shown = flat(invoke("llc", store))
    value, error = (figures[name]["pile"] for name in ("llc_observables", "llc_observables_error"))
    assert f"{value:.2f} ± {error:.2f} │ {reference}" in shown
    assert ("what the loss rose before that draw is left out" in shown) == (not known)


def test_susceptibilities_from_the_shell(folder: Path) -> None:
    for name in ("full", "l0"):
        plan = write_plan(folder, output=str(folder / f"s_{name}.zarr"))
        assert invoke("sample", plan).exit_code == 0
    stores = [folder / "s_full.zarr", folder / "s_l0.zarr"]
    found = json.loads(invoke("susceptibilities", *stores, "--task", "first", "--json").stdout)
    assert [(row["restriction"], row["observable"]) for row in found] == [("l0", "second")]
    expected = basinscope.compute_susceptibilities(
        dict(zip(("full", "l0"), stores, strict=False)), "first"
    )
    mean = float(expected["susceptibilities"]["sus"].mean())
    error = float(np.sqrt(np.square(expected["susceptibilities"]["sus_mcse"]).mean()))
    assert found[0]["error"] == pytest.approx(error)
    assert found[0]["mean"] == pytest.approx(mean)
    table = invoke("susceptibilities", *stores, "--task", "first", "-o", folder / "sus.zarr")
    for shown in (table.output, invoke("susceptibilities", *stores, "--task", "first").output):
        assert f"{mean:+.2e}" in shown
        assert f"{error:.2e}" in shown
    assert (folder / "sus.zarr" / "susceptibilities" / "sus").is_dir()
    assert "no observable" in invoke("susceptibilities", *stores, "--task", "third").output
    named = {"full": stores[0], "l0": folder / "l0.zarr"}  # which really moves less
    plan = write_plan(folder, output=str(named["l0"]), restriction="l0")
    assert invoke("sample", plan).exit_code == 0
    given = [f"{name}={store}" for name, store in named.items()]
    means = []
    for baseline in ("sampling", "task"):
        own = ["--task", "first", "--baseline", baseline, "--json"]
        (row,) = json.loads(invoke("susceptibilities", *given, *own).stdout)
        tree = basinscope.compute_susceptibilities(named, "first", baseline=baseline)
        means.append(float(tree["susceptibilities"]["sus"].mean()))
        assert row["mean"] == pytest.approx(means[-1])
    assert means[0] != pytest.approx(means[1])
    refused = invoke("susceptibilities", stores[1], "--task", "first")
    assert "cannot be told from the names" in refused.output.replace("\n", " ")


def test_reliability_says_what_other_chains_would_say(folder: Path) -> None:
    store = folder / "runs" / "samples.zarr"
    assert invoke("sample", write_plan(folder)).exit_code == 0
    found = basinscope.bif_reliability(store, correlation_method="sequence").compute()
    figures = json.loads(invoke("reliability", store, "--method", "sequence", "--json").stdout)
    assert figures["reliability"] == float(found["reliability"])
    assert figures["agreement"] == found["agreement"].values.tolist()
    shown = invoke("reliability", store, "--method", "sequence").output
    assert f"Reliability {figures['reliability']:.2f}: influences between" in shown
    assert f"{figures['agreement'][0][1]:.3f}" in shown
    planned = json.loads(
        invoke("reliability", store, "--rows", "0:4", "--dry-run", "--json").stdout
    )
    plan = basinscope.plan("bif_reliability", store, batch_index_range=range(4))
    assert planned[str(store)]["flops"] == plan.flops > 0
    assert "give two or more" in flat(invoke("reliability", store, "--rows", "2"))


def test_a_dry_run_says_what_would_be_read_and_does_nothing(folder: Path) -> None:
    store = folder / "runs" / "samples.zarr"
    assert invoke("sample", write_plan(folder)).exit_code == 0
    out = folder / "bif.zarr"
    planned = json.loads(invoke("bif", store, "--dry-run", "--json", "-o", out).stdout)
    plan = basinscope.plan("bif", store)
    assert planned[str(store)]["bytes_to_read"] == plan.bytes_to_read > 0
    assert planned[str(store)]["flops"] == plan.flops > 0
    assert not out.exists()
    assert "peak memory" in invoke("llc", store, "--dry-run").output
    assert "memory_limit" in invoke("bif", store, "--average", "--memory-limit", "10").output


@pytest.mark.parametrize("command", ["llc", "bif", "susceptibilities"])
def test_a_dry_run_refuses_what_the_run_would_refuse(command: str, tmp_path: Path) -> None:
    one, other = (write_tree(random_tree(seed), tmp_path / str(seed)) for seed in range(2))
    asked = {
        "llc": ("llc", one),
        "bif": ("bif", one, "--average"),
        "susceptibilities": ("susceptibilities", f"full={one}", f"l0={other}", "--task", "a"),
    }[command]
    run, planned = (invoke(*asked, "--memory-limit", "1kB", *dry) for dry in ((), ("--dry-run",)))
    assert run.exit_code == planned.exit_code == 2
    assert "and memory_limit is 1000 B: give" in flat(run)
    assert "peak memory" in planned.output
    assert flat(run) in flat(planned)


def test_threads_count_on_a_cluster_too(tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed")
    store = write_tree(random_tree(1), tmp_path / "s")
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None
    ) as cluster:
        asked = ("llc", store, "--dry-run", "--json", "--threads", "3")
        for where in ((), ("--scheduler", cluster.scheduler_address)):
            plan = json.loads(invoke(*asked, *where).stdout)
            assert plan[str(store)]["workers"] == 3
        tight = ("--memory-limit", "10", "--scheduler", cluster.scheduler_address)
        refused = flat(invoke("llc", store, *tight))
    assert "From the shell: --memory-limit" in refused
    assert "--threads" not in refused  # a cluster has the threads that it has


def test_a_profile_holds_a_page_and_figures(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    store = folder / "runs" / "samples.zarr"
    assert invoke("sample", write_plan(folder)).exit_code == 0
    done = invoke("bif", store, "--average", "--profile", "~/profile")
    assert done.exit_code == 0, done.output
    summary = json.loads((folder / "profile" / "summary.json").read_text())
    plan = basinscope.plan("bif", store, average_tokenwise_bif=True)
    assert summary["bytes_to_read"] == plan.bytes_to_read
    rate = summary["bytes_to_read"] / summary["seconds"] / 1e9
    assert summary["gb_per_s"] == pytest.approx(rate, abs=1e-5)
    assert summary["file_bytes"] > 0
    assert "bokeh" in (folder / "profile" / "profile.html").read_text()[:5000].lower()
    refused = invoke("bif", store, "--average", "--profile", folder / "run.yaml")
    assert refused.exit_code == 2
    assert "run.yaml is no directory" in refused.output.replace("\n", " ")


def test_brackets_in_messages_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit), readable_errors():
        raise ModuleNotFoundError("pip install 'basinscope[report]'")
    with short_warnings():
        warnings.warn("rows [1, 2] are left out", stacklevel=1)
    said = capsys.readouterr().err
    assert "basinscope[report]" in said
    assert "rows [1, 2]" in said


def write_plan(folder: Path, **changes: object) -> Path:
    plan = {
        "model": "model",
        "dataset": "data",
        "observables": {
            "first": {"path": "observed.parquet", "batches_per_draw": 2},
            "second": "data",
        },
        "sampler": SAMPLER,
        "output": "runs/samples.zarr",
        **changes,
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(plan))
    return path


def flat(result: Result) -> str:
    return result.output.replace("\n", " ")


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(
        app, [str(argument) for argument in arguments], env={"COLUMNS": "160"}
    )
