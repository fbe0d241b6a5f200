"""A meter: one group of quantities, when it is measured, and what it may know of the run."""

import math
from abc import ABC
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from torch.optim import Optimizer

from dynamon.board.custom_scalars import Layout
from dynamon.callbacks.base import is_tryout, step_of
from dynamon.callbacks.budget import Budget
from dynamon.callbacks.copies import copied
from dynamon.callbacks.decisions import Decisions, ranks_of
from dynamon.callbacks.layer_set import LayerSet
from dynamon.callbacks.recorder import Recorder
from dynamon.callbacks.stepping import Steps
from dynamon.distributed.dtensor import any_sharded
from dynamon.layers import Layer

PAUSE_AFTER = 3  # failures in a row
_FIRST_REST = 10  # readings that a paused measurement leaves out before it is tried again; then twice as many
FULL_EVERY = 10  # readings between two that take what is dear: full spectra, histograms


class Run:
    """What a meter may know of the run it measures.

    Attributes:
        trainer: The Trainer.
        module: The LightningModule.
        budget: Times measurements.
        recorder: Takes readings.
        ranks: The processes that measure together, this one alone where there is no other.
        decisions: When they measure under a budget.
        steps: Which optimizers really step.
        begun_at: The step at which this fit began.
        unsettled: What went wrong in a meter on this process and has yet to be said to the others, by its name.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        budget: Budget,
        recorder: Recorder,
        patterns: Sequence[str] | None = None,
    ) -> None:
        """Remember them, and read the layers."""
        self.trainer, self.module, self.budget, self.recorder = trainer, module, budget, recorder
        self._set = LayerSet(module, patterns)
        self.ranks, self.decisions = ranks_of(trainer, module), Decisions()
        self.steps = Steps(trainer, module, self.ranks, budget.waiting)
        self.begun_at = self.step
        self.unsettled: dict[str, Exception] = {}
        self._copies: dict[str, Tensor] = {}
        self._copied_at = (-1, -1)

    @property
    def all_layers(self) -> list[Layer]:
        """Every layer of the module that can be measured, as they are now."""
        return self._set.every

    @property
    def layers(self) -> list[Layer]:
        """Those that per-layer readings are wanted for."""
        return self._set.chosen

    @property
    def names(self) -> dict[int, str]:
        """Names of all layers by the ``id`` of their parameter, as they were when they were looked at last."""
        return self._set.names

    @property
    def layers_version(self) -> int:
        """A number that changes whenever the layers do."""
        return self._set.version

    def hook(self, optimizer: Optimizer | None = None) -> None:
        """A hook begins: what is measured in it and after it looks at the layers once more."""
        self._set.hook(optimizer)

    @property
    def step(self) -> int:
        """The x axis of Lightning's own monitors; constant from the start of a batch to its end."""
        return step_of(self.trainer)

    @property
    def is_sharded(self) -> bool:
        """Whether processes hold parameters in parts (FSDP2), so that every measurement takes all of them."""
        return any_sharded([layer.parameter for layer in self.all_layers])

    @property
    def trying_out(self) -> bool:
        """Whether this is a ``fast_dev_run``, in which everything is measured at once."""
        return is_tryout(self.trainer)

    def go_back(self) -> None:
        """Training goes on from an earlier step."""
        self.decisions, self.begun_at = Decisions(), min(self.begun_at, self.step)
        self.unsettled.clear()
        self.forget_copies()

    @property
    def seconds_per_step(self) -> float:
        """Mean training time of a step, measurements not counted."""
        return self.budget.training / max(self.steps_seen, 1)

    steps_seen = 0  # optimizer steps since training began
    failures = 0  # of single quantities in measurements that went on without them
    strict = False  # whether a failure is to be raised

    def copies(self, layers: Iterable[Layer]) -> dict[str, Tensor]:
        """Weights by layer name as they are before this optimizer step, copied once whoever asks; not to be written."""
        step = self.trainer.global_step, self.step
        if step != self._copied_at:
            self._copies, self._copied_at = {}, step
        own = {layer.name: layer.parameter for layer in layers}
        self._copies |= copied({name: p.detach() for name, p in own.items() if name not in self._copies})
        return {name: self._copies[name] for name in own}

    def forget_copies(self) -> None:
        """Leave the copies to those who hold them."""
        self._copies, self._copied_at = {}, (-1, -1)

    @contextmanager
    def charge(self, name: str, waits: bool = False) -> Iterator[None]:
        """Book the time inside to a measurement; ``waits`` where the host reads something of the device in it."""
        with self.budget.charge(name, self.module.device, waits):
            yield

    @contextmanager
    def together(self, name: str) -> Iterator[None]:
        """Book the time of a measurement that succeeds on all processes, or on none."""
        with self.charge(name, waits=True), self.ranks.collective_section():
            if name in self.unsettled:
                raise self.unsettled.pop(name)
            yield


def forget_frames(error: BaseException | None) -> None:
    """Let go of what the functions that failed held, graphs above all; the sentence of the error stays."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


class Failures:
    """What failed how often in a row, and rests for a while: what stopped it may pass by itself.

    After three failures in a row a name rests for 10 readings, after each further one for twice as long as before.

    Attributes:
        until: When what rests is tried again, by name.
    """

    def __init__(self) -> None:
        """Nothing failed."""
        self._in_a_row: dict[str, int] = {}
        self.until: dict[str, float] = {}

    def add(self, name: str, now: float, unit: float = 1.0) -> int:
        """One more failure, at ``now``; readings are ``unit`` apart. Returns how many there are in a row."""
        count = self._in_a_row[name] = self._in_a_row.get(name, 0) + 1
        if count >= PAUSE_AFTER:
            self.until[name] = now + unit * _FIRST_REST * 2 ** (count - PAUSE_AFTER)
        return count

    def clear(self, name: str) -> None:
        """It succeeded."""
        self._in_a_row.pop(name, None)
        self.until.pop(name, None)

    def rests(self, name: str, now: float) -> bool:
        """Whether it is left out at ``now``."""
        return now < self.until.get(name, -math.inf)


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
        self._passed = math.inf  # the step that was taken last

    @property
    def unit(self) -> int:
        """Steps between two readings, at least."""
        return self.every_n_steps or self.interval

    def begin(self, step: int) -> None:
        """A step is about to come: what was due before the first one is over."""
        if self._passed == math.inf:
            self._passed = step - 1

    def passed(self, step: int) -> None:
        """A step was taken: what was due by then is over."""
        self._passed = step

    def due(self, run: Run, name: str, expected: Callable[[Run], float], step: int) -> bool:
        """Whether to measure at ``step``; ``expected`` is asked only where the budget decides."""
        if run.trying_out:
            return True
        if self.every_n_steps is not None:
            # Where a step was none, the next one that is taken stands in for it.
            before = min(self._passed, step - 1) if step == run.step else step - 1
            return step // self.every_n_steps > before // self.every_n_steps
        if not self.is_free(step):
            return False
        if run.ranks.is_distributed and run.budget.fraction is not None:
            return run.decisions.allows(name, step)
        if run.budget.is_spent:
            return False
        seconds = expected(run)
        self.claim(run, name, seconds, step)
        return run.budget.allows(name, seconds, self.share, step)

    def claim(self, run: Run, name: str, expected: float, step: int) -> None:
        """Tell the budget how long this has waited."""
        run.budget.claim(name, expected, step - max(self.last, run.begun_at), step, run.seconds_per_step)

    def go_back_to(self, step: int) -> None:
        """Training has gone back to before a step: what was measured at it or later was not."""
        self.last = self.last if self.last < step else -math.inf
        self._passed = self._passed if self._passed < step else step - 1

    def is_free(self, step: int) -> bool:
        """Whether the last measurement is far enough away."""
        return step - self.last >= self.interval

    def steps_to_wait(self, run: Run, name: str, expected: float, begins: bool, begins_before: int) -> float:
        """Steps until the next measurement can begin, after one at this step if ``begins``."""
        seconds = run.budget.seconds_to_wait(name, expected * (2 if begins else 1), self.share)
        free = self.interval if begins else self.last + self.interval - begins_before - run.step
        return max(free, math.ceil(seconds / max(run.seconds_per_step, 1e-9)), 1)


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
        self.points = 0  # measurements, those before a resume included
        self._timed = 0  # those of this fit, whose time is known
        self._first = 0.0  # seconds of the first of them

    def expected(self, run: Run) -> float:
        """Seconds the next measurement will take: the mean so far, or a share of a step's time for the first.

        The first loads modules, makes handles and compiles: once there are others it is not in the mean.
        """
        if not self._timed:
            return run.seconds_per_step / 10
        spent = run.budget.spent_on.get(self.name, 0.0)
        return spent if self._timed == 1 else max(spent - self._first, 0.0) / (self._timed - 1)

    def done(self, run: Run) -> None:
        """A measurement is complete."""
        self.points += 1
        self._timed += 1
        if self._timed == 1:
            self._first = run.budget.spent_on.get(self.name, 0.0)
        self.cadence.last = run.step

    def awaits_decision(self, run: Run) -> bool:
        """Whether it depends on the budget when this measures, and so on the first process's clock."""
        fixed = self.cadence.every_n_steps is not None or run.trying_out
        return not fixed and run.budget.fraction is not None and not self.is_off()

    def is_off(self) -> bool:
        """Whether it does not measure in this run."""
        return False

    def is_missed(self) -> bool:
        """Whether the budget alone kept it from ever measuring."""
        return not self.points and self.cadence.every_n_steps is None

    def resume(self, run: Run, state: dict[str, Any]) -> None:
        """Take up a saved state."""
        self.load_state_dict(state)

    def start(self, run: Run) -> None:
        """Training is about to begin: say in one sentence what cannot work."""

    def batch_start(self, run: Run, batch: Any) -> None:
        """A batch has arrived on the device."""

    def before_backward(self, run: Run) -> None:
        """A backward pass begins."""

    def after_backward(self, run: Run) -> None:
        """A backward pass is over, not always the last before the optimizer's step."""

    def before_step(self, run: Run, optimizer: Optimizer) -> None:
        """Gradients are accumulated, reduced, unscaled and not yet clipped."""

    def at_step(self, run: Run, optimizer: Optimizer) -> None:
        """Gradients are as the step uses them, clipped ones; once for each evaluation of its closure."""

    def batch_end(self, run: Run) -> None:
        """A batch is over in which a step was begun; ``run.steps`` knows whether it was taken."""

    def wake(self, run: Run) -> None:
        """It was paused and is tried again: what it kept is of another time."""

    def end(self, run: Run) -> None:
        """Training is over, or was stopped by an exception: leave no hook behind. No collectives here."""

    def make_room(self, run: Run) -> str | None:
        """Take less memory after it ran out in a measurement; one sentence the first time, else None."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it up, in place of all that was learned since: before the run has started, or in the middle of it."""


class PairMeter(Meter):
    """A meter whose readings compare two successive steps: what it needs of the first is kept there.

    At fixed steps the step before a reading is known. Under a budget a step at which a reading could be paid for is
    kept, and the next one is read.
    """

    begins_before = 1

    def __init__(self, cadence: Cadence) -> None:
        """Nothing kept."""
        super().__init__(cadence)
        self._keeping = False  # something of this step is kept
        self._armed = False  # something of the step before was

    def reads(self, run: Run) -> bool:
        """Whether this step is measured."""
        return self._planned(run, run.step) if self._is_fixed(run) else self._armed

    def keeps(self, run: Run) -> bool:
        """Whether the next step may be measured, so that it needs something of this one."""
        if self._is_fixed(run) or not self._armed:
            self._keeping = self._keeping or self._planned(run, run.step + 1)
        else:  # this step is read, and only without an interval can the next one be
            self._keeping = self.cadence.interval <= 1
        return self._keeping

    def wake(self, run: Run) -> None:
        """Nothing is kept."""
        self._keeping = self._armed = False

    def turn(self, run: Run) -> None:
        """The step is over: go on to the next."""
        kept, self._keeping = self._keeping, False
        was_read = self._armed and not self._is_fixed(run)
        self._armed = kept and (not was_read or self._planned(run, run.step + 1))

    def _planned(self, run: Run, step: int) -> bool:
        return self.cadence.due(run, self.name, self.expected, step)

    def _is_fixed(self, run: Run) -> bool:
        return self.cadence.every_n_steps is not None or run.trying_out

    @property
    def saves_copies(self) -> bool:
        """Whether checkpoints hold what was kept; a reading that a budget chose may go without a comparison."""
        return self.cadence.every_n_steps is not None

    def state_dict(self) -> dict[str, Any]:
        """How many readings there were, since every tenth is a full one, and whether the next step is one."""
        return {"points": self.points, "armed": self._armed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._keeping = False
        self.points, self._armed = int(state.get("points", 0)), bool(state.get("armed", False))
