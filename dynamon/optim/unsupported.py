"""Decide which optimizers and steps do not support layerwise rates, and why."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from dynamon.layers import Layer
from dynamon.optim.stepping import runs_hooks, steps_in_backward, wrapped_optimizers
from dynamon.quantities.names import word_runs
from dynamon.quantities.weight_decay import is_decoupled
from dynamon.rates import Rule

_REFUSED = {  # by whole words of the class's name
    "prodigy": "it estimates one step size for all groups and raises when their rates differ",
    "dadapt": "it estimates one step size for all groups and raises when their rates differ",
    "schedulefree": "its weight averaging depends on the history of the rate",
    "lbfgs": "it evaluates the closure many times per step and accepts one group only",
    "zeroredundancy": "it partitions its groups over the processes at construction",
    "deepspeed": "DeepSpeed owns the parameter groups",
}
_PACKAGES = {
    "prodigyopt": "prodigy",
    "dadaptation": "dadapt",
    "schedulefree": "schedulefree",
    "deepspeed": "deepspeed",
}  # whose optimizers are all of that kind


def unsupported_reason(optimizer: object) -> str | None:
    """Return why layerwise rates cannot be applied to an optimizer, in one sentence; None where they can.

    Example:
        >>> import torch
        >>> from dynamon.optim import unsupported_reason
        >>> print(unsupported_reason(torch.optim.LBFGS([torch.zeros(2, requires_grad=True)])))
        LBFGS cannot take layerwise rates: it evaluates the closure many times per step and accepts one group only.
    """
    name = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        return f"{name} is not a torch.optim.Optimizer, so its learning rates cannot be scaled."
    for cls in type(optimizer).__mro__:
        found = word_runs(cls.__name__) | {_PACKAGES.get(cls.__module__.split(".")[0], "")}
        reason = next((reason for word, reason in _REFUSED.items() if word in found), None)
        if reason is not None:
            return f"{name} cannot take layerwise rates: {reason}."
    if any("lr" not in group for group in optimizer.param_groups):
        return f"{name} cannot take layerwise rates: a parameter group has no 'lr'."
    if any(inner.param_groups is not optimizer.param_groups for inner in wrapped_optimizers(optimizer)):
        return f"{name} cannot take layerwise rates: it steps another optimizer, which has other parameter groups."
    if not any(map(runs_hooks, (optimizer, *wrapped_optimizers(optimizer)))):
        return (
            f"{name} cannot take layerwise rates: its class never calls Optimizer.__init__, so its steps run no hooks."
        )
    if any(steps_in_backward(p) for group in optimizer.param_groups for p in group["params"]):
        return (
            f"{name} cannot take layerwise rates: another optimizer steps during backward, so that no gradient is "
            "left for its own step."
        )
    if _overrides_by_place(optimizer):
        return (
            f"{name} cannot take layerwise rates: it has overrides (GlobalOptimManager) for parameters by their index "
            "in the groups, and layerwise rates change the groups of a step."
        )
    return None


def check_arguments(optimizer: object, rule: object, model: object, lag: int, read_every: int) -> None:
    """Check what steering is given.

    Raises:
        TypeError: Naming the argument of the wrong type.
        ValueError: If an argument is out of range, or the optimizer does not support layerwise rates.
    """
    for name, value, kind in (("optimizer", optimizer, Optimizer), ("rule", rule, Rule), ("model", model, nn.Module)):
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be of type {kind.__name__}, got {type(value).__name__}.")
    reason = unsupported_reason(optimizer)
    if reason is not None:
        raise ValueError(reason)
    if lag not in (0, 1):
        raise ValueError(f"lag must be 0 or 1, got {lag}.")
    if type(read_every) is not int:
        raise TypeError(f"read_every must be an integer, got {read_every!r}.")
    if read_every < 1:
        raise ValueError(f"read_every must be a whole number of 1 or more, got {read_every}.")


def _overrides_by_place(optimizer: Optimizer) -> bool:
    """Return whether a bitsandbytes optimizer keeps settings of single parameters by index of group and parameter."""
    if not any(cls.__module__.split(".")[0] == "bitsandbytes" for cls in type(optimizer).__mro__):
        return False
    manager = getattr(optimizer, "mng", None)
    return any(getattr(manager, name, None) for name in ("index2config", "pid2config", "module_weight_config_triple"))


def several_devices_reason(parameters: Iterable[Tensor]) -> str | None:
    """Return why gradients of these parameters cannot be read for a rule, in one sentence; None where they can."""
    devices = sorted({str(p.device) for p in parameters})
    if len(devices) < 2:
        return None
    return f"the model's parameters are on {' and '.join(devices)}, and gradients are read on one device."


def check_devices(optimizer: Optimizer, layers: Iterable[Layer]) -> None:
    """Raise ValueError if the gradients of the layers cannot be read for a rule."""
    reason = several_devices_reason(layer.parameter for layer in layers)
    if reason is not None:
        raise ValueError(f"{type(optimizer).__name__} cannot take rates that follow gradients: {reason}")


def check_step(optimizer: Optimizer, applies: bool) -> None:
    """Raise if the rates of the step that begins would be frozen for all later steps.

    Args:
        optimizer: The optimizer that steps.
        applies: Whether rates are changed, and not only observed.

    Raises:
        RuntimeError: Naming the optimizer and the reason.
    """
    if applies and torch.compiler.is_compiling():
        _refuse(optimizer, "is compiled: it would be recompiled at every change of a rate")
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        _refuse(optimizer, "is captured in a CUDA graph: replays would keep the rates of this step")


@_disable_dynamo  # so that it is raised and not traced
def _refuse(optimizer: Optimizer, reason: str) -> None:
    raise RuntimeError(f"{type(optimizer).__name__} cannot take layerwise rates in a step that {reason}.")


def check_decoupled_decay(optimizer: Optimizer) -> None:
    """Raise ValueError if decay is added to the gradient, where dividing it by the ratio does not undo the rate."""
    if any(group.get("weight_decay") and not is_decoupled(optimizer, group) for group in optimizer.param_groups):
        raise ValueError(
            f"scale_weight_decay=False needs decoupled weight decay, as AdamW has; {type(optimizer).__name__} adds its "
            "weight decay to the gradient. Leave scale_weight_decay at True, or set weight_decay to 0."
        )
