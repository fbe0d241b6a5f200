"""Move ratios linearly to new values."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Ramp:
    r"""Moves the ratios in force to new ones along straight lines.

    After k of n steps from a to b a layer has :math:`a + (b - a) k / n`, so a ratio that does not change is constant to
    the bit. All ratios start at 1.

    Args:
        names: Layer names, which are the keys of the saved state.
        steps: Number of steps of a transition; 0: new ratios are in force at once.
        dead_band: A new ratio within this relative distance of a layer's current goal is ignored.
    """

    def __init__(self, names: Sequence[str], steps: int, dead_band: float = 0.0) -> None:
        """Start at 1 everywhere."""
        self._names, self._steps, self._dead_band = list(names), steps, dead_band
        self._from = np.ones(len(self._names))
        self._to = np.ones(len(self._names))
        self._taken = steps

    def aim(self, goals: NDArray[Any]) -> None:
        """Set new goals ``[L]``, approached from the ratios in force."""
        kept = np.abs(goals - self._to) <= self._dead_band * self._to
        self._from, self._to, self._taken = self.ratios(), np.where(kept, self._to, goals), 0

    def advance(self) -> None:
        """Take one step towards the goals."""
        self._taken = min(self._taken + 1, self._steps)

    def ratios(self) -> NDArray[Any]:
        """Return the ratios in force, ``[L]``."""
        if self._taken >= self._steps:
            return self._to
        return self._from + (self._to - self._from) * (self._taken / self._steps)

    def state_dict(self) -> dict[str, Any]:
        """Return start and goal of each layer by name, and the number of steps taken."""
        pairs = zip(self._names, self._from.tolist(), self._to.tolist(), strict=True)
        return {"ways": {name: [start, goal] for name, start, goal in pairs}, "taken": self._taken}

    def load_state_dict(self, state: dict[str, Any], low: float, high: float) -> None:
        """Restore a saved state, clipped to the bounds; a layer that was not saved starts at 1."""
        ways = np.array([state["ways"].get(name, [1.0, 1.0]) for name in self._names]).reshape(-1, 2)
        self._from, self._to = np.clip(ways, low, high).T.copy()
        self._taken = min(int(state["taken"]), self._steps)
