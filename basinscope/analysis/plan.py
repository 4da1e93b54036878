"""What an analysis will read, hold, compute and write: integers from shapes and chunks, no I/O."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import dask
import numpy as np
from dask.system import CPU_COUNT

from basinscope.analysis.memory import parse_memory_limit
from basinscope.analysis.stores import Part, at_hand
from basinscope.io.copy import chunk_sequences
from basinscope.io.stored import StoredArray

CHUNK_COPIES = 3  # of one chunk while it is read: encoded, decoded, and what is made of it
OUTPUT_BLOCK_BYTES = 2**29  # most of one block of influences
TRACES_BLOCK_BYTES = 2**26  # about one block of traces, where all of them are held
SEQUENCES_BYTES = 2**30  # most that one task of susceptibilities streams, of more than a chunk
PRODUCTS_AT_ONCE = 4  # of draws with each other: made by a task, and waiting to be added
PAIRS_BYTES = 2**24  # of pairs within sequences, and of their traces, that are made together
QUERY_PANEL = 256  # queries whose products with a block of candidates are looked at together
AMPLIFIED = 2.0  # blocks that would decode a byte more often than this are made larger, if held
COPIED = 8.0  # more often than this, and than from a copy, and they are read from a copy


class PlanError(ValueError):
    """An analysis does not fit the memory it may take."""


@dataclass(frozen=True)
class Plan:
    """What one analysis costs.

    Attributes
    ----------
    estimator : str
        What is computed.
    stored_bytes : int
        Losses that it needs, decoded.
    bytes_to_read : int
        What is read and decoded, re-reads included.
    bytes_to_write : int
        Of a temporary copy.
    peak_memory : int
        Bytes held at once, beyond what the process and its libraries hold before; the result is
        not in it.
    output_bytes : int
        Of the result.
    flops : int
        Of the matrix products.
    tasks : int
        Of the Dask graph, about.
    workers : int
        Tasks that run at once.
    least_memory : int
        The smallest ``memory_limit`` under which it would run, with as many workers.
    notes : tuple of str
        Choices that the chunks forced.
    """

    estimator: str
    stored_bytes: int
    bytes_to_read: int
    peak_memory: int
    output_bytes: int
    flops: int
    tasks: int
    workers: int
    least_memory: int
    bytes_to_write: int = 0
    notes: tuple[str, ...] = ()

    def validate(self, memory_limit: int | str) -> None:
        """Refuse what does not fit into bytes, or such as "2GiB".

        Raises
        ------
        PlanError
            Saying what would fit.
        """
        memory_limit = parse_memory_limit(memory_limit)
        if self.peak_memory <= memory_limit:
            return
        advice = f"give memory_limit={self.least_memory} ({_size(self.least_memory)}) or more"
        if self.workers > 1:
            advice += ", or fewer workers (dask.config.set(num_workers=1) takes least)"
        raise PlanError(
            f"{self.estimator} needs {_size(self.peak_memory)} with {self.workers} workers, and "
            f"memory_limit is {_size(memory_limit)}: {advice}"
        )

    def rows(self) -> list[tuple[str, str]]:
        """Give the plan as pairs of a heading and a figure, for a table."""
        again = self.bytes_to_read / max(1, self.stored_bytes)
        figures = [
            ("reads", f"{_size(self.bytes_to_read)} ({again:.2f} times what is stored)"),
            ("writes to a temporary copy", _size(self.bytes_to_write)),
            ("peak memory", f"{_size(self.peak_memory)} with {self.workers} workers"),
            ("result", _size(self.output_bytes)),
            ("products", f"{self.flops / 1e9:,.1f} GFLOP"),
            ("tasks", f"{self.tasks:,}"),
        ]
        return [(name, figure) for name, figure in figures if figure != "0 B"]


@dataclass(frozen=True)
class Layout:
    """Shape and chunks of the losses on one observable.

    Attributes
    ----------
    shape : tuple of int
        (chain, row, batch, token_pos), of what counts.
    chunk : tuple of int
        What is decoded at once.
    itemsize : int
        Bytes of one loss.
    at_hand : bool
        Whether they are in memory, and few.
    """

    shape: tuple[int, int, int, int]
    chunk: tuple[int, int, int, int]
    itemsize: int
    at_hand: bool = False

    @classmethod
    def of(cls, parts: Sequence[Part]) -> Layout:
        """Read the layout off the losses of a store's chains."""
        first = parts[0]
        if isinstance(first, StoredArray):
            chunk = first.chunk_shape
        elif isinstance(first, np.ndarray):  # any part of it is at hand
            chunk = (1, 1, 1, first.shape[3])
        else:
            chunk = tuple(max(sizes) for sizes in first.array.chunks)
        rows = sum(part.shape[1] for part in parts)
        shape = (1, rows, *first.shape[2:])
        return cls(shape, (1, *chunk[1:]), first.dtype.itemsize, at_hand(parts))  # type: ignore[arg-type]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.itemsize

    @property
    def chunk_bytes(self) -> int:
        return math.prod(self.chunk) * self.itemsize

    def bytes_of(self, sequences: np.ndarray) -> int:
        """Bytes that are decoded to read all draws of some sequences, once."""
        columns = len(np.unique(np.asarray(sequences) // self.chunk[2]))
        width = min(columns * self.chunk[2], self.shape[2])
        return self.shape[1] * width * self.shape[3] * self.itemsize


def workers() -> int:
    """Tasks that Dask's local scheduler runs at once."""
    return int(dask.config.get("num_workers", None) or CPU_COUNT)


def plan_means(estimator: str, layouts: Sequence[Layout]) -> Plan:
    """Plan means that are taken in one pass, chunk by chunk.

    Parameters
    ----------
    layouts : sequence of Layout
        Of every array that is read.
    """
    stored = sum(layout.nbytes for layout in layouts)
    results = sum(8 * (layout.shape[1] + layout.shape[3]) for layout in layouts)
    chunk = max((layout.chunk_bytes for layout in layouts), default=0)
    peak = workers() * CHUNK_COPIES * chunk + 3 * results
    files = sum(
        math.ceil(layout.shape[1] / layout.chunk[1]) for layout in layouts
    )  # at least: shorter chains have files of their own
    return Plan(estimator, stored, stored, peak, results, 0, files, workers(), peak)


def plan_susceptibilities(
    task: Sequence[Layout], probes: Sequence[Layout], restrictions: int, chains: int = 1
) -> Plan:
    """Plan susceptibilities: the task's losses of every store, then each probe's, once each.

    Parameters
    ----------
    task : sequence of Layout
        Of the task's losses, one for each store, the unrestricted one included.
    probes : sequence of Layout
        Of the probes' losses, over all stores.
    restrictions : int
        Stores besides the unrestricted one.
    chains : int
        Of a store, at most.
    """
    means = plan_means("susceptibilities", [*task, *probes])
    tokens = sum(probe.shape[2] * probe.shape[3] for probe in probes)
    widest = (max(at.stop - at.start for at in sequence_blocks(probe)) for probe in probes)
    block = max(8 * rows * probe.shape[3] for rows, probe in zip(widest, probes, strict=True))
    output = 2 * 8 * tokens * restrictions // max(1, restrictions + 1)  # and their errors
    peak = means.peak_memory + (3 + 3 * chains) * block * workers()
    return replace(
        means,
        peak_memory=peak,
        least_memory=peak,
        output_bytes=output,
        flops=2 * sum(math.prod(probe.shape) for probe in probes),
        tasks=means.tasks * 2,
    )


def sequence_blocks(layout: Layout) -> list[slice]:
    """Cut sequences so that a task streams whole chunks over all draws, about as many each worker.

    All blocks but the last are of one size, as Zarr stores them.

    Where chunks hold so many sequences that blocks would decode them again and again, one task
    takes all; so it does where losses are at hand, whose rows stand side by side undivided.
    """
    if layout.at_hand:
        return [slice(0, layout.shape[2])]
    count, extent = layout.shape[2], max(1, layout.chunk[2])
    chunks = max(1, math.ceil(count / extent))
    most = max(1, min(SEQUENCES_BYTES * chunks // max(1, layout.nbytes), -(-chunks // workers())))

    def last_to_end(size: int) -> int:
        return math.ceil(math.ceil(chunks / size) / workers()) * size

    block = min(range(most, 0, -1), key=last_to_end) * extent
    blocks = [slice(a, min(a + block, count)) for a in range(0, max(1, count), block)]
    read = sum(layout.bytes_of(np.arange(at.start, at.stop)) for at in blocks)
    return blocks if read <= AMPLIFIED * layout.nbytes else [slice(0, count)]


@dataclass(frozen=True)
class Blocks:
    """How influences are cut into blocks, in sequences.

    Attributes
    ----------
    output : int
        Sequences on either side of a block of influences (for top-k: candidates at once).
    traces : int
        Sequences whose traces are read and standardised together, where all are held.
    held : bool
        Whether all traces are held in memory, so that each is read once.
    copied : bool
        Whether they are read from a temporary copy.
    queries : int
        Queries that one pass over the candidates answers.
    """

    output: int
    traces: int
    held: bool
    copied: bool = False
    queries: int = 0


@dataclass(frozen=True)
class Influence:
    """The size of an influence problem.

    Attributes
    ----------
    layouts : tuple of Layout
        Of each observable, in the order in which their sequences are counted.
    rows_1, rows_2 : np.ndarray
        Selected sequences, counted over all observables.
    samples : int
        Entries of a trace.
    kind : str
        ``token``, ``average``, ``sequence`` or ``top_k``.
    queries : np.ndarray
        Sequence of each query token, of a search for the strongest partners.
    top_k : int
        Partners of each sign.
    mean_over_chains : bool
        Whether chains are averaged draw by draw, which is done in float64.
    """

    layouts: tuple[Layout, ...]
    rows_1: np.ndarray
    rows_2: np.ndarray
    samples: int
    kind: str
    queries: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    top_k: int = 0
    mean_over_chains: bool = False

    @property
    def tokens(self) -> int:
        return self.layouts[0].shape[3]

    @property
    def same(self) -> bool:
        """Whether both sides are the same sequences."""
        return np.array_equal(self.rows_1, self.rows_2)

    @property
    def all_rows(self) -> np.ndarray:
        return self.rows_1 if self.same else np.concatenate([self.rows_1, self.rows_2])

    def bytes_of(self, rows: np.ndarray) -> int:
        """Bytes that are decoded to read all draws of some sequences at once."""
        total = first = 0
        for layout in self.layouts:
            inside = rows[(rows >= first) & (rows < first + layout.shape[2])] - first
            if len(inside):
                total += layout.bytes_of(inside)
            first += layout.shape[2]
        return total

    def sides(self, block: int) -> int:
        """Bytes that are decoded to read each side once, block by block."""
        sides = (self.rows_1,) if self.same else (self.rows_1, self.rows_2)
        return sum(self.sweep(rows, block) for rows in sides)

    @property
    def as_copied(self) -> Influence:
        """The same problem on a temporary copy of the losses."""
        layouts = []
        for layout in self.layouts:
            rows, (batch, tokens) = layout.chunk[1], layout.shape[2:]
            block = chunk_sequences(rows, batch, tokens, layout.itemsize)
            layouts.append(replace(layout, chunk=(1, rows, block, tokens)))
        return replace(self, layouts=tuple(layouts))

    def sweep(self, rows: np.ndarray, block: int) -> int:
        """Bytes that are decoded to read some sequences block by block."""
        return sum(self.bytes_of(rows[i : i + block]) for i in range(0, len(rows), block))


def plan_influence(
    problem: Influence, memory_limit: int, block: int | None = None
) -> tuple[Plan, Blocks]:
    """Choose blocks that fit the memory, and say what they cost.

    Parameters
    ----------
    memory_limit : int
        Bytes.
    block : int, optional
        Sequences on either side of a block, instead of the largest that fits.
    """
    if problem.kind == "sequence":
        return _plan_sequences(problem, block)
    if problem.kind == "average":
        return _plan_average(problem, memory_limit, block)
    if problem.kind == "top_k":
        return _plan_top_k(problem, memory_limit, block)
    return _plan_tokens(problem, memory_limit, block)


def plan_reliability(problem: Influence, memory_limit: int, chains: int) -> tuple[Plan, Blocks]:
    """Plan the reliability of influences, of which it makes those within sequences alone."""
    count, row, chunk = workers(), _row_bytes(problem), _chunk(problem)
    rows, products = problem.rows_1, 8 * problem.samples**2
    a_task = chunk + PRODUCTS_AT_ONCE * products + 3 * max(PAIRS_BYTES, row)
    most = ((memory_limit - products) // count - a_task) // row
    chosen = max(1, min(_trace_block(problem, row), most, len(rows)))
    plan = Plan(
        "the reliability of influences", problem.bytes_of(np.unique(rows)),
        problem.sweep(rows, chosen), products + count * (a_task + chosen * row),
        8 * (chains**2 + 1),
        2 * len(rows) * (problem.tokens if problem.kind == "token" else 1) * problem.samples**2,
        2 * _cuts(rows, chosen), count, products + count * (a_task + row),
    )  # fmt: skip
    blocks = Blocks(chosen, chosen, held=False)
    if problem.kind == "sequence":
        return plan, blocks
    return _with_copy(problem, plan, blocks, len(rows) * row)


def _plan_tokens(problem: Influence, limit: int, block: int | None) -> tuple[Plan, Blocks]:
    count, row, pair, chunk = workers(), _row_bytes(problem), 4 * problem.tokens**2, _chunk(problem)
    longest = max(len(problem.rows_1), len(problem.rows_2))
    budget = limit - count * chunk
    all_rows = problem.all_rows
    traces = row * len(all_rows)
    side = block or 1
    share = min((budget - traces) // (2 * count), OUTPUT_BLOCK_BYTES)
    held = traces <= budget // 2 and share >= pair * side**2
    if held:
        chosen = block or math.isqrt(max(0, share) // pair)
    else:
        share = max(0, budget // count)
        chosen = block or int((math.sqrt(row * row + pair * share) - row) / pair)
    chosen = max(1, min(chosen, longest))
    per_trace = _trace_block(problem, row) if held else chosen
    blocks = Blocks(chosen, per_trace, held)
    cuts_1, cuts_2 = _cuts(problem.rows_1, chosen), _cuts(problem.rows_2, chosen)
    if held:
        reads = problem.sides(per_trace)
        peak = traces + count * (chunk + chosen * chosen * pair)
    else:
        reads = cuts_2 * problem.sweep(problem.rows_1, chosen)
        reads += cuts_1 * problem.sweep(problem.rows_2, chosen)
        peak = count * (chunk + 2 * chosen * row + chosen * chosen * pair)
    least = count * (chunk + 2 * side * row + side * side * pair)
    plan = Plan(
        "token influence", problem.bytes_of(np.unique(all_rows)), reads, peak,
        len(problem.rows_1) * len(problem.rows_2) * pair,
        2 * problem.samples * len(problem.rows_1) * len(problem.rows_2) * problem.tokens**2,
        cuts_1 * cuts_2 + _cuts(all_rows, per_trace), count, least,
    )  # fmt: skip
    read_again = (cuts_2 * len(problem.rows_1) + cuts_1 * len(problem.rows_2)) * row
    return _with_copy(problem, plan, blocks, read_again)


def _plan_top_k(problem: Influence, limit: int, block: int | None) -> tuple[Plan, Blocks]:
    asked = len(problem.queries)
    count, row, chunk = workers(), _row_bytes(problem), _chunk(problem)
    a_rank = 2 * 20  # value, batch, position, for both signs
    results = asked * problem.top_k * a_rank
    ranks = min(problem.top_k, len(problem.rows_2) * problem.tokens)
    budget = limit - count * chunk - results
    trace = 4 * problem.samples

    def a_query(cuts: int) -> int:
        """Count its trace, and its partners in so many blocks while they are merged in pairs."""
        unmerged = min(cuts, 2 * count + cuts.bit_length())
        return trace + ranks * a_rank * (unmerged + min(count, cuts // 2))

    cuts, needed = 0, 1
    while cuts < needed:
        cuts = needed
        queries, chosen, a_candidate = 2 * asked, 0, 0
        while queries > 1 and chosen < (block or 1):
            queries = max(1, min(queries // 2, budget // 4 // a_query(cuts)))
            panel = min(queries, QUERY_PANEL)  # an eighth of it is looked through at once
            a_candidate = row + 4 * problem.tokens * (panel + 10 * math.ceil(panel / 8))
            chosen = (budget - queries * a_query(cuts)) // count // a_candidate
        chosen = max(1, min(block or chosen, len(problem.rows_2)))
        needed = _cuts(problem.rows_2, chosen)
    panels = [np.unique(problem.queries[i : i + queries]) for i in range(0, asked, queries)]
    passes = len(panels)
    reads = passes * problem.sweep(problem.rows_2, chosen)
    reads += sum(problem.sweep(rows, chosen) for rows in panels)
    working = queries * a_query(needed) + count * (chunk + chosen * a_candidate)
    least = a_query(_cuts(problem.rows_2, block or 1))
    plan = Plan(
        f"top {problem.top_k} partners",
        problem.bytes_of(np.union1d(problem.queries, problem.rows_2)), reads,
        results + max(working, 2 * queries * trace), results,  # traces, while they are put in order
        2 * problem.samples * asked * len(problem.rows_2) * problem.tokens,
        passes * needed + 2, count,
        results + least + count * (chunk + (block or 1) * (row + 44 * problem.tokens)),
    )  # fmt: skip
    blocks = Blocks(chosen, chosen, held=False, queries=queries)
    read_again = (passes * len(problem.rows_2) + sum(map(len, panels))) * row
    return _with_copy(problem, plan, blocks, read_again)


def _plan_average(problem: Influence, limit: int, block: int | None) -> tuple[Plan, Blocks]:
    count, row, chunk = workers(), _row_bytes(problem), _chunk(problem)
    rows, fixed, output = problem.all_rows, _of_rows(problem), _pairs_bytes(problem)
    share = (limit - fixed) // count - chunk
    wanted = block or _trace_block(problem, row)
    chosen = max(1, min(wanted, share // row, len(rows)))
    plan = Plan(
        "influence averaged over tokens", problem.bytes_of(np.unique(rows)),
        problem.sides(chosen), fixed + count * (chunk + chosen * row), output,
        _pair_flops(problem), 2 * _cuts(rows, chosen) + 1, count, fixed + count * (chunk + row),
    )  # fmt: skip
    return _with_copy(problem, plan, Blocks(chosen, chosen, held=False), len(rows) * row)


def _plan_sequences(problem: Influence, block: int | None) -> tuple[Plan, Blocks]:
    count, rows, fixed = workers(), problem.all_rows, _of_rows(problem)
    chosen = min(len(rows), block or _trace_block(problem, _row_bytes(problem)))
    peak = fixed + count * _chunk(problem)
    plan = Plan(
        "influence between sequences", problem.bytes_of(np.unique(rows)),
        problem.sides(chosen), peak, _pairs_bytes(problem), _pair_flops(problem),
        2 * _cuts(rows, chosen) + 1, count, peak,
    )  # fmt: skip
    return plan, Blocks(chosen, chosen, held=False)


def _of_rows(problem: Influence) -> int:
    """Bytes of one float64 trace for each sequence, joined, and of a block of their products."""
    traces = 2 * 8 * problem.samples * len(problem.all_rows)
    return traces + 12 * len(problem.rows_2) * min(len(problem.rows_1), 1 + TRACES_BLOCK_BYTES // 4)


def _pairs_bytes(problem: Influence) -> int:
    return 4 * len(problem.rows_1) * len(problem.rows_2)


def _pair_flops(problem: Influence) -> int:
    return 2 * problem.samples * len(problem.rows_1) * len(problem.rows_2)


def _with_copy(
    problem: Influence, plan: Plan, blocks: Blocks, read_from_copy: int
) -> tuple[Plan, Blocks]:
    """Answer a layout of which every block would decode nearly everything by a temporary copy."""
    everything = sum(layout.nbytes for layout in problem.layouts)
    rows = max(problem.rows_1, problem.rows_2, key=len)
    in_blocks, from_copy = (p.sweep(rows, blocks.output) for p in (problem, problem.as_copied))
    times = in_blocks / max(1, problem.bytes_of(np.unique(rows)))
    if blocks.held or times <= COPIED or in_blocks <= COPIED * from_copy:
        return plan, blocks
    return (
        replace(
            plan,
            bytes_to_read=everything + read_from_copy,
            bytes_to_write=everything,
            tasks=plan.tasks + sum(math.ceil(n.shape[1] / n.chunk[1]) for n in problem.layouts),
            notes=(
                f"chunks hold many sequences, and blocks of {blocks.output} would decode each "
                f"about {times:.0f} times: they are "
                f"read from a temporary copy of {_size(everything)}",
            ),
        ),
        replace(blocks, copied=True),
    )


def _trace_block(problem: Influence, row: int) -> int:
    """Sequences whose traces are made together: about a task for each worker, read once."""
    rows = problem.all_rows
    wanted = max(1, min(math.ceil(len(rows) / workers()), TRACES_BLOCK_BYTES // row))
    extent = max(layout.chunk[2] for layout in problem.layouts)
    wanted = math.ceil(wanted / extent) * extent
    once = problem.bytes_of(np.unique(rows))
    return wanted if problem.sweep(rows, wanted) <= AMPLIFIED * once else len(rows)


def _row_bytes(problem: Influence) -> int:
    """Bytes of the traces of one sequence, as gathered (float64 ones are standardised so)."""
    wide = problem.mean_over_chains or problem.layouts[0].itemsize > 4
    return (12 if wide else 4) * problem.tokens * problem.samples


def _chunk(problem: Influence) -> int:
    return CHUNK_COPIES * max(layout.chunk_bytes for layout in problem.layouts)


def _cuts(rows: np.ndarray, block: int) -> int:
    return math.ceil(len(rows) / block)


def _size(count: int) -> str:
    return f"{count} B" if count < 10**4 else dask.utils.format_bytes(count)
