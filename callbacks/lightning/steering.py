"""Which optimizers of a Trainer can be steered, and where a rule cannot have what it reads."""

from collections.abc import Collection, Sequence

import lightning.pytorch as pl
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from dynamon.callbacks.lightning.loop import TrainerLoop, callbacks_of
from dynamon.callbacks.lightning.strategy import strategy_reason
from dynamon.callbacks.monitor import Monitor
from dynamon.monitoring.accumulation import compares_ranks
from dynamon.monitoring.messages import rank_zero_info, rank_zero_warn
from dynamon.optim import several_devices_reason, steerable_layers, unsupported_reason
from dynamon.rates import Rule


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


def range_of_rates(rates: Collection[float]) -> dict[str, float]:
    """Return the largest base rate, and the smallest where groups have different ones."""
    highest, lowest = max(rates), min(rates)
    return {"lr/base": highest} if lowest == highest else {"lr/base": highest, "lr/base_min": lowest}
