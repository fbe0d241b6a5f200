"""The timetable of one group of quantities: when it was read last, and when it is read next."""

import math

NEVER = math.inf


class Cadence:
    """Keep the timetable of one group of quantities: fixed steps, or those that the planner chooses.

    Args:
        every_n_steps: Read at every step that is a multiple of this, whatever it costs. A step that was not taken is
            replaced by the next one that is. None: the planner decides.
        interval: Fewest steps between two readings where the planner decides.

    Attributes:
        lead: Steps before a reading at which something is kept for it.
        last: Step of the last reading; minus infinity before the first.
        next: Step of the next reading; infinity while none is planned.
        rests_until: Step before which nothing is read, after failures.
        is_tryout: Whether every step is read (``fast_dev_run``).
        is_open: Whether the planner has to find the step of the next reading.
    """

    def __init__(self, every_n_steps: int | None, interval: int) -> None:
        """Plan nothing."""
        self.every_n_steps, self.interval = every_n_steps, interval
        self.lead, self.is_tryout, self.is_open = 0, False, False
        self.last, self.next, self.rests_until = -math.inf, NEVER, -math.inf
        self._tried = -math.inf  # step at which a reading was due and did not come about

    @property
    def is_planned(self) -> bool:
        """Return whether the planner decides."""
        return self.every_n_steps is None and not self.is_tryout

    @property
    def unit(self) -> int:
        """Fewest steps between two readings."""
        return self.every_n_steps or self.interval

    @property
    def wakes_at(self) -> float:
        """First step at which something has to be done for the next reading."""
        return self.next - self.lead

    def begin(self, step: int) -> None:
        """Start at a step, or go back to it: readings at it and after it have not been taken."""
        self.last = self.last if self.last < step else -math.inf
        self.rests_until = self._tried = -math.inf
        self._follow(step - 1)

    def is_due(self, step: int) -> bool:
        """Return whether a step is read."""
        return step >= self.next

    def is_due_after(self, step: int) -> bool:
        """Return whether the next step may be read as well, so that something of this one is kept for it."""
        if self.is_tryout:
            return True
        if self.every_n_steps is not None:
            return (step + 1) % self.every_n_steps == 0
        return self.next == step + 1 or self.is_due(step) and self.interval <= 1

    def read(self, step: int) -> None:
        """Note a reading."""
        self.last = step

    def passed(self, step: int) -> None:
        """Note that a step was taken: what was due by then is over."""
        if self.is_planned and self.next > step:
            return
        if self.last < step:
            self._tried = step
        self._follow(step)

    def possible_after(self, step: int) -> float:
        """First step after a step at which a reading may be planned."""
        is_kept = self.interval <= 1 and self.last == step  # then a reading is what the next one is compared with
        return max(step + 1 + (0 if is_kept else self.lead), self.rests_until, self._tried + self.interval)

    def put_off(self, step: int) -> None:
        """Note that a step was not taken: a planned reading that was due at it is tried anew."""
        if self.is_planned and self.next <= step:
            self.next = step + 1 + self.lead

    def rest(self, until: float) -> None:
        """Read nothing before a step."""
        self.rests_until = until
        self._follow(-1)

    def _follow(self, step: int) -> None:
        """Find the first fixed step after a step, rest included; the planner finds others."""
        after = max(step, math.ceil(self.rests_until) - 1) if math.isfinite(self.rests_until) else step
        if self.is_tryout:
            self.next = after + 1
        elif self.every_n_steps is not None:
            self.next = (after // self.every_n_steps + 1) * self.every_n_steps
        else:
            self.next, self.is_open = NEVER, True
