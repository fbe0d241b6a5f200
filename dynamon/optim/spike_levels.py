"""The recent level of positive numbers, and how far above it each may lie."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

_LEAST = math.log(2.0)  # nothing below twice its level is out of line
_FIRST = 8  # numbers that enter as they are


class SpikeLevels:
    r"""Follows the logarithms of K series of positive numbers, and gives a limit for the next number of each.

    With x the logarithm of a number, :math:`\mu` and v the mean and the variance of x so far, and weights
    :math:`w = \max(1/n, 1/m)` for the n-th number and a memory of m:

    .. math::
        r = \sqrt{(\log 2)^2 + k^2 v}, \quad d = \max(-r, \min(r, x - \mu)), \quad
        \mu \leftarrow \mu + w d, \quad v \leftarrow (1 - w)(v + w d^2)

    The limit is :math:`e^{\mu + r}`: k standard deviations above the level, and at least twice the level. A number
    above its limit enters as the limit, so that a spike does not raise its own limit; a lasting change of level is
    accepted after some steps, because values at the limit raise the variance. The first numbers of a series, ``warmup``
    of them, are only observed: their limit is infinite; eight of them, or ``warmup`` if that is less, enter as they
    are. Zeros, NaN and infinity are no numbers and change nothing.

    The alarms of the monitors follow levels of their own, which learn nothing from spikes: an alarm must be rarer than
    a factor, which may act at one step in a hundred.

    Args:
        names: K names, one for each series.
        deviations: k.
        memory: m, in numbers.
        warmup: Numbers of a series before it has a limit.

    Attributes:
        names: The same.
        mean: :math:`\mu`, ``[K]`` in float64.
        variance: v, ``[K]``.
        seen: How many numbers each series had, ``[K]``.

    Cost: some NumPy operations on ``[K]`` a step.

    Example:
        >>> import numpy as np
        >>> from dynamon.optim.spike_levels import SpikeLevels
        >>> levels = SpikeLevels(["weight"], deviations=4.0, memory=100, warmup=2)
        >>> for value in (1.0, 1.0, 100.0):
        ...     print(levels.limits())
        ...     levels.take(np.array([value]))
        [inf]
        [inf]
        [2.]
    """

    def __init__(self, names: Sequence[str], deviations: float, memory: int, warmup: int) -> None:
        """Begin without a number."""
        self.names = list(names)
        self._deviations, self._memory, self._warmup = deviations, memory, warmup
        self.mean, self.variance, self.seen = (np.zeros(len(self.names)) for _ in range(3))

    @property
    def reach(self) -> NDArray[np.float64]:
        """Distance r of the limit from the level, in logarithms ``[K]``; infinite for the first numbers."""
        distance = np.sqrt(_LEAST**2 + self._deviations**2 * self.variance)
        return np.where(self.seen >= min(_FIRST, self._warmup), distance, np.inf)

    def limits(self, times: float = 1.0) -> NDArray[np.float64]:
        """Return the limits ``[K]``; with ``times``, those at so many times the distance."""
        with np.errstate(over="ignore"):
            return np.where(self.seen >= self._warmup, np.exp(self.mean + times * self.reach), np.inf)

    def take(self, values: NDArray[np.float64]) -> None:
        """Take the next number of each series, ``[K]``; NaN where there is none."""
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.log(values)
        known = np.isfinite(logs)
        distance = np.clip(np.where(known, logs - self.mean, 0.0), -self.reach, self.reach)
        weight = np.where(known, np.maximum(1.0 / (self.seen + 1.0), 1.0 / self._memory), 0.0)
        self.mean = self.mean + weight * distance
        self.variance = (1.0 - weight) * (self.variance + weight * distance**2)
        self.seen = self.seen + known

    def state_dict(self) -> dict[str, list[float]]:
        """Return mean, variance and count of each series, by name."""
        rows = zip(self.mean.tolist(), self.variance.tolist(), self.seen.tolist(), strict=True)
        return {name: list(row) for name, row in zip(self.names, rows, strict=True)}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        """Take up the series that the state names; others begin anew."""
        rows = np.array([state.get(name, (0.0, 0.0, 0.0)) for name in self.names]).reshape(-1, 3)
        self.mean, self.variance, self.seen = (column.copy() for column in rows.T)
