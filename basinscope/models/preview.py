"""Show what a weight restriction selects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.text import Text
from rich.tree import Tree
from torch import Tensor, nn

from basinscope.models.forward import uncompiled
from basinscope.models.restrictions import create_param_masks
from basinscope.models.structure import used_parameters

_BAR = 20  # characters


def preview_weight_restriction(
    model: nn.Module,
    masks: Mapping[str, Tensor | None] | str | Sequence[str],
    *,
    plain: bool = False,
) -> None:
    """Print a tree of the selected parameters, with how many of their elements are selected.

    Parameters
    ----------
    model : nn.Module
    masks : dict, str or list of str
        Masks as :func:`create_param_masks` makes them, or the restriction itself.
    plain : bool
        Print a line per parameter, "name<TAB>selected<TAB>elements", for pipes.

    Raises
    ------
    ValueError
        If a mask names no parameter of the model, or does not have its shape.
    """
    model = uncompiled(model)
    if not isinstance(masks, Mapping):
        masks = create_param_masks(model, masks)
    rows = [(name, *_counts(model, name, mask)) for name, mask in masks.items()]
    if plain:
        for name, selected, total in rows:
            print(f"{name}\t{selected}\t{total}")
        return
    chosen = sum(selected for _, selected, _ in rows)
    everything = sum(p.numel() for p in used_parameters(model).values())
    tree = Tree(
        Text.assemble(
            (type(model).__name__, "bold"),
            f"  {chosen:,} of {everything:,} weights ({_percent(chosen, everything)})",
        )
    )
    branches: dict[str, Tree] = {"": tree}
    widest = max((len(name.rpartition(".")[2]) for name in masks), default=0)
    for name, selected, total in rows:
        parent, _, leaf = name.rpartition(".")
        line = Text.assemble(
            (f"{leaf:<{widest}}  ", ""),
            (_bar(selected, total), "cyan"),
            f" {_percent(selected, total):>6}  {selected:,} of {total:,}",
        )
        _branch(branches, parent).add(line)
    Console(highlight=False, soft_wrap=True).print(tree)


def _counts(model: nn.Module, name: str, mask: Tensor | None) -> tuple[int, int]:
    try:
        parameter = model.get_parameter(name)
    except AttributeError as error:
        raise ValueError(f"{name!r} is no parameter of {type(model).__name__}") from error
    if mask is None:
        return parameter.numel(), parameter.numel()
    if mask.shape != parameter.shape:
        raise ValueError(
            f"the mask of {name!r} has shape {tuple(mask.shape)}, the parameter "
            f"{tuple(parameter.shape)}: they must be equal"
        )
    return int(mask.sum()), parameter.numel()


def _branch(branches: dict[str, Tree], name: str) -> Tree:
    """The branch of a module: one line for its whole path, below the root."""
    if name not in branches:
        branches[name] = branches[""].add(Text(name, style="bold cyan"))
    return branches[name]


def _percent(part: int, whole: int) -> str:
    share = 100 * part / whole if whole else 0.0
    return f"{share:.0f}%" if share == round(share) else f"{share:.1f}%"


def _bar(part: int, whole: int) -> str:
    filled = round(_BAR * part / whole) if whole else 0
    if part and not filled:
        filled = 1
    return "█" * filled + "·" * (_BAR - filled)
