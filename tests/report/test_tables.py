"""What tables say of results."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from rich.console import Console

import basinscope
from basinscope.report.tables import (
    against_first_draw,
    influence_pairs,
    llc_figures,
    observables_table,
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
        {"influences": (("batch_1", "batch_2"), values)}, {"batch_1": rows, "batch_2": columns}
    )
    pairs = influence_pairs(influences, 10)
    assert sorted((pair["batch_1"], pair["batch_2"]) for pair in pairs) == found


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
    console = Console(width=100)
    with console.capture() as shown:
        console.print(observables_table(llc))
    lines = [line.split("│") for line in shown.get().splitlines()[3:]]
    assert [[cell.strip() for cell in line] for line in lines] == [
        [name, f"{float(llc[variable]):.2f}", references[name]] for name, variable in names.items()
    ]


def test_without_observables_there_is_no_table_of_them() -> None:
    llc = basinscope.compute_llc(random_tree(1), observables=[]).compute()
    assert observables_table(llc) is None
    assert llc_figures(llc)["llc_observables_reference"] == {}
