"""Tuned lenses: one affine map per layer, from its residual stream to the last one.

The files are those of the tuned-lens project (Belrose et al. (2023), "Eliciting latent predictions
from transformers with the tuned lens", arXiv:2303.08112): ``config.json`` names the model, and
``params.pt`` holds ``{layer}.weight`` and ``{layer}.bias``. There, the translator of layer l is
applied to the stream that ENTERS layer l (Hugging Face's ``hidden_states[l]``: ``resid_in_{l}``,
which is also ``resid_out_{l-1}``), and its output is added to it: h + A h + b.
"""

from __future__ import annotations

import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[np.float32]
CONFIG, PARAMETERS = "config.json", "params.pt"


def load_tuned_lens(
    path: str | os.PathLike[str],
    *,
    model_name: str | None = None,
    d_model: int | None = None,
    num_layers: int | None = None,
) -> dict[int, tuple[Array, Array]]:
    """Read the translators of a tuned lens; nothing in its files is executed.

    Parameters
    ----------
    path : path
        The folder that holds ``config.json`` and ``params.pt``.
    model_name : str, optional
        Name or path of the model that it must be for. Folders count by their last part:
        ``EleutherAI/pythia-70m`` and ``/models/pythia-70m`` are the same. None: any.
    d_model, num_layers : int, optional
        Width of the residual stream and number of layers that it must have.

    Returns
    -------
    dict of int to (ndarray (d_model, d_model), ndarray (d_model,))
        By layer l, A and b of h + A h + b, to be applied to ``resid_in_{l}``; float32.

    Raises
    ------
    FileNotFoundError
        If a file is missing.
    ValueError
        If the lens is for another model, or its files are none of a tuned lens; says which field
        of ``config.json`` or which entry of ``params.pt`` it is.
    """
    path = Path(path).expanduser()
    for name in (CONFIG, PARAMETERS):
        if not (path / name).is_file():
            found = ", ".join(sorted(file.name for file in path.glob("*"))) or "nothing"
            raise FileNotFoundError(
                f"{path} has no {name}: give the folder of a tuned lens, which holds {CONFIG} and "
                f"{PARAMETERS} (found {found})"
            )
    _require_same_model(path / CONFIG, model_name, d_model, num_layers)
    translators = _translators(path / PARAMETERS)
    for layer, (weight, bias) in translators.items():
        width = len(bias) if d_model is None else d_model
        if weight.shape != (width, width) or bias.shape != (width,):
            raise ValueError(
                f"{path / PARAMETERS}: {layer}.weight has shape {weight.shape} and {layer}.bias "
                f"{bias.shape}; the residual stream is {width} wide"
            )
    if num_layers is not None and sorted(translators) != list(range(num_layers)):
        raise ValueError(
            f"{path / PARAMETERS} has translators of layers {sorted(translators)}; the model has "
            f"{num_layers} layers"
        )
    return translators


def _require_same_model(
    file: Path, model_name: str | None, d_model: int | None, num_layers: int | None
) -> None:
    try:
        config: dict[str, Any] = json.loads(file.read_text())
        name = str(config["base_model_name_or_path"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{file} does not name a tuned lens's model (base_model_name_or_path): {error}"
        ) from error
    if model_name is not None and _last_part(name) != _last_part(model_name):
        raise ValueError(
            f"the tuned lens in {file.parent} is for {name!r} (base_model_name_or_path in {CONFIG})"
            f", and the model is {model_name!r}"
        )
    for key, wanted in (("d_model", d_model), ("num_hidden_layers", num_layers)):
        if wanted is not None and config.get(key, wanted) != wanted:
            raise ValueError(
                f"the tuned lens in {file.parent} has {key}={config[key]} in {CONFIG}; the "
                f"model's is {wanted}"
            )


def _last_part(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2]


def _translators(file: Path) -> dict[int, tuple[Array, Array]]:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{file} holds something else than tensors, or is damaged; it was not loaded "
            f"({str(error).splitlines()[0]})"
        ) from error
    weights: dict[int, Array] = {}
    biases: dict[int, Array] = {}
    for key, value in state.items() if isinstance(state, dict) else [("", None)]:
        match = re.fullmatch(r"(\d+)\.(weight|bias)", str(key))
        if match is None or not isinstance(value, torch.Tensor):
            raise ValueError(
                f"{file} has an entry {key!r}; a tuned lens has tensors named 0.weight, 0.bias, "
                "1.weight and so on"
            )
        {"weight": weights, "bias": biases}[match[2]][int(match[1])] = value.float().numpy()
    if not weights or biases.keys() - weights.keys():
        raise ValueError(f"{file} lacks weights: it has {', '.join(state) or 'no entries'}")
    return {
        layer: (weight, biases.get(layer, np.zeros(len(weight), np.float32)))
        for layer, weight in sorted(weights.items())
    }
