"""Check the arguments of a watch that say what the loop has."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer


def as_list(given: Any) -> list[Any]:
    """Return a list of what may be one thing or several."""
    return list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given]


def check_loop_arguments(
    model: nn.Module, optimizers: Sequence[Optimizer], scaler: object, logdir: object, loader: object, schedulers: Any
) -> None:
    """Raise TypeError or ValueError naming the argument that is wrong.

    Args:
        model: The model.
        optimizers: The optimizers, unwrapped.
        scaler: The gradient scaler, or None.
        logdir: The folder, or None.
        loader: The training loader, or None.
        schedulers: One scheduler or several.
    """
    if scaler is not None and not callable(getattr(scaler, "step", None)):
        raise TypeError(f"scaler must be a torch.amp.GradScaler, or None, got {type(scaler).__name__}.")
    if logdir is not None and not isinstance(logdir, str | os.PathLike):
        raise TypeError(f"logdir must be the path of a folder, or None, got {type(logdir).__name__}.")
    if logdir is not None and Path(logdir).is_file():
        raise ValueError(f"logdir must be a folder, and {str(logdir)!r} is a file.")
    if loader is not None and not (hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")):
        raise TypeError(f"loader must give batches, like a DataLoader, or be None, got {type(loader).__name__}.")
    for scheduler in as_list(schedulers):
        if not callable(getattr(scheduler, "step", None)):
            raise TypeError(f"schedulers must be learning rate schedulers, got {type(scheduler).__name__}.")
    _check_optimizers(model, optimizers)


def _check_optimizers(model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    if len({id(optimizer) for optimizer in optimizers}) < len(optimizers):
        raise ValueError("optimizer has the same optimizer twice; name it once.")
    own = {id(parameter) for parameter in model.parameters()}
    for optimizer in optimizers:
        held = (id(parameter) for group in optimizer.param_groups for parameter in group["params"])
        if own and own.isdisjoint(held):  # a model without parameters gets its own sentence
            raise ValueError(
                f"optimizer must be one of the model's: {type(optimizer).__name__} has no parameter of "
                f"{type(model).__name__}. Name only optimizers that train this model."
            )
