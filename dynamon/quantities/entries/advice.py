"""Advice: what :class:`dynamon.callbacks.RateAdvisor` reads of a step, from which ratios of rates are computed."""

from functools import partial

from dynamon.quantities.registry import Quantity, Scope

_per_group = partial(Quantity, unit="loss / step", scope=Scope.PER_LAYER, cadence="advice")

ADVICE = (
    _per_group(
        "advice/progress",
        "what the step of a group of layers takes off the loss of the next batch at the slope where it begins",
        words="progress by group",
    ),
    _per_group(
        "advice/coupling",
        "how much the step of one group changes the slope along that of another, for each pair of groups",
        words="coupling of groups",
    ),
)
