"""Read from an optimizer's state which step it computed, before the weight's dtype rounded it."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dynamon.distributed.dtensor import is_sharded, to_local, to_local_as
from dynamon.layers.complex_pairs import as_real
from dynamon.optim.stepping import wrapped_optimizers
from dynamon.quantities.precision import ComputedStep
from dynamon.quantities.weight_decay import decays_first

_AVERAGES = ("exp_avg", "momentum_buffer", "grad_avg", "momentum")  # averages of gradients, by their usual names
_KEPT = re.compile("kahan|compens|shift|residual|remainder|master|fp32|float32")
_ROUNDS = re.compile("kahan|compens|stochastic_round|master_weight")


def computed_step(
    optimizer: Optimizer,
    group: Mapping[str, Any],
    parameter: Tensor,
    before: Tensor,
    gradient: Tensor | None,
    rate: float,
    shrink: float,
) -> ComputedStep | None:
    r"""Read the step that an optimizer has just computed.

    The step itself is known of SGD with momentum, Adam and AdamW (AMSGrad, and classes derived from them, included),
    and of SGD without momentum from the gradient. Of others it is known where it is zero: where the average of the
    gradients is zero, or where there is none, the gradient.

    Args:
        optimizer: The optimizer, after its step.
        group: The group of the parameter.
        parameter: The parameter.
        before: What this process held of it before the step.
        gradient: The gradient that the step used; None where that is not known.
        rate: The learning rate in force.
        shrink: The rate times decoupled decay in force.

    Returns:
        The step; None where nothing tells whether it is zero. Nothing is copied.
    """
    holders = (optimizer, *wrapped_optimizers(optimizer))
    state: Mapping[str, Any] = next((found for each in holders if (found := each.state.get(parameter))), {})
    moments = {name: value for name, value in state.items() if _is_moment(value, parameter)}
    first = next((moments[name] for name in _AVERAGES if name in moments), None)
    second = moments.get("max_exp_avg_sq", moments.get("exp_avg_sq"))
    factors = _adam(optimizer, group, rate) if first is not None and second is not None and "step" in state else None
    uses_gradient = factors is None and (first is None or isinstance(optimizer, torch.optim.SGD) and group["nesterov"])
    if factors is None:
        second, factors = None, _sgd(optimizer, group, rate, first is not None)
    if uses_gradient and gradient is None:
        if first is None:
            return None
        uses_gradient, factors = False, None
    is_known = factors is not None
    if factors is None:  # zero where the average is, or without one where the gradient is
        factors = (float(rate != 0), float(rate != 0), 0.0, 0.0, 1.0, 0.0, 0.0)
    now = as_real(to_local(parameter))
    return ComputedStep(
        before=as_real(before),
        now=now,
        first=None if first is None else _here(first, parameter),
        second=None if second is None else _here(second, parameter),
        gradient=_here(gradient, parameter) if uses_gradient and gradient is not None else None,
        factors=(*factors, shrink, _kept_by_decay(group, now, shrink)),
        count=1.0 if second is None else state["step"],
        is_known=is_known,
        decays_first=decays_first(optimizer, group),
        keeps=keeps_remainders(optimizer, group, state),
    )


def keeps_remainders(optimizer: Optimizer, group: Mapping[str, Any], state: Mapping[str, Any]) -> bool:
    """Return whether an optimizer says by its names that it keeps what rounding takes, or rounds without bias."""
    settings = {**vars(optimizer), **group}
    return any(_KEPT.search(name.lower()) and isinstance(value, Tensor) for name, value in state.items()) or any(
        _ROUNDS.search(name.lower()) and isinstance(value, bool) and value for name, value in settings.items()
    )


def _adam(optimizer: Optimizer, group: Mapping[str, Any], rate: float) -> tuple[float, ...] | None:
    if not isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        return None
    beta1, beta2 = map(float, group["betas"])
    return rate, 0.0, 0.0, 1.0, float(group["eps"]), beta1, beta2


def _sgd(optimizer: Optimizer, group: Mapping[str, Any], rate: float, has_average: bool) -> tuple[float, ...] | None:
    if not isinstance(optimizer, torch.optim.SGD):
        return None
    if has_average and not group.get("nesterov"):
        return rate, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0
    signed = -rate if group.get("maximize") else rate  # averages have the sign already
    ahead, decay = float(group["momentum"]) if has_average else 0.0, float(group.get("weight_decay", 0.0))
    return rate * ahead, signed, rate * decay, 0.0, 1.0, 0.0, 0.0


def _kept_by_decay(group: Mapping[str, Any], weight: Tensor, shrink: float) -> float:
    """Return what a weight is multiplied by: on a CPU, foreach functions round the number to the weight's dtype."""
    rounds = weight.device.type == "cpu" and group.get("foreach", True) and not group.get("fused")
    return float(torch.tensor(1 - shrink, dtype=weight.dtype)) if rounds else 1 - shrink


def _is_moment(found: Any, parameter: Tensor) -> bool:
    """Return whether a state can be compared with a parameter entry by entry: a tensor of its kind, or sharded."""
    return (
        isinstance(found, Tensor)
        and (type(found) is type(parameter.detach()) or is_sharded(found))
        and found.shape == parameter.shape
        and found.device == parameter.device
        and (found.is_floating_point() or found.is_complex())
        and found.is_complex() == parameter.is_complex()
    )


def _here(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return what this process holds of a tensor of the parameter's shape."""
    tensor = tensor.detach()
    return as_real(to_local_as(tensor.to_dense() if tensor.is_sparse else tensor, parameter))
