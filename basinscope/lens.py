"""The logit lens of a model, of a store of activations, or of a tuned lens's files."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from basinscope.analysis import logit_lens
from basinscope.analysis.lens_inputs import described_model, model_name
from basinscope.io.activation_store import open_activations

if TYPE_CHECKING:
    from torch import nn


class LogitLens(logit_lens.LogitLens):
    __doc__ = logit_lens.LogitLens.__doc__

    @classmethod
    def from_model(cls, model: nn.Module) -> LogitLens:
        """Take the final norm and the unembedding out of a model, as a float32 copy.

        Parameters
        ----------
        model : nn.Module
            A Hugging Face causal LM or a TransformerLens model.

        Raises
        ------
        UnknownStructureError
            If its logits are not made by a norm and a linear map; says what was found.
        """
        from basinscope.models.unembedding import find_unembedding

        return cls(find_unembedding(model), model_name=_name_of(model))

    @classmethod
    def from_model_name(cls, name: str | os.PathLike[str]) -> LogitLens:
        """Load a Hugging Face causal LM by its name or local path, and take its lens.

        Raises
        ------
        ModuleNotFoundError
            If transformers is not installed.
        OSError
            If there is no such model.
        """
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(name)
        return cls.from_model(model.eval())

    @classmethod
    def from_store(cls, path: str | os.PathLike[str]) -> LogitLens:
        """Take the lens that is stored beside activations; needs no torch.

        Raises
        ------
        FileNotFoundError
            If there is no store.
        ValueError
            If it holds no unembedding.
        """
        tree = open_activations(path, allow_incomplete=True)
        if "unembedding" not in tree.children:
            raise ValueError(
                f"{path} holds no unembedding: take the lens from its model, "
                "LogitLens.from_model(model), or store activations with their unembedding"
            )
        unembedding = tree.children["unembedding"].to_dataset(inherit=False)
        activations = tree.to_dataset()
        lens = cls(unembedding, model_name=model_name(activations))
        if lens.num_layers is None:
            lens.num_layers = described_model(activations).get("num_layers")
        return lens

    @classmethod
    def from_tuned_lens(cls, path: str | os.PathLike[str], model: nn.Module) -> LogitLens:
        """Take a model's lens with the translators of a tuned lens.

        Parameters
        ----------
        path : path
            The folder of its ``config.json`` and ``params.pt``.
        model : nn.Module
            The one that it was trained for.

        Raises
        ------
        FileNotFoundError, ValueError
            If files are missing, or the tuned lens is for another model; says which field differs.
        """
        from basinscope.models.tuned_lens import load_tuned_lens

        lens = cls.from_model(model)
        translators = load_tuned_lens(
            path,
            model_name=lens.model_name,
            d_model=lens.d_model,
            num_layers=lens.num_layers,
        )
        lens.translators = translators
        return lens


def _name_of(model: Any) -> str | None:
    """The name that activations of this model carry."""
    config: Any = getattr(model, "config", None) or getattr(model, "cfg", None)
    return getattr(config, "name_or_path", None) or getattr(config, "model_name", None) or None
