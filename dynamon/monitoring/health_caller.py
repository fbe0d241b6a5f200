"""Have the health rules look at what all monitors of a loop have measured."""

from dynamon.health import Finding
from dynamon.monitoring.health_watch import HealthWatch
from dynamon.monitoring.meter_scheduler import MeterScheduler
from dynamon.runs.history import History


class HealthCaller(MeterScheduler):
    """Calls the health rules, where it speaks for all monitors of its loop."""

    _health: HealthWatch

    @property
    def history(self) -> History:
        """Everything measured so far, as arrays by quantity."""
        return self._recorder.history

    @property
    def findings(self) -> list[Finding]:
        """Return what looks wrong in what this monitor has measured, see :mod:`dynamon.health`; the worst first.

        Before a fit there is nothing.
        """
        return self._health.findings(self.history) if len(self.history) else []

    @property
    def asks_to_stop(self) -> bool:
        """Return whether a finding of ``stop_on`` was met, on the first process."""
        return self._health.asks_to_stop

    def last_look(self) -> None:
        """Apply the health rules for the last time, and wait for alerts for some seconds."""
        if self._run is not None and self._watches_health():
            self._health.look(self._run, *self._histories(), is_last=True)
            self._health.close()

    def _tell_spikes(self) -> None:
        """Have the rules look at what the sentinel has just found."""
        if self._run is not None and self._watches_health():
            self._health.see(self._run, *self._histories(), is_urgent=True)

    def _watches_health(self) -> bool:
        """Return whether this monitor speaks for all of them: the first one does, on the first process."""
        assert self._run is not None
        loop = self._run.loop
        first = next(member for member in loop.members if isinstance(member, HealthCaller))
        return first is self and loop.is_writing and not loop.is_trial

    def _histories(self) -> list[History]:
        assert self._run is not None
        return [member.history for member in self._run.loop.members]
