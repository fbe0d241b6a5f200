"""What all monitors share: calling their meters, what happens when one fails, what is saved."""

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from dynamon.board.custom_scalars import Layout, chart_layout, merge_layouts
from dynamon.curvature.memory import empty_cache
from dynamon.distributed.ranks import ran_out_of_memory
from dynamon.health import LOSS_TAG, Finding
from dynamon.layers import Layer, is_measurable, known_layers, select
from dynamon.monitoring.accumulation import begin_windows
from dynamon.monitoring.base import DynamonCallback, SteeringError, callbacks_of, is_tryout, off_reason
from dynamon.monitoring.budget import Budget, overhead_of
from dynamon.monitoring.failures import PAUSE_AFTER, Failures, forget_frames
from dynamon.monitoring.health_watch import HealthWatch, StepLoss, histories_of
from dynamon.monitoring.meter import Meter
from dynamon.monitoring.rank_decisions import ranks_of
from dynamon.monitoring.recorder import Recorder, Row
from dynamon.monitoring.run_context import RunContext
from dynamon.monitoring.stepping import SkippedSteps
from dynamon.monitoring.watchers import warnings_of
from dynamon.quantities import quantities_of
from dynamon.quantities.names import plain_name
from dynamon.runs.history import History

_MEASURED = "Weights are measured in floating point of sixteen bits or more, and in complex64 and complex128."


class BadArgumentError(ValueError):
    """An argument that cannot be meant, found when training begins."""


class Monitor(DynamonCallback):
    """A thin shell around meters: calls them, catches what goes wrong, saves their state.

    Args:
        make_meters: Makes what measures, anew for each fit.
        budget: Share of training time for all of it, or None.
        layers: Globs for the layers with readings of their own; ``!`` excludes.
        loggers: Loggers to write to, by (part of) class name, class or object; None for all.
        strict: Raise where a measurement fails, instead of warning.
    """

    def __init__(
        self,
        make_meters: Callable[[], list[Meter]],
        budget: float | None = 0.02,
        layers: Sequence[str] | None = None,
        loggers: Sequence[Any] | None = None,
        strict: bool = False,
    ) -> None:
        """Remember what to measure."""
        super().__init__()
        self._make_meters = make_meters
        self._fraction, self._patterns, self._loggers, self._strict = budget, layers, loggers, strict
        self._state: dict[str, Any] = {}
        self._panels: Layout | None = None  # where somebody has set them
        self._forget()

    @property
    def panels(self) -> Layout:
        """Charts of what the meters measure, for TensorBoard's Custom Scalars tab."""
        if self._panels is not None:
            return self._panels
        return merge_layouts([*(meter.panels for meter in self._meters), chart_layout(quantities_of("monitor"))])

    @panels.setter
    def panels(self, layout: Layout) -> None:
        self._panels = layout

    def _forget(self) -> None:
        """Begin like new: a callback may see several fits."""
        self._meters = self._make_meters()
        self._budget = Budget(self._fraction)
        self._recorder = Recorder(self._loggers, sum(len(m.quantities) for m in self._meters), self._strict)
        self._detach()
        self._run: RunContext | None = None
        self._failures = 0
        self._in_a_row, self._resting = Failures(), set[str]()
        self._causes: set[str] = set()
        self._skipped = SkippedSteps(type(self).__name__)
        self._measured = self._started = False
        self._next_step = 0
        self._health = HealthWatch(type(self).__name__)

    @property
    def history(self) -> History:
        """Everything measured so far, as arrays by quantity."""
        return self._recorder.history

    @property
    def findings(self) -> list[Finding]:
        """What looks wrong in what this monitor has measured so far, see :mod:`dynamon.health`; the worst first."""
        return self._health.findings(self.history)

    @property
    def overhead(self) -> float:
        """Time of monitoring over the training time without it, so far."""
        return self._budget.overhead

    @property
    def failures(self) -> int:
        """Measurements that failed so far, and calls of loggers that did."""
        return self._failures + self._recorder.failures + (0 if self._run is None else self._run.failures)

    def paused(self, meter: Meter) -> bool:
        """Whether a meter failed too often in a row, and has not waited long enough to be tried again."""
        if not self._in_a_row.until or self._run is None:  # asked many times a step
            return False
        return self._in_a_row.rests(meter.name, self._run.step)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the surroundings and say what is missing."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and not getattr(trainer, "barebones", False):
            self._recorder.check(trainer)

    def begin_turn(self, goes_on: bool) -> None:
        """Begin anew; a fit that goes on takes up what was there, as from a checkpoint, and keeps history and clock."""
        if not self._is_given:
            self._state = {}
        if not goes_on or self._run is None or self._run.is_sharded:  # parts of weights are not put together here
            self._forget()
            return
        self._state = self.state_dict()
        self._failures += self._run.failures
        self._in_a_row, self._resting = Failures(), set[str]()
        self._run.failures = 0
        self._forget_step()

    def _forget_step(self) -> None:
        """Whatever is known of a step that did not come to its end, or is undone."""
        self._measured = False
        if self._run is not None:
            self._run.steps.forget()
        self._recorder.forget_step()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the layers, start the meters, write the panels."""
        begin_windows(trainer)
        with self._budget.watch():
            steps_seen, self._run = (0 if self._run is None else self._run.steps_seen), None
            try:
                self._begin(trainer, pl_module, steps_seen)
            except BadArgumentError:
                raise
            except Exception as error:
                if self._strict:
                    raise
                self._run = None
                line = (str(error).strip() or type(error).__name__).splitlines()[0]
                rank_zero_warn(
                    f"{type(self).__name__} is off: it failed when training began: {line} Training goes on; "
                    "strict=True raises here instead."
                )
            self.write_layout(trainer)

    def _begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule, steps_seen: int) -> None:
        reason = off_reason(trainer, pl_module)
        if reason is not None:
            rank_zero_warn(f"{type(self).__name__} is off: {reason}")
            return
        if trainer.barebones:
            return
        with ranks_of(trainer, pl_module).collective_section():  # off on all processes, or on none
            run = RunContext(trainer, pl_module, self._budget, self._recorder, self._patterns)
        run.strict, run.steps_seen = self._strict, steps_seen
        lazy = [plain_name(name) for name, p in pl_module.named_parameters() if is_lazy(p)]
        if not run.layers and not lazy:
            self._say_nothing_there(run)
            return
        self._say_lazy(lazy)
        self._say_left_out(known_layers(pl_module))
        if not trainer.loggers:
            rank_zero_info(f"{type(self).__name__}: the Trainer has no logger; readings are in its .history only.")
        run.steps.listen(self._step_begins, partial(self._call_all, "at_step"))
        self._detach()
        self._run, self._started = run, False
        self._go_back_to(run.step)
        for sentence in warnings_of(trainer, type(self).__name__, self._meters):
            rank_zero_warn(sentence)
        self._has_started()

    def _has_started(self) -> bool:
        """Whether the meters have; they do when there is something to measure, after a first batch perhaps."""
        if not self._started and self._run is not None and self._run.layers:
            self._started = True
            for meter in self._meters:
                if meter.name in self._state:
                    self._call(meter, "resume", self._state.pop(meter.name))
                self._call(meter, "start")
        return self._started

    def _say_nothing_there(self, run: RunContext) -> None:
        """Nothing can be measured, or nothing of what was asked for, which is an argument out of range."""
        chosen = select(known_layers(run.module), self._patterns)
        if not chosen:
            name = type(run.module).__name__
            raise BadArgumentError(f"layers={list(self._patterns or ())} matches no layer of {name}.")
        rank_zero_warn(f"{type(self).__name__} is off: {_dtypes(chosen)} cannot be measured. {_MEASURED}")

    def _go_back_to(self, step: int) -> None:
        """What was measured at a step that is yet to come, before a checkpoint was loaded, is undone."""
        if step < self._next_step and self._run is not None:
            self.history.forget_from(step)
            self._run.go_back()
            for meter in self._meters:
                meter.cadence.go_back_to(step)
        self._next_step = step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Let the meters see the batch."""
        Row.of(trainer).close()
        if self._run is not None:
            self._budget.start()
            self._run.hook()
            self._run.steps.batch_start()
            self._go_back_to(self._run.step)
            for meter in self._meters:
                meter.cadence.begin(self._run.step)
            self._run.decisions.batch_start(self._run, [m for m in self._meters if not self.paused(m)])
            self._call_all("batch_start", batch)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Let the meters see gradients before more is added to them."""
        if self._run is not None:
            self._call_all("before_backward")

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the meters see gradients that are still being accumulated."""
        if self._run is not None:
            self._run.steps.passes += 1
            self._call_all("after_backward")

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Let the meters see the gradients."""
        if self._run is not None:
            self._step_begins(optimizer)

    def _step_begins(self, optimizer: Optimizer) -> None:
        if self._run is not None and self._run.steps.begin(optimizer):
            self._run.hook(optimizer)
            self._call_all("before_step", optimizer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let the meters measure, if the optimizer has stepped, and hand on what they read."""
        self._after_batch(trainer, outputs)
        self.send_row(trainer)

    def _after_batch(self, trainer: pl.Trainer, outputs: Any) -> None:
        if self._run is None:
            return
        if not self._run.steps.is_begun:
            self._skipped.see_none(self._run)
            return
        self._run.steps_seen += 1
        loss = StepLoss(self._run, outputs)
        self._call_all("batch_end")
        self._run.forget_copies()
        if self._run.steps.may_have_stepped:
            for meter in self._meters:
                meter.cadence.passed(self._run.step)
        self._skipped.see(self._run)
        self._run.steps.end()
        if self._measured:
            with self._budget.watch():
                self._record_loss(loss)
                self._finish()
        loss.end()
        if self._measured and self._watches_health(trainer):
            self._health.see(self._run, *histories_of(trainer))
        self._measured = False
        self._next_step = self._run.step + 1
        self._budget.start()
        if not self._started and not any(is_lazy(p) for p in self._run.module.parameters()):
            self._give_up()

    def _give_up(self) -> None:
        """Shapes are known by now, and still there is nothing to measure."""
        if self._run is not None and not self._has_started():
            name, wanted = type(self._run.module).__name__, f"layers={list(self._patterns or ())} matches"
            said = f"{wanted} no layer of {name}" if self._run.all_layers else f"{name} has nothing to measure"
            rank_zero_warn(f"{type(self).__name__} is off: {said}.")
            self._detach()
            self._run = None

    def _record_loss(self, loss: StepLoss) -> None:
        """Beside the readings of a step, the loss it was taken for: the health rules rest on that."""
        mean = loss.mean()
        if mean is not None:
            self._recorder.scalars({LOSS_TAG: mean})

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validation is not training time."""
        self._budget.stop()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Training goes on, if this was a validation inside it."""
        if self._run is not None and trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._budget.start()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock, and say what was never measured."""
        self._budget.stop()
        self._end_meters()
        if self._run is not None and not self._run.trying_out and not any(meter.points for meter in self._meters):
            self._finish()  # that it was there
            self._skipped.see_none(self._run, is_over=True)
        self.send_row(trainer)
        self._last_look(trainer)
        for meter in self._meters:
            if self._run is not None and meter.is_missed() and not self.paused(meter) and not self._run.trying_out:
                rank_zero_info(
                    f"{type(self).__name__}: no {meter.name} reading in this run: one takes about "
                    f"{meter.expected(self._run):.2g} s, and a budget of {self._fraction:.3g} gave all of them "
                    f"{(self._fraction or 0) * self._budget.training:.2g} s{self._hooks()}. Raise budget, or set "
                    "every_n_steps."
                )

    def _hooks(self) -> str:
        """How much of the budget goes into deciding what to measure, where that is much: where steps are short."""
        spent, given = self._budget.spent_on.get("hooks", 0.0), (self._fraction or 0) * self._budget.training
        return f", of which looking after so short steps took {spent:.2g} s" if spent > given / 4 else ""

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Stop the clock, and write what is known."""
        self._budget.stop()
        self._end_meters()
        self.send_rest(trainer)
        self._last_look(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave nothing behind, however the fit has ended."""
        super().teardown(trainer, pl_module, stage)
        self._end_meters()

    def _end_meters(self) -> None:
        for meter in self._meters:
            if self._run is not None:
                meter.end(self._run)
        self._detach()

    def _detach(self) -> None:
        """Leave no hook on the optimizers."""
        run: RunContext | None = getattr(self, "_run", None)
        if run is not None:
            run.steps.remove()

    def _last_look(self, trainer: pl.Trainer) -> None:
        if self._run is not None and self._watches_health(trainer):
            self._health.look(self._run, *histories_of(trainer), is_last=True)

    def _watches_health(self, trainer: pl.Trainer) -> bool:
        """Whether this monitor speaks for all of them: the first one does, on the first process."""
        first = next(callback for callback in callbacks_of(trainer) if isinstance(callback, Monitor))
        return first is self and trainer.is_global_zero and not is_tryout(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The meters' states: numbers and tensors by name; those loaded and not yet taken up stay as they are."""
        return {**{meter.name: meter.state_dict() for meter in self._meters}, **self._state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state up when training starts, or at once in the middle of it.

        What was learned since that state was saved is then undone: at the end of a search for a learning rate, say.
        """
        if not self.takes_state():
            return
        self._state = dict(state_dict)
        if self._started and self._run is not None and self._stage == "fit":
            self._budget.rewind()
            self._forget_step()
            for meter in self._meters:
                if meter.name in self._state:
                    self._call(meter, "resume", self._state.pop(meter.name))

    def __getstate__(self) -> dict[str, Any]:
        """A copy has the arguments, the history and a state to be saved; it holds no model, and begins anew."""
        meters = self._make_meters()
        if self._run is None or not self._run.is_sharded:
            known = {meter.name: meter.state_dict() for meter in self._meters}
            for meter in meters:
                meter.load_state_dict(copy.copy(known[meter.name]))
        failures = self._failures + (0 if self._run is None else self._run.failures)
        ended = {"_meters": meters, "_run": None, "_started": False, "_failures": failures}
        return {**super().__getstate__(), **ended}

    def __repr__(self) -> str:
        """What it measures, and how often it has."""
        points = ", ".join(f"{meter.points} {meter.name}" for meter in self._meters if meter.points)
        return f"{type(self).__name__}({points or 'no'} readings, {len(self.history)} quantities in .history)"

    def _call_all(self, method: str, *arguments: Any) -> None:
        with self._budget.watch():
            if not self._started and not self._has_started():
                return
            for meter in self._meters:
                if getattr(type(meter), method) is not getattr(Meter, method):  # most have nothing to do at most hooks
                    self._call(meter, method, *arguments)

    def _call(self, meter: Meter, method: str, *arguments: Any) -> None:
        """Call a meter. What it raises costs one warning and a count; three in a row pause it.

        Of several processes all count the same, since a measurement that fails on one fails on all of them.
        """
        assert self._run is not None
        if self.paused(meter):
            return
        if meter.name in self._resting:
            self._resting.discard(meter.name)
            meter.wake(self._run)
        points = meter.points
        try:
            getattr(meter, method)(self._run, *arguments)
            if meter.points > points:
                self._measured = True
                self._in_a_row.clear(meter.name)
                self._recorder.keep()
        except SteeringError:
            raise
        except Exception as error:
            if not self._run.ranks.is_collective_failure(error):
                # The other processes have not heard of it: they do when they measure this together.
                forget_frames(error)  # until then they would hold the graph of a measurement
                self._run.unsettled.setdefault(meter.name, error)
                return
            if self._strict:
                raise
            self._failed(meter, error)

    def _say_lazy(self, names: Sequence[str]) -> None:
        if names:
            rank_zero_info(
                f"{type(self).__name__} leaves out {len(names)} layers without a shape so far, first {names[0]}. Lazy "
                "modules join with their first batch."
            )

    def _say_left_out(self, every: Sequence[Layer]) -> None:
        """Which layers no reading is of, and what share of training whole-model readings then cover."""
        layers = [layer for layer in every if not is_measurable(layer)]
        if not layers:
            return
        trained = sum(layer.size for layer in every if layer.parameter.requires_grad)
        missed = sum(layer.size for layer in layers if layer.parameter.requires_grad)
        covered = (
            f" Whole-model readings are of {1 - missed / trained:.1%} of the trained parameters." if missed else ""
        )
        rank_zero_info(
            f"{type(self).__name__} leaves out {len(layers)} layers in {_dtypes(layers)}, first {layers[0].name}. "
            f"{_MEASURED}{covered}"
        )

    def _finish(self) -> None:
        """Hand on what was measured, with what all dynamon callbacks of the Trainer say together."""
        assert self._run is not None
        ours = [c for c in callbacks_of(self._run.trainer) if isinstance(c, DynamonCallback)]
        overhead = overhead_of([callback._budget for callback in ours if isinstance(callback, Monitor)])
        failures = sum(callback.failures for callback in ours)
        self._recorder.scalars({"dynamon/overhead": overhead, "dynamon/failures": float(failures)}, headline=True)
        self._recorder.flush(self._run.trainer, self._run.step, self._budget)

    def _failed(self, meter: Meter, error: Exception) -> None:
        assert self._run is not None
        room = None
        if ran_out_of_memory(error):
            forget_frames(error)
            empty_cache(self._run.module.device)
            room = meter.make_room(self._run)
        self._recorder.forget()
        self._failures += 1
        meter.cadence.last = self._run.step
        in_a_row = self._in_a_row.add(meter.name, self._run.step + 1, meter.cadence.unit)
        if in_a_row >= PAUSE_AFTER:
            self._resting.add(meter.name)
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        pauses = in_a_row == PAUSE_AFTER
        after = (
            "It is paused now. It is tried again in 10 readings, then in twice as many each time."
            if pauses
            else "Training goes on; strict=True raises here instead."
        )
        after = after if room is None else f"{room} {after}"
        news = in_a_row == 1 and first_line not in self._causes
        self._causes.add(first_line)  # what stops two meters at once is one story
        if news or room or pauses:
            rank_zero_warn(f"{type(self).__name__}: the {meter.name} measurement failed: {first_line} {after}")


def _dtypes(layers: Sequence[Layer]) -> str:
    return ", ".join(sorted({str(layer.parameter.dtype).removeprefix("torch.") for layer in layers}))


def check_arguments(every_n_steps: int | None, budget: float | None, **globs: Sequence[str] | None) -> None:
    """Raise ValueError naming the argument that is out of range; ``globs`` are the lists of names."""
    for name, patterns in globs.items():
        if isinstance(patterns, str):
            raise ValueError(f"{name} must be a list of names, got the string {patterns!r}; write [{patterns!r}].")
    if every_n_steps is not None and (type(every_n_steps) is not int or every_n_steps < 1):
        raise ValueError(f"every_n_steps must be a whole number of 1 or more, or None, got {every_n_steps!r}.")
    if budget is not None and not 0 < budget < math.inf:
        raise ValueError(
            f"budget must be positive (0.02 is 2 % of training time) or None for no limit, got {budget!r}."
        )
