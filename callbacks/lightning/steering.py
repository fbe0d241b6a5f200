"""Which optimizers of a Trainer can be steered, and where a rule cannot have what it reads."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import numpy as np
from numpy.typing import NDArray
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from dynamon.callbacks.lightning.loop import TrainerLoop, callbacks_of
from dynamon.callbacks.lightning.strategy import strategy_reason
from dynamon.callbacks.monitor import Monitor
from dynamon.monitoring.accumulation import compares_ranks
from dynamon.monitoring.arguments import check_loss_fn
from dynamon.monitoring.messages import rank_zero_info, rank_zero_warn
from dynamon.optim import LayerwiseRates, several_devices_reason, steerable_layers, unsupported_reason
from dynamon.rates import Rule
from dynamon.rates.merging import RatioMerging


def check_steering(rule: object, lag: int, read_every: int, max_groups: int | None, loss_fn: object) -> None:
    """Raise ValueError or TypeError naming the argument that is wrong."""
    if not isinstance(rule, Rule):
        raise ValueError(f"rule must be a dynamon.rates.Rule, got {type(rule).__name__}.")
    if lag not in (0, 1):
        raise ValueError(f"lag must be 0 or 1, got {lag}.")
    if type(read_every) is not int or read_every < 1:
        raise ValueError(f"read_every must be a whole number of 1 or more, got {read_every!r}.")
    if max_groups is not None:
        RatioMerging(max_groups)  # checks it
    if loss_fn is not None:
        check_loss_fn(loss_fn)


def holds_some_of(module: nn.Module, optimizer: Optimizer) -> bool:
    """Return whether an optimizer moves parameters of the module; one that stands in for none does not."""
    own = {id(p) for p in module.parameters()}
    groups = getattr(optimizer, "param_groups", None)
    return groups is None or any(id(p) in own for group in groups for p in group["params"])


def can_be_steered(module: nn.Module, optimizer: Optimizer) -> bool:
    """Return whether an optimizer holds layers that can be steered, or may when lazy modules have seen a batch."""
    waits = any(is_lazy(p) for group in optimizer.param_groups for p in group["params"])
    return unsupported_reason(optimizer) is None and (waits or bool(steerable_layers(module, optimizer)))


def wants_parts(rule: Rule) -> bool:
    """Return whether a rule compares independent gradients."""
    return getattr(rule, "source", "") == "independent"


def unsteerable_reason(rule: Rule, loop: TrainerLoop) -> str | None:
    """Return why a rule cannot steer a run at all; None where it can."""
    return strategy_reason(loop.trainer) or _no_parts(rule, loop) or _spread(rule, loop.module)


def _no_parts(rule: Rule, loop: TrainerLoop) -> str | None:
    """Return why a rule that compares independent gradients cannot have them; None where it can."""
    if not wants_parts(rule):
        return None
    if not loop.knows_windows:
        return "source='independent' needs automatic optimisation, which says where an accumulation window begins."
    if compares_ranks(loop):
        return None
    if loop.world_size > 1 and not loop.sums_gradients:
        return (
            f"source='independent' compares the processes of a DDP run, and this is {loop.strategy}; take 'successive'."
        )
    if loop.longest_window < 2:
        return (
            "source='independent' compares halves of an accumulation window, or processes under DDP; "
            "set accumulate_grad_batches=2 or more."
        )
    return None


def _spread(rule: Rule, module: nn.Module) -> str | None:
    """Return why the gradients that a rule wants cannot be read together; None where they can, or it wants none."""
    if not rule.needs_gradients:
        return None
    return several_devices_reason(p for p in module.parameters() if p.requires_grad and not is_lazy(p))


def noise_is_shown(trainer: pl.Trainer) -> bool:
    """Return whether a monitor in the Trainer logs the noise of each layer."""
    monitors = (callback for callback in callbacks_of(trainer) if isinstance(callback, Monitor))
    return any(monitor.measures("noise/dual") for monitor in monitors)


def say_unsteered(steering: str, module: nn.Module, left_alone: Sequence[Optimizer]) -> bool:
    """Say which weights a rule leaves alone; return whether there are any."""
    names = [name for name, p in module.named_parameters() if p.is_complex() and p.requires_grad]
    if names:
        rank_zero_info(f"{steering}: {len(names)} complex weights keep ratio 1, first {names[0]}.")
    alone = [optimizer for optimizer in left_alone if holds_some_of(module, optimizer)]
    reasons = [reason for optimizer in alone if (reason := unsupported_reason(optimizer)) is not None]
    if alone and not reasons:
        rank_zero_warn(
            f"{steering} does not steer {len(alone)} of the optimizers: they hold no real floating point weights of "
            "the module."
        )
    for reason in reasons:
        rank_zero_warn(f"{steering} leaves the rates of an optimizer alone: {reason}")
    return bool(names or alone)


def headlines(base: Collection[float], steered: Iterable[LayerwiseRates], overhead: float) -> dict[str, float]:
    """Return the largest base rate, the smallest where groups have different ones, layers at bounds, and the cost."""
    highest, lowest = max(base), min(base)
    bounded = float(sum(rates.rule.bounded() for rates in steered))
    found = {"lr/base": highest} if lowest == highest else {"lr/base": highest, "lr/base_min": lowest}
    return found | {"lr/bounded": bounded, "dynamon/steering_overhead": overhead}


def rates_and_ratios(
    steered: Mapping[Optimizer, LayerwiseRates], in_force: Mapping[Optimizer, Mapping[str, float]]
) -> tuple[dict[str, float], dict[str, float]]:
    """Return base rate and ratio of every layer, by name.

    All optimizers each time, also those that did not step: rows of a table must line up.

    Args:
        steered: What steers each optimizer.
        in_force: Base rates of the step, for those that stepped.
    """
    base: dict[str, float] = {}
    ratio: dict[str, float] = {}
    for optimizer, rates in steered.items():
        base |= in_force.get(optimizer) or rates.base_rates()
        ratio |= rates.asked if optimizer in in_force else rates.wanted
    return base, ratio


def noise_row(steered: Sequence[LayerwiseRates], names: Sequence[str]) -> NDArray[Any]:
    """Return the noise that the rules follow, for these layers; NaN where there is none."""
    estimators = [rates.rule.noise for rates in steered if rates.rule.noise is not None]
    known = {n: v for noise in estimators for n, v in zip(noise.names, noise.values, strict=True)}
    return np.array([known.get(name, np.nan) for name in names])
