"""Analyses against devinterp 2.0.1 in memory, and against the disk and the memory limit beyond it.

    python -m benchmarks.analysis            # both
    python -m benchmarks.analysis --part fits
    python -m benchmarks.analysis --part larger --gigabytes 4.3 --limit 512MB

``fits``: losses (4 chains, 200 draws, 64 sequences, 128 tokens) of two observables and of every
step's batch, each implementation on its own store of the same losses; ratios of neighbours in time,
of calls in a row that last 0.2 seconds. ``in memory`` the losses are loaded beforehand, ``from
disk`` each call opens its store. ``sgemm_share`` is the time of one plain float32 matrix product of
the same shapes over the time of ours.

``larger``: a store at least eight times the memory limit. Each analysis runs in a process of its
own, whose peak resident memory beyond that after the imports is measured; then the rate at which
losses pass, against a bare loop that only reads and decodes the same chunks, file by file, with as
many threads and the same decoder, and against zarr-python's own loop.

``rounding_error``: susceptibilities of losses that move by 0.1, 0.01 and 0.001 nats, against
float64's.
"""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr

from benchmarks.harness import paired, parser, record

FITS = {"chains": 4, "draws": 200, "sequences": 64, "tokens": 128}
TOY = {"chains": 2, "draws": 20, "sequences": 6, "tokens": 8}
LARGER_TOKENS = 256
TURN_SECONDS = 0.2  # of calls in a row, where one is shorter
PEAK_ALLOWANCE = 150 * 2**20  # bytes beyond the limit: the interpreter's and Dask's own


def main() -> None:
    options = parser(__doc__, "analysis.jsonl")
    options.add_argument("--part", choices=["fits", "larger", "both"], default="both")
    options.add_argument("--gigabytes", type=float, default=4.3, help="losses of the large store")
    options.add_argument("--limit", default="512MB", help="memory limit for the large store")
    options.add_argument("--in-process", nargs=2, metavar=("ANALYSIS", "STORE"), help="internal")
    asked = options.parse_args()
    if asked.in_process:
        print(json.dumps(peak_growth(asked.in_process[0], Path(asked.in_process[1]), asked.limit)))
        return
    with tempfile.TemporaryDirectory() as folder:
        if asked.part != "larger":
            shape = TOY if asked.toy else FITS
            for name, figures in fits(Path(folder), shape, asked.rounds).items():
                record(asked.out, f"analysis {name}", shape, figures)
        if asked.part != "fits":
            settings = {"gigabytes": 0.02 if asked.toy else asked.gigabytes, "limit": asked.limit}
            for name, figures in larger(Path(folder), **settings, rounds=asked.rounds).items():
                record(asked.out, f"analysis {name} out of core", settings, figures)


def fits(folder: Path, shape: dict[str, int], rounds: int) -> dict[str, dict[str, Any]]:
    """Compare with the peer, on losses in memory, and on a store that each opens first."""
    observables = {"a": shape["sequences"], "task": shape["sequences"]}
    ours, theirs = folder / "ours.zarr", folder / "peer.zarr"
    sizes = shape["chains"], shape["draws"], shape["sequences"], shape["tokens"]
    write_store(ours, *sizes, observables, seed=0)
    write_as_peer(ours, theirs)

    def opened(path: Path) -> xr.DataTree:
        return xr.open_datatree(path, engine="zarr", consolidated=False)

    mine, peer = opened(ours).load(), opened(theirs).load()
    found = {}
    for name, figures in compare(lambda: mine, lambda: peer, rounds).items():
        found[f"{name}, in memory"] = figures
    for name, figures in compare(lambda: ours, lambda: opened(theirs), rounds).items():
        found[f"{name}, from disk"] = figures
    found["token influence, in memory"] |= product_share(shape, rounds)
    found["susceptibilities, in memory"] |= rounding_errors(mine)
    return found


def compare(
    ours: Callable[[], Any], peer: Callable[[], Any], rounds: int
) -> dict[str, dict[str, Any]]:
    """Time every analysis of both; ``ours`` and ``peer`` give what each takes."""
    from devinterp.slt.bif import compute_bif as peer_bif
    from devinterp.slt.llc import compute_llc as peer_llc
    from devinterp.slt.susceptibilities import compute_susceptibilities as peer_susceptibilities

    import basinscope

    def influence(**options: Any) -> tuple[Callable[[], object], Callable[[], object]]:
        def by_peer() -> object:
            with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
                return peer_bif(peer(), loss_keys=["a"], device="cpu", **options)

        return (
            lambda: basinscope.compute_bif(ours(), loss_keys=["a"], **options).compute(),
            by_peer,
        )

    def susceptibilities_by_us() -> object:
        stores = {"full": ours(), "l0": ours()}
        found = basinscope.compute_susceptibilities(stores, "task")
        sus = found["susceptibilities"]
        sus.dataset = sus.to_dataset().drop_vars("sus_mcse")  # the peer gives none
        return found.compute()

    pairs: dict[str, tuple[int, Callable[[], object], Callable[[], object]]] = {
        "token influence": (rounds, *influence()),
        "average influence": (rounds, *influence(average_tokenwise_bif=True)),
        "sequence influence": (3 * rounds, *influence(correlation_method="sequence")),
        "susceptibilities": (
            3 * rounds,
            susceptibilities_by_us,
            lambda: peer_susceptibilities({"full": peer(), "l0": peer()}, "task"),
        ),
        "LLC": (
            6 * rounds,
            lambda: basinscope.compute_llc(ours(), observables=[])[PEER_VARIABLES].compute(),
            lambda: peer_llc(peer()).compute(),
        ),
    }
    return {
        name: paired(by_us, by_peer, count, least_seconds=TURN_SECONDS)
        for name, (count, by_us, by_peer) in pairs.items()
    }


PEER_VARIABLES = [
    "llc_mean", "llc_std", "llc_per_chain", "llc_scalar", "loss_trace", "init_loss",
]  # fmt: skip


def product_share(shape: dict[str, int], rounds: int) -> dict[str, Any]:
    """Time the product of all traces against a plain one of the same shapes."""
    from basinscope.analysis.bif import multiply_traces

    rows = shape["sequences"] * shape["tokens"]
    samples = shape["chains"] * shape["draws"]
    traces = np.random.default_rng(0).standard_normal((rows, samples), dtype=np.float32)
    other = traces.copy()
    blocks = [traces.reshape(shape["sequences"], shape["tokens"], samples)]
    share = paired(lambda: multiply_traces(blocks, blocks), lambda: traces @ other.T, 3 * rounds)
    flops = 2 * rows * rows * samples
    return {
        "sgemm_share": share["ratio"],
        "sgemm_share_quartiles": share["ratio_quartiles"],
        "sgemm_gflop_per_s": round(flops / max(share["peer_s"], 1e-4) / 1e9, 1),
    }


def rounding_errors(like: xr.DataTree) -> dict[str, Any]:
    """Compare susceptibilities with float64's where losses move by little.

    Largest error over the standard deviation of the susceptibilities, of ours and of the peer's.
    """
    from devinterp.slt.susceptibilities import compute_susceptibilities as peer_susceptibilities

    import basinscope

    errors: dict[str, Any] = {}
    for fluctuation in (0.1, 0.01, 0.001):
        runs = {name: moving_losses(like, fluctuation, seed) for seed, name in enumerate(RUNS)}
        (task, probe), (full_task, full_probe) = (
            [runs[name][f"loss_{of}"].to_numpy().astype(np.float64) for of in ("task", "a")]
            for name in reversed(RUNS)
        )
        mean = task.mean((2, 3))
        phi = mean - runs["full"]["init_loss"].to_numpy().astype(np.float64).mean()
        exact = (phi * mean).mean() - (phi[:, :, None, None] * probe).mean((0, 1))
        exact -= phi.mean() * (full_task.mean() - full_probe.mean((0, 1)))
        for who, compute in {
            "ours": basinscope.compute_susceptibilities, "peer": peer_susceptibilities,
        }.items():  # fmt: skip
            found = compute(runs, "task")["susceptibilities"]["sus"].to_numpy()
            error = float(np.abs(found.ravel() - exact.ravel()).max() / exact.std())
            errors.setdefault(f"{who}_rounding_error", {})[str(fluctuation)] = float(f"{error:.1e}")
    return errors


RUNS = ("full", "l0")


def moving_losses(like: xr.DataTree, fluctuation: float, seed: int) -> xr.DataTree:
    """Fill a tree with losses that all runs share, and what moves them: together, and alone."""
    dataset = like.to_dataset().copy()
    tokens, draws = np.random.default_rng(0), np.random.default_rng(1 + seed)
    for name in ("loss_task", "loss_a"):
        variable = dataset[name]
        base = tokens.gamma(2.0, 1.5, variable.shape[2:])
        together = base * draws.standard_normal((*variable.shape[:2], 1, 1))
        alone = draws.standard_normal(variable.shape)
        losses = base + fluctuation * (together + alone)
        dataset[name] = variable.dims, losses.astype(np.float32)
    dataset["init_loss"] = dataset["init_loss"].dims, np.full_like(dataset["init_loss"], 3)
    return xr.DataTree(dataset)


def larger(folder: Path, gigabytes: float, limit: str, rounds: int) -> dict[str, dict[str, Any]]:
    """Measure memory and rate on a store that does not fit the memory limit."""
    store = folder / "large.zarr"
    per_sequence = 4 * 200 * LARGER_TOKENS * 4
    sequences = max(16, int(gigabytes * 1e9 / per_sequence))
    micro = sequences // 6
    observables = {"a": (sequences - micro) // 2, "task": (sequences - micro) // 2}
    write_store(store, 4, 200, micro, LARGER_TOKENS, observables, seed=0)
    found: dict[str, dict[str, Any]] = {}
    for analysis in ANALYSES:
        command = [sys.executable, "-m", "benchmarks.analysis", "--limit", limit]
        done = subprocess.run(
            [*command, "--in-process", analysis, str(store)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        found[analysis] = json.loads(done.stdout.splitlines()[-1])
    for analysis in ("LLC", "susceptibilities"):
        found[analysis] |= rate_share(ANALYSES[analysis], store, limit, 3 * rounds)
    return found


def run_llc(store: Path, limit: str) -> object:
    import basinscope

    return basinscope.compute_llc(store, memory_limit=limit).compute()


def run_susceptibilities(store: Path, limit: str) -> object:
    import basinscope

    stores = {"full": store, "l0": store}
    return basinscope.compute_susceptibilities(stores, "task", memory_limit=limit).compute()


def run_average(store: Path, limit: str) -> object:
    import basinscope

    options: dict[str, Any] = {"average_tokenwise_bif": True, "memory_limit": limit}
    return basinscope.compute_bif(store, **options).compute()


def run_top_k(store: Path, limit: str) -> object:
    import basinscope

    queries = [(7 * i, 1 + (11 * i) % LARGER_TOKENS) for i in range(8)]
    queries = [(q, 1 + (p + 31 * j) % LARGER_TOKENS) for q, p in queries for j in range(8)]
    count = sum(basinscope.open_store(store)[f"loss_{n}"].shape[2] for n in ("a", "task"))
    queries = [(q % count, p) for q, p in queries]
    return basinscope.compute_bif(store, top_k=10, queries=queries, memory_limit=limit).compute()


def run_streamed(store: Path, limit: str) -> object:
    import basinscope

    rows = range(basinscope.open_store(store)["loss_a"].shape[2])
    with tempfile.TemporaryDirectory(dir=store.parent) as folder:
        return basinscope.compute_bif(
            store,
            batch_index_range_1=rows[:48],
            batch_index_range_2=rows[32:160] or rows,
            memory_limit=limit,
            output_path=Path(folder) / "bif.zarr",
        )


ANALYSES: dict[str, Callable[[Path, str], object]] = {
    "LLC": run_llc,
    "susceptibilities": run_susceptibilities,
    "average influence": run_average,
    "top-k of 64 queries": run_top_k,
    "token influence streamed to disk": run_streamed,
}


def peak_growth(analysis: str, store: Path, limit: str) -> dict[str, Any]:
    """Run one analysis in this process; say how far its memory rose, and how long it took."""
    import psutil
    from dask.utils import parse_bytes

    from basinscope import compute_bif, compute_llc, compute_susceptibilities  # noqa: F401
    from benchmarks.harness import own_peak_memory

    warnings.simplefilter("ignore")
    before = psutil.Process().memory_info().rss
    start = time.perf_counter()
    ANALYSES[analysis](store, limit)
    seconds = time.perf_counter() - start
    growth = own_peak_memory() - before
    group = zarr.open_group(store, mode="r")
    losses = sum(array.nbytes for name, array in group.arrays() if "loss" in name)
    allowed = parse_bytes(limit)
    return {
        "store_over_limit": round(losses / allowed, 2),
        "peak_growth_mib": round(growth / 2**20, 1),
        "within": bool(growth <= allowed + PEAK_ALLOWANCE),
        "seconds": round(seconds, 2),
    }


def rate_share(
    analysis: Callable[[Path, str], object], store: Path, limit: str, rounds: int
) -> dict[str, Any]:
    """Compare an analysis with loops that only read and decode what it reads."""
    from basinscope.analysis.plan import workers
    from basinscope.analysis.stores import files_of, open_samples

    names = ["sampling_loss_micro", "loss_a", "loss_task"]
    if analysis is run_susceptibilities:
        names = ["loss_task", "loss_a"] * 2
    samples = open_samples(store)
    pieces = [p for n in names for part in samples.losses(n) for _, p in files_of(part)]
    total = sum(piece.nbytes for piece in pieces)

    def decode(piece: Any) -> None:
        for _ in piece.chunks():
            pass

    def bare() -> None:
        with ThreadPoolExecutor(workers()) as pool:
            list(pool.map(decode, pieces))

    def through_zarr() -> None:
        group = zarr.open_group(store, mode="r")
        for name in names:
            array: Any = group[name]
            for chain in range(array.shape[0]):
                for row in range(0, array.shape[1], (array.shards or array.chunks)[1]):
                    _ = array[chain : chain + 1, row : row + (array.shards or array.chunks)[1]]

    share = paired(lambda: analysis(store, limit), bare, rounds)
    start = time.perf_counter()
    through_zarr()
    zarr_seconds = time.perf_counter() - start
    return {
        "share_of_bare_loop": share["ratio"],
        "share_quartiles": share["ratio_quartiles"],
        "gb_per_s": round(total / share["ours_s"] / 1e9, 2),
        "bare_gb_per_s": round(total / share["peer_s"] / 1e9, 2),
        "zarr_loop_gb_per_s": round(total / zarr_seconds / 1e9, 2),
    }


def write_store(
    path: Path,
    chains: int,
    draws: int,
    micro: int,
    tokens: int,
    observables: dict[str, int],
    seed: int,
) -> None:
    """Write a store as ``sample()`` would, of losses that wander about their own means."""
    from basinscope.io.schema import sampling_arrays
    from basinscope.io.store import DONE, SampleStore, provenance

    arrays = sampling_arrays(
        num_chains=chains, num_draws=draws, num_steps=draws, batch_size=16,
        gradient_accumulation_steps=max(1, micro // 16), num_init_loss_batches=32,
        sequence_length=tokens + 1, observables=observables, largest_id=255, num_dataset_rows=1000,
        shared_batches=True, shared_start=True, save_metrics=False, save_sampling_input_ids=False,
    )  # fmt: skip
    settings = {"n_beta": 30.0, "lr": 1e-4, "num_burnin_steps": 0, "num_steps_bw_draws": 1}
    attributes = {**provenance(), "metadata": {"config": {"sampler": settings}}}
    store = SampleStore.create(path, arrays, attributes, chains)
    rng = np.random.default_rng(seed)
    for name, array in store.arrays.items():
        if array.ndim == 4:
            base = 3 + rng.standard_normal(array.shape[2:], dtype=np.float32)
            rows = arrays[name].rows_per_write
            for chain in range(chains):
                for first in range(0, array.shape[1], rows):
                    count = min(rows, array.shape[1] - first)
                    noise = rng.standard_normal((count, *base.shape), dtype=np.float32)
                    array[chain, first : first + count] = base + 0.1 * noise
        elif name in ("init_loss", "init_batch_loss"):
            array[...] = 2.9
        elif array.dtype.kind == "u":
            array[...] = rng.integers(0, 256, array.shape)
    for chain in range(chains):
        store.update_record(
            chain, state=DONE, steps_written=draws, draws_written=draws, init_loss_written=True
        )
    store.finish()


def write_as_peer(ours: Path, theirs: Path) -> None:
    """Write the same losses as devinterp lays them out."""
    dataset = xr.open_datatree(ours, engine="zarr", consolidated=False).dataset.load()
    dataset = dataset.drop_vars(["n_beta", "sampling_rows", "init_batch_loss"])
    for name, variable in dataset.data_vars.items():
        variable.encoding = {}
        if variable.dtype.kind == "u":
            dataset[name] = variable.astype(np.int64)
    chunks = {
        str(name): {"chunks": (1, min(50, variable.shape[1]), *variable.shape[2:])}
        for name, variable in dataset.data_vars.items()
        if variable.ndim == 4
    }
    dataset.attrs = {"metadata": dataset.attrs["metadata"], "completed": 1}
    xr.DataTree(dataset).to_zarr(theirs, consolidated=False, encoding={"/": chunks})


if __name__ == "__main__":
    sys.exit(main())
