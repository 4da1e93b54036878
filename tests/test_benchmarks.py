"""The benchmarks run, at their smallest size, and the harness computes what it says."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import basinscope
from basinscope import demo
from benchmarks import (
    analysis,
    attribution,
    extraction,
    harness,
    kernels,
    layers,
    precision,
    restrictions,
    restrictions_memory,
    sampling,
    store,
    summary,
)


@pytest.mark.peer
def test_sampling_benchmark_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "sampling.jsonl"
    command = ["sampling", "--toy", "--rounds", "1", "--no-memory", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    sampling.main()
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["metrics"] for line in lines] == [False, True]
    for line in lines:
        assert line["ratio"] == pytest.approx(line["peer_s"] / line["ours_s"], rel=0.05)
        assert line["versions"]["devinterp"] == "2.0.1"


@pytest.mark.peer
def test_restrictions_benchmark_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "restrictions.jsonl"
    command = ["restrictions", "--toy", "--rounds", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    restrictions.main()
    line = json.loads(out.read_text())
    assert line["ratio"] == pytest.approx(line["peer_s"] / line["ours_s"], rel=0.05)


def test_more_restrictions_take_no_more_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "memory.jsonl"
    command = ["restrictions_memory", "--toy", "--rounds", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    restrictions_memory.main()
    line = json.loads(out.read_text())
    assert line["ratio"] == pytest.approx(line["many_mib"] / line["one_mib"], rel=0.01)
    assert line["ratio"] < 1.3


def test_there_are_64_restrictions_of_the_demos_model() -> None:
    from basinscope.demo import FULL, build_model

    model = build_model(FULL)
    named = list(restrictions_memory.named_restrictions(model).values())
    selected = [basinscope.create_param_masks(model, wanted) for wanted in named[:64]]
    assert len(selected) == 64
    assert named[23:25] == [["l0h0", "l0h1"], ["l0h0", "l0h2"]]


def test_attribution_benchmark_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "attribution.jsonl"
    command = ["attribution", "--toy", "--rounds", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    attribution.main()
    line = json.loads(out.read_text())
    assert line["targets"] == 5 * 16 + 64 + 16
    assert line["ratio"] == pytest.approx(line["peer_s"] / line["ours_s"], rel=0.05)


@pytest.fixture
def library_read_once(library_texts: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the benchmarks of real text what is at hand."""
    monkeypatch.setattr(demo, "standard_library_texts", lambda: library_texts)


@pytest.mark.usefixtures("library_read_once")
def test_extraction_benchmark_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "extraction.jsonl"
    monkeypatch.setattr(sys, "argv", ["extraction", "--toy", "--rounds", "1", "--out", str(out)])
    extraction.main()
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["benchmark"].split()[1] for line in lines] == [
        *["hooks"] * 2,
        *["lengths"] * 2,
        "memory",
    ]
    assert {line["rows_per_pass"] for line in lines[2:4]} == {rows_per_pass("toy")}


def rows_per_pass(size: str) -> float:
    """Rows of one length fill batches; one row runs before, to see how much each gives."""
    counts = Counter(map(len, extraction.some_texts(size)["input_ids"]))
    batch = sampling.SIZES[size]["batch"]
    passes = 1 + sum(-(-count // batch) for count in counts.values())
    return round(sum(counts.values()) / passes, 2)


def test_bfloat16_weights_diffuse_as_documented() -> None:
    """Standard error of a variance of 4000 elements: 2.2%."""
    lost, kept = precision.diffusion(0.1, 16, 4000), precision.diffusion(4.0, 16, 4000)
    assert lost["nearest_variance_ratio"] == 0.0
    assert lost["stochastic_variance_ratio"] == pytest.approx(8.0, rel=0.15)
    assert kept["nearest_variance_ratio"] == pytest.approx(1.0, abs=0.1)


@pytest.mark.peer
@pytest.mark.usefixtures("library_read_once")
def test_stores_are_smaller_than_the_peers() -> None:
    figures = store.measure(store.TOY)
    assert figures["losses_ratio"] <= 0.88
    assert figures["ids_ratio"] <= 0.1
    assert figures["stall_share"] <= 0.02


@pytest.mark.peer
def test_analysis_benchmark_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "analysis.jsonl"
    command = ["analysis", "--toy", "--rounds", "1", "--limit", "64MB", "--out", str(out)]
    monkeypatch.setattr(analysis, "TURN_SECONDS", 0.01)
    monkeypatch.setattr(sys, "argv", command)
    analysis.main()
    found = {line["benchmark"]: line for line in map(json.loads, out.read_text().splitlines())}
    token = found["analysis token influence, from disk"]
    assert token["ratio"] == pytest.approx(token["peer_s"] / token["ours_s"], rel=0.2)
    large = [line for name, line in found.items() if "out of core" in name]
    assert len(large) == len(analysis.ANALYSES)
    assert all(line["within"] for line in large)


@pytest.mark.peer
def test_kernels_benchmark_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "kernels.jsonl"
    command = ["kernels", "--toy", "--rounds", "1", "--no-memory", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    assert kernels.main() == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    for part in kernels.PARTS:
        found = [line for line in lines if line["benchmark"] == f"kernels {part}"]
        assert {line["dtype"] for line in found} == {"float32", "bfloat16"}
        assert {"devinterp"} < {line["peer"] for line in found}
        for line in found:
            assert line["ratio"] == pytest.approx(line["peer_s"] / line["ours_s"], rel=0.01)
            assert line["floor_share"] == pytest.approx(line["floor_s"] / line["ours_s"], rel=0.01)


def test_layers_benchmark_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "layers.jsonl"
    monkeypatch.setattr(sys, "argv", ["layers", "--toy", "--rounds", "1", "--out", str(out)])
    layers.main()
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert {line["threads"] for line in lines} == {1, torch.get_num_threads()}
    assert all(max(line["ours_error"], line["peer_error"]) < 1e-6 for line in lines)


@pytest.mark.peer
def test_kernels_benchmark_measures_memory_of_one_call() -> None:
    for who in ("baseline", "basinscope", "devinterp"):
        assert kernels.run_once(who, "toy", "float32") > 2**26


def test_kernels_benchmark_refuses_a_wrong_update() -> None:
    problem = kernels.make_problem("toy", "cpu", torch.float32)

    def scaled(problem: kernels.Problem, variant: str, noise_level: float) -> kernels.Chain:
        return kernels.our_chain(problem, variant, 2 * noise_level)

    def shifted(problem: kernels.Problem, variant: str, noise_level: float) -> kernels.Chain:
        chain = kernels.our_chain(problem, variant, noise_level)
        chain.weights[0].flatten()[0] += 1e-3
        return chain

    assert kernels.check_update(kernels.our_chain, problem, "metrics")
    for wrong, message in ((scaled, "variance"), (shifted, "steps differ")):
        with pytest.raises(kernels.DisagreementError, match=message):
            kernels.check_update(wrong, problem, "plain")


def test_kernels_benchmark_sees_gradients_that_ignore_which_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_the_mean(hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        losses = kernels.our_head(hidden, weight, ids)
        return losses.detach() + losses.mean() - losses.mean().detach()

    heads = {"basinscope": kernels.our_head, "mean": of_the_mean, "same": kernels.our_head}
    monkeypatch.setattr(kernels, "HEAD_LOSSES", heads)
    out = tmp_path / "kernels.jsonl"
    bench = kernels.Bench("cpu", rounds=1, toy=True, memory=False, out=out)
    kernels.compare_heads(bench, "toy", torch.float32)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert {line["peer"]: line["peer_wrong_per_token"] for line in lines} == {
        "mean": True,
        "same": False,
    }


def test_the_page_of_results_is_that_of_the_lines() -> None:
    page = summary.RESULTS / "README.md"
    assert page.read_text() == summary.summary(summary.RESULTS), (
        "run python -m benchmarks.summary --write"
    )


def test_the_page_of_results_shows_the_latest_beside_all(tmp_path: Path) -> None:
    path = tmp_path / "walks.jsonl"
    for size, ratio in (("small", 2.0), ("large", 7.0), ("small", 3.25)):
        figures = {"ratio": ratio, "ratio_quartiles": [ratio - 1, ratio + 1], "peer_s": 1e-3}
        harness.record(path, "walks uphill", {"size": size}, figures)
    harness.record(tmp_path / "bytes.jsonl", "bytes", {"size": "full"}, {"ratio": 0.5})
    page = summary.summary(tmp_path)
    rows = [[cell.strip() for cell in line.split("|")] for line in page.splitlines() if "|" in line]
    found = {(row[1], row[2]): row[3:6] for row in rows}
    assert found["uphill", "size small"] == [
        "**3.25** (2.25 to 4.25)",
        "2: 2 to 3.25",
        "peer_s 0.001",
    ]
    assert found["uphill", "size large"][:2] == ["**7** (6 to 8)", "1"]
    assert found["bytes", "size full"] == ["", "1", "ratio 0.5"]  # not of seconds


def test_paired_reports_peer_over_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 10.0, 13.0, 20.0, 22.0, 30.0, 38.0, 40.0, 41.0, 50.0, 55.0])
    monkeypatch.setattr(harness.time, "perf_counter", lambda: next(clock))
    figures = harness.paired(lambda: None, lambda: None, rounds=3, warmup=False)
    assert figures["ratio"] == 4.0  # of 3/1, 8/2 and 5/1
    assert figures["ratio_range"] == [3.0, 5.0]
    assert (figures["ours_s"], figures["peer_s"]) == (1.0, 5.0)


def test_peak_memory_sees_what_a_process_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hungry.py").write_text("block = bytearray(300 * 2**20)\n")
    (tmp_path / "modest.py").write_text("block = bytearray(2**20)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    extra = harness.peak_memory("hungry") - harness.peak_memory("modest")
    assert 280 * 2**20 < extra < 320 * 2**20
