"""Rules on gradients that are not finite, grow, vanish, are absent, or are clipped away."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynamon.health.finding import Finding, name_layers
from dynamon.health.limits import (
    CONSECUTIVE,
    DEAD_GRADIENT,
    FEW,
    GRADIENT_GROWTH,
    HARD_CLIPPING,
    JUMP,
    LONG,
    NOISE_SIGMAS,
    PAST,
    SETTLING,
)
from dynamon.health.loss import Loss
from dynamon.health.series import (
    all_zero,
    column_at,
    final_stretch,
    find_stretches,
    finite_or_zero,
    first_step,
    layer_columns,
    noise_level,
    row_median,
    scalar_at,
)
from dynamon.runs.history import RunData, Series


def nonfinite_gradients(data: RunData, loss: Loss) -> Iterator[Finding]:
    """Find NaN and infinity in the gradient: a fault if it lasts, at most a note if it has passed."""
    series = data.scalars.get("gradient/nonfinite")
    if series is None:
        return
    bad = ~(series.values == 0)
    if not bad.any():
        return
    end = final_stretch(bad)
    settles = end == 0 and len(bad) <= SETTLING and not loss.is_broken  # a scaler finds its scale in the first steps
    lasts = end < len(bad) and (len(bad) - end >= CONSECUTIVE or loss.is_broken) and not settles
    often = len(bad) > SETTLING and bad.sum() > len(bad) / 4
    begin = end if lasts else int(np.argmax(bad))
    step = int(series.steps[begin])
    layers = _layers_without_norm(data, step)
    where = "" if not layers else f", in {name_layers(layers)}"
    passed = "" if bad[-1] else f", the last one at step {int(series.steps[np.flatnonzero(bad)[-1]])}"
    yield Finding(
        "gradient/nonfinite",
        "fault" if lasts else "warning" if often else "note",
        step,
        f"The gradient held {series.values[begin]:.0f} values that are NaN or infinite at step {step}{where}; "
        f"{int(bad.sum())} of {len(bad)} readings had some{passed}.",
        "Lower the learning rate, clip gradients, look at that step's batch; under fp16 use bf16 or a smaller scale."
        if lasts or often
        else "A few readings are harmless under fp16, whose scaler leaves such steps out until its scale has settled. "
        "Without a scaler, look at the batches of those steps.",
        layers,
        {"values": float(series.values[begin]), "readings": float(bad.sum())},
        ("gradient/nonfinite", "gradient/l2"),
    )


def no_gradients(data: RunData, loss: Loss) -> Iterator[Finding]:
    """Find gradients that are all exactly zero to the end."""
    norms = data.scalars.get("gradient/norm")
    table = data.tables.get("gradient/l2")
    if norms is not None:
        steps, zero = norms.steps, norms.values == 0
    elif table is not None:
        steps, zero = all_zero(table)
    else:
        return
    start = final_stretch(zero)
    count = len(zero) - start
    if count < (LONG if start else FEW):
        return
    step = int(steps[start])
    is_learned = loss.tags and bool((scalar_at(data, loss.tags[0], steps[start:]) == 0).all()) and start > 0
    yield Finding(
        "gradient/none",
        loss.severity("warning") if is_learned else "fault",
        step,
        f"No gradient has reached any trained weight since step {step}: all are exactly zero in {count} readings"
        + (", and so is the loss." if is_learned else "."),
        "Nothing is left to learn from this loss."
        if is_learned
        else "Look for a loss that is cut off from the weights (detach, no_grad, an argmax, a mask of zeros), for "
        "factors that are zero together (both matrices of a LoRA pair, a gate at zero), for dead ReLUs or saturated "
        "outputs before everything, and under fp16 for gradients that underflow.",
        (),
        {"readings": count},
        ("gradient/norm", "gradient/l2"),
    )


def unused_layers(data: RunData, loss: Loss) -> Iterator[Finding]:
    """Find layers in an optimizer, not frozen, that get no gradient while others do."""
    table, steps_taken = data.tables.get("gradient/l2"), data.tables.get("update/operator")
    if table is None or steps_taken is None:
        return
    has_any = np.isfinite(table.values).any(1)
    hits = []
    for index, name in enumerate(table.layers or ()):
        absent = np.isnan(table.values[has_any, index])
        steps = table.steps[has_any]
        start = final_stretch(absent)
        count = len(absent) - start
        if count < (LONG if start else CONSECUTIVE):
            continue
        taken = column_at(data, "update/operator", name, steps_taken.steps)[steps_taken.steps >= steps[start]]
        if len(taken) and (taken == 0).all():  # NaN where it is frozen
            hits.append((int(steps[start]), name))
    if hits:
        hits.sort(key=lambda hit: hit[0])
        layers = tuple(name for _, name in hits)
        yield Finding(
            "gradient/unused",
            "note",
            hits[0][0],
            f"{name_layers(layers)} has had no gradient at any measured step since {hits[0][0]}, although an optimizer "
            "holds it and it is not frozen: the loss of these steps does not depend on it.",
            "Where a branch is not used on purpose, leave it out of the optimizer or set requires_grad_(False). Where "
            "branches take turns, choose an interval of measurements that does not always meet the same one.",
            layers,
            {"layers": len(layers)},
            ("gradient/l2", "update/operator"),
        )


def hard_clipping(data: RunData, loss: Loss) -> Iterator[Finding]:
    """Find clipping that leaves almost nothing of every step, or from some step on much less than before."""
    share = data.scalars.get("gradient/clip_coefficient")
    if share is None or not len(share):
        return
    start = final_stretch((share.values < HARD_CLIPPING) & (share.values > 0))
    lasts = len(share) - start >= LONG
    begin = start if lasts else _tightened(data, share)
    if begin is None:
        return
    left, step = float(np.median(share.values[begin:])), int(share.steps[begin])
    before = float(np.median(share.values[:begin])) if begin else math.nan
    yield Finding(
        "gradient/clipping",
        "note" if lasts else "warning",
        step,
        f"Clipping leaves {left:.2g} of the gradient, in the median of the {len(share) - begin} readings from step "
        f"{step} on" + (f"; before it left {before:.2g}." if begin else "."),
        "Then clipping sets the size of every step, and the gradient only its direction. If that is not intended, "
        "average the loss instead of summing it, raise the limit, or look for what makes gradients so large."
        if lasts
        else "Gradients did not grow as much: look at what has changed the limit.",
        numbers={"coefficient": left, "before": before},
        tags=("gradient/clip_coefficient", "gradient/norm"),
    )


def _tightened(data: RunData, share: Series) -> int | None:
    """Return from which reading on clipping leaves a tenth of what it left before, although gradients did not grow."""
    if len(share) < LONG + CONSECUTIVE:
        return None
    windows = np.lib.stride_tricks.sliding_window_view(share.values, LONG + CONSECUTIVE)
    past, now = windows[:, :LONG], windows[:, LONG:]
    for index in np.flatnonzero((now.max(1) > 0) & (past.min(1) > JUMP * now.max(1))):
        norms = scalar_at(data, "gradient/norm", share.steps[index : index + LONG + CONSECUTIVE])
        if np.median(norms[LONG:]) < GRADIENT_GROWTH * np.median(norms[:LONG]):
            return int(index) + LONG
    return None


def _layers_without_norm(data: RunData, step: int) -> tuple[str, ...]:
    """List the layers whose gradient has no finite norm at a step, but has one at another."""
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
    """Find steps of which clipping left nothing: a fault at three consecutive readings."""
    before, after = data.scalars.get("gradient/norm"), data.scalars.get("gradient/norm_clipped")
    if before is None or after is None:
        return
    steps, own, other = np.intersect1d(before.steps, after.steps, return_indices=True)
    norms = before.values[own]
    gone = np.isfinite(norms) & (norms > 0) & (after.values[other] == 0)
    if not gone.any():
        return
    (begin, _), *_ = [*find_stretches(gone, FEW), *find_stretches(gone, 1)]
    step, norm = int(steps[begin]), float(norms[begin])
    yield Finding(
        "gradient/vanished",
        "fault" if find_stretches(gone, FEW) else "warning",
        step,
        f"Clipping left nothing of the gradient at step {step}: its norm was {norm:.3g} before and 0 after, and so it "
        f"was at {int(gone.sum())} of {len(gone)} readings. Such a step moves nothing but momentum and decay.",
        "Clipping by norm divides by a norm that float32 holds up to 1.8e19 and fp16 up to 65504; beyond, it divides "
        "by infinity. Divide the loss, or look at what made it so large.",
        numbers={"norm": norm, "readings": float(gone.sum())},
        tags=("gradient/norm", "gradient/norm_clipped"),
    )


def growing_gradients(data: RunData, loss: Loss) -> Iterator[Finding]:
    """Find layers whose gradient is ten times as large as in the past, and beyond its noise."""
    hits = []
    for name, steps, values in layer_columns(data, "gradient/l2"):
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
    end = float(until[min(int(np.searchsorted(until, step)) + 2 * PAST, len(until) - 1)])
    rises = bool(len(loss)) and bool(loss.rise(step, end))
    yield Finding(
        "gradient/growth",
        "warning" if rises or loss.is_broken else "note",
        step,
        f"The gradient of {name_layers(layers)} grew {times:.3g} times within {CONSECUTIVE} readings and stayed there"
        + (", and the loss rose." if rises else ", while the loss did not rise." if len(loss) else "."),
        "Look at what changed at that step: schedule, data, a layer that was thawed. Clipping by norm, a longer "
        "warm-up or a lower rate for the layer help where the loss rises with it.",
        layers,
        {"times": times},
        ("gradient/l2",),
    )


def faded_gradients(data: RunData, loss: Loss) -> Iterator[Finding]:
    """Find layers whose gradient fell to a tenth of its past beside the median layer's, beyond noise, and stayed."""
    table = data.tables.get("gradient/l2")
    if table is None or len(table.layers or ()) < FEW:
        return
    dead, hits = {name for name, _ in dead_columns(data)}, []
    for name, steps, shares in shares_of_median(table):
        found = None if name in dead else _jump(shares)
        if found is not None and _lasts(shares, found[0]):
            hits.append((int(steps[found[0]]), -found[1], name))
    if hits:
        step, times, _ = min(hits)
        layers = tuple(name for _, _, name in sorted(hits))
        yield Finding(
            "gradient/faded",
            "warning",
            step,
            f"The gradient of {name_layers(layers)} fell to {1 / -times:.2g} of what it was beside those of other "
            f"layers, within {CONSECUTIVE} readings from step {step} on, and has stayed there.",
            "Little flows back to it: look for units that have died or saturated (a large bias, gates that shut), a "
            "factor near zero, a branch that is hardly used any more.",
            layers,
            {"times": -times},
            ("gradient/l2",),
        )


def shares_of_median(table: Series) -> Iterator[tuple[str, NDArray[Any], NDArray[Any]]]:
    """Yield of each layer its name, and by step the logarithm of the median layer's gradient over its own."""
    others = row_median(np.where(table.values > 0, table.values, np.nan))
    for name, column in zip(table.layers or (), table.values.T, strict=True):
        known = (column > 0) & (others > 0) & np.isfinite(column)
        yield name, table.steps[known], np.log(others[known] / column[known])


def _lasts(shares: NDArray[Any], begin: int) -> bool:
    """Return whether what left its past has not come half of the way back."""
    before, then = np.median(shares[max(begin - PAST, 0) : begin]), np.median(shares[begin : begin + CONSECUTIVE])
    return bool(np.median(shares[-CONSECUTIVE:]) > (before + then) / 2)


def rises(logs: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return how far a series of logarithms is above its past at each window of readings, and where it left it."""
    windows = np.lib.stride_tricks.sliding_window_view(logs, PAST + CONSECUTIVE)
    past, now = np.sort(windows[:, :PAST], axis=1), np.sort(windows[:, PAST:], axis=1)
    middle = (past[:, (PAST - 1) // 2] + past[:, PAST // 2]) / 2
    spread = 1.4826 * np.median(np.abs(past - middle[:, None]), axis=1)
    rise = now[:, CONSECUTIVE // 2] - middle
    limit = np.maximum(math.log(JUMP), NOISE_SIGMAS * np.maximum(spread, noise_level(logs)))
    return rise, (rise > limit) & (now[:, 0] > past[:, -2])  # of the past one reading may have been as high


def _jump(logs: NDArray[Any]) -> tuple[int, float] | None:
    """Find where a series of logarithms first leaves its past upwards for good, and by which factor."""
    if len(logs) < PAST + CONSECUTIVE:
        return None
    rise, hit = rises(logs)
    if not hit.any():
        return None
    first = int(np.argmax(hit))
    return first + PAST, float(np.exp(rise[first]))


def dead_gradients(data: RunData, loss: Loss) -> Iterator[Finding]:
    """Find layers whose gradient is zero to the end while others have one."""
    dead = dict(dead_columns(data))
    table = data.tables.get("gradient/l2")
    alive = set() if table is None else set(table.layers or ()) - dead.keys()
    hits = sorted(((s, name) for name, s in dead.items() if not _cancels(name, alive)), key=lambda hit: hit[0])
    if hits:
        layers = tuple(name for _, name in hits)
        since = "since the first reading" if hits[0][0] == first_step(data, "gradient/l2") else "ever since"
        yield Finding(
            "gradient/dead",
            "warning",
            hits[0][0],
            f"The gradient of {name_layers(layers)} is zero at step {hits[0][0]} and {since}, while others have one.",
            "Nothing flows back to it: look for dead ReLUs (too large a step, a bad bias), a detached or unused "
            "branch, saturated outputs. A smaller rate and a fresh initialisation of the layer bring ReLUs back.",
            layers,
            {"layers": len(layers)},
            ("gradient/l2", "update/ratio"),
        )


def _cancels(name: str, alive: set[str]) -> bool:
    """Return whether a name is that of the bias of a weight with a gradient.

    A bias receives the sum over samples of the gradient at its module's output. That is zero if the loss does not
    change when all outputs are shifted alike: comparisons of pairs, critics, contrastive losses. Nothing is wrong then.
    """
    return name.endswith("bias") and f"{name.removesuffix('bias')}weight" in alive


def dead_columns(data: RunData) -> Iterator[tuple[str, int]]:
    """Yield the layers whose gradient is zero for long and to the end, and since when."""
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
        zero = column[known] <= DEAD_GRADIENT * others[known]
        start = final_stretch(zero)
        if len(zero) - start >= LONG:
            yield name, int(table.steps[known][start])
