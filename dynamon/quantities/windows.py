"""Describe what a gradient was accumulated over, and decide which gradients may be compared."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

_SETTLED = 3  # consecutive readings of another length that make it the usual one


@dataclass(frozen=True)
class Window:
    r"""What the gradient of one optimizer step was accumulated over.

    With k backward passes, each of the mean loss :math:`L_i` of its batch divided by D, the gradient is
    :math:`G = \tfrac1D \sum_{i=1}^k \nabla L_i`: k / D times a mean gradient, with the noise of k batches. Two
    gradients can reveal noise, curvature or an angle only if all of this is the same, so windows are compared with
    ``==``.

    Attributes:
        passes: Number of backward passes, k.
        divisor: What each loss was divided by, D; 1 if the user handles it.
        samples: Samples in each of these passes, sorted; None if they are not known.
        changed: After which passes other code changed what was accumulated so far (by clipping, for example).
    """

    passes: int
    divisor: int = 1
    samples: tuple[int, ...] | None = None
    changed: tuple[int, ...] = ()

    @property
    def length(self) -> tuple[int, int]:
        """Passes and divisor, which determine the multiple of a mean gradient."""
        return self.passes, self.divisor

    def share(self, passes: int) -> float | None:
        """Return the weight of the first passes in the whole; None if the rest is not comparable, or empty.

        Unless it is a half, a part needs equal numbers of samples in all passes; otherwise its comparison with the rest
        would not have the unit of two gradients.
        """
        if self.changed or not 0 < passes < self.passes:
            return None
        even = self.samples is None or len(set(self.samples)) == 1
        return passes / self.passes if even or 2 * passes == self.passes else None


def window_state(window: Window | None) -> dict[str, Any] | None:
    """Convert a window to plain numbers, for a checkpoint."""
    return None if window is None else asdict(window)


def load_window(state: Mapping[str, Any] | None) -> Window | None:
    """Restore a window from :func:`window_state`."""
    if state is None:
        return None
    samples = None if state["samples"] is None else tuple(state["samples"])
    return Window(state["passes"], state["divisor"], samples, tuple(state["changed"]))


class UsualLength:
    """Tracks the usual length of windows for an average: the first, until another is read several times in a row.

    The short window at the end of an epoch is skipped. If the length changes for good, the average starts anew.
    """

    def __init__(self) -> None:
        """Start without a length."""
        self._own: list[int] = []
        self._other: list[int] = []
        self._count = 0  # consecutive readings of the other length

    def admit(self, window: Window | None) -> tuple[bool, bool]:
        """Return whether a reading over this window counts, and whether the average starts anew with it."""
        length = [] if window is None else list(window.length)
        if length == self._own or not self._own:
            self._own, self._count = length, 0
            return True, False
        self._count = self._count + 1 if length == self._other else 1
        self._other = length
        if self._count < _SETTLED:
            return False, False
        self._own, self._count = length, 0
        return True, True

    def matches(self, window: Window | None) -> bool:
        """Return whether a window has the usual length."""
        return self._own == ([] if window is None else list(window.length))

    def state(self) -> list[int]:
        """Return five numbers, or none before the first window."""
        return [*self._own, *(self._other or [0, 0]), self._count] if self._own else []

    def load(self, state: Sequence[float]) -> None:
        """Restore the result of :meth:`state`."""
        numbers = [int(number) for number in state]
        self._own, self._other, self._count = numbers[:2], numbers[2:4], numbers[4] if len(numbers) > 4 else 0
