"""Figures and page show what the store answers, and the page needs nothing but itself."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from basinscope.analysis.attribution import AttributionStore
from basinscope.io.attributions import AttributionWriter
from basinscope.io.attributions_layout import METRICS
from basinscope.report.attribution_figures import (
    BLUE,
    VERMILION,
    layer_heat_map,
    signed_bars,
    strongest,
)
from basinscope.report.attribution_page import attribution_page
from tests.io.attributions_random import (
    count_shapes,
    metadata_of,
    random_store,
    random_sums,
    shapes_of,
)


class Odd:
    """A tokenizer of texts that figures and HTML must not read as their own."""

    def decode(self, ids: list[int]) -> str:
        return [" the", "$x^2$", "<script>alert(1)</script>", "日本", "\n"][ids[0] % 5]


@pytest.fixture
def store(tmp_path: Path) -> AttributionStore:
    return AttributionStore(random_store(tmp_path / "s.zarr"), Odd())


@pytest.mark.parametrize("metric", METRICS)
def test_bars_are_the_strongest_of_both_signs_sorted(store: AttributionStore, metric: str) -> None:
    figure = signed_bars(store, "0.mlp.up:2", k=5, metric=metric)
    assert [axes.get_title("left") for axes in figure.axes] == ["sources", "targets"]
    every = {
        "sources": store.top_sources("0.mlp.up:2", 100, metric=metric),
        "targets": store.top_targets("0.mlp.up:2", 100, metric=metric),
    }
    if metric != "mean_squared_attr":
        every["sources"] += store.top_sources("0.mlp.up:2", 100, "negative", metric)
        every["targets"] += store.top_targets("0.mlp.up:2", 100, "negative", metric)
    for axes in figure.axes:
        entries = sorted(every[axes.get_title("left")], key=lambda e: -abs(e.value))[:5]
        entries.sort(key=lambda entry: -entry.value)
        np.testing.assert_allclose(
            [bar.get_width() for bar in axes.patches], [e.value for e in entries]
        )
        for bar in axes.patches:
            expected = BLUE if bar.get_width() > 0 else VERMILION
            assert to_hex(bar.get_facecolor()).upper() == expected
        labels = [label.get_text() for label in axes.get_yticklabels()]
        assert all(label.endswith(e.key) for label, e in zip(labels, entries, strict=True))
    assert metric in drawn_text(figure)


def test_embed_has_no_sources_and_output_no_targets(store: AttributionStore) -> None:
    assert set(strongest(store, "embed:3", k=2, metric="attr", normalize=None)) == {"targets"}
    assert set(strongest(store, "output:3", k=2, metric="attr", normalize=None)) == {"sources"}
    assert len(signed_bars(store, "output:3").axes) == 1
    with pytest.raises(ValueError, match="not harvested"):
        signed_bars(store, "output:3", metric="attr_abs")
    with pytest.raises(ValueError, match="no layer of this store"):
        signed_bars(store, "9.mlp.up:3")


def test_the_edges_of_a_store_decide_the_sides(tmp_path: Path) -> None:
    store = AttributionStore(narrow_store(tmp_path / "s.zarr"))
    only_target, only_source, neither = "1.mlp.up:2", "0.mlp.up:2", "0.attn.q:2"
    for key, side in ((only_target, "sources"), (only_source, "targets")):
        found = strongest(store, key, k=3, metric="attr", normalize=None)
        assert list(found) == [side]
        assert found[side]
        assert [axes.get_title("left") for axes in signed_bars(store, key).axes] == [side]
    page = attribution_page(store, tmp_path / "page.html", [only_target, only_source])
    assert page.read_text().count("<section>") == 3
    with pytest.raises(
        ValueError, match=r"'0\.attn\.q' is neither source nor target of this store"
    ):
        attribution_page(store, tmp_path / "no.html", [neither])
    message = r"'x' is no layer of this store: its sources are 0\.mlp\.up, its targets 1\.mlp\.up"
    with pytest.raises(ValueError, match=message):
        signed_bars(store, "x:0")
    with pytest.raises(ValueError, match=r"no layer of this store: did you mean 1\.mlp\.up or"):
        signed_bars(store, "1.mpl.up:0")
    assert not (tmp_path / "no.html").exists()


def narrow_store(path: Path) -> Path:
    """A store of one edge, 0.mlp.up to 1.mlp.up, of a harvest that knew all layers."""
    edges = [("1.mlp.up", "0.mlp.up")]
    sums, counts = random_sums(np.random.default_rng(3), edges=edges)
    with AttributionWriter.create_or_continue(
        path, metadata=metadata_of(), edges=shapes_of(edges), counts=count_shapes()
    ) as writer:
        writer.save(sums, counts, tokens=100, batches_done=3)
        writer.finish()
    return path


def test_labels_name_what_values_are_divided_by(store: AttributionStore, tmp_path: Path) -> None:
    measures = ("source_count", "target_rms")
    figure = signed_bars(store, "embed:1", metric="mean_squared_attr", normalize=measures)
    assert "/ source's share of active tokens" in drawn_text(figure)
    assert "/ target's mean square" in drawn_text(figure)
    figure.savefig(tmp_path / "f.png")
    summary = store.summary(normalize="target_rms")
    assert "/ target's RMS" in drawn_text(layer_heat_map(summary, normalize="target_rms"))


def test_the_heat_map_is_the_summary(store: AttributionStore) -> None:
    summary = store.summary("attr_abs")
    figure = layer_heat_map(summary)
    axes = figure.axes[0]
    (image,) = axes.images
    shown = np.ma.filled(image.get_array().astype(float), np.nan)
    np.testing.assert_array_equal(shown, summary.values)
    assert [t.get_text() for t in axes.get_xticklabels()] == list(summary.source_layer.values)
    assert [t.get_text() for t in axes.get_yticklabels()] == list(summary.target_layer.values)
    assert len(axes.texts) == int(np.isfinite(summary.values).sum())


def test_a_heat_map_of_zeros_and_of_one_edge_is_drawn(
    store: AttributionStore, tmp_path: Path
) -> None:
    summary = store.summary()
    for values in (summary * 0, summary.isel(target_layer=[0], source_layer=[0])):
        layer_heat_map(values.rename("attr")).savefig(tmp_path / "f.png")


def test_the_page_is_whole_and_takes_nothing_from_elsewhere(
    store: AttributionStore, tmp_path: Path
) -> None:
    keys = ["0.mlp.up:2", "embed:2", "output:3", "output:9"]
    page = attribution_page(store, tmp_path / "new" / "page.html", keys, k=4)
    text = page.read_text(encoding="utf-8")
    parsed = Elements()
    parsed.feed(text)
    sources = [value for name, value in parsed.attributes if name in ("src", "href")]
    assert sources
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert "<script>alert" not in text
    assert "&lt;script&gt;" in text
    for source in sources:
        svg = base64.b64decode(source.partition(",")[2]).decode()
        assert svg.startswith("<?xml")
        assert "<script" not in svg
    assert parsed.tags.count("section") == 1 + len(keys)
    assert len(sources) == 3 * (1 + len(keys)) - 2  # two metrics of output:3 were not harvested
    assert text.count("harvest with output_tokens=[3]") == 2
    radios = re.findall(r'type="radio" name="shown" value="(\w+)"( checked)?', text)
    assert radios == [("attr", " checked"), ("attr_abs", ""), ("mean_squared_attr", "")]
    for entries in strongest(store, "0.mlp.up:2", k=4, metric="attr_abs", normalize=None).values():
        for entry in entries:
            assert f"<td>{entry.key}</td>" in text
            assert f"<td>{entry.value:+.6g}</td>" in text
    assert "100 in 3 batches" in text


def test_a_page_is_not_begun_for_what_is_no_component(
    store: AttributionStore, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="out of range"):
        attribution_page(store, tmp_path / "page.html", ["0.mlp.up:2", "0.mlp.up:99"])
    assert not (tmp_path / "page.html").exists()


class Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]


def drawn_text(figure: Figure) -> str:
    from matplotlib.text import Text

    return " ".join(text.get_text() for text in figure.findobj(Text))
