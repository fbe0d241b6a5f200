"""Learning rates as they were recorded, and what they explain: a rate of zero is a choice, not a fault."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynamon.health.limits import ZERO_RATIO
from dynamon.health.series import column_at
from dynamon.runs.history import RunData

# Each with steering in it, but for what Lightning's LearningRateMonitor writes.
_BY_LAYER = ("weight/effective_rate", "lr/effective")
_MONITORED = "lr-"


def rate_is_zero(data: RunData, steps: NDArray[Any]) -> bool:
    """Return whether every known learning rate at some steps is 0, and one is known."""
    known = [values for values in _rates(data, steps) if not np.isnan(values).all()]
    return bool(known) and all(bool((values[~np.isnan(values)] == 0).all()) for values in known)


def _rates(data: RunData, steps: NDArray[Any]) -> list[NDArray[Any]]:
    """List the known rates at some steps: of all layers or groups, one array per source."""
    found = []
    for quantity in _BY_LAYER:
        table = data.tables.get(quantity)
        if table is not None and len(table) and len(steps):
            within = (table.steps >= steps[0]) & (table.steps <= steps[-1])
            found.append(table.values[within].ravel())
    for tag, series in data.scalars.items():
        if tag.startswith(_MONITORED) and len(series) and len(steps):
            within = (series.steps >= steps[0]) & (series.steps <= steps[-1])
            found.append(series.values[within])
    return found


def rate_series(data: RunData) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """Yield steps ``[T]`` and rates ``[T, n]`` of each source: steering, LearningRateMonitor, and readings of weights.

    The last ones are rates by layer, without ratios unless the optimizer is steered.
    """
    for tag, series in data.scalars.items():
        if tag == "lr/base" or tag.startswith(_MONITORED):
            yield series.steps, series.values[:, None]
    rates, sizes = data.tables.get("weight/effective_rate"), data.tables.get("weight/frobenius")
    if rates is None or sizes is None or "lr/base" in data.scalars or rates.values.shape != sizes.values.shape:
        return
    yield rates.steps, rates.values * np.square(sizes.values)


def is_turned_off(data: RunData, layer: str, steps: NDArray[Any]) -> NDArray[Any]:
    """Return whether a layer's rate is 0 at each of some steps, or its steering ratio almost zero."""
    off = column_at(data, "lr/ratio", layer, steps) < ZERO_RATIO
    for quantity in _BY_LAYER:
        off |= column_at(data, quantity, layer, steps) == 0
    return off
