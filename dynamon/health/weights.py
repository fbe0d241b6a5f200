"""Rules on weights that do not move, stop, move too far, explode, or lose their rank."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynamon.health.finding import Finding, name_layers
from dynamon.health.gradients import dead_columns
from dynamon.health.limits import (
    CONSECUTIVE,
    FEW,
    JUMP,
    LARGE_UPDATE,
    LONG,
    MOVED_TIMES,
    ROUNDING_GRADIENT,
    SINGLE_DIRECTION,
    STILL_UPDATE,
    WIDE_SIDE,
)
from dynamon.health.loss import Loss
from dynamon.health.precision import losing_layers
from dynamon.health.rates import is_turned_off, rate_is_zero
from dynamon.health.series import (
    all_zero,
    column_at,
    final_stretch,
    finite_or_zero,
    layer_columns,
    median_at,
    row_median,
    running_median,
    scalar_at,
)
from dynamon.runs.history import RunData


def no_updates(data: RunData, loss: Loss) -> Iterator[Finding]:
    """Find updates that are all exactly zero to the end: a note if rates are zero, a fault if gradients arrive."""
    table = data.tables.get("update/operator")
    if table is None:
        return
    steps, zero = all_zero(table)
    start = final_stretch(zero)
    count = len(zero) - start
    if count < (LONG if start else FEW):
        return
    step, since = int(steps[start]), steps[start:]
    if rate_is_zero(data, since):
        if count >= CONSECUTIVE:
            yield Finding(
                "lr/zero",
                "note",
                step,
                f"The learning rate is 0 in all {count} readings from step {step} on, so no weight moves.",
                "If a schedule has ended or not begun, that is intended; else check the scheduler.",
                numbers={"readings": count},
                tags=("update/operator", "weight/effective_rate"),
            )
        return
    nothing_came = scalar_at(data, "gradient/norm", since) == 0
    clipped_away = scalar_at(data, "gradient/norm_clipped", since) == 0
    skipped = scalar_at(data, "gradient/nonfinite", since) > 0
    still = {name for name, column in zip(table.layers or (), table.values.T, strict=True) if np.isfinite(column).any()}
    if (nothing_came | clipped_away | skipped).all() or still <= losing_layers(data):
        return  # reported by the rules on gradients and on precision
    yield Finding(
        "update/none",
        "fault",
        step,
        f"No weight has moved since step {step}: every update is exactly zero in {count} readings.",
        "Check that the optimizer holds the parameters of this model (and not of a replaced one) and that its step "
        "is called; check the learning rate, and whether updates are below the resolution of half precision.",
        numbers={"readings": count},
        tags=("update/operator", "update/ratio"),
    )


def stopped_layers(data: RunData, loss: Loss) -> Iterator[Finding]:
    """Find layers that do not move, or no longer do, while others do.

    Frozen layers, which have no update, are not included, nor those without a gradient or with a rate or ratio of 0.
    """
    table = data.tables.get("update/ratio")
    if table is None:
        return
    others = row_median(table.values)
    dead = {name for name, _ in dead_columns(data)} | losing_layers(data)  # reported by rules of their own
    hits, never = [], []
    for index, name in enumerate(table.layers or ()):
        column = table.values[:, index]
        known = np.isfinite(column) & (others > 100 * STILL_UPDATE) & ~is_turned_off(data, name, table.steps)
        if "gradient/l2" in data.tables:
            known &= ~np.isnan(column_at(data, "gradient/l2", name, table.steps))
        still = column[known] < STILL_UPDATE
        start = final_stretch(still)
        if name in dead or len(still) - start < CONSECUTIVE:
            continue
        before = float(np.median(column[known][:start])) if start else 0.0
        if start >= FEW and before > MOVED_TIMES * STILL_UPDATE:
            hits.append((int(table.steps[known][start]), name, before))
        elif not start and len(still) >= LONG and known[-1] and (column[known] == 0).all():
            gradient = column_at(data, "gradient/l2", name, table.steps)[known]
            # Less is rounding, as in the bias before a BatchNorm, and so is what it would move.
            never += [name] * bool(
                (gradient > ROUNDING_GRADIENT * median_at(data, "gradient/l2", table.steps)[known]).all()
            )
    usual = float(np.nanmedian(others[-CONSECUTIVE:])) if hits or never else 0.0
    if hits:
        hits.sort(key=lambda hit: hit[0])
        layers = tuple(name for _, name, _ in hits)
        yield Finding(
            "update/stopped",
            "warning",
            hits[0][0],
            f"{name_layers(layers)} stopped moving: its update went from {hits[0][2]:.2g} of the weight to below "
            f"{STILL_UPDATE:g}, while the median layer went on with {usual:.2g}.",
            "Look at its learning rate and ratio, at whether weights in half precision swallow small updates, and at "
            "its gradient.",
            layers,
            {"before": hits[0][2], "others": usual},
            ("update/ratio",),
        )
    if never:
        yield Finding(
            "update/never",
            "warning",
            int(table.steps[0]),
            f"{name_layers(tuple(never))} has not moved at all since the first reading, although it has a gradient; "
            f"the median layer moves by {usual:.2g} of its weight.",
            "Weights in half precision swallow updates below half a unit in their last place: keep them in float32, or "
            "raise the rate. Otherwise look whether the optimizer steps it.",
            tuple(never),
            {"layers": len(never), "others": usual},
            ("update/ratio", "gradient/l2"),
        )


def large_updates(data: RunData, loss: Loss) -> Iterator[Finding]:
    """Find a median layer that changes by half of its weight or more per step, for long and to the end."""
    table = data.tables.get("update/ratio")
    if table is None or not len(table):
        return
    middle = row_median(table.values)
    start = final_stretch(middle > LARGE_UPDATE)
    if len(middle) - start < LONG:
        return
    level, step = float(np.median(middle[start:])), int(table.steps[start])
    yield Finding(
        "update/large",
        "warning",
        step,
        f"A step changes the median layer by {level:.2g} of its weight, in {len(middle) - start} readings from step "
        f"{step} on: next to nothing of a weight outlives a few steps.",
        "Lower the learning rate: ratios of about 0.001 are usual.",
        numbers={"ratio": level},
        tags=("update/ratio",),
    )


def norm_levels(data: RunData) -> Iterator[tuple[str, NDArray[Any], NDArray[Any], float]]:
    """Yield name, steps and smoothed operator norm of each layer, and its usual size: its first, or that of others."""
    table = data.tables.get("weight/operator")
    if table is None or len(table) < 2 * CONSECUTIVE:
        return
    early = finite_or_zero(table.values)[:3]
    usual = float(np.median(early[early > 0])) if (early > 0).any() else 0.0
    for name, steps, values in layer_columns(data, "weight/operator"):
        if len(values) < 2 * CONSECUTIVE:
            continue
        level = running_median(values, 3)
        base = max(float(level[2]), usual)
        if base > 0:
            yield name, steps, level, base


def exploding_weights(data: RunData, loss: Loss) -> Iterator[Finding]:
    """Find norms that grow 10 times within ten readings, or 100 times overall; those from zero against the others."""
    hits = []
    for name, steps, level, base in norm_levels(data):
        before = np.maximum(np.concatenate([np.full(10, level[2]), level])[: len(level)], base)
        hit = (level > JUMP * before) | (level > JUMP**2 * base)
        start = final_stretch(hit | (level > JUMP * base) & (np.cumsum(hit) > 0))
        if len(level) - start >= 3:
            hits.append((int(steps[start]), float(level[-1] / base), name))
    if hits:
        step, times = min(hit[0] for hit in hits), max(hit[1] for hit in hits)
        layers = tuple(name for _, _, name in sorted(hits, key=lambda hit: -hit[1]))
        yield Finding(
            "weight/exploding",
            "warning",
            step,
            f"The operator norm of {name_layers(layers)} grew up to {times:.3g} times its usual size.",
            "Lower its learning rate, add weight decay or clip gradients; where it feeds attention or a "
            "softmax, normalising what goes in helps.",
            layers,
            {"times": times},
            ("weight/operator", "spectrum/sigma_max"),
        )


def collapsed_ranks(data: RunData, loss: Loss) -> Iterator[Finding]:
    """Find weights close to a single direction, by both ranks.

    Both must agree, since a head soon has one strong direction, the class frequencies, above a healthy rest. Without an
    effective rank, which is measured rarely, the stable rank must show that nothing else is left. A weight that has
    always had one direction is reported only if the matrix has room for more.
    """
    effective = {name: values for name, _, values in layer_columns(data, "spectrum/effective_rank")}
    sides = _smaller_sides(data)
    hits = []
    for name, steps, values in layer_columns(data, "spectrum/stable_rank"):
        start = final_stretch(values < (1.1 if name in effective else SINGLE_DIRECTION))
        if len(values) - start < FEW or name in effective and effective[name][-1] >= 2.0:
            continue
        before = float(np.median(values[: min(3, start)])) if start else np.nan
        was_born = not start and bool((values < SINGLE_DIRECTION).all()) and sides.get(name, 0.0) >= WIDE_SIDE
        if was_born or start >= 2 and before >= 2.0:
            hits.append((int(steps[start]), name, before, float(values[-1])))
    if hits:
        hits.sort(key=lambda hit: hit[0])
        layers = tuple(name for _, name, _, _ in hits)
        _, _, before, last = hits[0]
        story = f"fell from {before:.3g} to {last:.3g}" if np.isfinite(before) else f"is {last:.3g} since the start"
        yield Finding(
            "spectrum/collapse",
            "warning",
            hits[0][0],
            f"The stable rank of {name_layers(layers)} {story}: the weight is close to a single direction.",
            "Lower the rate of the layer or its weight decay, and look whether what goes into it has collapsed too."
            if np.isfinite(before)
            else "Look at its initialisation: rows or columns that are all alike stay alike.",
            layers,
            {"before": before, "last": last},
            ("spectrum/stable_rank", "spectrum/effective_rank"),
        )


def _smaller_sides(data: RunData) -> dict[str, float]:
    """Return the smaller side of each matrix, from its size and the aspect that its norms imply, without window.

    For a convolution with a window of k entries it is that of the flattening, up to a factor of k.
    """
    found = {}
    for name, steps, deviation in layer_columns(data, "spectrum/log2_spectral_condition"):
        sigma = column_at(data, "spectrum/sigma_max", name, steps[-1:])[0]
        length = column_at(data, "weight/frobenius", name, steps[-1:])[0]
        rms = column_at(data, "weight/rms", name, steps[-1:])[0]
        if sigma > 0 and rms > 0:
            aspect, size = (2.0 ** deviation[-1] / sigma) ** 2, (length / rms) ** 2
            found[name] = float(np.sqrt(size * min(aspect, 1 / aspect)))
    return found
