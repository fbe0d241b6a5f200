"""The health rules while training goes on: what they find is said once, as a warning."""

import time
from typing import Any

from dynamon.health import SEVERITIES, Finding, findings
from dynamon.monitoring.alerts import PATIENCE, Alerts, settings_of
from dynamon.monitoring.messages import rank_zero_warn
from dynamon.monitoring.run_context import RunContext
from dynamon.runs.history import History, RunData

_SHARE = 0.01  # of the run's time, where measurements have no budget
_OF_BUDGET = 0.1  # where they have one
_EVERY = 5  # readings: fewer tell nothing new
_CERTAIN = ("spike/", "lr/jump")  # a second look would find no more of it
_AT_THE_END = ("dynamon/nothing", "dynamon/no_sharpness")  # until then the readings may come
_TOLD = ("dynamon/", "gradient/nonfinite")  # by those who measure


class HealthWatch:
    """Applies :func:`dynamon.health.findings` to what has been measured so far, warns of what is new, and tells others.

    A rule is quoted once a run, and once more where it has become worse: when two looks in a row found the same, or at
    once where the loss is lost or the run is over. Only faults and warnings are; failed measurements and gradients with
    NaN have had a warning of their own. The loss is what ``training_step`` returned on measured steps. Host work only,
    on the first process. :class:`dynamon.monitoring.alerts.Alerts` tells functions, files and trackers.

    Args:
        name: Who speaks.

    Attributes:
        has_begun: Whether the step is known at which this fit began.
        asks_to_stop: Whether training is to stop, by what the user said.

    Cost: about 1 % of the run's time, a tenth of the budget where there is one: the next look waits until the last
    one has been earned. So in a long run of many layers a finding may come a minute late.
    """

    def __init__(self, name: str) -> None:
        """Start with nothing seen."""
        self._name, self._alerts = name, Alerts(name)
        self.has_begun = self.asks_to_stop = False
        self._said: dict[str, str] = {}  # the severity of each rule that was quoted
        self._found: set[str] = set()
        self._readings, self._looked_at = 0, 0.0
        self._took, self._is_off = 0.0, False

    @property
    def failures(self) -> int:
        """Alerts that failed so far."""
        return self._alerts.failures

    def begin(self, run: RunContext, is_speaking: bool) -> None:
        """The first batch of a fit begins, or training goes back to an earlier step.

        Args:
            run: The run.
            is_speaking: Whether the monitor that this belongs to speaks for all of them.
        """
        self.has_begun, self.asks_to_stop = True, False
        if is_speaking:
            self._alerts.go_back(run, run.step)

    def close(self, patience: float | None = None) -> None:
        """Tell what is still waiting to be told, see :meth:`dynamon.monitoring.alerts.Alerts.close`."""
        self._alerts.close(PATIENCE if patience is None else patience)

    def findings(self, *histories: History) -> list[Finding]:
        """Return what the rules find in what some callbacks have measured, the worst first."""
        return findings(RunData.of(*histories))

    def see(self, run: RunContext, *histories: History, is_urgent: bool = False) -> None:
        """A step was measured, or has made itself felt: look at everything if that has been earned."""
        self._readings += _EVERY if is_urgent else 1
        waited, budget = time.monotonic() - self._looked_at, run.budget.fraction
        share = _SHARE if budget is None else min(_SHARE, _OF_BUDGET * budget)
        if self._readings >= _EVERY and waited * share >= self._took:
            self.look(run, *histories)

    def look(self, run: RunContext, *histories: History, is_last: bool = False) -> None:
        """Say what is new; a rule that fails costs a warning and ends the watch."""
        if self._is_off:
            return
        begin = time.monotonic()
        try:
            with run.budget.charge("health"):
                found = self.findings(*histories)
        except Exception as error:  # not raised under strict either: other processes do not look, and would wait
            self._is_off = True
            rank_zero_warn(f"{self._name}: the health rules failed and are off for this run: {error!r}")
            return
        self._readings, self._looked_at = 0, time.monotonic()
        self._took = self._looked_at - begin
        lost = [one.rule for one in found if one.rule == "loss/nonfinite" and one.severity == "fault"]
        at_once = [*lost, *(one.rule for one in found if one.rule.startswith(_CERTAIN))]
        seen_twice = [one.rule for one in found if one.rule in self._found and one.rule not in _AT_THE_END]
        certain = [one for one in found if is_last or one.rule in (*seen_twice, *at_once)]
        self._found = {one.rule for one in found}
        self._say(certain)
        new = self._alerts.tell(run, certain, max(run.step - is_last, 0), is_last)
        if not is_last:
            self._stop(run, new)

    def _stop(self, run: RunContext, new: list[Finding]) -> None:
        """Ask for the end of training where the user wants it; where there are several processes, they agree first."""
        wanted = [one for one in new for settings in settings_of(run) if settings.stops(one)]
        if wanted and not self.asks_to_stop:
            self.asks_to_stop = True
            reason = f"{wanted[0].rule} is a {wanted[0].severity}, and stop_on asks for it: {wanted[0].message}"
            rank_zero_warn(f"{self._name}: training is asked to stop after step {run.step}. {reason}")
            if not run.ranks.is_distributed:
                run.loop.request_stop()

    def _say(self, found: list[Finding]) -> None:
        for one in found:
            before = self._said.get(one.rule, "note")
            is_worse = SEVERITIES.index(one.severity) < SEVERITIES.index(before)
            if is_worse and not one.rule.startswith(_TOLD):
                self._said[one.rule] = one.severity
                rank_zero_warn(f"{self._name}: {one.message} {one.advice}")


class StepLoss:
    """The loss of a batch: its mean over the processes that have one, whose gradient they descend.

    With it goes whether training is to stop: the rules look on the first process only, and all must stop together.

    It goes along with the first check of what several processes measure after the batch; where there is none, it takes
    a reduction of its own. Before that nothing waits for the device.

    Args:
        run: The run.
        outputs: As for :meth:`dynamon.monitoring.loop.Loop.loss_of`.
    """

    def __init__(self, run: RunContext, outputs: Any) -> None:
        """Have it go along."""
        self._run, self._outputs = run, outputs
        run.ranks.attach_values(self._sum_and_count)

    def mean(self) -> float | None:
        """The mean; None where no process has a loss. Every process must call this at the same time."""
        total, count, _ = self._run.ranks.attached_sums()
        return total / count if count else None

    @property
    def asks_to_stop(self) -> bool:
        """Return whether the first process asks for the end of training, after :meth:`mean`."""
        return self._run.ranks.attached_sums()[2] > 0

    def end(self) -> None:
        """Nobody asks any more."""
        self._run.ranks.detach_values()

    def _sum_and_count(self) -> list[float]:
        try:
            loss = self._run.loop.loss_of(self._outputs)
        except Exception:  # a loss that is no number, in the middle of a message that other processes wait for
            loss = None
        asks = any(getattr(member, "asks_to_stop", False) for member in self._run.loop.members)
        return [*((0.0, 0.0) if loss is None else (loss, 1.0)), float(asks)]
