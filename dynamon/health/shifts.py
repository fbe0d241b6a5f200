"""Rule on shifts of the loss: it stays above its usual level, by less than a spike."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dynamon.health.finding import Finding
from dynamon.health.limits import FEW, LASTING_SHIFT
from dynamon.health.loss import Loss
from dynamon.runs.history import RunData

_ADVICE = (
    "Look at what changed at that step: the data (labels that no longer belong to their inputs, another source, "
    "another order), the learning rate, an optimizer whose state was loaded or lost."
)


@dataclass(frozen=True)
class _Shift:
    """Hold a shift: where it began, when that was known, how far and how many times the loss rose, how long."""

    step: int
    known: int
    deviation: float
    size: float
    lasted: int | None


def shifts(data: RunData, loss: Loss) -> Iterator[Finding]:
    """Find where the loss began to stay above its level: the last three of such steps."""
    found = list(find_shifts(data))
    for shift in found[-FEW:]:
        yield _one(shift, data.last_step, len(found))


def find_shifts(data: RunData) -> Iterator[_Shift]:
    """Yield the shifts of a run, in their order."""
    series, sizes, ages = (data.scalars.get(f"spike/shift{end}") for end in ("", "_size", "_age"))
    if series is None or sizes is None or ages is None:
        return
    lasted = data.scalars.get("spike/shift_lasted")
    ends = np.zeros(0) if lasted is None else lasted.steps
    for at, known in enumerate(series.steps.tolist()):
        end = int(np.searchsorted(ends, known, side="right"))
        is_own = at + 1 == len(series) or end < len(ends) and ends[end] <= series.steps[at + 1]
        yield _Shift(
            int(known - ages.values[at]),
            int(known),
            float(series.values[at]),
            float(sizes.values[at]),
            int(lasted.values[end]) if lasted is not None and end < len(ends) and is_own else None,
        )


def _one(shift: _Shift, last: int, count: int) -> Finding:
    stays = shift.lasted is None and last - shift.step >= LASTING_SHIFT
    end = f"It was not back by step {last}." if shift.lasted is None else f"It was back after {shift.lasted} steps."
    others = f" There were {count} such shifts in all." if count > FEW else ""
    return Finding(
        "spike/shift",
        "warning" if stays else "note",
        shift.step,
        f"From step {shift.step} on the loss was {shift.size:.3g} times as large as usual, {shift.deviation:.2g} "
        f"standard deviations of a step, in the mean up to step {shift.known}. {end}{others}",
        _ADVICE,
        numbers={"deviation": shift.deviation, "size": shift.size},
        tags=("spike/shift", "spike/loss"),
    )
