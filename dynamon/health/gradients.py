"""Gradients that are not finite, grow, or vanish."""

import math
from collections.abc import Iterator

import numpy as np

from dynamon.arrays import Array
from dynamon.health.finding import Finding, several
from dynamon.health.loss import Loss
from dynamon.health.series import (
    IN_A_ROW,
    JUMP,
    LONG,
    columns,
    finite_or_zero,
    first_step,
    noise_of,
    stretches,
    to_the_end,
)
from dynamon.history import RunData

_PAST = 20  # readings that a jump is compared with
_NOISES = 6.0  # standard deviations of a reading
_NOTHING = 1e-12  # share of the median layer's gradient; rounding where a gradient is zero in theory leaves 1e-9


def nonfinite_gradients(data: RunData, loss: Loss) -> Iterator[Finding]:
    """NaN and infinity in the gradient: a fault where three readings in a row have some."""
    series = data.scalars.get("gradient/nonfinite")
    if series is None:
        return
    bad = ~(series.values == 0)
    if not bad.any():
        return
    (begin, stop), *_ = [*stretches(bad, 3), *stretches(bad, 1)]
    lasting = stop - begin >= 3 or (stop == len(bad) and loss.is_broken)
    step, layers = int(series.steps[begin]), _layers_without_norm(data, int(series.steps[begin]))
    where = "" if not layers else f", in {several(layers)}"
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


def vanished_by_clipping(data: RunData, loss: Loss) -> Iterator[Finding]:
    """Steps of which clipping left nothing: a fault where that is so at three readings in a row."""
    before, after = data.scalars.get("gradient/norm"), data.scalars.get("gradient/norm_clipped")
    if before is None or after is None:
        return
    steps, own, other = np.intersect1d(before.steps, after.steps, return_indices=True)
    norms = before.values[own]
    gone = np.isfinite(norms) & (norms > 0) & (after.values[other] == 0)
    if not gone.any():
        return
    (begin, _), *_ = [*stretches(gone, 3), *stretches(gone, 1)]
    step, norm = int(steps[begin]), float(norms[begin])
    yield Finding(
        "gradient/vanished",
        "fault" if stretches(gone, 3) else "warning",
        step,
        f"Clipping left nothing of the gradient at step {step}: its norm was {norm:.3g} before and 0 after, and so it "
        f"was at {int(gone.sum())} of {len(gone)} readings. Such a step moves nothing but momentum and decay.",
        "Clipping by norm divides by a norm that float32 holds up to 1.8e19 and fp16 up to 65504; beyond, it divides "
        "by infinity. Divide the loss, or look at what made it so large.",
        numbers={"norm": norm, "readings": float(gone.sum())},
        tags=("gradient/norm", "gradient/norm_clipped"),
    )


def growing_gradients(data: RunData, loss: Loss) -> Iterator[Finding]:
    """A layer's gradient ten times as large as its past, and beyond its noise."""
    hits = []
    for name, steps, values in columns(data, "gradient/l2"):
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
        f"The gradient of {several(layers)} grew {times:.3g} times within {IN_A_ROW} readings and stayed there"
        + (", and the loss rose." if rises else ", while the loss did not rise." if len(loss) else "."),
        "Look at what changed at that step: schedule, data, a layer that was thawed. Clipping by norm, a longer "
        "warm-up or a lower rate for the layer help where the loss rises with it.",
        layers,
        {"times": times},
        ("gradient/l2",),
    )


def _jump(logs: Array) -> tuple[int, float] | None:
    """Where a series of logarithms first leaves its past upwards for good, and by which factor."""
    if len(logs) < _PAST + IN_A_ROW:
        return None
    windows = np.lib.stride_tricks.sliding_window_view(logs, _PAST + IN_A_ROW)
    past, now = np.sort(windows[:, :_PAST], axis=1), np.sort(windows[:, _PAST:], axis=1)
    middle = (past[:, (_PAST - 1) // 2] + past[:, _PAST // 2]) / 2
    spread = 1.4826 * np.median(np.abs(past - middle[:, None]), axis=1)
    rise = now[:, IN_A_ROW // 2] - middle
    limit = np.maximum(math.log(JUMP), _NOISES * np.maximum(spread, noise_of(logs)))
    hit = (rise > limit) & (now[:, 0] > past[:, -2])  # of the past one reading may have been as high
    if not hit.any():
        return None
    first = int(np.argmax(hit))
    return first + _PAST, float(np.exp(rise[first]))


def dead_gradients(data: RunData, loss: Loss) -> Iterator[Finding]:
    """A layer whose gradient is zero to the end while others have one."""
    hits = sorted(((step, name) for name, step in dead_columns(data)), key=lambda hit: hit[0])
    if hits:
        layers = tuple(name for _, name in hits)
        since = "since the first reading" if hits[0][0] == first_step(data, "gradient/l2") else "ever since"
        yield Finding(
            "gradient/dead",
            "warning",
            hits[0][0],
            f"The gradient of {several(layers)} is zero at step {hits[0][0]} and {since}, while others have one.",
            "Nothing flows back to it: look for dead ReLUs (too large a step, a bad bias), a detached or unused "
            "branch, saturated outputs. A smaller rate and a fresh initialisation of the layer bring ReLUs back.",
            layers,
            {"layers": len(layers)},
            ("gradient/l2", "update/ratio"),
        )


def dead_columns(data: RunData) -> Iterator[tuple[str, int]]:
    """Layers whose gradient is zero for long and to the end, and since when."""
    table = data.tables.get("gradient/l2")
    if table is None:
        return
    # Not the median of all: half of the layers may be dead.
    others = np.array(
        [np.median(alive) if len(alive) else 0.0 for alive in (r[r > 0] for r in finite_or_zero(table.values))]
    )
    for index, name in enumerate(table.layers or ()):
        column = table.values[:, index]
        known = np.isfinite(column) & (others > 0)
        zero = column[known] <= _NOTHING * others[known]
        start = to_the_end(zero)
        if len(zero) - start >= LONG:
            yield name, int(table.steps[known][start])
