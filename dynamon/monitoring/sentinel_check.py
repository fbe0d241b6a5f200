"""Check each step by a few numbers, and tell which steps deserve a look at everything."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynamon.monitoring.sentinel_norms import OptimizerNorms, StepNumbers

_LAYERS = 4  # that are checked
_IDLE = 16  # steps in a row without a gradient, after which another layer is checked
_WARM_UP = 16  # numbers before the first decision
_SPREADS = 4.0  # above its level that a number is at least
_GAIN, _FALL = 1 / 32, 1 / 8  # of level and spread, and of a level that falls
_CLIP = 2.0  # spreads that count at most
_MEAN_DIFFERENCE = 1.128  # mean of the absolute difference of two standard normal numbers
_QUANTILE, _TAIL_GAIN = 0.99, 0.2
_PATIENCE = 20  # numbers beyond the limit in a row, after which the level is taken anew
_LEAST_GRADIENT, _LEAST_LOSS = math.log(1.5), math.log(1.2)


class RunningLimit:
    r"""A limit that numbers of a series exceed at about one step in 100 at most, and where they jump.

    With a number :math:`y`, its level :math:`\ell` and its standard deviation :math:`s`, the limit is
    :math:`\ell + \max(4 s, q, f)`. The deviation comes from differences of successive numbers, which a trend does not
    widen, and the level follows falls faster than rises. The quantile :math:`q` grows by a fifth where a number begins
    to exceed it, and falls by 0.2 % where not: however heavy the tail, it settles where one in 100 does. The floor
    :math:`f` is the least rise that counts. Nothing else is learned from numbers beyond the limit; after twenty of them
    in a row the level is taken anew.

    Args:
        least: The floor.

    Cost: about a microsecond for a number, in plain Python.

    Example:
        >>> from dynamon.monitoring.sentinel_check import RunningLimit
        >>> limit = RunningLimit(0.5)
        >>> any([limit.is_exceeded(0.1 * (-1) ** i) for i in range(100)])
        False
        >>> limit.is_exceeded(2.0)
        True
    """

    __slots__ = ("_beyond", "_last", "_least", "_level", "_seen", "_spread", "_tail", "_was_finite")

    def __init__(self, least: float) -> None:
        """Start with nothing seen."""
        self._least = self._tail = least
        self._seen, self._level, self._last, self._spread = 0, 0.0, 0.0, 0.0
        self._beyond, self._was_finite = 0, True

    def is_exceeded(self, number: float) -> bool:
        """Return whether a number is beyond the limit, and learn from it.

        Args:
            number: NaN where there is none. The first infinite one of several in a row is beyond every limit.
        """
        if math.isnan(number):
            return False
        was_finite, self._was_finite = self._was_finite, not math.isinf(number)
        if not self._was_finite:
            return was_finite
        above = number - self._level
        if self._seen >= _WARM_UP and above > max(_SPREADS * self._spread, self._tail):
            self._exceed()
            return True
        self._learn(number, above)
        return False

    def _exceed(self) -> None:
        if self._beyond == 0:
            self._tail *= math.exp(_TAIL_GAIN * _QUANTILE)
        self._beyond += 1
        if self._beyond == _PATIENCE:
            self._seen = self._beyond = 0

    def _learn(self, number: float, above: float) -> None:
        change = abs(number - self._last) / _MEAN_DIFFERENCE
        self._last, self._beyond, self._seen = number, 0, self._seen + 1
        if self._seen == 1:
            self._level, self._spread = number, 0.0
        elif self._seen <= _WARM_UP:
            self._level += above / min(self._seen, 4)
            self._spread += (change - self._spread) / (self._seen - 1)
        else:
            most = _CLIP * self._spread + _GAIN * self._least  # of a spread that is nothing, too
            self._level += _FALL * above if above < 0 else _GAIN * min(above, most)
            self._spread += _GAIN * (min(change, 2 * most) - self._spread)
            self._tail = max(self._tail * math.exp(_TAIL_GAIN * (_QUANTILE - 1)), self._least)


@dataclass
class _Watched:
    """Hold a layer that is checked, its limit, and the steps in a row at which it had no gradient."""

    place: int
    limit: RunningLimit = field(default_factory=lambda: RunningLimit(_LEAST_GRADIENT))
    idle: int = 0


class GradientCheck:
    """Watches the gradients of a few layers of one optimizer: a limit for the norm of each.

    The layers are four at most, spread evenly over those that have a gradient. On a CPU the first 512 entries of each
    count. A layer whose gradient is zero or missing for 16 steps in a row gives way to the next one.

    Args:
        norms: Of the optimizer.

    Attributes:
        norms: The same.
    """

    def __init__(self, norms: OptimizerNorms) -> None:
        """Start with nothing seen."""
        self.norms = norms
        self._watched: list[_Watched] = []

    def is_out_now(self, scale: float) -> bool:
        """Measure the gradients as they are now, on the host, and return whether one is beyond its limit.

        Args:
            scale: Factor that brings them to their true size.

        Cost: a norm of each layer.
        """
        if not self._watched:
            self._choose(self.norms.places())
        return self._is_out([scale * norm for norm in self.norms.some([one.place for one in self._watched])])

    def is_out(self, gradients: NDArray[Any]) -> bool:
        """Return whether gradients that were measured are beyond their limit, and learn from them.

        Args:
            gradients: ``[L]`` norms by layer, 0 where there is none.
        """
        if not self._watched:
            self._choose(np.flatnonzero(gradients).tolist())
        return self._is_out(gradients[[one.place for one in self._watched]].tolist() if self._watched else [])

    def _choose(self, there: Sequence[int]) -> None:
        count = min(_LAYERS, len(there))
        self._watched = [_Watched(there[(2 * i + 1) * len(there) // (2 * count)]) for i in range(count)]

    def _is_out(self, norms: Sequence[float]) -> bool:
        is_out = False
        for at, (watched, norm) in enumerate(zip(self._watched, norms, strict=True)):
            watched.idle = 0 if norm else watched.idle + 1
            if watched.limit.is_exceeded(_log(norm)):
                is_out = True
            if watched.idle == _IDLE:
                self._watched[at] = _Watched(self._next(watched.place))
        return is_out

    def _next(self, place: int) -> int:
        """The next layer that is not watched; the same where all are."""
        count, taken = len(self.norms.layers), {one.place for one in self._watched}
        return next((at for at in ((place + i) % count for i in range(1, count)) if at not in taken), place)


class StepCheck:
    """Checks the steps of all optimizers: gradients of a few layers each, and the loss of each batch.

    A loss that has been zero or negative is followed through the inverse hyperbolic sine.
    """

    def __init__(self) -> None:
        """Start with nothing seen."""
        self._gradients: dict[int, GradientCheck] = {}
        self._loss, self._is_signed = RunningLimit(_LEAST_LOSS), False

    def is_loss_out(self, loss: float) -> bool:
        """Return whether the loss of a batch is beyond its limit, and learn from it."""
        if -math.inf < loss <= 0 and not self._is_signed:
            self._loss, self._is_signed = RunningLimit(_LEAST_LOSS), True
        return self._loss.is_exceeded(math.asinh(loss) if self._is_signed and math.isfinite(loss) else _log(loss))

    def are_gradients_out(self, place: int, norms: OptimizerNorms, scale: float) -> bool:
        """Measure the gradients of an optimizer as they are now, on the host.

        Args:
            place: Place of the optimizer.
            norms: Measures them.
            scale: Factor that brings them to their true size.
        """
        return self._of(place, norms).is_out_now(scale)

    def is_out(self, steps: Sequence[tuple[int, OptimizerNorms, StepNumbers]]) -> bool:
        """Return whether a step is out of line whose numbers have arrived, and learn from them.

        Args:
            steps: By optimizer that took it: its place, what measured it, and what was found.
        """
        out = [self.is_loss_out(loss) for loss in steps[0][2].losses]
        for place, norms, found in steps:
            if found.gradients is not None:
                out.append(self._of(place, norms).is_out(found.gradients))
        return any(out)

    def _of(self, place: int, norms: OptimizerNorms) -> GradientCheck:
        check = self._gradients.get(place)
        if check is None or check.norms is not norms:  # its layers are others now
            check = self._gradients[place] = GradientCheck(norms)
        return check


def _log(size: float) -> float:
    """The logarithm; infinite for what is not finite, NaN for nothing."""
    if not math.isfinite(size):
        return math.inf
    return math.log(size) if size > 0 else math.nan
