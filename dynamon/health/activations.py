"""Rules on what modules return: dead units, outliers, attention logits, the residual stream, vanished gradients."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynamon.health.finding import Finding, name_layers
from dynamon.health.limits import (
    BLOCK_FACTOR,
    CONSECUTIVE,
    DEAD_UNITS,
    FEW,
    FLAT_ENTROPY,
    JUMP,
    LARGE_LOGIT,
    LEAST_BLOCKS,
    OUTLIER_KURTOSIS,
    OUTLIER_PEAK,
    RESIDUAL_FACTOR,
    SHARP_ENTROPY,
    VANISHED_GRADIENT,
)
from dynamon.health.loss import Loss
from dynamon.health.rule import Rule
from dynamon.health.series import column_at, final_stretch, layer_columns, running_median
from dynamon.runs.history import RunData

_STAYING = f"at {FEW} readings from the first on or {CONSECUTIVE} to the end"


def dead_units(data: RunData, loss: Loss) -> Iterator[Finding]:
    """Find activation functions most of whose units are on their flat part for every sample of the probe, to the end.

    A healthy ReLU is zero for half of the inputs, so that of n samples a unit is dead by chance with 2^-n; that is
    taken off, and a probe of one sample judges nothing. The last output of the model is left out unless it is zero:
    a classifier that is sure of all samples saturates its sigmoid.
    """
    by_chance = _by_chance(data)
    hits = []
    for name, steps, values in layer_columns(data, "activation/saturated"):
        if name == _last_output(data) and not _last(data, "activation/zero", name) > DEAD_UNITS:
            continue
        share = (values - by_chance) / max(1 - by_chance, 1e-9)
        start = _lasting(running_median(share, FEW) > DEAD_UNITS) if by_chance < 1 else None
        if start is not None:
            first, last = float(np.median(share[:FEW])), float(np.median(share[-FEW:]))
            hits.append((int(steps[start]), name, first, last))
    if hits:
        hits.sort(key=lambda hit: (-hit[3], hit[0]))
        layers, (step, _, first, last) = tuple(hit[1] for hit in hits), hits[0]
        story = f"now, {max(first, 0):.0%} at the first readings" if last > first + 0.1 else "since the first readings"
        yield Finding(
            "activation/dead",
            "fault" if last > 0.99 else "warning",
            step,
            f"{last:.0%} of the units of {name_layers(layers)} are dead or saturated on the whole probe, {story}: "
            "their output hardly depends on the input, and no gradient comes through.",
            "Lower the learning rate, lengthen the warm-up or shrink the initial weights and biases of the layer "
            "before; GELU or leaky ReLU, or a normalisation before the activation, keep units alive.",
            layers,
            {"share": last, "first": first},
            ("activation/saturated", "activation/zero"),
        )


def nonfinite_outputs(data: RunData, loss: Loss) -> Iterator[Finding]:
    """Find outputs that hold NaN or infinity, at the last readings."""
    table = data.tables.get("activation/rms")
    if table is None or not len(table):
        return
    zero = data.tables.get("activation/zero")
    if zero is None or zero.layers != table.layers or zero.values.shape != table.values.shape:
        return
    is_broken = ~np.isfinite(table.values) & np.isfinite(zero.values)  # modules that were not called have neither
    layers = tuple(name for name, column in zip(table.layers or (), is_broken.T, strict=True) if column[-FEW:].all())
    if layers:
        start = min(final_stretch(is_broken[:, (table.layers or ()).index(name)]) for name in layers)
        yield Finding(
            "activation/nonfinite",
            "fault",
            int(table.steps[start]),
            f"The output of {name_layers(layers)} holds NaN or infinity on the probe.",
            "Look at the first of them in the order of the model: divisions and logarithms near zero, square roots at "
            "zero, overflow in half precision.",
            layers,
            {"modules": float(len(layers))},
            ("activation/rms", "activation/max"),
        )


def outlier_features(data: RunData, loss: Loss) -> Iterator[Finding]:
    """Find outputs in which few entries grow far beyond all others: by kurtosis and by the largest over the RMS.

    Sparse outputs have a high kurtosis from the start; so what counts is growth, or a kurtosis that is far above that
    of usual outputs.
    """
    hits = []
    for name, steps, kurtosis in layer_columns(data, "activation/kurtosis"):
        peak, size = (column_at(data, f"activation/{what}", name, steps) for what in ("max", "rms"))
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = running_median(peak / size, FEW)
        level = running_median(kurtosis, FEW)
        first = min(FEW, len(level)) - 1
        grown = (level > JUMP * level[first]) & (level > OUTLIER_KURTOSIS) & (ratio > 2 * ratio[first])
        start = _lasting(grown | (level > JUMP * OUTLIER_KURTOSIS) & (ratio > OUTLIER_PEAK))
        if start is not None:
            hits.append((float(level[-1]), int(steps[start]), name, float(level[first]), float(ratio[-1])))
    if hits:
        hits.sort(reverse=True)
        last, step, _, before, times = hits[0]
        layers = tuple(hit[2] for hit in hits)
        yield Finding(
            "activation/outliers",
            "warning",
            min(hit[1] for hit in hits),
            f"The output of {name_layers(layers)} has outlier features: its largest entry is {times:.0f} times its "
            f"root mean square, and the kurtosis is {last:.3g}, {before:.3g} at the first readings.",
            "Rounding to few bits loses the other entries. Lower the learning rate, normalise queries and keys, decay "
            "gains of normalisations, or keep this output out of low precision.",
            layers,
            {"kurtosis": last, "first": before, "peak": times, "step": float(step)},
            ("activation/kurtosis", "activation/max", "activation/rms"),
        )


def growing_logits(data: RunData, loss: Loss) -> Iterator[Finding]:
    """Find attention logits beyond what a softmax in half precision resolves, to the end, that do not shrink."""
    hits = []
    for name, steps, values in layer_columns(data, "attention/max_logit"):
        level = running_median(values, FEW)
        start = _lasting(level > LARGE_LOGIT)
        if start is not None and level[-1] >= level[start:].max() / 2:
            first = float(level[min(FEW, len(level)) - 1])
            hits.append((float(level[-1]), int(steps[start]), name, first))
    if hits:
        hits.sort(reverse=True)
        last, _, _, before = hits[0]
        layers = tuple(hit[2] for hit in hits)
        entropy = _last(data, "attention/entropy", layers[0])
        sharp = f" Its attention has {entropy:.2g} of the entropy of equal weights." if np.isfinite(entropy) else ""
        yield Finding(
            "attention/logits",
            "warning",
            min(hit[1] for hit in hits),
            f"The largest attention logit of {name_layers(layers)} is {last:.3g}, {before:.3g} at the first readings: "
            f"above {LARGE_LOGIT:g} neighbouring bfloat16 numbers are 0.5 apart, and one key takes all.{sharp}",
            "Normalise queries and keys, cap the logits, decay query and key weights, or lower their learning rate.",
            layers,
            {"logit": last, "first": before, "entropy": entropy},
            ("attention/max_logit", "attention/entropy"),
        )


def collapsed_attention(data: RunData, loss: Loss) -> Iterator[Finding]:
    """Find half of all heads on a single key although they spread their attention at the first readings.

    Single heads that look at one place, such as the token before, are normal.
    """
    hits, known = [], 0
    for name, steps, values in layer_columns(data, "attention/entropy"):
        level = running_median(values, FEW)
        known += 1
        start = _lasting(level < SHARP_ENTROPY)
        if start and level[min(FEW, len(level)) - 1] > FLAT_ENTROPY:
            hits.append((float(level[-1]), int(steps[start]), name))
    if hits and len(hits) >= known / 2:
        hits.sort()
        layers = tuple(hit[2] for hit in hits)
        yield Finding(
            "attention/entropy",
            "warning",
            min(hit[1] for hit in hits),
            f"The attention of {len(hits)} of {known} heads ({name_layers(layers)}) has collapsed to single keys: its "
            f"entropy is below {SHARP_ENTROPY:g} of that of equal weights, and was above {FLAT_ENTROPY:g}.",
            "Lower the learning rate or lengthen the warm-up; normalising queries and keys keeps logits small.",
            layers,
            {"heads": float(len(hits)), "entropy": hits[0][0]},
            ("attention/entropy", "attention/max_logit"),
        )


def residual_stream(data: RunData, loss: Loss) -> Iterator[Finding]:
    """Find a residual stream that grows or shrinks with depth by a factor of 2 a block and 100 in all, to the end."""
    table = data.tables.get("activation/residual")
    blocks = table.layers or () if table is not None else ()
    if table is None or len(blocks) < LEAST_BLOCKS:
        return
    whole = np.isfinite(table.values).all(1) & (table.values > 0).all(1)
    steps, sizes = table.steps[whole], table.values[whole]
    if not len(steps):
        return
    factor = running_median(sizes[:, -1] / sizes[:, 0], FEW)
    a_block = factor ** (1 / (len(blocks) - 1))
    for mask, word, advice in (
        (
            (factor > RESIDUAL_FACTOR) & (a_block > BLOCK_FACTOR),
            "explodes",
            "Shrink the initial weights of what is added to it (by the root of twice the depth), or normalise the "
            "input of each block.",
        ),
        (
            (factor < 1 / RESIDUAL_FACTOR) & (a_block < 1 / BLOCK_FACTOR),
            "vanishes",
            "Look at the initial scale of the blocks: without skip connections each block must keep the size of its "
            "input (He or orthogonal initialisation, normalisation).",
        ),
    ):
        start = _lasting(mask)
        if start is not None:
            yield Finding(
                "activation/residual",
                "warning",
                int(steps[start]),
                f"The signal {word} with depth: its root mean square goes from {sizes[-1, 0]:.2g} after {blocks[0]} to "
                f"{sizes[-1, -1]:.2g} after {blocks[-1]}, {a_block[-1]:.2g} times in each of {len(blocks)} blocks.",
                advice,
                (blocks[-1],),
                {"factor": float(factor[-1]), "block": float(a_block[-1])},
                ("activation/residual",),
            )


def vanished_gradients(data: RunData, loss: Loss) -> Iterator[Finding]:
    """Find outputs whose gradient is next to nothing beside that of the output where it is largest, to the end."""
    table = data.tables.get("activation/gradient")
    if table is None or not len(table) or _by_chance(data) == 1:  # one sample, which few units let through
        return
    with np.errstate(invalid="ignore"):
        top = np.array([row[np.isfinite(row)].max(initial=0.0) for row in table.values])
    hits = []
    for index, name in enumerate(table.layers or ()):
        column = table.values[:, index]
        known = np.isfinite(column) & (top > 0)
        share = column[known] / top[known]
        start = _lasting(running_median(share, FEW) < VANISHED_GRADIENT)
        if start is not None:
            hits.append((float(share[-1]), int(table.steps[known][start]), name))
    if hits and len(hits) < len(table.layers or ()):
        hits.sort()
        layers = tuple(hit[2] for hit in hits)
        yield Finding(
            "activation/vanished",
            "warning",
            min(hit[1] for hit in hits),
            f"Hardly any gradient comes back to the output of {name_layers(layers)}: {hits[0][0]:.1g} of that where "
            "it is largest.",
            "Look for saturated or dead activation functions and for small weights behind it; skip connections and "
            "normalisation bring the gradient through.",
            layers,
            {"share": hits[0][0], "modules": float(len(hits))},
            ("activation/gradient", "activation/saturated"),
        )


def _lasting(mask: NDArray[Any]) -> int | None:
    """Return where a condition begins that holds to the end: from the first reading on, or for some readings."""
    start = final_stretch(mask)
    return start if len(mask) - start >= (CONSECUTIVE if start else FEW) else None


def _by_chance(data: RunData) -> float:
    """Return the share of units that are dead by chance on a probe of so few samples."""
    series = data.scalars.get("activation/probe_samples")
    known = series.values[np.isfinite(series.values)] if series is not None else np.zeros(0)
    return 0.5 ** float(known.min()) if len(known) and known.min() > 1 else float(bool(len(known)))


def _last_output(data: RunData) -> str | None:
    """Return the module that is called last: rows stand in the order of the first call."""
    table = data.tables.get("activation/rms")
    return table.layers[-1] if table is not None and table.layers else None


def _last(data: RunData, quantity: str, name: str) -> float:
    for own, _, values in layer_columns(data, quantity):
        if own == name:
            return float(np.median(values[-FEW:]))
    return float("nan")


def _seen_dead(data: RunData, known: Loss) -> str | None:
    return _extreme(data, "activation/saturated", "{:.0%}")


def _seen_nonfinite(data: RunData, known: Loss) -> str | None:
    table = data.tables.get("activation/rms")
    if table is None or not len(table):
        return None
    return f"{int((~np.isfinite(table.values[-1])).sum())} of {len(table.layers or ())} outputs not finite at the end"


def _seen_outliers(data: RunData, known: Loss) -> str | None:
    return _extreme(data, "activation/kurtosis", "kurtosis {:.3g}")


def _seen_logits(data: RunData, known: Loss) -> str | None:
    return _extreme(data, "attention/max_logit", "logit {:.3g}")


def _seen_attention(data: RunData, known: Loss) -> str | None:
    columns = [values for _, _, values in layer_columns(data, "attention/entropy")]
    sharp = sum(bool(running_median(values, FEW)[-1] < SHARP_ENTROPY) for values in columns)
    return f"{sharp} of {len(columns)} heads on single keys" if columns else None


def _seen_residual(data: RunData, known: Loss) -> str | None:
    table = data.tables.get("activation/residual")
    if table is None or not len(table) or len(table.layers or ()) < LEAST_BLOCKS:
        return None
    last = np.median(table.values[-FEW:], axis=0)
    return f"from {last[0]:.3g} after the first block to {last[-1]:.3g} after the last"


def _seen_vanished(data: RunData, known: Loss) -> str | None:
    columns = [(float(np.median(v[-FEW:])), name) for name, _, v in layer_columns(data, "activation/gradient")]
    largest = max(columns)[0] if columns else 0.0
    return f"least {min(columns)[0] / largest:.2g} of the largest, {min(columns)[1]}" if largest > 0 else None


def _extreme(data: RunData, quantity: str, form: str) -> str | None:
    columns = layer_columns(data, quantity)
    found = [(float(np.median(values[-FEW:])), name) for name, _, values in columns]
    return f"at most {form.format(max(found)[0])} at the end, {max(found)[1]}" if found else None


RULES = (
    Rule(
        dead_units,
        _seen_dead,
        "units of activation functions are alive",
        f"{DEAD_UNITS:.0%} dead or saturated on the whole probe, {_STAYING}",
        "activation/saturated",
        names=("activation/dead",),
    ),
    Rule(
        nonfinite_outputs,
        _seen_nonfinite,
        "outputs of modules are finite",
        f"not finite at the last {FEW} readings",
        "activation/rms",
        names=("activation/nonfinite",),
    ),
    Rule(
        outlier_features,
        _seen_outliers,
        "outputs have no outlier features",
        f"kurtosis above {OUTLIER_KURTOSIS:g} and {JUMP:g} times the first, or above "
        f"{JUMP * OUTLIER_KURTOSIS:g}, {_STAYING}",
        "activation/kurtosis, activation/max and activation/rms",
        names=("activation/outliers",),
    ),
    Rule(
        growing_logits,
        _seen_logits,
        "attention logits stay small",
        f"above {LARGE_LOGIT:g}, {_STAYING}",
        "attention/max_logit",
        names=("attention/logits",),
    ),
    Rule(
        collapsed_attention,
        _seen_attention,
        "attention does not collapse",
        f"half of the heads fall below {SHARP_ENTROPY:g} of the entropy of equal weights",
        "attention/entropy",
        names=("attention/entropy",),
    ),
    Rule(
        residual_stream,
        _seen_residual,
        "the signal keeps its size with depth",
        f"{BLOCK_FACTOR:g} times a block and {RESIDUAL_FACTOR:g} times in all, or as much less, {_STAYING}",
        f"activation/residual with {LEAST_BLOCKS} blocks",
        names=("activation/residual",),
    ),
    Rule(
        vanished_gradients,
        _seen_vanished,
        "gradients reach every output",
        f"below {VANISHED_GRADIENT:g} of the largest, {_STAYING}",
        "activation/gradient",
        names=("activation/vanished",),
    ),
)
