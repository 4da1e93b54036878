"""What a finished store of activations or attributions lacks is named by verify."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from basinscope import ActivationSaver, verify
from basinscope.io.attributions_merge import merge_attributions
from tests.io.activation_examples import examples, writer
from tests.io.attributions_random import as_older, new_writer, random_store, random_sums


def activations(path: Path) -> Path:
    weight = np.ones((3, 8), np.float32)
    numbers = {"norm": "rms", "eps": 1e-6, "scale": 1.0}
    with writer(path, 13, unembedding={"weight": weight, **numbers}) as made:
        made.append(examples(0, 13))
        made.finish()
    return path


@pytest.mark.parametrize(
    ("make", "lost"),
    [
        (random_store, "attr/output/embed/sum/c.0.0"),
        (random_store, "counts/embed/occurrences/c.0"),
        (random_store, "unembedding/weight/c.0.0"),
        (random_store, "attr_abs/output/embed"),
        (random_store, "counts/embed/occurrences"),
        (random_store, "mean_squared_attr/output/embed/sum/zarr.json"),
        (activations, "resid_out_0/c.1.0.0"),
        (activations, "input_ids/c.0.0"),
        (activations, "position/c/0"),
        (activations, "unembedding/weight/c.0.0"),
        (activations, "resid_out_1"),
    ],
)
def test_what_is_missing_is_named(make, lost: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = make(tmp_path / "s.zarr")
    found = verify(path)
    assert (found.damaged, found.complete) == ((), True)
    gone = path / lost
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    (problem,) = verify(path).damaged
    assert str(gone) in problem
    assert "lacks chunk" in problem or "is missing" in problem


def test_merged_and_saved_stores_are_whole_too(tmp_path: Path) -> None:
    parts = [random_store(tmp_path / f"{r}.zarr", r, rank=r, world_size=2) for r in (0, 1)]
    merge_attributions([as_older(parts[0]), parts[1]], tmp_path / "all.zarr")
    assert verify(tmp_path / "all.zarr").complete
    arrays = {"resid_out_0": np.zeros((5, 2, 3)), "scalar": np.zeros(())}
    run = ActivationSaver(tmp_path / "base", "e").save(arrays, "model", "all", None, None)
    found = verify(run / "activations.zarr")
    assert (found.files, found.damaged, found.complete) == (2, (), True)


def test_stores_that_cannot_tell_say_so(tmp_path: Path) -> None:
    """Of older attributions zeros had no files; what is unfinished has not all of its chunks."""
    older = as_older(random_store(tmp_path / "older.zarr"))
    (older / "attr" / "output" / "embed" / "sum" / "c.0.0").unlink()
    with new_writer(tmp_path / "begun.zarr") as harvest:
        harvest.save(*random_sums(np.random.default_rng(0)), tokens=7, batches_done=3)
    with writer(tmp_path / "some.zarr", 50) as made:
        made.append(examples(0, 13))
    for name in ("older.zarr", "begun.zarr", "some.zarr"):
        found = verify(tmp_path / name)
        assert (found.damaged, found.complete) == ((), False)
