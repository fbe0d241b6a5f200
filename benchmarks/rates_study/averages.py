"""What the steps of groups of layers do to the loss at averaged weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.rates_study.tasks import Task
from dynamon.layers import describe_layers
from dynamon.rates.groups import group_layers

WINDOW = 20  # steps of an average
PROBES = 6  # batches on which a reading is taken


class Averages:
    r"""Compares averages of the weights over successive windows, on batches that no step has seen.

    With :math:`\bar w` the averages, U what lies between two of them and g the gradient of the loss: a group's progress
    is :math:`-\langle g(\bar w_1) + g(\bar w_2), U \rangle / 2`, and its cost is the curvature of a window's deviation
    :math:`d = w - \bar w` from its average, :math:`\langle g(w) - g(\bar w), d \rangle`, half of which training pays
    in loss at each step.

    Args:
        task: Whose groups.
        model: The model that is trained.
        seed: Of the run.

    Attributes:
        progress: By quarter of the run and group, ``[4, G]``.
        cost: The same of the cost.
    """

    def __init__(self, task: Task, model: nn.Module, seed: int) -> None:
        """Form the groups."""
        self._task, self._model, self._globs = task, model, list(task.groups.values())
        layers = describe_layers(model)
        self._weights = [layer.parameter for layer in layers]
        self._group = np.zeros(len(layers), int)
        for group in group_layers(layers, self._globs):
            self._group[group.indices] = self._globs.index(group.label)
        self._probes = task.batches(seed + 5000)
        self._sum: list[Tensor] = []
        self._middle: list[Tensor] = []
        self._before: list[Tensor] = []
        self.progress, self.cost = np.zeros((4, len(self._globs))), np.zeros((4, len(self._globs)))

    def see(self, step: int) -> None:
        """Look at the weights after a step."""
        now = [weight.detach() for weight in self._weights]
        if step % WINDOW == 0:
            self._sum = [torch.zeros_like(weight) for weight in now]
        torch._foreach_add_(self._sum, now)
        if step % WINDOW == WINDOW // 2:
            self._middle = [weight.clone() for weight in now]
        if step % WINDOW == WINDOW - 1:
            self._read(min(4 * step // self._task.steps, 3), [total / WINDOW for total in self._sum])

    def _read(self, quarter: int, average: list[Tensor]) -> None:
        probes = [next(self._probes) for _ in range(PROBES)]
        here, deviation = self._gradients(average, probes), [m - a for m, a in zip(self._middle, average, strict=True)]
        self.cost[quarter] += self._along(self._gradients(self._middle, probes), deviation)
        self.cost[quarter] -= self._along(here, deviation)
        if self._before:
            apart = [after - before for after, before in zip(average, self._before, strict=True)]
            slopes = self._along(here, apart) + self._along(self._gradients(self._before, probes), apart)
            self.progress[quarter] -= slopes / 2
        self._before = average

    def _along(self, gradients: list[Tensor], direction: list[Tensor]) -> NDArray[np.float64]:
        """Inner products by group ``[G]``."""
        products = [float((g * d).sum()) for g, d in zip(gradients, direction, strict=True)]
        return np.bincount(self._group, products, len(self._globs))

    def _gradients(self, weights: list[Tensor], probes: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        with self._placed(weights):
            loss = sum((self._task.loss(self._model, batch) for batch in probes), torch.zeros(())) / len(probes)
            return list(torch.autograd.grad(loss, self._weights))

    @contextmanager
    def _placed(self, weights: list[Tensor]) -> Iterator[None]:
        own = [weight.data for weight in self._weights]
        buffers = {name: buffer.clone() for name, buffer in self._model.named_buffers()}
        try:
            for parameter, weight in zip(self._weights, weights, strict=True):
                parameter.data = weight
            yield
        finally:
            for parameter, weight in zip(self._weights, own, strict=True):
                parameter.data = weight
            for name, buffer in self._model.named_buffers():
                buffer.copy_(buffers[name])
