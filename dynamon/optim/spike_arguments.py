"""Decide which optimizers, arguments and steps :class:`dynamon.optim.SpikeClipper` takes, and why not others."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim import LBFGS, Optimizer

from dynamon.optim.stepping import runs_hooks, steps_in_backward, wrapped_optimizers
from dynamon.optim.unsupported import several_devices_reason


def unguarded_reason(optimizer: object, skips: bool = False) -> str | None:
    """Return why the gradients of an optimizer cannot be clipped in its steps, in one sentence; None where they can.

    Args:
        optimizer: The optimizer.
        skips: Whether steps are to be skipped too.

    Example:
        >>> import torch
        >>> from dynamon.optim import unguarded_reason
        >>> print(unguarded_reason(torch.optim.LBFGS([torch.zeros(2, requires_grad=True)])))
        LBFGS cannot be guarded: it uses several gradients in a step, and compares them.
    """
    name = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        return f"{name} cannot be guarded: it is not a torch.optim.Optimizer."
    if isinstance(optimizer, LBFGS):
        return f"{name} cannot be guarded: it uses several gradients in a step, and compares them."
    inner = wrapped_optimizers(optimizer)
    if not any(map(runs_hooks, (optimizer, *inner))):
        return f"{name} cannot be guarded: its class never calls Optimizer.__init__, so its steps run no hooks."
    if any(steps_in_backward(p) for group in optimizer.param_groups for p in group["params"]):
        return (
            f"{name} cannot be guarded: another optimizer steps during backward, so that no gradient is left for its "
            "own step."
        )
    if skips and inner:
        return (
            f"steps of {name} cannot be skipped: it steps another optimizer, and may change weights before it does. "
            "Leave skip at None."
        )
    return None


def check_arguments(
    optimizer: object, model: object, deviations: float, memory: int, warmup: int, floor: float, skip: float | None
) -> None:
    """Check what a guard is given.

    Raises:
        TypeError: Naming the argument of the wrong type.
        ValueError: If a number is out of range, or the optimizer cannot be guarded.
    """
    for name, value, kind in (("optimizer", optimizer, Optimizer), ("model", model, nn.Module)):
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be of type {kind.__name__}, got {type(value).__name__}.")
    check_numbers(deviations, memory, warmup, floor, skip)
    reason = unguarded_reason(optimizer, skip is not None)
    if reason is not None:
        raise ValueError(reason)


def check_numbers(deviations: float, memory: int, warmup: int, floor: float, skip: float | None) -> None:
    """Raise TypeError or ValueError naming the number that is wrong."""
    for name, steps in (("memory", memory), ("warmup", warmup)):
        if type(steps) is not int:
            raise TypeError(f"{name} must be a whole number of steps, got {steps!r}.")
        if steps < 1:
            raise ValueError(f"{name} must be 1 or more steps, got {steps}.")
    for name, value in (("deviations", deviations), ("floor", floor), ("skip", skip)):
        if type(value) not in (int, float) and not (name == "skip" and value is None):
            raise TypeError(f"{name} must be a number{' or None' if name == 'skip' else ''}, got {value!r}.")
    if not 0 < deviations < float("inf"):
        raise ValueError(f"deviations must be above 0 and finite, got {deviations}.")
    if not 0 < floor <= 1:
        raise ValueError(f"floor must be above 0 and at most 1, got {floor}.")
    if skip is not None and not 1 < skip < float("inf"):
        raise ValueError(f"skip must be above 1, so that a step is clipped before it is skipped, or None; got {skip}.")


def check_devices(parameters: Iterable[Tensor]) -> None:
    """Raise ValueError if the layers to be guarded are on several devices."""
    reason = several_devices_reason(parameters)
    if reason is not None:
        raise ValueError(f"spikes cannot be watched: {reason}")


def check_running(optimizer: Optimizer) -> None:
    """Raise RuntimeError in a step whose limits would be frozen for all later steps."""
    if torch.compiler.is_compiling():
        _refuse(optimizer, "is compiled: its limits would be those of the first one")
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        _refuse(optimizer, "is captured in a CUDA graph: replays would keep the limits of this one")


@_disable_dynamo  # so that it is raised and not traced
def _refuse(optimizer: Optimizer, reason: str) -> None:
    raise RuntimeError(f"{type(optimizer).__name__} cannot be guarded in a step that {reason}.")
