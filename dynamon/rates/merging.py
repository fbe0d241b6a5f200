"""Reduce many ratios to few, so that a step has few parameter groups."""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_HOLD = 2.0  # a clustering is kept up to this multiple of its initial error
_LEAST = 0.01  # and at least up to this error; below, groups would follow jitter
_HALVINGS = 20  # of the clusters' width: to a millionth


class RatioMerging:
    r"""Merges similar ratios, so that an optimizer's step has at most ``most`` groups.

    An optimizer steps group by group: with one ratio for each of 148 tensors, a step of two device calls becomes one of
    three hundred. If ratios and the optimizer's own groups make more than ``most`` groups, ratios within one of its
    groups are clustered so that the largest relative error is minimal: clusters of equal width in the logarithm, as
    narrow as their number allows, each at its geometric middle, :math:`\sqrt{r_{min} r_{max}}`. A cluster of one ratio
    keeps it exactly. So does a ratio of exactly 1, or in ``exact``, which is a cluster of its own. No ratio leaves the
    range of the merged ones.

    A clustering stays in force, bitwise, until a layer's ratio is further from its merged one than twice the largest
    initial error (and at least one percent), so that groups do not follow the jitter of the ratios. For an optimizer
    with one group, 16 groups allowed and ratios spread evenly from 0.1 to 1, the error is at most 9 % initially and 19
    % later; :func:`relative_error` computes it for a step.

    The result depends only on the ratios so far, so that processes with equal ratios merge equally.

    Args:
        most: Largest number of groups. If the optimizer has as many of its own, each gets one, and one more for each
            ratio in it that must stay exact.
        exact: Ratios that are never changed, besides 1.

    Raises:
        TypeError: If ``most`` is not an integer.
        ValueError: If ``most`` is less than 1.

    Cost: a comparison of arrays ``[P]`` per step; about half a millisecond of host time when clusters are made.
    """

    def __init__(self, most: int, exact: Sequence[float] = ()) -> None:
        """Start without merged ratios."""
        if type(most) is not int or most < 1:
            kind = ValueError if type(most) is int else TypeError
            raise kind(f"max_groups must be a whole number of 1 or more, or None, got {most!r}.")
        self.most, self._exact = most, np.array(sorted({1.0, *exact}))
        self.forget()

    def forget(self) -> None:
        """Forget the merged ratios."""
        self.current: NDArray[Any] | None = None  # merged ratios in force; None where none is merged
        self.slack = 0.0  # largest |log(current / ratio)| up to which they stay in force

    def preview(self, ratios: NDArray[Any], places: NDArray[Any]) -> NDArray[Any]:
        """Return the ratios that the next step would have.

        Args:
            ratios: The rule's ratios ``[P]``, positive.
            places: Index ``[P]`` of the optimizer's group that each belongs to.

        Returns:
            ``[P]``, not to be written to.
        """
        return self._found(ratios, places)[0]

    def apply(self, ratios: NDArray[Any], places: NDArray[Any]) -> NDArray[Any]:
        """Return the ratios of a step that is taken now, and keep them in force."""
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
        """Return whether the merged ratios in force are still close enough."""
        assert self.current is not None
        fixed = _are_fixed(ratios, self._exact)
        if (self.current[fixed] != ratios[fixed]).any():
            return False
        quotient = self.current[~fixed] / ratios[~fixed]
        return bool(np.abs(np.log(quotient)).max(initial=0.0) <= self.slack) if (quotient > 0).all() else False

    def state(self, places: NDArray[Any]) -> dict[str, float]:
        """Return what :meth:`load` needs besides the ratios in force."""
        assert self.current is not None
        return {"slack": self.slack, "most": self.most, "groups": count_groups(self.current, places)}

    def load(self, kept: NDArray[Any], saved: Mapping[str, float], places: NDArray[Any]) -> None:
        """Restore merged ratios, if they were made for the same ``most`` and still make as many groups."""
        self.forget()
        if saved["most"] == self.most and saved["groups"] == count_groups(kept, places):
            self.current, self.slack = kept, saved["slack"]


def count_groups(ratios: NDArray[Any], places: NDArray[Any]) -> int:
    """Count the groups of a step: the different ratios in each of the optimizer's groups."""
    return len(set(zip(places.tolist(), ratios.tolist(), strict=True)))


def _are_fixed(ratios: NDArray[Any], exact: NDArray[Any]) -> NDArray[Any]:
    """Mark the ratios that are never merged: exact ones, and those without a logarithm."""
    return np.isin(ratios, exact) | ~((ratios > 0) & (ratios < np.inf))


def relative_error(merged: NDArray[Any], ratios: NDArray[Any]) -> float:
    """Return the largest relative error of merged ratios, up or down."""
    moved = merged != ratios
    quotient = merged[moved] / ratios[moved]
    return float(np.maximum(quotient, 1 / quotient).max(initial=1.0)) - 1


def cluster_ratios(ratios: NDArray[Any], places: NDArray[Any], most: int, exact: NDArray[Any]) -> NDArray[Any]:
    """Cluster ratios into at most ``most`` groups, minimising the largest relative error; see :class:`RatioMerging`."""
    free = ~_are_fixed(ratios, exact)
    lines = []  # for each group: the indices of its ratios, their logarithms, and these sorted
    for place in np.unique(places[free]):
        where = np.flatnonzero(free & (places == place))
        logs = np.log(ratios[where])
        lines.append((where, logs, np.sort(logs).tolist()))
    if not lines:
        return ratios
    room = max(most - count_groups(ratios[~free], places[~free]), len(lines))
    sorted_logs = [line for _, _, line in lines]
    low, high = 0.0, (1 + 1e-9) * sum([line[-1] - line[0] for line in sorted_logs]) / room  # + rounding
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
    """Return where clusters of at most ``width`` begin on a sorted line."""
    begins, at = [], 0
    while at < len(line):
        begins.append(line[at])
        at = bisect_right(line, line[at] + width, at)
    return begins


def _fit(lines: list[list[float]], width: float, most: int) -> bool:
    """Return whether at most ``most`` clusters of at most ``width`` cover sorted lines."""
    clusters = 0
    for line in lines:
        at, end = 0, len(line)
        while at < end and clusters <= most:
            clusters += 1
            at = bisect_right(line, line[at] + width, at)
    return clusters <= most
