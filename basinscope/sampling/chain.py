"""One chain: steps of SGLD from the checkpoint, with its losses handed to the store.

The work of a chain depends only on the job and the chain's number, so chains may run one after
another, in worker processes or as array jobs, and be resumed.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from basinscope.io import store as chain_state
from basinscope.io.checkpoint import read_checkpoint, remove_checkpoints, write_checkpoint
from basinscope.io.codecs import round_losses
from basinscope.io.memory import give_back
from basinscope.io.schema import METRICS
from basinscope.io.store import SampleStore, now
from basinscope.io.writer import BackgroundWriter, RowBuffer, write_error
from basinscope.kernels.noise import INIT, fill_normal
from basinscope.kernels.sgld import SgldUpdate
from basinscope.models.forward import inside_bridge, to_device
from basinscope.sampling.arrival import SAMPLING_LOSS, Arriving, LossWatch, NonFiniteLossError
from basinscope.sampling.interrupt import SiblingFailedError, StopRequest
from basinscope.sampling.job import SamplingJob
from basinscope.sampling.layers import quicken_linears
from basinscope.sampling.observables import even_size
from basinscope.sampling.phases import PhaseClock, StepProfiler
from basinscope.sampling.prefix import PrefixCache, prefix_cache
from basinscope.sampling.replay import Replayed, own_stream

_Rows = tuple[np.ndarray, Tensor]
"""Rows of a job's pool, on the host and on the device."""


@dataclass(frozen=True)
class Progress:
    """What a chain reports after each step."""

    chain: int
    step: int
    draws: int
    loss: float
    state: str = chain_state.RUNNING


def run_chains(
    job: SamplingJob,
    model: nn.Module,
    store: SampleStore,
    chains: list[int],
    *,
    checkpoint_every: int | None,
    stop: StopRequest,
    report: Callable[[Progress], None],
    at_once: int = 1,
    profile: Path | None = None,
    profile_steps: tuple[int, int] = (5, 15),
) -> None:
    """Run chains in this process.

    Parameters
    ----------
    model : nn.Module
        A :func:`working_copy` of the job's model; it moves.
    at_once : int
        Chains that run side by side, each in a thread of its own with a copy of the model. Each
        has this share of torch's threads, even where fewer chains are left: sums depend on it.
    """
    writer = BackgroundWriter(store.path, store.arrays)
    prefix = prefix_cache(job, model)
    waiting = deque(chains)

    def work(copy_of_model: nn.Module) -> None:
        runner = ChainRunner(
            job,
            copy_of_model,
            store,
            writer,
            prefix,
            checkpoint_every=checkpoint_every,
            stop=stop,
            report=report,
            profile=profile,
            profile_steps=profile_steps,
        )
        while True:
            try:
                chain = waiting.popleft()
            except IndexError:  # another thread took the last one
                return
            runner.run(chain)

    give_back()  # what loading and the losses at the checkpoint took
    try:
        others = [working_copy(job) for _ in range(min(at_once, len(chains)) - 1)]
        with _threads(max(1, torch.get_num_threads() // at_once)) as threads:
            if others:
                _side_by_side(work, [model, *others], threads, stop)
            else:
                work(model)
        writer.drain()
    finally:
        writer.close()
        give_back()


@contextmanager
def _threads(count: int) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield count
    finally:
        torch.set_num_threads(before)


def _side_by_side(
    work: Callable[[nn.Module], None], models: list[nn.Module], threads: int, stop: StopRequest
) -> None:
    """Run ``work`` on each model in a thread; the first error stops them all and is raised."""

    def alone(model: nn.Module) -> None:
        torch.set_num_threads(threads)  # every thread has a number of its own
        try:
            work(model)
        except BaseException:
            stop.failed = True
            raise

    with ThreadPoolExecutor(len(models), "basinscope-chain") as pool:
        running = [pool.submit(alone, model) for model in models]
    errors = [future.exception() for future in running]
    first = [e for e in errors if e and not isinstance(e, SiblingFailedError)]
    if first:
        raise first[0]


class ChainRunner:
    """Runs chains of a job in this process, on one working copy of the model.

    Parameters
    ----------
    job : SamplingJob
    model : nn.Module
        A working copy of the job's model.
    store : SampleStore
    writer : BackgroundWriter
    prefix : PrefixCache or None
        Activations that no draw changes.
    checkpoint_every : int or None
        Draws between chain checkpoints.
    stop : StopRequest
    report : callable
        Takes a :class:`Progress` after every step.
    profile : Path or None
        Trace to write of ``profile_steps`` of the first chain that runs.
    """

    def __init__(
        self,
        job: SamplingJob,
        model: nn.Module,
        store: SampleStore,
        writer: BackgroundWriter,
        prefix: PrefixCache | None,
        *,
        checkpoint_every: int | None,
        stop: StopRequest,
        report: Callable[[Progress], None],
        profile: Path | None,
        profile_steps: tuple[int, int],
    ) -> None:
        self.job, self.model, self.store, self.writer = job, model, store, writer
        self.prefix = prefix
        self.checkpoint_every, self.stop, self.report = checkpoint_every, stop, report
        quicken_linears(model)
        self.clock = PhaseClock(elsewhere=lambda: writer.stall_seconds[self.chain])
        self.profiler = StepProfiler(profile, profile_steps, self.clock)
        config = job.config

        parameters = dict(self.model.named_parameters())
        anchors = {name: p.detach() for name, p in job.model.named_parameters()}
        order = {name: index for index, name in enumerate(parameters)}
        self.parameters = [parameters[name] for name in job.masks]
        self.anchors = [anchors[name].to(job.device).contiguous() for name in job.masks]
        self.masks = list(job.masks.values())
        self.indices = [order[name] for name in job.masks]
        self.update = SgldUpdate(
            [p.detach() for p in self.parameters],
            anchors=self.anchors,
            masks=self.masks,
            param_indices=self.indices,
            zero_grads=job.cuda_graph,
            metrics=config.save_metrics,
            **config.update_settings,
        )
        self.pool = job.pool.to(job.device)
        self.observe = job.evaluator(around=prefix.observing if prefix else None)

    def run(self, chain: int) -> None:
        """Run a chain from its start or its checkpoint.

        A loss that is not finite fails the chain and is recorded; any other exception leaves it
        resumable and is raised. The record says "done" once the last row is on disk, which may
        be after this call returned.
        """
        with ExitStack() as held:
            held.enter_context(self.store.lock(chain))
            record = self.store.record(chain)
            if record["state"] in (chain_state.DONE, chain_state.FAILED):
                return
            self.store.remove_litter(chain)
            self.chain = chain
            self.clock.seconds.clear()
            self.earlier = record["seconds"]
            slot = record["checkpoint"]
            saved = read_checkpoint(self.store.path, chain, slot) if slot else None
            first = int(record["steps_written"]) if saved else 0
            self._place_weights(chain, saved)
            self.store.update_record(
                chain,
                state=chain_state.RUNNING,
                started_at=record.get("started_at", now()),
                device=str(self.job.device),
                kernel_path=self.update.path,
                threads=torch.get_num_threads(),
            )
            self.buffers = self._open_buffers(chain, first)
            self.watch = LossWatch()
            final: dict[str, Any] = {"state": chain_state.DONE}
            steps = self.job.config.num_steps
            try:
                with (
                    torch.random.fork_rng(devices=cuda_devices(self.job.device)),
                    own_stream(self.job.device, self.job.cuda_graph),
                ):
                    self._seed_dropout(chain, saved)
                    self._steps(chain, first)
            except NonFiniteLossError as failure:
                steps = failure.step
                self._forget_from(steps)
                final = {
                    "state": chain_state.FAILED,
                    "failed_step": failure.step,
                    "reason": failure.reason,
                }
            finally:
                self.profiler.finish()

            for buffer in self.buffers.values():
                buffer.flush()
            draws = self.job.config.draws_before(steps)
            self.report(Progress(chain, steps, draws, float("nan"), final["state"]))
            final |= {
                "steps_written": steps,
                "draws_written": draws,
                "checkpoint": None,
                "finished_at": now(),
            }
            lock = held.pop_all()
            phases = dict(self.clock.seconds)
            close = partial(self._close, chain, final, phases, self.earlier, lock)
            self.writer.then(close, otherwise=lock.close)

    def _close(
        self,
        chain: int,
        final: dict[str, Any],
        phases: dict[str, float],
        earlier: dict[str, float],
        held: ExitStack,
    ) -> None:
        """Record how a chain ended, and let it go."""
        with held:
            seconds = self._seconds(chain, phases, earlier)
            self.store.update_record(chain, **final, seconds=seconds)
            remove_checkpoints(self.store.path, chain)

    def _seconds(
        self, chain: int, phases: dict[str, float], earlier: dict[str, float]
    ) -> dict[str, float]:
        """Seconds per phase of a chain, with those of the runs that it was interrupted in."""
        spent = phases | {
            "stall": self.writer.stall_seconds[chain],
            "write (background)": self.writer.write_seconds[chain],
        }
        names = dict.fromkeys([*earlier, *spent])
        return {name: round(earlier.get(name, 0.0) + spent.get(name, 0.0), 6) for name in names}

    def _steps(self, chain: int, first: int) -> None:
        config = self.job.config
        places = np.searchsorted(self.job.pool_rows, self.job.step_rows(chain))
        batches = torch.from_numpy(places).to(self.job.device)
        count = torch.tensor([first], device=self.job.device)  # the step, where a graph can read it

        def advance(step: int | Tensor) -> dict[str, Tensor]:
            rows = batches[step]
            ids = self.pool[rows].long().flatten(0, -2)
            used = None if isinstance(step, Tensor) else (places[step], rows)
            return self._advance(ids, used, chain, step)

        def counted() -> dict[str, Tensor]:
            made = advance(count)
            count.add_(1)
            return made

        move, observe = None, self._observe
        if self.job.cuda_graph:
            move, observe = Replayed(counted), Replayed(self._observe)
        for step in range(first, config.num_steps):
            if self.stop.asked:
                if self.checkpoint_every is not None:
                    self._checkpoint(chain, step)
                self.stop.raise_if_asked()
            self.profiler.before_step(step)

            made = advance(step) if move is None else move()
            self.watch.see(step, {SAMPLING_LOSS: made["losses"]})
            draw = config.draw_after(step)
            with self.clock("observe"):
                observed = observe() if draw is not None else {}
            if observed:
                self.watch.see(step, {_loss_of(key): losses for key, losses in observed.items()})
            with self.clock("record"):
                self._record(made, draw is not None, observed)

            self.profiler.after_step(step)
            self.writer.check()
            draws = config.draws_before(step + 1)
            self.report(Progress(chain, step + 1, draws, self.watch.latest))
            every = self.checkpoint_every if draw is not None else None
            if every is not None and draws % every == 0 and step + 1 < config.num_steps:
                self._checkpoint(chain, step + 1)
        self.watch.look(wait=True)

    def _advance(
        self, input_ids: Tensor, used: _Rows | None, chain: int, step: int | Tensor
    ) -> dict[str, Tensor]:
        """Take one step; give its ids (sequence, token), losses and metrics."""
        made = {"input_ids": input_ids, "losses": self._gradient(input_ids, used)}
        with self.clock("update"):
            metrics = self.update.step(
                [p.grad for p in self.parameters],
                seed=self.job.config.init_seed + chain,
                chain=chain,
                step=step,
            )
            if not self.job.cuda_graph:  # whose gradients stay where they are
                for parameter in self.parameters:
                    parameter.grad = None
        return made if metrics is None else {**made, "metrics": metrics}

    def _gradient(self, input_ids: Tensor, used: _Rows | None) -> Tensor:
        """Accumulate the gradient of one step; return its losses (micro, batch, token_pos)."""
        count = len(input_ids)
        size = even_size(count, self.job.sequences_per_gradient)
        losses = []
        for start in range(0, count, size):
            part = slice(start, start + size)
            with ExitStack() as at_entry:  # backward too: checkpointed layers run again there
                with self.clock("forward"):
                    if self.prefix is not None and used is not None:
                        places, rows = used[0][part], used[1][part]
                        at_entry.enter_context(self.prefix.sampling(self.model, places, rows))
                    loss = self.job.loss(self.model, input_ids[part]).float()
                with self.clock("backward"):
                    (loss.mean() * (len(loss) / count)).backward()
            losses.append(loss.detach())
        return torch.cat(losses).unflatten(0, (-1, self.job.config.batch_size))

    @torch.no_grad()  # a cache that a model makes in inference mode could not be used in a step
    def _observe(self) -> dict[str, Tensor]:
        return self.observe(self.model)

    def _record(self, made: dict[str, Tensor], is_draw: bool, observed: dict[str, Tensor]) -> None:
        if any(buffer.next_fills for buffer in self.buffers.values()):
            self.watch.look(wait=True)  # nothing goes to the store before it is known to be good
        losses = made["losses"]
        self.buffers["sampling_loss_micro"].append(losses.flatten(0, 1))
        if "sampling_input_ids_micro" in self.buffers:
            self.buffers["sampling_input_ids_micro"].append(made["input_ids"])
        if "metrics" in made:
            for name, value in zip(METRICS, made["metrics"], strict=True):
                self.buffers[f"metrics_{name}"].append(value)
        if is_draw:
            self.buffers["sampling_loss"].append(losses.mean(0))
        for obs_id, values in observed.items():
            self.buffers[f"loss_{obs_id}"].append(values)

    def _place_weights(self, chain: int, saved: dict[str, np.ndarray] | None) -> None:
        """Put the weights where the chain starts, or where its checkpoint left them."""
        config = self.job.config
        with torch.no_grad():
            for parameter, anchor in zip(self.parameters, self.anchors, strict=True):
                parameter.copy_(anchor)
                parameter.grad = None
            _place_buffers(self.model, self.job.model)
            for average in self.update.square_avgs or []:
                average.zero_()
            if config.init_noise:
                perturb(
                    self.parameters,
                    self.masks,
                    self.indices,
                    config.init_noise,
                    seed=config.init_seed + chain,
                    chain=chain,
                )
            if saved is not None:
                _unpack(saved["weights"], [p.data for p in self.parameters])
                _unpack(saved["buffers"], self._buffers())
                _unpack(saved["square_avg"], self.update.square_avgs or [])

    def _buffers(self) -> list[Tensor]:
        """The state that a chain keeps beside its weights.

        The caller's model says what that is: a buffer that was made, or grew, in a forward pass is
        a cache that the next one makes again.
        """
        ours = dict(self.model.named_buffers())
        return [
            ours[name] if ours[name].shape == original.shape else original
            for name, original in self.job.model.named_buffers()
        ]

    def _seed_dropout(self, chain: int, saved: dict[str, np.ndarray] | None) -> None:
        """Set torch's own generators, which only dropout uses."""
        torch.manual_seed(self.job.config.init_seed + chain)
        if saved is not None:
            torch.set_rng_state(torch.from_numpy(saved["rng"]))
            if self.job.device.type == "cuda":
                state = torch.from_numpy(saved["rng_cuda"])
                torch.cuda.set_rng_state(state, self.job.device)

    def _checkpoint(self, chain: int, steps: int) -> None:
        """Save the chain after ``steps`` steps, with everything before it on disk."""
        with self.clock("checkpoint"):
            self.watch.look(wait=True)
            for buffer in self.buffers.values():
                buffer.flush()
            self.writer.drain(chain)
            state = {
                "weights": _pack([p.data for p in self.parameters]),
                "buffers": _pack(self._buffers()),
                "square_avg": _pack(self.update.square_avgs or []),
                "rng": torch.get_rng_state().numpy(),
            }
            if self.job.device.type == "cuda":
                state["rng_cuda"] = torch.cuda.get_rng_state(self.job.device).numpy()
            used = self.store.record(chain)["checkpoint"]
            try:
                slot = write_checkpoint(self.store.path, chain, used, state)
                self.store.update_record(
                    chain,
                    checkpoint=slot,
                    steps_written=steps,
                    draws_written=self.job.config.draws_before(steps),
                    seconds=self._seconds(chain, dict(self.clock.seconds), self.earlier),
                )
            except OSError as error:
                raise write_error(self.store.path, error) from error

    def _forget_from(self, step: int) -> None:
        """Drop what was collected of a step and those after it."""
        for name, buffer in self.buffers.items():
            dims = self.store.arrays[name].metadata.dimension_names or ()  # type: ignore[union-attr]
            by_draw = dims[1] == "draw"
            buffer.drop_from(self.job.config.draws_before(step) if by_draw else step)

    def _open_buffers(self, chain: int, first: int) -> dict[str, RowBuffer]:
        """One buffer per array that this chain fills."""
        draws = self.job.config.draws_before(first)
        buffers = {}
        for name, array in self.store.arrays.items():
            dims = array.metadata.dimension_names or ()  # type: ignore[union-attr]
            if tuple(dims[:1]) == ("chain",) and len(dims) > 1 and dims[1] in ("draw", "step"):
                if name == "sampling_rows":
                    continue
                row = draws if dims[1] == "draw" else first
                buffers[name] = RowBuffer(
                    self.writer, name, chain, row, room=_room, ready=self._ready(name)
                )
        return buffers

    def _ready(self, name: str) -> Callable[[Tensor], Arriving]:
        """What turns rows of an array into what is stored."""
        keep_bits = self.job.config.loss_keep_bits
        if keep_bits is not None and "loss" in name:
            return partial(_Rounded, keep_bits=keep_bits)
        return Arriving


def _room(row: Tensor, count: int) -> Tensor:
    return row.new_empty((count, *row.shape))


def _loss_of(obs_id: str) -> str:
    return f"the loss of observable {obs_id}"


def working_copy(job: SamplingJob) -> nn.Module:
    """Copy the caller's model to the job's device; only what moves requires a gradient."""
    model = to_device(copied(job.model), job.device)
    for name, parameter in model.named_parameters():
        parameter.grad = None
        parameter.data = parameter.data.contiguous()
        parameter.requires_grad_(name in job.masks)
    return model.train(job.config.train_mode)


def _place_buffers(model: nn.Module, original: nn.Module) -> None:
    """Give a copy of a model the buffers of the original, and none that it made since."""
    for name, module in model.named_modules():
        for key, value in original.get_submodule(name)._buffers.items():
            mine = module._buffers.get(key)
            if value is None:
                module._buffers[key] = None
            elif mine is None or mine.shape != value.shape or mine.dtype != value.dtype:
                device = value.device if mine is None else mine.device
                module._buffers[key] = value.detach().to(device, copy=True)
            else:
                mine.copy_(value)


def copied(model: nn.Module) -> nn.Module:
    """Copy the caller's model, which stays as it is."""
    kept = {} if inside_bridge(model) is model else _patterns(model)
    try:
        return copy.deepcopy(model, kept)
    except Exception as error:
        raise TypeError(
            f"{type(model).__name__} cannot be copied ({error}); sampling works on a copy so "
            "that your model stays as it is: detach tensors that the model keeps, or remove hooks"
        ) from error


def _patterns(bridge: nn.Module) -> dict[int, Tensor]:
    """What a ``TransformerBridge`` keeps of its last run, for deepcopy without the graph behind."""
    return {
        id(value): value.detach()
        for module in bridge.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }


def perturb(
    parameters: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    indices: Sequence[int],
    std: float,
    *,
    seed: int,
    chain: int,
) -> None:
    """Add the one perturbation of ``init_noise`` to weights, in place."""
    for parameter, mask, index in zip(parameters, masks, indices, strict=True):
        noise = torch.empty(parameter.shape, dtype=torch.float32, device=parameter.device)
        fill_normal(noise, seed=seed, chain=chain, step=0, param_index=index, stream=INIT)
        noise.mul_(std)
        if mask is not None:
            noise.mul_(mask.to(noise.device))
        parameter.copy_(parameter.float().add_(noise))


class _Rounded(Arriving):
    """Losses that are rounded once they are there."""

    def __init__(self, losses: Tensor, keep_bits: int) -> None:
        super().__init__(losses)
        self.keep_bits = keep_bits

    def numpy(self) -> np.ndarray:
        return round_losses(super().numpy(), self.keep_bits)


def _pack(tensors: list[Tensor]) -> np.ndarray:
    flat = [t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in tensors]
    return (torch.cat(flat) if flat else torch.empty(0, dtype=torch.uint8)).numpy()


def _unpack(packed: np.ndarray, tensors: list[Tensor]) -> None:
    start = 0
    for tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        values = torch.from_numpy(packed[start : start + size].copy()).view(tensor.dtype)
        tensor.copy_(values.reshape(tensor.shape))
        start += size


def cuda_devices(device: torch.device) -> list[int]:
    """Give the GPU whose generator a run on ``device`` uses, for ``torch.random.fork_rng``."""
    if device.type != "cuda":
        return []
    return [torch.cuda.current_device() if device.index is None else device.index]
