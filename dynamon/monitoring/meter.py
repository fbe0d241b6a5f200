"""A meter: measures one group of quantities and hands them to the recorder."""

from abc import ABC
from collections import deque
from collections.abc import Mapping
from functools import partial
from statistics import mean
from typing import Any

from torch.optim import Optimizer

from dynamon.board.custom_scalars import Layout
from dynamon.monitoring.cadence import Cadence
from dynamon.monitoring.planner import Plan
from dynamon.monitoring.run_context import RunContext

_RECENT = 8  # measurements whose time tells that of the next one
FULL_EVERY = 10  # readings between two that take what is dear: full spectra, histograms


class Meter(ABC):
    """One group of quantities: measures them and hands them to the recorder.

    Every method is called with failures caught; see :class:`dynamon.callbacks.Monitor`.

    Attributes:
        name: Name of the group, under which its time is booked.
        tags: Every scalar tag it writes, with what it is.
        quantities: Every per-layer quantity, likewise.
        histograms: Every per-layer histogram it can write, likewise.
        panels: Its charts.
    """

    name: str
    begins_before = 0  # steps before the one that is measured
    tags: Mapping[str, str] = {}
    quantities: Mapping[str, str] = {}
    histograms: Mapping[str, str] = {}
    panels: Layout = {}

    def __init__(self, cadence: Cadence) -> None:
        """Remember when to measure."""
        self.cadence = cadence
        self.cadence.lead = self.begins_before
        self.points = 0  # measurements, those before a resume included
        self._timed = 0  # those of this fit, whose time is known
        self._took: deque[float] = deque(maxlen=_RECENT)  # seconds of the last of them
        self._spent = 0.0  # seconds of all so far

    def expected(self, run: RunContext) -> float | None:
        """Return the seconds that the next measurement will take; None where nothing tells yet.

        The mean of those taken lately, or a share of a step's time for the first. The first loads modules, makes
        handles and compiles: once there are others it is not in the mean.
        """
        return mean(self._took) if self._took else run.seconds_per_step / 10

    def done(self, run: RunContext) -> None:
        """A measurement is complete."""
        self.points += 1
        self._timed += 1
        spent = run.budget.spent_on.get(self.name, 0.0)
        self._took.append(spent - self._spent)
        self._spent = spent
        if self._timed == 2:
            self._took.popleft()
        self.cadence.read(run.step)

    def is_due(self, run: RunContext) -> bool:
        """Return whether this step is measured."""
        return self.cadence.is_due(run.step)

    def plans(self, run: RunContext) -> list[Plan]:
        """Return what the planner has to know of this group, and of what is taken along with it now and then."""
        return [Plan(self.name, self.cadence, partial(self.expected, run), self.is_off)]

    def is_off(self) -> bool:
        """Return whether it does not measure in this run."""
        return False

    def is_missed(self) -> bool:
        """Return whether the budget alone kept it from ever measuring."""
        return not self.points and self.cadence.every_n_steps is None

    def missed_reason(self) -> str | None:
        """Return why it never measured, in one sentence; None where it has, or where it is not known here."""
        return None

    def resume(self, run: RunContext, state: dict[str, Any]) -> None:
        """Take up a saved state."""
        self.load_state_dict(state)

    def start(self, run: RunContext) -> None:
        """Training is about to begin: say in one sentence what cannot work."""

    def batch_start(self, run: RunContext, batch: Any) -> None:
        """A batch has arrived on the device."""

    def before_backward(self, run: RunContext) -> None:
        """A backward pass begins."""

    def after_backward(self, run: RunContext) -> None:
        """A backward pass is over, not always the last before the optimizer's step."""

    def before_step(self, run: RunContext, optimizer: Optimizer) -> None:
        """Gradients are accumulated, reduced, unscaled and not yet clipped."""

    def at_step(self, run: RunContext, optimizer: Optimizer) -> None:
        """Gradients are as the step uses them, clipped ones; once for each evaluation of its closure."""

    def batch_end(self, run: RunContext) -> None:
        """A batch is over in which a step was begun; ``run.steps`` knows whether it was taken."""

    def is_idle(self, run: RunContext) -> bool:
        """Return whether nothing has to be seen of the steps before the next measurement."""
        return True

    def lapse(self, run: RunContext) -> None:
        """Forget what was kept for a comparison: steps pass that are not seen."""

    def end(self, run: RunContext) -> None:
        """Training is over, or was stopped by an exception: leave no hook behind. No collectives here."""

    def make_room(self, run: RunContext) -> str | None:
        """Take less memory after it ran out in a measurement; one sentence the first time, else None."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it up, in place of all that was learned since: before the run has started, or in the middle of it."""
