"""The standard error of an LLC, against LLCs of other seeds."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import basinscope
from basinscope.sampling.job import next_token_loss
from tests.models_small import VOCABULARY


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("init_batches", [4, 150])
def test_the_error_of_a_trained_model_is_that_of_repeated_runs(
    init_batches: int, shared: bool, tmp_path: Path
) -> None:
    """Chains lose most of what it knew. 24 runs give their spread to 15%, of which bounds are 3."""
    model, rows = trained_model(600)
    names = {"llc_mean": "llc_mcse", "llc_seen": "llc_seen_mcse"}
    found: dict[str, list[float]] = {name: [] for pair in names.items() for name in pair}
    for run_number in range(24):
        llc = basinscope.llc(
            model, rows, {"seen": rows}, lr=1e-3, n_beta=100.0, localization=50.0, num_chains=4,
            num_draws=150, batch_size=8, num_init_loss_batches=init_batches,
            init_seed=1000 * run_number,
            match_sampling_input_ids_across_chains=shared, device="cpu", progress=False,
            output_path=tmp_path / f"{run_number}.zarr",
        )  # fmt: skip
        for name, values in found.items():
            values.append(float(llc[name]))
    for estimate, error in names.items():
        ratio = np.sqrt(np.mean(np.square(found[error]))) / np.std(found[estimate], ddof=1)
        assert 0.62 < ratio < 1.6, (estimate, ratio)


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("init_batches", [4, 150])
def test_the_error_of_a_difference_is_that_of_repeated_runs(
    init_batches: int, shared: bool, tmp_path: Path
) -> None:
    """Of two checkpoints of one training; bounds as above."""
    found: list[tuple[float, float, float]] = []
    checkpoints = {steps: trained_model(steps) for steps in (300, 600)}
    for run_number in range(24):
        runs = {
            steps: basinscope.sample(
                model, rows, {}, lr=1e-3, n_beta=100.0, localization=50.0, num_chains=4,
                num_draws=150, batch_size=8, num_init_loss_batches=init_batches,
                init_seed=1000 * run_number, match_sampling_input_ids_across_chains=shared,
                device="cpu", progress=False, output_path=tmp_path / f"{run_number}-{steps}.zarr",
            )
            for steps, (model, rows) in checkpoints.items()
        }  # fmt: skip
        both = basinscope.compare_llc(runs).compute()
        pair = both.sel(run=600, other_run=300)
        apart = float(np.hypot(*both["llc_mcse"].values))
        found.append((float(pair["difference"]), float(pair["difference_mcse"]), apart))
    differences, errors, apart_errors = np.array(found).T
    spread = np.std(differences, ddof=1)
    ratio = np.sqrt(np.mean(np.square(errors))) / spread
    assert 0.62 < ratio < 1.6, (ratio, spread)
    assert spread < 0.5 * np.mean(apart_errors)  # which is what independent runs would have


class PairModel(nn.Module):
    """Knows what follows two tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.hidden = nn.Linear(32, 48)
        self.head = nn.Linear(48, VOCABULARY)

    def forward(self, input_ids: Tensor) -> Tensor:
        embedded = self.embed(input_ids)
        pairs = torch.cat([embedded, embedded.roll(1, dims=1)], dim=-1)
        return self.head(nn.functional.gelu(self.hidden(pairs)))


def trained_model(steps: int) -> tuple[PairModel, datasets.Dataset]:
    """Train a small model on sources of the standard library, (6000, 33) bytes."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:60]
    text = np.frombuffer(b"".join(source.read_bytes() for source in sources), np.uint8)
    ids = torch.from_numpy(text[: 6000 * 33].reshape(6000, 33) % VOCABULARY).long()
    torch.manual_seed(0)
    model = PairModel()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        next_token_loss(model, ids[torch.randint(6000, (64,))]).mean().backward()
        optimizer.step()
    return model, datasets.Dataset.from_dict({"input_ids": ids.numpy()}).with_format("torch")
