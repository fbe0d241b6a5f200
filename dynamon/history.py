"""What was measured during a run, as arrays."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dynamon.arrays import Array

READINGS = ("gradient/", "weight/", "sharpness/", "noise/", "lr/ratio")  # how the tags of what dynamon reads begin
_LIMIT = 4096  # points a quantity; beyond it every second point is dropped, so memory stays bounded


@dataclass(frozen=True)
class Series:
    """One quantity over a run.

    Attributes:
        steps: ``[T]`` integers, the x axis of Lightning's own monitors.
        values: ``[T]`` floats, or ``[T, L]`` with one column a layer.
        layers: The L layer names, or None.
    """

    steps: Array
    values: Array
    layers: tuple[str, ...] | None = None

    def __len__(self) -> int:
        """Number of points."""
        return len(self.steps)


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
        """Sort what callbacks keep: ``RunData.of(monitor.history, steering.history)``; the later ones count."""
        known = {quantity: history[quantity] for history in histories for quantity in history}
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


class History(Mapping[str, Series]):
    """Everything a monitor measured, by quantity: ``history["noise"].values`` is an array.

    Holds at most 4,096 points a quantity; when that is reached every second point is dropped and from then
    on every second one is recorded.
    """

    def __init__(self) -> None:
        """Start empty."""
        self._rows: dict[str, list[tuple[int, Any]]] = {}
        self._layers: dict[str, tuple[str, ...]] = {}
        self._stride: dict[str, int] = {}
        self._offered: dict[str, int] = {}

    def add(self, quantity: str, step: int, value: float | Array, layers: Sequence[str] | None = None) -> None:
        """Append one point: a number, or one number a layer with their names.

        A layer table whose names changed since the last point starts anew.
        """
        if layers is not None:
            if self._layers.get(quantity, tuple(layers)) != tuple(layers):
                self._rows.pop(quantity, None)
            self._layers[quantity] = tuple(layers)
        offered = self._offered[quantity] = self._offered.get(quantity, -1) + 1
        if offered % self._stride.get(quantity, 1):
            return
        rows = self._rows.setdefault(quantity, [])
        rows.append((step, value))
        if len(rows) >= _LIMIT:
            del rows[1::2]
            self._stride[quantity] = 2 * self._stride.get(quantity, 1)

    def __getitem__(self, quantity: str) -> Series:
        """The series of a quantity."""
        rows = self._rows[quantity]
        return Series(
            np.array([step for step, _ in rows], dtype=np.int64),
            np.array([value for _, value in rows], dtype=np.float64),
            self._layers.get(quantity),
        )

    def __iter__(self) -> Iterator[str]:
        """The quantities, in the order they were first measured."""
        return iter(self._rows)

    def __len__(self) -> int:
        """Number of quantities."""
        return len(self._rows)
