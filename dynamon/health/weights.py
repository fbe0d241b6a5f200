"""Weights that stop, explode, or lose their rank."""

from collections.abc import Iterator

import numpy as np

from dynamon.health.finding import Finding, several
from dynamon.health.gradients import dead_columns
from dynamon.health.loss import Loss
from dynamon.health.series import IN_A_ROW, JUMP, columns, finite_or_zero, row_median, running_median, to_the_end
from dynamon.history import RunData

_MOVING = 100  # times as much is no rounding: the bias before a BatchNorm has that
_STILL = 1e-8  # update over weight that float32 does not resolve


def stopped_layers(data: RunData, loss: Loss) -> Iterator[Finding]:
    """A layer that moved, and does not any more, while others do."""
    table = data.tables.get("update/ratio")
    if table is None:
        return
    others = row_median(table.values)
    dead = {name for name, _ in dead_columns(data)}
    hits = []
    for index, name in enumerate(table.layers or ()):
        column = table.values[:, index]
        known = np.isfinite(column) & (others > 100 * _STILL)
        still = column[known] < _STILL
        start = to_the_end(still)
        before = float(np.median(column[known][:start])) if start else 0.0
        if len(still) - start >= IN_A_ROW and start >= 3 and before > _MOVING * _STILL and name not in dead:
            hits.append((int(table.steps[known][start]), name, before))
    if hits:
        hits.sort(key=lambda hit: hit[0])
        layers = tuple(name for _, name, _ in hits)
        yield Finding(
            "update/stopped",
            "warning",
            hits[0][0],
            f"{several(layers)} stopped moving: its update went from {hits[0][2]:.2g} of the weight to below "
            f"{_STILL:g}, while the median layer went on with {np.nanmedian(others[-IN_A_ROW:]):.2g}.",
            "If you did not freeze it: look at its learning rate and ratio, at whether weights in half precision "
            "swallow small updates, and at its gradient.",
            layers,
            {"before": hits[0][2], "others": float(np.nanmedian(others[-IN_A_ROW:]))},
            ("update/ratio",),
        )


def exploding_weights(data: RunData, loss: Loss) -> Iterator[Finding]:
    """Ten times within ten readings, or a hundred times in all; layers that begin at zero are measured by the rest."""
    table = data.tables.get("weight/operator")
    if table is None or len(table) < 2 * IN_A_ROW:
        return
    usual = (
        float(np.median(finite_or_zero(table.values)[:3][table.values[:3] > 0]))
        if (table.values[:3] > 0).any()
        else 0.0
    )
    hits = []
    for name, steps, values in columns(data, "weight/operator"):
        if len(values) < 2 * IN_A_ROW:
            continue
        level = running_median(values, 3)
        base = max(float(level[2]), usual)
        before = np.maximum(np.concatenate([np.full(10, level[2]), level])[: len(level)], base)
        hit = (level > JUMP * before) | (level > JUMP**2 * base)
        start = to_the_end(hit | (level > JUMP * base) & (np.cumsum(hit) > 0))
        if base > 0 and len(level) - start >= 3:
            hits.append((int(steps[start]), float(level[-1] / base), name))
    if hits:
        step, times = min(hit[0] for hit in hits), max(hit[1] for hit in hits)
        layers = tuple(name for _, _, name in sorted(hits, key=lambda hit: -hit[1]))
        yield Finding(
            "weight/exploding",
            "warning",
            step,
            f"The operator norm of {several(layers)} grew up to {times:.3g} times its usual size.",
            "Lower its learning rate, add weight decay or clip gradients; where it feeds attention or a "
            "softmax, normalising what goes in helps.",
            layers,
            {"times": times},
            ("weight/operator", "spectrum/sigma_max"),
        )


def collapsed_ranks(data: RunData, loss: Loss) -> Iterator[Finding]:
    """Both ranks must agree: a head soon has one strong direction, how frequent each class is, above a healthy rest.

    Without an effective rank, which is taken now and then only, the stable rank must say that nothing else is left.
    """
    effective = {name: values for name, _, values in columns(data, "spectrum/effective_rank")}
    hits = []
    for name, steps, values in columns(data, "spectrum/stable_rank"):
        start = to_the_end(values < (1.1 if name in effective else 1.01))
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
            f"The stable rank of {several(layers)} fell from {hits[0][2]:.3g} to {hits[0][3]:.3g}: the weight is "
            "close to a single direction.",
            "Lower the rate of the layer or its weight decay, and look whether what goes into it has collapsed too.",
            layers,
            {"before": hits[0][2], "last": hits[0][3]},
            ("spectrum/stable_rank", "spectrum/effective_rank"),
        )
