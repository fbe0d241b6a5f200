"""Find out which points of a run remain after it was restarted.

The rule is TensorBoard's own. A session start (``SessionLog.START``, which ``SummaryWriter(purge_step=...)`` writes)
removes all earlier points from its step on. Without one, as ``TensorBoardLogger`` writes, a point removes the earlier
points of its own tag from its step on: TensorBoard's data server does that, and its ``event_accumulator`` for files
without a version. Files count in the order in which they were begun.
"""

import math
from array import array
from bisect import bisect_left
from collections.abc import MutableSequence
from typing import Any

import numpy as np

from dynamon.runs.event_files import EventFile, Point, Row, SessionStart
from dynamon.runs.history import Series


class EventLog:
    """Keeps the points of several files that remain by TensorBoard's rule, in whatever order they are read.

    Attributes:
        count: Number of points and session starts that were added.
        purged: The count at which a session start last removed a point; 0 if none did.
        scalars: Curves by tag, including empty ones.
        tables: Curves of rows by quantity, including empty ones.
    """

    def __init__(self) -> None:
        """Start empty."""
        self.count = 0
        self.purged = 0
        self.scalars: dict[str, Curve] = {}
        self.tables: dict[str, RowCurve] = {}
        self._starts: dict[EventFile | None, int] = {}

    def add(self, file: EventFile | None, items: list[Point | SessionStart]) -> None:
        """Add the contents of a record; ``file`` is None if all points come from one source."""
        for item in items:
            self.count += 1
            if isinstance(item, SessionStart):
                self._start(file, item.step)
                continue
            tag, step, value = item
            is_row = isinstance(value, tuple)
            curve: Curve | None = self.tables.get(tag) if is_row else self.scalars.get(tag)
            if curve is None:
                curve = self._new_curve(tag, is_row)
            curve.add(file, self.count, step, value)

    def _new_curve(self, tag: str, is_of_rows: bool) -> "Curve":
        if is_of_rows:
            return self.tables.setdefault(tag, RowCurve(self._starts))
        return self.scalars.setdefault(tag, Curve(self._starts))

    def _start(self, file: EventFile | None, step: int) -> None:
        curves = (*self.scalars.values(), *self.tables.values())
        sizes = [len(curve) for curve in curves]
        self._starts[file] = min(step, self._starts.get(file, step))
        for curve, size in zip(curves, sizes, strict=True):
            curve.cut(file, step)
            if len(curve) < size:
                curve.rewritten = self.purged = self.count


class Curve:
    """The points of a tag by file. What remains depends on the files, not on the order of reading.

    Attributes:
        rewritten: The count at which anything other than a point at the end changed.
    """

    def __init__(self, starts: dict["EventFile | None", int]) -> None:
        """Start empty; ``starts`` holds the lowest session start of each file, for all curves."""
        self.rewritten = 0
        self._starts = starts
        self._parts: dict[EventFile | None, _Part] = {}
        self._growing: _Part | None = None  # the part whose next point, if it is later, is the last of all
        self._whole: _Part | None = None  # what remains of all parts
        self._series: Series | None = None

    def __len__(self) -> int:
        """Return the number of remaining points."""
        return len(self._remaining().steps)

    def added_after(self, count: int) -> int:
        """Return how many of the remaining points were added after a count."""
        return int(np.count_nonzero(np.array(self._remaining().counts) > count))

    def add(self, file: EventFile | None, count: int, step: int, value: Any) -> None:
        """Add a point after those of its file."""
        part = self._growing
        if part is not None and part.file is file and part.accepts(step, value):
            part.append(count, step, value)
            if self._whole is not None and self._whole is not part:
                self._whole.append(count, step, value)
        else:
            self._insert(file, count, step, value)
        self._series = None

    def cut(self, file: EventFile | None, step: int) -> None:
        """Apply a session start of ``file`` that is already among the starts."""
        if file in self._parts:
            self._parts[file].cut(step)
        self._growing = self._whole = self._series = None

    def series(self) -> Series:
        """Return the remaining points, by increasing steps."""
        if self._series is None:
            whole = self._remaining()
            self._series = Series(np.array(whole.steps, dtype=np.int64), np.array(whole.values, dtype=np.float64))
        return self._series

    def _insert(self, file: EventFile | None, count: int, step: int, value: Any) -> None:
        part = self._parts.get(file) or self._parts.setdefault(file, self._new_part(file))
        part.low = min(part.low, step)
        part.cut(step)
        part.append(count, step, value)
        last = max(self._parts.keys() | self._starts.keys(), key=_order)
        self._growing = part if file is last else None
        self._whole = None
        self.rewritten = count

    def _remaining(self) -> "_Part":
        """Remove, for each file, the points of earlier ones from its lowest step on, of points or session starts."""
        if self._whole is None:
            self._whole = self._new_part()
            if self._parts.keys() >= self._starts.keys() and len(self._parts) == 1:
                (self._whole,) = self._parts.values()
                return self._whole
            for file in sorted(self._parts.keys() | self._starts.keys(), key=_order):
                part = self._parts.get(file)
                self._whole.cut(min(part.low if part else math.inf, self._starts.get(file, math.inf)))
                if part:
                    self._whole.extend(part)
        return self._whole

    def _new_part(self, file: EventFile | None = None) -> "_Part":
        return _Part(file, array("d"))


class RowCurve(Curve):
    """The rows of a table."""

    @property
    def has_values(self) -> bool:
        """Whether any of its numbers is not NaN."""
        return any(not np.isnan(row).all() for _, row in reversed(self._remaining().values))

    def bare(self) -> Series:
        """Return the steps without values."""
        return Series(np.array(self._remaining().steps, dtype=np.int64), np.empty((len(self), 0)))

    def series(self) -> Series:
        """Return a table ``[T, L]``: the layers of the last row, then those of earlier rows only; NaN if missing."""
        if self._series is None:
            whole = self._remaining()
            self._series = _stacked(whole.steps, whole.values)
        return self._series

    def _new_part(self, file: EventFile | None = None) -> "_Part":
        return _RowPart(file, [])


class _Part:
    """Points by increasing steps: the count at which each was added, its step, and its value."""

    def __init__(self, file: EventFile | None, values: MutableSequence[Any]) -> None:
        self.file = file
        self.counts, self.steps, self.values = array("q"), array("q"), values
        self.low: float = math.inf  # the lowest step it ever had

    def accepts(self, step: int, value: Any) -> bool:
        """Return whether a point follows the last one and is of its kind."""
        return bool(self.steps) and step > self.steps[-1]

    def append(self, count: int, step: int, value: Any) -> None:
        self.counts.append(count)
        self.steps.append(step)
        self.values.append(value)

    def extend(self, other: "_Part") -> None:
        self.counts.extend(other.counts)
        self.steps.extend(other.steps)
        self.values.extend(other.values)

    def cut(self, step: float) -> None:
        """Remove the points at a step or later."""
        first = bisect_left(self.steps, step)
        if first < len(self.steps):
            del self.counts[first:], self.steps[first:], self.values[first:]


class _RowPart(_Part):
    """Rows, which are of one kind if they have the same layers."""

    def accepts(self, step: int, value: Row) -> bool:
        return super().accepts(step, value) and self.values[-1][0] == value[0]


def _order(file: EventFile | None) -> Any:
    return () if file is None else file.order


def _stacked(steps: Any, rows: Any) -> Series:
    kinds = dict.fromkeys(names for names, _ in reversed(rows))
    names = tuple(dict.fromkeys(name for kind in kinds for name in kind))
    column = {name: index for index, name in enumerate(names)}
    places = {kind: [column[name] for name in kind] for kind in kinds}
    values = np.full((len(steps), len(names)), np.nan)
    for index, (kind, row) in enumerate(rows):
        values[index, places[kind]] = row
    return Series(np.array(steps, dtype=np.int64), values, names)
