"""Merging: any split, order and nesting is the single run; what does not belong is refused."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from basinscope.io.attributions import AttributionWriter, StoredAttributions, open_attributions
from basinscope.io.attributions_layout import METRICS, Counts, Sums
from basinscope.io.attributions_merge import merge_attributions
from tests.io.attributions_random import (
    EDGES,
    count_shapes,
    metadata_of,
    new_writer,
    random_store,
    random_sums,
    shapes_of,
    unembedding,
)

BATCHES = 12
FEW = EDGES[-3:]


@settings(max_examples=8, deadline=None)
@given(
    world=st.sampled_from([1, 2, 3, 7]),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_any_split_order_and_nesting_is_the_single_run(
    world: int, seed: int, data: st.DataObject
) -> None:
    """To 1e-12 of the sum of magnitudes, which is what float64 sums of 12 numbers keep."""
    rng = np.random.default_rng(seed)
    batches = [random_sums(rng, 50, FEW) for _ in range(BATCHES)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for rank in range(world):
            write_batches(folder / f"{rank}.zarr", batches, rank, world)
        waiting = [folder / f"{rank}.zarr" for rank in range(world)]
        step = 0
        while len(waiting) > 1 or step == 0:
            order = data.draw(st.permutations(waiting))
            count = data.draw(st.integers(1 if step == 0 else 2, len(order)))
            merged = folder / f"merged {step}.zarr"
            merge_attributions(order[:count], merged, allow_missing=True)
            waiting, step = [*order[count:], merged], step + 1
        result = StoredAttributions(waiting[0])
        assert result.metadata["parts"] == [[rank, world] for rank in range(world)]
        assert result.metadata["batches"] == BATCHES
        assert result.metadata["tokens"] == 10 * BATCHES
        assert result.completed
        for metric in METRICS:
            for edge in FEW:
                every = np.stack([sums[metric][edge] for sums, _ in batches])
                found = np.asarray(result.sums(metric, *edge))
                assert (np.abs(found - every.sum(0)) <= 1e-12 * np.abs(every).sum(0)).all()
        for layer, counts in batches[0][1].items():
            for count_name in counts:
                every = np.stack([counts[layer][count_name] for _, counts in batches])
                found = result.counts(layer, count_name)
                np.testing.assert_allclose(found, every.sum(0), rtol=1e-12)


def write_batches(path: Path, batches: list[tuple[Sums, Counts]], rank: int, world: int) -> None:
    """Add up the batches of one rank, as a harvest does."""
    with AttributionWriter.create_or_continue(
        path,
        metadata=metadata_of(rank, world),
        edges=shapes_of(FEW),
        counts=count_shapes(),
        unembedding=unembedding(),
    ) as writer:
        sums, counts, tokens = writer.sums()
        for batch in range(rank, BATCHES, world):
            for metric in METRICS:
                for edge in FEW:
                    sums[metric][edge] += batches[batch][0][metric][edge]
            for layer, named in counts.items():
                for name in named:
                    named[name] += batches[batch][1][layer][name]
            tokens += 10
        done = len(range(rank, BATCHES, world))
        writer.save(sums, counts, tokens=tokens, batches_done=done)
        writer.finish()


def test_the_order_of_the_paths_changes_no_bit(tmp_path: Path) -> None:
    parts = [random_store(tmp_path / f"{r}.zarr", r, rank=r, world_size=4) for r in range(4)]
    one = merge_attributions(parts, tmp_path / "a.zarr")
    two = merge_attributions(parts[::-1], tmp_path / "b.zarr")
    for metric in METRICS:
        for edge in EDGES:
            a, b = (np.asarray(store.sums(metric, *edge)) for store in (one, two))
            assert a.tobytes() == b.tobytes()


def test_what_is_merged_is_a_store_like_any_other(tmp_path: Path) -> None:
    parts = [random_store(tmp_path / f"{r}.zarr", r, rank=r, world_size=2) for r in range(2)]
    merge_attributions(parts, tmp_path / "out" / "all.zarr")
    with xr.open_datatree(tmp_path / "out" / "all.zarr", engine="zarr", consolidated=False) as tree:
        np.testing.assert_array_equal(tree["unembedding/weight"], unembedding())
        assert {g for g in tree.groups if g.count("/") == 3} == {
            f"/{metric}/{target}/{source}" for metric in METRICS for target, source in EDGES
        }
        assert tree.attrs["completed"] == 1
        assert tree.attrs["model"] == metadata_of()["model"]
        assert "basinscope" in tree.attrs["created_by"]
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["all.zarr"]
    for rank, part in enumerate(parts):
        assert StoredAttributions(part).metadata["parts"] == [[rank, 2]]


def test_missing_ranks_are_named_or_allowed(tmp_path: Path) -> None:
    parts = [random_store(tmp_path / f"{r}.zarr", r, rank=r, world_size=4) for r in (1, 3)]
    with pytest.raises(ValueError, match=r"ranks 0, 2 of 4 are missing.*allow_missing=True"):
        merge_attributions(parts, tmp_path / "all.zarr")
    assert not (tmp_path / "all.zarr").exists()
    merged = merge_attributions(parts, tmp_path / "some.zarr", allow_missing=True)
    assert merged.metadata["parts"] == [[1, 4], [3, 4]]
    with pytest.warns(UserWarning, match=r"some\.zarr lacks the parts of ranks 0, 2 of 4"):
        open_attributions(tmp_path / "some.zarr")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"world_size": 3}, r"world size: 2 in .*a\.zarr, 3 in .*b\.zarr"),
        ({"dataset_fingerprint": "xyz"}, r"dataset_fingerprint: 'abc' in .*a\.zarr, 'xyz' in"),
        ({"batch_size": 8}, r"batch_size: 4 in .*a\.zarr, 8 in .*b\.zarr"),
        ({"n_batches": None}, r"n_batches: 12 in .*a\.zarr, None in .*b\.zarr"),
        ({"importance_threshold": 0.5}, r"importance_threshold: 0\.1 in .*a\.zarr, 0\.5 in .*b"),
        ({"output_token_ids": [2, 3]}, r"output_token_ids: \[2, 9\] in .*a\.zarr, \[2, 3\] in .*b"),
        ({"model": {"class": "Tiny", "parameters": 9}}, r"model\.parameters: 1234 in .*a\.zarr, 9"),
        ({"precision": "bf16"}, r"precision: None in .*a\.zarr, 'bf16' in .*b\.zarr"),
    ],
)  # fmt: skip
def test_parts_of_different_harvests_are_refused(changes: dict, said: str, tmp_path: Path) -> None:
    one = random_store(tmp_path / "a.zarr", rank=0, world_size=2)
    two = random_store(tmp_path / "b.zarr", **{"rank": 1, "world_size": 2, **changes})
    with pytest.raises(ValueError, match=f"of different harvests:\n  {said}"):
        merge_attributions([one, two], tmp_path / "all.zarr")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a.zarr", "b.zarr"]


def test_parts_with_other_edges_or_another_unembedding_are_refused(tmp_path: Path) -> None:
    def part(name: str, rank: int, edges: list, weight: np.ndarray | None) -> Path:
        with AttributionWriter.create_or_continue(
            tmp_path / name, metadata=metadata_of(rank, 2), edges=shapes_of(edges),
            counts=count_shapes(), unembedding=weight,
        ) as writer:  # fmt: skip
            writer.finish()
        return tmp_path / name

    first = part("a.zarr", 0, EDGES, unembedding())
    with pytest.raises(ValueError, match=r"edges\.embed -> output: True in .*a\.zarr, None in"):
        merge_attributions(
            [first, part("b.zarr", 1, EDGES[:5], unembedding())], tmp_path / "all.zarr"
        )
    with pytest.raises(ValueError, match=r"unembeddings in .*a\.zarr and .*c\.zarr differ"):
        merge_attributions(
            [first, part("c.zarr", 1, EDGES, unembedding(seed=1))], tmp_path / "all.zarr"
        )
    with pytest.raises(ValueError, match=r"unembedding is \(10, 4\) in .*a\.zarr, None in .*d\.z"):
        merge_attributions([first, part("d.zarr", 1, EDGES, None)], tmp_path / "all.zarr")
    bare = [part("e.zarr", 0, EDGES, None), tmp_path / "d.zarr"]
    assert merge_attributions(bare, tmp_path / "all.zarr").unembedding is None


def test_a_rank_counts_once_however_it_is_nested(tmp_path: Path) -> None:
    parts = [random_store(tmp_path / f"{r}.zarr", r, rank=r, world_size=3) for r in range(3)]
    copy = shutil.copytree(parts[1], tmp_path / "copy.zarr")
    with pytest.raises(ValueError, match=r"rank 1 of 3 is in .*1\.zarr and in .*copy\.zarr"):
        merge_attributions([parts[0], parts[1], copy], tmp_path / "all.zarr")
    merge_attributions(parts[:2], tmp_path / "some.zarr", allow_missing=True)
    with pytest.raises(ValueError, match=r"rank 1 of 3 is in .*and in .*would count twice"):
        merge_attributions([tmp_path / "some.zarr", *parts[1:]], tmp_path / "all.zarr")
    with pytest.raises(ValueError, match="twice"):
        merge_attributions([parts[0], parts[0]], tmp_path / "all.zarr", allow_missing=True)
    assert not (tmp_path / "all.zarr").exists()


def test_what_cannot_be_merged_is_refused(tmp_path: Path) -> None:
    with new_writer(tmp_path / "running.zarr") as writer:
        writer.save(*random_sums(np.random.default_rng(0)), tokens=5, batches_done=2)
    with pytest.raises(
        ValueError, match=r"running\.zarr is being harvested.*2 batches.*when it is"
    ):
        merge_attributions([tmp_path / "running.zarr"], tmp_path / "all.zarr")
    with pytest.raises(ValueError, match="no parts to merge"):
        merge_attributions([], tmp_path / "all.zarr")
    for single in (tmp_path / "s.zarr", str(tmp_path / "s.zarr")):
        with pytest.raises(TypeError, match=r"s\.zarr' is a single path: give a list of paths"):
            merge_attributions(single, tmp_path / "all.zarr")  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        merge_attributions([tmp_path / "nowhere"], tmp_path / "all.zarr")
    whole = random_store(tmp_path / "s.zarr")
    (tmp_path / "mine").mkdir()
    for output in (whole, tmp_path / "mine"):
        with pytest.raises(FileExistsError, match="exists and is left as it is"):
            merge_attributions([whole], output)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="file is no directory"):
        merge_attributions([whole], tmp_path / "file" / "all.zarr")
    for wrong in (3, xr.DataTree(), {"0": whole}):
        with pytest.raises(TypeError, match=r"paths must be a list of paths, .*; got \w+$"):
            merge_attributions(wrong, tmp_path / "all.zarr")  # type: ignore[arg-type]
    assert not (tmp_path / "all.zarr").exists()


def test_an_error_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [random_store(tmp_path / f"{r}.zarr", r, rank=r, world_size=2) for r in range(2)]
    chunk = parts[1] / "attr_abs" / "output" / "embed" / "sum" / "c.0.0"
    chunk.write_bytes(chunk.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"1\.zarr.*is damaged"):
        merge_attributions(parts, tmp_path / "all.zarr")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["0.zarr", "1.zarr"]


def test_a_kill_half_way_leaves_nothing_under_the_final_name(tmp_path: Path) -> None:
    parts = [random_store(tmp_path / f"{r}.zarr", r, rank=r, world_size=2) for r in range(2)]
    code = f"""
import os, signal
from basinscope.io import attributions_merge
whole, calls = attributions_merge.write_chunk, []
def crash(*args):
    calls.append(args)
    if len(calls) == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(*args)
attributions_merge.write_chunk = crash
attributions_merge.merge_attributions({[str(p) for p in parts]!r}, {str(tmp_path / "all.zarr")!r})
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert not (tmp_path / "all.zarr").exists()
    assert merge_attributions(parts, tmp_path / "all.zarr").completed


def test_one_block_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The peak of a merge, in a process of its own, does not depend on the size of the parts."""
    from benchmarks import attribution_merge

    sizes = ["--parts", "3", "--megabytes", "60", "--out", str(tmp_path / "results.jsonl")]
    monkeypatch.setattr(sys, "argv", ["attribution_merge", *sizes])
    assert attribution_merge.main() == 0
    figures = json.loads((tmp_path / "results.jsonl").read_text())
    assert figures["part_mib"] > 45
    assert figures["peak_growth_mib"] < 30


@pytest.mark.slow
def test_eight_large_parts_fit_in_400_mb(tmp_path: Path) -> None:
    from benchmarks import attribution_merge

    figures = attribution_merge.measure(tmp_path, parts=8, megabytes=500)
    assert figures["part_mib"] > 400  # of 500 MB of sums, compressed
    assert figures["peak_growth_mib"] < 400
