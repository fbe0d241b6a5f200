"""Summarise who lowered the loss and who raised it: means of progress readings over time and by layer, with errors."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynamon.board.packing import numbers, packed
from dynamon.quantities.progress import standard_error_over_trend
from dynamon.runs.history import RunData, Series

_WINDOWS, _IN_WINDOW = 24, 8  # most windows over time, fewest readings in one where there are several
_LATE = 3  # the last part of the readings is one of so many
_NAMED = 4  # layers that the sentence names
LOWERS, RAISES = "lowers the loss", "raises the loss"
_QUANTITIES = ("decrease", "first_order", "curvature_cost")


@dataclass(frozen=True)
class LayerProgress:
    """What the steps of a run did to the loss, by layer; means and standard errors over successive readings.

    Attributes:
        layers: L names.
        readings: How many readings there are.
        decrease: Mean decrease of the loss in a step, ``[L]``.
        error: Its standard error, NaN for fewer than 4 readings.
        late: The mean of the last third of the readings.
        late_error: Its standard error.
        overshoot: Mean curvature cost over mean first-order decrease; NaN where the latter is not surely positive.
        total: Mean decrease of all layers together, those included that are not shown.
        total_error: Its standard error.
        share: ``decrease`` over ``total``; NaN where the total is not surely positive.
        steps: Middle of each of W windows of successive readings, ``[W]``.
        over_time: Mean decrease in each, ``[W, L]``.
        over_time_error: Its standard error.
        total_over_time: The same of all layers together, ``[W]``.
        total_over_time_error: Its standard error.
        overshoot_over_time: Overshoot of the step of the layers shown, by the means of each window, likewise.
    """

    layers: tuple[str, ...]
    readings: int
    decrease: NDArray[Any]
    error: NDArray[Any]
    late: NDArray[Any]
    late_error: NDArray[Any]
    overshoot: NDArray[Any]
    total: float
    total_error: float
    share: NDArray[Any]
    steps: NDArray[Any]
    over_time: NDArray[Any]
    over_time_error: NDArray[Any]
    total_over_time: NDArray[Any]
    total_over_time_error: NDArray[Any]
    overshoot_over_time: NDArray[Any]

    def verdict(self, layer: int) -> str:
        """Whether a layer lowers the loss, raises it, or neither for sure."""
        if not abs(self.decrease[layer]) > 2 * self.error[layer]:
            return "not sure"
        return LOWERS if self.decrease[layer] > 0 else RAISES


def layer_progress(run: RunData) -> LayerProgress | None:
    """Summarise the progress readings of a run; None where there are none.

    Readings are averaged in windows of at least 8 successive ones, 24 windows at most; fewer than 16 are shown one by
    one. Means have the error of :func:`dynamon.quantities.progress.standard_error_over_trend`.
    """
    found = [run.tables.get(f"progress/{name}") for name in _QUANTITIES]
    decrease, first, cost = found
    if decrease is None or first is None or cost is None or not np.isfinite(decrease.values).any():
        return None
    count = min(len(series) for series in (decrease, first, cost))
    values, slopes, costs = (series.values[-count:].astype(np.float64) for series in (decrease, first, cost))
    total = _total(run, decrease)[-count:, None]
    # Of few readings each is shown by itself, without an error.
    parts = np.array_split(np.arange(count), min(_WINDOWS, count // _IN_WINDOW) if count >= 2 * _IN_WINDOW else count)
    (mean, error), (late, late_error) = _mean(values), _mean(values[-max(count // _LATE, 1) :])
    of_windows = [_mean(values[part]) for part in parts]
    of_totals = [_mean(total[part]) for part in parts]
    (whole,), (whole_error,) = _mean(total)
    bent = [_overshoot(np.nansum(slopes[part], 1), np.nansum(costs[part], 1)) for part in parts]
    return LayerProgress(
        layers=tuple(decrease.layers or ()),
        readings=count,
        decrease=mean,
        error=error,
        late=late,
        late_error=late_error,
        overshoot=np.array([_overshoot(*pair) for pair in zip(slopes.T, costs.T, strict=True)]),
        total=float(whole),
        total_error=float(whole_error),
        share=mean / whole if whole > 2 * whole_error else np.full_like(mean, np.nan),
        steps=np.array([decrease.steps[-count:][part].mean() for part in parts]),
        over_time=np.stack([middle for middle, _ in of_windows]),
        over_time_error=np.stack([width for _, width in of_windows]),
        total_over_time=np.array([middle[0] for middle, _ in of_totals]),
        total_over_time_error=np.array([width[0] for _, width in of_totals]),
        overshoot_over_time=np.array(bent),
    )


def _overshoot(slopes: NDArray[Any], costs: NDArray[Any]) -> float:
    """Mean cost over mean first-order decrease of some readings; NaN where the latter is not surely positive."""
    known = np.isfinite(slopes) & np.isfinite(costs)
    (slope,), (error,) = _mean(slopes[known, None])
    return float(costs[known].mean() / slope) if slope > 2 * error else float("nan")


def _mean(values: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Mean and standard error of the readings ``[T, L]`` that each layer has."""
    pairs = []
    for column in values.T:
        known = column[np.isfinite(column)]
        pairs.append((known.mean() if len(known) else np.nan, float(standard_error_over_trend(known))))
    mean, error = np.array(pairs).T
    return mean, error


def _total(run: RunData, decrease: Series) -> NDArray[Any]:
    """The decrease of all layers in each reading; of those shown where the scalar is not there."""
    shown = np.nansum(decrease.values.astype(np.float64), 1)
    known = run.scalars.get("progress/total_decrease")
    every = {} if known is None else dict(zip(known.steps.tolist(), known.values.tolist(), strict=True))
    return np.array([every.get(step, value) for step, value in zip(decrease.steps.tolist(), shown, strict=True)])


def sentence(found: LayerProgress) -> str:
    """Say what a step did to the loss, which layers did most of it, and which surely raised the loss."""
    size = f"{found.total:.2g}" + (f" ± {2 * found.total_error:.1g}" if np.isfinite(found.total_error) else "")
    said = f"{found.readings} readings: a step took {size} off the loss of the next batch."
    if np.isnan(found.total_error):
        return f"{said} So few do not tell it from noise."
    if np.isnan(found.share).all():
        return f"{said} It cannot be told from noise, so no shares of layers are given."
    verdicts = [found.verdict(i) for i in range(len(found.layers))]
    first = [i for i in np.argsort(-np.nan_to_num(found.share))[:_NAMED] if verdicts[i] == LOWERS]
    most = ", ".join(f"{found.layers[i]} {found.share[i]:.0%}" for i in first)
    undone = [name for name, verdict in zip(found.layers, verdicts, strict=True) if verdict == RAISES]
    named = ", ".join(undone[:_NAMED]) + (f" and {len(undone) - _NAMED} more" if len(undone) > _NAMED else "")
    most = f" Most of it: {most}." if most else ""
    return f"{said}{most}" + (f" Raised by: {named}." if undone else " No layer surely raised it.")


def packed_progress(run: RunData) -> dict[str, Any] | None:
    """Pack the summary for the board: arrays over time as in :mod:`dynamon.board.payload`, a row for each layer."""
    found = layer_progress(run)
    if found is None:
        return None
    bound = 2 * found.total_over_time_error
    rows = zip(
        found.layers,
        *map(numbers, (found.decrease, found.error, found.share, found.late, found.late_error, found.overshoot)),
        map(found.verdict, range(len(found.layers))),
        strict=True,
    )
    return {
        "sentence": sentence(found),
        "layers": list(found.layers),
        "rows": [list(row) for row in rows],
        "steps": packed(found.steps, "<f8"),
        "values": packed(found.over_time, "<f4"),
        "errors": packed(found.over_time_error, "<f4"),
        "total": packed(found.total_over_time, "<f8"),
        "low": packed(found.total_over_time - bound, "<f8"),
        "high": packed(found.total_over_time + bound, "<f8"),
        "overshoot": packed(found.overshoot_over_time, "<f8"),
    }


def progress_lines(run: RunData, most: int = 12) -> Iterator[str]:
    """Describe the summary in lines for a terminal: a sentence, and a table of the layers that did most.

    Args:
        run: The run.
        most: Layers in the table.
    """
    found = layer_progress(run)
    if found is None:
        return
    yield f"  progress, {sentence(found)}"
    order = np.argsort(-np.abs(np.nan_to_num(found.decrease)))
    width = max(len(found.layers[i]) for i in order[:most])
    yield f"    {'':{width}}  decrease in a step     share   last third             overshoot"
    for i in order[:most]:
        share = "" if np.isnan(found.share[i]) else f"{found.share[i]:.1%}"
        sure = _with_error(found.decrease[i], found.error[i]), _with_error(found.late[i], found.late_error[i])
        bent = "" if np.isnan(found.overshoot[i]) else f"{found.overshoot[i]:.2f}"
        line = f"    {found.layers[i]:{width}}  {sure[0]:20}  {share:>6}   {sure[1]:20}  {bent:>6}   {found.verdict(i)}"
        yield line.rstrip()
    if len(order) > most:
        yield f"    and {len(order) - most} more that did less"


def _with_error(value: float, error: float) -> str:
    return f"{value:9.2e}" + (f" ± {2 * error:.0e}" if np.isfinite(error) else "")
