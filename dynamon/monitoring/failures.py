"""Count failures in a row, and pause what fails too often."""

import math

PAUSE_AFTER = 3  # failures in a row
_FIRST_REST = 10  # readings that a paused measurement leaves out before it is tried again; then twice as many


class SteeringError(RuntimeError):
    """Steering failed on one of several processes: going on would let their weights part, so this is not caught."""


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its class where it says nothing, as a sentence with its end."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip()
    return line if line.endswith((".", "!", "?")) else f"{line}."


def forget_frames(error: BaseException | None) -> None:
    """Let go of what the functions that failed held, graphs above all; the sentence of the error stays."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


class Failures:
    """Count what failed in a row, and let it rest for a while: what stopped it may pass by itself.

    After three failures in a row a name rests for 10 readings, after each further one for twice as long as before.

    Attributes:
        until: When what rests is tried again, by name.
    """

    def __init__(self) -> None:
        """Start without a failure."""
        self._in_a_row: dict[str, int] = {}
        self.until: dict[str, float] = {}

    def add(self, name: str, now: float, unit: float = 1.0) -> int:
        """One more failure, at ``now``; readings are ``unit`` apart. Returns how many there are in a row."""
        count = self._in_a_row[name] = self._in_a_row.get(name, 0) + 1
        if count >= PAUSE_AFTER:
            self.until[name] = now + unit * _FIRST_REST * 2 ** (count - PAUSE_AFTER)
        return count

    def clear(self, name: str) -> None:
        """It succeeded."""
        self._in_a_row.pop(name, None)
        self.until.pop(name, None)

    def rests(self, name: str, now: float) -> bool:
        """Return whether it is left out at ``now``."""
        return now < self.until.get(name, -math.inf)
