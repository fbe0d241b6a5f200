"""Many ratios brought down to few, so that a step takes few groups of parameters."""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_HOLD = 2.0  # times the error of a clustering up to which it stays in force
_LEAST = 0.01  # at least; below that groups would follow jitter
_HALVINGS = 20  # of the width of clusters: to a millionth


class RatioMerging:
    r"""Clusters ratios on their logarithm, so that an optimizer's step has at most ``most`` groups.

    An optimizer takes its parameters group by group: with a ratio for each of 148 tensors, a step that was two calls of
    the device becomes three hundred. Where ratios and the optimizer's own groups make more than ``most``, ratios within
    one of its groups are brought together so that the largest relative error is the smallest possible: clusters of
    equal width in the logarithm, as narrow as their number allows, each at its geometric middle,
    :math:`\sqrt{r_{min} r_{max}}`. A cluster of one keeps its ratio to the bit. So does a ratio of exactly 1, or of one
    of ``exact``, which makes a cluster of its own, and no ratio leaves the range of those that were merged.

    A clustering stays in force, to the bit, until a layer's ratio is further from its own than twice the largest error
    that it began with (one percent at least): groups do not follow the jitter of the ratios. An optimizer with one
    group of its own, ratios from 0.1 to 1 and 16 groups: at most 9 % when it begins and 19 % ever, where ratios are
    spread evenly over the whole range; :func:`relative_error` of a step says what it is.

    The result depends on the ratios so far and on nothing else, and is the same on all processes that have the same.

    Args:
        most: Groups at most; where the optimizer has as many of its own, one for each of these, and one for each ratio
            in it that must stay exact.
        exact: Ratios that are never changed, beside 1.

    Raises:
        ValueError: If ``most`` is not a whole number of 1 or more.

    Cost: a comparison of arrays ``[P]`` a step; about half a millisecond of the host where clusters are made.
    """

    def __init__(self, most: int, exact: Sequence[float] = ()) -> None:
        """Nothing merged."""
        if type(most) is not int or most < 1:
            raise ValueError(f"max_groups must be a whole number of 1 or more, or None, got {most!r}.")
        self.most, self._exact = most, np.array(sorted({1.0, *exact}))
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self.current: NDArray[Any] | None = None  # the ratios in force; None where all are as they were asked for
        self.slack = 0.0  # the logarithm of the quotient of two ratios up to which they stay

    def preview(self, ratios: NDArray[Any], places: NDArray[Any]) -> NDArray[Any]:
        """The ratios of the next step.

        Args:
            ratios: What is asked for, ``[P]``, positive.
            places: Which of the optimizer's groups each belongs to, ``[P]``.

        Returns:
            ``[P]``, not to be written to.
        """
        return self._found(ratios, places)[0]

    def apply(self, ratios: NDArray[Any], places: NDArray[Any]) -> NDArray[Any]:
        """The same, for a step that is taken now."""
        found, self.slack = self._found(ratios, places)
        self.current = found if self.slack else None
        return found

    def _found(self, ratios: NDArray[Any], places: NDArray[Any]) -> tuple[NDArray[Any], float]:
        if count_groups(ratios, places) <= self.most:
            return ratios, 0.0
        if self.current is not None and self._holds(ratios):
            return self.current, self.slack
        found = cluster_ratios(ratios, places, self.most, self._exact)
        return found, max(_HOLD * math.log1p(relative_error(found, ratios)), _LEAST)

    def _holds(self, ratios: NDArray[Any]) -> bool:
        """Whether what is in force is still near enough to what is asked for."""
        assert self.current is not None
        fixed = _are_fixed(ratios, self._exact)
        if (self.current[fixed] != ratios[fixed]).any():
            return False
        quotient = self.current[~fixed] / ratios[~fixed]
        return bool(np.abs(np.log(quotient)).max(initial=0.0) <= self.slack) if (quotient > 0).all() else False

    def state(self, places: NDArray[Any]) -> dict[str, float]:
        """What :meth:`load` asks for beside the ratios in force."""
        assert self.current is not None
        return {"slack": self.slack, "most": self.most, "groups": count_groups(self.current, places)}

    def load(self, kept: NDArray[Any], saved: Mapping[str, float], places: NDArray[Any]) -> None:
        """Take up what was in force, where it was made for as many groups and still makes as many as it did."""
        self.forget()
        if saved["most"] == self.most and saved["groups"] == count_groups(kept, places):
            self.current, self.slack = kept, saved["slack"]


def count_groups(ratios: NDArray[Any], places: NDArray[Any]) -> int:
    """How many groups a step takes: different ratios in each of the optimizer's own."""
    return len(set(zip(places.tolist(), ratios.tolist(), strict=True)))


def _are_fixed(ratios: NDArray[Any], exact: NDArray[Any]) -> NDArray[Any]:
    """Which ratios are never merged: exact ones, and those that have no logarithm."""
    return np.isin(ratios, exact) | ~((ratios > 0) & (ratios < np.inf))


def relative_error(merged: NDArray[Any], ratios: NDArray[Any]) -> float:
    """The largest relative error of ratios that were merged, up or down."""
    moved = merged != ratios
    quotient = merged[moved] / ratios[moved]
    return float(np.maximum(quotient, 1 / quotient).max(initial=1.0)) - 1


def cluster_ratios(ratios: NDArray[Any], places: NDArray[Any], most: int, exact: NDArray[Any]) -> NDArray[Any]:
    """Ratios in at most ``most`` groups with the smallest largest relative error; see :class:`RatioMerging`."""
    free = ~_are_fixed(ratios, exact)
    lines = []  # of each place: where its ratios are, their logarithms and these sorted
    for place in np.unique(places[free]):
        where = np.flatnonzero(free & (places == place))
        logs = np.log(ratios[where])
        lines.append((where, logs, np.sort(logs).tolist()))
    if not lines:
        return ratios
    room = max(most - count_groups(ratios[~free], places[~free]), len(lines))
    sorted_logs = [line for _, _, line in lines]
    low, high = 0.0, (1 + 1e-9) * sum([line[-1] - line[0] for line in sorted_logs]) / room  # the factor is for rounding
    while not _fit(sorted_logs, high, room):
        low, high = high, 2 * high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if _fit(sorted_logs, middle, room) else (middle, high)
    found = ratios.copy()
    for where, logs, line in lines:
        begins = _begins(line, high)
        cluster = np.searchsorted(np.array(begins), logs, side="right")
        for number in range(1, len(begins) + 1):
            members = where[cluster == number]
            least, largest = float(ratios[members].min()), float(ratios[members].max())
            found[members] = least if least == largest else min(max(math.sqrt(least * largest), least), largest)
    return found


def _begins(line: list[float], width: float) -> list[float]:
    """Where clusters of at most a width begin on a sorted line."""
    begins, at = [], 0
    while at < len(line):
        begins.append(line[at])
        at = bisect_right(line, line[at] + width, at)
    return begins


def _fit(lines: list[list[float]], width: float, most: int) -> bool:
    """Whether so many clusters of at most a width cover sorted lines."""
    clusters = 0
    for line in lines:
        at, end = 0, len(line)
        while at < end and clusters <= most:
            clusters += 1
            at = bisect_right(line, line[at] + width, at)
    return clusters <= most
