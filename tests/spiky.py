"""Runs with steps that are spikes, under a sentinel that is alone."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tests.helpers import Classifier

NEVER = 10**6
QUIET = {
    "every_n_steps": NEVER,
    "quantities": ["critical"],
    "strict": True,
}  # nothing but the sentinel looks after step 0


class Spiky(Classifier):
    """At some steps the inputs are a thousand times as large."""

    def __init__(self, *arguments: Any, at: tuple[int, ...] = (), times: float = 1000.0, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.at, self.times, self.norms = at, times, []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs = batch[0] * (self.times if self.trainer.fit_loop.epoch_loop._batches_that_stepped in self.at else 1)
        return cross_entropy(self.network(inputs), batch[1])

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        gradients = [p.grad for p in self.parameters() if p.grad is not None and not p.grad.is_sparse]
        self.norms.append([float(torch.linalg.vector_norm(g)) for g in gradients])


class OneOfFour(Classifier):
    """Of windows of four batches, one batch of step 50 has inputs that are a thousand times as large."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        is_bad = self.trainer.global_step == 50 and batch_idx % 4 == 2
        return cross_entropy(self.network(batch[0] * (1000 if is_bad else 1)), batch[1])


def relu() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))


def found(monitor: Any) -> list[int]:
    history = monitor.history
    return history["spike/batch"].steps.tolist() if "spike/batch" in history else []
