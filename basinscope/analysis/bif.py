"""The Bayesian influence function: how the losses of tokens and sequences move together."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import dask.array as da
import numpy as np
import xarray as xr
from dask.delayed import Delayed, delayed

from basinscope.analysis.graphs import without_copy
from basinscope.analysis.memory import parse_memory_limit
from basinscope.analysis.plan import Blocks, Influence, Plan, plan_influence
from basinscope.analysis.products import check_device, product
from basinscope.analysis.selections import in_words, numbers_along
from basinscope.analysis.stores import Samples, choose_observables, open_samples, unread
from basinscope.analysis.top_k import Partners, best_partners, merge_partners, query_traces
from basinscope.analysis.traces import (
    Traces,
    gather_sequence_traces,
    gather_token_means,
    gather_traces,
    standardise,
)
from basinscope.io import dims
from basinscope.io.results import begun_chunks, digest, write_result

MERGED_AT_ONCE = 2  # blocks whose partners are merged in one task
ROW_BLOCK_BYTES = 2**26  # of influences between whole sequences that one task makes
SIGNS = ("positive", "negative")

Contents = tuple[dict[str, xr.Variable], dict[str, Any]]  # variables and coordinates of a result


def compute_bif(
    samples: xr.DataTree | str | os.PathLike[str],
    *,
    correlation_method: Literal["token", "sequence"] = "token",
    reduce_chain_dimension_method: Literal["stack", "mean"] = "stack",
    loss_keys: Literal["all"] | Sequence[str] = "all",
    batch_index_range_1: Literal["all"] | Sequence[int] = "all",
    batch_index_range_2: Literal["all"] | Sequence[int] = "all",
    average_tokenwise_bif: bool = False,
    compute_covariance: bool = False,
    batch_size: int | None = None,
    device: str | None = None,
    top_k: int | None = None,
    queries: Literal["all"] | Sequence[tuple[int, int]] = "all",
    output_path: str | os.PathLike[str] | None = None,
    allow_incomplete: bool = False,
    memory_limit: int | str | None = None,
) -> xr.Dataset:
    """Correlate the losses of tokens, or of sequences, over the draws.

    The Bayesian influence function of Kreer et al. (2025), "Bayesian influence functions for
    Hessian-free data attribution", arXiv:2509.26544: the covariance of two losses under the
    sampled posterior, here as Pearson correlation unless ``compute_covariance``.

    Parameters
    ----------
    samples : xr.DataTree or path
        A store of :func:`basinscope.sample` or of devinterp 2.x.
    correlation_method : {"token", "sequence"}
        Between single tokens, or between sequences (losses averaged over tokens first).
    reduce_chain_dimension_method : {"stack", "mean"}
        Count every draw of every chain, or average the chains draw by draw.
    loss_keys : "all" or sequence of str
        Observables, joined along their sequences; "all" takes them sorted.
    batch_index_range_1, batch_index_range_2 : "all" or sequence of int
        Sequences on either side, counted over all observables.
    average_tokenwise_bif : bool
        Average influence between tokens over both positions.
    compute_covariance : bool
        Covariance (n - 1) instead of correlation.
    batch_size : int, optional
        Sequences on either side of a block. Default: what ``memory_limit`` allows.
    device : str, optional
        "cuda" runs the products between tokens there, with torch.
    top_k : int, optional
        Keep only the strongest positive and negative partners of each query token.
    queries : "all" or sequence of (int, int)
        For ``top_k``: (batch, target_position) of each query token, positions counted from 1,
        also those of a selection as the whole store has them. "all" asks for every token of
        ``batch_index_range_1``. Partners are looked for in ``batch_index_range_2``.
    output_path : path, optional
        Compute now, and write block by block to a Zarr store, for results larger than memory. The
        same call continues where it was stopped.
    allow_incomplete : bool
        Take what a running or interrupted store records as written.
    memory_limit : int or str, optional
        Bytes, or such as "2GiB". Default: half of the free memory.

    Returns
    -------
    xr.Dataset
        Lazy. ``influences``, float32, with dims ``(batch_1, batch_2, target_position,
        target_position_T)`` between tokens, else ``(batch_1, batch_2)``; ``input_ids (batch,
        position)``. A trace without variance has no correlation: NaN, for itself, and for the
        average over a sequence that holds it. Attribute ``observables`` says how many sequences
        each observable has, in the order in which they are counted.

        With ``top_k``: ``influences``, ``partner_batch`` and ``partner_target_position``, ``(sign,
        query, rank)``, the strongest first; NaN and -1 where a query has fewer partners of that
        sign. A token is no partner of itself.

    Raises
    ------
    ValueError
        If an argument is wrong, the store has fewer than two samples, or a selection lacks ids of
        tokens.
    PlanError
        If the memory does not suffice; says what would.
    StoreMismatchError
        If ``output_path`` holds a result of other settings; names each that differs.
    ResultLockedError
        If another process is computing the result at ``output_path``.

    Warns
    -----
    UserWarning
        If chains are left out; names them.
    """
    options = BifOptions(
        correlation_method, reduce_chain_dimension_method, loss_keys,
        batch_index_range_1, batch_index_range_2, average_tokenwise_bif, compute_covariance,
        batch_size, device, top_k, queries,
    )  # fmt: skip
    limit = parse_memory_limit(memory_limit)
    opened = open_samples(samples, allow_incomplete)
    problem = Problem(opened, options)
    if options.kind == "token" and batch_size is None and output_path is not None:
        begun = begun_chunks(output_path, "influences")
        batch_size = max(begun[:2]) if begun else None
    plan, blocks = plan_influence(problem.size, limit, batch_size)
    plan.validate(limit)
    if blocks.copied:
        problem.traces.copy()
    variables, coords = _COMPUTE[options.kind](problem, blocks)
    variables["input_ids"] = _input_ids(problem)
    counts = {
        key: part.shape[2] for key, part in zip(problem.keys, problem.traces.layouts, strict=True)
    }
    result = xr.Dataset(variables, coords, {**opened.provenance, "observables": counts})
    if output_path is None:
        return result
    settings = {
        "bif": options.settings(),
        "source": opened.identity([f"loss_{key}" for key in problem.keys]),
    }
    written = write_result(xr.DataTree(result), output_path, settings).to_dataset()
    return written.assign_attrs(observables=counts)  # which earlier versions did not store


def plan_bif(
    samples: xr.DataTree | str | os.PathLike[str],
    *,
    allow_incomplete: bool = False,
    memory_limit: int | str | None = None,
    **options: Any,
) -> Plan:
    """Plan :func:`compute_bif` with the same arguments; reads metadata only."""
    asked = BifOptions(**{name: v for name, v in options.items() if name != "output_path"})
    problem = Problem(open_samples(samples, allow_incomplete), asked)
    return plan_influence(problem.size, parse_memory_limit(memory_limit), asked.batch_size)[0]


@dataclass(frozen=True)
class BifOptions:
    """What influence is asked for; see :func:`compute_bif`."""

    correlation_method: str = "token"
    reduce_chain_dimension_method: str = "stack"
    loss_keys: Literal["all"] | Sequence[str] = "all"
    batch_index_range_1: Literal["all"] | Sequence[int] = "all"
    batch_index_range_2: Literal["all"] | Sequence[int] = "all"
    average_tokenwise_bif: bool = False
    compute_covariance: bool = False
    batch_size: int | None = None
    device: str | None = None
    top_k: int | None = None
    queries: Literal["all"] | Sequence[tuple[int, int]] = "all"

    def __post_init__(self) -> None:
        choices = {
            "correlation_method": ("token", "sequence"),
            "reduce_chain_dimension_method": ("stack", "mean"),
        }
        for name, valid in choices.items():
            if getattr(self, name) not in valid:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: choose {' or '.join(map(repr, valid))}"
                )
        for name in ("top_k", "batch_size"):
            value = getattr(self, name)
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1
            ):
                raise ValueError(f"{name}={value!r}: give an integer of 1 or more, or None")
            object.__setattr__(self, name, None if value is None else int(value))
        if not _is_all(self.loss_keys) and not len(self.loss_keys):
            raise ValueError("loss_keys=[]: give 'all' or one observable at least")
        if self.top_k is not None and (
            self.correlation_method != "token" or self.average_tokenwise_bif
        ):
            raise ValueError(
                "top_k looks for partners of single tokens: leave correlation_method at 'token' "
                "and average_tokenwise_bif at False"
            )
        if self.top_k is None and not _is_all(self.queries):
            raise ValueError("queries are answered by their strongest partners: give top_k too")
        check_device(self.device)

    @property
    def kind(self) -> str:
        """``token``, ``average``, ``sequence`` or ``top_k``."""
        if self.top_k is not None:
            return "top_k"
        if self.correlation_method == "sequence":
            return "sequence"
        return "average" if self.average_tokenwise_bif else "token"

    def settings(self) -> dict[str, Any]:
        """What decides the numbers of a result, so that another one is not continued."""
        fields = asdict(self)
        fields.pop("device")
        for name in ("batch_index_range_1", "batch_index_range_2", "queries"):
            if not _is_all(fields[name]):
                fields[name] = digest(_as_array(fields[name]))
        if not isinstance(self.loss_keys, str):
            fields["loss_keys"] = list(self.loss_keys)
        return fields


class Problem:
    """An influence problem on one store: which traces, and how many."""

    def __init__(self, samples: Samples, options: BifOptions) -> None:
        self.samples, self.options = samples, options
        self.keys = choose_observables(samples, options.loss_keys)
        if not self.keys:
            raise ValueError(f"{samples.name} holds no observable, so nothing to correlate")
        mean = options.reduce_chain_dimension_method == "mean"
        self.traces = Traces(samples, self.keys, mean)
        if self.traces.samples < 2:
            raise ValueError(
                f"{samples.name} has {self.traces.samples} sample of each loss "
                f"({'draws' if mean else 'chains x draws'}): influence needs two or more"
            )
        count = self.traces.sequences
        self.rows_1 = _rows(options.batch_index_range_1, count, "batch_index_range_1")
        self.rows_2 = _rows(options.batch_index_range_2, count, "batch_index_range_2")
        if options.top_k is not None:  # a candidate that is given twice is one partner
            self.rows_2 = np.unique(self.rows_2)
        self.positions = numbers_along(samples.dataset, dims.TOKEN_POS)
        self.queries = _query_tokens(options.queries, self.rows_1, count, self.positions)
        self.size = Influence(
            self.traces.layouts, self.rows_1, self.rows_2, self.traces.samples, options.kind,
            self.queries[0], options.top_k or 0, mean,
        )  # fmt: skip

    @property
    def draws(self) -> list[int]:
        """Draws of each chain, as they are stacked."""
        return [part.shape[1] for part in self.traces.losses[0]]


def _between_tokens(problem: Problem, blocks: Blocks) -> Contents:
    options, tokens = problem.options, problem.traces.tokens
    cuts_1 = cuts(len(problem.rows_1), blocks.output)
    cuts_2 = cuts(len(problem.rows_2), blocks.output)
    if blocks.held:
        held_1 = _held_traces(problem, problem.rows_1, blocks.traces)
        held_2 = (
            held_1 if problem.size.same else _held_traces(problem, problem.rows_2, blocks.traces)
        )

    def block(at_1: slice, at_2: slice) -> da.Array:
        shape = (at_1.stop - at_1.start, at_2.stop - at_2.start, tokens, tokens)
        if blocks.held:
            value = delayed(_held_block)(
                _overlapping(held_1, at_1), _overlapping(held_2, at_2), options.device
            )
        else:
            value = delayed(_read_block)(
                problem.traces.block(problem.rows_1[at_1]),
                problem.traces.block(problem.rows_2[at_2]),
                options.compute_covariance, options.device,
            )  # fmt: skip
        return da.from_delayed(value, shape, np.float32)

    influences = da.concatenate(
        [da.concatenate([block(at_1, at_2) for at_2 in cuts_2], axis=1) for at_1 in cuts_1], axis=0
    )
    positions = {name: problem.positions for name in ("target_position", "target_position_T")}
    return _labelled(problem, without_copy(influences), positions)


def _held_traces(problem: Problem, rows: np.ndarray, block: int) -> list[tuple[slice, Delayed]]:
    covariance = problem.options.compute_covariance
    return [
        (at, delayed(_standardised)(covariance, *problem.traces.block(rows[at])))
        for at in cuts(len(rows), block)
    ]


def _overlapping(held: list[tuple[slice, Delayed]], at: slice) -> list[tuple[slice, Delayed]]:
    """Find the blocks of traces that a block of influences needs, and what it takes of each."""
    return [
        (slice(max(at.start, own.start) - own.start, min(at.stop, own.stop) - own.start), traces)
        for own, traces in held
        if own.start < at.stop and own.stop > at.start
    ]


def _standardised(covariance: bool, *block: Any) -> np.ndarray:
    return standardise(gather_traces(*block), covariance).astype(np.float32, copy=False)


def _held_block(
    left: list[tuple[slice, np.ndarray]],
    right: list[tuple[slice, np.ndarray]],
    device: str | None,
) -> np.ndarray:
    rows_1, rows_2 = ([traces[at] for at, traces in side] for side in (left, right))
    return multiply_traces(rows_1, rows_2, device)


def _read_block(
    block_1: tuple[Any, ...], block_2: tuple[Any, ...], covariance: bool, device: str | None
) -> np.ndarray:
    left, right = (_standardised(covariance, *block) for block in (block_1, block_2))
    return multiply_traces([left], [right], device)


def multiply_traces(
    left: list[np.ndarray], right: list[np.ndarray], device: str | None = None
) -> np.ndarray:
    """Multiply standardised traces, each side in parts that follow one another.

    Parameters
    ----------
    left, right : list of np.ndarray (sequences, token_pos, samples)

    Returns
    -------
    np.ndarray (left sequences, right sequences, token_pos, token_pos)
        A view: products lie as (sequence, token, sequence, token), as they are made.
    """
    tokens = left[0].shape[1]
    rows_1, rows_2 = ([part.reshape(-1, part.shape[2]) for part in side] for side in (left, right))
    result = np.empty((sum(map(len, rows_1)), sum(map(len, rows_2))), np.float32)
    top = 0
    for a in rows_1:
        start = 0
        for b in rows_2:
            product(a, b, device, out=result[top : top + len(a), start : start + len(b)])
            start += len(b)
        top += len(a)
    first, second = (length // tokens for length in result.shape)
    return result.reshape(first, tokens, second, tokens).transpose(0, 2, 1, 3)


def _averaged(problem: Problem, blocks: Blocks) -> Contents:
    """Average over token pairs: the mean of z_s . z_t is (mean of z_s) . (mean of z_t)."""
    return _between_rows(problem, blocks, _token_means, clip=False)


def _token_means(covariance: bool, *block: Any) -> np.ndarray:
    return gather_token_means(*block, covariance=covariance)


def _between_sequences(problem: Problem, blocks: Blocks) -> Contents:
    correlation = not problem.options.compute_covariance
    return _between_rows(problem, blocks, _sequence_traces, clip=correlation)


def _sequence_traces(covariance: bool, *block: Any) -> np.ndarray:
    return standardise(gather_sequence_traces(*block), covariance)


def _between_rows(
    problem: Problem, blocks: Blocks, reduce: Callable[..., np.ndarray], clip: bool
) -> Contents:
    """Multiply one trace for each sequence with one for each sequence, in float64."""
    covariance = problem.options.compute_covariance

    def traces_of(rows: np.ndarray) -> list[Delayed]:
        return [
            delayed(reduce)(covariance, *problem.traces.block(rows[at]))
            for at in cuts(len(rows), blocks.output)
        ]

    left = traces_of(problem.rows_1)
    right = None if problem.size.same else traces_of(problem.rows_2)
    width = len(problem.rows_2)
    panels = cuts(len(problem.rows_1), max(1, ROW_BLOCK_BYTES // (4 * width)))
    products = [
        da.from_delayed(
            delayed(_row_products)(left, right, at, clip), (at.stop - at.start, width), np.float32
        )
        for at in panels
    ]
    influences = products[0] if len(products) == 1 else da.concatenate(products)
    return _labelled(problem, influences)


def _row_products(
    left: list[np.ndarray], right: list[np.ndarray] | None, rows: slice, clip: bool
) -> np.ndarray:
    """Multiply some rows of the left with all of the right, or of the left again."""
    joined = np.concatenate(left)
    whole = joined if right is None else np.concatenate(right)
    products = product(joined[rows], whole).astype(np.float32)
    return np.clip(products, -1, 1, out=products) if clip else products


TRACES: dict[str, Callable[..., np.ndarray]] = {
    "token": _standardised,
    "average": _token_means,
    "sequence": _sequence_traces,
}
"""(covariance, block of traces) -> standardised traces (sequences, [token_pos,] samples)"""


def _strongest_partners(problem: Problem, blocks: Blocks) -> Contents:
    """Search block after block of candidates, for as many queries at a time as can be held."""
    options, (sequences, tokens) = problem.options, problem.queries
    assert options.top_k is not None
    k = options.top_k
    found: list[Any] = []  # of Delayed
    for at in cuts(len(sequences), blocks.queries):
        asked = queries_of(problem, sequences[at], tokens[at], blocks.output, found[-1:])
        parts = [
            delayed(best_partners)(
                asked, (sequences[at], tokens[at]), problem.rows_2[block], k,
                options.compute_covariance, options.device,
                *problem.traces.block(problem.rows_2[block]),
            )
            for block in cuts(len(problem.rows_2), blocks.output)
        ]  # fmt: skip
        while len(parts) > MERGED_AT_ONCE:
            parts = [
                delayed(merge_partners)(parts[i : i + MERGED_AT_ONCE], k, padded=False)
                for i in range(0, len(parts), MERGED_AT_ONCE)
            ]
        merged = delayed(merge_partners)(parts, k, padded=True)
        found.append(delayed(_at_positions)(merged, problem.positions))
    sizes = [at.stop - at.start for at in cuts(len(sequences), blocks.queries)]
    fields = [
        da.concatenate(
            [
                da.from_delayed(part[field], (len(SIGNS), n, k), dtype)
                for part, n in zip(found, sizes, strict=True)
            ],
            axis=1,
        )
        for field, dtype in enumerate((np.float32, np.int64, np.int64))
    ]
    meanings = {
        "influences": _influence_attrs(options),
        "partner_batch": {"long_name": "sequence of the partner", "units": "1"},
        "partner_target_position": {"long_name": "position of the partner, from 1", "units": "1"},
    }
    variables = {
        name: xr.Variable(("sign", "query", "rank"), field, attrs)
        for (name, attrs), field in zip(meanings.items(), fields, strict=True)
    }
    return variables, {
        "sign": list(SIGNS),
        "rank": np.arange(1, k + 1),
        "query_batch": ("query", sequences),
        "query_target_position": ("query", problem.positions[tokens]),
    }


def _at_positions(partners: Partners, positions: np.ndarray) -> Partners:
    """Name tokens, until here counted from 1, by their positions in the store."""
    tokens = partners.tokens
    return partners._replace(tokens=np.where(tokens < 0, -1, positions[tokens.clip(1) - 1]))


def queries_of(
    problem: Problem, sequences: np.ndarray, tokens: np.ndarray, block: int, after: list[Delayed]
) -> Delayed:
    """Gather the traces of queries, reading each sequence once; wait for what is before."""
    wanted = np.unique(sequences)
    parts, order = [], []
    for at in cuts(len(wanted), block):
        rows = wanted[at]
        mine = np.flatnonzero(np.isin(sequences, rows))
        places = np.searchsorted(rows, sequences[mine]), tokens[mine]
        parts.append(
            delayed(query_traces)(
                places, problem.options.compute_covariance, *problem.traces.block(rows)
            )
        )
        order.append(mine)
    return delayed(_in_order)(parts, order, after)


def _in_order(parts: list[np.ndarray], order: list[np.ndarray], _: list[Partners]) -> np.ndarray:
    placed = np.empty((sum(map(len, parts)), parts[0].shape[1]), np.float32)
    for traces, mine in zip(parts, order, strict=True):
        placed[mine] = traces
    return placed


_COMPUTE: dict[str, Callable[[Problem, Blocks], Contents]] = {
    "token": _between_tokens,
    "average": _averaged,
    "sequence": _between_sequences,
    "top_k": _strongest_partners,
}


def _labelled(
    problem: Problem, influences: da.Array, positions: dict[str, np.ndarray] | None = None
) -> Contents:
    coords = {"batch_1": problem.rows_1, "batch_2": problem.rows_2, **(positions or {})}
    influence = xr.Variable(tuple(coords), influences, _influence_attrs(problem.options))
    return {"influences": influence}, coords


def _influence_attrs(options: BifOptions) -> dict[str, str]:
    if options.compute_covariance:
        return {"long_name": "covariance of losses over the draws", "units": "nats2"}
    return {"long_name": "correlation of losses over the draws", "units": "1"}


def _input_ids(problem: Problem) -> xr.Variable:
    dataset = problem.samples.dataset
    variables = [dataset.variables[f"input_ids_{key}"] for key in problem.keys]
    known, wanted = numbers_along(dataset, str(variables[0].dims[1])), problem.positions
    if not np.array_equal(known, np.arange(len(known))) or (wanted >= len(known)).any():
        raise ValueError(
            f"{problem.samples.name} has losses at positions {in_words(wanted)} and token ids at "
            f"{in_words(known)}, and ids are found by their position: select along token_pos only, "
            "and keep all of token"
        )
    ids = [unread(variable) for variable in variables]
    if len(ids) > 1:
        held = all(isinstance(values, np.ndarray) for values in ids)
        ids = [np.concatenate(ids) if held else da.concatenate(ids)]
    attrs = {"long_name": "token ids of the sequences", "units": "1"}
    return xr.Variable(("batch", "position"), ids[0], attrs)


def _rows(wanted: Literal["all"] | Sequence[int], count: int, name: str) -> np.ndarray:
    """Check a selection of sequences."""
    if _is_all(wanted):
        return np.arange(count)
    rows = _as_array(wanted)
    if rows.ndim != 1 or not len(rows) or rows.dtype.kind not in "iu":
        raise ValueError(f"{name}={wanted!r}: give 'all' or a list of sequence numbers")
    if rows.min() < 0 or rows.max() >= count:
        raise ValueError(
            f"{name} asks for sequence {rows.min() if rows.min() < 0 else rows.max()}, and there "
            f"are {count} (0 to {count - 1})"
        )
    return rows.astype(np.int64)


def _query_tokens(
    wanted: Literal["all"] | Sequence[tuple[int, int]],
    rows: np.ndarray,
    count: int,
    positions: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Give sequence and token (from 0) of each query."""
    tokens = len(positions)
    if _is_all(wanted):
        return np.repeat(rows, tokens), np.tile(np.arange(tokens), len(rows))
    pairs = _as_array(wanted)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or not len(pairs) or pairs.dtype.kind not in "iu":
        raise ValueError("queries: give 'all' or a list of (batch, target_position) pairs")
    sequences, asked = pairs.T.astype(np.int64)
    places = {position: place for place, position in enumerate(positions.tolist())}
    found = np.array([places.get(position, -1) for position in asked.tolist()])
    outside = (sequences < 0) | (sequences >= count) | (found < 0)
    if outside.any():
        first = tuple(int(n) for n in pairs[outside][0])
        raise ValueError(
            f"queries ask for (batch, target_position) {first}: there are sequences 0 to "
            f"{count - 1} and positions {in_words(positions)}"
        )
    return sequences, found


def _as_array(wanted: Any) -> np.ndarray:
    try:
        return np.asarray(wanted)
    except ValueError:  # of lists of different lengths
        return np.empty(0, object)


def _is_all(wanted: Any) -> bool:
    return isinstance(wanted, str) and wanted == "all"


def cuts(length: int, block: int) -> list[slice]:
    return [slice(i, min(i + block, length)) for i in range(0, length, block)]
