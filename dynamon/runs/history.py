"""Readings of a run as arrays."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynamon.runs.frames import plot_series, scalars_frame, series_frame
from dynamon.runs.renamed import current_tag

READINGS = ("gradient/", "weight/", "sharpness/", "noise/", "activation/", "lr/ratio")  # prefixes of tags of readings
_MAX_POINTS = 4096  # per quantity; beyond, every second point is dropped, so that memory stays bounded
_MAX_BYTES = 2**22  # per quantity: a table of 500 layers keeps about 1,000 points
_MIN_POINTS = 64  # that any table keeps
_Row = tuple[int, Any, tuple[str, ...] | None]  # step, number or numbers, names of their layers


@dataclass(frozen=True)
class Series:
    """One quantity over a run.

    Attributes:
        steps: ``[T]`` integers, on the axis of Lightning's own monitors.
        values: ``[T]`` floats, or ``[T, L]`` with one column per layer.
        layers: The L layer names, or None for a scalar.

    Example:
        >>> import numpy as np
        >>> from dynamon.runs import Series
        >>> Series(np.array([0, 10]), np.array([2.5, 1.5]))
        Series(2 points, steps 0 to 10, last 1.5)
    """

    steps: NDArray[Any]
    values: NDArray[Any]
    layers: tuple[str, ...] | None = None

    def __len__(self) -> int:
        """Return the number of points."""
        return len(self.steps)

    def __repr__(self) -> str:
        """Summarise the points, with the last value of a scalar."""
        if not len(self):
            return "Series(empty)"
        extent = _extent(len(self), int(self.steps[0]), int(self.steps[-1]), self.layers)
        return f"Series({extent}{f', last {self.values[-1]:.6g}' if self.layers is None else ''})"

    def to_dataframe(self, name: str = "value") -> Any:
        """Convert to a ``pandas.DataFrame`` indexed by step.

        Args:
            name: The column of a scalar; a table has one column per layer.

        Raises:
            ImportError: Without pandas.
        """
        return series_frame(self, name)

    def plot(self, label: str = "", axes: Any = None) -> Any:
        """Draw the values over the steps; of more than ten layers the median and the 10 % and 90 % quantiles.

        Args:
            label: What the vertical axis shows.
            axes: Matplotlib axes, or None for a figure of their own.

        Returns:
            The axes.

        Raises:
            ImportError: Without matplotlib, which ``pip install "lightning-dynamon[demo]"`` brings.
        """
        return plot_series(self, label, axes=axes)


@dataclass(frozen=True)
class RunData:
    """Everything known of a run, whether it is still going on or was read from its files.

    Attributes:
        scalars: Series by tag, such as ``gradient/norm``.
        tables: Series with one column per layer by quantity, such as ``gradient/dual``.
    """

    scalars: dict[str, Series]
    tables: dict[str, Series]

    @classmethod
    def of(cls, *histories: Mapping[str, Series]) -> "RunData":
        """Join the histories of callbacks: ``RunData.of(monitor.history, steering.history)``.

        A scalar in several of them has the points of all. At a step that several have, and for tables, the last
        history counts.
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

    def __repr__(self) -> str:
        """Count the quantities."""
        return f"RunData({len(self.scalars)} scalars, {len(self.tables)} tables, last step {self.last_step})"

    @property
    def has_readings(self) -> bool:
        """Whether dynamon measured anything in it."""
        return any(tag.startswith(READINGS) for tag in (*self.scalars, *self.tables))

    @property
    def last_step(self) -> int:
        """The last step of the run as :func:`last_step` returns it, -1 where nothing is known."""
        return last_step({**self.scalars, **self.tables})


def last_step(series: Mapping[str, Series]) -> int:
    """Return the last step of a run, -1 where nothing is known.

    Readings and losses count optimizer steps. A tag that goes on far beyond them has another axis, such as samples,
    which ``self.log("step", ...)`` makes, and does not count.
    """
    ends = {tag: int(one.steps[-1]) for tag, one in series.items() if len(one)}
    own = [end for tag, end in ends.items() if tag.startswith((*READINGS, "dynamon/")) or "loss" in tag.lower()]
    limit = 1.5 * max(own) + 100 if own else np.inf
    return max((end for end in ends.values() if end <= limit), default=-1)


def _joined(one: Series, other: Series) -> Series:
    """Join two series of a scalar; at a step of both, and for tables, the other counts."""
    if one.layers is not None or other.layers is not None:
        return other
    steps = np.concatenate([other.steps, one.steps])
    steps, first = np.unique(steps, return_index=True)
    return Series(steps, np.concatenate([other.values, one.values])[first])


class History(Mapping[str, Series]):
    """Everything a monitor measured, by quantity: ``history["noise/dual"].values`` is an array.

    A table has one column for each layer that ever had a reading, in the order in which they were first met. Its values
    are NaN at the steps at which a layer had none: before it joined, or after it left. A renamed tag is found by its
    old name, too.

    Memory is bounded: a quantity keeps at most 4,096 points, and a wide table fewer, about 4 MiB of numbers (with 500
    layers at most 1,048 points, 112 MiB for 28 tables). At the limit every second point is dropped, and from then on
    every second one is recorded.

    Example:
        >>> from dynamon.runs import History
        >>> history = History()
        >>> for step in (0, 10, 20):
        ...     history.add("gradient/norm", step, 1.0 / (1 + step))
        ...     history.add("gradient/l2", step, [0.5, 0.25], ["weight", "bias"])
        >>> history
        History of 2 quantities
          gradient/norm: 3 points, steps 0 to 20
          gradient/l2: 3 points, steps 0 to 20, 2 layers
        >>> history["gradient/l2"].values.shape
        (3, 2)
    """

    def __init__(self) -> None:
        """Create an empty history."""
        self._rows: dict[str, list[_Row]] = {}
        self._layers: dict[str, tuple[str, ...]] = {}
        self._stride: dict[str, int] = {}
        self._offered: dict[str, int] = {}

    def add(
        self,
        quantity: str,
        step: int,
        value: float | Sequence[float] | NDArray[Any],
        layers: Sequence[str] | None = None,
    ) -> None:
        """Append a point.

        Args:
            quantity: Its tag.
            step: The step.
            value: A number, or one number per layer.
            layers: The names of the layers; earlier rows keep theirs.
        """
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
        """Return the names of a row, the same object as of the row before where they agree; new ones become columns."""
        columns = self._layers.setdefault(quantity, names)
        if names == columns:
            return columns
        self._layers[quantity] = tuple(dict.fromkeys((*columns, *names)))
        last = next(iter(self._rows.get(quantity, [])[-1:]), (0, None, None))[2]
        return last if last == names else names

    def _most(self, quantity: str) -> int:
        """Return how many points a quantity may have."""
        width = 8 * max(len(self._layers.get(quantity, ())), 1)
        return min(_MAX_POINTS, max(_MAX_BYTES // width, _MIN_POINTS))

    def forget_from(self, step: int) -> None:
        """Drop the points at a step and after it, where training goes back to that step."""
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
        """Return the series of a quantity.

        Raises:
            KeyError: Naming quantities with similar names.
        """
        if quantity not in self:
            raise KeyError(self._missing(quantity))
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

    def _missing(self, quantity: str) -> str:
        """Describe what there is in place of a quantity that is not there."""
        if not self._rows:
            return f"no {quantity!r}: nothing has been measured yet"
        parts = [part for part in str(quantity).split("/") if part]
        near = [tag for tag in self._rows if any(part in tag.split("/") for part in parts)]
        near = near or get_close_matches(str(quantity), list(self._rows), cutoff=0.5)
        if near:
            return f"no {quantity!r}; there is {', '.join(near[:6])}"
        return f"no {quantity!r} among {len(self._rows)} quantities, first {', '.join(list(self._rows)[:6])}"

    def __contains__(self, quantity: object) -> bool:
        """Return whether a quantity has been measured."""
        return isinstance(quantity, str) and current_tag(quantity) in self._rows

    def __iter__(self) -> Iterator[str]:
        """Iterate over the quantities, in the order they were first measured."""
        return iter(self._rows)

    def __len__(self) -> int:
        """Return the number of quantities."""
        return len(self._rows)

    def __repr__(self) -> str:
        """List the quantities with how many points each has."""
        lines = [f"  {tag}: {self._extent(tag)}" for tag in self._rows]
        return "\n".join([f"History of {len(lines)} quantities", *lines])

    def to_dataframe(self, quantity: str | None = None) -> Any:
        """Convert to a ``pandas.DataFrame`` indexed by step.

        Args:
            quantity: A tag. A scalar becomes one column, a table one column per layer. None takes all scalars, one
                column per tag, NaN where a tag has no point at a step.

        Raises:
            KeyError: If the quantity has not been measured.
            ImportError: Without pandas.
        """
        return scalars_frame(self) if quantity is None else series_frame(self[quantity], quantity)

    def plot(self, quantity: str, axes: Any = None) -> Any:
        """Draw a quantity over the steps, on the scale that the registry has for it.

        Args:
            quantity: A tag. A table of more than ten layers is drawn as their median and 10 % and 90 % quantiles.
            axes: Matplotlib axes, or None for a figure of their own.

        Returns:
            The axes.

        Raises:
            KeyError: If the quantity has not been measured.
            ImportError: Without matplotlib, which ``pip install "lightning-dynamon[demo]"`` brings.
        """
        from dynamon.quantities import REGISTRY  # needs torch, which files of runs are read without

        known = REGISTRY.get(quantity)
        return plot_series(self[quantity], quantity, "linear" if known is None else known.scale, axes)

    def _extent(self, quantity: str) -> str:
        rows, columns = self._rows[quantity], self._layers.get(quantity)
        return _extent(len(rows), rows[0][0], rows[-1][0], columns)


def _extent(points: int, first: int, last: int, layers: tuple[str, ...] | None) -> str:
    steps = f"step {first}" if first == last else f"steps {first} to {last}"
    said = f"{points} {'point' if points == 1 else 'points'}, {steps}"
    return said if layers is None else f"{said}, {len(layers)} layers"
