"""Find a loss that rises by less than a spike but stays up: a sequential test over steps."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dynamon.health.limits import LOSS_SHIFT

_WARM_UP = 16  # numbers before the first test
_EARLY = 25  # numbers after which the limit would be at twice its final value
_GAIN, _SPREAD_GAIN, _BLOCK_GAIN = 1 / 24, 1 / 64, 1 / 24  # of the level, and of the spreads of numbers and of blocks
_FALL, _RISE = 4.0, 1.5  # deviations that count at most for the level
_TAIL, _TAIL_GAIN = (0.98, 2.0537), 0.1  # a quantile, where a Gaussian has it, and how fast it is followed
_CLIP, _ALLOWED = 3.0, 0.75  # deviations that count at most in the sum, and what is taken off each
_FLOOR = 0.02  # least unit, of a logarithm: a loss has to rise by some hundredths
_BLOCK, _MOST = 8, 64  # numbers of a block, and those among which a shift is taken to begin
_MEAN_DIFFERENCE, _MEAN = 1.128, 0.798  # mean of the absolute difference of two standard normal numbers, and of one
PATIENCE = 100  # numbers after which a shift has come to stay
_REST = 50  # numbers without a test, after something that explains a rise
_RECENT = 1 / 8  # gain of the running mean that tells whether it is over


@dataclass
class Shift:
    """Hold a shift of the loss: the step where it began, the level before, and what is known of the rise.

    Attributes:
        step: Where it began.
        level: Before it.
        rise: Mean rise since.
        deviations: The same in standard deviations of a step.
        recent: Running mean of the rise.
        seen: Numbers since it was found.
    """

    step: int
    level: float
    rise: float
    deviations: float
    recent: float
    seen: int = 0


class LossShift:
    r"""Finds where a loss begins to stay above its level, by a cumulative sum.

    With numbers y (logarithms of losses), a level that follows them, and a unit s,

    .. math:: S \leftarrow \max(0, S + \max(\min((y - \ell) / s, 3), -3) - 3/4);

    beyond a limit the loss has shifted. It began at the number from which on the mean deviation, times the root of
    their count, is largest. A single number, however large, adds 2.25 to the sum, which must come to 7: a spike alone
    is no shift.

    The level follows falls faster than rises. The unit is the largest of four: the standard deviation from differences
    of successive numbers; that from second differences of means over eight numbers, which noise that goes on for
    several steps widens and a trend does not; the 98 % quantile above the level over 2.05; and 0.02.

    After E. S. Page, "Continuous inspection schemes", Biometrika 41 (1954).

    Host work: some microseconds per number.

    Example:
        >>> import numpy as np
        >>> from dynamon.monitoring.loss_shift import LossShift
        >>> noise = np.random.default_rng(0).normal(1.0, 0.1, size=200)
        >>> test = LossShift()
        >>> noise[150:] += 0.4
        >>> found = [test.see(step, y) for step, y in enumerate(noise)]
        >>> [shift.step for shift in found if shift is not None]
        [150]
    """

    def __init__(self) -> None:
        """Start with nothing seen."""
        self._seen, self._last = 0, math.nan
        self._level = self._spread = self._long = self._sum = 0.0
        self._tail = 0.0
        self._since: list[tuple[int, float, float, float]] = []  # step, deviation, number and level while the sum lasts
        self._rests = 0  # numbers before the next test
        self._block: list[float] = []
        self._means: list[float] = []
        self.open: Shift | None = None

    def rest(self) -> None:
        """Follow the level only for the next 50 numbers: something that is known may raise them."""
        self._rests = _REST

    def see(self, step: int, number: float) -> Shift | None:
        """Take in the number of a step, and return the shift that is found at it.

        Args:
            step: The step.
            number: Logarithm of its loss; one that is not finite is left out.
        """
        if not math.isfinite(number):
            return None
        self._seen += 1
        if self._seen == 1:
            self._last = self._level = number
            return None
        unit = self._unit(number)
        found = self._test(step, number, unit) if self._seen > _WARM_UP else None
        self._learn(number, unit)
        return found

    def _unit(self, number: float) -> float:
        """Learn the spread of successive numbers; return what deviations are counted in."""
        change, self._last = abs(number - self._last) / _MEAN_DIFFERENCE, number
        if self._seen > _WARM_UP:
            change = min(change, 3 * self._spread)
        self._spread += max(_SPREAD_GAIN, 1 / self._seen) * (change - self._spread)
        return max(self._spread, self._long, self._tail / _TAIL[1], _FLOOR)

    def _test(self, step: int, number: float, unit: float) -> Shift | None:
        if self.open is not None:
            self._follow(self.open, number)
            return None
        if self._rests:
            self._rests, self._sum = self._rests - 1, 0.0
            return None
        if self._sum == 0:
            self._since = []
        z = min(max((number - self._level) / unit, -_CLIP), _CLIP)
        self._since = [*self._since, (step, z, number, self._level)][-_MOST:]
        self._sum = max(0.0, self._sum + z - _ALLOWED)
        if self._sum <= LOSS_SHIFT * (1 + _EARLY / self._seen):
            return None
        self._sum, self.open = 0.0, self._begun(unit)
        return self.open

    def _begun(self, unit: float) -> Shift:
        """The shift that the last numbers show: where it most likely began."""
        best, most, total = 0, -math.inf, 0.0
        for back, (_, z, _, _) in enumerate(reversed(self._since), 1):
            total += z
            if total / math.sqrt(back) > most:
                best, most = back, total / math.sqrt(back)
        step, _, _, level = self._since[-best]
        rise = sum(number - level for _, _, number, _ in self._since[-best:]) / best
        return Shift(step, level, rise, rise / unit, rise)

    def _follow(self, shift: Shift, number: float) -> None:
        shift.seen += 1
        shift.recent += _RECENT * (number - shift.level - shift.recent)

    def close(self) -> bool | None:
        """Return whether the open shift is over, and forget it: None where it still lasts, False if it will."""
        shift = self.open
        if shift is None or (shift.recent >= shift.rise / 2 and shift.seen < PATIENCE):
            return None
        self.open = None
        return shift.recent < shift.rise / 2

    def _learn(self, number: float, unit: float) -> None:
        above = number - self._level
        z = above / unit
        if self._seen == _WARM_UP:
            self._tail = _TAIL[1] * self._spread
        elif self._seen > _WARM_UP:
            growth = _TAIL_GAIN * (_TAIL[0] if above > self._tail else _TAIL[0] - 1)
            self._tail = max(self._tail * math.exp(growth), self._spread)
        if self._seen > _WARM_UP:
            z = min(max(z, -_FALL), _RISE)
        self._level += max(_GAIN, 1 / self._seen) * unit * z
        self._block.append(min(number, self._level + _CLIP * unit))
        if len(self._block) == _BLOCK:
            self._means = [*self._means[-2:], sum(self._block) / _BLOCK]
            self._block = []
            if len(self._means) == 3:
                self._learn_block()

    def _learn_block(self) -> None:
        one, two, three = self._means
        curved = abs(one - 2 * two + three) * math.sqrt(_BLOCK / 6) / _MEAN
        count = self._seen // _BLOCK - 2
        if count > 3:
            curved = min(curved, 3 * self._long)
        self._long += max(_BLOCK_GAIN, 1 / count) * (curved - self._long)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: numbers."""
        own = {key: value for key, value in vars(self).items() if key != "open"}
        own |= {"_since": [list(one) for one in self._since], "_block": list(self._block), "_means": list(self._means)}
        return own | {"open": None if self.open is None else dict(vars(self.open))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it up."""
        vars(self).update(state)
        self._since = [(int(step), *rest) for step, *rest in state["_since"]]
        self._block, self._means = list(state["_block"]), list(state["_means"])
        self.open = None if state["open"] is None else Shift(**state["open"])
