"""Pages: whole, on their own, and with the numbers they were given."""

from __future__ import annotations

import base64
import re
from html import escape
from pathlib import Path

import numpy as np
import pytest

import basinscope
from basinscope.analysis.llc import compute_llc
from basinscope.report.influence_page import CONTEXT, PASSAGES, QUERIES, influence_page
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
    error = float(llc["llc_mean_observable_mcse"])
    value = f"{float(llc['llc_mean_observable']):.2f} ± {error:.2f}"
    assert f"<td>mean_observable</td><td>checkpoint</td><td>{value}</td>" in page
    assert escape(OBSERVABLES) in page
    assert f"{float(llc['llc_mean']):.3f} ± {float(llc['llc_mcse']):.3f}" in page
    assert "Leaves out the first 3 steps of each chain." in page
    whole = samples_page(tree, tmp_path / "b.html", "s").read_text()
    assert not set(SOURCE.findall(page)) & set(SOURCE.findall(whole))
    shift = base64.b64decode(SOURCE.findall(page)[-1].partition(",")[2]).decode()
    assert "mean of the draws after step 3 minus the checkpoint" in shift


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


MARKED = re.compile(r'<span style="([^"]*)"(?: title="(\d+): ([+-][\d.]+)")?>([^<]*)</span>')


def test_partners_are_coloured_where_they_stand(tmp_path: Path) -> None:
    tree = random_tree(1, observables={"code": 6, "pile": 7}, tokens=100)
    queries = [(0, 2), (12, 70)]
    found = basinscope.compute_bif(tree, top_k=9, queries=queries).compute()
    ids = found["input_ids"].to_numpy()
    path = influence_page(tmp_path / "a.html", found, {"store": "<s>"}, "<{}> ".format)
    head, *sections = path.read_text().split("<section>")
    assert "&lt;s&gt;" in head
    assert "<s>" not in head
    for number, (section_, at) in enumerate(zip(sections, queries, strict=True)):
        asked, *passages = section_.split("<h3>")
        assert f"Query {at[0]}:{at[1]}<" in asked
        assert escape(f"<{ids[at]}> ") in asked
        one = found.isel(query=number)
        fields = ("partner_batch", "partner_target_position", "influences")
        listed = zip(*(one[name].to_numpy().ravel().tolist() for name in fields), strict=True)
        by_strength = sorted(listed, key=lambda partner: -abs(partner[2]))
        batches = list(dict.fromkeys(batch for batch, _, _ in by_strength))
        assert len(passages) == min(PASSAGES, len(batches))
        for passage, batch in zip(passages, batches, strict=False):
            mine = {position: value for b, position, value in by_strength if b == batch}
            about = next(iter(mine))
            assert passage.startswith(f"{batch}:{about} {mine[about]:+.3f}</h3>")
            near = {p: v for p, v in mine.items() if abs(p - about) <= CONTEXT}
            marks = MARKED.findall(passage)
            seen = {int(p): (style, float(v), text) for style, p, v, text in marks}
            assert seen.keys() == near.keys()
            for position, (style, value, text) in seen.items():
                assert value == pytest.approx(near[position], abs=6e-4)
                assert ("230, 159, 0" in style) == (value > 0)
                assert ("underline" in style) == (position == about)
                assert text == escape(f"<{ids[batch, position]}> ")
            shade = abs(mine[about]) / abs(by_strength[0][2])
            assert f", {shade:.2f})" in seen[about][0]
            assert passage.count("…") == (about > CONTEXT) + (about + CONTEXT + 1 < ids.shape[1])


def test_partners_that_chance_reaches_are_not_coloured(tmp_path: Path) -> None:
    tree = random_tree(1, observables={"code": 6, "pile": 7}, tokens=20, chains=4)
    queries = [(0, 2), (12, 7), (3, 3)]
    found = basinscope.compute_bif(tree, top_k=9, queries=queries).compute()
    strongest = np.abs(found["influences"].values).max(axis=(0, 2))
    middle = float(np.median(np.abs(found["influences"].values[:, 0])))
    found["by_chance"] = ("query", [middle, strongest[1] + 0.01, np.nan])
    path = influence_page(tmp_path / "a.html", found, {}, "<{}> ".format)
    first, second, unknown = path.read_text().split("<section>")[1:]
    shown = [abs(float(value)) for _, _, value, _ in MARKED.findall(first) if value]
    assert f"unrelated tokens reaches ±{middle:.3f}.<" in first
    assert shown
    assert min(shown) >= middle - 1e-3
    assert "None of the partners is beyond that." in second
    assert "<h3>" not in second
    assert "unrelated" not in unknown
    assert "<h3>" in unknown


def test_tokens_that_cannot_be_seen_are_shown(tmp_path: Path) -> None:
    found = basinscope.compute_bif(random_tree(1), top_k=1, queries=[(0, 1)]).compute()
    nul = influence_page(tmp_path / "a.html", found, {}, lambda _: "\0").read_text()
    assert "\0" not in nul
    assert "\\x00" in nul
    lines = influence_page(tmp_path / "b.html", found, {}, lambda _: "\n").read_text()
    assert "underline;" in lines
    assert ">↵\n</span>" in lines


def test_a_page_shows_no_more_queries_than_can_be_read(tmp_path: Path) -> None:
    tree = random_tree(1, observables={"code": 2}, tokens=QUERIES)
    found = basinscope.compute_bif(tree, top_k=1).compute()
    page = influence_page(tmp_path / "a.html", found, {}, str).read_text()
    assert page.count("<section>") == QUERIES
    assert f"the first {QUERIES} of {2 * QUERIES} queries" in page


def test_a_query_without_partners_is_shown_alone(tmp_path: Path) -> None:
    tree = random_tree(1, observables={"code": 2})
    tree.dataset = tree.to_dataset().assign(loss_code=tree["loss_code"] * 0)
    found = basinscope.compute_bif(tree, top_k=3, queries=[(0, 1)]).compute()
    page = influence_page(tmp_path / "a.html", found, {}, str).read_text()
    assert "Query 0:1" in page
    assert "<h3>" not in page.partition("<main>")[2]
