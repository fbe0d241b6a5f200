"""Under a budget the first process decides for all when to measure, at steps agreed on before."""

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dynamon.monitoring.meter import Meter
    from dynamon.monitoring.run_context import RunContext

_LONGEST = 10_000  # steps between two decisions at most
_SHARE = 0.1  # most of the budget that decisions may take
_AFTER_FAILURE = 100  # ... where the first process cannot decide


class Decisions:
    """What the first process allows at this step, and the step at which it decides again.

    Its clock and its costs count, so that all processes measure the same things at the same steps. Each decision also
    says when the next one is taken: when the first of the meters can be paid for again, by what steps and measurements
    took so far. Steps in between cost nothing.

    Attributes:
        taken: Decisions so far.
    """

    def __init__(self) -> None:
        """The first step decides."""
        self.taken = 0
        self._seconds = math.inf  # that one takes, at best: others include waiting
        self._next, self._at = -math.inf, -1
        self._allowed: frozenset[str] = frozenset()

    def batch_start(self, run: "RunContext", meters: Iterable["Meter"]) -> None:
        """Decide, if this is the step for it; the same on all processes."""
        if not run.ranks.is_distributed or run.step < self._next:
            return
        waiting = [meter for meter in meters if meter.awaits_decision(run)]
        if not waiting:
            return  # for good: what is off stays off
        with run.charge("decision", waits=True):
            said = run.ranks.broadcast_from_rank0(self._say(run, waiting))
        self.taken += 1
        self._seconds = min(self._seconds, run.budget.last["decision"])
        self._allowed = frozenset(m.name for m, allowed in zip(waiting, said, strict=False) if allowed)
        self._at, self._next = run.step, int(said[-1])

    def allows(self, name: str, step: int) -> bool:
        """Whether the last decision allows a meter to begin at ``step``, or at the one before."""
        return name in self._allowed and self._at <= step <= self._at + 1

    def _say(self, run: "RunContext", waiting: Sequence["Meter"]) -> list[float]:
        """What the first process has to say; the others wait for it, so it must say something."""
        said = [0.0] * len(waiting) + [run.step + 1.0]
        if run.ranks.rank == 0:
            try:
                said = self._decide(run, waiting)
            except Exception as error:  # the other processes wait for the decision
                said[-1] = run.step + _AFTER_FAILURE
                run.unsettled.setdefault(waiting[0].name, error)
        return said

    def _decide(self, run: "RunContext", waiting: Iterable["Meter"]) -> list[float]:
        """For each meter whether it may begin now, and the step of the next decision."""
        allowed, steps = [], [float(_LONGEST)]
        costs = {meter: meter.expected(run) for meter in waiting}
        for meter, expected in costs.items():
            meter.cadence.claim(run, meter.name, expected, run.step)
        for meter, expected in costs.items():
            allowed.append(run.budget.allows(meter.name, expected, meter.cadence.share, run.step))
            begins = meter.cadence.is_free(run.step + meter.begins_before) and allowed[-1]
            steps.append(meter.cadence.steps_to_wait(run, meter.name, expected, begins, meter.begins_before))
        wait = max(1.0, min(steps), self._steps_that_pay(run) if self.taken else 1.0)
        known = max(run.steps_seen, 1)  # what few steps took says little of more than as many
        return [*map(float, allowed), run.step + min(wait, known, _LONGEST)]

    def _steps_that_pay(self, run: "RunContext") -> float:
        """Steps in which a decision is earned."""
        assert run.budget.fraction is not None
        return math.ceil(self._seconds / max(_SHARE * run.budget.fraction * run.seconds_per_step, 1e-9))
