"""The sentinel: looks at every optimizer step for spikes, at a small and known cost."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from dynamon.board.custom_scalars import chart_layout
from dynamon.monitoring.cadence import Cadence
from dynamon.monitoring.messages import rank_zero_info
from dynamon.monitoring.meter import Meter
from dynamon.monitoring.planner import Plan
from dynamon.monitoring.run_context import RunContext
from dynamon.monitoring.sentinel_check import StepCheck
from dynamon.monitoring.sentinel_inputs import BatchSample, measure_batch, sample_batch
from dynamon.monitoring.sentinel_judge import HeldBatch, Look, StepJudge
from dynamon.monitoring.sentinel_norms import MOST_LOSSES, NOTHING, Norms, StepRow
from dynamon.monitoring.sentinel_pace import BATCH, CHECK, GRADIENT, SHARE, UPDATE, Pace
from dynamon.monitoring.sentinel_rates import RateWatch
from dynamon.quantities import Scope, meanings, quantities_of
from dynamon.quantities.scales import Scale

_Result = TypeVar("_Result")
_HELD_BYTES = 2**26  # of batches that are kept until their step has been judged, beside the last one
_LATE = 2  # steps that are looked at after a check whose numbers came later


@dataclass
class _Begun:
    """Hold what is known of the steps of one batch."""

    announced: dict[Optimizer, StepRow] = field(default_factory=dict)
    inside: set[Optimizer] = field(default_factory=set)
    rows: list[tuple[Optimizer, StepRow]] = field(default_factory=list)
    checked: dict[Optimizer, StepRow] = field(default_factory=dict)
    passed: list[tuple[Optimizer, StepRow]] = field(default_factory=list)
    lost: Exception | None = None


class Sentinel(Meter):
    """Looks at every step: loss, batch, gradients before clipping, and updates, each against its usual level.

    A step that is far above is a spike: it is recorded with its batch, the layers, and the number of steps after which
    all was as before. Between spikes the largest deviation is recorded whenever something else is. What its share of
    the budget does not pay for at every step is looked at every k-th step: first updates, then gradients. All other
    steps are checked by their loss and the gradients of a few layers, and looked at where these are out of line. On a
    GPU the check's numbers arrive one or two steps later: then the gradients of the step are judged, and the next steps
    are looked at.

    It runs no collective: under DDP gradients and updates are those of all processes, and the loss and the batch those
    of this one; under FSDP2 each process judges its part of each layer.

    Args:
        looks_always: Whether to look at every step, whatever it costs.
        name: Name of the monitor, for messages.

    Attributes:
        has_news: Whether a spike was recorded that nobody has told yet.

    Cost: about ten device calls per look and a copy of ``3 L`` numbers and 3,072 entries of the batch to the host, for
    which nobody waits: on a GPU a step is judged when its numbers have arrived, one or two steps later. It keeps the
    batches of steps that are not judged yet, up to 64 MiB, and the last batch.
    """

    name = "sentinel"
    tags = meanings(quantities_of("sentinel", scope=Scope.SCALAR))
    quantities = meanings(quantities_of("sentinel", scope=Scope.PER_LAYER))
    panels = chart_layout(quantities_of("sentinel"))

    def __init__(self, looks_always: bool, name: str) -> None:
        """Start before any step."""
        super().__init__(Cadence(None, 1))
        self._looks_always, self._owner = looks_always, name
        self._pace = Pace(self.name, None)
        self._judge, self._rates = StepJudge(), RateWatch()
        self._begun = _Begun()
        self._batch: Any = None
        self._entries: BatchSample | None = None
        self._window: list[HeldBatch] = []
        self._check, self._losses = StepCheck(), list[Tensor]()
        self._step = 0  # of the batch under way: to ask for it takes a while
        self._is_out, self._until = False, -1  # whether this step is to be looked at, and all up to which
        self._run: RunContext | None = None
        self._device = torch.device("cpu")
        self._has_told = self.has_news = False

    # What a meter is asked for

    def plans(self, run: RunContext) -> list[Plan]:
        """Return nothing: it keeps to its share by itself."""
        return []

    def is_missed(self) -> bool:
        """Return False: there may have been nothing to find."""
        return False

    def start(self, run: RunContext) -> None:
        """Follow the steps of all optimizers."""
        self._run, self._device, self._step = run, run.device, run.step
        self._pace = Pace(self.name, run.budget, self._looks_always, run.device.type in ("cpu", "cuda"))
        if self not in run.steps.followers:
            run.steps.followers.append(self)

    def end(self, run: RunContext) -> None:
        """Judge the steps that are on their way."""
        if self in run.steps.followers:
            run.steps.followers.remove(self)
        with suppress(Exception):  # after an exception of training a device may answer no more
            self._judge_all(run)
            self._judge.log(run, is_end=True)
        self.forget_batch()
        self._judge.forget()
        self._run = None

    # What happens at every step, also where nothing else is measured

    def see_batch(self, run: RunContext, batch: Any) -> None:
        """A batch has arrived on the device."""
        self._batch, self._step = batch, run.step
        self._pace.begin(self._step)
        if self._looks(BATCH):
            self._entries = self._timed_call(BATCH, sample_batch, batch, self._device)

    def _looks(self, what: int) -> bool:
        """Return whether to look at something at this step: by the pace, or because something is out of line."""
        return self._is_out or self._step <= max(self._until, self._judge.follow) or self._pace.looks(what)

    def _checks_now(self) -> bool:
        return self._pace.has_checks and self._pace.looks(CHECK)

    def _timed_call(self, what: int, function: Callable[..., _Result], *arguments: Any) -> _Result:
        """Call a function, and add its time to the look under way."""
        begin, mark = time.perf_counter(), self._pace.mark(self._device)
        result = function(*arguments)
        self._pace.finish(mark, self._device, what)
        self._pace.add(time.perf_counter() - begin, what)
        return result

    def see_step(self, run: RunContext, optimizer: Optimizer) -> None:
        """Gradients are complete and not yet clipped."""
        if self._checks_now():
            self._timed_call(CHECK, self._check_gradients, run, optimizer, run.loop.gradient_scale(optimizer))
        if self._looks(BATCH):
            scale = run.loop.gradient_scale(optimizer)
            self._begun.announced[optimizer] = StepRow(self._gradients(run, optimizer), scale)

    def _check_gradients(self, run: RunContext, optimizer: Optimizer, scale: Scale) -> None:
        """Check gradients that are on the host, and prepare the copy of others."""
        tracker = self._judge.tracker(run, optimizer)
        if self._is_on_host:
            self._is_out |= self._check.are_gradients_out(tracker.place, tracker.norms, float(scale))
        measured = NOTHING if self._is_on_host or self._looks(BATCH) else tracker.norms.gradients()
        self._begun.checked[optimizer] = StepRow(measured, scale)

    @property
    def _is_on_host(self) -> bool:
        return self._device.type == "cpu"

    def _gradients(self, run: RunContext, optimizer: Optimizer) -> Norms:
        """Measure gradients where they are to be looked at."""
        if not self._looks(GRADIENT):
            return NOTHING
        return self._timed_call(GRADIENT, self._judge.tracker(run, optimizer).norms.gradients)

    def _updates(self, run: RunContext, optimizer: Optimizer) -> tuple[Norms, Norms, float] | None:
        """Measure updates, likewise."""
        if not self._looks(UPDATE):
            return None
        return self._timed_call(UPDATE, self._judge.tracker(run, optimizer).norms.updates)

    def step_begins(self, optimizer: Optimizer) -> None:
        """Note that a step has begun."""
        self._begun.inside.add(optimizer)
        self._rates.see(optimizer)

    def step_ends(self, optimizer: Optimizer, skipped: Tensor | None) -> None:
        """Read what the optimizer keeps: its update is in it."""
        run = self._run
        if run is None or optimizer not in self._begun.inside:  # a step inside of another one is over already
            return
        self._begun.inside.discard(optimizer)
        try:
            self._end_step(run, optimizer, skipped)
        except Exception as error:  # inside of the optimizer's step: raised when the batch is over
            self._begun.lost = error

    def _end_step(self, run: RunContext, optimizer: Optimizer, skipped: Tensor | None) -> None:
        begun, checks = self._begun, self._checks_now()
        if checks and optimizer not in begun.checked:  # nobody announced it; by now a scaler's factor is out of it
            self._timed_call(CHECK, self._check_gradients, run, optimizer, 1.0)
        checked = begun.checked.pop(optimizer, None)
        if self._looks(BATCH):
            row = begun.announced.pop(optimizer, None) or StepRow(self._gradients(run, optimizer))
            row.end(self._updates(run, optimizer), skipped)
            begun.rows.append((optimizer, row))
        elif checked is not None:
            checked.end(None, skipped)
            begun.passed.append((optimizer, checked))

    def see_end(self, run: RunContext, outputs: Any, is_log_time: bool) -> None:
        """A batch is over: send what was measured in it, and judge what has arrived.

        Args:
            run: The run.
            outputs: As for :meth:`dynamon.monitoring.loop.Loop.loss_of`.
            is_log_time: Whether something else was recorded at this step.
        """
        begin, begun = time.perf_counter(), self._begun
        self._begun = _Begun()
        if begun.lost is not None:
            self.forget_batch()
            raise begun.lost
        looks = self._looks(BATCH)
        if self._checks_now():
            looks = self._check_loss(run, outputs, begun) or looks
        if looks:
            self._see_end(run, outputs, begun)
        self._batch = self._entries = None
        self._judge_arrived(run)
        if is_log_time:
            self._judge.log(run)
        self.has_news |= self._rates.log(run)
        self._finish(run, begin, begun)

    def _see_end(self, run: RunContext, outputs: Any, begun: _Begun) -> None:
        """Send what was looked at in a batch."""
        self._note_batch(run, outputs)
        for optimizer, row in begun.announced.items():  # whose steps cannot be watched
            if run.steps.of(optimizer).is_blind:
                row.end(self._updates(run, optimizer), None)
                begun.rows.append((optimizer, row))
        if begun.rows:
            self._send(run, begun.rows)
        if begun.rows or begun.announced:
            self._window = []

    def _finish(self, run: RunContext, begin: float, begun: _Begun) -> None:
        """Book the time of a batch, and choose the pace anew."""
        is_over, was_looked_at = bool(begun.rows or begun.announced or begun.passed), bool(begun.rows)
        is_paced = was_looked_at and self._pace.looks(BATCH)
        self._pace.add(time.perf_counter() - begin, BATCH if was_looked_at else CHECK)
        self._pace.book(is_paced, self._checks_now() and bool(begun.passed))
        if is_over:
            self._is_out = False
            if self._pace.review(self._step - run.begun_at + 1):
                self._tell_pace(run)

    def _check_loss(self, run: RunContext, outputs: Any, begun: _Begun) -> bool:
        """Check the loss of a batch that is on the host; whether its step is to be looked at after all."""
        loss = run.loop.loss_tensor(outputs)
        if loss is not None:
            self._losses = [*self._losses, loss][-MOST_LOSSES:]
            if self._is_on_host:
                self._is_out |= self._check.is_loss_out(float(loss))
        if not (begun.passed or begun.rows or begun.announced):
            return self._is_out
        losses, self._losses = self._losses, []
        if not self._is_on_host:
            if begun.passed:
                self._send_check(run, begun.passed, losses)
            return False
        taken = [(optimizer, row) for optimizer, row in begun.passed if not row.is_skipped]
        if self._is_out:  # gradients may have been clipped by now
            for optimizer, row in taken:
                row.end(self._updates(run, optimizer), None)
            begun.rows += taken
        elif taken:
            self.has_news |= self._judge.note_loss(run, self._step, taken[0][0], [float(one) for one in losses])
        return self._is_out

    def _send_check(
        self, run: RunContext, passed: Sequence[tuple[Optimizer, StepRow]], losses: Sequence[Tensor]
    ) -> None:
        """Send the numbers of a check to the host, which does not wait for them."""
        for _, row in passed:
            row.send(losses, self._device)
        rows = [(self._judge.tracker(run, optimizer).place, row) for optimizer, row in passed]
        batch = HeldBatch(run.loop.batch_index, self._batch, measure_batch(self._batch), None)
        self._judge.add(Look(self._step, rows, [batch], is_check=True))
        self._let_go()

    def _note_batch(self, run: RunContext, outputs: Any) -> None:
        entries = sample_batch(self._batch, self._device) if self._entries is None else self._entries
        loss = run.loop.loss_tensor(outputs)
        batch = HeldBatch(run.loop.batch_index, self._batch, entries, loss)
        self._window = [*self._window, batch][-MOST_LOSSES:]
        self._let_go()

    def _let_go(self) -> None:
        """Keep no more batches than there is room for."""
        left = _HELD_BYTES
        for one in reversed([*self._judge.held(), *self._window[:-1]]):
            left -= one.entries.bytes if one.held is not None else 0
            one.held = one.held if left >= 0 else None

    def _send(self, run: RunContext, rows: Sequence[tuple[Optimizer, StepRow]]) -> None:
        losses = [batch.loss for batch in self._window if batch.loss is not None]
        samples = [entries for batch in self._window for entries in batch.entries.entries]
        for _, row in rows:
            mark = self._pace.mark(self._device)
            row.send(losses, self._device, samples)
            self._pace.finish(mark, self._device, BATCH)
        places = [self._judge.tracker(run, optimizer).place for optimizer, _ in rows]
        rows_by_place = [(at, row) for at, (_, row) in zip(places, rows, strict=True)]
        self._judge.add(Look(self._step, rows_by_place, self._window))

    def _judge_all(self, run: RunContext) -> None:
        """Wait for the steps that are on their way."""
        self._judge.wait()
        self._judge_arrived(run)

    def _judge_arrived(self, run: RunContext) -> None:
        learns_late = self._pace.has_checks and not self._is_on_host
        has_news, is_out = self._judge.judge_arrived(run, self._check if learns_late else None)
        self.has_news |= has_news
        if is_out:
            self._until = self._step + _LATE

    def forget_batch(self) -> None:
        """Forget what was seen of a batch: it is not looked at to its end."""
        self._begun, self._batch, self._entries, self._window = _Begun(), None, None, []
        self._is_out, self._losses = False, []

    def _tell_pace(self, run: RunContext) -> None:
        """Say once that not every step is looked at."""
        if not self._has_told:
            self._has_told = True
            rank_zero_info(
                f"{self._owner}: rules on spikes may take {SHARE:.0%} of the budget. From step {run.step} on "
                f"{self._pace.in_words()}. every_n_steps=... or budget=None look at every step, sentinel=False at none."
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the levels of each optimizer, by its place, and the spikes so far."""
        if self._run is not None:
            self._judge_all(self._run)
        return {**self._judge.state_dict(), "rates": self._rates.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them up."""
        self._judge.load_state_dict(state)
        self._rates.load_state_dict(state.get("rates", []))
        self._until = -1
        self.forget_batch()
