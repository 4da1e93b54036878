"""Kernels against devinterp 2.0.1's, torch's and others', and against what the hardware allows.

    python -m benchmarks.kernels [--only update cross_entropy linear] [--rounds 5]
    python -m benchmarks.kernels --device cuda --rounds 20

``update``: one SGLD step (localization and noise on) of the parameters of a GPT-NeoX. Peers:
devinterp's ``SGMCMC.step`` as its ``sample`` calls it (one group per tensor, metrics fetched after
the step); `torch._foreach_*` operations with all noise in one buffer; and a plain update under
``torch.compile``, for which weights, anchors and gradients are laid out as one tensor. ``plain``,
with the nine ``metrics``, or with the ``rmsprop`` preconditioner.

``cross_entropy``: forward and backward of the mean next-token loss, from logits that are made anew
before every call, outside of the time. Ours with and without leave to write over them.

``linear``: the same from hidden states and a head's weight, gradients of both. Peers: all logits,
with devinterp's loss or torch's; torch's chunked ``linear_cross_entropy``; on a GPU Liger-Kernel
and Cut Cross-Entropy (as it comes, and with filter_eps=None) where they are installed. All give a
loss per token. `peer_wrong_per_token`: the peer's gradients differ by over 5 % from the right ones
if tokens are weighted differently. Memory is the peak beyond inputs and gradients.

Before anything is timed ours and the peer are compared; a peer that fails or differs is left out,
with a line that says so (differences also show in the exit status).

``floor_share`` is the floor's time over ours, both from the same round. Floors: a copy that moves
as many bytes as the work must (``update``: weights, gradients and anchors read, weights written,
with rmsprop its state read and written; ``cross_entropy``: logits read twice, gradients written
once), or the rate of a matrix product of that dtype for three products of all tokens (``linear``;
float32 without TF32). Whatever a cache holds for the work, it holds for the copy, which is as large
(up to 1 GiB a buffer).
"""

from __future__ import annotations

import gc
import importlib.util
import math
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from basinscope.kernels.cross_entropy import next_token_cross_entropy
from basinscope.kernels.linear_cross_entropy import linear_token_cross_entropy
from basinscope.kernels.sgld import METRIC_NAMES, SgldUpdate
from benchmarks.harness import (
    enough_calls,
    own_peak_memory,
    parser,
    peak_memory,
    quartiles,
    record,
)
from benchmarks.sampling import SIZES

PYTHIA = {"layers": 24, "vocab": 50304, "tokens": 2048}
UPDATE_SIZES: dict[str, dict[str, int]] = {
    **SIZES,
    "410M": {"hidden": 1024, "heads": 16, **PYTHIA},
    "1.4B": {"hidden": 2048, "heads": 16, **PYTHIA},
}
# (batch, token, vocabulary)
LOGITS = {
    "toy": (2, 8, 50),
    "8k": (8, 128, 8192),
    "50k": (8, 1024, 50304),
    "131k": (8, 1024, 131072),
}
# (batch, token, width, vocabulary)
HEADS = {
    "toy": (2, 8, 16, 50),
    "1024 tokens": (8, 128, 512, 8192),
    "4096 tokens": (32, 128, 512, 8192),
    "131k words": (8, 1024, 4096, 131072),
    "pythia": (8, 1024, 1024, 50304),
}
BOTH = (torch.float32, torch.bfloat16)
# what is measured where: (size, dtype)
PLANS: dict[str, dict[str, list[tuple[str, torch.dtype]]]] = {
    "update": {
        "toy": [("toy", dtype) for dtype in BOTH],
        "cpu": [("1M", torch.float32), ("27M", torch.float32)],
        "cuda": [(size, dtype) for size in ("410M", "1.4B") for dtype in BOTH],
    },
    "cross_entropy": {
        "toy": [("toy", dtype) for dtype in BOTH],
        "cpu": [("8k", torch.float32)],
        "cuda": [(size, dtype) for size in ("50k", "131k") for dtype in BOTH],
    },
    "linear": {
        "toy": [("toy", dtype) for dtype in BOTH],
        "cpu": [("1024 tokens", torch.float32), ("4096 tokens", torch.float32)],
        "cuda": [("131k words", torch.bfloat16)] + [("pythia", dtype) for dtype in BOTH],
    },
}
# rows, width and columns of the product whose rate is the floor's
PRODUCTS = {"toy": (16, 16, 50), "cpu": (1024, 512, 8192), "cuda": (8192, 8192, 8192)}

SETTINGS: dict[str, float] = {"lr": 1e-3, "localization": 100.0}
N_BETA = 1000.0
RMSPROP = {"alpha": 0.99, "eps": 0.1}
COPY_BYTES = 2**30  # of one buffer, at most
LEAST_SECONDS, MOST_REPEATS = 0.05, 50  # of one measurement
# relative errors that rounding explains
STEP_ERROR = {torch.float32: 1e-5, torch.bfloat16: 5e-2}
LOSS_ERROR = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
GRADIENT_ERROR = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
WRONG = 0.05  # relative error of a peer's gradients

Work = Callable[[], object]
Make = Callable[[], Work]
"""Prepares a call, which is not timed, and gives the call, which is."""


def main() -> int:
    options = parser(__doc__, "kernels.jsonl")
    options.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    options.add_argument("--no-memory", action="store_true", help="skip peak memory")
    options.add_argument("--one", nargs=3, metavar=("WHO", "SHAPE", "DTYPE"), help=_ONE)
    asked = options.parse_args()
    if asked.one:
        print(run_once(*asked.one))
        return 0
    torch.set_float32_matmul_precision("highest")
    bench = Bench(asked.device, asked.rounds, asked.toy, not asked.no_memory, asked.out)
    failed = 0
    for part in asked.only:
        for size, dtype in PLANS[part]["toy" if asked.toy else asked.device]:
            try:
                PARTS[part](bench, size, dtype)
            except Exception:  # the others are worth their time all the same
                failed += 1
                print(f"{part} {size}, {name_of(dtype)}: failed", flush=True)
                traceback.print_exc()
            bench.tidy()
    return len(bench.disagreements) + failed


_ONE = "make one call and print this process's peak memory (used by the memory measurement)"


@dataclass(frozen=True)
class Bench:
    """Where and how long to measure, and where results go."""

    device: str
    rounds: int
    toy: bool
    memory: bool
    out: Path
    disagreements: list[str] = field(default_factory=list)

    def compare(self, ours: Make, peer: Make, floor: Work, floor_units: float) -> dict[str, Any]:
        """Time ours, the peer and the floor in turn; `floor_units` of the last are the floor."""
        makes = (ours, peer, lambda: floor)
        for make in makes:  # compile, and warm up
            self.seconds(make)
        repeats = [self.enough(make) for make in makes]
        rounds = []
        for _ in range(self.rounds):
            times = [self.seconds(make, n) for make, n in zip(makes, repeats, strict=True)]
            rounds.append((times[0], times[1], floor_units * times[2]))
        ratios = sorted(theirs / mine for mine, theirs, _ in rounds)
        shares = [least / mine for mine, _, least in rounds]
        mine, theirs, least = (statistics.median(column) for column in zip(*rounds, strict=True))
        return {
            "ratio": digits(statistics.median(ratios)),
            "ratio_quartiles": [digits(q) for q in quartiles(ratios)],
            "ratio_range": [digits(ratios[0]), digits(ratios[-1])],
            "ours_s": digits(mine),
            "peer_s": digits(theirs),
            "floor_s": digits(least),
            "floor_share": digits(statistics.median(shares)),
            "floor_share_quartiles": [digits(q) for q in quartiles(shares)],
            "rounds": self.rounds,
            "repeats": repeats,
        }

    def enough(self, make: Make) -> int:
        """How many calls last long enough to be timed."""
        return min(MOST_REPEATS, enough_calls(self.seconds(make), LEAST_SECONDS))

    def seconds(self, make: Make, repeats: int = 1) -> float:
        """Mean seconds of a call; on a GPU by its own clock, where the host may run ahead."""
        if self.device == "cuda":
            return self._seconds_on_gpu(make, repeats)
        total = 0.0
        for _ in range(repeats):
            work = make()
            start = time.perf_counter()
            kept = work()
            total += time.perf_counter() - start
            del work, kept
        return total / repeats

    def _seconds_on_gpu(self, make: Make, repeats: int) -> float:
        torch.cuda.synchronize()
        pairs = []
        for _ in range(repeats):
            work = make()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            kept = work()
            end.record()
            pairs.append((begin, end))
            del work, kept
        torch.cuda.synchronize()
        return sum(begin.elapsed_time(end) for begin, end in pairs) / 1000 / repeats

    def copy(self, count: float) -> tuple[Work, float]:
        """Give a copy, and how many of it read and write `count` bytes in all."""
        length = max(1, min(COPY_BYTES, int(count) // 2))
        source = torch.ones(length, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source), count / (2 * length)

    def product(self, dtype: torch.dtype, flops: float) -> tuple[Work, float]:
        """Give a matrix product, and how many of it make `flops`."""
        rows, width, columns = PRODUCTS["toy" if self.toy else self.device]
        a = torch.randn((rows, width), device=self.device).to(dtype)
        b = torch.randn((columns, width), device=self.device).to(dtype)
        out = torch.empty((rows, columns), dtype=dtype, device=self.device)
        return lambda: torch.mm(a, b.t(), out=out), flops / (2 * rows * width * columns)

    def record(self, part: str, settings: dict[str, Any], figures: dict[str, Any]) -> None:
        where: dict[str, Any] = {"device": self.device}
        if self.device == "cuda":
            properties = torch.cuda.get_device_properties(0)
            where["gpu"] = properties.name
            where["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
            where["cuda"] = torch.version.cuda
        else:
            where["threads"] = torch.get_num_threads()
        record(self.out, f"kernels {part}", {**where, **settings}, figures)

    def checked(self, what: str, check: Callable[[], Any]) -> Any:
        """Compare a peer with ours; if that fails say so and give None."""
        try:
            return check()
        except Exception as error:
            if isinstance(error, DisagreementError):
                self.disagreements.append(what)
            lines = str(error).strip().splitlines() or [""]
            print(f"{what}: left out, {type(error).__name__}: {lines[0]}", flush=True)
            return None

    def tidy(self) -> None:
        if self.toy:  # nothing that would take room from what is measured next
            return
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()


class DisagreementError(Exception):
    """Two implementations gave different results."""


def digits(value: float) -> float:
    return float(f"{value:.4g}")


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def apart(found: Tensor, right: Tensor) -> float:
    """Give ‖found - right‖ / ‖right‖; NaN if there is one."""
    found, right = found.detach().float(), right.detach().float()
    return float((found - right).norm() / right.norm().clamp_min(1e-30))


# --- update -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """Where all updates start: the parameters of a model, a distance from their anchors."""

    anchors: list[Tensor]
    starts: list[Tensor]
    gradients: list[Tensor]

    @property
    def parameters(self) -> int:
        return sum(anchor.numel() for anchor in self.anchors)


@dataclass(frozen=True)
class Chain:
    """Weights, and the step that moves them and gives metrics, if they were asked for."""

    weights: list[Tensor]
    step: Callable[[], list[float] | None]


MakeChain = Callable[[Problem, str, float], Chain]
"""(problem, variant, noise level) -> a chain with weights of its own."""


def compare_updates(bench: Bench, size: str, dtype: torch.dtype) -> None:
    problem = make_problem(size, bench.device, dtype)
    for variant, peers in VARIANTS.items():
        check_noise(our_chain, problem, variant)
        for name, make_peer in peers.items():
            figures = compare_update(bench, problem, variant, f"update {size}, {name}", make_peer)
            bench.tidy()
            if figures is not None:
                settings = {"size": size, "parameters": problem.parameters}
                settings |= {"tensors": len(problem.anchors), "dtype": name_of(dtype)}
                bench.record("update", {**settings, "variant": variant, "peer": name}, figures)


def compare_update(
    bench: Bench, problem: Problem, variant: str, said: str, make_peer: MakeChain
) -> dict[str, Any] | None:
    if not bench.checked(said, lambda: check_update(make_peer, problem, variant)):
        return None
    moved = 4 * problem.parameters * problem.starts[0].itemsize
    if variant == "rmsprop":
        moved += 2 * problem.parameters * torch.float32.itemsize
    ours, peer = our_chain(problem, variant, 1.0), make_peer(problem, variant, 1.0)
    figures = bench.compare(lambda: ours.step, lambda: peer.step, *bench.copy(moved))
    for key in ("ours", "peer"):
        each = figures[f"{key}_s"] / problem.parameters
        figures[f"{key}_ns_per_parameter"] = digits(1e9 * each)
    figures["copy_gb_per_s"] = digits(moved / figures["floor_s"] / 1e9)
    return figures


def make_problem(size: str, device: str, dtype: torch.dtype) -> Problem:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    shape = UPDATE_SIZES[size]
    config = GPTNeoXConfig(
        vocab_size=shape["vocab"],
        hidden_size=shape["hidden"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        intermediate_size=4 * shape["hidden"],
        max_position_embeddings=2 * shape["tokens"],
    )
    with torch.device("meta"):
        shapes = [parameter.shape for parameter in GPTNeoXForCausalLM(config).parameters()]
    torch.manual_seed(0)

    def normal(scale: float) -> list[Tensor]:
        return [torch.randn(s, device=device).mul_(scale).to(dtype) for s in shapes]

    anchors, gradients = normal(0.02), normal(0.01)
    starts = normal(0.02)
    torch._foreach_add_(starts, anchors)
    return Problem(anchors, starts, gradients)


def our_chain(problem: Problem, variant: str, noise_level: float) -> Chain:
    weights = [start.clone() for start in problem.starts]
    update = SgldUpdate(
        weights,
        anchors=problem.anchors,
        n_beta=N_BETA,
        noise_level=noise_level,
        metrics=variant == "metrics",
        **SETTINGS,
        **(RMSPROP if variant == "rmsprop" else {}),
    )
    steps = iter(range(2**31))

    def step() -> list[float] | None:
        found = update.step(problem.gradients, seed=0, chain=0, step=next(steps))
        return None if found is None else found.tolist()

    return Chain(weights, step)


def devinterp_chain(problem: Problem, variant: str, noise_level: float) -> Chain:
    from devinterp.optim import SGMCMC

    weights = [torch.nn.Parameter(anchor.clone()) for anchor in problem.anchors]
    method = SGMCMC.rmsprop_sgld if variant == "rmsprop" else SGMCMC.sgld
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a noise level of 0 is no sampling
        optimizer = method(
            [{"params": weight, "mask": None} for weight in weights],
            nbeta=N_BETA,
            noise_level=noise_level,
            save_metrics=variant == "metrics",
            **SETTINGS,
            **(RMSPROP if variant == "rmsprop" else {}),
        )
    # its anchors are where the weights were when it was made
    for weight, start, gradient in zip(weights, problem.starts, problem.gradients, strict=True):
        weight.data.copy_(start)
        weight.grad = gradient

    def step() -> list[float] | None:
        optimizer.step()
        if variant != "metrics":
            return None
        metrics = optimizer.get_metrics()
        return [float(getattr(metrics, name)) for name in METRIC_NAMES]

    return Chain([weight.data for weight in weights], step)


def foreach_chain(problem: Problem, variant: str, noise_level: float) -> Chain:
    weights = [start.clone() for start in problem.starts]
    flat = torch.empty(problem.parameters, dtype=weights[0].dtype, device=weights[0].device)
    noises = as_tensors(flat, weights)
    half, scale = SETTINGS["lr"] / 2, math.sqrt(SETTINGS["lr"]) * noise_level

    def step() -> None:
        flat.normal_(0.0, scale)
        torch._foreach_lerp_(weights, problem.anchors, half * SETTINGS["localization"])
        torch._foreach_add_(weights, problem.gradients, alpha=-half * N_BETA)
        torch._foreach_add_(weights, noises)

    return Chain(weights, step)


def compiled_chain(problem: Problem, variant: str, noise_level: float) -> Chain:
    whole = [torch.cat([t.view(-1) for t in tensors])
             for tensors in (problem.starts, problem.gradients, problem.anchors)]  # fmt: skip
    # as a tensor, so that it is compiled once for both noise levels
    scale = torch.tensor(math.sqrt(SETTINGS["lr"]) * noise_level, device=whole[0].device)
    # compiled noise is slower than torch's own on a CPU
    ready = torch.empty_like(whole[0]) if scale.device.type == "cpu" else None

    def step() -> None:
        _compiled_update(*whole, scale, None if ready is None else ready.normal_())

    return Chain(as_tensors(whole[0], problem.starts), step)


@torch.compile(dynamic=False)
def _compiled_update(
    weight: Tensor, gradient: Tensor, anchor: Tensor, scale: Tensor, noise: Tensor | None
) -> None:
    half = SETTINGS["lr"] / 2
    pull = SETTINGS["localization"] * (weight - anchor)
    noise = torch.randn_like(weight) if noise is None else noise
    weight.add_(scale * noise - half * (N_BETA * gradient + pull))


def as_tensors(flat: Tensor, templates: list[Tensor]) -> list[Tensor]:
    """Cut a flat tensor into views of the templates' shapes."""
    parts = flat.split([template.numel() for template in templates])
    return [part.view(t.shape) for part, t in zip(parts, templates, strict=True)]


VARIANTS: dict[str, dict[str, MakeChain]] = {
    "plain": {
        "devinterp": devinterp_chain,
        "torch._foreach": foreach_chain,
        "torch.compile": compiled_chain,
    },
    "metrics": {"devinterp": devinterp_chain},
    "rmsprop": {"devinterp": devinterp_chain},
}


def check_update(make_peer: MakeChain, problem: Problem, variant: str) -> bool:
    """Refuse a peer whose step is not ours without noise, or that makes no such noise."""
    chains = [make(problem, variant, 0.0) for make in (our_chain, make_peer)]
    found, right = (chain.step() for chain in chains)
    limit = STEP_ERROR[problem.starts[0].dtype]
    squares = [0.0, 0.0]
    for mine, theirs, start in zip(*(c.weights for c in chains), problem.starts, strict=True):
        moved = theirs.float() - start.float()
        squares[0] += float((mine.float() - start.float() - moved).square().sum())
        squares[1] += float(moved.square().sum())
    error = math.sqrt(squares[0] / squares[1])
    if not error <= limit:
        raise DisagreementError(f"steps differ by {error:.2g} of their length")
    if found is not None and right is not None:
        for name, a, b in zip(METRIC_NAMES, found, right, strict=True):
            if not abs(a - b) <= max(10 * limit, 1e-3) * abs(b) + 1e-9:
                raise DisagreementError(f"{name} is {a}, the peer's {b}")
    check_noise(make_peer, problem, variant)
    return True


def check_noise(make: MakeChain, problem: Problem, variant: str) -> None:
    """Refuse noise that has not the step's variance (which rmsprop varies from place to place)."""
    noisy, quiet = (make(problem, variant, level) for level in (1.0, 0.0))
    for chain in (noisy, quiet):
        chain.step()
    if variant == "rmsprop":
        return
    pairs = zip(noisy.weights, quiet.weights, strict=True)
    total = sum(float((a.float() - b.float()).square().sum()) for a, b in pairs)
    excess = total / (problem.parameters * SETTINGS["lr"]) - 1
    if not abs(excess) <= 0.01 + 10 / math.sqrt(problem.parameters):
        raise DisagreementError(f"the noise's variance is off by {excess:.2g}")


# --- cross-entropy from logits ------------------------------------------------------------------

TokenLoss = Callable[[Tensor, Tensor], Tensor]
"""(logits, input ids) -> the losses of the next tokens."""


def compare_cross_entropies(bench: Bench, size: str, dtype: torch.dtype) -> None:
    batch, token, vocabulary = LOGITS[size]
    torch.manual_seed(0)
    base = torch.randn(LOGITS[size], device=bench.device).mul_(2).to(dtype).requires_grad_()
    ids = torch.randint(vocabulary, (batch, token), device=bench.device)
    exact = base.detach().float().requires_grad_()
    right = differentiate(torch_loss, exact, ids)
    del exact

    def make(loss: TokenLoss) -> Make:
        def prepare() -> Work:
            logits = base.clone()
            return lambda: differentiate(loss, logits, ids)

        return prepare

    def agree(loss: TokenLoss, *limits: float) -> bool:
        """Compare losses and gradients, each within a limit."""
        found = differentiate(loss, base.clone(), ids)
        for what, a, b, limit in zip(("losses", "gradients"), found, right, limits, strict=True):
            if not apart(a, b) <= limit:
                raise DisagreementError(f"{what} differ by {apart(a, b):.2g}")
        return True

    def compare(reuse: bool, name: str) -> None:
        limits = LOSS_ERROR[dtype], WRONG
        if not bench.checked(f"cross_entropy {size}, {name}", lambda: agree(LOSSES[name], *limits)):
            return
        # logits read forward and backward, their gradient written; the last have no loss
        moved = vocabulary * batch * (2 * (token - 1) + token) * dtype.itemsize
        floor = bench.copy(moved)
        figures = bench.compare(make(OURS[reuse]), make(LOSSES[name]), *floor)
        figures["copy_gb_per_s"] = digits(moved / figures["floor_s"] / 1e9)
        settings = {"shape": list(LOGITS[size]), "dtype": name_of(dtype), "reuse_logits": reuse}
        bench.record("cross_entropy", {**settings, "peer": name}, figures)

    for reuse in (True, False):
        agree(OURS[reuse], LOSS_ERROR[torch.float32], GRADIENT_ERROR[dtype])
        for name in LOSSES:
            compare(reuse, name)
            bench.tidy()


def differentiate(loss: TokenLoss, logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Losses, flat, and the gradient of their mean."""
    losses = loss(logits, ids).float()
    (gradient,) = torch.autograd.grad(losses.mean(), logits)
    return losses.detach().flatten(), gradient


def devinterp_loss(logits: Tensor, ids: Tensor) -> Tensor:
    from devinterp.slt.lm_loss import NonFiniteLogitsError, lm_cross_entropy_loss

    if not torch.isfinite(logits).all():
        raise NonFiniteLogitsError("Non-finite values detected in model logits.")
    return lm_cross_entropy_loss(logits, ids)


def torch_loss(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")


OURS: dict[bool, TokenLoss] = {
    reuse: partial(next_token_cross_entropy, reuse_logits=reuse) for reuse in (True, False)
}
LOSSES: dict[str, TokenLoss] = {"devinterp": devinterp_loss, "torch": torch_loss}


# --- cross-entropy of a linear head -------------------------------------------------------------

HeadLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden states (batch, token, width), weight, input ids) -> the losses of the next tokens."""


def compare_heads(bench: Bench, size: str, dtype: torch.dtype) -> None:
    batch, token, width, vocabulary = HEADS[size]
    hidden, weight, ids = head_inputs(size, bench.device, dtype)
    tokens = batch * (token - 1)
    even = torch.full((tokens,), 1 / tokens, device=bench.device)
    uneven = torch.rand(tokens, device=bench.device) * 2 / tokens
    right = [exact_head(hidden, weight, ids, upstream) for upstream in (even, uneven)]

    def errors(head: HeadLoss) -> tuple[float, float]:
        """Relative errors of the gradients, of equal and of different tokens."""
        found = []
        for upstream, (losses, *gradients) in zip((even, uneven), right, strict=True):
            mine = head(hidden, weight, ids).float().flatten()
            if not apart(mine, losses) <= LOSS_ERROR[dtype]:
                raise DisagreementError(f"losses differ by {apart(mine, losses):.2g}")
            made = torch.autograd.grad(mine, (hidden, weight), upstream)
            found.append(max(apart(a, b) for a, b in zip(made, gradients, strict=True)))
        return found[0], found[1]

    def peer_error(head: HeadLoss) -> float:
        uniform, per_token = errors(head)
        if not uniform <= WRONG:
            raise DisagreementError(f"gradients differ by {uniform:.2g}")
        return per_token

    def make(head: HeadLoss) -> Make:
        return lambda: lambda: differentiate_head(head, hidden, weight, ids)

    def growth(who: str) -> float:
        if bench.device == "cuda":
            peak = cuda_growth(make(HEAD_LOSSES[who]))
        else:
            # hidden and weight have gradients of their own size
            peak = cpu_peak(who, size, dtype) - base - hidden.nbytes - weight.nbytes
        return digits(peak / 2**20)

    def compare(name: str) -> None:
        error = bench.checked(f"linear {size}, {name}", lambda: peer_error(HEAD_LOSSES[name]))
        if error is None:
            return
        floor = bench.product(dtype, 3 * 2 * tokens * width * vocabulary)
        figures = bench.compare(make(HEAD_LOSSES["basinscope"]), make(HEAD_LOSSES[name]), *floor)
        rate = 3 * 2 * tokens * width * vocabulary / figures["floor_s"]
        figures["product_tflop_per_s"] = digits(rate / 1e12)
        figures["ours_error"], figures["peer_error"] = digits(our_error), digits(error)
        figures["peer_wrong_per_token"] = not error <= WRONG
        if bench.memory:
            figures["ours_growth_mib"], figures["peer_growth_mib"] = our_growth, growth(name)
        settings = {"shape": list(HEADS[size]), "dtype": name_of(dtype), "peer": name}
        if name in PACKAGES:
            settings["peer_version"] = version(PACKAGES[name])
        bench.record("linear", settings, figures)

    our_error = max(errors(HEAD_LOSSES["basinscope"]))
    if not our_error <= GRADIENT_ERROR[dtype]:
        raise DisagreementError(f"our gradients differ by {our_error:.2g}")
    base = cpu_peak("baseline", size, dtype) if bench.memory and bench.device == "cpu" else 0
    our_growth = growth("basinscope") if bench.memory else 0.0
    for name in peers_on(bench.device):
        compare(name)
        bench.tidy()


def peers_on(device: str) -> Iterator[str]:
    """Names of the peers that are installed and work on this device."""
    for name in HEAD_LOSSES:
        if name == "basinscope":
            continue
        if name in PACKAGES:
            if device != "cuda":
                continue
            if importlib.util.find_spec(PACKAGES[name].replace("-", "_")) is None:
                print(f"linear, {name}: left out, {PACKAGES[name]} is not installed", flush=True)
                continue
        if name == "torch.linear_cross_entropy" and not hasattr(F, "linear_cross_entropy"):
            print(f"linear, {name}: left out, torch {torch.__version__} has none", flush=True)
            continue
        yield name


def head_inputs(size: str, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    batch, token, width, vocabulary = HEADS[size]
    torch.manual_seed(0)
    hidden = torch.randn((batch, token, width), device=device).to(dtype)
    # logits of standard deviation 2
    weight = torch.randn((vocabulary, width), device=device).mul_(2 / math.sqrt(width)).to(dtype)
    ids = torch.randint(vocabulary, (batch, token), device=device)
    return hidden.requires_grad_(), weight.requires_grad_(), ids


def exact_head(
    hidden: Tensor, weight: Tensor, ids: Tensor, upstream: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, and the gradients of sum(upstream * losses), in float32, some tokens at a time."""
    states = hidden.detach()[:, :-1].flatten(0, 1).float().requires_grad_()
    head = weight.detach().float().requires_grad_()
    targets = ids[:, 1:].flatten()
    found = []
    for part in torch.arange(len(states), device=states.device).split(1024):
        losses = F.cross_entropy(F.linear(states[part], head), targets[part], reduction="none")
        losses.backward(upstream[part])
        found.append(losses.detach())
    assert states.grad is not None
    assert head.grad is not None
    of_hidden = torch.zeros(hidden.shape, device=hidden.device)
    of_hidden[:, :-1] = states.grad.view_as(of_hidden[:, :-1])
    return torch.cat(found), of_hidden, head.grad


def differentiate_head(
    head: HeadLoss, hidden: Tensor, weight: Tensor, ids: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of the mean loss."""
    return torch.autograd.grad(head(hidden, weight, ids).float().mean(), (hidden, weight))


def cuda_growth(make: Make) -> int:
    """Peak bytes of a call beyond what there was and the gradients that it gives."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gradients: Any = make()()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    return peak - before - sum(gradient.nbytes for gradient in gradients)


def cpu_peak(who: str, size: str, dtype: torch.dtype) -> int:
    return peak_memory("benchmarks.kernels", "--one", who, size, name_of(dtype))


def run_once(who: str, size: str, dtype: str) -> int:
    """Make the inputs and, unless `who` is "baseline", one call; give this process's peak memory.

    Everyone is called on a small shape first, so that all processes have imported and compiled
    the same.
    """
    small = head_inputs("toy", "cpu", getattr(torch, dtype))
    for name in ("basinscope", *peers_on("cpu")):
        differentiate_head(HEAD_LOSSES[name], *small)
    inputs = head_inputs(size, "cpu", getattr(torch, dtype))
    if who != "baseline":
        differentiate_head(HEAD_LOSSES[who], *inputs)
    return own_peak_memory()


def our_head(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    return linear_token_cross_entropy(hidden[:, :-1], weight, ids[:, 1:])


def devinterp_head(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    return devinterp_loss(F.linear(hidden, weight), ids)


def torch_head(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    rows, targets = flat(hidden, ids)
    return F.cross_entropy(F.linear(rows, weight), targets, reduction="none")


def torch_chunked_head(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    rows, targets = flat(hidden, ids)
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(rows, weight, targets, reduction="none", options=options)


def liger_head(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    rows, targets = flat(hidden, ids)
    # bias, class weights, ignored index, z-loss, label smoothing, reduction
    options = (None, None, -100, 0.0, 0.0, "none")
    return LigerFusedLinearCrossEntropyFunction.apply(rows, weight, targets, *options)[0]


def cut_head(
    hidden: Tensor, weight: Tensor, ids: Tensor, filter_eps: float | str | None = "high"
) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    rows, targets = flat(hidden, ids)
    return linear_cross_entropy(rows, weight, targets, reduction="none", filter_eps=filter_eps)


def flat(hidden: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states and targets of the tokens that have a next one, as rows."""
    return hidden[:, :-1].flatten(0, 1), ids[:, 1:].flatten()


HEAD_LOSSES: dict[str, HeadLoss] = {
    "basinscope": our_head,
    "devinterp": devinterp_head,
    "torch": torch_head,
    "torch.linear_cross_entropy": torch_chunked_head,
    "Liger-Kernel": liger_head,
    "Cut Cross-Entropy": cut_head,
    "Cut Cross-Entropy, unfiltered": partial(cut_head, filter_eps=None),
}
PACKAGES = {
    "Liger-Kernel": "liger-kernel",
    "Cut Cross-Entropy": "cut-cross-entropy",
    "Cut Cross-Entropy, unfiltered": "cut-cross-entropy",
}


PARTS: dict[str, Callable[[Bench, str, torch.dtype], None]] = {
    "update": compare_updates,
    "cross_entropy": compare_cross_entropies,
    "linear": compare_heads,
}


if __name__ == "__main__":
    sys.exit(main())
