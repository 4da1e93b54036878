"""Extracting activations: what hooks cost, rows of several lengths, what a stream holds.

    python -m benchmarks.extraction [--rounds 15]

Hooks: the residual stream after every layer, all positions, against a bare forward pass of the same
batch, without gradients: through all of the model ("forward"), and of its layers alone, without
the head ("layers"), which is all that an extraction without logits runs.

Lengths: paragraphs of the running Python's docstrings, a token for each word and mark, cut at the
model's longest sequence; the residual stream at the last token after every layer, to a store. Whole
calls of `extract_dataset` against such calls with batches of one ("batches of one"), and against a
loop of `extract` over the rows that stores nothing ("extract row by row"); "rows_per_pass" is of
ours.

Memory: the residual stream of a data set, all positions, 2 GB of it, streamed to a store by a
process of its own; "growth_mib" is its peak beyond what it held with the model loaded, before any
forward pass.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zlib
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.harness import own_peak_memory, paired, parser, record
from benchmarks.sampling import SIZES, inputs

if TYPE_CHECKING:
    from datasets import Dataset

    from basinscope.models.extraction import ExtractionConfig

MIB = 2**20
TEXTS = {"toy": 12, "1M": 2000, "27M": 400}


def main() -> None:
    options = parser(__doc__, "extraction.jsonl")
    options.add_argument("--stream", choices=list(SIZES), help=argparse_help())
    options.add_argument("--gigabytes", type=float, default=2.0)
    options.set_defaults(rounds=15)
    asked = options.parse_args()
    if asked.stream:
        print(stream(asked.stream, asked.gigabytes))
        return
    threads = {"threads": torch.get_num_threads()}
    for size in ["toy"] if asked.toy else ["1M", "27M"]:
        for against in ("forward", "layers"):
            settings = {"size": size, "against": against, **threads}
            record(asked.out, "extraction hooks", settings, hooks(size, against, asked.rounds))
        for against in ("batches of one", "extract row by row"):
            settings = {"size": size, "against": against, **threads}
            rounds = min(asked.rounds, 7)  # they last longer
            record(asked.out, "extraction lengths", settings, lengths(size, against, rounds))
    size, gigabytes = ("toy", 0.0001) if asked.toy else ("27M", asked.gigabytes)
    command = [sys.executable, "-m", "benchmarks.extraction"]
    command += ["--stream", size, "--gigabytes", str(gigabytes)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    growth = int(done.stdout.splitlines()[-1]) / MIB
    settings = {"size": size, "gigabytes": gigabytes, **threads}
    record(asked.out, "extraction memory", settings, {"growth_mib": round(growth)})


def argparse_help() -> str:
    return "stream a data set of this model and print the growth in bytes (for its own process)"


def hooks(size: str, against: str, rounds: int) -> dict[str, Any]:
    """Pair an extraction with a bare pass; "cost" is our seconds over the pass's, less one."""
    from basinscope.models.extraction import ExtractionConfig, Extractor

    model, dataset, _ = inputs(size)
    model.eval()
    ids = torch.as_tensor(dataset[: SIZES[size]["batch"]]["input_ids"])
    extractor = Extractor(model, ExtractionConfig(resid_out=True, input_ids=False))
    bare = partial(forward, model if against == "forward" else model.base_model, ids)
    passes = max(1, int(0.1 / seconds(bare)))  # short ones are timed several at a time
    figures = paired(
        lambda: [extractor(ids) for _ in range(passes)],
        lambda: [bare() for _ in range(passes)],
        rounds,
    )
    return {"cost": round(1 / figures["ratio"] - 1, 3), "passes": passes, **figures}


@torch.no_grad()
def forward(module: Any, ids: torch.Tensor) -> Any:
    return module(ids, use_cache=False)


def seconds(work: Any) -> float:
    import time

    work()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def lengths(size: str, against: str, rounds: int) -> dict[str, Any]:
    """Pair whole calls on texts of several lengths with others that run row by row."""
    from basinscope.models.extraction import ExtractionConfig, extract

    model, texts = inputs(size)[0].eval(), some_texts(size)
    config = ExtractionConfig(resid_out=True, target_token_positions="last")
    store = partial(to_store, model, texts, config, save_unembedding=False)
    ours, peer = partial(store, batch_size=SIZES[size]["batch"]), partial(store, batch_size=1)
    if against == "extract row by row":
        peer = partial(one_by_one, partial(extract, model, config=config), texts)
    tokens = sum(map(len, texts["input_ids"]))
    figures = paired(ours, peer, rounds)
    return {
        "texts": len(texts),
        "mean_length": round(tokens / len(texts), 1),
        "rows_per_pass": round(len(texts) / count_passes(model, config, ours), 2),
        "ours_tokens_per_s": round(tokens / figures["ours_s"]),
        "peer_tokens_per_s": round(tokens / figures["peer_s"]),
        **figures,
    }


@cache
def some_texts(size: str) -> Dataset:
    """Give paragraphs of docstrings, spread evenly over the standard library, as token ids."""
    from datasets import Dataset

    from basinscope.demo import standard_library_texts

    prose = standard_library_texts()["prose"]
    paragraphs = [part for text in prose for part in text.split("\n\n") if part.strip()]
    chosen = paragraphs[:: len(paragraphs) // TEXTS[size]][: TEXTS[size]]
    vocabulary, longest = SIZES[size]["vocab"], 2 * SIZES[size]["tokens"]
    pieces = [re.findall(r"\w+|[^\w\s]", text)[:longest] for text in chosen]
    ids = [[zlib.crc32(piece.encode()) % vocabulary for piece in text] for text in pieces]
    return Dataset.from_dict({"input_ids": ids})


def to_store(model: Any, data: Dataset, config: ExtractionConfig, **options: Any) -> None:
    from basinscope.extraction import extract_dataset

    with tempfile.TemporaryDirectory(prefix="benchmark-extraction-") as directory:
        output = Path(directory) / "activations.zarr"
        extract_dataset(model, data, config, output=output, progress=False, **options)


def one_by_one(extract: Any, texts: Dataset) -> list[Any]:
    return [extract(torch.tensor([ids])) for ids in texts["input_ids"]]


def count_passes(model: Any, config: ExtractionConfig, work: Any) -> int:
    """How often work runs the model, beside the runs that find where to read."""
    from basinscope.models.extraction import Extractor

    seen: list[int] = []
    listening = model.get_input_embeddings().register_forward_hook(lambda *_: seen.append(1))
    try:
        Extractor(model, config)
        looking = len(seen)
        work()
    finally:
        listening.remove()
    return len(seen) - 2 * looking


def stream(size: str, gigabytes: float) -> int:
    """Stream so many activations; give the growth of this process in bytes."""
    import psutil
    from datasets import Dataset

    from basinscope.models.extraction import ExtractionConfig

    model, dataset, _ = inputs(size)
    ids = torch.as_tensor(dataset[:]["input_ids"])
    per_example = ids.shape[1] * model.config.hidden_size * model.config.num_hidden_layers * 4
    count = max(2, round(gigabytes * 1e9 / per_example))
    data = Dataset.from_dict({"input_ids": ids[torch.arange(count) % len(ids)].numpy()})
    del ids
    before = psutil.Process().memory_info().rss
    to_store(model, data, ExtractionConfig(resid_out=True), batch_size=SIZES[size]["batch"])
    return own_peak_memory() - before


if __name__ == "__main__":
    sys.exit(main())
