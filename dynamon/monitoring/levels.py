"""Follow the usual level of numbers through a run, and tell how far a new one is above it."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dynamon.health.limits import SPIKE

PATIENCE = 100  # numbers above the limit in a row, after which the level is taken anew
WARM_UP = 16  # numbers from which the first level is taken
_EARLY = 50  # numbers after which the limit is at twice its final value
_GAIN, _SCALE_GAIN, _TAIL_GAIN = 1 / 32, 1 / 100, 0.1  # of the level, the spread and the tail at each number
_TAIL = 0.98, 2.0537  # a quantile, and where it lies in standard deviations of a Gaussian
_DECAY = 1.57  # of the tail of Laplacian noise, by deviation: its 98 % quantile is 3.2 of its scale
_CLIP, _MEAN = 2.0, 0.7809  # deviations that count at most, and the mean of min(|z|, 2) of a Gaussian
_FIRST_GAIN = 1 / 8
_MAD = 1.4826  # standard deviations in a median absolute deviation
_LEAST = 1e-3  # of the floor, below which no spread falls
_FIELDS = ("seen", "beyond", "level", "scale", "tail")


class Levels:
    r"""Running levels of several series of numbers; of sizes take the logarithms.

    With a number :math:`y` and :math:`z = (y - \ell) / s`, after each number

    .. math::
        \ell \leftarrow \ell + g\, s \min(\max(z, -2), 2), \qquad
        \log s \leftarrow \log s + h\, (\min(|z|, 2) / 0.781 - 1),

    so that no number moves the level by more than two spreads, and :math:`s` settles at the standard deviation of a
    Gaussian. A third number follows the 98 % quantile :math:`q` of :math:`y - \ell`: noise with a heavy tail widens the
    unit of deviations, :math:`(y - \ell) / \max(s, q / 2.05, f)`. The floor f makes a spike a stated
    least rise, however quiet a series is. Trends of up to some hundredths per number
    are followed. Level and spread learn nothing from spikes, and the quantile as much from the first number of one
    as from any above it: what comes back at more than one number in fifty becomes usual after some dozens of times.

    The first 16 numbers of a series are its first level: their median, with the spread of their differences, which a
    trend does not widen. The limit begins at four times its final value, and is at twice that value after 50 numbers:
    levels move most in the first steps of a run. A series that stays above its limit for 100 numbers has moved for
    good: its level is taken anew.

    :class:`dynamon.optim.spike_levels.SpikeLevels`, by which the guard clips, follows mean and variance and may act at
    one step in a hundred. Here, with hundreds of series, one alarm in ten thousand steps is too many.

    The limit is 7 deviations for a single series, and :math:`7 + \log(n) / 1.57` where n series are judged together:
    noise with exponential tails then passes it in one of 100,000 steps.

    Args:
        least: ``[R]``, how far above its level a spike of each series is at least.
        together: ``[R]``, the number n of series that each is judged together with, itself included; None for 1.

    Host work in float64: some 20 NumPy calls on ``[R]`` arrays, 30 to 60 microseconds for R = 300.

    Example:
        >>> import numpy as np
        >>> from dynamon.monitoring.levels import Levels
        >>> levels = Levels(np.log([2.0]))
        >>> noise = np.random.default_rng(0).normal(size=(200, 1))
        >>> usual = [float(levels.see(0.3 * row)[0]) for row in noise]
        >>> max(usual) < 5, float(levels.see(np.log([100.0]))[0]) > 7
        (True, True)
    """

    def __init__(self, least: NDArray[Any], together: NDArray[Any] | None = None) -> None:
        """Start with nothing seen."""
        self._limits = SPIKE + np.log(np.ones(len(least)) if together is None else together) / _DECAY
        self._floors = np.asarray(least, dtype=np.float64) / self._limits
        count = len(self._floors)
        self._seen, self._level = np.zeros(count), np.zeros(count)
        self._scale, self._tail, self._beyond = np.zeros(count), np.zeros(count), np.zeros(count)
        self._first = np.full((WARM_UP, count), np.nan)

    def see(self, numbers: NDArray[Any], slack: float = 0.0) -> NDArray[Any]:
        """Return how far numbers are above their levels, and learn from them.

        Args:
            numbers: ``[R]``; NaN where there is none, infinite for the result of a computation that has failed.
            slack: By how much all of them may be larger than usual. With slack nothing is learned.

        Returns:
            ``[R]`` deviations, to be compared with :attr:`limits` as they were before the call: infinite for an
            infinite number, 0 where there is none, or no level yet.
        """
        infinite, known = np.isposinf(numbers), np.isfinite(numbers)
        ready = known & (self._seen >= WARM_UP)
        above = np.where(ready, numbers - self._level - slack, 0.0)
        unit = np.maximum(np.maximum(self._scale, self._tail / _TAIL[1]), self._floors)
        deviations = np.where(infinite, np.inf, above / unit)
        if not slack:
            warming = known & ~ready
            self._learn(above, ready, ready & (deviations < self.limits))
            if warming.any():
                self._warm_up(numbers, warming)
        return deviations

    @property
    def limits(self) -> NDArray[Any]:
        """``[R]``, the deviation from which a number is a spike: higher while little is known."""
        return self._limits * (1.0 + _EARLY / np.maximum(self._seen, 1.0))

    def rises(self, numbers: NDArray[Any]) -> NDArray[Any]:
        """Return by how much numbers ``[R]`` are above their levels; NaN where there is no level yet."""
        return np.where(self._seen >= WARM_UP, numbers - self._level, np.nan)

    def _learn(self, above: NDArray[Any], ready: NDArray[Any], usual: NDArray[Any]) -> None:
        z = np.where(usual, above / np.where(usual, self._scale, 1.0), 0.0)
        gain = np.maximum(_GAIN, 1 / np.maximum(self._seen - WARM_UP + 1 / _FIRST_GAIN, 1.0))
        self._level += gain * self._scale * np.clip(z, -_CLIP, _CLIP)
        growth = _SCALE_GAIN * (np.minimum(np.abs(z), _CLIP) / _MEAN - 1)
        self._scale *= np.where(usual, np.exp(growth), 1.0)
        exceeds = _TAIL_GAIN * np.where(above > self._tail, _TAIL[0], _TAIL[0] - 1)
        self._tail *= np.where(usual | ready & (self._beyond == 0), np.exp(exceeds), 1.0)
        for spread in (self._scale, self._tail):
            np.maximum(spread, _LEAST * self._floors, out=spread)
        self._seen += usual
        self._beyond = np.where(usual, 0.0, self._beyond + ready)
        moved = self._beyond >= PATIENCE
        if moved.any():
            self.restart(moved)

    def restart(self, which: NDArray[Any]) -> None:
        """Take the levels of some series anew, by a mask ``[R]`` or their places: their numbers have moved for good."""
        self._seen[which] = self._beyond[which] = 0.0
        self._first[:, which] = np.nan

    def _warm_up(self, numbers: NDArray[Any], warming: NDArray[Any]) -> None:
        at = np.flatnonzero(warming)
        self._first[self._seen[at].astype(int), at] = numbers[at]
        self._seen[at] += 1
        done = at[self._seen[at] == WARM_UP]
        if len(done):
            first = self._first[:, done]
            self._level[done] = np.median(first[WARM_UP // 2 :], axis=0)
            changes = np.diff(first, axis=0)
            spread = _MAD * np.median(np.abs(changes - np.median(changes, axis=0)), axis=0) / np.sqrt(2)
            self._scale[done] = np.maximum(spread, _LEAST * self._floors[done])
            self._tail[done] = _TAIL[1] * self._scale[done]

    def state_dict(self) -> dict[str, Tensor]:
        """Return levels and spreads ``[R]`` as tensors."""
        return {name: torch.tensor(getattr(self, f"_{name}")) for name in (*_FIELDS, "first")}

    def load_state_dict(self, state: Mapping[str, Tensor], places: NDArray[Any]) -> None:
        """Take them up.

        Args:
            state: What :meth:`state_dict` has returned.
            places: ``[R]``, the place in it of each series, -1 where it has none.
        """
        there = places >= 0
        for name in _FIELDS:
            getattr(self, f"_{name}")[there] = state[name].numpy()[places[there]]
        self._first[:, there] = state["first"].numpy()[:, places[there]]
