"""Sampling under a restriction to a model's last layer, against devinterp 2.0.1.

    python -m benchmarks.restrictions [--rounds 5]

The model of `benchmarks.sampling` with 27M parameters (6 layers); only the last layer moves. A draw
costs one step, whose 8 batches come round, and three batches of an observable. Ours runs the lower
layers once per sequence; the peer runs all layers for every draw. Everything else of a call
(copying the model, the initial loss of one batch, the store) is inside, in both; it counts the less
the more draws there are. Both get the masks that they make themselves.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import paired, parser, record
from benchmarks.sampling import SIZES, inputs

LAYERS = {"toy": 1, "27M": 6}


def main() -> None:
    options = parser(__doc__, "restrictions.jsonl")
    options.add_argument("--draws", type=int, default=60)
    asked = options.parse_args()
    size = "toy" if asked.toy else "27M"
    draws = 2 if asked.toy else asked.draws
    figures = paired(
        partial(run, "basinscope", size, draws),
        partial(run, "devinterp", size, draws),
        asked.rounds,
    )
    settings = {"size": size, "restriction": f"l{LAYERS[size] - 1}", "chains": 1, "draws": draws}
    record(asked.out, "restrictions", {**settings, "threads": torch.get_num_threads()}, figures)


def run(who: str, size: str, draws: int) -> None:
    """Make one whole call into a fresh store."""
    model, dataset, observables = inputs(size)
    dataset = dataset.select(range(8 * SIZES[size]["batch"]))
    data, count = observables["first"]
    settings: dict[str, Any] = {
        "lr": 1e-4, "n_beta": 10.0, "localization": 100.0, "num_chains": 1, "num_draws": draws,
        "batch_size": SIZES[size]["batch"], "num_init_loss_batches": 1, "device": "cpu",
    }  # fmt: skip
    restriction = f"l{LAYERS[size] - 1}"
    directory = Path(tempfile.mkdtemp(prefix="benchmark-restrictions-"))
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            if who == "basinscope":
                import basinscope

                masks = basinscope.create_param_masks(model, restriction)
                settings["progress"] = False
                sample = basinscope.sample
            else:
                from devinterp.slt.sampling import sample
                from devinterp.slt.weight_restrictions import create_param_masks

                masks = create_param_masks(model, restriction)
            sample(
                model, dataset, {"first": (data, count)}, param_masks=masks,
                output_path=directory / "samples.zarr", **settings,
            )  # fmt: skip
    finally:
        shutil.rmtree(directory)


if __name__ == "__main__":
    sys.exit(main())
