"""The sampler's settings: defined once, here, with the range of each."""

from __future__ import annotations

import dataclasses
import math
import numbers
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

SAMPLING_METHODS = ("sgmcmc_sgld", "rmsprop_sgld")
WEIGHT_ROUNDINGS = ("nearest", "stochastic")
RMSPROP_DEFAULTS = {"alpha": 0.99, "eps": 0.1}


REQUIRED = dataclasses.MISSING


def _setting(default: Any, check: Callable[[Any], str | None], meaning: str) -> Any:
    return field(default=default, metadata={"check": check, "meaning": meaning})


def _whole(least: int) -> Callable[[Any], str | None]:
    def check(value: Any) -> str | None:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            return f"a whole number of at least {least}"
        return None if least <= int(value) < 2**63 else f"a whole number of at least {least}"

    return check


def _hint(value: Any) -> str:
    """What to do about a number that YAML takes for text, as it does ``1e-3``."""
    text = isinstance(value, str) and re.fullmatch(r"[+-]?\d+[eE][+-]?\d+", value.strip())
    return f": YAML reads this as text, write {float(value):.1e}" if text else ""


def _not_negative(value: Any) -> str | None:
    good = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return None if good and math.isfinite(value) and value >= 0 else "a finite number, 0 or more"


def _positive(value: Any) -> str | None:
    return "a finite number above 0" if _not_negative(value) or value == 0 else None


def _optional(check: Callable[[Any], str | None]) -> Callable[[Any], str | None]:
    def check_or_none(value: Any) -> str | None:
        wanted = None if value is None else check(value)
        return f"{wanted}, or None" if wanted else None

    return check_or_none


def _flag(value: Any) -> str | None:
    return None if isinstance(value, bool) else "True or False"


def _method(value: Any) -> str | None:
    return None if value in SAMPLING_METHODS else f"one of {', '.join(SAMPLING_METHODS)}"


def _rounding(value: Any) -> str | None:
    return None if value in WEIGHT_ROUNDINGS else f"one of {', '.join(WEIGHT_ROUNDINGS)}"


def _autocast(value: Any) -> str | None:
    return None if value in (None, "bfloat16") else "'bfloat16', or None"


def _mapping(value: Any) -> str | None:
    return None if value is None or isinstance(value, dict) else "a dict, or None"


@dataclass(frozen=True)
class SamplerConfig:
    """Every number that decides what a run draws.

    The fields are those of :func:`basinscope.sample`; see there for the equation they enter.

    Raises
    ------
    ValueError
        Naming the field, what was got and what is valid.
    """

    lr: float = _setting(REQUIRED, _positive, "step size ε")
    n_beta: float = _setting(REQUIRED, _not_negative, "inverse temperature nβ")
    num_chains: int = _setting(4, _whole(1), "independent chains")
    num_draws: int = _setting(200, _whole(1), "draws per chain")
    batch_size: int = _setting(32, _whole(1), "sequences per batch")
    num_burnin_steps: int = _setting(0, _whole(0), "steps before the first draw")
    num_steps_bw_draws: int = _setting(1, _whole(1), "steps from one draw to the next")
    gradient_accumulation_steps: int = _setting(1, _whole(1), "batches per step")
    num_init_loss_batches: int = _setting(32, _whole(1), "batches for the loss at the checkpoint")
    batches_per_draw: int = _setting(3, _whole(1), "batches of an observable, unless given there")
    init_seed: int = _setting(100, _whole(0), "chain c uses init_seed + c")
    obs_seed: int = _setting(1337, _whole(0), "chooses the rows of the observables")
    localization: float = _setting(0.0, _not_negative, "pull γ towards the checkpoint")
    noise_level: float = _setting(1.0, _not_negative, "standard deviation σ of the noise")
    llc_weight_decay: float = _setting(0.0, _not_negative, "pull λ towards zero")
    bounding_box_size: float | None = _setting(
        None, _optional(_not_negative), "largest distance of a weight from the checkpoint"
    )
    init_noise: float | None = _setting(
        None, _optional(_not_negative), "standard deviation of one perturbation at the start"
    )
    sampling_method: str = _setting("sgmcmc_sgld", _method, "the update rule")
    sampling_method_kwargs: dict[str, float] | None = _setting(
        None, _mapping, "alpha and eps of rmsprop_sgld"
    )
    weight_rounding: str = _setting("nearest", _rounding, "how bfloat16 weights are rounded")
    autocast: str | None = _setting(None, _autocast, "dtype of the model's products")
    shuffle: bool = _setting(True, _flag, "shuffle the sampling data set once")
    match_sampling_input_ids_across_chains: bool = _setting(
        True, _flag, "all chains see the same batches"
    )
    save_metrics: bool = _setting(False, _flag, "store the nine diagnostics of every step")
    save_sampling_input_ids: bool = _setting(False, _flag, "store token ids, not only row numbers")
    train_mode: bool = _setting(False, _flag, "leave dropout on")
    loss_keep_bits: int | None = _setting(
        None, _optional(_whole(1)), "mantissa bits of stored losses; None keeps all"
    )

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            wanted = spec.metadata["check"](value)
            if wanted:
                raise ValueError(
                    f"{spec.name} ({spec.metadata['meaning']}) must be {wanted}; got {value!r}"
                    f"{_hint(value)}"
                )
            if isinstance(value, numbers.Real) and not isinstance(value, bool):
                plain = int(value) if isinstance(value, numbers.Integral) else float(value)
                object.__setattr__(self, spec.name, plain)
        if self.loss_keep_bits is not None and self.loss_keep_bits > 23:
            raise ValueError(
                f"loss_keep_bits must be 1 to 23, or None; got {self.loss_keep_bits} "
                "(a float32 has 23 mantissa bits)"
            )
        object.__setattr__(self, "sampling_method_kwargs", self._method_kwargs())

    @property
    def num_steps(self) -> int:
        """Steps of one chain."""
        return self.num_burnin_steps + self.num_draws * self.num_steps_bw_draws

    @property
    def rmsprop(self) -> dict[str, float]:
        """``alpha`` and ``eps`` for the update kernel; empty for plain SGLD."""
        return dict(self.sampling_method_kwargs or {})

    @property
    def update_settings(self) -> dict[str, Any]:
        """What :class:`basinscope.kernels.sgld.SgldUpdate` takes of the settings."""
        return {
            "lr": self.lr,
            "n_beta": self.n_beta,
            "localization": self.localization,
            "weight_decay": self.llc_weight_decay,
            "noise_level": self.noise_level,
            "bounding_box_size": self.bounding_box_size,
            "rounding": self.weight_rounding,
            "alpha": self.rmsprop.get("alpha"),
            "eps": self.rmsprop.get("eps"),
        }

    def draw_after(self, step: int) -> int | None:
        """Give the draw that step ``step`` (from 0) produces, if it produces one."""
        draw, rest = divmod(step - self.num_burnin_steps, self.num_steps_bw_draws)
        return draw if draw >= 0 and rest == 0 else None

    def draws_before(self, step: int) -> int:
        """Count the draws of the steps before ``step``."""
        return max(0, -(-(step - self.num_burnin_steps) // self.num_steps_bw_draws))

    def asdict(self) -> dict[str, Any]:
        """Give the settings as a plain dictionary that JSON can hold."""
        return dataclasses.asdict(self)

    def _method_kwargs(self) -> dict[str, float]:
        given = dict(self.sampling_method_kwargs or {})
        if self.sampling_method != "rmsprop_sgld":
            if given:
                raise ValueError(
                    f"sampling_method_kwargs={given} was given with "
                    f"sampling_method={self.sampling_method!r}, which takes none; "
                    "use sampling_method='rmsprop_sgld' or leave them out"
                )
            return {}
        unknown = sorted(given.keys() - RMSPROP_DEFAULTS.keys())
        if unknown:
            raise ValueError(
                f"sampling_method_kwargs has {', '.join(map(repr, unknown))}; "
                "rmsprop_sgld takes 'alpha' and 'eps'"
            )
        settings = {**RMSPROP_DEFAULTS, **given}
        if _not_negative(settings["alpha"]) or settings["alpha"] > 1:
            raise ValueError(f"rmsprop's alpha must be from 0 to 1; got {settings['alpha']!r}")
        if _positive(settings["eps"]):
            raise ValueError(f"rmsprop's eps must be a number above 0; got {settings['eps']!r}")
        return {name: float(value) for name, value in settings.items()}


def merge_rmsprop_aliases(
    sampling_method: str,
    sampling_method_kwargs: dict[str, Any] | None,
    rmsprop_eps: float | None,
    rmsprop_alpha: float | None,
) -> dict[str, Any] | None:
    """Put the two aliases where ``sampling_method_kwargs`` has them.

    Raises
    ------
    ValueError
        If an alias is given for another method, or twice.
    """
    aliases = {"eps": rmsprop_eps, "alpha": rmsprop_alpha}
    given = {name: value for name, value in aliases.items() if value is not None}
    for name, value in given.items():
        if sampling_method != "rmsprop_sgld":
            raise ValueError(
                f"rmsprop_{name}={value!r} was given with sampling_method={sampling_method!r}; "
                "it belongs to sampling_method='rmsprop_sgld'"
            )
        if isinstance(sampling_method_kwargs, dict) and name in sampling_method_kwargs:
            raise ValueError(
                f"rmsprop_{name}={value!r} and sampling_method_kwargs[{name!r}] were both given; "
                "give one of them"
            )
    if not given or _mapping(sampling_method_kwargs):  # SamplerConfig refuses what is no dict
        return sampling_method_kwargs
    return {**(sampling_method_kwargs or {}), **given}
