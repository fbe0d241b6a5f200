"""Describe what the rules look at: the words and the limit of each, and the value that it sees in a run."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynamon.health import (
    activations,
    attention,
    batches,
    changes,
    gradients,
    limits,
    loss,
    monitoring,
    precision,
    shifts,
    spikes,
    weights,
)
from dynamon.health.loss import Loss
from dynamon.health.rule import Rule
from dynamon.health.series import (
    all_zero,
    layer_columns,
    merge_scalars,
    row_median,
    running_median,
)
from dynamon.runs.history import RunData

_LASTING = f"at {limits.LONG} readings to the end"


def _finite_loss(data: RunData, known: Loss) -> str | None:
    values = known.every_value
    return f"{_share(~np.isfinite(values))} not finite" if len(values) else None


def _level(data: RunData, known: Loss) -> str | None:
    if len(known) < 2 * limits.CONSECUTIVE:
        return None
    return f"from {known.level[0]:.4g} to {known.level[-1]:.4g}, lowest {known.level.min():.4g} (running median)"


def _different(data: RunData, known: Loss) -> str | None:
    values = known.every_value
    return f"{len(np.unique(values))} different values in {len(values)} readings" if len(values) else None


def _ratio(data: RunData, known: Loss) -> str | None:
    _, values = merge_scalars(data.scalars, "sharpness/stability_ratio", "sharpness/stability_ratio_unconverged")
    values = values[np.isfinite(values)]
    return (
        f"median {np.median(values):.3g}, highest {values.max():.3g}, {len(values)} readings" if len(values) else None
    )


def _nonfinite(data: RunData, known: Loss) -> str | None:
    series = data.scalars.get("gradient/nonfinite")
    return None if series is None else f"{_share(~(series.values == 0))} with values that are not finite"


def _any_gradient(data: RunData, known: Loss) -> str | None:
    norms, table = data.scalars.get("gradient/norm"), data.tables.get("gradient/l2")
    if norms is not None:
        return f"{_share(norms.values == 0)} zero; median norm {_middle(norms.values)}"
    return None if table is None else f"{_share(all_zero(table)[1])} zero"


def _left_by_clipping(data: RunData, known: Loss) -> str | None:
    before, after = data.scalars.get("gradient/norm"), data.scalars.get("gradient/norm_clipped")
    if before is None or after is None:
        return None
    _, own, other = np.intersect1d(before.steps, after.steps, return_indices=True)
    gone = (before.values[own] > 0) & (after.values[other] == 0)
    return f"{_share(gone)} with nothing left" if len(gone) else None


def _alike(data: RunData, known: Loss) -> str | None:
    series = data.scalars.get("gradient/cosine")
    return None if series is None or not len(series) else f"median {_middle(series.values)}"


def _growth(data: RunData, known: Loss) -> str | None:
    found = []
    for name, _, values in layer_columns(data, "gradient/l2"):
        logs = np.log(values[values > 0])
        if len(logs) >= limits.PAST + limits.CONSECUTIVE:
            found.append((float(np.exp(gradients.rises(logs)[0].max())), name))
    return f"at most {max(found)[0]:.3g} times, {max(found)[1]}" if found else None


def _fall(data: RunData, known: Loss) -> str | None:
    table = data.tables.get("gradient/l2")
    if table is None or len(table.layers or ()) < limits.FEW:
        return None
    found = []
    for name, _, shares in gradients.shares_of_median(table):
        if len(shares) >= limits.PAST + limits.CONSECUTIVE:
            found.append((float(np.exp(gradients.rises(shares)[0].max())), name))
    return f"at most {max(found)[0]:.3g} times smaller, {max(found)[1]}" if found else None


def _clipping(data: RunData, known: Loss) -> str | None:
    series = data.scalars.get("gradient/clip_coefficient")
    return None if series is None or not len(series) else f"clipping leaves {_middle(series.values)} in the median"


def _spikes(data: RunData, known: Loss) -> str | None:
    largest = data.scalars.get("spike/deviation")
    if largest is None or not len(largest):
        return None
    return f"{len(list(spikes.find_spikes(data)))} spikes; at most {largest.values.max():.3g} deviations"


def _shifts(data: RunData, known: Loss) -> str | None:
    losses = data.scalars.get("spike/loss")
    return None if losses is None or not len(losses) else f"{len(list(shifts.find_shifts(data)))} shifts"


def _any_update(data: RunData, known: Loss) -> str | None:
    table = data.tables.get("update/operator")
    return None if table is None else f"{_share(all_zero(table)[1])} zero"


def _slowest(data: RunData, known: Loss) -> str | None:
    columns = layer_columns(data, "update/ratio")
    found = [(float(np.median(values[-limits.CONSECUTIVE :])), name) for name, _, values in columns]
    return f"least {min(found)[0]:.3g} of its weight at the end, {min(found)[1]}" if found else None


def _most_lost(data: RunData, known: Loss) -> str | None:
    return _most(data, "precision/update_lost")


def _lost_decay(data: RunData, known: Loss) -> str | None:
    return _most(data, "precision/decay_lost")


def _most(data: RunData, quantity: str) -> str | None:
    columns = layer_columns(data, quantity)
    found = [(float(np.median(values[-limits.CONSECUTIVE :])), name) for name, _, values in columns]
    return f"at most {max(found)[0]:.0%} lost at the end, {max(found)[1]}" if found else None


def _update_size(data: RunData, known: Loss) -> str | None:
    table = data.tables.get("update/ratio")
    middle = row_median(table.values) if table is not None and len(table) else np.zeros(0)
    middle = middle[np.isfinite(middle)]
    return f"median layer {np.median(middle):.3g}, at most {middle.max():.3g} of its weight" if len(middle) else None


def _dead(data: RunData, known: Loss) -> str | None:
    table = data.tables.get("gradient/l2")
    return None if table is None else f"{len(dict(gradients.dead_columns(data)))} of {_layers(table.layers)} are zero"


def _without_gradient(data: RunData, known: Loss) -> str | None:
    table = data.tables.get("gradient/l2")
    if table is None or "update/operator" not in data.tables or not np.isfinite(table.values).any():
        return None
    last = table.values[np.isfinite(table.values).any(1)][-1]
    return f"{int(np.isnan(last).sum())} of {_layers(table.layers)} without one at the last reading"


def _norm_growth(data: RunData, known: Loss) -> str | None:
    found = [(float(level.max() / base), name) for name, _, level, base in weights.norm_levels(data)]
    return f"at most {max(found)[0]:.3g} times its usual size, {max(found)[1]}" if found else None


def _rank(data: RunData, known: Loss) -> str | None:
    columns = layer_columns(data, "spectrum/stable_rank")
    found = [(float(running_median(values, limits.FEW)[-1]), name) for name, _, values in columns]
    return f"lowest stable rank {min(found)[0]:.3g}, {min(found)[1]}" if found else None


def _bounded(data: RunData, known: Loss) -> str | None:
    series, table = data.scalars.get("lr/bounded"), data.tables.get("lr/ratio")
    if series is None or table is None or not len(series):
        return None
    return f"at most {series.values.max():.0f} of {_layers(table.layers)} at a bound"


def _failures(data: RunData, known: Loss) -> str | None:
    series = data.scalars.get("dynamon/failures")
    return None if series is None or not len(series) else f"{series.values.max():.0f} failed"


def _solved(data: RunData, known: Loss) -> str | None:
    overhead, (converged, unsolved) = data.scalars.get("dynamon/overhead"), monitoring.solves(data)
    if overhead is None or not len(overhead):
        return None
    share = f"monitoring took {overhead.values[-1]:.2%} of training time"
    return f"{converged} of {converged + unsolved} eigenvalue solves converged; {share}"


def _share(mask: NDArray[Any]) -> str:
    return f"{int(mask.sum())} of {len(mask)} readings"


def _middle(values: NDArray[Any]) -> str:
    finite = values[np.isfinite(values)]
    return f"{np.median(finite):.3g}" if len(finite) else "not finite"


def _layers(names: tuple[str, ...] | None) -> str:
    count = len(names or ())
    return f"{count} layer{'s' * (count != 1)}"


RULES: tuple[Rule, ...] = (
    Rule(
        loss.broken_loss,
        _finite_loss,
        "loss is finite",
        "not finite at the last reading",
        "a training loss",
        names=("loss/nonfinite",),
    ),
    Rule(
        loss.diverging,
        _level,
        "loss does not rise again",
        "half of what was gained is lost, beyond noise",
        f"a training loss with {2 * limits.CONSECUTIVE} readings",
        names=("loss/rising",),
    ),
    Rule(
        loss.constant_loss,
        _different,
        "loss changes",
        f"the same number {_LASTING}",
        "a training loss",
        names=("loss/constant",),
    ),
    Rule(
        loss.unstable,
        _ratio,
        "steps fit the curvature: stability ratio",
        f"above {limits.FAR_ABOVE:g} at 3 consecutive readings while the loss rises",
        "sharpness/stability_ratio",
        names=("sharpness/unstable",),
    ),
    Rule(
        gradients.nonfinite_gradients,
        _nonfinite,
        "gradients are finite",
        "any; a fault if it lasts",
        "gradient/nonfinite",
        names=("gradient/nonfinite",),
    ),
    Rule(
        gradients.no_gradients,
        _any_gradient,
        "gradients reach the weights",
        f"all zero {_LASTING}",
        "gradient/norm or gradient/l2",
        names=("gradient/none",),
    ),
    Rule(
        gradients.vanished_by_clipping,
        _left_by_clipping,
        "clipping leaves a gradient",
        "any; a fault at 3 consecutive readings",
        "gradient/norm and gradient/norm_clipped",
        names=("gradient/vanished",),
    ),
    Rule(
        spikes.spikes,
        _spikes,
        "no step is far above its usual level",
        f"{limits.SPIKE:g} robust deviations at a single step",
        "spike/deviation, which the sentinel of DynamicsMonitor writes",
        names=("spike/deviation", "spike/many"),
    ),
    Rule(
        shifts.shifts,
        _shifts,
        "the loss of single steps does not stay above its level",
        f"deviations that sum up to {limits.LOSS_SHIFT:g} over some steps",
        "spike/loss, likewise",
        names=("spike/shift",),
    ),
    Rule(
        batches.repeated_batches,
        _alike,
        "batches differ: cosine of successive gradients",
        f"{limits.ALIKE_GRADIENTS:g} at {limits.CONSECUTIVE} readings, after at most {limits.UNLIKE_GRADIENTS:g}",
        f"gradient/cosine with {limits.LONG + limits.CONSECUTIVE} readings",
        names=("gradient/repeated",),
    ),
    Rule(
        gradients.growing_gradients,
        _growth,
        "gradients of single layers do not jump",
        f"{limits.JUMP:g} times the past within {limits.CONSECUTIVE} readings, beyond noise",
        f"gradient/l2 with {limits.PAST + limits.CONSECUTIVE} readings",
        names=("gradient/growth",),
    ),
    Rule(
        gradients.faded_gradients,
        _fall,
        "gradients of single layers do not fade",
        f"{limits.JUMP:g} times smaller beside others within {limits.CONSECUTIVE} readings, beyond noise",
        f"gradient/l2 with {limits.PAST + limits.CONSECUTIVE} readings and {limits.FEW} layers",
        names=("gradient/faded",),
    ),
    Rule(
        gradients.hard_clipping,
        _clipping,
        "clipping leaves part of the gradient",
        f"below {limits.HARD_CLIPPING:g} {_LASTING}, or a {limits.JUMP:g}th of what it was",
        "gradient/clip_coefficient",
        names=("gradient/clipping",),
    ),
    Rule(
        weights.no_updates,
        _any_update,
        "weights move",
        f"all updates zero {_LASTING}",
        "update/operator",
        names=("update/none", "lr/zero"),
    ),
    Rule(
        weights.stopped_layers,
        _slowest,
        "every layer moves: update over weight",
        f"below {limits.STILL_UPDATE:g} at {limits.CONSECUTIVE} readings to the end, while others move",
        "update/ratio",
        names=("update/stopped", "update/never"),
    ),
    Rule(
        precision.swallowed_updates,
        _most_lost,
        "weights hold their updates",
        f"{limits.MOST_LOST:.0%} lost at {limits.FEW} readings from the first on, in half precision {_LASTING}",
        "precision/update_lost",
        names=("precision/swallowed",),
    ),
    Rule(
        precision.lost_decay,
        _lost_decay,
        "half precision leaves weight decay",
        f"{limits.MOST_LOST:.0%} lost in half of the layers at {limits.CONSECUTIVE} readings",
        "precision/decay_lost",
        names=("precision/decay",),
    ),
    Rule(
        weights.large_updates,
        _update_size,
        "steps are small against weights",
        f"above {limits.LARGE_UPDATE:g} {_LASTING}",
        "update/ratio",
        names=("update/large",),
    ),
    Rule(
        gradients.dead_gradients,
        _dead,
        "every layer has a gradient that is not zero",
        f"zero {_LASTING}, while others are not",
        "gradient/l2",
        names=("gradient/dead",),
    ),
    Rule(
        gradients.unused_layers,
        _without_gradient,
        "every layer in an optimizer gets a gradient",
        f"none at {limits.CONSECUTIVE} or more readings to the end",
        "gradient/l2 and update/operator",
        names=("gradient/unused",),
    ),
    Rule(
        weights.exploding_weights,
        _norm_growth,
        "operator norms do not explode",
        f"{limits.JUMP:g} times within ten readings, or {limits.JUMP**2:g} times",
        f"weight/operator with {2 * limits.CONSECUTIVE} readings",
        names=("weight/exploding",),
    ),
    Rule(
        weights.collapsed_ranks,
        _rank,
        "weights keep their rank",
        f"near 1 at {limits.FEW} readings to the end, by both ranks",
        "spectrum/stable_rank",
        names=("spectrum/collapse",),
    ),
    *changes.RULES,
    *activations.RULES,
    *attention.RULES,
    Rule(
        monitoring.steering_at_bounds,
        _bounded,
        "steering stays within its bounds",
        f"half of the layers {_LASTING}",
        "lr/bounded and lr/ratio",
        names=("lr/bounded",),
    ),
    Rule(
        monitoring.failed_measurements,
        _failures,
        "measurements succeed",
        "any",
        "dynamon/failures",
        names=("dynamon/failures",),
    ),
    Rule(
        monitoring.missing_readings,
        _solved,
        "readings are there and converged",
        "no eigenvalue although one was to be measured, or most did not converge",
        "dynamon/overhead",
        names=("dynamon/nothing", "dynamon/no_sharpness", "sharpness/unconverged"),
    ),
)
NAMES = tuple(name for rule in RULES for name in rule.names)
