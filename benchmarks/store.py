"""Bytes of a store against devinterp 2.0.1's, on real losses of a trained model.

    python -m benchmarks.store

A byte-level GPT-NeoX is trained on Python's own sources, then sampled by both with the same
settings. Loss arrays are compared with loss arrays, and everything that says which tokens were seen
(ids, row numbers) with everything that says so there. The share of time that sampling waited for
the disk (`stall`) is read from our store.
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from basinscope import demo
from benchmarks.harness import parser, record

FULL = {"hidden_size": 64, "num_layers": 2, "row_length": 129, "train_steps": 300}
TOY = {"hidden_size": 32, "num_layers": 1, "row_length": 65, "train_steps": 150}


def main() -> None:
    options = parser(__doc__, "store.jsonl")
    asked = options.parse_args()
    figures = measure(TOY if asked.toy else FULL)
    record(asked.out, "store", {"size": "toy" if asked.toy else "full"}, figures)


def measure(size: dict[str, int]) -> dict[str, Any]:
    """Sample with both into a temporary directory and compare bytes on disk."""
    from devinterp.slt.sampling import sample as peer_sample

    import basinscope

    scale = replace(demo.QUICK, **size)
    train, held_out = demo.corpus(demo.standard_library_texts(), scale.row_length)
    rows = demo.balanced(train).with_format("torch")
    model = demo.build_model(scale)
    demo.train_model(model, np.asarray(rows.with_format("numpy")[:]["input_ids"]), scale)
    settings: dict[str, Any] = {
        "lr": 3e-4,
        "n_beta": 300.0,
        "localization": 1000.0,
        "num_chains": 2,
        "num_draws": 100,
        "batch_size": 16,
        "batches_per_draw": 4,
        "num_init_loss_batches": 8,
        "device": "cpu",
    }
    observables = {name: part.with_format("torch") for name, part in held_out.items()}
    with (
        tempfile.TemporaryDirectory() as folder,
        warnings.catch_warnings(),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        ours, peer = Path(folder) / "ours.zarr", Path(folder) / "peer.zarr"
        tree = basinscope.sample(
            model, rows, observables, **settings, output_path=ours, progress=False
        )
        peer_sample(model, rows, observables, **settings, output_path=peer)
        seconds = tree.attrs["seconds"]
        busy = sum(spent for phase, spent in seconds.items() if "background" not in phase)
        return {
            "losses_ratio": round(_bytes(ours, "loss") / _bytes(peer, "loss"), 4),
            "losses_to_raw": round(_bytes(ours, "loss") / _raw(tree, "loss"), 4),
            "ids_ratio": round(
                (_bytes(ours, "ids") + _bytes(ours, "rows")) / _bytes(peer, "ids"), 4
            ),
            "stall_share": round(seconds["stall"] / busy, 5),
        }


def _bytes(store: Path, word: str) -> int:
    """Bytes of the chunk files of all arrays with ``word`` in their name."""
    arrays = [array for array in store.iterdir() if array.is_dir() and word in array.name]
    files = [file for array in arrays for file in (array / "c").rglob("*")]
    return sum(file.stat().st_size for file in files if file.is_file())


def _raw(tree: Any, word: str) -> int:
    return sum(array.nbytes for name, array in tree.data_vars.items() if word in str(name))


if __name__ == "__main__":
    sys.exit(main())
