"""Rules on what was changed in mid-run: learning rates, the limit of clipping, weights, sizes of steps."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynamon.health.finding import Finding, name_layers
from dynamon.health.gradients import hard_clipping
from dynamon.health.limits import (
    CLEAR_SIGMAS,
    CONSECUTIVE,
    FEW,
    GRADIENT_GROWTH,
    JUMP,
    LONG,
    PAST,
    RATE_JUMP,
    STEP_JUMP,
)
from dynamon.health.loss import Loss
from dynamon.health.rates import rate_series
from dynamon.health.rule import Rule
from dynamon.health.series import noise_level, row_median, scalar_at
from dynamon.runs.history import RunData

_SAME_RATE = 1.01  # rates that do not rise
_SEEN_RATE = 1.5  # times the largest rate of all readings: a schedule's peaks lie between readings too
_LEAST_CHANGE = 0.05  # of a norm: iterations that measure it are less exact than small steps are large
_SAME_LIMIT = 1e-2  # relative difference of norms that one limit has cut off, half precision included


def jumping_rates(data: RunData, loss: Loss) -> Iterator[Finding]:
    """Find learning rates that rise at once, more than twofold and beyond all before: the three largest jumps."""
    found = rate_jumps(data)
    for step, times in sorted(sorted(found, key=lambda jump: -jump[1])[:FEW]):
        rises = _rises_after(data, loss, step)
        yield Finding(
            "lr/jump",
            "warning" if rises else "note",
            step,
            f"The learning rate rose {times:.3g} times at step {step}, beyond every rate before"
            + (", and the loss rose." if rises else "."),
            "If the schedule does that, nothing is wrong. Else look at what sets the rate: a scheduler that began anew "
            "after a resume, or that is stepped per epoch and per batch, a factor for the number of processes that "
            "counts twice.",
            numbers={"times": times},
            tags=("lr/rise", "weight/effective_rate"),
        )


def rate_jumps(data: RunData) -> list[tuple[int, float]]:
    """List steps and factors: of single steps as the sentinel recorded them, and between readings where it did not.

    Between readings the rate must have been at rest before, or falling: a warm-up rises from reading to reading.
    """
    known = data.scalars.get("lr/rise")
    found = dict(zip(known.steps.tolist(), known.values.tolist(), strict=True)) if known is not None else {}
    exact = np.array(sorted(found))
    for steps, rates in rate_series(data):
        if len(steps) <= FEW:
            continue
        before, now = rates[FEW - 1 : -1], rates[FEW:]
        largest = np.fmax.accumulate(rates, axis=0)[FEW - 1 : -1]
        hit = (now >= RATE_JUMP * before) & (before > 0) & (now > _SEEN_RATE * largest)
        for back in range(1, FEW):
            hit &= rates[FEW - back : -back] <= _SAME_RATE * rates[FEW - 1 - back : -1 - back]
        for row in np.flatnonzero(hit.any(1)):
            begin, end = int(steps[row + FEW - 1]), int(steps[row + FEW])
            if not ((exact > begin) & (exact <= end)).any():
                times = float((now[row] / np.where(hit[row], before[row], np.inf)).max())
                found[end] = max(found.get(end, 0.0), times)
    return list(found.items())


def changed_limits(data: RunData, loss: Loss) -> Iterator[Finding]:
    """Find a limit of clipping that is lower than norms which were left as they were before, or the other way round.

    Clipping by norm cuts to one number, so that norms after it show the limit itself.
    """
    before, after = data.scalars.get("gradient/norm"), data.scalars.get("gradient/norm_clipped")
    if before is None or after is None or any(hard_clipping(data, loss)):  # which says more
        return
    steps, own, other = np.intersect1d(before.steps, after.steps, return_indices=True)
    norms, left = before.values[own], after.values[other]
    known = np.isfinite(norms) & np.isfinite(left) & (left > 0)
    steps, norms, left = steps[known], norms[known], left[known]
    is_cut = left < (1 - _SAME_LIMIT) * norms
    if is_cut.sum() < FEW:
        return
    limit = float(np.median(left[is_cut][-FEW:]))
    above = np.flatnonzero(left > (1 + _SAME_LIMIT) * limit)
    at_limit = is_cut & (np.abs(left - limit) <= _SAME_LIMIT * limit)
    if len(above) < FEW or not at_limit[is_cut][-FEW:].all():
        return
    since = at_limit[above[-1] + 1 :]  # from here on nothing is above it
    if since.sum() < FEW:
        return
    begin = int(above[-1]) + 1 + int(np.argmax(since))
    cut = is_cut[:begin][-LONG:]
    step, past = int(steps[begin]), float(np.median(left[above][-LONG:]))
    yield Finding(
        "gradient/limit",
        "note",
        step,
        f"Gradients have been clipped to {limit:.3g} since step {step}, at {int(since.sum())} of {len(since)} "
        f"readings; before, norms of {past:.3g} were "
        + ("left as they were." if not cut.any() else "left after clipping."),
        "If a schedule of the limit does that, nothing is wrong. Else look at what sets it: another configuration "
        "after a resume, a callback, gradient_clip_val.",
        numbers={"limit": limit, "before": past},
        tags=("gradient/norm_clipped", "gradient/norm"),
    )


def changed_weights(data: RunData, loss: Loss) -> Iterator[Finding]:
    """Find weights whose norm moved ten times as far from one reading to the next as all steps between could move it.

    A norm changes by the norm of a step at most. Steps that were not measured are taken to be as large as the largest
    that was.
    """
    hits = [hit for hit in weight_moves(data) if hit[0] > JUMP]
    if not hits:
        return
    step = min(hit[1] for hit in hits)
    hits = sorted(hit for hit in hits if hit[1] == step)[::-1]
    times, _, _, begin, end = hits[0]
    layers = tuple(hit[2] for hit in hits)
    rises = _rises_after(data, loss, step)
    yield Finding(
        "weight/changed",
        "warning" if rises else "note",
        step,
        f"The norm of {name_layers(layers)} went from {begin:.3g} to {end:.3g} by step {step}, {times:.3g} times as "
        f"far as the optimizer's steps since the reading before can move it{', and the loss rose' * rises}.",
        "Something else wrote to it: a checkpoint that was loaded, an initialisation, pruning, an operation in place. "
        "If that is meant, nothing is wrong.",
        layers,
        {"times": times, "before": begin, "after": end},
        ("weight/operator", "update/operator"),
    )


def weight_moves(data: RunData) -> Iterator[tuple[float, int, str, float, float]]:
    """Yield of each layer the first largest change of its norm, in parts of what steps can move it.

    With the step of the reading after it, the layer, and its norms before and after. Layers with fewer than three
    steps that moved them are left out, and those that no optimizer steps.
    """
    sizes, moves = data.tables.get("weight/operator"), data.tables.get("update/operator")
    if sizes is None or moves is None or sizes.layers != moves.layers or not np.array_equal(sizes.steps, moves.steps):
        return
    for name, norms, updates in zip(sizes.layers or (), sizes.values.T, moves.values.T, strict=True):
        known = np.isfinite(norms) & np.isfinite(updates)
        steps, norms, updates = sizes.steps[known], norms[known], updates[known]
        if len(steps) < 2 * FEW or (updates > 0).sum() < FEW:
            continue
        reach = np.diff(steps) * np.fmax.accumulate(updates)[1:]
        changes = np.abs(np.diff(norms))
        is_large = (changes > _LEAST_CHANGE * np.maximum(norms[1:], norms[:-1])) & (reach > 0)
        times = np.divide(changes, reach, out=np.zeros(len(reach)), where=is_large)
        times[: FEW - 1] = 0.0  # the largest step is not known yet
        over = np.flatnonzero(times > JUMP)
        at = int(over[0]) if len(over) else int(np.argmax(times))
        yield float(times[at]), int(steps[at + 1]), name, float(norms[at]), float(norms[at + 1])


def jumping_updates(data: RunData, loss: Loss) -> Iterator[Finding]:
    """Find steps that grow threefold in all layers at once, although neither rate nor gradient did."""
    steps, logs, rates = update_levels(data)
    if len(steps) < LONG + CONSECUTIVE:
        return
    middle = row_median(logs)
    changes, stays = _changes(logs)
    changes -= np.maximum(_changes(rates)[0], 0.0)  # a rate that falls explains no larger step
    least = np.quantile(changes, 0.1, axis=1)
    for row in np.flatnonzero(stays & (least > math.log(STEP_JUMP))):
        step = int(steps[row + LONG])
        norms = scalar_at(data, "gradient/norm", steps[row : row + LONG + CONSECUTIVE])
        growth = np.median(norms[LONG:]) / np.median(norms[:LONG])
        times = float(np.exp(np.median(changes[row])))
        if growth * GRADIENT_GROWTH > times or least[row] < CLEAR_SIGMAS * noise_level(middle[: row + LONG]):
            continue
        yield Finding(
            "update/jump",
            "warning" if _rises_after(data, loss, step) else "note",
            step,
            f"From step {step} on the steps of all layers are {times:.3g} times as large as before, beyond what the "
            f"learning rate did; the gradient is {growth:.3g} times as large.",
            "Look at what the optimizer does beside the rate of its groups: a factor of its own, an estimate of the "
            "step size, betas or moments that were changed or lost in a resume.",
            numbers={"times": times, "gradient": float(growth)},
            tags=("update/ratio", "weight/effective_rate"),
        )
        return


def _changes(logs: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Compare five readings with the ten before: medians by layer, and whether the median layer stays above."""
    windows = np.lib.stride_tricks.sliding_window_view(logs, LONG + CONSECUTIVE, axis=0)
    past, now = windows[..., :LONG], windows[..., LONG:]
    change = np.median(now, axis=-1) - np.median(past, axis=-1)
    return change, np.median(now, axis=1).min(-1) > np.median(past, axis=1).max(-1)


def update_levels(data: RunData) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return steps ``[T]``, and by layer the logarithms of update over weight and of the rate, ``[T, L]``."""
    ratios, rates = data.tables.get("update/ratio"), data.tables.get("weight/effective_rate")
    sizes = data.tables.get("weight/frobenius")
    nothing = np.zeros(0), np.zeros((0, 0)), np.zeros((0, 0))
    if ratios is None or rates is None or sizes is None:
        return nothing
    if not ratios.values.shape == rates.values.shape == sizes.values.shape:
        return nothing
    with np.errstate(divide="ignore", invalid="ignore"):
        logs, rate_logs = np.log(ratios.values), np.log(rates.values * np.square(sizes.values))
    whole = (np.isfinite(logs) & np.isfinite(rate_logs)).all(0)
    return (ratios.steps, logs[:, whole], rate_logs[:, whole]) if whole.any() else nothing


def _rises_after(data: RunData, loss: Loss, step: int) -> bool:
    """Return whether the loss rose within some readings from a step on, or is lost."""
    if loss.is_broken or not len(loss):
        return loss.is_broken
    last = min(int(np.searchsorted(loss.steps, step)) + 2 * PAST, len(loss) - 1)
    return bool(loss.rise(step, float(loss.steps[last])))


def _seen_rates(data: RunData, known: Loss) -> str | None:
    rates = [rate for _, rates in rate_series(data) for rate in rates[np.isfinite(rates)].tolist()]
    return f"{len(rate_jumps(data))} jumps; largest rate {max(rates):.3g}" if rates else None


def _seen_limit(data: RunData, known: Loss) -> str | None:
    series = data.scalars.get("gradient/norm_clipped")
    norms = np.zeros(0) if series is None else series.values[np.isfinite(series.values)]
    return f"at most {norms.max():.3g} after clipping" if len(norms) else None


def _seen_weights(data: RunData, known: Loss) -> str | None:
    found = list(weight_moves(data))
    return f"at most {max(found)[0]:.2g} of what steps can move, {max(found)[2]}" if found else None


def _seen_updates(data: RunData, known: Loss) -> str | None:
    steps, logs, _ = update_levels(data)
    if not len(steps):
        return None
    middle = np.exp(row_median(logs))
    return f"median layer's update over weight {middle.min():.3g} to {middle.max():.3g}"


RULES = (
    Rule(
        jumping_rates,
        _seen_rates,
        "learning rates do not jump",
        f"{RATE_JUMP:g} times within a step, or between readings after {FEW} at rest, beyond all before",
        "lr/rise, weight/effective_rate, lr/base or a logged learning rate",
        names=("lr/jump",),
    ),
    Rule(
        jumping_updates,
        _seen_updates,
        "steps of all layers do not jump beside their rate",
        f"{STEP_JUMP:g} times the past at {CONSECUTIVE} readings, and {GRADIENT_GROWTH:g} times what the gradient grew",
        f"update/ratio and weight/effective_rate with {LONG + CONSECUTIVE} readings",
        names=("update/jump",),
    ),
    Rule(
        changed_weights,
        _seen_weights,
        "weights move by steps of the optimizer only",
        f"{JUMP:g} times as far as steps can move the norm",
        f"weight/operator and update/operator with {2 * FEW} readings",
        names=("weight/changed",),
    ),
    Rule(
        changed_limits,
        _seen_limit,
        "clipping keeps its limit",
        f"{FEW} readings cut to one norm, and {FEW} above it before",
        "gradient/norm and gradient/norm_clipped",
        names=("gradient/limit",),
    ),
)
