"""Plan when meters measure, and look at nothing in between."""

from dynamon.monitoring.meter_caller import MeterCaller
from dynamon.monitoring.missed_readings import say_late
from dynamon.monitoring.planner import FIRST_STEPS
from dynamon.monitoring.rank_decisions import review


class MeterScheduler(MeterCaller):
    """Calls meters at the steps that are planned, and sleeps at the others.

    Attributes:
        asleep: Whether nothing has to be done at the next steps.
    """

    _fraction: float | None

    def _forget_plan(self) -> None:
        """Begin like new."""
        self._call_seconds, self._batches_booked = 0.0, 0
        self._has_told = False
        self.asleep, self._slept_at, self._wakes_at = False, 0, 0.0

    def _plan(self) -> None:
        """Plan the readings to come, for all monitors of the loop once all have seen the step."""
        run = self._run
        assert run is not None
        self._book_calls()
        planner = run.planner
        if not planner.is_last(self):
            if not planner.is_due(run.step):
                self._fall_asleep()
            return
        if planner.is_due(run.step):
            with self._budget.watch():
                review(run)
            for member in planner.owners:
                member._tell_late()
        for member in planner.owners:
            member._fall_asleep()

    def _fall_asleep(self) -> None:
        """Look at nothing before the next reading that is planned, as far as nobody has to."""
        run = self._run
        if run is None:
            return
        wakes_at = run.planner.wakes_at(self)
        if self.asleep:
            self._wakes_at = wakes_at
        elif (
            wakes_at > run.step + 1
            and self._started
            and run.steps.can_sleep
            and all(m.is_idle(run) for m in self._meters)
        ):
            self.asleep, self._slept_at, self._wakes_at = True, run.step + 1, wakes_at
            run.steps.sleep()
            for meter in self._meters:
                meter.lapse(run)

    def _book_calls(self) -> None:
        """Book what the loop has taken to call this monitor since the last time, asleep or not."""
        run = self._run
        if run is not None and self._call_seconds:
            batches = run.loop.batches_seen
            self._budget.book("hooks", max(batches - self._batches_booked, 0) * self._call_seconds)
            self._batches_booked = batches

    def sleeps_on(self, step: int) -> bool:
        """Return whether nothing has to be done at a step; else wake up, where nothing had to be before."""
        if not self.asleep:
            return False
        if self._slept_at <= step < self._wakes_at:
            return True
        self._wake()
        return False

    def _wake(self) -> None:
        """Count the steps that were not looked at, and look at those to come."""
        if self.asleep and self._run is not None:
            self.asleep = False
            self._run.steps.sleep(False)
            self._run.steps_seen += max(self._run.step - self._slept_at, 0)

    def _tell_late(self) -> None:
        """Say once what the grace does not pay for, and when it comes."""
        run = self._run
        if run is None or self._has_told or run.step < run.begun_at + FIRST_STEPS or self._fraction is None:
            return
        self._has_told = True
        say_late(self, run)
