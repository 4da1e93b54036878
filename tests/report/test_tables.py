"""What tables say of results."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from rich.console import Console
from rich.table import Table

import basinscope
from basinscope.report.tables import (
    FIRST_DRAW_CAVEAT,
    NO_MINIMUM,
    OBSERVABLES,
    against_first_draw,
    chance_note,
    influence_pairs,
    llc_drift,
    llc_error,
    llc_figures,
    llc_notes,
    llc_table,
    numbering,
    observables_notes,
    observables_table,
    partner_figures,
    partner_table,
)
from tests.analysis.stores_random import random_tree


@pytest.mark.parametrize(
    ("rows", "columns", "found"),
    [
        ([0, 1, 2], [0, 1, 2], [(0, 1), (0, 2), (1, 2)]),
        ([5], [0, 2], [(5, 0), (5, 2)]),  # no side holds the other's
        ([2, 1], [1, 3], [(1, 3), (2, 1), (2, 3)]),
    ],
)
def test_every_pair_of_sequences_is_listed_once(
    rows: list[int], columns: list[int], found: list[tuple[int, int]]
) -> None:
    values = np.full((len(rows), len(columns)), 0.5, np.float32)
    influences = xr.Dataset(
        {"influences": (("batch_1", "batch_2"), values)},
        {"batch_1": rows, "batch_2": columns},
        {"observables": {"code": 2, "pile": 4}},
    )
    pairs = influence_pairs(influences, 10)
    assert sorted((pair["batch_1"], pair["batch_2"]) for pair in pairs) == found
    for pair in pairs:
        for side in "12":
            expected = "code" if pair[f"batch_{side}"] < 2 else "pile"
            assert pair[f"observable_{side}"] == expected


def test_partners_are_shown_with_their_tokens() -> None:
    tree = random_tree(1, observables={"code": 3, "pile": 4})
    queries = [(0, 2), (5, 1)]
    found = basinscope.compute_bif(tree, top_k=2, queries=queries).compute()
    ids = found["input_ids"].to_numpy()

    def words(token: int) -> str:
        return f"[t{token}]"

    figures = partner_figures(found, words)
    assert figures["observables"] == {"code": 3, "pile": 4}
    assert figures["query_token"] == [words(ids[at]) for at in queries]
    fields = ("partner_batch", "partner_target_position", "partner_token")
    for batch, position, text in zip(
        *(np.array(figures[name], object).flat for name in fields), strict=True
    ):
        assert text == (words(ids[batch, position]) if batch >= 0 else None)
    assert "query_token" not in partner_figures(found)

    text = shown(partner_table(found, 1, 2, words))
    strongest = found.isel(query=0, sign=0, rank=0)
    at = int(strongest["partner_batch"]), int(strongest["partner_target_position"])
    line = f"{float(strongest['influences']):+.3f}  {at[0]}:{at[1]} {words(ids[at])}"
    assert line in text
    assert f"0:2 {words(ids[0, 2])}" in text
    assert "[t" not in shown(partner_table(found, 1, 2))
    assert "by chance" not in shown(partner_table(found, 2, 2))
    assert chance_note(found) == ""
    assert "by_chance" not in figures
    found["by_chance"] = ("query", [0.123, np.nan])
    assert "±0.123" in shown(partner_table(found, 1, 2))
    assert "nan" not in shown(partner_table(found, 2, 2))
    assert "strongest of as many unrelated" in chance_note(found)
    assert partner_figures(found)["by_chance"][0] == 0.123
    assert numbering(found) == "0 to 2 code, 3 to 6 pile"


def test_an_llc_on_an_observable_says_what_it_is_taken_against() -> None:
    tree = random_tree(1, observables={"[pile]": 3, "mean": 2}, init_losses=True)
    tree.dataset = tree.to_dataset().drop_vars("init_loss_[pile]")
    llc = basinscope.compute_llc(tree).compute()
    names = {"[pile]": "llc_[pile]", "mean_observable": "llc_mean_observable"}
    references = {"[pile]": "first draw", "mean_observable": "checkpoint"}
    figures = llc_figures(llc)
    assert figures["llc_observables_reference"] == references
    assert figures["llc_observables"] == {n: float(llc[v]) for n, v in names.items()}
    assert against_first_draw(llc) == ["[pile]"]
    lines = [line.split("│") for line in shown(observables_table(llc)).splitlines()[3:]]
    assert [[cell.strip() for cell in line] for line in lines] == [
        [name, f"{float(llc[v]):.2f} ± {float(llc[f'{v}_mcse']):.2f}", references[name]]
        for name, v in names.items()
    ]
    errors = {name: float(llc[f"{v}_mcse"]) for name, v in names.items()}
    assert figures["llc_observables_error"] == errors
    assert min(errors.values()) > 0
    assert observables_notes(llc) == [OBSERVABLES, FIRST_DRAW_CAVEAT]


def test_without_observables_there_is_no_table_of_them() -> None:
    llc = basinscope.compute_llc(random_tree(1), observables=[]).compute()
    assert observables_table(llc) is None
    assert observables_notes(llc) == []
    assert llc_figures(llc)["llc_observables_reference"] == {}


@pytest.mark.parametrize("shared", [True, False])
def test_the_spread_of_chains_is_an_error_only_where_each_saw_batches_of_its_own(
    shared: bool,
) -> None:
    tree = with_sampler(random_tree(1), match_sampling_input_ids_across_chains=shared)
    llc = basinscope.compute_llc(tree, burn_in=12).compute()  # 3 steps: too few for an error
    last_line = shown(llc_table(llc)).splitlines()[-1].rstrip()
    values = llc["llc_per_chain"].to_numpy()
    spread = values.std(ddof=1) / np.sqrt(len(values))
    if shared:
        assert np.isnan(llc_error(llc))
        assert last_line.endswith("± nan (too few steps)")
    else:
        assert llc_error(llc) == pytest.approx(spread)
        assert last_line.endswith(f"± {spread:.2f}")


@pytest.mark.parametrize(
    ("burn_in", "said"),
    [
        (0, "Counts 6 burn-in steps of each chain; --burn-in 6 leaves them out."),
        (2, "Counts 4 burn-in steps of each chain; --burn-in 6 leaves them out."),
        (6, "Leaves out the first 6 steps of each chain."),
        (7, "Leaves out the first 7 steps of each chain."),
    ],
)
def test_notes_say_which_steps_of_burn_in_are_counted(burn_in: int, said: str) -> None:
    tree = with_sampler(random_tree(1), num_burnin_steps=6)
    assert llc_notes(basinscope.compute_llc(tree, burn_in=burn_in).compute())[-1] == said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lr": 1e-6, "localization": 100.0}, "= 20,000 steps to forget their start"),
        ({"lr": 1e-3, "localization": 100.0}, None),
        ({"lr": 1e-6, "localization": 0.0}, None),  # nothing pulls back
        ({"lr": 1e-6, "localization": 100.0, "sampling_method": "rmsprop_sgld"}, None),
    ],
)
def test_a_run_too_short_to_arrive_is_named(changes: dict[str, object], said: str | None) -> None:
    """Such chains agree with each other, and noise of their batches hides the drift."""
    settings = {"sampling_method": "sgmcmc_sgld", "num_draws": 40, "num_steps_bw_draws": 1}
    tree = with_sampler(random_tree(1), **{**settings, **changes})
    notes = " ".join(llc_notes(basinscope.compute_llc(tree).compute()))
    assert (said in notes and "these have 40" in notes) if said else "forget" not in notes


@pytest.mark.parametrize(("init_batches", "said"), [(2, True), (40, False)])
def test_too_few_batches_behind_the_loss_at_the_checkpoint_are_named(
    init_batches: int, said: bool
) -> None:
    settings = {"num_draws": 40, "num_init_loss_batches": init_batches}
    tree = with_sampler(random_tree(1, steps=40), **settings)
    of_batches = np.random.default_rng(0).standard_normal((40, 1, 1))  # in both chains
    losses = tree["sampling_loss_micro"] + of_batches
    tree.dataset = tree.to_dataset().assign(sampling_loss_micro=losses)
    notes = " ".join(llc_notes(basinscope.compute_llc(tree).compute()))
    assert ("from the batches of 2 steps: num_init_loss_batches=40 would" in notes) is said
    assert ("Most of ±" in notes) is said


def test_without_burn_in_and_without_single_steps_nothing_is_said_of_it() -> None:
    tree = with_sampler(random_tree(1), num_burnin_steps=6)
    tree.dataset = tree.to_dataset().drop_vars("sampling_loss_micro")  # draws follow the burn-in
    for given in (tree, random_tree(1)):
        notes = llc_notes(basinscope.compute_llc(given).compute())
        assert len(notes) == 2
        assert "drift" in notes[0]


def test_a_negative_llc_is_said_to_be_none() -> None:
    """Beyond three standard errors; nothing is said where there is no error."""
    llc = basinscope.compute_llc(random_tree(1)).compute()
    for value, error, said in ((-3.1, 1.0, True), (-2.9, 1.0, False), (-9.0, np.nan, False)):
        notes = llc_notes(llc.assign(llc_mean=value, llc_mcse=error))
        assert (NO_MINIMUM in notes) == said


def test_drift_is_the_llc_of_the_second_half_minus_that_of_the_first() -> None:
    llc = basinscope.compute_llc(random_tree(1, steps=20)).compute()
    trace = llc["loss_trace"].to_numpy()
    expected = 10 * (trace[:, 10:].mean() - trace[:, :10].mean())
    figures = llc_figures(llc)
    assert figures["llc_drift"] == llc_drift(llc)[0] == pytest.approx(expected)
    assert f"drift {expected:+.2f} ± {figures['llc_drift_error']:.2f}" in llc_notes(llc)[0]
    longer = llc.pad(step=(0, 4))
    longer["loss_trace"][0, 20:] = 9  # one chain is ahead
    assert llc_drift(longer) == llc_drift(llc)
    assert np.isnan(llc_drift(llc.isel(step=[0]))).all()


@pytest.mark.parametrize("chains", [1, 4])
def test_the_error_of_a_drift_knows_the_noise_of_batches(chains: int) -> None:
    """The mean square of 200 drifts over their errors is 1 ± 0.1; 4.5 of these are allowed."""
    scores = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        trace = rng.standard_normal(60) + 0.5 * rng.standard_normal((chains, 60))
        llc = xr.Dataset({"loss_trace": (("chain", "step"), trace), "n_beta": 30.0})
        drift, error = llc_drift(llc)
        scores.append(drift / error)
    assert np.mean(np.square(scores)) == pytest.approx(1, abs=0.45)


def with_sampler(tree: xr.DataTree, **settings: object) -> xr.DataTree:
    tree.attrs["metadata"]["config"]["sampler"].update(settings)
    return tree


def shown(table: Table | None) -> str:
    console = Console(width=100)
    with console.capture() as captured:
        console.print(table)
    return captured.get()
