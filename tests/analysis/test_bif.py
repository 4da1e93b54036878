"""compute_bif: lazy, streamed, exact about ties, and about nothing but what was written."""

from __future__ import annotations

import gc
import re
import shutil
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dask
import numpy as np
import pytest
import xarray as xr
import zarr

import basinscope
from basinscope.analysis import bif as bif_module
from basinscope.analysis import products, traces
from basinscope.analysis.bif import plan_bif
from basinscope.analysis.plan import Blocks, Plan, PlanError
from basinscope.io import copy as copy_module
from basinscope.io import results, stored
from basinscope.io.copy import TemporaryCopy
from basinscope.io.store import StoreMismatchError, read_store
from basinscope.io.stored import DamagedStoreError
from tests.analysis.stores_random import random_tree, write_devinterp_tree
from tests.analysis.stores_recorded import fail, recorded_store
from tests.reference import analysis as reference

KINDS: dict[str, dict[str, Any]] = {
    "token": {"batch_size": 2},
    "covariance": {"compute_covariance": True},
    "mean of chains": {"reduce_chain_dimension_method": "mean"},
    "average": {"average_tokenwise_bif": True},
    "sequence": {"correlation_method": "sequence"},
    "top_k": {"top_k": 3, "queries": [(4, 2), (0, 1)]},
}
TREE = random_tree(0, chains=3, draws=60, steps=60)  # two files for each chain
WRITTEN = [60, 30, 0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recorded_store(tmp_path_factory.mktemp("bif") / "whole.zarr", TREE)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recorded_store(tmp_path_factory.mktemp("bif") / "stopped.zarr", TREE, WRITTEN)


@pytest.mark.parametrize("source", ["path", "store", "xarray", "memory"])
@pytest.mark.parametrize("kind", KINDS)
def test_building_reads_nothing(
    kind: str, source: str, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples: Any = {
        "path": lambda: str(whole),
        "store": lambda: basinscope.open_store(whole),
        "xarray": lambda: xr.open_datatree(whole, engine="zarr", consolidated=False),
        "memory": lambda: TREE,
    }[source]()

    monkeypatch.setattr(stored, "decode", refuse)
    with dask.config.set(scheduler=refuse):
        lazy = basinscope.compute_bif(samples, **KINDS[kind])
        with pytest.raises(AssertionError, match="something was computed"):
            lazy["influences"].compute()
    if source == "xarray":
        assert not samples["loss_a"].variable._in_memory


@pytest.mark.parametrize("kind", KINDS)
def test_a_result_says_whose_its_sequences_are(kind: str) -> None:
    got = basinscope.compute_bif(TREE, loss_keys=["b", "a"], **KINDS[kind])
    first = 0
    for name, count in got.attrs["observables"].items():
        mine = got["input_ids"][first : first + count].to_numpy()
        np.testing.assert_array_equal(mine, TREE[f"input_ids_{name}"].to_numpy())
        first += count
    assert [*got.attrs["observables"]] == ["b", "a"]
    assert first == got.sizes["batch"]


def test_a_result_of_an_earlier_version_says_it_too(whole: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"correlation_method": "sequence", "output_path": tmp_path / "r.zarr"}
    counts = basinscope.compute_bif(whole, **asked).attrs["observables"]
    group = zarr.open_group(tmp_path / "r.zarr")
    attributes = group.attrs.asdict()
    del attributes["observables"]
    group.attrs.put(attributes)
    assert basinscope.compute_bif(whole, **asked).attrs["observables"] == counts


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_streamed_to_a_path_is_what_memory_holds(
    kind: str, whole: Path, tmp_path: Path
) -> None:
    expected = basinscope.compute_bif(whole, **KINDS[kind]).compute()
    got = basinscope.compute_bif(whole, **KINDS[kind], output_path=tmp_path / "r.zarr")
    plain = xr.open_dataset(tmp_path / "r.zarr", engine="zarr", consolidated=False)
    for found in (got, plain):
        xr.testing.assert_equal(found.compute(), expected)
        assert found["influences"].attrs == expected["influences"].attrs
        assert found.attrs["metadata"] == expected.attrs["metadata"]
    assert got["influences"].chunks is not None


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_stream_is_continued_with_what_is_missing(
    kind: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = basinscope.compute_bif(whole, **KINDS[kind]).compute()
    write, written = results._write_block, []

    def stop(*arguments: Any) -> None:
        if len(written) == most:
            raise KeyboardInterrupt
        write(*arguments)
        written.append(arguments[:2])

    monkeypatch.setattr(results, "_write_block", stop)
    output = {"output_path": tmp_path / "r.zarr"}
    most = 1
    with dask.config.set(scheduler="synchronous"), pytest.raises(KeyboardInterrupt):
        basinscope.compute_bif(whole, **KINDS[kind], **output)
    most = 100
    with dask.config.set(scheduler="synchronous"):
        got = basinscope.compute_bif(whole, **KINDS[kind], **output)
    xr.testing.assert_equal(got.compute(), expected)
    assert 1 < len(written) == len(set(written))
    with dask.config.set(scheduler=lambda *_, **__: pytest.fail("computed again")):
        basinscope.compute_bif(whole, **KINDS[kind], **output)


@pytest.mark.parametrize(("before", "after"), [("little", "plenty"), ("plenty", "little")])
def test_a_stopped_stream_is_continued_in_more_or_less_memory(
    before: str, after: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = {"little": smallest_limit(whole, {}), "plenty": 2**30}
    output = {"output_path": tmp_path / "r.zarr"}
    with monkeypatch.context() as patch:
        patch.setattr(results, "_write_block", refuse)
        with pytest.raises(AssertionError, match="something was computed"):
            basinscope.compute_bif(whole, memory_limit=limits[before], **output)
    limit = limits[after]
    if before == "plenty":  # its blocks are large: a refusal says what they take
        with pytest.raises(PlanError, match=r"memory_limit=\d+") as refused:
            basinscope.compute_bif(whole, memory_limit=limit, **output)
        found = re.search(r"give memory_limit=(\d+)", str(refused.value))
        assert found
        limit = int(found[1])
    got = basinscope.compute_bif(whole, memory_limit=limit, **output)
    close(got["influences"], basinscope.compute_bif(whole)["influences"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"compute_covariance": True}, "bif.compute_covariance: the store has False"),
        ({"top_k": 3}, "bif.top_k: the store has None, this call has 3"),
        ({"batch_index_range_1": [1, 0]}, r"bif.batch_index_range_1: the store has 'int64\(2,\)"),
        ({"loss_keys": ["a"]}, r"bif.loss_keys: the store has 'all', this call has \['a'\]"),
    ],
)
def test_another_result_is_never_continued(
    options: dict[str, Any], said: str, whole: Path, tmp_path: Path
) -> None:
    common: dict[str, Any] = {"batch_index_range_1": [0, 1], "output_path": tmp_path / "r.zarr"}
    basinscope.compute_bif(whole, **common)
    with pytest.raises(StoreMismatchError, match=said):
        basinscope.compute_bif(whole, **{**common, **options})


def test_a_result_of_observables_in_another_order_is_never_continued(
    whole: Path, tmp_path: Path
) -> None:
    common: dict[str, Any] = {"correlation_method": "sequence", "output_path": tmp_path / "r.zarr"}
    basinscope.compute_bif(whole, loss_keys=["a", "b"], **common)
    with pytest.raises(StoreMismatchError, match=r"bif.loss_keys: the store has \['a', 'b'\]"):
        basinscope.compute_bif(whole, loss_keys=["b", "a"], **common)


def test_the_result_of_another_store_is_never_continued(
    whole: Path, stopped: Path, tmp_path: Path
) -> None:
    basinscope.compute_bif(whole, output_path=tmp_path / "r.zarr")
    other = recorded_store(tmp_path / "other.zarr", random_tree(1, chains=3, draws=60, steps=60))
    with pytest.raises(StoreMismatchError, match=r"the store has 'when whole.* 'when other"):
        basinscope.compute_bif(other, output_path=tmp_path / "r.zarr")
    fail(other, 1)
    said = r"draws: the store has \[60, 60, 60\], this call has \[60, 60\]"
    with (
        pytest.warns(UserWarning, match="chain 1 failed"),
        pytest.raises(StoreMismatchError, match=said),
    ):
        basinscope.compute_bif(other, output_path=tmp_path / "r.zarr")


@pytest.mark.parametrize("kind", ["token", "average", "sequence"])
def test_a_covariance_may_be_larger_than_a_correlation(kind: str) -> None:
    tree = random_tree(1, fluctuation=9.0)
    losses = np.concatenate([tree["loss_a"], tree["loss_b"]], axis=2)
    traces = reference.samples(losses, "stack")
    oracle = {
        "token": reference.token_blocks,
        "average": reference.averaged_blocks,
        "sequence": reference.sequence_influence,
    }[kind]
    expected = oracle(traces, traces, "covariance")
    assert np.abs(expected).max() > 3
    got = basinscope.compute_bif(tree, **{**KINDS[kind], "compute_covariance": True})
    np.testing.assert_allclose(got["influences"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", ["all", [8, 2, 5, 0], [1, 2, 3]])
@pytest.mark.parametrize("covariance", [True, False])
def test_sequences_in_memory_are_averaged_in_groups_as_at_once(
    covariance: bool, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = random_tree(2, observables={"a": 7, "b": 5})
    options: dict[str, Any] = {
        "average_tokenwise_bif": True,
        "compute_covariance": covariance,
        "batch_index_range_1": rows,
    }
    at_once = basinscope.compute_bif(tree, **options)["influences"].compute()
    one = 4 * 4 * 24  # bytes of a sequence: tokens, samples
    monkeypatch.setattr(traces, "GROUP_BYTES", 2 * one)
    in_groups = basinscope.compute_bif(tree, **options)["influences"].compute()
    xr.testing.assert_equal(in_groups, at_once)
    between_tokens = basinscope.compute_bif(
        tree, compute_covariance=covariance, batch_index_range_1=rows
    )["influences"]
    dims = ("target_position", "target_position_T")
    np.testing.assert_allclose(at_once, between_tokens.mean(dims), rtol=0, atol=1e-6)


@pytest.mark.parametrize("integer", ["batch_size", "top_k"])
def test_numpy_integers_are_integers(integer: str, whole: Path, tmp_path: Path) -> None:
    got = basinscope.compute_bif(whole, **{integer: np.int64(2)}, output_path=tmp_path / "numpy")
    xr.testing.assert_equal(got.compute(), basinscope.compute_bif(whole, **{integer: 2}).compute())


@pytest.fixture
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The paths of temporary copies, in an own directory."""
    made: list[str] = []

    class Noted(TemporaryCopy):
        def __init__(self, nbytes: int) -> None:
            super().__init__(nbytes)
            made.append(self.path)

    monkeypatch.setattr(traces, "TemporaryCopy", Noted)
    monkeypatch.setattr(copy_module, "CHUNK_BYTES", 1000)  # of stores this small
    (tmp_path / "spill").mkdir()
    with dask.config.set({"temporary-directory": str(tmp_path / "spill"), "num_workers": 2}):
        yield made


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("kind", ["token", "mean of chains", "average", "top_k"])
def test_a_foreign_layout_in_little_memory_goes_through_a_copy_that_goes_away(
    kind: str, streamed: bool, tmp_path: Path, copies: list[str]
) -> None:
    path = write_devinterp_tree(foreign_tree(), tmp_path / "theirs.zarr")
    options = {name: value for name, value in KINDS[kind].items() if name != "batch_size"}
    limit = limit_of_a_copy(path, options)
    expected = basinscope.compute_bif(path, **options).compute()
    assert copies == []
    output = {"output_path": tmp_path / "r.zarr"} if streamed else {}
    got = basinscope.compute_bif(path, **options, memory_limit=limit, **output)
    if not streamed:
        assert copies == []
    got = got.compute()
    assert [Path(copy).parent for copy in copies] == [tmp_path / "spill"]
    close(got["influences"], expected["influences"])
    require_removed(tmp_path / "spill")


def test_a_copy_goes_away_when_the_computation_fails(tmp_path: Path, copies: list[str]) -> None:
    path = write_devinterp_tree(foreign_tree(), tmp_path / "theirs.zarr")
    lazy = basinscope.compute_bif(path, memory_limit=limit_of_a_copy(path, {}))
    (path / "loss_a" / "c" / "1" / "0" / "0" / "0").write_bytes(b"damaged")
    with pytest.raises(DamagedStoreError):
        lazy["influences"].compute()
    assert len(copies) == 1
    require_removed(tmp_path / "spill")


@pytest.mark.parametrize(
    ("top_k", "sequences", "queries"),
    [
        (1, range(20), "all"),
        (3, None, [(39, 8), (0, 1), (39, 8), (0, 3), (5, 1), (17, 4), (2, 2)]),
        (3, [3, 7, 12], [(7, 2), (3, 1), (3, 8), (20, 5)]),
        (3, [12, 3, 7], [(7, 2), (3, 1), (3, 8), (20, 5)]),
        (7, [3], [(3, 1), (4, 1), (0, 3)]),
        (400, [1, 0, 5], [(1, 1), (5, 5)]),
    ],
)
@pytest.mark.parametrize(("output", "pass_of"), [(100, 1000), (7, 3), (1, 100)])
def test_partners_are_those_of_brute_force_with_ties_in_order_of_place(
    top_k: int,
    sequences: Sequence[int] | None,
    queries: Any,
    output: int,
    pass_of: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    signs = tied_signs()
    losses = (3 + signs.transpose(2, 0, 1)[None]).astype("float32")
    tree = random_tree(0, chains=1, draws=16, tokens=8, observables={"a": 40})
    tree["loss_a"] = tree["loss_a"].copy(data=losses)
    cut_into(Blocks(output, output, held=False, queries=pass_of), monkeypatch)
    candidates = {} if sequences is None else {"batch_index_range_2": sequences}
    got = basinscope.compute_bif(tree, top_k=top_k, queries=queries, **candidates).compute()
    asked = [*product(range(40), range(1, 9))] if queries == "all" else queries
    assert list(zip(*(got[f"query_{n}"].values.tolist() for n in PLACE), strict=True)) == asked
    for number, query in enumerate(asked):
        for sign, name in ((1, "positive"), (-1, "negative")):
            expected = brute_force(signs, query, sequences or range(40), top_k, sign)
            found = got.sel(sign=name).isel(query=number)
            fields = (found[n].values.tolist() for n in ("influences", *PARTNER))
            assert str(list(zip(*fields, strict=True))) == str(expected), (query, name)


@pytest.mark.parametrize("draw", [0, 5])
def test_a_loss_that_is_infinite_is_nobodys_partner_and_takes_nobodys_place(draw: int) -> None:
    tree = random_tree(0, chains=1, draws=24, tokens=16, observables={"a": 80})
    losses = tree["loss_a"].values.copy()
    losses[0, draw, 10, 3] = np.inf
    tree["loss_a"] = tree["loss_a"].copy(data=losses)
    options: dict[str, Any] = {"compute_covariance": True}
    queries = [(sequence, position) for sequence in range(0, 80, 8) for position in (1, 9)]
    with np.errstate(invalid="ignore"):
        got = basinscope.compute_bif(tree, top_k=2, queries=queries, **options).compute()
        dense = basinscope.compute_bif(tree, **options)["influences"].values
    for number, (sequence, position) in enumerate(queries):
        influences = dense[sequence, :, position - 1].copy()
        influences[sequence, position - 1] = np.nan
        ranked = np.sort(influences[np.isfinite(influences)])
        found = got["influences"].isel(query=number)
        close(found.sel(sign="positive"), ranked[:-3:-1])
        close(found.sel(sign="negative"), ranked[:2])


def test_cuda_without_torch_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_torch(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(products.importlib, "import_module", no_torch)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'basinscope\[sampling\]'"):
        basinscope.compute_bif(TREE, device="cuda:1")
    np.testing.assert_array_equal(
        basinscope.compute_bif(TREE, device="cpu")["influences"],
        basinscope.compute_bif(TREE)["influences"],
    )


def test_cuda_without_a_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: False))
    monkeypatch.setattr(products.importlib, "import_module", lambda _: torch)
    with pytest.raises(ValueError, match="device='cuda': torch finds no CUDA device"):
        basinscope.compute_bif(TREE, device="cuda")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"correlation_method": "sequences"}, "correlation_method='sequences'.*'token' or"),
        ({"reduce_chain_dimension_method": "sum"}, "reduce_chain_dimension_method='sum'"),
        ({"loss_keys": ["a", "c"]}, "no observable 'c'; it has a, b"),
        ({"loss_keys": []}, "loss_keys"),
        ({"batch_index_range_1": [5]}, "batch_index_range_1 asks for sequence 5.*0 to 4"),
        ({"batch_index_range_1": [-1]}, "batch_index_range_1 asks for sequence -1"),
        ({"batch_index_range_2": []}, "batch_index_range_2"),
        ({"batch_index_range_2": "some"}, "batch_index_range_2='some'"),
        ({"batch_index_range_2": [0.5]}, "batch_index_range_2"),
        ({"batch_index_range_2": [True, False]}, "batch_index_range_2"),
        ({"batch_index_range_2": [[0], [1, 2]]}, "batch_index_range_2"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 2.0}, "batch_size=2.0"),
        ({"device": "mps"}, "device='mps'"),
        ({"device": "cudas"}, "device='cudas'"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_k": True}, "top_k=True"),
        ({"top_k": 2, "correlation_method": "sequence"}, "top_k.*correlation_method"),
        ({"top_k": 2, "average_tokenwise_bif": True}, "top_k.*average_tokenwise_bif"),
        ({"queries": [(0, 1)]}, "queries.*top_k"),
        ({"top_k": 2, "queries": []}, "queries"),
        ({"top_k": 2, "queries": "some"}, "queries"),
        ({"top_k": 2, "queries": [0, 1]}, "queries"),
        ({"top_k": 2, "queries": [(0, 1), (2,)]}, "queries"),
        ({"top_k": 2, "queries": [(0, 1), (1, 0)]}, r"queries .*\(1, 0\).*positions 1 to 4"),
        ({"top_k": 2, "queries": [(0, 5)]}, r"queries .*\(0, 5\)"),
        ({"top_k": 2, "queries": [(0, 1), (5, 1)]}, r"queries .*\(5, 1\).*0 to 4"),
        ({"top_k": 2, "queries": [(-1, 1)]}, r"queries .*\(-1, 1\)"),
        ({"memory_limit": "much"}, "memory_limit='much' is no size"),
        ({"memory_limit": 0}, "memory_limit=0"),
        ({"memory_limit": [1]}, r"memory_limit=\[1\]"),
    ],
    ids=str,
)
def test_a_wrong_argument_is_named(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        basinscope.compute_bif(TREE, **options)
    with pytest.raises(ValueError, match=said):
        plan_bif(TREE, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_a_failed_chain_is_left_out_and_named(kind: str, whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "failed.zarr"
    shutil.copytree(whole, path)
    fail(path, 1)
    shutil.rmtree(path / "loss_a" / "c" / "1")  # what a failed chain wrote is never read
    with pytest.warns(UserWarning, match=r"left out.*chain 1 failed at step 7 \(the loss is not"):
        got = basinscope.compute_bif(path, **KINDS[kind]).compute()
    others = xr.DataTree(TREE.dataset.isel(chain=[0, 2]))
    expected = basinscope.compute_bif(others, **KINDS[kind])
    close(got["influences"], expected["influences"].compute())


def test_an_incomplete_store_is_refused_with_what_is_missing(stopped: Path) -> None:
    said = r"chain 1 is unfinished \(30 draws.*chain 2 was not started.*allow_incomplete=True"
    with pytest.raises(ValueError, match=said):
        basinscope.compute_bif(stopped)


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("chains", ["stack", "mean"])
def test_an_incomplete_store_counts_as_far_as_it_is_recorded(
    chains: str, opened: bool, stopped: Path
) -> None:
    losses = np.concatenate([TREE["loss_a"], TREE["loss_b"]], axis=2)
    if chains == "stack":
        parts = [losses[chain, :rows] for chain, rows in enumerate(WRITTEN)]
        samples = reference.samples(np.concatenate(parts)[None], "stack")
    else:
        samples = reference.samples(losses[:2, : min(WRITTEN[:2])], "mean")
    options: dict[str, Any] = {
        "allow_incomplete": True,
        "reduce_chain_dimension_method": chains,
    }
    source: Any = read_store(stopped) if opened else stopped
    with pytest.warns(UserWarning, match="chain 2 was not started"):
        got = basinscope.compute_bif(source, **options)
    close(got["influences"], reference.token_blocks(samples, samples, "correlation"))


@pytest.mark.parametrize("kind", KINDS)
def test_draws_that_are_recorded_but_lost_are_an_error_never_nan(
    kind: str, whole: Path, tmp_path: Path
) -> None:
    path = tmp_path / "lost.zarr"
    shutil.copytree(whole, path)
    (path / "loss_a" / "c" / "1" / "1" / "0" / "0").unlink()
    lazy = basinscope.compute_bif(path, **KINDS[kind])
    with pytest.raises(DamagedStoreError, match=r"loss_a/c/1/1/0/0"):
        lazy["influences"].compute()


def test_a_cluster_of_processes_gives_the_same_numbers(
    whole: Path, tmp_path: Path, copies: list[str]
) -> None:
    distributed = pytest.importorskip("distributed")
    other = recorded_store(tmp_path / "l0.zarr", random_tree(1, chains=3, draws=60, steps=60))
    theirs = write_devinterp_tree(foreign_tree(), tmp_path / "theirs.zarr")
    limit = limit_of_a_copy(theirs, {})

    def compute() -> dict[str, xr.Dataset]:
        found = {kind: basinscope.compute_bif(whole, **KINDS[kind]) for kind in KINDS}
        found["llc"] = basinscope.compute_llc(whole)
        sus = basinscope.compute_susceptibilities({"full": whole, "l0": other}, "b")
        found["sus"] = sus["susceptibilities"].to_dataset()
        found["context"] = sus["context"].to_dataset()
        found["copied"] = basinscope.compute_bif(theirs, memory_limit=limit)
        return {name: dataset.compute() for name, dataset in found.items()}

    expected = compute()
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster),
    ):
        got = compute()
        streamed = basinscope.compute_bif(whole, **KINDS["token"], output_path=tmp_path / "r")
        assert len(copies) == 1  # that of the threads: workers made their own
    for name, dataset in expected.items():
        xr.testing.assert_allclose(got[name], dataset, rtol=1e-6, atol=1e-6)
    close(streamed["influences"], expected["token"]["influences"])
    require_removed(tmp_path / "spill")


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("something was computed")


PLACE = ("batch", "target_position")
PARTNER = ("partner_batch", "partner_target_position")


def foreign_tree() -> xr.DataTree:
    return random_tree(4, draws=60, observables={"a": 12, "b": 3})


def smallest_limit(path: Path, options: dict[str, Any]) -> int:
    limit = plan_bif(path, memory_limit=1, **options).least_memory
    while plan_bif(path, memory_limit=limit, **options).peak_memory > limit:
        limit = limit * 21 // 20
    return limit


def limit_of_a_copy(path: Path, options: dict[str, Any]) -> int:
    """Find a limit under which losses are copied first."""
    limit = smallest_limit(path, options)
    assert plan_bif(path, memory_limit=limit, **options).bytes_to_write
    return limit


def require_removed(directory: Path) -> None:
    """Require that no copy is left, in a while: the thread that needed one last removes it."""
    deadline = time.monotonic() + 10
    while list(directory.glob("basinscope-copy-*")):
        assert time.monotonic() < deadline, list(directory.iterdir())
        gc.collect()
        time.sleep(0.01)


def cut_into(blocks: Blocks, monkeypatch: pytest.MonkeyPatch) -> None:
    choose = bif_module.plan_influence

    def chosen(*arguments: Any) -> tuple[Plan, Blocks]:
        return choose(*arguments)[0], blocks

    monkeypatch.setattr(bif_module, "plan_influence", chosen)


def tied_signs() -> np.ndarray:
    """Make traces of eight 1 and eight -1, whose correlations are exact and mostly tied.

    Some never change. (sequence, token, sample)
    """
    signs = np.tile(np.repeat([1.0, -1.0], 8), (40, 8, 1))
    np.random.default_rng(0).permuted(signs, axis=2, out=signs)
    signs[0, 2] = signs[5] = 1
    return signs


def brute_force(
    signs: np.ndarray, query: tuple[int, int], sequences: Any, top_k: int, sign: int
) -> list[tuple[float, int, int]]:
    """List (influence, sequence, position) of the partners of one sign, padded."""
    trace = signs[query[0], query[1] - 1]
    found = []
    for sequence in sequences:
        for token in range(8):
            candidate = signs[sequence, token]
            varies = np.ptp(candidate) * np.ptp(trace) > 0
            value = float(candidate @ trace / 16)
            if varies and sign * value > 0 and (sequence, token + 1) != query:
                found.append((value, sequence, token + 1))
    found.sort(key=lambda partner: (-abs(partner[0]), *partner[1:]))
    return [*found, *[(float("nan"), -1, -1)] * top_k][:top_k]


def close(got: Any, expected: Any) -> None:
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6)


def test_a_result_in_memory_is_there_once() -> None:
    tree = random_tree(0, observables={"a": 64}, chains=1, draws=6, steps=6, tokens=32)
    result = basinscope.compute_bif(tree)
    result.compute()  # what only the first call takes
    tracemalloc.start()
    try:
        computed = result.compute()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert computed.influences.nbytes == 4 * (64 * 32) ** 2
    assert peak < 1.3 * computed.influences.nbytes
