"""Stores of activations: exact in any batches, continued after any end, never silently partial."""

from __future__ import annotations

import itertools
import json
import random
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from basinscope.io import activation_store as module
from basinscope.io.activation_layout import (
    BUFFER_BYTES,
    CHUNK_BYTES,
    ActivationSpec,
    dtype_name,
    rows_per_chunk,
)
from basinscope.io.activation_store import (
    ActivationsLockedError,
    ActivationWriter,
    open_activations,
)
from basinscope.io.store import StoreMismatchError
from basinscope.io.stored import DamagedStoreError
from basinscope.io.writer import StoreWriteError
from tests.io.activation_examples import (
    ATTRS,
    CHUNK,
    COORDS,
    POSITIONS,
    VARIABLES,
    WIDTH,
    examples,
    writer,
)


def fill(made: ActivationWriter, stop: int, sizes: Any = (7,)) -> None:
    """Append up to example ``stop``, in batches of these sizes, again and again."""
    batch = 0
    while made.examples_done < stop:
        end = min(stop, made.examples_done + sizes[batch % len(sizes)])
        made.append(examples(made.examples_done, end))
        batch += 1


def require_examples(path: Path, count: int, **options: Any) -> None:
    tree = open_activations(path, **options)
    for name, values in examples(0, count).items():
        found = tree[name].to_numpy()
        assert found.dtype == values.dtype, name
        assert found.tobytes() == values.tobytes(), name
        assert tree[name].dims == VARIABLES[name][0], name


def contents(path: Path) -> dict[str, bytes]:
    """Bytes of all files but the root's attributes, which hold the time."""
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in path.rglob("*")
        if file.is_file() and file != path / "zarr.json"
    }


def chunks_of(path: Path, name: str) -> list[Path]:
    return sorted(file for file in (path / name).iterdir() if file.name != "zarr.json")


def stop_after(path: Path, total: int | None, appended: int) -> None:
    """Leave a store as a killed process would: what was not written is lost."""
    made = writer(path, total)
    fill(made, appended)
    made.close()


@settings(max_examples=12, deadline=None)
@given(
    total=st.integers(0, 70),
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    known=st.booleans(),
)
def test_batches_of_any_sizes_give_the_same_store(
    total: int, sizes: list[int], known: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("any")
    made = writer(folder / "a.zarr", total if known else None)
    fill(made, total, sizes)
    made.finish()
    require_examples(folder / "a.zarr", total)
    whole = writer(folder / "b.zarr", total if known else None)
    whole.append(examples(0, total))
    whole.finish()
    assert contents(folder / "a.zarr") == contents(folder / "b.zarr")


@settings(max_examples=10, deadline=None)
@given(
    stops=st.lists(st.integers(0, 70), max_size=3),
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=3),
    known=st.booleans(),
)
def test_stopped_and_continued_gives_the_same_bytes(
    stops: list[int], sizes: list[int], known: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("any")
    path, total = folder / "a.zarr", 70
    for stop in stops:
        made = writer(path, total if known else None)
        fill(made, max(stop, made.examples_done), sizes)
        made.close()
        assert contents_of_counted(path) <= stop or made.examples_done > stop
    made = writer(path, total if known else None)
    fill(made, total, sizes)
    made.finish()
    whole = writer(folder / "b.zarr", total if known else None)
    whole.append(examples(0, total))
    whole.finish()
    assert contents(path) == contents(folder / "b.zarr")


def contents_of_counted(path: Path) -> int:
    tree = open_activations(path, allow_incomplete=True)
    count = tree.sizes["example"]
    require_examples(path, count, allow_incomplete=True)
    return count


def test_a_store_is_read_by_plain_xarray(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    made = writer(path, 50, unembedding=unembedding())
    fill(made, 50)
    made.finish()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with xr.open_datatree(path, engine="zarr", consolidated=False) as tree:
            for name, values in examples(0, 50).items():
                assert tree[name].to_numpy().tobytes() == values.tobytes(), name
                assert tree[name].dims == VARIABLES[name][0]
            np.testing.assert_array_equal(tree["position"], COORDS["position"])
            assert tree["resid_out_1"].attrs == {"source_dtype": "bfloat16"}
            assert tree.attrs["completed"] == 1
            assert {k: tree.attrs[k] for k in ATTRS} == ATTRS
            np.testing.assert_array_equal(tree["unembedding/weight"], unembedding()["weight"])


def test_a_store_opens_lazily_with_its_attributes(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    made = writer(path, 50, unembedding=unembedding())
    fill(made, 50)
    made.finish()
    for name in VARIABLES:
        for file in chunks_of(path, name):
            file.write_bytes(b"damaged: reading it is an error")
    tree = open_activations(path)
    assert {name: tree[name].dims for name in VARIABLES} == {n: v[0] for n, v in VARIABLES.items()}
    assert tree["resid_out_0"].chunks is not None
    assert tree["resid_out_0"].chunks[0][0] == 4
    np.testing.assert_array_equal(tree["position"], COORDS["position"])
    assert {k: tree.attrs[k] for k in ATTRS} == ATTRS
    assert "layout" not in tree.attrs
    child = tree["unembedding"]
    assert child.attrs == {"norm": "rms", "eps": 1e-6, "softcap": None, "scale": 1.0}
    assert child["weight"].dims == ("vocab", "d_model")
    np.testing.assert_array_equal(child["weight"], unembedding()["weight"])
    np.testing.assert_array_equal(child["norm_weight"], unembedding()["norm_weight"])
    with pytest.raises((ValueError, RuntimeError), match="damaged"):
        tree["resid_out_0"].mean().compute()


def test_a_large_unembedding_is_cut_by_rows(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).normal(size=(3 * CHUNK_BYTES // 8 // WIDTH, WIDTH))
    writer(tmp_path / "a.zarr", 1, unembedding={"weight": weight}).close()
    assert len(chunks_of(tmp_path / "a.zarr" / "unembedding", "weight")) == 3
    tree = open_activations(tmp_path / "a.zarr", allow_incomplete=True)
    np.testing.assert_array_equal(tree["unembedding/weight"], weight)


def test_an_incomplete_store_says_how_far_it_is(tmp_path: Path) -> None:
    for total, of in ((70, "70"), (None, "an unknown number of")):
        path = tmp_path / f"{total}.zarr"
        stop_after(path, total, 33)
        with pytest.raises(ValueError, match=rf"{path} is incomplete: it has 32 of {of} examples"):
            open_activations(path)
        tree = open_activations(path, allow_incomplete=True)
        assert tree.sizes["example"] == 32
        assert "completed" not in tree.attrs
        require_examples(path, 32, allow_incomplete=True)


def test_an_incomplete_store_has_the_coordinates_of_its_examples(tmp_path: Path) -> None:
    path, numbers = tmp_path / "a.zarr", np.arange(70) * 3
    made = writer(path, 70, coords={**COORDS, "example": numbers})
    fill(made, 33)
    made.close()
    tree = open_activations(path, allow_incomplete=True)
    np.testing.assert_array_equal(tree["example"], numbers[:32])
    np.testing.assert_array_equal(tree["position"], COORDS["position"])
    np.testing.assert_array_equal(tree["half"], examples(0, 32)["half"])


def test_only_what_is_really_on_disk_counts(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    stop_after(path, 70, 64)
    made = writer(path, 70)
    done = made.examples_done
    made.close()
    assert done == 64
    chunk = path / "half" / "c.2.0"
    whole = chunk.read_bytes()
    for damage in (b"", None):  # as a power cut leaves it; not there at all
        chunk.unlink()
        if damage is not None:
            chunk.write_bytes(damage)
        made = writer(path, 70)
        rows = zarr.open_array(path / "half", mode="r").chunks[0]
        assert made.examples_done <= 2 * rows
        made.close()
        chunk.write_bytes(whole)
    fill(made := writer(path, 70), 70)
    made.finish()
    require_examples(path, 70)


def test_a_chunk_that_is_gone_is_an_error_not_a_number(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    fill(made := writer(path, 50), 50)
    made.finish()
    chunks_of(path, "resid_out_0")[1].unlink()
    with pytest.raises(DamagedStoreError, match="lacks chunk"):
        open_activations(path)["resid_out_0"].compute()


@pytest.mark.parametrize("name", ["weight", "norm_weight"])
def test_a_lost_file_of_the_unembedding_is_an_error_not_nan(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    fill(made := writer(path, 5, unembedding=unembedding()), 5)
    made.finish()
    chunks_of(path / "unembedding", name)[0].unlink()
    with pytest.raises(DamagedStoreError, match=rf"unembedding/{name}/c\.0.* lacks chunk"):
        open_activations(path)["unembedding"][name].compute()


def test_a_lost_coordinate_is_an_error_not_position_zero(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    fill(made := writer(path, 5), 5)
    made.finish()
    (path / "position" / "c" / "0").unlink()
    with pytest.raises(DamagedStoreError, match="position/c/0 lacks chunk"):
        open_activations(path)


@pytest.mark.parametrize("values", [[0, 0, 0], [0.0, np.nan, -1.5], [False, False, True], "abc"])
def test_coordinates_of_any_type_are_as_they_were_given(values: Any, tmp_path: Path) -> None:
    given = np.array(list(values))
    fill(made := writer(tmp_path / "a.zarr", 5, coords={"position": given}), 5)
    made.finish()
    np.testing.assert_array_equal(open_activations(tmp_path / "a.zarr")["position"], given)


def test_a_selection_that_xarray_saved_is_said_to_be_one(tmp_path: Path) -> None:
    fill(made := writer(tmp_path / "a.zarr", 50), 50)
    made.finish()
    whole = open_activations(tmp_path / "a.zarr").to_dataset()
    whole.isel(example=slice(10)).to_zarr(tmp_path / "part.zarr", zarr_format=3, consolidated=False)
    with pytest.raises(ValueError, match=r"part\.zarr holds a part of a store of activations"):
        open_activations(tmp_path / "part.zarr")


def test_a_flipped_bit_is_an_error_not_a_number(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    fill(made := writer(path, 50), 50)
    made.finish()
    rng = np.random.default_rng(0)
    for name in VARIABLES:
        file = chunks_of(path, name)[0]
        good = file.read_bytes()
        for place in {0, len(good) - 1, *rng.integers(0, len(good), 4).tolist()}:
            bad = bytearray(good)
            bad[place] ^= 1 << int(rng.integers(8))
            file.write_bytes(bad)
            with pytest.raises((ValueError, RuntimeError)):
                open_activations(path)[name].compute()
        file.write_bytes(good)


@pytest.mark.parametrize("lengthened", range(1, len(VARIABLES)))
def test_a_kill_while_arrays_are_lengthened_costs_no_example(
    lengthened: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some are longer than the others then; what is written beyond the end of one is lost."""
    path, total, resize = tmp_path / "a.zarr", 120, zarr.Array.resize
    calls = itertools.count(1 - 5 * len(VARIABLES))  # to 4, 8, 16, 32, 64 examples, then to 128

    def killed(array: zarr.Array, shape: Any) -> None:
        if next(calls) > lengthened:
            raise KeyboardInterrupt
        resize(array, shape)

    with monkeypatch.context() as patched:
        patched.setattr(zarr.Array, "resize", killed)
        with pytest.raises(KeyboardInterrupt), writer(path, None) as made:
            fill(made, total)
    lengths = {zarr.open_array(path / name, mode="r").shape[0] for name in VARIABLES}
    assert lengths == {64, 128}
    with writer(path, None) as made:
        fill(made, total)
        made.finish()
    require_examples(path, total)


@pytest.mark.parametrize("known", [True, False])
def test_kills_at_any_moment_cost_no_example_that_was_counted(tmp_path: Path, known: bool) -> None:
    """Processes are killed until one gets to the end; each must find what the one before had."""
    path, total = tmp_path / "a.zarr", 120
    code = f"""
import time
from pathlib import Path
from tests.io.activation_examples import examples, writer
made = writer(Path({str(path)!r}), {total if known else None})
print(made.examples_done, flush=True)
while made.examples_done < {total}:
    made.append(examples(made.examples_done, min({total}, made.examples_done + 9)))
    time.sleep(0.012)
made.finish()
"""
    moments, counts = random.Random(3), [0]
    for _ in range(60):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        counts.append(int(process.stdout.readline()))
        try:
            process.wait(timeout=moments.uniform(0.03, 0.5))
        except subprocess.TimeoutExpired:
            process.kill()
        process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL
        count = open_activations(path, allow_incomplete=True).sizes["example"]
        assert count >= counts[-1]
        require_examples(path, count, allow_incomplete=True)
    assert process.returncode == 0
    assert counts == sorted(counts)
    assert len(counts) > 2, "no process was killed"
    require_examples(path, total)
    whole = writer(tmp_path / "b.zarr", total if known else None)
    whole.append(examples(0, total))
    whole.finish()
    assert contents(path) == contents(tmp_path / "b.zarr")


@pytest.mark.parametrize("stage", ["cut", "half the rest", "all the rest"])
def test_a_kill_in_finish_loses_and_invents_nothing(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of unknown length, the last chunk is a part of one; more examples may come after the kill."""
    path = tmp_path / "a.zarr"
    fill(made := writer(path, None), 41)
    made._writer.drain()
    if stage == "cut":
        for array in list(made._arrays.values())[:3]:
            array.resize((41, *array.shape[1:]))
    elif stage == "half the rest":
        put, calls = made._writer.put, []

        def sometimes(*args: Any) -> None:
            calls.append(args)
            if len(calls) <= 3:
                put(*args)

        monkeypatch.setattr(made._writer, "put", sometimes)
        made._write_rest()
    else:
        made._write_rest()
    made.close()
    with pytest.raises(ValueError, match="incomplete"):
        open_activations(path)
    require_examples(path, contents_of_counted(path), allow_incomplete=True)
    again = writer(path, None)
    assert again.examples_done <= 41
    fill(again, 60)
    again.close()
    require_examples(path, contents_of_counted(path), allow_incomplete=True)
    fill(last := writer(path, None), 73)
    last.finish()
    require_examples(path, 73)


def test_an_interrupted_append_cannot_be_followed_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.zarr"
    fill(made := writer(path, 70), 14)
    put, calls = made._writer.put, []

    def interrupted(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        put(*args)

    monkeypatch.setattr(made._writer, "put", interrupted)
    with pytest.raises(KeyboardInterrupt):
        made.append(examples(14, 40))
    with pytest.raises(ValueError, match="was closed"):
        made.append(examples(14, 40))
    with pytest.raises(ValueError, match="was closed"):
        made.finish()
    fill(again := writer(path, 70), 70)
    again.finish()
    require_examples(path, 70)


def test_a_second_writer_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    code = f"""
import time
from pathlib import Path
from tests.io.activation_examples import writer
made = writer(Path({str(path)!r}), 70)
print("held", flush=True)
time.sleep(60)
"""
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ActivationsLockedError, match=rf"{path} is being written by another"):
            writer(path, 70)
    finally:
        holder.kill()
        holder.communicate()
    made = writer(path, 70)
    with pytest.raises(ActivationsLockedError):
        writer(path, 70)
    made.close()
    writer(path, 70).close()


def test_a_writer_that_is_forgotten_lets_go(tmp_path: Path) -> None:
    made = writer(tmp_path / "a.zarr", 70)
    fill(made, 64)
    del made
    again = writer(tmp_path / "a.zarr", 70)
    assert again.examples_done == 64
    again.close()


def test_a_completed_store_comes_back_as_it_is(tmp_path: Path) -> None:
    for total in (30, None):
        path = tmp_path / f"{total}.zarr"
        fill(made := writer(path, total), 30)
        made.finish()
        before = {**contents(path), "root": (path / "zarr.json").read_bytes()}
        again = writer(path, total)
        other = writer(path, total)  # nothing is locked
        assert again.completed
        assert again.examples_done == other.examples_done == 30
        again.finish()
        with pytest.raises(ValueError, match="is completed"):
            again.append(examples(30, 31))
        assert {**contents(path), "root": (path / "zarr.json").read_bytes()} == before


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "attribute": (
        {"attrs": {**ATTRS, "model": {"class": "Other", "d_model": WIDTH}}},
        "model.class: the store has 'Tiny', this call has 'Other'",
    ),
    "missing attribute": ({"attrs": {}}, "model.d_model: the store has 8, this call has 'nothing'"),
    "length": ({"num_examples": 71}, "layout.num_examples: the store has 70, this call has 71"),
    "unknown length": ({"num_examples": None}, "layout.num_examples: the store has 70"),
    "coordinate": ({"coords": {"position": np.array([1, 5, 8])}}, "layout.coordinates.position"),
    "variable": (
        {"variables": {**VARIABLES, "more": (("example",), (), "int8")}},
        "layout.variables.more.dtype: the store has 'nothing', this call has 'int8'",
    ),
    "type": (
        {"variables": {**VARIABLES, "correct": (("example",), (), "int8")}},
        "layout.variables.correct.dtype: the store has 'bool', this call has 'int8'",
    ),
    "shape": (
        {"variables": {**VARIABLES, "input_ids": (("example", "token"), (6,), "int32")}},
        "layout.variables.input_ids.shape: the store has [5], this call has [6]",
    ),
    "unembedding": (
        {"unembedding": {"weight": np.ones((4, WIDTH), np.float32), "norm": "none"}},
        "layout.unembedding.norm: the store has 'nothing', this call has 'none'",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_arguments_are_refused_field_by_field(change: str, tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    stop_after(path, 70, 20)
    before = {**contents(path), "root": (path / "zarr.json").read_bytes()}
    arguments, said = CHANGES[change]
    with pytest.raises(StoreMismatchError, match=re.escape(said)):
        writer(path, 70, **arguments) if "num_examples" not in arguments else writer(
            path, arguments["num_examples"]
        )
    assert {**contents(path), "root": (path / "zarr.json").read_bytes()} == before


def test_another_size_of_chunks_continues_with_those_there_are(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    stop_after(path, 70, 64)
    made = writer(path, 70, chunk_bytes=2 * CHUNK)
    assert made.examples_done == 64
    fill(made, 70)
    made.finish()
    require_examples(path, 70)


@pytest.mark.parametrize("kind", ["directory", "file", "other group", "damaged"])
def test_what_is_no_such_store_is_refused_untouched(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    if kind == "file":
        path.write_text("mine")
    elif kind == "directory":
        path.mkdir()
        (path / "notes").write_text("mine")
    elif kind == "other group":
        zarr.open_group(path, mode="w", attributes={"mine": 1})
    else:
        path.mkdir()
        (path / "zarr.json").write_text('{"attributes": {"kind": "activ')
    before = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
    with pytest.raises(ValueError, match="exists and is not a store of activations: it is left as"):
        writer(path, 70)
    with pytest.raises(ValueError, match=r"is not a store of activations .* wrote$") as told:
        open_activations(path)
    assert "new path" not in str(told.value)
    assert {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()} == before


def test_there_is_nothing_to_open(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no activations at"):
        open_activations(tmp_path / "a.zarr")


def test_no_store_is_made_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="file is no directory"):
        writer(tmp_path / "file" / "a.zarr", 9)


def test_an_empty_directory_is_taken(tmp_path: Path) -> None:
    (tmp_path / "a.zarr").mkdir()
    fill(made := writer(tmp_path / "a.zarr", 9), 9)
    made.finish()
    require_examples(tmp_path / "a.zarr", 9)


def test_a_crash_in_creation_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: Any) -> None:
        raise RuntimeError("the power went out")

    monkeypatch.setattr("basinscope.io.activation_layout._write_unembedding", crash)
    with pytest.raises(RuntimeError, match="power"):
        writer(tmp_path / "a.zarr", 9, unembedding=unembedding())
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_is_refused_and_nothing_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    made = writer(path, 10)
    made.append(examples(0, 3))
    good = examples(3, 5)
    without = {name: values for name, values in good.items() if name != "half"}
    wrong = {
        "missing half": without,
        "unknown more": {**good, "more": good["half"]},
        "different numbers of examples": {**good, "half": good["half"][:1]},
        "half has shape": {**good, "half": good["half"][:, :3]},
        "correct has shape": {**good, "correct": good["input_ids"]},
        "half is float32": {**good, "half": good["half"].astype(np.float32)},
        "input_ids is int64": {**good, "input_ids": good["input_ids"].astype(np.int64)},
        "8 more examples are too many": examples(3, 11),
    }
    for said, arrays in wrong.items():
        with pytest.raises(ValueError, match=said):
            made.append(arrays)
    with pytest.raises(ValueError, match="has 3 of 10 examples"):
        made.finish()
    fill(made, 10)
    made.finish()
    require_examples(path, 10)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"variables": {}}, "no activations to store"),
        ({"variables": {"a": (("position",), (), "int8")}}, "give dims that begin with 'example'"),
        ({"variables": {"a": (("example", "x"), (0,), "int8")}}, "one positive number"),
        ({"variables": {"a": (("example",), (), "complex64")}}, "numbers of at most 64 bits"),
        ({"variables": {"a/b": (("example",), (), "int8")}}, "cannot be the name"),
        ({"variables": {"unembedding": (("example",), (), "int8")}}, "cannot be the name"),
        ({"variables": {"position": (("example",), (), "int8")}}, "both an array and a coord"),
        ({"coords": {"position": np.arange(4)}}, "'position' has 4 entries .* and 3 in resid_out"),
        ({"unembedding": {"weight": np.ones((4, 9))}}, "'d_model' has 8 entries .* 9 in unembed"),
        ({"unembedding": {"other": np.ones(4)}}, "its arrays are weight"),
    ],
)
def test_impossible_arguments_are_refused_before_anything_is_written(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=said):
        writer(tmp_path / "a.zarr", 9, **changes)
    assert list(tmp_path.iterdir()) == []


def test_attributes_that_are_no_json_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="attributes are stored as JSON"):
        writer(tmp_path / "a.zarr", 9, attrs={"model": object()})
    assert list(tmp_path.iterdir()) == []


def test_the_packages_own_attributes_are_not_the_callers(tmp_path: Path) -> None:
    """An extraction's metadata may say by what it was created; that must not stop a resume."""
    path = tmp_path / "a.zarr"
    stop_after(path, 70, 20)
    made = writer(path, 70, attrs={**ATTRS, "created_by": "an older version", "completed": 1})
    assert not made.completed
    made.close()


def test_a_failed_write_surfaces_at_once_and_the_store_is_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.zarr"
    fill(made := writer(path, 200), 64)
    made._writer.drain()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(zarr.AsyncArray, "setitem", full)
        with pytest.raises(StoreWriteError, match=r"No space left.*whole chunks are kept"):
            append_slowly(made, 180)
        assert made.examples_done < 180, "the error came late"
    fill(again := writer(path, 200), 200)
    again.finish()
    require_examples(path, 200)


def append_slowly(made: ActivationWriter, stop: int) -> None:
    while made.examples_done < stop:
        made.append(examples(made.examples_done, made.examples_done + 4))
        time.sleep(0.01)


def test_a_write_that_fails_last_does_not_complete_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.zarr"
    made = writer(path, None)
    made.append(examples(0, 3))

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(zarr.AsyncArray, "setitem", full)
        with pytest.raises(StoreWriteError, match="No space left"):
            made.finish()
    with pytest.raises(ValueError, match="was closed"):
        made.finish()
    with pytest.raises(ValueError, match="incomplete"):
        open_activations(path)


def test_what_waits_for_the_disk_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One append of many chunks waits for the disk, and holds few of them meanwhile."""
    monkeypatch.setattr(module, "PENDING_BYTES", 4 * CHUNK)
    made, most = writer(tmp_path / "a.zarr", 2000), 0
    put = made._writer.put

    def watched(name: str, region: Any, values: np.ndarray) -> None:
        nonlocal most
        put(name, region, values)
        most = max(most, made._writer._waiting)

    monkeypatch.setattr(made._writer, "put", watched)
    made.append(examples(0, 2000))
    made.finish()
    assert CHUNK < most <= 5 * CHUNK
    require_examples(tmp_path / "a.zarr", 2000)


def test_chunks_follow_the_bytes_of_an_example() -> None:
    def spec(*shape: int) -> ActivationSpec:
        return ActivationSpec(("example", "x", "y")[: len(shape)], shape, "float32")

    large, medium, small = spec(10_000, 128, 4096), spec(10_000, 64, 4096), spec(10_000)
    specs = {"large": large, "medium": medium, "small": small}
    assert rows_per_chunk(specs, CHUNK_BYTES, 512) == {"large": 4, "medium": 8, "small": 16}
    assert rows_per_chunk({"small": small}, CHUNK_BYTES, 512) == {"small": 512}
    assert rows_per_chunk({"few": spec(10)}, CHUNK_BYTES, 512) == {"few": 10}
    huge = {"huge": spec(10, 1000, 10_000_000)}
    assert rows_per_chunk(huge, CHUNK_BYTES, 512) == {"huge": 1}
    layers = {f"resid_out_{i}": medium for i in range(40)}
    rows = rows_per_chunk(layers, CHUNK_BYTES, 512)
    assert sum(rows.values()) * medium.row_bytes <= BUFFER_BYTES


@pytest.mark.parametrize("total", [9, 70, 400])
def test_a_kill_costs_little_of_a_run_of_known_length(total: int, tmp_path: Path) -> None:
    writer(tmp_path / "a.zarr", total, chunk_bytes=CHUNK_BYTES).close()
    for name in VARIABLES:
        rows = zarr.open_array(tmp_path / "a.zarr" / name, mode="r").chunks[0]
        assert rows <= max(1, total // 8)


def test_names_of_types() -> None:
    assert dtype_name(np.float32) == dtype_name("float32") == dtype_name(np.dtype("<f4"))
    assert dtype_name("bool") == "bool"
    for bad in ("complex64", "U5", object, "float128"):
        with pytest.raises(ValueError, match="numbers of at most 64 bits"):
            dtype_name(bad)


def test_bfloat16_takes_no_more_bytes_than_its_own_16_bits(tmp_path: Path) -> None:
    width, total = 256, 256
    values = np.random.default_rng(0).normal(size=(total, 16, width)).astype(np.float32)
    values = (values.view(np.uint32) & 0xFFFF0000).view(np.float32)
    sizes = {}
    for name, dtype, stored in (
        ("float", "bfloat16", values),
        ("bits", "uint16", (values.view(np.uint32) >> 16).astype(np.uint16)),
    ):
        dims = ("example", "position", "d_model")
        made = writer(
            tmp_path / name, total, variables={"a": (dims, (16, width), dtype)}, coords={},
            chunk_bytes=CHUNK_BYTES,
        )  # fmt: skip
        made.append({"a": stored})
        made.finish()
        sizes[name] = sum(file.stat().st_size for file in chunks_of(tmp_path / name, "a"))
    assert sizes["float"] <= 1.02 * sizes["bits"] < 0.8 * values.nbytes / 2


def test_the_layout_is_json_that_says_what_the_store_holds(tmp_path: Path) -> None:
    stop_after(tmp_path / "a.zarr", 70, 0)
    root = json.loads((tmp_path / "a.zarr" / "zarr.json").read_text())["attributes"]
    assert root["kind"] == "activations"
    assert root["layout"]["variables"]["resid_out_1"] == {
        "dims": ["example", "position", "d_model"],
        "shape": [POSITIONS, WIDTH],
        "dtype": "bfloat16",
    }
    assert root["created_by"].startswith("basinscope ")


def unembedding() -> dict[str, Any]:
    rng = np.random.default_rng(5)
    return {
        "weight": rng.normal(size=(11, WIDTH)).astype(np.float32),
        "norm_weight": rng.normal(size=WIDTH).astype(np.float32),
        "norm": "rms",
        "eps": 1e-6,
        "softcap": None,
        "scale": 1.0,
    }
