"""A meter: one group of quantities, when it is measured, and what it may know of the run."""

import math
from abc import ABC
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from torch.optim import Optimizer

from dynamon.callbacks.base import is_tryout
from dynamon.callbacks.budget import Budget
from dynamon.callbacks.recorder import Recorder
from dynamon.layers import Layer, describe_layers
from dynamon.panels import Layout

PAUSE_AFTER = 3  # failures in a row


class Run:
    """What a meter may know of the run it measures.

    Attributes:
        trainer: The Trainer.
        module: The LightningModule.
        budget: Times measurements.
        recorder: Takes readings.
        all_layers: Every layer of the module.
        layers: Those that per-layer readings are wanted for.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        budget: Budget,
        recorder: Recorder,
        layers: list[Layer],
    ) -> None:
        """Remember them."""
        self.trainer, self.module, self.budget, self.recorder = trainer, module, budget, recorder
        self.all_layers = describe_layers(module)
        self.layers = layers

    @property
    def step(self) -> int:
        """The x axis of Lightning's own monitors; constant from the start of a batch to its end."""
        return self.trainer.fit_loop.epoch_loop._batches_that_stepped

    @property
    def trying_out(self) -> bool:
        """Whether this is a ``fast_dev_run``, in which everything is measured at once."""
        return is_tryout(self.trainer)

    @property
    def seconds_per_step(self) -> float:
        """Mean training time of a step, measurements not counted."""
        return self.budget.training / max(self.steps_seen, 1)

    steps_seen = 0  # optimizer steps since training began
    failures = 0  # of single quantities in measurements that went on without them
    strict = False  # whether a failure is to be raised

    @contextmanager
    def charge(self, name: str) -> Iterator[None]:
        """Book the time inside to a measurement."""
        with self.budget.charge(name, cuda=self.module.device.type == "cuda"):
            yield


class Cadence:
    """When a meter measures.

    Args:
        every_n_steps: At every step that is a multiple of this, whatever it costs. None leaves it to the
            budget.
        interval: Steps between two measurements at least, when the budget decides.
        share: Part of the budget this meter may use; 1 takes what the others leave.
    """

    def __init__(self, every_n_steps: int | None, interval: int, share: float) -> None:
        """Nothing measured yet."""
        self.every_n_steps, self.interval, self.share = every_n_steps, interval, share
        self.last = -math.inf

    def due(self, run: Run, name: str, expected: float, step: int) -> bool:
        """Whether to measure at ``step``."""
        if run.trying_out:
            return True
        if self.every_n_steps is not None:
            return step % self.every_n_steps == 0
        return step - self.last >= self.interval and run.budget.allows(name, expected, self.share)


class Meter(ABC):
    """One group of quantities: measures them and hands them to the recorder.

    Every method is called with failures caught; see :class:`Monitor`.

    Attributes:
        name: Name of the group, under which its time is booked.
        tags: Every scalar tag it writes, with what it is.
        quantities: Every per-layer quantity, likewise.
        panels: Its charts.
    """

    name: str
    tags: Mapping[str, str] = {}
    quantities: Mapping[str, str] = {}
    panels: Layout = {}

    def __init__(self, cadence: Cadence) -> None:
        """Remember when to measure."""
        self.cadence = cadence
        self.points = 0

    def expected(self, run: Run) -> float:
        """Seconds the next measurement will take: the mean so far, or a step's time for the first."""
        if not self.points:
            return run.seconds_per_step / 10
        return run.budget.spent_on.get(self.name, 0.0) / self.points

    def done(self, run: Run) -> None:
        """A measurement is complete."""
        self.points += 1
        self.cadence.last = run.step

    def is_missed(self) -> bool:
        """Whether the budget alone kept it from ever measuring."""
        return not self.points and self.cadence.every_n_steps is None

    def start(self, run: Run) -> None:
        """Training is about to begin: say in one sentence what cannot work."""

    def batch_start(self, run: Run, batch: Any) -> None:
        """A batch has arrived on the device."""

    def before_step(self, run: Run, optimizer: Optimizer) -> None:
        """Gradients are accumulated, reduced, unscaled and not yet clipped."""

    def batch_end(self, run: Run) -> None:
        """The optimizer has stepped."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it up; the run may not have started yet."""
