"""What 16-bit products and 16-bit weights do to an LLC and to influences, against chance.

    python -m benchmarks.precision [--out FILE] [--toy]

A small model is trained on the standard library's text (as the demo trains it) and sampled with
float32 weights and products ("float32"), with autocast to bfloat16 ("autocast"), and with weights
in bfloat16, rounded to nearest and at random. Chains share noise and batches with the float32 run,
so that what differs is the arithmetic. The measure of chance is a second float32 run with other
seeds ("reseeded").

Per variant: its LLC with the chains' own standard error, and the difference from "float32"; the
root mean square error of per-token losses at the checkpoint over the standard deviation that a
token's loss has along a chain; the correlation of its influences between tokens with those of
"float32" (1 is equal; what "reseeded" has is what chance allows) and their rms difference.
Last, how fast free bfloat16 weights diffuse, over how fast they should.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

import basinscope
from basinscope import demo
from basinscope.kernels.sgld import SgldUpdate
from basinscope.sampling.losses import next_token_loss
from benchmarks.harness import parser, record

SEQUENCES = 6  # whose tokens' influences are compared
VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {},
    "reseeded": {"init_seed": 1000},
    "autocast": {"autocast": "bfloat16"},
    "bfloat16 weights, nearest": {"weight_rounding": "nearest"},
    "bfloat16 weights, stochastic": {"weight_rounding": "stochastic"},
}


def main() -> None:
    options = parser(__doc__, "precision.jsonl")
    asked = options.parse_args()
    scale = demo.QUICK if asked.toy else demo.FULL
    draws, burn_in = (6, 2) if asked.toy else (400, 100)
    train, held_out = demo.corpus(demo.standard_library_texts(), scale.row_length)
    model = demo.build_model(scale)
    steps = 2 if asked.toy else scale.train_steps
    scale = demo.Scale(**{**vars(scale), "train_steps": steps})
    rows = np.asarray(demo.balanced(train).with_format("numpy")["input_ids"][:20000])
    demo.train_model(model, rows, scale, lambda loss: None)
    model.eval()

    results, observed = {}, {"code": held_out["code"]}
    with tempfile.TemporaryDirectory(prefix="benchmark-precision-") as directory:
        for name, settings in VARIANTS.items():
            weights = torch.bfloat16 if name.startswith("bfloat16") else torch.float32
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what rounding does is what is measured here
                tree = basinscope.sample(
                    copy.deepcopy(model).to(weights), demo.balanced(train), observed,
                    lr=scale.lr, n_beta=scale.n_beta, localization=scale.localization,
                    num_chains=4, num_draws=draws, num_burnin_steps=burn_in, batch_size=16,
                    num_init_loss_batches=min(burn_in + draws, 100), batches_per_draw=1,
                    output_path=Path(directory) / f"{len(results)}.zarr", progress=False,
                    device="cpu", **settings,
                )  # fmt: skip
            results[name] = measure(tree, burn_in)
        ids = torch.from_numpy(np.asarray(tree["input_ids_code"]).astype(np.int64))
    errors = checkpoint_errors(model, ids, results["float32"]["fluctuation"])
    for name, found in results.items():
        settings = {
            "variant": name,
            "lr": scale.lr,
            "chains": 4,
            "draws": draws,
            "burn_in": burn_in,
        }
        record(
            asked.out, "precision", settings, compared(found, results["float32"], errors.get(name))
        )
    for ratio in (0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 4.0):
        settings = {"variant": "diffusion of bfloat16 weights", "step_over_unit": ratio}
        record(asked.out, "precision", settings, diffusion(ratio, 64 if asked.toy else 256))


def diffusion(ratio: float, steps: int, count: int = 20_000) -> dict[str, float]:
    """Variance of free bfloat16 weights after some steps, over that of exact ones, t lr.

    Weights start at 1.5, where the distance between bfloat16 numbers, the unit, is 2^-7, and
    `ratio` is the standard deviation of a step, sqrt(lr), in units. Standard error: 1%.
    """
    lr = (ratio * 2**-7) ** 2
    found = {}
    for rounding in ("nearest", "stochastic"):
        weight = torch.full((count,), 1.5, dtype=torch.bfloat16)
        update = SgldUpdate([weight], lr=lr, n_beta=1.0, rounding=rounding)
        for step in range(steps):
            update.step([torch.zeros_like(weight)], seed=0, chain=0, step=step)
        variance = float((weight.double() - 1.5).square().mean())
        found[f"{rounding}_variance_ratio"] = round(variance / (steps * lr), 3)
    return found


def measure(tree: Any, burn_in: int) -> dict[str, Any]:
    """Read off what is compared."""
    llc = basinscope.compute_llc(tree, burn_in=burn_in, observables=[]).compute()
    bif = basinscope.compute_bif(
        tree, batch_index_range_1=range(SEQUENCES), batch_index_range_2=range(SEQUENCES)
    )
    influences = bif["influences"].to_numpy()
    return {
        "llc": float(llc.llc_mean),
        "mcse": float(llc.llc_mcse),
        "per_chain": llc.llc_per_chain.to_numpy(),
        "influences": influences,
        "fluctuation": float(tree["loss_code"].std(("chain", "draw")).mean()),
    }


def checkpoint_errors(model: torch.nn.Module, ids: torch.Tensor, scale: float) -> dict[str, float]:
    """Rms error of per-token losses at the checkpoint over a token's fluctuation along a chain."""
    with torch.no_grad():
        exact = next_token_loss(copy.deepcopy(model).double(), ids).double()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = next_token_loss(model, ids)
        half = next_token_loss(copy.deepcopy(model).bfloat16(), ids)
        single = next_token_loss(model, ids)

    def error(losses: torch.Tensor) -> float:
        return float((losses.double() - exact).square().mean().sqrt()) / scale

    weights = {name: error(half) for name in VARIANTS if name.startswith("bfloat16")}
    return {"float32": error(single), "autocast": error(cast), **weights}


def compared(
    found: dict[str, Any], plain: dict[str, Any], checkpoint_error: float | None
) -> dict[str, Any]:
    """Compare one variant with plain float32."""
    change = found["per_chain"] - plain["per_chain"]
    ours, theirs = found["influences"].ravel(), plain["influences"].ravel()
    good = np.isfinite(ours) & np.isfinite(theirs)
    frozen = good.sum() < 2
    figures = {
        "llc": round(found["llc"], 3),
        "llc_mcse": round(found["mcse"], 3),
        "llc_change": round(float(change.mean()), 3),
        "llc_change_sd_over_chains": round(float(change.std(ddof=1)), 3),
        "influence_correlation": None
        if frozen
        else round(float(np.corrcoef(ours[good], theirs[good])[0, 1]), 4),
        "influence_rms_difference": None
        if frozen
        else round(float(np.sqrt(np.mean((ours[good] - theirs[good]) ** 2))), 4),
        "influences_defined": round(float(good.mean()), 4),
    }
    if checkpoint_error is not None:
        figures["checkpoint_error_over_fluctuation"] = float(f"{checkpoint_error:.2g}")
    return figures


if __name__ == "__main__":
    sys.exit(main())
