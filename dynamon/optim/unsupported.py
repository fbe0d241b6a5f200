"""What cannot take layerwise rates, and why."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from dynamon.optim.stepping import runs_hooks, steps_in_backward, wrapped_optimizers
from dynamon.quantities.names import word_runs
from dynamon.quantities.weight_decay import is_decoupled

_REFUSED = {  # by whole words of the class's name
    "prodigy": "it estimates one step size for all groups and raises when their rates differ",
    "dadapt": "it estimates one step size for all groups and raises when their rates differ",
    "schedulefree": "its weight averaging depends on the history of the rate",
    "lbfgs": "it evaluates the closure many times a step and takes one group only",
    "zeroredundancy": "it partitions its groups over the processes when it is built",
    "deepspeed": "DeepSpeed owns the parameter groups",
}
_PACKAGES = {
    "prodigyopt": "prodigy",
    "dadaptation": "dadapt",
    "schedulefree": "schedulefree",
    "deepspeed": "deepspeed",
}  # whose optimizers are all of that kind


def unsupported_reason(optimizer: object) -> str | None:
    """Why layerwise rates cannot be applied to an optimizer, in one sentence; None where they can."""
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
        return f"{name} cannot take layerwise rates: it steps another optimizer, whose groups are not its own."
    if not any(map(runs_hooks, (optimizer, *wrapped_optimizers(optimizer)))):
        return (
            f"{name} cannot take layerwise rates: its class never calls Optimizer.__init__, so its steps run no hooks."
        )
    if any(steps_in_backward(p) for group in optimizer.param_groups for p in group["params"]):
        return (
            f"{name} cannot take layerwise rates: another optimizer uses the gradients as they arrive, so that nothing "
            "is left for its step."
        )
    if _overrides_by_place(optimizer):
        return (
            f"{name} cannot take layerwise rates: it has overrides (GlobalOptimManager) for parameters by their place "
            "in the groups, and with rates by layer a step has other groups."
        )
    return None


def _overrides_by_place(optimizer: Optimizer) -> bool:
    """Whether an optimizer of bitsandbytes keeps settings of single parameters under numbers of group and place."""
    if not any(cls.__module__.split(".")[0] == "bitsandbytes" for cls in type(optimizer).__mro__):
        return False
    manager = getattr(optimizer, "mng", None)
    return any(getattr(manager, name, None) for name in ("index2config", "pid2config", "module_weight_config_triple"))


def several_devices_reason(parameters: Iterable[Tensor]) -> str | None:
    """Why the gradients of some parameters cannot be read for a rule, in one sentence; None where they can."""
    devices = sorted({str(p.device) for p in parameters})
    if len(devices) < 2:
        return None
    return f"the model's parameters are on {' and '.join(devices)}, and gradients are read on one device."


def check_step(optimizer: Optimizer, applies: bool) -> None:
    """Raise where the rates of a step that begins would be frozen in it, for every step to come.

    Args:
        optimizer: Whose step.
        applies: Whether rates are changed, and not only watched.

    Raises:
        RuntimeError: Naming the optimizer and the reason.
    """
    if applies and torch.compiler.is_compiling():
        _refuse(optimizer, "is compiled: it would be compiled anew for every change of a rate")
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        _refuse(optimizer, "is captured in a CUDA graph: replays would keep the rates of this one")


@_disable_dynamo  # raised for real, not looked at by the compiler
def _refuse(optimizer: Optimizer, reason: str) -> None:
    raise RuntimeError(f"{type(optimizer).__name__} cannot take layerwise rates in a step that {reason}.")


def check_decoupled_decay(optimizer: Optimizer) -> None:
    """Raise where weight decay is part of the gradient, so that dividing it by the ratio would not undo the rate's."""
    if any(group.get("weight_decay") and not is_decoupled(optimizer, group) for group in optimizer.param_groups):
        raise ValueError(
            f"scale_weight_decay=False needs decoupled weight decay, as AdamW has; {type(optimizer).__name__} adds its "
            "weight decay to the gradient. Leave scale_weight_decay at True, or set weight_decay to 0."
        )
