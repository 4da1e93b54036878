"""SGLD as a torch optimizer, for loops of one's own; `basinscope.sample` has a loop already."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from basinscope.kernels.noise import check_address
from basinscope.kernels.sgld import SgldUpdate
from basinscope.sampling.config import SamplerConfig

SETTINGS = (
    "lr",
    "n_beta",
    "localization",
    "noise_level",
    "llc_weight_decay",
    "bounding_box_size",
    "sampling_method",
    "sampling_method_kwargs",
    "weight_rounding",
)
"""Settings of :class:`SamplerConfig` that a parameter group can have for itself."""


class SGLD(torch.optim.Optimizer):
    r"""Stochastic gradient Langevin dynamics around the weights at construction.

    A step is that of :func:`basinscope.sample`, by the same kernels and with the same noise:

    .. math::
        w ← w - \frac{ε}{2} M [G nβ g + G (λ w + γ (w - w_0))] + \sqrt{ε G} M σ ξ

    where g is the gradient that parameters have when ``step()`` is called: that of a mean loss, as
    nβ multiplies it. A parameter without a gradient does not move.

    Parameters
    ----------
    params : iterable
        ``model.named_parameters()`` or ``model.parameters()``, or groups of them with settings of
        their own (dicts, as of any optimizer). Their order numbers the streams of noise.
    lr, n_beta : float
        Step size ε and inverse temperature nβ. A scheduler may change ``lr`` between steps; while
        it is 0 nothing moves.
    localization, noise_level, llc_weight_decay : float
        γ, σ and λ of the equation.
    bounding_box_size : float, optional
        Weights stay within this distance of w0, each by itself.
    sampling_method : {"sgmcmc_sgld", "rmsprop_sgld"}
    sampling_method_kwargs : dict, optional
        RMSprop's ``eps`` (0.1) and ``alpha`` (0.99).
    weight_rounding : {"nearest", "stochastic"}
        How bfloat16 weights are rounded after a step.
    param_masks : dict, optional
        Parameter name to bool mask, or to None for all of it; only these move. Needs names:
        ``model.named_parameters()``.
    init_seed, chain : int
        The noise of ``sample(init_seed=...)``'s chain of this number.

    Raises
    ------
    ValueError, TypeError
        If a setting, mask or parameter does not fit; says what does.

    Examples
    --------
    >>> sgld = SGLD(model.named_parameters(), lr=1e-4, n_beta=30.0, localization=100.0)
    >>> for batch in batches:
    ...     sgld.zero_grad()
    ...     loss = loss_of(model, batch).mean()
    ...     loss.backward()
    ...     sgld.step()
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        n_beta: float,
        localization: float = 0.0,
        noise_level: float = 1.0,
        llc_weight_decay: float = 0.0,
        bounding_box_size: float | None = None,
        sampling_method: str = "sgmcmc_sgld",
        sampling_method_kwargs: dict[str, float] | None = None,
        weight_rounding: str = "nearest",
        param_masks: Mapping[str, Tensor | None] | None = None,
        init_seed: int = 100,
        chain: int = 0,
    ) -> None:
        init_seed = SamplerConfig(lr=lr, n_beta=n_beta, init_seed=init_seed).init_seed
        if isinstance(chain, bool) or not isinstance(chain, numbers.Integral) or chain < 0:
            raise ValueError(f"chain must be a whole number, 0 or more; got {chain!r}")
        chain = int(chain)
        check_address(seed=init_seed + chain, chain=chain, step=0)
        self.param_masks: dict[str, Tensor | None] | None = _checked_masks(param_masks)
        defaults = {
            "lr": lr,
            "n_beta": n_beta,
            "localization": localization,
            "noise_level": noise_level,
            "llc_weight_decay": llc_weight_decay,
            "bounding_box_size": bounding_box_size,
            "sampling_method": sampling_method,
            "sampling_method_kwargs": sampling_method_kwargs,
            "weight_rounding": weight_rounding,
            "seed": init_seed + chain,
            "chain": chain,
            "steps": 0,
        }
        self._updates: dict[int, tuple[SamplerConfig, SgldUpdate]] = {}
        super().__init__(params, defaults)
        self._require_names()
        for number in range(len(self.param_groups)):
            if self._moved(number):
                self._update(number)  # what does not fit shows here, not at the first step

    @torch.compiler.disable  # kernels take addresses, which a recording would hold on to
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move all parameters once; give what ``closure()`` gives, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, group in enumerate(self.param_groups):
            moved = list(self._moved(number))
            if moved and group["lr"] != 0:  # as a schedule's first or last may be
                gradients = [group["params"][i].grad for i in moved]
                address = {"seed": group["seed"], "chain": group["chain"], "step": group["steps"]}
                self._update(number).step(gradients, **address)
            group["steps"] += 1
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, whose w0 is where they are now."""
        settings = {**self.defaults, **param_group}
        config = SamplerConfig(**{name: settings[name] for name in SETTINGS})
        plain = {name: getattr(config, name) for name in SETTINGS}  # which any file can hold
        super().add_param_group({**param_group, **plain})
        for parameter in self.param_groups[-1]["params"]:
            self.state[parameter]["anchor"] = parameter.detach().clone()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from ``state_dict()`` of another one, w0 and RMSprop's averages included."""
        absent = [
            name
            for name in self.defaults
            if any(name not in group for group in state_dict["param_groups"])
        ]
        if absent:
            raise ValueError(
                f"the state to load has no {', '.join(absent[:3])}: it is another optimizer's; "
                "give what state_dict() of an SGLD gave"
            )
        super().load_state_dict(state_dict)  # which gives averages the dtype of the parameters
        parameters = [p for group in self.param_groups for p in group["params"]]
        saved_as = [key for group in state_dict["param_groups"] for key in group["params"]]
        for parameter, key in zip(parameters, saved_as, strict=True):
            saved = state_dict["state"].get(key, {})
            if "square_avg" in saved:
                average = saved["square_avg"].to(parameter.device, copy=True)
                self.state[parameter]["square_avg"] = average

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "param_masks": self.param_masks}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._updates = {}

    def _moved(self, number: int) -> dict[int, Tensor | None]:
        """Which parameters of a group move, with their masks; frozen ones may be of any kind."""
        group, masks = self.param_groups[number], self.param_masks
        if masks is None:
            given = enumerate(group["params"])
            return {i: None for i, p in given if p.requires_grad or p.grad is not None}
        return {i: masks[name] for i, name in enumerate(group["param_names"]) if name in masks}

    def _update(self, number: int) -> SgldUpdate:
        """Give the kernel's step for a group, with its settings as they are now."""
        group = self.param_groups[number]
        config = SamplerConfig(**{name: group[name] for name in SETTINGS})
        moved = self._moved(number)
        weights = [group["params"][i].detach() for i in moved]
        if number in self._updates:
            before, update = self._updates[number]
            if before == config and _same_places(update.params, weights):
                return update
        first = sum(len(before["params"]) for before in self.param_groups[:number])
        states = [self.state[group["params"][i]] for i in moved]
        update = SgldUpdate(
            weights,
            anchors=[state["anchor"] for state in states],
            masks=list(moved.values()),
            param_indices=[first + i for i in moved],
            **config.update_settings,
        )
        for state, average in zip(states, update.square_avgs or [], strict=False):
            average.copy_(state.get("square_avg", average))
            state["square_avg"] = average
        self._updates[number] = config, update
        return update

    def _require_names(self) -> None:
        """Refuse masks of parameters that are not there."""
        if self.param_masks is None:
            return
        if any("param_names" not in group for group in self.param_groups):
            raise ValueError(
                "param_masks goes by names, and the parameters have none: give "
                "model.named_parameters() in place of model.parameters()"
            )
        names = {name for group in self.param_groups for name in group["param_names"]}
        if absent := sorted(self.param_masks.keys() - names):
            known = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            raise ValueError(
                f"param_masks names {', '.join(map(repr, absent[:3]))}, and no such parameter was "
                f"given; there are {known}"
            )


def _checked_masks(
    param_masks: Mapping[str, Tensor | None] | None,
) -> dict[str, Tensor | None] | None:
    """Refuse masks that are none, and those under which nothing would move."""
    if param_masks is None:
        return None
    if not isinstance(param_masks, Mapping):
        raise TypeError(
            "param_masks must be a dict of parameter name to bool mask or None; "
            f"got {type(param_masks).__name__}"
        )
    for name, mask in param_masks.items():
        if mask is not None and not isinstance(mask, Tensor):
            raise TypeError(
                f"the mask of {name!r} must be a bool tensor or None; got {type(mask).__name__}"
            )
    if not any(mask is None or bool(mask.any()) for mask in param_masks.values()):
        raise ValueError("param_masks selects no weight at all: nothing would move")
    return dict(param_masks)


def _same_places(before: list[Tensor], now: list[Tensor]) -> bool:
    """Whether weights are still where a kernel writes: ``.data`` may have become another tensor."""
    places = [
        [(one.data_ptr(), one.device, one.dtype, one.shape, one.stride()) for one in weights]
        for weights in (before, now)
    ]
    return places[0] == places[1]
