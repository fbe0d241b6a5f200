"""Hold what all monitors share: calling their meters, what happens when one fails, what is saved."""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from dynamon.board.custom_scalars import Layout, chart_layout, merge_layouts
from dynamon.health import LOSS_TAG, Finding
from dynamon.monitoring.alerts import AlertSettings
from dynamon.monitoring.arguments import BadArgumentError, check_switches
from dynamon.monitoring.budget import Budget, overhead_of
from dynamon.monitoring.failures import Failures, first_line
from dynamon.monitoring.health_watch import HealthWatch, StepLoss
from dynamon.monitoring.layer_messages import say_layers
from dynamon.monitoring.loop import Loop
from dynamon.monitoring.messages import rank_zero_info, rank_zero_warn
from dynamon.monitoring.meter import Meter
from dynamon.monitoring.missed_readings import say_missed
from dynamon.monitoring.planner import GRACE
from dynamon.monitoring.recorder import Recorder
from dynamon.monitoring.run_context import RunContext
from dynamon.monitoring.sentinel_caller import SentinelCaller
from dynamon.monitoring.stated import Stated
from dynamon.monitoring.stepping import SkippedSteps
from dynamon.quantities import quantities_of

_GRACE = "grace"  # key of what is left of it in a state


class Monitor(SentinelCaller):
    """Calls meters as training goes on, catches what goes wrong, and saves their state.

    The methods from :meth:`begin` to :meth:`close` are the events of a training loop, in their order. Somebody who
    sees the loop calls them: :class:`dynamon.callbacks.Monitor` for a Lightning Trainer, :class:`dynamon.Watch` for a
    loop of your own.

    Args:
        make_meters: Makes what measures, anew for each fit.
        budget: Share of training time for all of it, or None.
        layers: Globs for the layers with readings of their own; ``!`` excludes.
        loggers: Loggers to write to, by (part of) class name, class or object; None for all.
        strict: Raise where a measurement fails, instead of warning.
        grace: Seconds that it may take beyond its share, once.
        roles: Roles of layers by glob, as ``overrides`` of :func:`dynamon.layers.describe_layers`.
        geometry: Geometry of the optimizers, or of some by class name; see :class:`dynamon.callbacks.GradientMonitor`.
        on_finding: Called with each new finding; see :class:`dynamon.callbacks.DynamicsMonitor`.
        stop_on: Health rules and severities at which training stops, likewise.
    """

    def __init__(
        self,
        make_meters: Callable[[], list[Meter]],
        budget: float | None = 0.02,
        layers: Sequence[str] | None = None,
        loggers: Sequence[Any] | None = None,
        strict: bool = False,
        grace: float = GRACE,
        roles: Mapping[str, str] | None = None,
        geometry: str | Mapping[str, str] | None = None,
        on_finding: Callable[[Finding], object] | None = None,
        stop_on: Sequence[str] | None = None,
    ) -> None:
        """Remember what to measure."""
        super().__init__()
        check_switches(strict=strict)
        self.alert_settings = AlertSettings.checked(on_finding, stop_on)
        self._make_meters, self._grace = make_meters, grace
        self._fraction, self._patterns, self._loggers, self._strict = budget, layers, loggers, strict
        self._stated = Stated(roles, geometry)
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
        """Begin like new: a monitor may see several fits."""
        self._meters = self._make_meters()
        self._budget = Budget(self._fraction, self._grace)
        self._recorder = Recorder(self._loggers, [tag for m in self._meters for tag in m.quantities], self._strict)
        self._detach()
        self._run: RunContext | None = None
        self._forget_failures()
        self._skipped = SkippedSteps(type(self).__name__)
        self._started = False
        self._next_step = 0
        self._forget_plan()
        self._forget_sentinel()
        self._health = HealthWatch(type(self).__name__)

    @property
    def overhead(self) -> float:
        """Time of monitoring over the training time without it, so far."""
        return self._budget.overhead

    @property
    def failures(self) -> int:
        """Measurements that failed so far, calls of loggers that did, and alerts."""
        of_run = 0 if self._run is None else self._run.failures
        return self._failures + self._recorder.failures + self._health.failures + of_run

    def shared_settings(self) -> dict[str, Any]:
        """Return by name the arguments that the parts of a :class:`dynamon.callbacks.DynamicsMonitor` share."""
        stated = {"roles": self._stated.roles, "geometry": self._stated.geometry}
        own = {"budget": self._fraction, "grace": self._grace, "layers": self._patterns, "loggers": self._loggers}
        alerts = {"on_finding": self.alert_settings.on_finding, "stop_on": self.alert_settings.stop_on or None}
        return {**own, "strict": self._strict, **stated, **alerts}

    def measures(self, quantity: str) -> bool:
        """Return whether a per-layer quantity is measured."""
        return any(quantity in meter.quantities for meter in self._meters)

    def one_of_a_kind(self) -> type | tuple[type, ...]:
        """The classes of which a loop may hold one."""
        return type(self)

    def check(self, loop: Loop) -> None:
        """Raise ValueError where a logger was asked for that the loop does not have."""
        self._recorder.check(loop)

    def begin_again(self, goes_on: bool, keeps_state: bool) -> None:
        """Prepare for another fit.

        Args:
            goes_on: Whether it goes on from where the last one ended, so that history and clock are kept.
            keeps_state: Whether a state was loaded for it.
        """
        if not keeps_state:
            self._state = {}
        if not goes_on or self._run is None or self._run.is_sharded:  # parts of weights are not put together here
            self._forget()
            return
        self._state = self.state_dict()
        self._failures += self._run.failures
        self._in_a_row, self._resting = Failures(), set[str]()
        self._run.failures, self._health.asks_to_stop = 0, False
        self._forget_step()

    def _forget_step(self) -> None:
        """Forget what is known of a step that did not come to its end, or is undone."""
        self._measured = self.asleep = False
        if self._run is not None:
            self._run.steps.sleep(False)
            self._run.steps.forget()
        self._recorder.forget_step()

    def begin(self, loop: Loop) -> None:
        """Begin a fit: find the layers, start the meters."""
        with self._budget.watch():
            steps_seen, self._run = (0 if self._run is None else self._run.steps_seen), None
            try:
                self._begin(loop, steps_seen)
            except BadArgumentError:
                raise
            except Exception as error:  # a monitor must not end training: what fails here leaves it off
                if self._strict:
                    raise
                self._run = None
                rank_zero_warn(
                    f"{type(self).__name__} is off: it failed when training began: {first_line(error)} Training goes "
                    "on; strict=True raises here instead."
                )

    def _begin(self, loop: Loop, steps_seen: int) -> None:
        reason = loop.off_reason()
        if reason is not None:
            rank_zero_warn(f"{type(self).__name__} is off: {reason}")
            return
        if loop.is_barebones:
            return
        with loop.ranks().collective_section():  # off on all processes, or on none
            self._join(loop, steps_seen)
        if self._run is not None:
            self._has_started()

    def _join(self, loop: Loop, steps_seen: int) -> None:
        """Find the layers, and take part in the loop if any can be measured."""
        run = RunContext(loop, self._budget, self._recorder, self._patterns, self._stated)
        run.strict, run.steps_seen = self._strict, steps_seen
        self._stated.check(loop.optimizers)
        if not say_layers(run, type(self).__name__, self._patterns):
            return
        if not loop.writers:
            rank_zero_info(f"{type(self).__name__}: {loop.without_writers}; readings are in its .history only.")
        run.steps.listen(self.before_step, partial(self._call_all, "at_step"))
        self._detach()
        self._take_grace()
        self._run, self._started = run, False
        run.planner.join(self, self._budget, [plan for meter in self._meters for plan in meter.plans(run)])
        self._go_back_to(run.step)
        for sentence in loop.warnings_of(type(self).__name__, self._meters):
            rank_zero_warn(sentence)
        self._call_seconds, self._batches_booked = loop.call_seconds(self), loop.batches_seen

    def _take_grace(self) -> None:
        """Go on with what a saved run has left of its grace."""
        left = self._state.pop(_GRACE, None)
        if left is not None:
            self._budget.grace = min(float(left), self._grace)

    def _has_started(self) -> bool:
        """Start the meters when there is something to measure, after a first batch perhaps; whether they have."""
        if not self._started and self._run is not None and self._run.layers:
            self._started = True
            for meter in self._meters:
                if meter.name in self._state:
                    self._call(meter, "resume", self._state.pop(meter.name))
                self._call(meter, "start")
            self._find_sentinel()
        return self._started

    def _go_back_to(self, step: int) -> None:
        """Undo what was measured at a step that is yet to come, before a checkpoint was loaded."""
        if step < self._next_step and self._run is not None:
            self.history.forget_from(step)
            self._run.go_back()
            self._health.begin(self._run, self._watches_health())
            if self._run.planner.has_begun:
                self._run.planner.begin(step, None, self._run.trying_out)
        self._next_step = step

    def batch_start(self, batch: Any) -> None:
        """A batch has arrived on the device."""
        self.see_batch(batch)
        if self._run is not None and not self.sleeps_on(self._run.step):
            self._budget.start()
            self._run.hook()
            self._run.steps.batch_start()
            self._go_back_to(self._run.step)
            if not self._health.has_begun:
                self._health.begin(self._run, self._watches_health())
            if not self._run.planner.has_begun:  # a resumed run knows its step from its first batch on
                total = self._run.loop.total_steps if self._run.step == 0 else None
                self._run.planner.begin(self._run.step, total, self._run.trying_out)
            self._call_all("batch_start", batch)

    def before_backward(self) -> None:
        """A backward pass begins: gradients are still those that it will add to."""
        if not self.asleep and self._run is not None:
            self._call_all("before_backward")

    def after_backward(self) -> None:
        """A backward pass is over: gradients may still be accumulated."""
        if not self.asleep and self._run is not None:
            self._run.steps.passes += 1
            self._call_all("after_backward")

    def before_step(self, optimizer: Optimizer) -> None:
        """An optimizer is about to step: gradients are complete, and not yet clipped where the loop announces it."""
        self.see_step(optimizer)
        if self.asleep or self._run is None:
            return
        self._run.loop.before_step()
        if self._run.steps.begin(optimizer):
            self._run.hook(optimizer)
            self._call_all("before_step", optimizer)

    def batch_end(self, outputs: Any) -> None:
        """A batch is over: measure, if an optimizer has stepped, and hand on what was read.

        Args:
            outputs: What :meth:`dynamon.monitoring.loop.Loop.loss_of` understands.
        """
        if not self.asleep:
            self._measure_end(outputs)
        self.see_end(outputs)

    def _measure_end(self, outputs: Any) -> None:
        if self._run is None:
            return
        if not self._run.steps.is_begun:
            self._skipped.see_none(self._run)
            return
        self._run.steps_seen += 1
        loss = StepLoss(self._run, outputs)
        self._call_all("batch_end")
        self._run.forget_copies()
        has_stepped = self._run.steps.may_have_stepped
        for meter in self._meters:
            (meter.cadence.passed if has_stepped else meter.cadence.put_off)(self._run.step)
        self._skipped.see(self._run)
        self._run.steps.end()
        if self._measured:
            with self._budget.watch():
                self._record_loss(loss)
                self._finish()
        loss.end()
        self._has_logged = self._measured
        if self._measured and self._watches_health():
            self._health.see(self._run, *self._histories())
        self._measured = False
        self._next_step = self._run.step + 1
        self._plan()
        self._budget.start()
        if not self._started and not any(is_lazy(p) for p in self._run.module.parameters()):
            self._give_up()

    def _give_up(self) -> None:
        """Switch off: shapes are known by now, and still there is nothing to measure."""
        if self._run is not None and not self._has_started():
            name, wanted = type(self._run.module).__name__, f"layers={list(self._patterns or ())} matches"
            said = f"{wanted} no layer of {name}" if self._run.all_layers else f"{name} has nothing to measure"
            rank_zero_warn(f"{type(self).__name__} is off: {said}.")
            self._detach()
            self._run.planner.leave(self)
            self._run = None

    def _record_loss(self, loss: StepLoss) -> None:
        """Record the loss of a measured step: the health rules rest on it."""
        mean = loss.mean()
        if mean is not None:
            self._recorder.scalars({LOSS_TAG: mean})
        if loss.asks_to_stop and self._run is not None:
            self._run.loop.request_stop()

    def pause(self) -> None:
        """Stop the clock: what follows is not training."""
        self._budget.stop()

    def go_on(self) -> None:
        """Start the clock again."""
        if self._run is not None:
            self._budget.start()

    def end(self) -> None:
        """Training is over: stop the clock, and complete what is to be written."""
        self._budget.stop()
        self._wake()
        self._book_calls()
        self._end_meters()
        if self._run is not None and not self._run.trying_out and not any(meter.points for meter in self._meters):
            self._finish()  # that it was there
            self._skipped.see_none(self._run, is_over=True)

    def conclude(self) -> None:
        """Say what looks wrong at the end, and what was never measured."""
        self.last_look()
        if self._run is not None and not self._run.trying_out and self._skipped.any_taken:
            missed = [m for m in self._meters if (m.is_missed() or m.missed_reason()) and not self.paused(m)]
            say_missed(type(self).__name__, self._run, missed)

    def abort(self) -> None:
        """Training was ended by an exception: stop the clock."""
        self._budget.stop()
        self._end_meters()

    def close(self) -> None:
        """Leave nothing behind, however training has ended."""
        self._end_meters()
        self._health.close(0.0)

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

    def state_dict(self) -> dict[str, Any]:
        """The meters' states: numbers and tensors by name; those loaded and not yet taken up stay as they are."""
        own = {meter.name: meter.state_dict() for meter in self._meters}
        return {**own, _GRACE: self._budget.grace_left, **self._state}

    def take_state(self, state: dict[str, Any], at_once: bool) -> None:
        """Take a state up when training starts, or at once in the middle of it.

        What was learned since that state was saved is then undone: at the end of a search for a learning rate, say.

        Args:
            state: The state.
            at_once: Whether training goes on, so that a start may not come.
        """
        self._state = dict(state)
        if self._started and self._run is not None and at_once:
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
        ended = {"_meters": meters, "_run": None, "_started": False, "_failures": failures, "asleep": False}
        return {**super().__getstate__(), **ended, "_sentinel": None}  # type: ignore[dict-item]

    def __repr__(self) -> str:
        """Return what it measures, and how often it has."""
        points = ", ".join(f"{meter.points} {meter.name}" for meter in self._meters if meter.points)
        return f"{type(self).__name__}({points or 'no'} readings, {len(self.history)} quantities in .history)"

    def _finish(self) -> None:
        """Hand on what was measured, with what all members of the loop say together."""
        assert self._run is not None
        loop = self._run.loop
        overhead = overhead_of([member._budget for member in loop.members if isinstance(member, Monitor)])
        failures = sum(member.failures for member in loop.members)
        self._recorder.scalars({"dynamon/overhead": overhead, "dynamon/failures": float(failures)}, headline=True)
        self._recorder.flush(loop, self._run.step, self._budget)
