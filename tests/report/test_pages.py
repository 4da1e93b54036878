"""Pages: whole, on their own, and with the numbers they were given."""

from __future__ import annotations

import base64
import re
from html import escape
from pathlib import Path

import pytest

from basinscope.analysis.llc import compute_llc
from basinscope.report.lens_page import lens_page
from basinscope.report.page import section, table, write_page
from basinscope.report.samples_page import samples_page
from basinscope.report.tables import OBSERVABLES, llc_figures, llc_notes
from tests.analysis.stores_random import random_tree
from tests.report.test_figures import small_tree
from tests.report.test_lens_figures import WORDS, measures, top

SOURCE = re.compile(r'(?:src|href)="([^"]*)"')


def test_what_a_page_is_given_is_text_and_no_markup(tmp_path: Path) -> None:
    content = table("<b>", [("<i>", "1")])
    path = write_page(tmp_path / "a.html", "<u>", {"<s>": "<q>"}, [section("<em>", content)])
    page = path.read_text()
    for tag in ("<b>", "<i>", "<u>", "<s>", "<q>", "<em>"):
        assert tag not in page
        assert tag.replace("<", "&lt;").replace(">", "&gt;") in page
    assert "fieldset>" not in page.partition("<body>")[2]


def test_a_page_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "a.html"
    path.write_text("mine")
    with pytest.raises(FileExistsError, match="left as it is: choose another name"):
        write_page(path, "title", {}, [])
    with pytest.raises(FileExistsError, match="left as it is"):
        samples_page(small_tree(), path, "store")
    assert path.read_text() == "mine"


def test_a_home_is_expanded_and_a_place_below_a_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert write_page("~/a.html", "title", {}, []) == tmp_path / "a.html"
    with pytest.raises(FileExistsError, match="left as it is"):
        samples_page(small_tree(), "~/a.html", "store")
    with pytest.raises(NotADirectoryError, match=r"a\.html is no directory"):
        write_page("~/a.html/b.html", "title", {}, [])
    with pytest.raises(TypeError, match="expected the path of a page or picture"):
        write_page(3, "title", {}, [])  # type: ignore[arg-type]


def test_a_page_about_samples_has_the_llc_and_the_figures(tmp_path: Path) -> None:
    tree = small_tree()
    page = samples_page(tree, tmp_path / "new" / "a.html", "runs/s.zarr").read_text()
    llc = compute_llc(tree).compute()
    figures = llc_figures(llc)
    assert f"{figures['llc_mean']:.3f} ± {figures['llc_error']:.3f}" in page
    for value in llc["llc_per_chain"].to_numpy():
        assert f"<td>{value:.3f}</td>" in page
    for note in llc_notes(llc):
        assert note in page
    assert "runs/s.zarr" in page
    sources = SOURCE.findall(page)
    assert len(sources) == 3
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)


def test_a_page_about_samples_has_the_llc_on_observables(tmp_path: Path) -> None:
    tree = random_tree(1, observables={"mean": 3}, init_losses=True)
    page = samples_page(tree, tmp_path / "a.html", "s", burn_in=3).read_text()
    llc = compute_llc(tree, burn_in=3).compute()
    value = f"{float(llc['llc_mean_observable']):.2f}"
    assert f"<td>mean_observable</td><td>checkpoint</td><td>{value}</td>" in page
    assert escape(OBSERVABLES) in page
    assert f"{float(llc['llc_mean']):.3f} ± {float(llc['llc_mcse']):.3f}" in page
    assert "Leaves out the first 3 steps of each chain." in page


def test_a_page_without_observables_says_nothing_of_them(tmp_path: Path) -> None:
    tree = random_tree(1)
    tree.dataset = tree.to_dataset().drop_vars(["loss_a", "loss_b"])
    page = samples_page(tree, tmp_path / "a.html", "s", burn_in=12).read_text()
    assert "On observables" not in page
    assert "± nan (too few steps)" in page


def test_a_page_of_a_lens_has_a_picture_for_each_measure_and_part(tmp_path: Path) -> None:
    found, measured = top(), measures()
    path = tmp_path / "a.html"
    page = lens_page(path, found, measured, {"store": "s"}, words=lambda i: WORDS[i]).read_text()
    choices = re.findall(r'type="radio" name="shown" value="(\w+)"', page)
    assert choices == ["probability", "logit", "entropy", "kl_to_final", "cross_entropy", "rank"]
    assert page.count("<section>") == 2
    sources = SOURCE.findall(page)
    assert len(sources) == 2 * len(choices)
    svg = base64.b64decode(sources[0].partition(",")[2]).decode()
    assert svg.startswith("<?xml")
    for choice in choices:
        assert f'body[data-shown="{choice}"] .{choice}' in page

    longer = top(40)
    measured = measured.isel(position=[0] * 40)
    more = lens_page(tmp_path / "b.html", longer, measured, {}).read_text()
    assert len(SOURCE.findall(more)) == 2 * len(choices) * 3
