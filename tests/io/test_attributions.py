"""Stores of attributions: plain Zarr, whole after any kill, one writer, nothing overwritten."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
import xarray as xr
import zarr

from basinscope.io import chunked
from basinscope.io.attributions import (
    AttributionLockedError,
    AttributionWriter,
    StoredAttributions,
    open_attributions,
)
from basinscope.io.attributions_layout import CHUNK, METRICS, Counts, Sums
from basinscope.io.store import StoreMismatchError
from basinscope.io.stored import DamagedStoreError
from tests.io.attributions_random import (
    EDGES,
    as_older,
    count_shapes,
    metadata_of,
    new_writer,
    random_store,
    random_sums,
    shapes_of,
    unembedding,
    write_part,
)


def test_plain_xarray_reads_everything_without_a_warning(tmp_path: Path) -> None:
    sums, counts = random_sums(np.random.default_rng(1))
    path = write_part(tmp_path / "s.zarr", sums, counts, tokens=7, batches=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with xr.open_datatree(path, engine="zarr", consolidated=False) as tree:
            for metric in METRICS:
                for target, source in EDGES:
                    found = tree[f"{metric}/{target}/{source}/sum"]
                    assert found.dims == ("target", "source")
                    assert found.dtype == np.float64
                    np.testing.assert_array_equal(found, sums[metric][target, source])
            for layer, named in counts.items():
                for name, values in named.items():
                    np.testing.assert_array_equal(tree[f"counts/{layer}/{name}"], values)
            np.testing.assert_array_equal(tree["unembedding/weight"], unembedding())
            assert tree["unembedding/weight"].dims == ("vocab", "d_model")
            assert tree.attrs["tokens"] == 7
            assert tree.attrs["batches"] == 3
            assert tree.attrs["completed"] == 1
            assert tree.attrs["edges"] == [list(edge) for edge in EDGES]
            assert tree.attrs["layers"]["0.mlp.up"]["module"] == "module.0.mlp.up"


def test_an_unfinished_store_is_plain_zarr_too(tmp_path: Path) -> None:
    sums, counts = random_sums(np.random.default_rng(1))
    with new_writer(tmp_path / "s.zarr") as writer:
        writer.save(sums, counts, tokens=7, batches_done=3)
    with xr.open_datatree(tmp_path / "s.zarr", engine="zarr", consolidated=False) as tree:
        generation = tree.attrs["generation"]
        found = tree[f"{generation}/attr/output/embed/sum"]
        np.testing.assert_array_equal(found, sums["attr"]["output", "embed"])


def test_wide_matrices_are_cut_and_blocks_of_zeros_are_files_too(tmp_path: Path) -> None:
    sizes = {"embed": 2 * CHUNK[1] + 100, "0.mlp.up": CHUNK[0] + 10}
    edges = [("0.mlp.up", "embed")]
    sums, counts = random_sums(np.random.default_rng(0), 10, edges, sizes)
    sums["attr"][edges[0]][:] = 0
    sums["attr"][edges[0]][140, 800] = -2.5
    with AttributionWriter.create_or_continue(
        tmp_path / "s.zarr",
        metadata=metadata_of(sizes=sizes, output_token_ids=[]),
        edges=shapes_of(edges, sizes),
        counts=count_shapes(sizes),
    ) as writer:
        writer.save(sums, counts, tokens=1, batches_done=1)
        writer.finish()
    store = open_attributions(tmp_path / "s.zarr")
    folder = tmp_path / "s.zarr" / "attr" / "0.mlp.up" / "embed" / "sum"
    assert {file.name for file in folder.glob("c*")} == {
        f"c.{i}.{j}" for i in (0, 1) for j in range(3)
    }
    for metric in METRICS:
        with dask.config.set(scheduler="sync"):
            lazy = store.matrix(metric, *edges[0])
            assert lazy.data.numblocks == (2, 3)
            np.testing.assert_array_equal(lazy, sums[metric][edges[0]])
        stored = store.sums(metric, *edges[0])
        row, column = stored.part(slice(140, 141)), stored.part(slice(None), slice(800, 801))
        np.testing.assert_array_equal(np.asarray(row)[0], sums[metric][edges[0]][140])
        np.testing.assert_array_equal(np.asarray(column)[:, 0], sums[metric][edges[0]][:, 800])
        array = zarr.open_array(tmp_path / "s.zarr" / metric / "0.mlp.up" / "embed" / "sum")
        np.testing.assert_array_equal(array[:], sums[metric][edges[0]])


def test_a_lost_file_is_an_error_never_zeros(tmp_path: Path) -> None:
    path = random_store(tmp_path / "s.zarr")
    lost = [f"{metric}/output/embed/sum/c.0.0" for metric in METRICS]
    for name in (*lost, "counts/embed/occurrences/c.0", "unembedding/weight/c.0.0"):
        (path / name).unlink()
    store = open_attributions(path)
    assert store.unembedding is not None
    for read in (
        lambda: np.asarray(store.sums("attr", "output", "embed")),
        lambda: store.matrix("attr_abs", "output", "embed").compute(),
        lambda: store.counts("embed", "occurrences"),
        lambda: np.asarray(store.unembedding),
    ):
        with pytest.raises(DamagedStoreError, match=r"lacks chunk.*restore the store from a copy"):
            read()


def test_older_stores_have_no_files_for_zeros(tmp_path: Path) -> None:
    sums, counts = random_sums(np.random.default_rng(0))
    sums["attr"]["output", "embed"][:] = 0
    counts["0.attn.q"]["active"][:] = 0
    path = as_older(write_part(tmp_path / "s.zarr", sums, counts))
    assert not list(path.glob("attr/output/embed/sum/c*"))
    store = open_attributions(path)
    for edge in EDGES:
        np.testing.assert_array_equal(np.asarray(store.sums("attr", *edge)), sums["attr"][edge])
    assert not store.counts("0.attn.q", "active").any()
    (path / "attr" / "output" / "0.mlp.up" / "sum" / "c.0.0").write_bytes(b"no chunk")
    with pytest.raises(DamagedStoreError, match="is damaged"):
        np.asarray(store.sums("attr", "output", "0.mlp.up"))


def test_a_row_opens_only_the_files_it_touches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = random_store(tmp_path / "s.zarr")
    opened: list[str] = []
    whole = os.open

    def noted(file: str, *args: int) -> int:
        opened.append(str(file))
        return whole(file, *args)

    monkeypatch.setattr(os, "open", noted)
    sums = open_attributions(path).sums("attr", "1.mlp.up", "embed")
    np.asarray(sums.part(slice(2, 3)))
    assert opened == [str(path / "attr" / "1.mlp.up" / "embed" / "sum" / "c.0.0")]


def test_a_flipped_bit_is_an_error_never_a_number(tmp_path: Path) -> None:
    path = random_store(tmp_path / "s.zarr")
    file = path / "attr" / "1.mlp.up" / "embed" / "sum" / "c.0.0"
    good = file.read_bytes()
    for place in (0, 30, len(good) // 2, len(good) - 1):
        bad = bytearray(good)
        bad[place] ^= 4
        file.write_bytes(bad)
        with pytest.raises(ValueError, match="damaged"):
            np.asarray(open_attributions(path).sums("attr", "1.mlp.up", "embed"))


def test_a_stopped_harvest_goes_on_from_its_last_save(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    first, second = random_sums(rng), random_sums(rng)
    with new_writer(tmp_path / "s.zarr") as writer:
        assert writer.batches_done == 0
        sums, counts, tokens = writer.sums()
        assert tokens == 0
        assert not any(values.any() for arrays in sums.values() for values in arrays.values())
        writer.save(*first, tokens=10, batches_done=1)
    with new_writer(tmp_path / "s.zarr") as writer:
        assert (writer.batches_done, writer.completed) == (1, False)
        sums, counts, tokens = writer.sums()
        assert tokens == 10
        assert_same(sums, counts, *first)
        writer.save(*second, tokens=20, batches_done=2)
        writer.save(*second, tokens=30, batches_done=3)
        assert len(list((tmp_path / "s.zarr").glob("generation-*"))) == 1
        writer.finish()
    with new_writer(tmp_path / "s.zarr") as writer:
        assert (writer.batches_done, writer.completed) == (3, True)
        sums, counts, tokens = writer.sums()
        assert tokens == 30
        assert_same(sums, counts, *second)
        with pytest.raises(ValueError, match="is completed"):
            writer.save(*first, tokens=1, batches_done=1)
        writer.finish()
    assert open_attributions(tmp_path / "s.zarr").metadata["batches"] == 3


def test_a_full_disk_leaves_the_state_before_and_takes_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = random_sums(np.random.default_rng(2))
    own = chunked.write_chunk
    room = iter(range(5))

    def full(*args: Any) -> None:
        if next(room, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        own(*args)

    with new_writer(tmp_path / "s.zarr") as writer:
        writer.save(*once, tokens=10, batches_done=1)
        before = sorted(tmp_path.rglob("*"))
        with monkeypatch.context() as patch:
            patch.setattr(chunked, "write_chunk", full)
            with pytest.raises(OSError, match="No space left"):
                writer.save(*times(once, 2), tokens=20, batches_done=2)
        assert sorted(tmp_path.rglob("*")) == before
        assert writer.batches_done == 1
        np.testing.assert_array_equal(
            writer.sums()[0]["attr"]["output", "embed"], once[0]["attr"]["output", "embed"]
        )
        writer.save(*times(once, 2), tokens=20, batches_done=2)
        assert writer.batches_done == 2


def test_a_closed_writer_writes_nothing(tmp_path: Path) -> None:
    writer = new_writer(tmp_path / "s.zarr")
    writer.close()
    with pytest.raises(ValueError, match="was closed"):
        writer.save(*random_sums(np.random.default_rng(0)), tokens=1, batches_done=1)
    with pytest.raises(ValueError, match="was closed"):
        writer.finish()


def test_a_second_writer_is_told(tmp_path: Path) -> None:
    with new_writer(tmp_path / "s.zarr"):
        code = f"""
from tests.io.attributions_random import new_writer
new_writer({str(tmp_path / "s.zarr")!r})
"""
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert other.returncode == 1
        assert "AttributionLockedError" in other.stderr
        assert "being harvested by another process" in other.stderr
        with pytest.raises(AttributionLockedError, match=r"s\.zarr is being harvested by another"):
            new_writer(tmp_path / "s.zarr")
        open_attributions(random_store(tmp_path / "other.zarr"))
    new_writer(tmp_path / "s.zarr").close()


def test_other_settings_are_refused_field_by_field(tmp_path: Path) -> None:
    sums, counts = random_sums(np.random.default_rng(0))
    with new_writer(tmp_path / "s.zarr") as writer:
        writer.save(sums, counts, tokens=10, batches_done=1)
    before = contents(tmp_path)
    with pytest.raises(StoreMismatchError) as error:
        new_writer(tmp_path / "s.zarr", batch_size=5, rank=1, world_size=2)
    said = str(error.value)
    assert "batch_size: the store has 4, this call has 5" in said
    assert "parts: the store has [[0, 1]], this call has [[1, 2]]" in said
    assert "model" not in said
    fewer = [edge for edge in EDGES if edge != ("output", "embed")]
    with pytest.raises(StoreMismatchError, match=r"edges\.embed -> output: the store has True"):
        AttributionWriter.create_or_continue(
            tmp_path / "s.zarr", metadata=metadata_of(), edges=shapes_of(fewer),
            counts=count_shapes(), unembedding=unembedding(),
        )  # fmt: skip
    for other in (None, unembedding(seed=1), unembedding()[:5]):
        with pytest.raises(ValueError, match="another unembedding: it is left as it is"):
            AttributionWriter.create_or_continue(
                tmp_path / "s.zarr", metadata=metadata_of(), edges=shapes_of(),
                counts=count_shapes(), unembedding=other,
            )  # fmt: skip
    assert contents(tmp_path) == before
    new_writer(tmp_path / "s.zarr").close()


def test_what_is_something_else_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes").write_text("mine too")
    zarr.open_group(tmp_path / "group", mode="w").create_array("a", shape=(2,), dtype="f4")
    before = contents(tmp_path)
    for name in ("file", "folder", "group"):
        with pytest.raises(ValueError, match=f"{name} exists and is no store of attributions"):
            new_writer(tmp_path / name)
        with pytest.raises(ValueError, match=f"{name} is not a store of attributions"):
            open_attributions(tmp_path / name)
    with pytest.raises(NotADirectoryError, match="file is no directory"):
        new_writer(tmp_path / "file" / "s.zarr")
    assert contents(tmp_path) == before
    with pytest.raises(FileNotFoundError, match="no store at"):
        open_attributions(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    new_writer(tmp_path / "empty").close()


def test_a_store_of_a_later_version_is_refused(tmp_path: Path) -> None:
    path = random_store(tmp_path / "s.zarr")
    zarr.open_group(path, mode="r+").update_attributes({"schema_version": 99})
    with pytest.raises(ValueError, match=r"schema version 99.*reads up to 1.*basinscope"):
        open_attributions(path)


def test_what_contradicts_the_metadata_is_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    def create(**changes: object) -> None:
        arguments = {"metadata": metadata_of(), "edges": shapes_of(), "counts": count_shapes()}
        AttributionWriter.create_or_continue(tmp_path / "s.zarr", **{**arguments, **changes})

    lacking = {name: v for name, v in metadata_of().items() if name not in ("model", "parts")}
    with pytest.raises(ValueError, match="metadata lacks model, parts"):
        create(metadata=lacking)
    with pytest.raises(ValueError, match=r"from embed to 0.mlp.up has shape \(9, 12\).*\(9, 11\)"):
        create(edges={("0.mlp.up", "embed"): (9, 12)})
    assert list(tmp_path.iterdir()) == []


def test_arrays_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    sums, counts = random_sums(np.random.default_rng(0))
    with new_writer(tmp_path / "s.zarr") as writer:
        lacking = {m: {e: v for e, v in sums[m].items() if e != EDGES[0]} for m in METRICS}
        with pytest.raises(ValueError, match=r"of embed -> 0.attn.q: .* shape \(6, 11\), got noth"):
            writer.save(lacking, counts, tokens=1, batches_done=1)
        wrong = {**counts, "output": {"square_sum": np.zeros(5)}}
        with pytest.raises(ValueError, match=r"square_sum of output: .* shape \(4,\), got \(5,\)"):
            writer.save(sums, wrong, tokens=1, batches_done=1)
        assert writer.batches_done == 0
        assert not list((tmp_path / "s.zarr").glob("generation*"))


@pytest.mark.parametrize("stride", [100, pytest.param(10, marks=pytest.mark.slow)])
def test_a_kill_at_any_operation_leaves_one_state_or_the_other(stride: int, tmp_path: Path) -> None:
    """Kill -9 a process at its n-th file operation, for many n, through saves and finish.

    State n has n times the sums of state 1, so a mixture of two states would show.
    """
    code = (
        "from pathlib import Path; from tests.io.test_attributions import killed_everywhere; "
        f"killed_everywhere(Path({str(tmp_path)!r}), {stride})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {int(line) for line in done.stdout.split()} == {0, 1, 2, 3}


def killed_everywhere(folder: Path, stride: int) -> None:
    """Kill a process at one file operation after another; print what each saved."""
    once = random_sums(np.random.default_rng(0), edges=EDGES[:2])
    random = np.random.default_rng()
    at, finished = 1, False
    while not finished:
        path = folder / f"{at}.zarr"
        child = os.fork()
        if child == 0:
            harvest_until_killed(path, at, once)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        finished = status == 0
        assert finished or os.WTERMSIG(status) == signal.SIGKILL, status
        batches = saved_batches(path, once)
        print(batches, flush=True)
        with small_writer(path) as writer:  # and the same call goes on
            assert writer.batches_done == batches
            assert_same(*writer.sums()[:2], *times(once, batches))
            if not writer.completed:
                writer.save(*times(once, 4), tokens=40, batches_done=4)
                writer.finish()
                assert saved_batches(path, once) == 4
        assert not list(path.glob("generation*"))
        assert not list(path.glob("*.partial"))
        at += int(random.integers(1, stride))


def harvest_until_killed(path: Path, at: int, once: tuple[Sums, Counts]) -> None:
    counted = 0

    def count(event: str, _: tuple) -> None:
        nonlocal counted
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            counted += 1
            if counted == at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    with small_writer(path) as writer:
        for batches in (1, 2, 3):
            writer.save(*times(once, batches), tokens=10 * batches, batches_done=batches)
        writer.finish()


def saved_batches(path: Path, once: tuple[Sums, Counts]) -> int:
    """Check that a store holds one state, and give its number of batches."""
    if not path.exists():
        return 0
    store = StoredAttributions(path)
    batches = store.metadata["batches"]
    assert store.metadata["tokens"] == 10 * batches
    if batches == 0:
        return 0
    sums, counts = times(once, batches)
    for metric, arrays in sums.items():
        for edge, values in arrays.items():
            np.testing.assert_array_equal(np.asarray(store.sums(metric, *edge)), values)
    for layer, named in counts.items():
        for name, values in named.items():
            np.testing.assert_array_equal(store.counts(layer, name), values)
    return batches


def small_writer(path: Path) -> AttributionWriter:
    return AttributionWriter.create_or_continue(
        path,
        metadata=metadata_of(),
        edges=shapes_of(EDGES[:2]),
        counts=count_shapes(),
        unembedding=unembedding(),
    )


def times(once: tuple[Sums, Counts], factor: float) -> tuple[Sums, Counts]:
    sums, counts = once
    return (
        {m: {e: factor * v for e, v in arrays.items()} for m, arrays in sums.items()},
        {k: {n: factor * v for n, v in arrays.items()} for k, arrays in counts.items()},
    )


def test_a_reader_never_takes_a_removed_file_for_zeros(tmp_path: Path) -> None:
    """In older stores a chunk without a file is zeros, and here it is no damage."""
    once = random_sums(np.random.default_rng(0))
    with new_writer(tmp_path / "s.zarr") as writer:
        writer.save(*once, tokens=10, batches_done=1)
        with pytest.warns(UserWarning, match=r"1 batches \(10 tokens\)"):
            store = open_attributions(tmp_path / "s.zarr")
        opened = store.sums("attr", "output", "embed")
        lazy = store.matrix("attr", "output", "embed")
        np.testing.assert_array_equal(np.asarray(opened), once[0]["attr"]["output", "embed"])
        writer.save(*times(once, 2), tokens=20, batches_done=2)
        for read in (lambda: np.asarray(opened), lazy.compute):
            with pytest.raises(FileNotFoundError, match=r"went while it was read.*open it again"):
                read()
        writer.finish()
    for read in (
        lambda: store.sums("attr", "output", "embed"),
        lambda: store.counts("output", "square_sum"),
    ):
        with pytest.raises(FileNotFoundError, match="saved anew"):
            read()


def test_a_finish_between_opening_and_reading_is_no_matter(tmp_path: Path) -> None:
    sums, counts = random_sums(np.random.default_rng(0))
    with new_writer(tmp_path / "s.zarr") as writer:
        writer.save(sums, counts, tokens=10, batches_done=1)
        store = StoredAttributions(tmp_path / "s.zarr")
        writer.finish()
    for edge in EDGES:
        np.testing.assert_array_equal(np.asarray(store.sums("attr", *edge)), sums["attr"][edge])


def test_many_edges_open_at_once(tmp_path: Path) -> None:
    """Ten thousand edges: opening reads one file, a matrix one more."""
    path = random_store(tmp_path / "s.zarr")
    names = [f"{layer}.mlp.up" for layer in range(150)]
    group = zarr.open_group(path, mode="r+")
    edges = [[t, s] for i, t in enumerate(names) for s in names[:i]] + group.attrs["edges"]
    assert len(edges) > 10_000
    group.update_attributes({"edges": edges})
    opened: list[str] = []
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
    store = open_attributions(path)
    store.matrix("attr", "output", "embed")
    assert len([name for name in opened if "s.zarr" in name]) == 2


def assert_same(sums: Sums, counts: Counts, other_sums: Sums, other_counts: Counts) -> None:
    for metric, arrays in other_sums.items():
        for edge, values in arrays.items():
            np.testing.assert_array_equal(sums[metric][edge], values)
    for layer, named in other_counts.items():
        for name, values in named.items():
            np.testing.assert_array_equal(counts[layer][name], values)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
