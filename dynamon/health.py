"""What looks wrong in a run, in plain words: rules over what was measured, while it goes on or afterwards.

A rule speaks when several readings in a row say the same, and compares medians, so that noise alone raises nothing.
Sharpness at the threshold is normal training and no finding.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from dynamon.gradients import Array
from dynamon.history import RunData, Series

SEVERITIES = ("fault", "warning", "note")  # the worst first
_IN_A_ROW = 5  # readings that must agree
_PAST = 20  # readings that a jump is compared with
_JUMP = 10.0  # times
_NOISES = 6.0  # standard deviations of a reading
_LOSS_NOISES = 8.0  # the same for the loss, whose batches come in an order and may resemble their neighbours
_FAR_ABOVE = 2.0  # stability ratio: a probe's may well read some tenths above 1
_STILL = 1e-8  # update over weight that float32 does not resolve
_NOTHING = 1e-12  # share of the median layer's gradient; rounding where a gradient is zero in theory leaves 1e-9
_DEAD_FOR = 10  # readings
_ENOUGH = 4000  # readings of a layer
_LOSSES = ("train/loss", "train_loss", "loss", "training/loss", "training_loss", "train/loss_step", "train_loss_step")
_EIGENVALUES = ("stability_ratio", "hessian_max", "preconditioned_max", "ggn_max")


@dataclass(frozen=True)
class Finding:
    """One thing that looks wrong.

    Attributes:
        rule: Which rule found it.
        severity: ``"fault"``: training is broken or about to be; ``"warning"``: worth a look; ``"note"``: good to
            know.
        step: Where it began.
        layers: The layers concerned, the earliest or the worst first; none where it is about the whole run.
        message: What was seen, in a sentence with its numbers.
        advice: What one usually does about it.
        numbers: The numbers in the message, by name.
        tags: Tags and per-layer quantities that show it.
    """

    rule: str
    severity: str
    step: int
    message: str
    advice: str
    layers: tuple[str, ...] = ()
    numbers: dict[str, float] = field(default_factory=dict)
    tags: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For JSON: numbers that are not finite become text."""
        numbers = {name: value if math.isfinite(value) else str(value) for name, value in self.numbers.items()}
        return {**asdict(self), "numbers": numbers}


def findings(run: RunData | Mapping[str, Series], loss: str | None = None) -> list[Finding]:
    """Apply all rules.

    Args:
        run: What is known of a run: :func:`dynamon.runs.read_run_data`, or a monitor's ``history`` while it trains.
        loss: Tag of the training loss; None looks for one, and takes the loss on the probe where there is none.

    Returns:
        The findings, the worst first and of those the earliest.
    """
    data = run if isinstance(run, RunData) else RunData.of(run)
    known = _Loss(data.scalars, loss or loss_tag(data.scalars))
    found = [finding for rule in RULES for finding in rule(data, known)]
    return sorted(found, key=lambda finding: (SEVERITIES.index(finding.severity), finding.step))


def loss_tag(scalars: Mapping[str, Series]) -> str | None:
    """The tag under which the training loss was logged; the loss on the probe where none looks like one."""
    for tag in _LOSSES:
        if tag in scalars:
            return tag
    likely = [tag for tag in scalars if "train" in tag.lower() and "loss" in tag.lower()]
    likely += ["sharpness/probe_loss"] if "sharpness/probe_loss" in scalars else []
    return likely[0] if likely else None


class _Loss:
    """The training loss, smoothed.

    ``level`` is its running median at each of ``steps``, ``noise`` the standard deviation of a single reading.
    """

    def __init__(self, scalars: Mapping[str, Series], tag: str | None) -> None:
        self.tags = (tag,) if tag is not None and tag in scalars else ()
        steps, values = _merged(scalars, *self.tags)
        finite = np.isfinite(values)
        broken = np.flatnonzero(~finite)
        self.broken_at = int(steps[broken[0]]) if len(broken) else None
        self.is_broken = bool(len(values)) and not finite[-1]
        self.steps, self.values = steps[finite], values[finite]
        width = int(np.clip(len(self.values) // 20, _IN_A_ROW, 51))
        self.level = _running_median(self.values, width)
        self.noise = _noise(self.values)

    def __len__(self) -> int:
        return len(self.level)

    def rise(self, begin: float, end: float) -> float:
        """By how much the level at step ``end`` lies above the lowest up to ``begin``; 0 where that is noise.

        A rise counts from a quarter of what had been gained by then, and above eight times the noise; where the loss is
        positive, the noise of its logarithm serves as well, since that of a diverging loss grows with it.
        """
        last = int(np.searchsorted(self.steps, end, side="right"))
        first = min(max(int(np.searchsorted(self.steps, begin, side="right")), 1), last)
        if not first:
            return 0.0
        low = float(self.level[:first].min())
        rise = float(self.level[last - 1]) - low
        gained = float(self.level[0]) - low
        beyond = rise > _LOSS_NOISES * self.noise or self._times(low, float(self.level[last - 1]))
        return rise if beyond and rise > max(gained / 4, 1e-6 * abs(low)) else 0.0

    @property
    def is_lost(self) -> bool:
        """Whether nine tenths of the last quarter lie far above the beginning, however it jumps.

        Twice as high as the first three readings, or eight times the very first: a run may be lost with its first step.
        """
        last = self.values[-(len(self.values) // 4) :]
        if len(last) < _IN_A_ROW**2 or self.values[0] <= 0:
            return False
        return float(np.quantile(last, 0.1)) > min(2 * float(self.values[:3].max()), 8 * float(self.values[0]))

    def _times(self, low: float, high: float) -> bool:
        """Whether a positive loss has doubled at least, and that beyond its relative noise."""
        if not len(self.values) or self.values.min() <= 0:
            return False
        return math.log(high / low) > max(_LOSS_NOISES * _noise(np.log(self.values)), math.log(2))


def _broken_loss(data: RunData, loss: _Loss) -> Iterator[Finding]:
    if loss.is_broken and loss.broken_at is not None:
        yield Finding(
            "loss/nonfinite",
            "fault",
            loss.broken_at,
            f"The training loss is not finite from step {loss.broken_at} on.",
            "Go back to a checkpoint before that step. Usual causes: too large a learning rate, overflow in half "
            "precision, a logarithm or a division of zero; gradient clipping helps against rare large batches.",
            tags=loss.tags,
        )


def _diverging(data: RunData, loss: _Loss) -> Iterator[Finding]:
    if len(loss) < 2 * _IN_A_ROW:
        return
    lowest = int(np.argmin(loss.level))
    low, end, start = float(loss.level[lowest]), float(loss.level[-1]), float(loss.level[0])
    rise = end - low if loss.is_lost else loss.rise(loss.steps[lowest], loss.steps[-1])
    if not rise or rise < (start - low) / 2:
        return
    begin = int(loss.steps[lowest + int(np.argmax(loss.level[lowest:] > low + rise / 10))])
    lost = loss.is_lost or (end > start and bool(loss.rise(loss.steps[0], loss.steps[-1])))
    yield Finding(
        "loss/rising",
        "fault" if lost else "warning",
        begin,
        f"The training loss rose from {low:.4g} to {end:.4g}"
        + (f", above the {start:.4g} it began with." if lost else " and did not come back."),
        "Lower the learning rate or lengthen the warm-up; look at what the data and the schedule did at that step.",
        numbers={"lowest": low, "last": end, "first": start},
        tags=loss.tags,
    )


def _unstable(data: RunData, loss: _Loss) -> Iterator[Finding]:
    """Sharpness far above the threshold is a fault only where the loss rises with it."""
    steps, values = _merged(data.scalars, "sharpness/stability_ratio", "sharpness/stability_ratio_unconverged")
    for start, stop in _stretches(values > _FAR_ABOVE, 3):
        until = float(steps[stop]) if stop < len(steps) else math.inf
        rise = loss.rise(float(steps[start]), until)
        broken = loss.is_broken and loss.broken_at is not None and loss.broken_at <= until
        if rise or broken:
            ratio = float(np.median(values[start:stop]))
            rose = "the loss is no longer finite" if broken and not rise else f"the loss rose by {rise:.3g}"
            yield Finding(
                "sharpness/unstable",
                "fault",
                int(steps[start]),
                f"The stability ratio was {ratio:.3g} in the median of {stop - start} readings in a row, far above 1, "
                f"while {rose}: steps are larger than the curvature allows.",
                "Lower the learning rate (divide it by the ratio as a first guess) or lengthen the warm-up. A ratio "
                "around 1 is normal; a loss that is not smooth need not obey it.",
                numbers={"stability_ratio": ratio, "readings": stop - start, "rise": rise},
                tags=("sharpness/stability_ratio", *loss.tags),
            )
            return


def _nonfinite_gradients(data: RunData, loss: _Loss) -> Iterator[Finding]:
    series = data.scalars.get("gradient/nonfinite")
    if series is None:
        return
    bad = ~(series.values == 0)
    if not bad.any():
        return
    (begin, stop), *_ = [*_stretches(bad, 3), *_stretches(bad, 1)]
    lasting = stop - begin >= 3 or (stop == len(bad) and loss.is_broken)
    step, layers = int(series.steps[begin]), _layers_without_norm(data, int(series.steps[begin]))
    where = "" if not layers else f", in {_several(layers)}"
    yield Finding(
        "gradient/nonfinite",
        "fault" if lasting else "note",
        step,
        f"The gradient held {series.values[begin]:.0f} values that are NaN or infinite at step {step}{where}; "
        f"{int(bad.sum())} of {len(bad)} readings had some.",
        "Lower the learning rate, clip gradients, look at that step's batch; under fp16 use bf16 or a smaller scale."
        if lasting
        else "A reading or two are harmless under fp16, whose scaler leaves such steps out. Without it, look at the "
        "batch of that step.",
        layers,
        {"values": float(series.values[begin]), "readings": float(bad.sum())},
        ("gradient/nonfinite", "gradient/l2"),
    )


def _layers_without_norm(data: RunData, step: int) -> tuple[str, ...]:
    """Layers whose gradient has no finite norm at a step, but has one at another."""
    table = data.tables.get("gradient/l2")
    if table is None:
        return ()
    row = np.flatnonzero(table.steps == step)
    if not len(row):  # a row is written where one layer at least has a norm
        return table.layers or ()
    finite = np.isfinite(table.values)
    hit = ~finite[row[0]] & (finite.any(0) | np.isinf(table.values[row[0]]))
    return tuple(name for name, is_hit in zip(table.layers or (), hit, strict=True) if is_hit)


def _growing_gradients(data: RunData, loss: _Loss) -> Iterator[Finding]:
    hits = []
    for name, steps, values in _columns(data, "gradient/l2"):
        steps, values = steps[values > 0], values[values > 0]
        found = _jump(np.log(values))
        if found is not None:
            at, times = found
            hits.append((int(steps[at]), -times, name))
    if not hits:
        return
    step, times = min(hit[0] for hit in hits), max(-hit[1] for hit in hits)
    layers = tuple(name for _, _, name in sorted(hits, key=lambda hit: hit[1]))
    until = data.tables["gradient/l2"].steps
    end = float(until[min(int(np.searchsorted(until, step)) + 2 * _PAST, len(until) - 1)])
    rises = bool(len(loss)) and bool(loss.rise(step, end))
    yield Finding(
        "gradient/growth",
        "warning" if rises or loss.is_broken else "note",
        step,
        f"The gradient of {_several(layers)} grew {times:.3g} times within {_IN_A_ROW} readings and stayed there"
        + (", and the loss rose." if rises else ", while the loss did not rise." if len(loss) else "."),
        "Look at what changed at that step: schedule, data, a layer that was thawed. Clipping by norm, a longer "
        "warm-up or a lower rate for the layer help where the loss rises with it.",
        layers,
        {"times": times},
        ("gradient/l2",),
    )


def _jump(logs: Array) -> tuple[int, float] | None:
    """Where a series of logarithms first leaves its past upwards for good, and by which factor."""
    if len(logs) < _PAST + _IN_A_ROW:
        return None
    windows = np.lib.stride_tricks.sliding_window_view(logs, _PAST + _IN_A_ROW)
    past, now = np.sort(windows[:, :_PAST], axis=1), np.sort(windows[:, _PAST:], axis=1)
    middle = (past[:, (_PAST - 1) // 2] + past[:, _PAST // 2]) / 2
    spread = 1.4826 * np.median(np.abs(past - middle[:, None]), axis=1)
    rise = now[:, _IN_A_ROW // 2] - middle
    limit = np.maximum(math.log(_JUMP), _NOISES * np.maximum(spread, _noise(logs)))
    hit = (rise > limit) & (now[:, 0] > past[:, -2])  # of the past one reading may have been as high
    if not hit.any():
        return None
    first = int(np.argmax(hit))
    return first + _PAST, float(np.exp(rise[first]))


def _stopped_layers(data: RunData, loss: _Loss) -> Iterator[Finding]:
    table = data.tables.get("update/ratio")
    if table is None:
        return
    others = _row_median(table.values)
    dead = {name for name, _ in _dead_columns(data)}
    hits = []
    for index, name in enumerate(table.layers or ()):
        column = table.values[:, index]
        known = np.isfinite(column) & (others > 100 * _STILL)
        still = column[known] < _STILL
        start = _to_the_end(still)
        if len(still) - start >= _IN_A_ROW and (~still[:start]).sum() >= 3 and name not in dead:
            hits.append((int(table.steps[known][start]), name, float(np.median(column[known][:start]))))
    if hits:
        hits.sort(key=lambda hit: hit[0])
        layers = tuple(name for _, name, _ in hits)
        yield Finding(
            "update/stopped",
            "warning",
            hits[0][0],
            f"{_several(layers)} stopped moving: its update went from {hits[0][2]:.2g} of the weight to below "
            f"{_STILL:g}, while the median layer went on with {np.nanmedian(others[-_IN_A_ROW:]):.2g}.",
            "If you did not freeze it: look at its learning rate and ratio, at whether weights in half precision "
            "swallow small updates, and at its gradient.",
            layers,
            {"before": hits[0][2], "others": float(np.nanmedian(others[-_IN_A_ROW:]))},
            ("update/ratio",),
        )


def _dead_gradients(data: RunData, loss: _Loss) -> Iterator[Finding]:
    hits = sorted(((step, name) for name, step in _dead_columns(data)), key=lambda hit: hit[0])
    if hits:
        layers = tuple(name for _, name in hits)
        since = "since the first reading" if hits[0][0] == _first_step(data, "gradient/l2") else "ever since"
        yield Finding(
            "gradient/dead",
            "warning",
            hits[0][0],
            f"The gradient of {_several(layers)} is zero at step {hits[0][0]} and {since}, while others have one.",
            "Nothing flows back to it: look for dead ReLUs (too large a step, a bad bias), a detached or unused "
            "branch, saturated outputs. A smaller rate and a fresh initialisation of the layer bring ReLUs back.",
            layers,
            {"layers": len(layers)},
            ("gradient/l2", "update/ratio"),
        )


def _dead_columns(data: RunData) -> Iterator[tuple[str, int]]:
    """Layers whose gradient is zero for long and to the end, and since when."""
    table = data.tables.get("gradient/l2")
    if table is None:
        return
    # Not the median of all: half of the layers may be dead.
    others = np.array([np.median(alive) if len(alive) else 0.0 for alive in (r[r > 0] for r in _finite(table.values))])
    for index, name in enumerate(table.layers or ()):
        column = table.values[:, index]
        known = np.isfinite(column) & (others > 0)
        zero = column[known] <= _NOTHING * others[known]
        start = _to_the_end(zero)
        if len(zero) - start >= _DEAD_FOR:
            yield name, int(table.steps[known][start])


def _exploding_weights(data: RunData, loss: _Loss) -> Iterator[Finding]:
    """Ten times within ten readings, or a hundred times in all; layers that begin at zero are measured by the rest."""
    table = data.tables.get("weight/operator")
    if table is None or len(table) < 2 * _IN_A_ROW:
        return
    usual = float(np.median(_finite(table.values)[:3][table.values[:3] > 0])) if (table.values[:3] > 0).any() else 0.0
    hits = []
    for name, steps, values in _columns(data, "weight/operator"):
        if len(values) < 2 * _IN_A_ROW:
            continue
        level = _running_median(values, 3)
        base = max(float(level[2]), usual)
        before = np.maximum(np.concatenate([np.full(10, level[2]), level])[: len(level)], base)
        hit = (level > _JUMP * before) | (level > _JUMP**2 * base)
        start = _to_the_end(hit | (level > _JUMP * base) & (np.cumsum(hit) > 0))
        if base > 0 and len(level) - start >= 3:
            hits.append((int(steps[start]), float(level[-1] / base), name))
    if hits:
        step, times = min(hit[0] for hit in hits), max(hit[1] for hit in hits)
        layers = tuple(name for _, _, name in sorted(hits, key=lambda hit: -hit[1]))
        yield Finding(
            "weight/exploding",
            "warning",
            step,
            f"The operator norm of {_several(layers)} grew up to {times:.3g} times its usual size.",
            "Lower its learning rate, add weight decay or clip gradients; where it feeds attention or a "
            "softmax, normalising what goes in helps.",
            layers,
            {"times": times},
            ("weight/operator", "spectrum/sigma_max"),
        )


def _collapsed_ranks(data: RunData, loss: _Loss) -> Iterator[Finding]:
    """Both ranks must agree: a head soon has one strong direction, how frequent each class is, above a healthy rest.

    Without an effective rank, which is taken now and then only, the stable rank must say that nothing else is left.
    """
    effective = {name: values for name, _, values in _columns(data, "spectrum/effective_rank")}
    hits = []
    for name, steps, values in _columns(data, "spectrum/stable_rank"):
        start = _to_the_end(values < (1.1 if name in effective else 1.01))
        fell = len(values) - start >= 3 and start >= 2 and float(np.median(values[: min(3, start)])) >= 2.0
        if fell and (name not in effective or effective[name][-1] < 2.0):
            hits.append((int(steps[start]), name, float(np.median(values[: min(3, start)])), float(values[-1])))
    if hits:
        hits.sort(key=lambda hit: hit[0])
        layers = tuple(name for _, name, _, _ in hits)
        yield Finding(
            "spectrum/collapse",
            "warning",
            hits[0][0],
            f"The stable rank of {_several(layers)} fell from {hits[0][2]:.3g} to {hits[0][3]:.3g}: the weight is "
            "close to a single direction.",
            "Lower the rate of the layer or its weight decay, and look whether what goes into it has collapsed too.",
            layers,
            {"before": hits[0][2], "last": hits[0][3]},
            ("spectrum/stable_rank", "spectrum/effective_rank"),
        )


def _steering_at_bounds(data: RunData, loss: _Loss) -> Iterator[Finding]:
    bounded, table = data.scalars.get("lr/bounded"), data.tables.get("lr/ratio")
    if bounded is None or table is None or not len(bounded):
        return
    layers = len(table.layers or ())
    most = bounded.values >= max(layers / 2, 1)
    start = _to_the_end(most)
    if len(most) - start < max(_DEAD_FOR, len(most) / 4):
        return
    count, low = float(np.median(bounded.values[start:])), float(np.nanmin(table.values))
    last = table.values[-1]
    at_bound = [i for i in range(layers) if last[i] <= low * 1.001 or last[i] >= float(np.nanmax(table.values)) > 1]
    yield Finding(
        "lr/bounded",
        "warning",
        int(bounded.steps[start]),
        f"Steering holds {count:.0f} of {layers} layers at a bound of the rule, for {len(most) - start} readings.",
        "Its wish is larger than the bounds allow: lower the base rate, or raise alpha for milder ratios, before "
        "you widen the bounds.",
        tuple((table.layers or ())[i] for i in at_bound),
        {"layers": count, "ratio": low},
        ("lr/bounded", "lr/ratio"),
    )


def _failed_measurements(data: RunData, loss: _Loss) -> Iterator[Finding]:
    series = data.scalars.get("dynamon/failures")
    if series is not None and len(series) and series.values.max() > 0:
        first, count = int(np.argmax(series.values > 0)), float(series.values.max())
        yield Finding(
            "dynamon/failures",
            "warning",
            int(series.steps[first]),
            f"{count:.0f} measurements of dynamon failed; training was not touched.",
            "The log of the run says why, once a cause; strict=True raises there. After three in a row a measurement "
            "pauses.",
            numbers={"failures": count},
            tags=("dynamon/failures",),
        )


def _missing_readings(data: RunData, loss: _Loss) -> Iterator[Finding]:
    """What the budget did not carry. Only where its neighbours were measured: who did not ask for it misses nothing."""
    scalars, overhead = data.scalars, data.scalars.get("dynamon/overhead")
    raise_it = "Raise budget, set every_n_steps, or measure fewer quantities; a run of some hundred steps needs more."
    if not any(tag.startswith(("gradient/", "weight/", "sharpness/", "noise/", "lr/ratio")) for tag in scalars):
        yield Finding(
            "dynamon/nothing",
            "note",
            max(data.last_step, 0),
            "This run holds no readings of dynamon.",
            "Add DynamicsMonitor() from dynamon.callbacks to the Trainer's callbacks.",
        )
        return
    converged = sum(len(scalars.get(f"sharpness/{name}", ())) for name in _EIGENVALUES)
    unsolved = sum(len(scalars.get(f"sharpness/{name}_unconverged", ())) for name in _EIGENVALUES)
    along = any(f"sharpness/{name}" in scalars for name in ("directional", "critical", "critical_multiple"))
    everything = "gradient/norm" in scalars and "weight/operator" in data.tables
    if overhead is not None and not converged and not unsolved and (along or everything):
        share = float(overhead.values[-1])
        yield Finding(
            "dynamon/no_sharpness",
            "note",
            max(data.last_step, 0),
            f"There is no eigenvalue of the curvature in this run; monitoring took {share:.2%} of training time.",
            "Where a monitor was to measure it, its budget did not reach. " + raise_it,
            numbers={"overhead": share},
            tags=("dynamon/overhead",),
        )
    if unsolved >= 4 and unsolved > converged:
        yield Finding(
            "sharpness/unconverged",
            "note",
            max(data.last_step, 0),
            f"{unsolved} of {converged + unsolved} eigenvalue solves did not converge: their values are lower bounds.",
            "Raise max_matvecs or tol of SharpnessMonitor.",
            numbers={"unconverged": unsolved, "converged": converged},
            tags=("sharpness/stability_ratio_unconverged",),
        )


RULES: tuple[Callable[[RunData, _Loss], Iterator[Finding]], ...] = (
    _broken_loss,
    _diverging,
    _unstable,
    _nonfinite_gradients,
    _growing_gradients,
    _stopped_layers,
    _dead_gradients,
    _exploding_weights,
    _collapsed_ranks,
    _steering_at_bounds,
    _failed_measurements,
    _missing_readings,
)


def _columns(data: RunData, quantity: str) -> Iterator[tuple[str, Array, Array]]:
    """Name, steps and finite values of each layer that has any; every so many-th of a very long run, and the last."""
    table = data.tables.get(quantity)
    if table is not None:
        for name, column in zip(table.layers or (), table.values.T, strict=True):
            finite = np.isfinite(column)
            if finite.any():
                kept = np.flatnonzero(finite)
                kept = kept[:: -(len(kept) // _ENOUGH + 1)][::-1]
                yield name, table.steps[kept], column[kept]


def _first_step(data: RunData, quantity: str) -> int:
    return int(data.tables[quantity].steps[0])


def _merged(scalars: Mapping[str, Series], *tags: str) -> tuple[Array, Array]:
    """Steps and values of several tags as one series."""
    series = [scalars[tag] for tag in tags if tag in scalars]
    if not series:
        return np.zeros(0), np.zeros(0)
    steps, values = (np.concatenate([getattr(one, name) for one in series]) for name in ("steps", "values"))
    order = np.argsort(steps, kind="stable")
    return steps[order], values[order]


def _stretches(mask: Array, least: int) -> list[tuple[int, int]]:
    """Where a condition holds at least so many times in a row: ``(start, stop)``."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    pairs = zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
    return [(start, stop) for start, stop in pairs if stop - start >= least]


def _to_the_end(mask: Array) -> int:
    """Where the stretch begins that lasts to the end; the length where the last reading is not in one."""
    broken = np.flatnonzero(~mask)
    return int(broken[-1]) + 1 if len(broken) else 0


def _running_median(values: Array, width: int) -> Array:
    """The median of the last ``width`` values at each, of as many as there are at the beginning."""
    if not len(values):
        return values
    padded = np.concatenate([np.full(width - 1, np.nan), values])
    windows = np.lib.stride_tricks.sliding_window_view(padded, width)
    full = np.median(windows, axis=1)
    for index in range(min(width - 1, len(values))):
        full[index] = np.median(values[: index + 1])
    return full


def _noise(values: Array) -> float:
    """Standard deviation of one reading, from what changes within a few: trends do not enter, nor do a few jumps."""
    if len(values) < 2:
        return 0.0
    changes = values[_IN_A_ROW:] - values[:-_IN_A_ROW] if len(values) > 3 * _IN_A_ROW else np.diff(values)
    return float(1.4826 / math.sqrt(2) * np.median(np.abs(changes - np.median(changes))))


def _row_median(values: Array) -> Array:
    return np.array([np.median(row[np.isfinite(row)]) if np.isfinite(row).any() else np.nan for row in values])


def _finite(values: Array) -> Array:
    return np.where(np.isfinite(values), values, 0.0)


def _several(layers: tuple[str, ...]) -> str:
    return layers[0] if len(layers) == 1 else f"{layers[0]} and {len(layers) - 1} more layers"
