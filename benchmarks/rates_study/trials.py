"""Ratios of groups from trials: short forks of one run, each with its rates lowered to zero at its end."""

import copy
from typing import Any

import torch

from benchmarks.rates_study.oracle import coordinate_search
from benchmarks.rates_study.tasks import Task
from dynamon.optim import LayerwiseRates
from dynamon.rates import FixedRates

BEGIN = 0.25  # of the run, after which it is forked
LENGTH = 0.15  # of the run: the first half of a fork at the rate of that step, the second down to zero
PROBES = 100  # batches on which forks are compared, and which none of them has seen


class Trials:
    """Forks a run.

    Args:
        task: What is trained.
        rate: Base rate.
        seed: Of the weights and the batches.
    """

    def __init__(self, task: Task, rate: float, seed: int) -> None:
        """Train up to where the run is forked."""
        self._task, self._rate, self._seed = task, rate, seed
        model, stream = task.model(seed), task.batches(seed)
        optimizer = task.optimizer(model, rate)
        for step in range(round(BEGIN * task.steps)):
            self._now = rate * task.factor(step)
            self._step(model, optimizer, self._now, next(stream))
        self._state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        self._batches = [next(stream) for _ in range(round(LENGTH * task.steps))]
        self._probes = [next(stream) for _ in range(PROBES)]

    def _step(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, rate: float, batch: Any) -> None:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        self._task.loss(model, batch).backward()
        self._task.clip(model)
        optimizer.step()

    def loss(self, ratios: tuple[float, ...]) -> float:
        """The loss at the end of a fork with some ratios."""
        model = self._task.model(self._seed)
        optimizer = self._task.optimizer(model, self._rate)
        weights, state = copy.deepcopy(self._state)
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
        rule = FixedRates(dict(zip(self._task.groups.values(), ratios, strict=True)))
        steering = LayerwiseRates(optimizer, rule, model, max_groups=None)
        for place, batch in enumerate(self._batches):
            left = min(1.0, 2 * (1 - place / len(self._batches)))
            self._step(model, optimizer, self._now * left, batch)
        steering.remove()
        with torch.no_grad():
            return sum(float(self._task.loss(model, batch)) for batch in self._probes) / PROBES

    def found(self) -> tuple[float, ...]:
        """Ratios by coordinate search, two passes."""
        return coordinate_search(self.loss, len(self._task.groups))
