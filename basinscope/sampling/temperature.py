"""The inverse temperature at which losses are sampled."""

from __future__ import annotations

import math


def default_nbeta(batch_size: int, gradient_accumulation_steps: int = 1) -> float:
    """Give nβ = n / ln(n), where n counts the sequences of a step, as devinterp does.

    β = 1 / ln(n) is the temperature at which n times the mean sampled loss approximates the free
    energy of n examples: Watanabe (2013), "A widely applicable Bayesian information criterion",
    arXiv:1208.6338. It is a value to start from; docs/sampling.md says how to choose one.

    Parameters
    ----------
    batch_size : int
    gradient_accumulation_steps : int
        Batches of a step.

    Raises
    ------
    ValueError
        If a step has less than two sequences, for which ln(n) is no divisor.

    Examples
    --------
    >>> round(default_nbeta(32), 3)
    9.233
    """
    sequences = batch_size * gradient_accumulation_steps
    if not sequences > 1:
        raise ValueError(
            f"batch_size={batch_size!r} times gradient_accumulation_steps="
            f"{gradient_accumulation_steps!r}: n / ln(n) takes two sequences or more; choose "
            "n_beta yourself"
        )
    return sequences / math.log(sequences)
