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
