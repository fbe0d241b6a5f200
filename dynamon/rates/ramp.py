"""Ratios that change now and then, and go over to the new ones little by little."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Ramp:
    r"""From the ratios in force to new ones along a straight line.

    After k of n steps a layer on its way from a to b has :math:`a + (b - a) k / n`, so a ratio that stays the same
    stays exactly the same. All begin at 1.

    Args:
        names: Layer names, which key the saved state.
        steps: How many steps the way takes; 0: none, new ratios are in force at once.
        dead_band: A ratio within this share of where a layer already is, or goes, changes nothing.
    """

    def __init__(self, names: Sequence[str], steps: int, dead_band: float = 0.0) -> None:
        """Start at 1 everywhere."""
        self._names, self._steps, self._dead_band = list(names), steps, dead_band
        self._from = np.ones(len(self._names))
        self._to = np.ones(len(self._names))
        self._taken = steps

    def aim(self, goals: NDArray[Any]) -> None:
        """Set out for new ratios ``[L]``, from those in force."""
        kept = np.abs(goals - self._to) <= self._dead_band * self._to
        self._from, self._to, self._taken = self.ratios(), np.where(kept, self._to, goals), 0

    def advance(self) -> None:
        """Take one step of the way."""
        self._taken = min(self._taken + 1, self._steps)

    def ratios(self) -> NDArray[Any]:
        """The ratios in force, ``[L]``."""
        if self._taken >= self._steps:
            return self._to
        return self._from + (self._to - self._from) * (self._taken / self._steps)

    def state_dict(self) -> dict[str, Any]:
        """Where each layer comes from and goes to, by name, and how far it is."""
        pairs = zip(self._names, self._from.tolist(), self._to.tolist(), strict=True)
        return {"ways": {name: [start, goal] for name, start, goal in pairs}, "taken": self._taken}

    def load_state_dict(self, state: dict[str, Any], low: float, high: float) -> None:
        """Take up a saved state within bounds that may be narrower now; a layer that was not saved starts at 1."""
        ways = np.array([state["ways"].get(name, [1.0, 1.0]) for name in self._names]).reshape(-1, 2)
        self._from, self._to = np.clip(ways, low, high).T.copy()
        self._taken = min(int(state["taken"]), self._steps)
