"""Check the arguments that all monitors have."""

import math
from collections.abc import Sequence


class BadArgumentError(ValueError):
    """An argument that cannot be meant, found when training begins."""


def check_arguments(
    every_n_steps: int | None, budget: float | None, grace: float, **globs: Sequence[str] | None
) -> None:
    """Raise ValueError naming the argument that is out of range; ``globs`` are the lists of names."""
    for name, patterns in globs.items():
        if isinstance(patterns, str):
            raise ValueError(f"{name} must be a list of names, got the string {patterns!r}; write [{patterns!r}].")
    if every_n_steps is not None and (type(every_n_steps) is not int or every_n_steps < 1):
        raise ValueError(f"every_n_steps must be a whole number of 1 or more, or None, got {every_n_steps!r}.")
    if budget is not None and not 0 < budget < math.inf:
        raise ValueError(
            f"budget must be positive (0.02 is 2 % of training time) or None for no limit, got {budget!r}."
        )
    if not 0 <= grace < math.inf:
        raise ValueError(f"grace must be a number of seconds, 0 or more, got {grace!r}.")


def check_probe(
    probe_batches: int,
    probe_fraction: float,
    loss_fn: object,
    probe_size: int | None = None,
    probe_weight: str | None = None,
) -> None:
    """Raise ValueError naming the argument that is out of range."""
    if probe_batches < 1:
        raise ValueError(f"probe_batches must be 1 or more, got {probe_batches}.")
    if not 0 < probe_fraction <= 1:
        raise ValueError(f"probe_fraction must lie in (0, 1], got {probe_fraction}.")
    if probe_size is not None and probe_size < 2:
        raise ValueError(f"probe_size must be 2 samples or more, or None, got {probe_size}.")
    if probe_weight is not None and not isinstance(probe_weight, str):
        raise ValueError(f"probe_weight must be the name of an entry of the batch, or None, got {probe_weight!r}.")
    if loss_fn is not None and not callable(loss_fn):
        raise ValueError(f"loss_fn must be a function of (module, batch), got {type(loss_fn).__name__}.")
