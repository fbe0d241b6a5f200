"""Read from an optimizer's state which step it computed, before the weight's dtype rounded it."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dynamon.distributed.dtensor import to_local, to_local_as
from dynamon.layers.complex_pairs import as_real
from dynamon.optim.stepping import wrapped_optimizers
from dynamon.quantities.precision import ComputedStep
from dynamon.quantities.weight_decay import decays_first

_MOMENTS = ("exp_avg", "momentum_buffer", "grad_avg", "momentum")  # averages of gradients, by their usual names
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
    state = next((found for each in holders if (found := each.state.get(parameter))), {})
    own = None if gradient is None else _here(gradient, parameter)
    first = next((_here(state[name], parameter) for name in _MOMENTS if _is_moment(state.get(name), parameter)), None)
    now = as_real(to_local(parameter))
    factors, second = _adam(optimizer, group, state, rate), None
    if factors is not None and first is not None:
        name = "max_exp_avg_sq" if "max_exp_avg_sq" in state else "exp_avg_sq"
        second, own = _here(state[name], parameter), None
    else:
        factors = _sgd(optimizer, group, rate, first is not None)
        if factors is not None and factors[1] and own is None:
            factors = None
    is_known = factors is not None
    if factors is None:  # zero where the average is, or without one where the gradient is
        own = None if first is not None else own
        factors = (float(rate != 0), float(rate != 0), 0.0, 0.0, 1.0, 0.0, 0.0)
    elif first is not None and not factors[1]:
        own = None
    if first is None and own is None:
        return None
    return ComputedStep(
        before=as_real(before),
        now=now,
        first=first,
        second=second,
        gradient=own,
        factors=(*factors, shrink, _kept_by_decay(group, now, shrink)),
        count=state.get("step", 1.0),
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


def _adam(
    optimizer: Optimizer, group: Mapping[str, Any], state: Mapping[str, Any], rate: float
) -> tuple[float, ...] | None:
    if not isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW) or not {"exp_avg_sq", "step"} <= set(state):
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
    return isinstance(found, Tensor) and found.shape == parameter.shape


def _here(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return what this process holds of a tensor of the parameter's shape."""
    tensor = tensor.detach()
    return as_real(to_local_as(tensor.to_dense() if tensor.is_sparse else tensor, parameter))
