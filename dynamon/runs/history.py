"""What was measured during a run, as arrays."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynamon.runs.renamed import current_tag

READINGS = ("gradient/", "weight/", "sharpness/", "noise/", "lr/ratio")  # how the tags of what dynamon reads begin
_LIMIT = 4096  # points a quantity; beyond it every second point is dropped, so memory stays bounded
_BYTES = 2**22  # ... and bytes: a table of 500 layers keeps about 1,000 points
_FEWEST = 64  # points that any table keeps
_Row = tuple[int, Any, tuple[str, ...] | None]  # step, number or numbers, names of their layers


@dataclass(frozen=True)
class Series:
    """One quantity over a run.

    Attributes:
        steps: ``[T]`` integers, the x axis of Lightning's own monitors.
        values: ``[T]`` floats, or ``[T, L]`` with one column a layer.
        layers: The L layer names, or None.
    """

    steps: NDArray[Any]
    values: NDArray[Any]
    layers: tuple[str, ...] | None = None

    def __len__(self) -> int:
        """Number of points."""
        return len(self.steps)

    def __repr__(self) -> str:
        """How much there is, and the last value of a single line."""
        if not len(self):
            return "Series(empty)"
        extent = _extent(len(self), int(self.steps[0]), int(self.steps[-1]), self.layers)
        return f"Series({extent}{f', last {self.values[-1]:.6g}' if self.layers is None else ''})"


@dataclass(frozen=True)
class RunData:
    """What is known of a run: the same for one that is going on and one that was read from its files.

    Attributes:
        scalars: Series by tag, ``gradient/norm``.
        tables: Series with one column a layer by quantity, ``gradient/dual``.
    """

    scalars: dict[str, Series]
    tables: dict[str, Series]

    @classmethod
    def of(cls, *histories: Mapping[str, Series]) -> "RunData":
        """Sort what callbacks keep: ``RunData.of(monitor.history, steering.history)``.

        A scalar that several keep has the points of all; of a step, and of a table, those of the last one count.
        """
        known: dict[str, Series] = {}
        for history in histories:
            for quantity in history:
                series = history[quantity]
                known[quantity] = _joined(known[quantity], series) if quantity in known else series
        return cls(
            {name: series for name, series in known.items() if series.layers is None},
            {name: series for name, series in known.items() if series.layers is not None},
        )

    @property
    def has_readings(self) -> bool:
        """Whether anything in it was measured by dynamon."""
        return any(tag.startswith(READINGS) for tag in (*self.scalars, *self.tables))

    @property
    def last_step(self) -> int:
        """The last step of the run as :func:`last_step` tells it, -1 where nothing is known."""
        return last_step({**self.scalars, **self.tables})


def last_step(series: Mapping[str, Series]) -> int:
    """Give the last step of a run, -1 where nothing is known.

    Readings and losses have the axis of optimizer steps. A tag that goes on far beyond them has another one, as of
    samples, which ``self.log("step", ...)`` makes, and does not count.
    """
    ends = {tag: int(one.steps[-1]) for tag, one in series.items() if len(one)}
    own = [end for tag, end in ends.items() if tag.startswith((*READINGS, "dynamon/")) or "loss" in tag.lower()]
    limit = 1.5 * max(own) + 100 if own else np.inf
    return max((end for end in ends.values() if end <= limit), default=-1)


def _joined(one: Series, other: Series) -> Series:
    """The points of two series of a scalar, of the same step those of the other; of tables the other."""
    if one.layers is not None or other.layers is not None:
        return other
    steps = np.concatenate([other.steps, one.steps])
    steps, first = np.unique(steps, return_index=True)
    return Series(steps, np.concatenate([other.values, one.values])[first])


class History(Mapping[str, Series]):
    """Everything a monitor measured, by quantity: ``history["noise/dual"].values`` is an array.

    The columns of a table are all layers that ever had a reading, in the order in which they were met; NaN where a
    layer had none at a step: before it joined, after it left. A tag that was renamed is found by its old name too.

    Holds at most 4,096 points a quantity, and fewer where a table is wide: about 4 MiB of numbers. When that is reached
    every second point is dropped and from then on every second one is recorded.
    """

    def __init__(self) -> None:
        """Start empty."""
        self._rows: dict[str, list[_Row]] = {}
        self._layers: dict[str, tuple[str, ...]] = {}
        self._stride: dict[str, int] = {}
        self._offered: dict[str, int] = {}

    def add(self, quantity: str, step: int, value: float | NDArray[Any], layers: Sequence[str] | None = None) -> None:
        """Append one point: a number, or one number a layer with their names; rows before it stay as they are."""
        offered = self._offered[quantity] = self._offered.get(quantity, -1) + 1
        if offered % self._stride.get(quantity, 1):
            return
        names = None if layers is None else self._known(quantity, tuple(layers))
        rows = self._rows.setdefault(quantity, [])
        rows.append((step, value, names))
        if len(rows) >= self._most(quantity):
            del rows[1::2]
            self._stride[quantity] = 2 * self._stride.get(quantity, 1)

    def _known(self, quantity: str, names: tuple[str, ...]) -> tuple[str, ...]:
        """Names of a row, as one object where they are those of the row before; new ones become columns."""
        columns = self._layers.setdefault(quantity, names)
        if names == columns:
            return columns
        self._layers[quantity] = tuple(dict.fromkeys((*columns, *names)))
        last = next(iter(self._rows.get(quantity, [])[-1:]), (0, None, None))[2]
        return last if last == names else names

    def _most(self, quantity: str) -> int:
        """Points that a quantity may have."""
        width = 8 * max(len(self._layers.get(quantity, ())), 1)
        return min(_LIMIT, max(_BYTES // width, _FEWEST))

    def forget_from(self, step: int) -> None:
        """Drop what was measured at a step and after it: training has gone back to there."""
        for quantity, rows in list(self._rows.items()):
            kept = [row for row in rows if row[0] < step]
            if len(kept) == len(rows):
                continue
            if kept:
                self._rows[quantity] = kept
                self._offered[quantity] = len(kept) * self._stride.get(quantity, 1) - 1  # the next one counts
            else:
                for by_quantity in (self._rows, self._layers, self._stride, self._offered):
                    by_quantity.pop(quantity, None)

    def __getitem__(self, quantity: str) -> Series:
        """The series of a quantity.

        Raises:
            KeyError: Naming those that are called something like it.
        """
        if quantity not in self:
            raise KeyError(self._nothing_called(quantity))
        quantity = current_tag(quantity)
        rows, columns = self._rows[quantity], self._layers.get(quantity)
        steps = np.array([step for step, *_ in rows], dtype=np.int64)
        if columns is None:
            return Series(steps, np.array([value for _, value, _ in rows], dtype=np.float64))
        values = np.full((len(rows), len(columns)), np.nan)
        places: dict[tuple[str, ...], list[int]] = {}
        for row, (_, value, names) in zip(values, rows, strict=True):
            if names == columns:
                row[:] = value
            elif names is not None:
                if names not in places:
                    places[names] = [columns.index(name) for name in names]
                row[places[names]] = value
        return Series(steps, values, columns)

    def _nothing_called(self, quantity: str) -> str:
        """What to say of a quantity that is not there."""
        if not self._rows:
            return f"no {quantity!r}: nothing has been measured yet"
        parts = [part for part in str(quantity).split("/") if part]
        near = [tag for tag in self._rows if any(part in tag.split("/") for part in parts)]
        near = near or get_close_matches(str(quantity), list(self._rows), cutoff=0.5)
        if near:
            return f"no {quantity!r}; there is {', '.join(near[:6])}"
        return f"no {quantity!r} among {len(self._rows)} quantities, first {', '.join(list(self._rows)[:6])}"

    def __contains__(self, quantity: object) -> bool:
        """Whether a quantity has been measured."""
        return isinstance(quantity, str) and current_tag(quantity) in self._rows

    def __iter__(self) -> Iterator[str]:
        """The quantities, in the order they were first measured."""
        return iter(self._rows)

    def __len__(self) -> int:
        """Number of quantities."""
        return len(self._rows)

    def __repr__(self) -> str:
        """The quantities, with how many points each has."""
        lines = [f"  {tag}: {self._extent(tag)}" for tag in self._rows]
        return "\n".join([f"History of {len(lines)} quantities", *lines])

    def _extent(self, quantity: str) -> str:
        rows, columns = self._rows[quantity], self._layers.get(quantity)
        return _extent(len(rows), rows[0][0], rows[-1][0], columns)


def _extent(points: int, first: int, last: int, layers: tuple[str, ...] | None) -> str:
    steps = f"step {first}" if first == last else f"steps {first} to {last}"
    said = f"{points} {'point' if points == 1 else 'points'}, {steps}"
    return said if layers is None else f"{said}, {len(layers)} layers"
