"""A meter whose readings compare two successive steps."""

from typing import Any

from dynamon.monitoring.cadence import Cadence
from dynamon.monitoring.meter import Meter
from dynamon.monitoring.run_context import RunContext


class PairMeter(Meter):
    """A meter whose readings compare two successive steps: what it needs of the first is kept there."""

    begins_before = 1

    def __init__(self, cadence: Cadence) -> None:
        """Keep nothing."""
        super().__init__(cadence)

    def keeps(self, run: RunContext) -> bool:
        """Return whether the next step may be measured, so that it needs something of this one."""
        return self.cadence.is_due_after(run.step)

    @property
    def saves_copies(self) -> bool:
        """Return whether checkpoints hold what was kept; a reading that a budget chose may go without a comparison."""
        return self.cadence.every_n_steps is not None

    def state_dict(self) -> dict[str, Any]:
        """Return how many readings there were, since every tenth is a full one."""
        return {"points": self.points}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.points = int(state.get("points", 0))
