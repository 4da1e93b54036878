"""How the LLC of a model grows while it is trained.

    python examples/llc_along_training.py [--out basinscope-training]

Trains the demo's model again and samples around checkpoints on the way, all with the same settings:
the same batches and the same noise, so that what two checkpoints differ by is known better than
either LLC. Prints a table with the change from each checkpoint to the next, and draws
``llc.png``. The same command continues a stopped run. In a shell, ``basinscope compare
basinscope-training/step_*.zarr --burn-in 50`` shows the stores again.
"""

from __future__ import annotations

import argparse
import copy
from itertools import count
from pathlib import Path

import numpy as np
from datasets import Dataset
from rich.console import Console
from torch import nn

import basinscope
from basinscope.demo import FULL, balanced, build_model, corpus, standard_library_texts, train_model
from basinscope.report.comparison import comparison_figure, comparison_notes, comparison_table

CHECKPOINTS = (50, 100, 200, 350, 550, 800, 1100)
STEPS, BURN_IN = 150, 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("basinscope-training"))
    out = parser.parse_args().out
    data = balanced(corpus(standard_library_texts(), FULL.row_length)[0])
    runs = {
        step: basinscope.sample(
            model, data, {}, lr=1e-4, n_beta=FULL.n_beta, localization=FULL.localization,
            num_chains=4, num_draws=STEPS, num_init_loss_batches=STEPS,
            batch_size=FULL.batch_size, output_path=out / f"step_{step}.zarr",
        )
        for step, model in checkpoints(data).items()
    }  # fmt: skip
    found = basinscope.compare_llc(runs, burn_in=BURN_IN).compute()
    console = Console()
    console.print(comparison_table(found))
    for note in comparison_notes(found):
        console.print(note, highlight=False)
    comparison_figure(found).savefig(out / "llc.png", dpi=144)


def checkpoints(data: Dataset) -> dict[int, nn.Module]:
    """Train a model, and copy it on the way."""
    model, found = build_model(FULL), {}
    steps = count(1)

    def keep(loss: float) -> None:
        if (step := next(steps)) in CHECKPOINTS:
            found[step] = copy.deepcopy(model)

    rows = np.asarray(data.with_format("numpy")[:]["input_ids"])
    train_model(model, rows, FULL, keep)
    return found


if __name__ == "__main__":
    main()
