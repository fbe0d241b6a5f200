"""Rule on spikes: single steps far above their usual level, as the sentinel records them."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dynamon.health.finding import Finding
from dynamon.health.limits import FEW, SPIKE
from dynamon.health.loss import Loss
from dynamon.runs.history import RunData, Series

_KINDS = ("gradient", "update", "loss")
_NAMED = 60  # steps that a message lists
_TAGS = ("spike/deviation", "spike/layer_deviation")
_ADVICE = (
    "Look at the batch: its labels, its scale, tokens that repeat. dynamon.monitoring.fingerprint.fingerprint(batch) "
    "finds it in the loader. Leave a bad batch out; where batches are good, clip by norm, warm up for longer, or lower "
    "the rate."
)
_OF_UPDATE = (
    "The update moved without the gradient: the optimizer's running averages no longer fit it. Look at what was done "
    "to its state (a checkpoint, a changed group), and lower beta2 or the rate where gradients grow faster than it."
)


@dataclass(frozen=True)
class _Spike:
    """Hold a spike: its step, what was above its level and by how much, the layer farthest, its batch, its length."""

    step: int
    kinds: dict[str, float]
    layer: str | None
    batch: int
    code: str | None
    lasted: int | None

    @property
    def deviation(self) -> float:
        return max(self.kinds.values(), default=0.0)

    @property
    def what(self) -> str:
        """Gradient, update or both, of the layer that is farthest away, or the loss alone."""
        moved = [kind for kind in ("gradient", "update") if kind in self.kinds]
        if not moved or self.layer is None:
            return f"the {_joined(moved or ['loss'])}"
        return f"the {_joined(moved)} of {self.layer}"


def spikes(data: RunData, loss: Loss) -> Iterator[Finding]:
    """Find steps of which gradient, update or loss was far above its usual level: one finding each, many in one.

    Of more than three the last one has a finding of its own, and all of them have one together.
    """
    found = list(find_spikes(data))
    for spike in found if len(found) <= FEW else found[-1:]:
        yield _one(spike, data.last_step)
    if len(found) > FEW:
        yield _many(found)


def find_spikes(data: RunData) -> Iterator[_Spike]:
    """Yield the spikes of a run, in their order."""
    batches = data.scalars.get("spike/batch")
    if batches is None:
        return
    lasted = data.scalars.get("spike/lasted")
    ends = np.zeros(0) if lasted is None else lasted.steps
    for at, step in enumerate(batches.steps.tolist()):
        kinds = {kind: _at(data.scalars.get(f"spike/{kind}"), step) for kind in _KINDS}
        largest = max((d for d in kinds.values() if not math.isnan(d)), default=math.nan)
        code = _at(data.scalars.get("spike/fingerprint"), step)
        end = int(np.searchsorted(ends, step, side="right"))
        is_next = at + 1 == len(batches) or end < len(ends) and ends[end] <= batches.steps[at + 1]
        yield _Spike(
            int(step),
            {kind: d for kind, d in kinds.items() if d >= min(SPIKE, largest)},
            _farthest(data, step),
            int(batches.values[at]),
            None if math.isnan(code) else f"{int(code):06x}",
            int(lasted.values[end]) if lasted is not None and end < len(ends) and is_next else None,
        )


def _at(series: Series | None, step: int) -> float:
    """The value at a step; NaN where there is none."""
    if series is None:
        return math.nan
    place = int(np.searchsorted(series.steps, step))
    return float(series.values[place]) if place < len(series) and series.steps[place] == step else math.nan


def _farthest(data: RunData, step: int) -> str | None:
    table = data.tables.get("spike/layer_deviation")
    if table is None or not table.layers:
        return None
    row = np.flatnonzero(table.steps == step)
    if not len(row):
        return None
    values = np.nan_to_num(table.values[row[0]], nan=-np.inf, posinf=np.inf, neginf=-np.inf)
    return table.layers[int(np.argmax(values))]


def _is_grave(spike: _Spike) -> bool:
    """Return whether the loss moved as well, or anything was not finite, or it has not come back."""
    return "loss" in spike.kinds or math.isinf(spike.deviation) or spike.lasted is None


def _one(spike: _Spike, last: int) -> Finding:
    loss = f"; the loss {_moved(spike.kinds['loss'])}" if "loss" in spike.kinds and len(spike.kinds) > 1 else ""
    end = "What follows it is not known yet." if last <= spike.step else f"It was not over by step {last}."
    if spike.lasted is not None:
        end = f"It was over after {_steps(spike.lasted)}."
    code = "" if spike.code is None else f", fingerprint {spike.code}"
    own = max((d for kind, d in spike.kinds.items() if kind != "loss"), default=spike.deviation)
    return Finding(
        "spike/deviation",
        "warning" if _is_grave(spike) else "note",
        spike.step,
        f"Step {spike.step} is a spike: {spike.what} {_moved(own)}{loss} (batch {spike.batch} of its epoch{code}). "
        f"{end}",
        _OF_UPDATE if set(spike.kinds) == {"update"} else _ADVICE,
        () if spike.layer is None else (spike.layer,),
        {"deviation": spike.deviation, "batch": float(spike.batch)},
        _TAGS,
    )


def _many(found: Sequence[_Spike]) -> Finding:
    steps = [spike.step for spike in found]
    listed = ", ".join(map(str, steps[:_NAMED]))
    left_out = f" and {len(steps) - _NAMED} more, the last at {steps[-1]}" if len(steps) > _NAMED else ""
    whats = Counter(spike.what for spike in found).most_common(3)
    worst = max(found, key=lambda spike: spike.deviation)
    codes = Counter(spike.code for spike in found if spike.code is not None)
    again = [code for code, count in codes.most_common() if count > 1]
    repeated = f" Batches with fingerprint {', '.join(again[:5])} had more than one." if again else ""
    over = sum(spike.lasted is not None for spike in found)
    layers = tuple(dict.fromkeys(spike.layer for spike in found if spike.layer is not None))
    return Finding(
        "spike/many",
        "warning" if any(map(_is_grave, found)) else "note",
        steps[0],
        f"{len(found)} steps are spikes: {listed}{left_out}. What moved first: "
        + "; ".join(f"{what} at {count} of them" for what, count in whats)
        + f". The largest, {_size(worst.deviation)}, was at step {worst.step} on batch "
        f"{worst.batch} of its epoch; {over} of {len(found)} were over soon.{repeated}",
        _OF_UPDATE if all(set(spike.kinds) == {"update"} for spike in found) else _ADVICE,
        layers,
        {"spikes": float(len(found)), "deviation": worst.deviation},
        _TAGS,
    )


def _size(deviation: float) -> str:
    return "not finite" if math.isinf(deviation) else f"{deviation:.3g} deviations above the usual level"


def _moved(deviation: float) -> str:
    return "was not finite" if math.isinf(deviation) else f"was {deviation:.3g} deviations above its usual level"


def _steps(count: int) -> str:
    return f"{count} step{'s' * (count != 1)}"


def _joined(words: Sequence[str]) -> str:
    return " and ".join(words)
