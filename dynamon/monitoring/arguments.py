"""Check the arguments that all monitors have."""

import inspect
import math
from collections.abc import Iterable, Sequence
from numbers import Real

from torch import nn

from dynamon.kernels.arguments import check_count


class BadArgumentError(ValueError):
    """An argument that cannot be meant, found when training begins."""


def check_number(name: str, value: object, example: str) -> None:
    """Raise TypeError naming an argument that is no number."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, like {example}, got {value!r}.")


def check_switches(**switches: object) -> None:
    """Raise TypeError naming an argument that is neither True nor False."""
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}.")


def check_loss_fn(loss_fn: object) -> None:
    """Raise TypeError where a loss function cannot be called with a model and a batch."""
    wanted = "loss_fn must be a function of (model, batch)"
    if not callable(loss_fn):
        raise TypeError(f"{wanted}, got {type(loss_fn).__name__}.")
    name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
    of_torch = isinstance(loss_fn, nn.Module) and type(loss_fn).__module__ == "torch.nn.modules.loss"
    if of_torch or getattr(loss_fn, "__module__", None) == "torch.nn.functional":
        example = f"{name}{'()' if of_torch else ''}(model(batch[0]), batch[1])"
        raise TypeError(f"{wanted}, got {name}, which takes outputs and targets. Write lambda model, batch: {example}.")
    try:
        signature = inspect.signature(loss_fn)
    except (TypeError, ValueError):  # some functions written in C do not say
        return
    try:
        signature.bind(None, None)
    except TypeError as error:
        raise TypeError(f"{wanted}, got {name}{signature}.") from error


def check_arguments(
    every_n_steps: int | None, budget: float | None, grace: float, **globs: Sequence[str] | None
) -> None:
    """Raise TypeError or ValueError naming the argument that is wrong; ``globs`` are the lists of names."""
    for name, patterns in globs.items():
        if patterns is not None and not isinstance(patterns, Iterable):
            raise TypeError(f"{name} must be a list, got {patterns!r}; write [{patterns!r}].")
        if isinstance(patterns, str):
            raise ValueError(f"{name} must be a list of names, got the string {patterns!r}; write [{patterns!r}].")
    if every_n_steps is not None and (type(every_n_steps) is not int or every_n_steps < 1):
        raise ValueError(f"every_n_steps must be a whole number of 1 or more, or None, got {every_n_steps!r}.")
    if budget is not None:
        check_number("budget", budget, "0.02 for 2 % of training time")
    check_number("grace", grace, "3.0 for 3 seconds")
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
    """Raise TypeError or ValueError naming the argument that is wrong."""
    check_count("probe_batches", probe_batches)
    check_number("probe_fraction", probe_fraction, "0.25")
    if probe_size is not None:
        check_count("probe_size", probe_size, least=2)
    if not 0 < probe_fraction <= 1:
        raise ValueError(f"probe_fraction must lie in (0, 1], got {probe_fraction}.")
    if probe_weight is not None and not isinstance(probe_weight, str):
        raise ValueError(f"probe_weight must be the name of an entry of the batch, or None, got {probe_weight!r}.")
    if loss_fn is not None and not callable(loss_fn):
        raise ValueError(f"loss_fn must be a function of (module, batch), got {type(loss_fn).__name__}.")
    if loss_fn is not None:
        check_loss_fn(loss_fn)
