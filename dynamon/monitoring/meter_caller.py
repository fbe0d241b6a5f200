"""Call meters, and go on where one of them fails."""

from typing import Any

from dynamon.curvature.memory import empty_cache
from dynamon.distributed.ranks import ran_out_of_memory
from dynamon.monitoring.budget import Budget
from dynamon.monitoring.failures import PAUSE_AFTER, Failures, SteeringError, first_line, forget_frames
from dynamon.monitoring.messages import rank_zero_warn
from dynamon.monitoring.meter import Meter
from dynamon.monitoring.recorder import Recorder
from dynamon.monitoring.run_context import RunContext


class MeterCaller:
    """Calls meters at the events of a training loop, and catches what they raise."""

    _meters: list[Meter]
    _budget: Budget
    _recorder: Recorder
    _run: RunContext | None
    _strict: bool
    _started: bool

    def _forget_failures(self) -> None:
        """Begin like new."""
        self._failures = 0
        self._in_a_row, self._resting = Failures(), set[str]()
        self._causes: set[str] = set()
        self._measured = False

    def _has_started(self) -> bool:
        """Start the meters when there is something to measure; whether they have."""
        raise NotImplementedError

    def paused(self, meter: Meter) -> bool:
        """Return whether a meter failed too often in a row, and has not waited long enough to be tried again."""
        if not self._in_a_row.until or self._run is None:  # asked many times a step
            return False
        return self._in_a_row.rests(meter.name, self._run.step)

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
            meter.lapse(self._run)
        points = meter.points
        try:
            getattr(meter, method)(self._run, *arguments)
            if meter.points > points and method != "resume":  # which takes up a count
                self._measured = True
                self._in_a_row.clear(meter.name)
                self._recorder.keep()
        except SteeringError:
            raise
        except Exception as error:  # a measurement that fails must not end training
            if not self._run.ranks.is_collective_failure(error):
                # The other processes have not heard of it: they do when they measure this together.
                self._run.keep_untold(meter.name, error)
                return
            if self._strict:
                raise
            self._failed(meter, error)

    def _failed(self, meter: Meter, error: Exception) -> None:
        assert self._run is not None
        room = None
        if ran_out_of_memory(error):
            forget_frames(error)
            empty_cache(self._run.device)
            room = meter.make_room(self._run)
        self._recorder.forget()
        self._failures += 1
        in_a_row = self._in_a_row.add(meter.name, self._run.step + 1, meter.cadence.unit)
        if in_a_row >= PAUSE_AFTER:
            self._resting.add(meter.name)
            meter.cadence.rest(self._in_a_row.until[meter.name])
        line = first_line(error)
        pauses = in_a_row == PAUSE_AFTER
        after = (
            "It is paused now. It is tried again in 10 readings, then in twice as many each time."
            if pauses
            else "Training goes on; strict=True raises here instead."
        )
        after = after if room is None else f"{room} {after}"
        news = in_a_row == 1 and line not in self._causes
        self._causes.add(line)  # what stops two meters at once is one story
        if news or room or pauses:
            rank_zero_warn(f"{type(self).__name__}: the {meter.name} measurement failed: {line} {after}")
