"""``basinscope compare``: what it prints, writes and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import basinscope
from basinscope.cli import app
from basinscope.cli_compare import parse_runs
from tests.analysis.stores_random import random_tree, write_tree


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for step in (5, 200, 30):
        write_tree(random_tree(step), tmp_path / f"step_{step}.zarr")
    return tmp_path


def test_runs_are_shown_in_the_order_of_their_numbers(folder: Path) -> None:
    stores = {step: folder / f"step_{step}.zarr" for step in (5, 30, 200)}
    expected = basinscope.compare_llc(stores, burn_in=2).compute()
    arguments = ["compare", *map(str, sorted(folder.iterdir())), "--burn-in", "2"]
    shown = CliRunner().invoke(app, [*arguments, "--json"])
    assert shown.exit_code == 0, shown.output
    records = json.loads(shown.stdout)
    assert [record["run"] for record in records] == [5, 30, 200]
    assert [record["llc"] for record in records] == expected["llc_mean"].values.tolist()
    assert [record["change"] for record in records] == [
        None, *(float(expected["difference"][n, n - 1]) for n in (1, 2))
    ]  # fmt: skip
    assert [record["change_error"] for record in records][1:] == [
        float(expected["difference_mcse"][n, n - 1]) for n in (1, 2)
    ]
    table = CliRunner().invoke(app, [*arguments, "--png", str(folder / "new" / "llc.png")])
    assert table.exit_code == 0, table.output
    assert max(map(len, table.stdout.partition("written to")[0].splitlines())) <= 80
    first = records[1]
    assert f"{first['llc']:.2f} ± {first['llc_error']:.2f}" in table.stdout
    assert f"{first['change']:+.2f} ± {first['change_error']:.2f} *" in table.stdout
    assert "did not see the same batches" in table.stdout
    assert (folder / "new" / "llc.png").read_bytes()[:4] == b"\x89PNG"


def test_what_it_is_not_for_is_refused(folder: Path) -> None:
    one = str(folder / "step_5.zarr")
    picture = folder / "taken.png"
    picture.write_text("mine")
    for arguments, said in (
        ([one], "step_5 is too little to compare: give two runs"),
        ([one, one], "run step_5 is given twice: give other names, NAME=STORE"),
        ([one, str(folder / "step_30.zarr"), "--png", "llc.pdf"], "a name that ends in .png"),
        ([f"a={one}", one], "give every store as NAME=STORE, or none"),
        ([one, str(folder / "step_30.zarr"), "--png", str(picture)], "is left as it is"),
        ([one, str(folder / "nothing.zarr")], "nothing.zarr"),
    ):
        refused = CliRunner().invoke(app, ["compare", *arguments])
        assert refused.exit_code == 2, refused.output
        assert said in " ".join(refused.output.split())
    assert picture.read_text() == "mine"


def test_what_stands_in_names_is_shown_as_it_is(tmp_path: Path) -> None:
    """Markup, formulas, paths with an equals sign; and runs too short for an error."""
    stores = [tmp_path / "lr=0.1" / f"{name}.zarr" for name in ("[bold]a", "b[x]$_")]
    for seed, store in enumerate(stores):
        write_tree(random_tree(seed, steps=6), store)
    picture = tmp_path / "[red]llc.png"
    arguments = ["compare", *map(str, stores), "--png", str(picture)]
    shown = CliRunner().invoke(app, arguments, env={"COLUMNS": "80"})
    assert shown.exit_code == 0, shown.output
    assert picture.exists()
    for text in ("[bold]a", "b[x]$_", "R-hat", "± ?", "? Too few steps", "[red]llc.png"):
        assert text in shown.stdout


@pytest.mark.parametrize(
    ("stores", "names"),
    [
        (["a/step_200.zarr", "b/step_1000.zarr", "step_0.zarr"], [0, 200, 1000]),
        (["b.zarr", "a.zarr"], ["b", "a"]),
        (["s1_full.zarr", "s2_l0.zarr"], ["s1_full", "s2_l0"]),
        (["s_1.zarr", "s_01.zarr"], ["s_1", "s_01"]),
        (["20=x.zarr", "3=y.zarr"], [3, 20]),
        (["v1=x.zarr", "v0=y.zarr"], ["v1", "v0"]),
        (["x1y2.zarr", "x1y3.zarr"], ["x1y2", "x1y3"]),
    ],
)
def test_runs_are_named_by_the_number_they_differ_in(
    stores: list[str], names: list[str | int]
) -> None:
    assert list(parse_runs(stores)) == names
