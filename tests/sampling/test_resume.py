"""Interrupted runs: nothing finished is lost, and the same call ends with the same bits."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
import zarr
from torch import Tensor, nn

from basinscope.io.store import DONE, PENDING, RUNNING, ChainLockedError, SampleStore, open_store
from basinscope.io.writer import StoreWriteError
from basinscope.sampling import chain as chain_module
from basinscope.sampling import workers
from basinscope.sampling.chain import Progress
from basinscope.sampling.job import next_token_loss
from basinscope.sampling.sample import sample
from basinscope.sampling.workers import WorkerError, _printer
from tests.conftest import token_rows
from tests.models_small import RawModel

DRAWS = 12
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rmsprop": {"sampling_method": "rmsprop_sgld", "save_metrics": True},
    "dropout": {"train_mode": True, "num_burnin_steps": 3, "num_steps_bw_draws": 2},
    "own batches": {
        "match_sampling_input_ids_across_chains": False,
        "save_sampling_input_ids": True,
        "init_noise": 0.01,
    },
}
Whole = Callable[[str], xr.DataTree]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Give the store of a variant that nothing interrupts, without checkpoints; sampled once."""
    folder, made = tmp_path_factory.mktemp("whole"), dict[str, xr.DataTree]()

    def of(variant: str) -> xr.DataTree:
        if variant not in made:
            LOSS.reset()
            made[variant] = run(folder / f"{variant}.zarr", **VARIANTS[variant]).load()
        return made[variant]

    return of


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, -2), (signal.SIGTERM, 143)])
def test_a_signalled_script_keeps_its_chains_and_the_same_call_continues(
    number: int, exit_code: int, tmp_path: Path, whole: Whole
) -> None:
    code = """
import sys
from pathlib import Path
from tests.sampling.test_resume import LOSS, run
LOSS.announce_at, LOSS.seconds = 20, 0.01
run(Path(sys.argv[1]))
"""
    script = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "s.zarr")], stdout=subprocess.PIPE
    )
    assert script.stdout is not None
    assert script.stdout.readline() == b"step 20\n"
    script.send_signal(number)
    assert script.wait(timeout=60) == exit_code

    store = SampleStore(tmp_path / "s.zarr")
    assert [r["state"] for r in store.records().values()] == [DONE, RUNNING, PENDING]
    assert not store.is_locked(1)
    with pytest.warns(UserWarning, match=r"chain 1 is unfinished .*; chain 2 was not started"):
        open_store(tmp_path / "s.zarr")
    LOSS.reset()
    continued = run(tmp_path / "s.zarr")
    assert LOSS.steps == 2 * DRAWS, "the finished chain was sampled again"
    assert_equal(continued, whole("plain"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_signal_writes_a_checkpoint_from_which_the_chain_continues(
    number: int, variant: str, tmp_path: Path, whole: Whole
) -> None:
    settings = {**VARIANTS[variant], "checkpoint_every": 1000}
    steps = steps_of(variant)
    LOSS.reset(signal_at=steps + 8, number=number)  # the eighth step of chain 1
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(tmp_path / "s.zarr", **settings)
    record = SampleStore(tmp_path / "s.zarr").record(1)
    assert (record["state"], record["steps_written"]) == (RUNNING, 8)
    assert record["checkpoint"] is not None

    LOSS.reset()
    continued = run(tmp_path / "s.zarr", **settings)
    assert LOSS.steps == (steps - 8) + steps
    assert_equal(continued, whole(variant))
    assert_tidy(tmp_path / "s.zarr")


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_crash_continues_from_the_last_checkpoint(
    variant: str, tmp_path: Path, whole: Whole
) -> None:
    settings = {**VARIANTS[variant], "checkpoint_every": 3}
    steps = steps_of(variant)
    LOSS.reset(fail_at=steps + 11)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "s.zarr", **settings)
    record = SampleStore(tmp_path / "s.zarr").record(1)
    kept = {"dropout": 3 + 2 * 2 + 1}.get(variant, 9)  # steps up to draws 3 and 9
    assert (record["steps_written"], record["draws_written"]) == (kept, 3 if kept < 9 else 9)

    LOSS.reset()
    continued = run(tmp_path / "s.zarr", **settings)
    assert LOSS.steps == (steps - kept) + steps
    assert_equal(continued, whole(variant))
    assert_tidy(tmp_path / "s.zarr")


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_checkpoints_a_chain_starts_again(
    variant: str, tmp_path: Path, whole: Whole
) -> None:
    steps = steps_of(variant)
    LOSS.reset(fail_at=steps + 8)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "s.zarr", **VARIANTS[variant])
    LOSS.reset()
    continued = run(tmp_path / "s.zarr", **VARIANTS[variant])
    assert LOSS.steps == 2 * steps
    assert_equal(continued, whole(variant))


def test_checkpoints_do_not_change_the_numbers(tmp_path: Path, whole: Whole) -> None:
    for variant, settings in VARIANTS.items():
        every = run(tmp_path / f"{variant} every.zarr", **settings, checkpoint_every=1)
        assert_equal(every, whole(variant))
        assert_tidy(tmp_path / f"{variant} every.zarr")


def test_many_interruptions_end_with_the_same_bits(tmp_path: Path) -> None:
    settings = {**VARIANTS["rmsprop"], "checkpoint_every": 2, "train_mode": True}
    for fail_at in (1, 4, 5, 9, 2, 6, 13):
        LOSS.reset(fail_at=fail_at)
        with pytest.raises(ZeroDivisionError):
            run(tmp_path / "s.zarr", **settings)
    LOSS.reset()
    assert_equal(run(tmp_path / "s.zarr", **settings), run(tmp_path / "whole.zarr", **settings))


def test_the_second_signal_insists(tmp_path: Path) -> None:
    LOSS.reset(signal_at=3, number=signal.SIGINT, signals=2)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "s.zarr")
    assert LOSS.steps == 3
    assert LOSS.interrupted_inside, "the second signal waited for the step's end"


def test_chains_in_threads_end_after_the_second_signal_too(tmp_path: Path) -> None:
    """Each is in a step then, whose end finds no writer for the checkpoint."""
    first_step = threading.Barrier(2)

    def loss(model: nn.Module, ids: Tensor) -> Tensor:
        if threading.current_thread() is not threading.main_thread():
            if first_step.wait() == 0:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.1)  # the main thread sees one after the other
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)
        return next_token_loss(model, ids)

    settings = {"loss_fn": loss, "num_chains": 2, "chains_at_once": 2, "observables": {}}
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "s.zarr", **settings, checkpoint_every=1000)
    store, end = SampleStore(tmp_path / "s.zarr"), time.monotonic() + 20
    while any(map(store.is_locked, (0, 1))):
        assert time.monotonic() < end, "a chain waits for a writer that has ended"
        time.sleep(0.02)


def test_handlers_come_back(tmp_path: Path) -> None:
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    run(tmp_path / "a.zarr")
    LOSS.reset(signal_at=3, number=signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        run(tmp_path / "b.zarr")
    assert caught.value.code == 143
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_sampling_works_outside_the_main_thread(tmp_path: Path, whole: Whole) -> None:
    trees: list[xr.DataTree] = []
    thread = threading.Thread(target=lambda: trees.append(run(tmp_path / "thread.zarr")))
    thread.start()
    thread.join()
    assert_equal(trees[0], whole("plain"))


def test_a_chain_of_another_process_is_refused(tmp_path: Path, whole: Whole) -> None:
    LOSS.reset(fail_at=DRAWS + 3)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "s.zarr")
    store = SampleStore(tmp_path / "s.zarr")
    LOSS.reset()
    with store.lock(1), pytest.raises(ChainLockedError, match="chain 1"):
        run(tmp_path / "s.zarr")
    assert [r["state"] for r in store.records().values()] == [DONE, RUNNING, PENDING]
    with store.lock(1):
        run(tmp_path / "s.zarr", chains=[2])
    with pytest.warns(UserWarning, match="chain 1 is unfinished"):
        open_store(tmp_path / "s.zarr")
    assert_equal(run(tmp_path / "s.zarr"), whole("plain"))


def test_a_checkpoint_for_which_there_is_no_room_is_said_in_one_paragraph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(chain_module, "write_checkpoint", full)
        with pytest.raises(StoreWriteError, match=r"s\.zarr failed: .*No space left.*make room"):
            run(tmp_path / "s.zarr", checkpoint_every=3)
    run(tmp_path / "s.zarr", checkpoint_every=3)


def test_a_damaged_checkpoint_is_an_error(tmp_path: Path) -> None:
    settings = {"checkpoint_every": 1000}
    LOSS.reset(signal_at=5, number=signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "s.zarr", **settings)
    (file,) = (tmp_path / "s.zarr").glob("chains/0/checkpoint_*/weights/c/0")
    bad = bytearray(file.read_bytes())
    bad[100] ^= 1
    file.write_bytes(bad)
    LOSS.reset()
    with pytest.raises(ValueError, match=r"chain 0 cannot go on from .*checkpoint_.*checksum"):
        run(tmp_path / "s.zarr", **settings)
    assert LOSS.steps == 0


def test_checkpoints_that_a_kill_left_behind_go_when_the_store_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*args: Any) -> None:
        raise OSError("killed between the record and the removal")

    monkeypatch.setattr(chain_module, "remove_checkpoints", killed)
    with pytest.raises(StoreWriteError, match="killed between"):
        run(tmp_path / "s.zarr", checkpoint_every=3, chains=[0])
    monkeypatch.undo()
    assert list((tmp_path / "s.zarr").glob("chains/0/checkpoint_*"))
    run(tmp_path / "s.zarr", checkpoint_every=3)
    assert_tidy(tmp_path / "s.zarr")


@pytest.mark.parametrize("checkpoint_every", [3, None])
def test_the_record_never_claims_what_is_not_on_disk(
    checkpoint_every: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Whole
) -> None:
    write = zarr.AsyncArray.setitem

    async def slow_then_full(array: Any, region: Any, values: Any) -> None:
        if array.path == "loss_first":
            time.sleep(0.05)  # the chain is far ahead of its writes
            if region[0] == 1 and region[1].stop > 5:
                raise OSError("no space")
        await write(array, region, values)

    monkeypatch.setattr(zarr.AsyncArray, "setitem", slow_then_full)
    with pytest.raises(StoreWriteError, match="no space"):
        run(tmp_path / "s.zarr", checkpoint_every=checkpoint_every)
    monkeypatch.undo()
    store = SampleStore(tmp_path / "s.zarr")
    record = store.record(1)
    assert not any(store.is_locked(chain) for chain in range(3))
    assert store.record(0)["state"] == DONE
    assert record["state"] == RUNNING
    assert record["draws_written"] == (3 if checkpoint_every else 0)
    assert np.isfinite(store.arrays["loss_first"][1, : record["draws_written"]]).all()
    continued = run(tmp_path / "s.zarr", checkpoint_every=checkpoint_every)
    assert_equal(continued, whole("plain"))


def test_interrupted_workers_keep_their_checkpoints(tmp_path: Path) -> None:
    settings = {"num_draws": 3000, "num_chains": 2, "observables": {}, "checkpoint_every": 500}
    path = tmp_path / "s.zarr"

    def interrupt_once_both_run() -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            time.sleep(0.05)
            if path.exists():
                records = SampleStore(path).records().values()
                if all(r["state"] == RUNNING for r in records):
                    break
        os.kill(os.getpid(), signal.SIGINT)

    watcher = threading.Thread(target=interrupt_once_both_run)
    watcher.start()
    with pytest.raises(KeyboardInterrupt):
        run(path, **settings, workers=2)
    watcher.join()
    records = SampleStore(path).records()
    assert all(r["state"] == RUNNING and r["checkpoint"] for r in records.values())
    assert not any(SampleStore(path).is_locked(c) for c in records)
    missing = sum(3000 - r["steps_written"] for r in records.values())
    assert missing > 0

    LOSS.reset(fail_at=min(missing, 30))  # resumed inside, not from the start
    with pytest.raises(ZeroDivisionError):
        run(path, **settings)
    written = [r["steps_written"] for r in SampleStore(path).records().values()]
    assert written == [r["steps_written"] for r in records.values()]


def test_a_worker_that_dies_is_an_error_and_its_chain_is_resumed(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match=r"exit code 7.*same call continues"):
        run(tmp_path / "s.zarr", workers=2, loss_fn=die_in_a_worker)
    whole = run(tmp_path / "whole.zarr", loss_fn=die_in_a_worker)
    assert_equal(run(tmp_path / "s.zarr", loss_fn=die_in_a_worker), whole)


def test_what_a_loss_prints_in_a_worker_is_no_report_and_pipes_are_closed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []

    def noted(*order: Any) -> subprocess.Popen[str]:
        started.append(start(*order))
        return started[-1]

    start = workers._start
    monkeypatch.setattr(workers, "_start", noted)
    run(tmp_path / "s.zarr", workers=2, num_chains=2, loss_fn=print_json_in_a_worker)
    assert '{"loss": 3.5}' in capfd.readouterr().err
    assert [(p.stdin.closed, p.stdout.closed) for p in started] == [(True, True)] * 2


def test_a_worker_whose_parent_is_gone_reports_to_nobody() -> None:
    read, write = os.pipe()
    os.close(read)
    reports = os.fdopen(write, "w", buffering=1)
    _printer(reports)(Progress(chain=0, step=1, draws=1, loss=3.5))
    with suppress(BrokenPipeError):
        reports.close()


def print_json_in_a_worker(model: nn.Module, ids: Tensor) -> Tensor:
    print('{"loss": 3.5}', flush=True)
    return next_token_loss(model, ids)


def die_in_a_worker(model: nn.Module, ids: Tensor) -> Tensor:
    if "basinscope.sampling.workers" in getattr(sys.modules["__main__"].__spec__, "name", ""):
        os._exit(7)
    return next_token_loss(model, ids)


KILLS = 14  # for each of the variants below
KILLED = {
    "plain": {"num_draws": 110},
    "checkpoints": {"num_draws": 110, "checkpoint_every": 5, "sampling_method": "rmsprop_sgld"},
    "dropout": {"num_draws": 60, "checkpoint_every": 25, "train_mode": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", KILLED)
def test_killed_at_any_moment_it_resumes_to_the_same_bits(
    variant: str, tmp_path: Path, forks: Forks
) -> None:
    settings = KILLED[variant]
    random = np.random.default_rng(len(variant))
    for path in (tmp_path / "first.zarr", tmp_path / "whole.zarr"):  # the second one is timed
        start = time.monotonic()
        assert forks.result(forks.start(path, settings)) == 0
        seconds = time.monotonic() - start
    whole = open_store(tmp_path / "whole.zarr").load()

    kills, number = 0, 0
    while kills < KILLS:
        path = tmp_path / f"{number}.zarr"
        child = forks.start(path, settings)
        # every third kill soon after the start: while the store is created and inputs written
        time.sleep(random.uniform(0, seconds / 8 if kills % 3 == 0 else seconds))
        with suppress(ProcessLookupError):  # it may have ended by itself
            os.kill(child, signal.SIGKILL)
        if forks.result(child) == 0:
            assert_whole(path, whole)
            number += 1
        else:
            kills += 1
            assert_opens_and_says_what_is_missing(path, whole)
    for left in range(number + 1):
        path = tmp_path / f"{left}.zarr"
        assert forks.result(forks.start(path, settings)) == 0
        assert_whole(path, whole)


def assert_opens_and_says_what_is_missing(path: Path, whole: xr.DataTree) -> None:
    if not path.exists():
        return  # killed before the store was moved into place
    store = SampleStore(path)
    records = store.records()
    assert not any(store.is_locked(chain) for chain in records)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tree = open_store(path)
    message = " ".join(str(w.message) for w in caught)
    for chain, record in records.items():
        missing = {RUNNING: "is unfinished", PENDING: "was not started", DONE: ""}
        if record["state"] == DONE:
            assert f"chain {chain} " not in message
        else:
            assert f"chain {chain} {missing[record['state']]}" in message
        steps, draws = record["steps_written"], record["draws_written"]
        for name, rows in [
            ("sampling_loss_micro", steps),
            ("sampling_loss", draws),
            ("loss_first", draws),
        ]:
            ours, theirs = tree[name][chain, :rows], whole[name][chain, :rows]
            np.testing.assert_array_equal(ours, theirs, err_msg=f"{name}: the record lies")


def assert_whole(path: Path, whole: xr.DataTree) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tree = open_store(path)
    assert tree.attrs["completed"] == 1
    assert_equal(tree, whole)
    assert_tidy(path)


class Loss:
    """The usual loss; counts training steps and misbehaves at one of them."""

    def __init__(self) -> None:
        self.announce_at, self.seconds = 0, 0.0
        self.reset()

    def reset(
        self, *, fail_at: int = 0, signal_at: int = 0, number: int = 0, signals: int = 1
    ) -> None:
        self.fail_at, self.signal_at, self.number, self.signals = (
            fail_at,
            signal_at,
            number,
            signals,
        )
        self.steps = -1  # the check before the run is a call with gradients too
        self.interrupted_inside = False

    def __call__(self, model: nn.Module, ids: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.steps += 1
            self._misbehave()
        return next_token_loss(model, ids)

    def _misbehave(self) -> None:
        time.sleep(self.seconds)
        if self.steps == 0:
            return
        if self.steps == self.announce_at:
            print(f"step {self.steps}", flush=True)
            time.sleep(100 * self.seconds)  # for a signal to arrive at this step
        if self.steps == self.fail_at:
            raise ZeroDivisionError
        if self.steps == self.signal_at:
            try:
                for _ in range(self.signals):
                    os.kill(os.getpid(), self.number)
            except KeyboardInterrupt:
                self.interrupted_inside = True
                raise


LOSS = Loss()


@pytest.fixture(autouse=True)
def _quiet_loss() -> None:
    LOSS.reset()


def run(path: Path, **changes: Any) -> xr.DataTree:
    torch.manual_seed(5)
    model = RawModel(dropout=0.3)
    torch.seed()  # nothing may depend on the state in which sample() is called
    settings: dict[str, Any] = {
        "lr": 1e-3,
        "n_beta": 10.0,
        "num_chains": 3,
        "num_draws": DRAWS,
        "batch_size": 4,
        "num_init_loss_batches": 3,
        "batches_per_draw": 1,
        "device": "cpu",
        "progress": False,
        "loss_fn": LOSS,
        "output_path": path,
        "observables": {"first": token_rows(30, 9, seed=2)},
        **changes,
    }
    observables = settings.pop("observables")
    return sample(model, token_rows(48, 9, seed=1), observables, **settings)


def steps_of(variant: str) -> int:
    settings = VARIANTS[variant]
    return settings.get("num_burnin_steps", 0) + DRAWS * settings.get("num_steps_bw_draws", 1)


def assert_equal(ours: xr.DataTree, theirs: xr.DataTree) -> None:
    assert set(ours.data_vars) == set(theirs.data_vars)
    for name in ours.data_vars:
        assert np.isfinite(ours[name]).all(), name
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=str(name))


def assert_tidy(path: Path) -> None:
    assert not list(path.glob("chains/*/checkpoint_*"))
    litter = [p for p in path.rglob("*.partial") if p.parent != path]
    assert litter == []


class Forks:
    """A process that has imported everything, and forks one child per run."""

    def __init__(self) -> None:
        code = "from tests.sampling.test_resume import serve; serve()"
        self.server = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._read() == "ready"

    def start(self, path: Path, settings: dict[str, Any]) -> int:
        """Start a run; give the child's process id."""
        assert self.server.stdin is not None
        self.server.stdin.write(json.dumps([str(path), settings]) + "\n")
        self.server.stdin.flush()
        return int(self._read())

    def result(self, child: int) -> int:
        """Wait for the run that was started; 0, or minus the signal that ended it."""
        return int(self._read())

    def _read(self) -> str:
        assert self.server.stdout is not None
        return self.server.stdout.readline().strip()


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    made = Forks()
    yield made
    made.server.kill()
    made.server.communicate()


def serve() -> None:
    torch.set_num_threads(1)
    token_rows(2, 2, 0)
    print("ready", flush=True)
    for order in sys.stdin:
        path, settings = json.loads(order)
        child = os.fork()
        if child == 0:
            run(Path(path), **settings)
            os._exit(0)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
