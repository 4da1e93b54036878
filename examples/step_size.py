"""How an LLC depends on the step size, for choosing ``lr``.

    basinscope demo
    python examples/step_size.py [--out basinscope-demo]

Samples around the demo's model with step sizes a factor of three apart, everything else being
equal. A step that is too short never arrives where the chain would settle: the loss still rises in
the second half of the steps (drift). One that is too long leaves the basin: the LLC jumps, or the
chain fails. In between lies a range in which the LLC does not depend on the step; take its middle.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import xarray as xr
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

import basinscope
from basinscope.demo import FULL, balanced, corpus, standard_library_texts
from basinscope.report.tables import llc_drift

STEP_SIZES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
STEPS, BURN_IN = 300, 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("basinscope-demo"))
    out = parser.parse_args().out
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    train, _ = corpus(standard_library_texts(), FULL.row_length)

    table = Table("lr", "steps to settle", "LLC", "drift", "R-hat", title="nβ = 300, γ = 1000")
    for lr in STEP_SIZES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # failed chains are in the table
            tree = basinscope.sample(
                model, balanced(train), {}, lr=lr, n_beta=FULL.n_beta,
                localization=FULL.localization, num_chains=2, num_draws=STEPS,
                num_init_loss_batches=STEPS, batch_size=FULL.batch_size,
                output_path=out / f"lr_{lr:g}.zarr",
            )  # fmt: skip
        table.add_row(f"{lr:g}", f"{2 / (lr * FULL.localization):.0f}", *estimates(tree))
    Console().print(table)


def estimates(tree: xr.DataTree) -> tuple[str, str, str]:
    """LLC with its error, how much it still rises, and R-hat, after the burn-in."""
    try:
        llc = basinscope.compute_llc(tree, burn_in=BURN_IN).compute()
    except ValueError:  # every chain failed
        return "all chains failed", "", ""
    drift, drift_error = llc_drift(llc)
    return (
        f"{float(llc.llc_mean):.1f} ± {float(llc.llc_mcse):.1f}",
        f"{drift:+.1f} ± {drift_error:.1f}",
        f"{float(llc.rhat):.3f}",
    )


if __name__ == "__main__":
    main()
