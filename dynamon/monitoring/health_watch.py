"""The health rules while training goes on: what they find is said once, as a warning."""

import time
from typing import Any

from dynamon.health import SEVERITIES, Finding, findings
from dynamon.monitoring.messages import rank_zero_warn
from dynamon.monitoring.run_context import RunContext
from dynamon.runs.history import History, RunData

_SHARE = 0.01  # of the run's time, where measurements have no budget
_OF_BUDGET = 0.1  # where they have one
_EVERY = 5  # readings: fewer tell nothing new
_CERTAIN = "spike/"  # a second look would find no more of it
_TOLD = ("dynamon/", "gradient/nonfinite")  # by those who measure


class HealthWatch:
    """Applies :func:`dynamon.health.findings` to what has been measured so far and warns of what is new.

    A rule is quoted once a run, and once more where it has become worse: when two looks in a row found the same, or at
    once where the loss is lost or the run is over. Only faults and warnings are; failed measurements and gradients with
    NaN have had a warning of their own. The loss is what ``training_step`` returned on measured steps. Host work only,
    on the first process.

    Args:
        name: Who speaks.

    Cost: about 1 % of the run's time, a tenth of the budget where there is one: the next look waits until the last
    one has been earned. So in a long run of many layers a finding may come a minute late.
    """

    def __init__(self, name: str) -> None:
        """Start with nothing seen."""
        self._name = name
        self._said: dict[str, str] = {}  # the severity of each rule that was quoted
        self._found: set[str] = set()
        self._readings, self._looked_at = 0, 0.0
        self._took, self._is_off = 0.0, False

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
        self._say([one for one in found if is_last or one.rule in self._found or one.rule in at_once])
        self._found = {one.rule for one in found}

    def _say(self, found: list[Finding]) -> None:
        for one in found:
            before = self._said.get(one.rule, "note")
            is_worse = SEVERITIES.index(one.severity) < SEVERITIES.index(before)
            if is_worse and not one.rule.startswith(_TOLD):
                self._said[one.rule] = one.severity
                rank_zero_warn(f"{self._name}: {one.message} {one.advice}")


class StepLoss:
    """The loss of a batch: its mean over the processes that have one, whose gradient they descend.

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
        total, count = self._run.ranks.attached_sums()
        return total / count if count else None

    def end(self) -> None:
        """Nobody asks any more."""
        self._run.ranks.detach_values()

    def _sum_and_count(self) -> list[float]:
        try:
            loss = self._run.loop.loss_of(self._outputs)
        except Exception:  # a loss that is no number, in the middle of a message that other processes wait for
            loss = None
        return [0.0, 0.0] if loss is None else [loss, 1.0]
