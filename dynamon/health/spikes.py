"""Rule on spikes: single steps far above their usual level, as the sentinel records them."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dynamon.health.finding import Finding
from dynamon.health.limits import EVERYWHERE, FEW, INPUT_SIZE, INPUT_SPREAD, SPIKE
from dynamon.health.loss import Loss
from dynamon.runs.history import RunData, Series

_KINDS = ("gradient", "update", "loss", "inputs")
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


_OF_INPUTS = (
    "Look at the batch and at what made it: a scale that was applied twice or not at all, a file that could not be "
    "read, a sample that was repeated. dynamon.monitoring.fingerprint.fingerprint(batch) finds it in the loader. "
    "BatchNorm hides a wrong scale in training, not in evaluation: it enters its running statistics."
)


@dataclass(frozen=True)
class _Inputs:
    """Hold what was unusual about a batch: which of its tensors, and what times the usual its size and spread were."""

    place: int
    size: float
    spread: float

    @property
    def what(self) -> str:
        """Return in words what happened to them."""
        name = "the batch's inputs" if self.place == 0 else f"the tensor at place {self.place} of the batch"
        verb = "are" if self.place == 0 else "is"
        if self.spread <= INPUT_SPREAD and not self.size >= INPUT_SIZE:
            alike = "vary" if self.place == 0 else "varies"
            return f"{name} {alike} {self.spread:.2g} times as much as usual: samples, or entries of each, are alike"
        return f"{name} {verb} {self.size:.3g} times as large as usual"


@dataclass(frozen=True)
class _Spike:
    """Hold a spike: its step, what was above its level and by how much, where, its batch, its length."""

    step: int
    kinds: dict[str, float]
    layer: str | None
    is_everywhere: bool
    inputs: _Inputs | None
    batch: int
    code: str | None
    lasted: int | None

    @property
    def deviation(self) -> float:
        return max(self.kinds.values(), default=0.0)

    @property
    def what(self) -> str:
        """Gradient, update or both, of the layer that is farthest away; else the loss, or the batch."""
        moved = [kind for kind in ("gradient", "update") if kind in self.kinds]
        if moved:
            of = " of all layers" if self.is_everywhere else "" if self.layer is None else f" of {self.layer}"
            return f"{_joined([f'the {kind}' for kind in moved])}{of}"
        return "the loss" if "loss" in self.kinds or self.inputs is None else self.inputs.what

    @property
    def layers(self) -> tuple[str, ...]:
        """The layer that is farthest away, where it is not only the first among many."""
        return () if self.layer is None or self.is_everywhere else (self.layer,)


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
        kinds = {kind: d for kind, d in kinds.items() if d >= min(SPIKE, largest)}
        layer, is_everywhere = _farthest(data, step) if {"gradient", "update"} & set(kinds) else (None, False)
        end = int(np.searchsorted(ends, step, side="right"))
        is_next = at + 1 == len(batches) or end < len(ends) and ends[end] <= batches.steps[at + 1]
        yield _Spike(
            int(step),
            kinds,
            layer,
            is_everywhere,
            _inputs(data, step),
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


def _inputs(data: RunData, step: int) -> _Inputs | None:
    place, size, spread = (_at(data.scalars.get(f"spike/input{end}"), step) for end in ("", "_size", "_spread"))
    return None if math.isnan(place) else _Inputs(int(place), size, spread)


def _farthest(data: RunData, step: int) -> tuple[str | None, bool]:
    """The layer that is farthest above its level, and whether nearly all are about as far."""
    table = data.tables.get("spike/layer_deviation")
    row = np.zeros(0) if table is None else np.flatnonzero(table.steps == step)
    if table is None or not table.layers or not len(row):
        return None, False
    values = np.nan_to_num(table.values[row[0]], nan=-np.inf, posinf=np.inf, neginf=-np.inf)
    far = values >= max(SPIKE, values.max() / 2)
    return table.layers[int(np.argmax(values))], len(values) >= FEW and float(far.mean()) >= EVERYWHERE


def _is_grave(spike: _Spike) -> bool:
    """Return whether loss or batch moved as well, or anything was not finite, or it has not come back."""
    return bool({"loss", "inputs"} & set(spike.kinds)) or math.isinf(spike.deviation) or spike.lasted is None


def _one(spike: _Spike, last: int) -> Finding:
    end = "What follows it is not known yet." if last <= spike.step else f"It was not over by step {last}."
    if spike.lasted is not None:
        end = f"It was over after {_steps(spike.lasted)}."
    code = "" if spike.code is None else f", fingerprint {spike.code}"
    return Finding(
        "spike/deviation",
        "warning" if _is_grave(spike) else "note",
        spike.step,
        f"Step {spike.step} is a spike: {'; '.join(_clauses(spike))} (batch {spike.batch} of its epoch{code}). {end}",
        _advice([spike]),
        spike.layers,
        {"deviation": spike.deviation, "batch": float(spike.batch)},
        _TAGS,
    )


def _clauses(spike: _Spike) -> list[str]:
    """Return what moved by how much, a clause for each."""
    own = [spike.kinds[kind] for kind in ("gradient", "update") if kind in spike.kinds]
    found = [f"{spike.what} {_moved(max(own), len(own) > 1, spike.is_everywhere)}"] if own else []
    if "loss" in spike.kinds or not spike.kinds:
        found.append(f"the loss {_moved(spike.kinds.get('loss', spike.deviation))}")
    if spike.inputs is not None:
        found.append(spike.inputs.what)
    return found


def _advice(found: Sequence[_Spike]) -> str:
    if any(spike.inputs is not None for spike in found):
        return _OF_INPUTS
    return _OF_UPDATE if all(set(spike.kinds) == {"update"} for spike in found) else _ADVICE


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
    layers = tuple(dict.fromkeys(layer for spike in found for layer in spike.layers))
    return Finding(
        "spike/many",
        "warning" if any(map(_is_grave, found)) else "note",
        steps[0],
        f"{len(found)} steps are spikes: {listed}{left_out}. What moved first: "
        + "; ".join(f"{what} at {count} of them" for what, count in whats)
        + f". The largest, {_size(worst.deviation)}, was at step {worst.step} on batch "
        f"{worst.batch} of its epoch; {over} of {len(found)} were over soon.{repeated}",
        _advice(found),
        layers,
        {"spikes": float(len(found)), "deviation": worst.deviation},
        _TAGS,
    )


def _size(deviation: float) -> str:
    return "not finite" if math.isinf(deviation) else f"{deviation:.3g} deviations above the usual level"


def _moved(deviation: float, is_plural: bool = False, is_everywhere: bool = False) -> str:
    verb, own = ("were", "their usual levels") if is_plural or is_everywhere else ("was", "its usual level")
    most = "up to " if is_everywhere else ""
    return f"{verb} not finite" if math.isinf(deviation) else f"{verb} {most}{deviation:.3g} deviations above {own}"


def _steps(count: int) -> str:
    return f"{count} step{'s' * (count != 1)}"


def _joined(words: Sequence[str]) -> str:
    return " and ".join(words)
