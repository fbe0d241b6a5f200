"""What a gradient was accumulated over, and which gradients may be compared with each other."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

_SETTLED = 3  # readings in a row of other windows after which those are the run's


@dataclass(frozen=True)
class Window:
    r"""What the gradient of one optimizer step was accumulated over.

    With k backward passes, each of the mean loss :math:`L_i` of its batch divided by D, the gradient is
    :math:`G = \tfrac1D \sum_{i=1}^k \nabla L_i`: k / D of a mean gradient, with the noise of k batches. Two gradients
    can tell noise, curvature or an angle only where all of this is the same, so windows are compared with ``==``.

    Attributes:
        passes: Backward passes that went into it, k.
        divisor: What each loss was divided by, D; 1 where that is the user's own affair.
        samples: Samples in each of these passes, sorted; None where they are not known.
        changed: After which passes somebody else changed what was accumulated so far (clipped it, say).
    """

    passes: int
    divisor: int = 1
    samples: tuple[int, ...] | None = None
    changed: tuple[int, ...] = ()

    @property
    def length(self) -> tuple[int, int]:
        """Passes and divisor, which set how much of a mean gradient this is."""
        return self.passes, self.divisor

    def share(self, passes: int) -> float | None:
        """The weight of the first passes in the whole; None where the rest is not alike, or there is none.

        A part of other passes than a half needs samples of one number in each, or the unit of what is compared with
        the rest would not be that of two gradients.
        """
        if self.changed or not 0 < passes < self.passes:
            return None
        even = self.samples is None or len(set(self.samples)) == 1
        return passes / self.passes if even or 2 * passes == self.passes else None


def window_state(window: Window | None) -> dict[str, Any] | None:
    """A window as plain numbers, for a checkpoint."""
    return None if window is None else asdict(window)


def load_window(state: Mapping[str, Any] | None) -> Window | None:
    """What :func:`window_state` was given."""
    if state is None:
        return None
    samples = None if state["samples"] is None else tuple(state["samples"])
    return Window(state["passes"], state["divisor"], samples, tuple(state["changed"]))


class UsualLength:
    """Which length of window an average is over: the first that was read, until others come several times in a row.

    The short window at the end of an epoch is passed over; where the length changes for good, the average begins anew.
    """

    def __init__(self) -> None:
        """No window yet."""
        self._own: list[int] = []
        self._other: list[int] = []
        self._count = 0  # readings of the other length in a row

    def admit(self, window: Window | None) -> tuple[bool, bool]:
        """Whether a reading over this window is taken in, and whether the average begins anew with it."""
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
        """Whether a window has this length."""
        return self._own == ([] if window is None else list(window.length))

    def state(self) -> list[int]:
        """Five numbers, or none before the first window."""
        return [*self._own, *(self._other or [0, 0]), self._count] if self._own else []

    def load(self, state: Sequence[float]) -> None:
        """Take up what :meth:`state` gave."""
        numbers = [int(number) for number in state]
        self._own, self._other, self._count = numbers[:2], numbers[2:4], numbers[4] if len(numbers) > 4 else 0
