"""Files of tuned lenses: what is read from them, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from basinscope.models.tuned_lens import load_tuned_lens

LAYERS, WIDTH, NAME = 3, 6, "EleutherAI/pythia-70m"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As the tuned-lens project saves one: the state of a list of linear layers."""
    torch.manual_seed(0)
    lens = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
    torch.save(lens.state_dict(), tmp_path / "params.pt")
    config = {"base_model_name_or_path": NAME, "d_model": WIDTH, "num_hidden_layers": LAYERS,
              "bias": True, "lens_type": "linear_tuned_lens"}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_what_is_read_maps_as_the_linear_layers_do(folder: Path) -> None:
    translators = load_tuned_lens(folder, model_name=NAME, d_model=WIDTH, num_layers=LAYERS)
    assert list(translators) == [0, 1, 2]
    torch.manual_seed(0)
    lens = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
    x = torch.randn(5, WIDTH)
    for layer, (weight, bias) in translators.items():
        expected = lens[layer](x).detach().numpy()
        np.testing.assert_allclose(x.numpy() @ weight.T + bias, expected, atol=1e-6)
        assert weight.dtype == bias.dtype == np.float32


def test_a_home_is_expanded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert len(load_tuned_lens(f"~/{folder.name}")) == LAYERS


def test_a_lens_without_biases_and_in_16_bits(folder: Path) -> None:
    state = {f"{layer}.weight": torch.eye(WIDTH, dtype=torch.float16) for layer in range(LAYERS)}
    torch.save(state, folder / "params.pt")
    weight, bias = load_tuned_lens(folder)[2]
    np.testing.assert_array_equal(weight, np.eye(WIDTH, dtype=np.float32))
    np.testing.assert_array_equal(bias, np.zeros(WIDTH, np.float32))


@pytest.mark.parametrize("name", [NAME, "/models/pythia-70m", "/models/pythia-70m/", "pythia-70m"])
def test_a_local_copy_of_the_model_is_the_model(folder: Path, name: str) -> None:
    assert len(load_tuned_lens(folder, model_name=name)) == LAYERS


class Bad:
    """What would run code where it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path("never").touch, ())


def changed_config(**changes: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))

    return change


def saved(state: object) -> Callable[[Path], object]:
    return lambda folder: torch.save(state, folder / "params.pt")


EYES = {f"{layer}.{leaf}": torch.eye(WIDTH) if leaf == "weight" else torch.ones(WIDTH)
        for layer in range(LAYERS) for leaf in ("weight", "bias")}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed_config(base_model_name_or_path="gpt2"), "for 'gpt2' .base_model_name_or_path in"),
        (changed_config(d_model=8), "has d_model=8 in config.json; the model's is 6"),
        (changed_config(num_hidden_layers=4), "has num_hidden_layers=4 .* the model's is 3"),
        (lambda f: (f / "config.json").write_text("{}"), "does not name a tuned lens's model"),
        (lambda f: (f / "config.json").write_text("{"), "does not name a tuned lens's model"),
        (saved({"0.weight": Bad()}), "something else than tensors"),
        (lambda f: (f / "params.pt").write_bytes(b"no"), "something else than tensors"),
        (saved([torch.ones(2)]), "has an entry ''"),
        (saved({"input.weight": torch.ones(2)}), "has an entry 'input.weight'"),
        (saved({"0.weight": 3}), "has an entry '0.weight'"),
        (saved({"0.bias": torch.ones(WIDTH)}), "lacks weights: it has 0.bias"),
        (saved({}), "lacks weights: it has no entries"),
        (saved(EYES | {"1.weight": torch.eye(5)}), r"1.weight has shape \(5, 5\) and 1.bias \(6,"),
        (saved(EYES | {"3.weight": torch.eye(WIDTH)}), r"of layers \[0, 1, 2, 3\]; .* has 3"),
    ],
)
def test_a_lens_that_does_not_fit_is_refused(
    folder: Path, change: Callable[[Path], object], message: str
) -> None:
    change(folder)
    with pytest.raises(ValueError, match=message):
        load_tuned_lens(folder, model_name=NAME, d_model=WIDTH, num_layers=LAYERS)
    assert not Path("never").exists()


def test_missing_files_are_named(folder: Path) -> None:
    (folder / "params.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no params\.pt: .* \(found config\.json\)"):
        load_tuned_lens(folder)
    with pytest.raises(FileNotFoundError, match=r"has no config\.json: .* \(found nothing\)"):
        load_tuned_lens(folder / "elsewhere")
