"""A meter whose readings compare two successive steps."""

from typing import Any

from dynamon.monitoring.cadence import Cadence
from dynamon.monitoring.meter import Meter
from dynamon.monitoring.run_context import RunContext


class PairMeter(Meter):
    """A meter whose readings compare two successive steps: what it needs of the first is kept there.

    At fixed steps the step before a reading is known. Under a budget a step at which a reading could be paid for is
    kept, and the next one is read.
    """

    begins_before = 1

    def __init__(self, cadence: Cadence) -> None:
        """Nothing kept."""
        super().__init__(cadence)
        self._keeping = False  # something of this step is kept
        self._armed = False  # something of the step before was

    def reads(self, run: RunContext) -> bool:
        """Whether this step is measured."""
        return self._planned(run, run.step) if self._is_fixed(run) else self._armed

    def keeps(self, run: RunContext) -> bool:
        """Whether the next step may be measured, so that it needs something of this one."""
        if self._is_fixed(run) or not self._armed:
            self._keeping = self._keeping or self._planned(run, run.step + 1)
        else:  # this step is read, and only without an interval can the next one be
            self._keeping = self.cadence.interval <= 1
        return self._keeping

    def wake(self, run: RunContext) -> None:
        """Nothing is kept."""
        self._keeping = self._armed = False

    def turn(self, run: RunContext) -> None:
        """The step is over: go on to the next."""
        kept, self._keeping = self._keeping, False
        was_read = self._armed and not self._is_fixed(run)
        self._armed = kept and (not was_read or self._planned(run, run.step + 1))

    def _planned(self, run: RunContext, step: int) -> bool:
        return self.cadence.due(run, self.name, self.expected, step)

    def _is_fixed(self, run: RunContext) -> bool:
        return self.cadence.every_n_steps is not None or run.trying_out

    @property
    def saves_copies(self) -> bool:
        """Whether checkpoints hold what was kept; a reading that a budget chose may go without a comparison."""
        return self.cadence.every_n_steps is not None

    def state_dict(self) -> dict[str, Any]:
        """How many readings there were, since every tenth is a full one, and whether the next step is one."""
        return {"points": self.points, "armed": self._armed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._keeping = False
        self.points, self._armed = int(state.get("points", 0)), bool(state.get("armed", False))
