"""Columns, stretches, medians and noise of what was measured: what the rules have in common."""

import math
from collections.abc import Iterator, Mapping

import numpy as np

from dynamon.arrays import Array
from dynamon.history import RunData, Series

IN_A_ROW = 5  # readings that must agree
LONG = 10  # readings
JUMP = 10.0  # times
_ENOUGH = 4000  # readings of a layer


def columns(data: RunData, quantity: str) -> Iterator[tuple[str, Array, Array]]:
    """Name, steps and finite values of each layer that has any; every so many-th of a very long run, and the last."""
    table = data.tables.get(quantity)
    if table is not None:
        for name, column in zip(table.layers or (), table.values.T, strict=True):
            finite = np.isfinite(column)
            if finite.any():
                kept = np.flatnonzero(finite)
                kept = kept[:: -(len(kept) // _ENOUGH + 1)][::-1]
                yield name, table.steps[kept], column[kept]


def first_step(data: RunData, quantity: str) -> int:
    """The first step of a quantity."""
    return int(data.tables[quantity].steps[0])


def merged(scalars: Mapping[str, Series], *tags: str) -> tuple[Array, Array]:
    """Steps and values of several tags as one series."""
    series = [scalars[tag] for tag in tags if tag in scalars]
    if not series:
        return np.zeros(0), np.zeros(0)
    steps, values = (np.concatenate([getattr(one, name) for one in series]) for name in ("steps", "values"))
    order = np.argsort(steps, kind="stable")
    return steps[order], values[order]


def stretches(mask: Array, least: int) -> list[tuple[int, int]]:
    """Where a condition holds at least so many times in a row: ``(start, stop)``."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    pairs = zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
    return [(start, stop) for start, stop in pairs if stop - start >= least]


def to_the_end(mask: Array) -> int:
    """Where the stretch begins that lasts to the end; the length where the last reading is not in one."""
    broken = np.flatnonzero(~mask)
    return int(broken[-1]) + 1 if len(broken) else 0


def running_median(values: Array, width: int) -> Array:
    """The median of the last ``width`` values at each, of as many as there are at the beginning."""
    if not len(values):
        return values
    padded = np.concatenate([np.full(width - 1, np.nan), values])
    windows = np.lib.stride_tricks.sliding_window_view(padded, width)
    full = np.median(windows, axis=1)
    for index in range(min(width - 1, len(values))):
        full[index] = np.median(values[: index + 1])
    return full


def noise_of(values: Array) -> float:
    """Standard deviation of one reading, from what changes within a few: trends do not enter, nor do a few jumps.

    The larger of neighbours and of readings a few apart: the first are alike where noise is slow, the others where
    batches come back in the same order.
    """
    apart = (1, IN_A_ROW) if len(values) > 3 * IN_A_ROW else (1,)
    return max((_spread(values[lag:] - values[:-lag]) for lag in apart if len(values) > lag), default=0.0)


def _spread(changes: Array) -> float:
    return float(1.4826 / math.sqrt(2) * np.median(np.abs(changes - np.median(changes))))


def row_median(values: Array) -> Array:
    """The median of each row's finite values; NaN where it has none."""
    return np.array([np.median(row[np.isfinite(row)]) if np.isfinite(row).any() else np.nan for row in values])


def finite_or_zero(values: Array) -> Array:
    """Zero in the place of what is not finite."""
    return np.where(np.isfinite(values), values, 0.0)
