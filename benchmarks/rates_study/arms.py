"""The arms of the study that steer: the rule of each, and controls that keep one part of another rule."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.rates_study.tasks import Task
from dynamon.layers import Layer, describe_layers
from dynamon.norms import Norm, update_norm
from dynamon.optim.lanton import RADII
from dynamon.quantities.progress import StepReading
from dynamon.rates import BalancedRates, FixedRates, HeavyTailRates, NoiseAdaptiveRates, Rule, disparity_rates
from dynamon.rates.groups import group_layers

WIDE = {"low": 1 / 8, "high": 8.0}  # what was the default when these arms were run
EVERY = 10  # steps between two readings when following; runs of some hundred steps cannot wait for more


class MeanOnly(Rule):
    """Every layer takes the mean ratio of all: what is left of following is how the mean moves."""

    needs_probe = True

    def __init__(self, inner: BalancedRates) -> None:
        """Wrap the rule."""
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        """Ask and learn what the rule asks and learns."""
        return getattr(self._inner, name)

    def start(self, layers: Sequence[Layer], norms: Sequence[Norm]) -> None:
        """Form the groups."""
        super().start(layers, norms)
        self._inner.start(layers, norms)

    def begin_step(self) -> None:
        """Count the step."""
        self._inner.begin_step()

    def ratios(self) -> NDArray[Any]:
        """The geometric mean for all."""
        ratios = self._inner.ratios()
        return np.full_like(ratios, np.exp(np.log(ratios).mean()))


class Observed(FixedRates):
    """Holds ratios, and adds up what the groups' steps do to the loss, in each quarter of the run.

    Args:
        task: Whose groups.
        ratios: Of the groups.
    """

    needs_probe, pilot = True, None

    def __init__(self, task: Task, ratios: tuple[float, ...]) -> None:
        """Hold the ratios."""
        globs = list(task.groups.values())
        super().__init__(dict(zip(globs, ratios or [1.0] * len(globs), strict=True)))
        self._globs, self.steps, self._length = globs, 0, task.steps
        self.progress, self.cost = np.zeros((4, len(globs))), np.zeros((4, len(globs)))

    def start(self, layers: Sequence[Layer], norms: Sequence[Norm]) -> None:
        """Form the groups."""
        super().start(layers, norms)
        groups = group_layers(layers, self._globs)
        self._place = {layers[i].name: self._globs.index(group.label) for group in groups for i in group.indices}

    def begin_step(self) -> None:
        """Count the step."""
        self.steps += 1

    def asks_for(self) -> str | None:
        """A reading every four steps."""
        return None if self.steps % 4 else "step"

    def learn(self, reading: StepReading) -> None:
        """Add it up."""
        quarter = min(4 * self.steps // self._length, 3)
        for name, progress, cost in zip(reading.names, reading.first_order, reading.curvature_cost, strict=True):
            self.progress[quarter, self._place[name]] += progress
            self.cost[quarter, self._place[name]] += cost


def progress_by_cost(runs: Sequence[Mapping[str, Any]], quarters: slice = slice(None)) -> NDArray[Any]:
    """Progress by curvature of each group over that of the whole step, from observed runs: what balance makes 1.

    Args:
        runs: What runs have found.
        quarters: Which quarters of the runs count.

    Returns:
        ``[G]``: the geometric mean over the quarters, of which early ones would else outweigh the others. Within 1/4
        and 4, also where a group makes no progress or spends no curvature.
    """
    progress, cost = (np.sum([run[key] for run in runs], 0)[quarters] for key in ("progress", "cost"))
    whole = progress.sum(1) / np.maximum(cost.sum(1), 1e-12)
    quotient = progress / np.maximum(cost, 1e-12) / whole[:, None]
    return np.asarray(np.exp(np.log(np.clip(quotient, 0.25, 4.0)).mean(0)))


class StepSizes(Rule):
    """Holds one rate, and measures how far each layer steps in the norm in which Lanton steps.

    Args:
        task: Whose groups.
    """

    def __init__(self, task: Task) -> None:
        """Measure nothing yet."""
        self._globs, self._steps = list(task.groups.values()), 0

    def start(self, layers: Sequence[Layer], norms: Sequence[Norm]) -> None:
        """Choose the norms."""
        super().start(layers, norms)
        self._norms = [update_norm(layer, "spectral") for layer in layers]
        self._sizes = torch.zeros(len(layers))
        self._before: list[Tensor] = []

    def begin_step(self) -> None:
        """Measure every eighth step."""
        now = [layer.parameter.detach() for layer in self.layers]
        if self._before:
            steps = zip(self._norms, now, self._before, strict=True)
            self._sizes += torch.stack([norm.primal(after - before) for norm, after, before in steps])
        self._before = [] if self._steps % 8 else [weight.clone() for weight in now]
        self._steps += 1

    def ratios(self) -> NDArray[Any]:
        """One rate."""
        return np.ones(len(self.layers))

    def found(self) -> NDArray[Any]:
        """Ratios of the groups with which steps would relate as those of Lanton, their geometric mean 1."""
        inputs = [layer.matrix_shape[-1] if layer.role == "head" else 1 for layer in self.layers]
        wanted = np.array([RADII[layer.role] / n for layer, n in zip(self.layers, inputs, strict=True)])
        logs = np.log(wanted / self._sizes.numpy())
        groups = {group.label: logs[group.indices].mean() for group in group_layers(self.layers, self._globs)}
        means = np.array([groups[glob] for glob in self._globs])
        return np.asarray(np.exp(means - means.mean()))


def _following(task: Task, model: nn.Module) -> BalancedRates:
    return BalancedRates(list(task.groups.values()), every=EVERY, **WIDE)


def _pilot(task: Task, **bounds: float) -> BalancedRates:
    every = max(1, task.steps // 100)
    return BalancedRates(list(task.groups.values()), pilot=3 * task.steps // 4, every=every, **bounds)


RULES: Mapping[str, Callable[[Task, nn.Module], Rule]] = {
    "following": _following,
    "mean only": lambda task, model: MeanOnly(_following(task, model)),
    "inside": lambda task, model: BalancedRates(list(task.groups.values()), pilot=max(12, task.steps // 4), **WIDE),
    "pilot": lambda task, model: _pilot(task, **WIDE),
    "pilot within 2": lambda task, model: _pilot(task, low=0.5, high=2.0),
    "noise": lambda task, model: NoiseAdaptiveRates(),
    "LLR": lambda task, model: HeavyTailRates(),
    "blockwise": lambda task, model: disparity_rates(describe_layers(model)),
}


def rule_of(arm: str, task: Task, model: nn.Module, ratios: tuple[float, ...]) -> Rule | None:
    """The rule of a run; None where all layers have the base rate."""
    if arm == "step sizes":
        return StepSizes(task)
    if arm == "observed":
        return Observed(task, ratios)
    if arm not in ("fixed", "averaged"):
        return RULES[arm](task, model)
    if all(ratio == 1 for ratio in ratios):
        return None
    return FixedRates(dict(zip(task.groups.values(), ratios, strict=True)))


def inverted(ratios: tuple[float, ...]) -> tuple[float, ...]:
    """What should go up goes down."""
    return tuple(1 / ratio for ratio in ratios)


def permuted(ratios: tuple[float, ...]) -> tuple[float, ...]:
    """The right ratios on the wrong groups: turned round by half."""
    half = len(ratios) // 2
    return ratios[half:] + ratios[:half]
