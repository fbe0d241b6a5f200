"""Columns, stretches, medians and noise of readings, shared by the rules."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynamon.health.limits import CONSECUTIVE, FEW
from dynamon.runs.history import RunData, Series

_ENOUGH = 4000  # readings of a layer
STAYING = f"at {FEW} readings from the first on or {CONSECUTIVE} to the end"  # where :func:`lasting` is asked
_HALF_BITS = (8, 11)  # significant bits of bfloat16 and float16


def layer_columns(data: RunData, quantity: str) -> Iterator[tuple[str, NDArray[Any], NDArray[Any]]]:
    """Yield name, steps and finite values of each layer that has any; of very long runs every k-th, and the last."""
    table = data.tables.get(quantity)
    if table is not None:
        for name, column in zip(table.layers or (), table.values.T, strict=True):
            finite = np.isfinite(column)
            if finite.any():
                kept = np.flatnonzero(finite)
                kept = kept[:: -(len(kept) // _ENOUGH + 1)][::-1]
                yield name, table.steps[kept], column[kept]


def column_at(data: RunData, quantity: str, layer: str, steps: NDArray[Any]) -> NDArray[Any]:
    """Return a layer's values at some steps, each from the last reading before it, or the first; NaN if it has none."""
    table = data.tables.get(quantity)
    if table is None or layer not in (table.layers or ()) or not len(table):
        return np.full(len(steps), np.nan)
    rows = np.maximum(np.searchsorted(table.steps, steps, side="right") - 1, 0)
    return np.asarray(table.values[rows, (table.layers or ()).index(layer)])


def median_at(data: RunData, quantity: str, steps: NDArray[Any]) -> NDArray[Any]:
    """Return the median over layers at some steps, taken as by :func:`column_at`."""
    table = data.tables.get(quantity)
    if table is None or not len(table):
        return np.full(len(steps), np.nan)
    return row_median(table.values[np.maximum(np.searchsorted(table.steps, steps, side="right") - 1, 0)])


def scalar_at(data: RunData, tag: str, steps: NDArray[Any]) -> NDArray[Any]:
    """Return a scalar's values at some steps, taken as by :func:`column_at`."""
    series = data.scalars.get(tag)
    if series is None or not len(series):
        return np.full(len(steps), np.nan)
    return np.asarray(series.values[np.maximum(np.searchsorted(series.steps, steps, side="right") - 1, 0)])


def first_step(data: RunData, quantity: str) -> int:
    """Return the first step of a quantity."""
    return int(data.tables[quantity].steps[0])


def merge_scalars(scalars: Mapping[str, Series], *tags: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Merge several tags to one series, and return its steps and values."""
    series = [scalars[tag] for tag in tags if tag in scalars]
    if not series:
        return np.zeros(0), np.zeros(0)
    steps, values = (np.concatenate([getattr(one, name) for one in series]) for name in ("steps", "values"))
    order = np.argsort(steps, kind="stable")
    return steps[order], values[order]


def find_stretches(mask: NDArray[Any], least: int) -> list[tuple[int, int]]:
    """List where a condition holds at least ``least`` consecutive times: ``(start, stop)``."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    pairs = zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
    return [(start, stop) for start, stop in pairs if stop - start >= least]


def final_stretch(mask: NDArray[Any]) -> int:
    """Return where the stretch that lasts to the end begins; the length if the last reading is not in one."""
    broken = np.flatnonzero(~mask)
    return int(broken[-1]) + 1 if len(broken) else 0


def running_median(values: NDArray[Any], width: int) -> NDArray[Any]:
    """Return the median of the last ``width`` values at each, of fewer at the beginning."""
    if not len(values):
        return values
    padded = np.concatenate([np.full(width - 1, np.nan), values])
    windows = np.lib.stride_tricks.sliding_window_view(padded, width)
    full = np.median(windows, axis=1)
    for index in range(min(width - 1, len(values))):
        full[index] = np.median(values[: index + 1])
    return full


def noise_level(values: NDArray[Any]) -> float:
    """Estimate the standard deviation of one reading from second differences; trends and few jumps do not matter.

    The largest of those between neighbours and between readings a few apart: neighbours are alike if noise is slow, the
    others if batches come back in the same order.
    """
    apart = [lag for lag in (1, CONSECUTIVE, 2 * CONSECUTIVE) if lag == 1 or len(values) > 3 * lag]
    with np.errstate(over="ignore", invalid="ignore"):
        bends = [
            values[2 * lag :] - 2 * values[lag:-lag] + values[: -2 * lag] for lag in apart if len(values) > 2 * lag
        ]
        return max((_spread(bend) / math.sqrt(6) for bend in bends), default=0.0)


def _spread(changes: NDArray[Any]) -> float:
    """Estimate a standard deviation from the median, or from the mean if more than half of the changes are equal."""
    sizes = np.abs(changes - np.median(changes))
    found = float(1.4826 * np.median(sizes)) or float(1.2533 * np.mean(sizes))
    return math.inf if math.isnan(found) else found


def resolution(values: NDArray[Any]) -> float:
    """Return the distance between adjacent values if they were rounded coarsely, else 0.

    Rounding is recognised by the number of significant bits that suffices for all of them (half precision), or by
    repeated values (rounded to some decimals).
    """
    if not len(values):
        return 0.0
    mantissas, exponents = np.frexp(values)
    rounded = [bits for bits in _HALF_BITS if np.all(mantissas * 2.0**bits == np.round(mantissas * 2.0**bits))]
    by_bits = float(np.median(2.0 ** (exponents[values != 0] - rounded[0]))) if rounded and values.any() else 0.0
    distinct = np.unique(values)
    repeats = 2 <= len(distinct) <= len(values) / 2
    return max(by_bits, float(np.diff(distinct).min()) if repeats else 0.0)


def row_median(values: NDArray[Any]) -> NDArray[Any]:
    """Return the median of each row's finite values; NaN if it has none."""
    return np.array([np.median(row[np.isfinite(row)]) if np.isfinite(row).any() else np.nan for row in values])


def finite_or_zero(values: NDArray[Any]) -> NDArray[Any]:
    """Replace values that are not finite by zero."""
    return np.where(np.isfinite(values), values, 0.0)


def all_zero(table: Series) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the steps at which any layer has a finite value, and whether all of those are zero there."""
    finite = np.isfinite(table.values)
    known = finite.any(1)
    return table.steps[known], (~finite | (table.values == 0)).all(1)[known]


def lasting(mask: NDArray[Any]) -> int | None:
    """Return where a condition begins that holds to the end: from the first reading on, or for some readings."""
    start = final_stretch(mask)
    return start if len(mask) - start >= (CONSECUTIVE if start else FEW) else None


def last_of(data: RunData, quantity: str, layer: str) -> float:
    """Return the median of the last finite readings of a layer; NaN without any."""
    values = next((values for name, _, values in layer_columns(data, quantity) if name == layer), np.zeros(0))
    return float(np.median(values[-FEW:])) if len(values) else float("nan")


def say_largest(data: RunData, quantity: str, form: str) -> str | None:
    """Say which layer is largest at the end, and how large; None without readings."""
    found = [(float(np.median(values[-FEW:])), name) for name, _, values in layer_columns(data, quantity)]
    return f"at most {form.format(max(found)[0])} at the end, {max(found)[1]}" if found else None
