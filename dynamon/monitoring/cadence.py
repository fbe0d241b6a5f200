"""When a meter measures."""

import math
from collections.abc import Callable

from dynamon.monitoring.run_context import RunContext


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

    def due(self, run: RunContext, name: str, expected: Callable[[RunContext], float], step: int) -> bool:
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

    def claim(self, run: RunContext, name: str, expected: float, step: int) -> None:
        """Tell the budget how long this has waited."""
        run.budget.claim(name, expected, step - max(self.last, run.begun_at), step, run.seconds_per_step)

    def go_back_to(self, step: int) -> None:
        """Training has gone back to before a step: what was measured at it or later was not."""
        self.last = self.last if self.last < step else -math.inf
        self._passed = self._passed if self._passed < step else step - 1

    def is_free(self, step: int) -> bool:
        """Whether the last measurement is far enough away."""
        return step - self.last >= self.interval

    def steps_to_wait(self, run: RunContext, name: str, expected: float, begins: bool, begins_before: int) -> float:
        """Steps until the next measurement can begin, after one at this step if ``begins``."""
        seconds = run.budget.seconds_to_wait(name, expected * (2 if begins else 1), self.share)
        free = self.interval if begins else self.last + self.interval - begins_before - run.step
        return max(free, math.ceil(seconds / max(run.seconds_per_step, 1e-9)), 1)
