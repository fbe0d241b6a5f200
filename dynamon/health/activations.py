"""Rules on what modules return: dead units, outliers, the residual stream, vanished gradients."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynamon.health.finding import Finding, name_layers
from dynamon.health.limits import (
    BLOCK_FACTOR,
    CONSECUTIVE,
    DEAD_UNITS,
    FEW,
    JUMP,
    LEAST_BLOCKS,
    LEAST_DEATH,
    OUTLIER_KURTOSIS,
    OUTLIER_PEAK,
    RESIDUAL_FACTOR,
    ROUNDING,
    STILL_ALIVE,
    VANISHED_GRADIENT,
)
from dynamon.health.loss import Loss
from dynamon.health.rule import Rule
from dynamon.health.series import (
    STAYING,
    column_at,
    final_stretch,
    last_of,
    lasting,
    layer_columns,
    running_median,
    say_largest,
)
from dynamon.runs.history import RunData

_named = partial(name_layers, word="module")


def dead_units(data: RunData, loss: Loss) -> Iterator[Finding]:
    """Find activation functions most of whose units are on their flat part for every sample of the probe, to the end.

    A healthy ReLU is zero for half of the inputs, so that of n samples a unit is dead by chance with 2^-n; that is
    taken off, and a probe of one sample judges nothing. The last output of the model is left out unless it is zero:
    a classifier that is sure of all samples saturates its sigmoid.
    """
    by_chance = _by_chance(data)
    hits = []
    for name, steps, values in layer_columns(data, "activation/saturated"):
        if name == _last_output(data) and not last_of(data, "activation/zero", name) > DEAD_UNITS:
            continue
        share = (values - by_chance) / max(1 - by_chance, 1e-9)
        start = lasting(running_median(share, FEW) > DEAD_UNITS) if by_chance < 1 else None
        if start is not None and _died(values) is None:  # of which another rule speaks
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
            f"{last:.0%} of the units of {_named(layers)} are dead or saturated on the whole probe, {story}: "
            "their output hardly depends on the input, and no gradient comes through.",
            "Lower the learning rate, lengthen the warm-up or shrink the initial weights and biases of the layer "
            "before; GELU or leaky ReLU, or a normalisation before the activation, keep units alive.",
            layers,
            {"share": last, "first": first},
            ("activation/saturated", "activation/zero"),
        )


def died_at_once(data: RunData, loss: Loss) -> Iterator[Finding]:
    """Find outputs most of whose entries or units died from one reading to the next, and stayed so.

    Compared are the shares that live, not zero or not saturated, with the least of the readings just before: learning
    makes outputs sparser too, but step by step.
    """
    hits: list[tuple[int, int, str, float, float, str]] = []
    for tag, what in (("saturated", "units are dead or saturated"), ("zero", "entries are zero")):
        for place, (name, steps, values) in enumerate(layer_columns(data, f"activation/{tag}")):
            start = _died(values)
            if start is not None and name not in {hit[2] for hit in hits}:
                before, now = float(np.median(values[start - CONSECUTIVE : start])), float(np.median(values[start:]))
                hits.append((int(steps[start]), place, name, before, now, what))
    if hits:
        hits.sort()
        step, _, name, before, now, what = hits[0]
        layers = tuple(hit[2] for hit in hits)
        yield Finding(
            "activation/died",
            "fault" if now > 0.99 else "warning",
            step,
            f"{now:.0%} of the {what} in the output of {_named(layers)}, {before:.0%} just before.",
            "No gradient comes through what is dead. Look at what happened to the layer before it at that step: a "
            "biased or spoiled batch, a jump of its biases, too large a step; go back to a checkpoint before it.",
            layers,
            {"share": now, "before": before},
            ("activation/zero", "activation/saturated"),
        )


def faded_outputs(data: RunData, loss: Loss) -> Iterator[Finding]:
    """Find outputs that fell to a tenth of their size from one reading to the next, and stayed there: a shut gate."""
    hits = []
    dead = {name for finding in died_at_once(data, loss) for name in finding.layers}
    for place, (name, steps, values) in enumerate(layer_columns(data, "activation/rms")):
        start = _fallen(values, 1 / JUMP)
        if start is not None and name not in dead:
            before = float(np.median(values[start - CONSECUTIVE : start]))
            hits.append((int(steps[start]), place, name, float(np.median(values[start:])) / before))
    if hits:
        hits.sort()
        step, _, _, share = hits[0]
        layers = tuple(hit[2] for hit in hits)
        yield Finding(
            "activation/faded",
            "warning",
            step,
            f"The output of {_named(layers)} fell to {share:.2g} of its size, and stays there.",
            "Look at what happened to this layer at that step: gates that shut, biases or gains that jumped, a part of "
            "the network that is no longer reached; go back to a checkpoint before it.",
            layers,
            {"share": share},
            ("activation/rms",),
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
            f"The output of {_named(layers)} holds NaN or infinity on the probe.",
            "Look at the first of them in the order of the model: divisions and logarithms near zero, square roots at "
            "zero, overflow in half precision.",
            layers,
            {"modules": float(len(layers))},
            ("activation/rms", "activation/max"),
        )


def outlier_features(data: RunData, loss: Loss) -> Iterator[Finding]:
    """Find outputs in which few entries grow far beyond all others: by kurtosis and by the largest over the RMS.

    Both are taken over the entries that are not zero, since sparse and one-hot outputs have no outliers. What counts is
    growth; a kurtosis that is far above that of usual outputs from the start on is a note, and nothing is said of an
    output that stays as it is to the last digit: what is frozen.
    """
    hits = []
    for name, steps, kurtosis in layer_columns(data, "activation/kurtosis"):
        if len(kurtosis) < FEW or np.ptp(kurtosis) <= ROUNDING * kurtosis.max():
            continue
        peak, size, zero = (column_at(data, f"activation/{what}", name, steps) for what in ("max", "rms", "zero"))
        present = 1 - np.nan_to_num(zero)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = running_median(peak / size * np.sqrt(present), FEW)
        level = running_median(kurtosis * present, FEW)
        first = min(FEW, len(level)) - 1
        grown = (level > JUMP * level[first]) & (level > OUTLIER_KURTOSIS) & (ratio > 2 * ratio[first])
        start = lasting(grown | (level > JUMP * OUTLIER_KURTOSIS) & (ratio > OUTLIER_PEAK))
        if start is not None:
            has_grown = bool(level[-1] > 2 * level[first])
            hits.append((has_grown, float(level[-1]), int(steps[start]), name, float(level[first]), float(ratio[-1])))
    if hits:
        hits.sort(reverse=True)
        has_grown, last, step, _, before, times = hits[0]
        layers = tuple(hit[3] for hit in hits)
        yield Finding(
            "activation/outliers",
            "warning" if has_grown else "note",
            min(hit[2] for hit in hits),
            f"The output of {_named(layers)} has outlier features: its largest entry is {times:.0f} times its "
            f"root mean square, and the kurtosis is {last:.3g}, {before:.3g} at the first readings (of what is not "
            "zero).",
            "Rounding to few bits loses the other entries. "
            + (
                "Lower the learning rate, normalise queries and keys, decay gains of normalisations, or keep this "
                "output out of low precision."
                if has_grown
                else "They were there at the start: keep this output out of low precision, or look at the scale of "
                "what comes in."
            ),
            layers,
            {"kurtosis": last, "first": before, "peak": times, "step": float(step)},
            ("activation/kurtosis", "activation/max", "activation/rms"),
        )


def residual_stream(data: RunData, loss: Loss) -> Iterator[Finding]:
    """Find a residual stream that grows or shrinks with depth by a factor of 2 a block and 100 in all, to the end.

    The blocks of one list are judged together: two towers, or encoder and decoder, are streams of their own.
    """
    table = data.tables.get("activation/residual")
    for blocks in _streams(data):
        assert table is not None
        values = table.values[:, [(table.layers or ()).index(name) for name in blocks]]
        whole = np.isfinite(values).all(1) & (values > 0).all(1)
        if whole.any():
            yield from _changes_with_depth(blocks, table.steps[whole], values[whole])


def _streams(data: RunData) -> list[tuple[str, ...]]:
    """Return the blocks of each list that has enough of them to show a trend."""
    table = data.tables.get("activation/residual")
    lists: dict[str, list[str]] = {}
    for name in table.layers or () if table is not None else ():
        lists.setdefault(name.rpartition(".")[0], []).append(name)
    return [tuple(blocks) for blocks in lists.values() if len(blocks) >= LEAST_BLOCKS]


def _changes_with_depth(blocks: tuple[str, ...], steps: NDArray[Any], sizes: NDArray[Any]) -> Iterator[Finding]:
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
        start = lasting(mask)
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
        start = lasting(running_median(share, FEW) < VANISHED_GRADIENT)
        if start is not None:
            hits.append((float(share[-1]), int(table.steps[known][start]), name))
    if hits and len(hits) < len(table.layers or ()):
        hits.sort()
        layers = tuple(hit[2] for hit in hits)
        yield Finding(
            "activation/vanished",
            "warning",
            min(hit[1] for hit in hits),
            f"Hardly any gradient comes back to the output of {_named(layers)}: {hits[0][0]:.1g} of that where "
            "it is largest.",
            "Look for saturated or dead activation functions and for small weights behind it; skip connections and "
            "normalisation bring the gradient through.",
            layers,
            {"share": hits[0][0], "modules": float(len(hits))},
            ("activation/gradient", "activation/saturated"),
        )


def _died(shares: NDArray[Any]) -> int | None:
    """Return where shares of what is dead jumped, to stay to the end."""
    return _fallen(1 - shares, STILL_ALIVE, LEAST_DEATH)


def _fallen(values: NDArray[Any], share: float, least: float = 0.0) -> int | None:
    """Return where readings fell below a share of the least of those just before, and by so much, to stay there."""
    if len(values) < CONSECUTIVE + FEW:
        return None
    past = np.lib.stride_tricks.sliding_window_view(values, CONSECUTIVE)[:-1].min(1)  # before each from there on
    now = values[CONSECUTIVE:]
    for start in np.flatnonzero((now < share * past) & (past - now > least)):
        rest = now[start:]
        if len(rest) >= FEW and rest.max() < 2 * share * past[start]:
            return int(CONSECUTIVE + start)
    return None


def _by_chance(data: RunData) -> float:
    """Return the share of units that are dead by chance on a probe of so few samples; half where that is not known."""
    series = data.scalars.get("activation/probe_samples")
    known = series.values[np.isfinite(series.values)] if series is not None else np.zeros(0)
    return 0.5 if not len(known) else 0.5 ** float(known.min()) if known.min() > 1 else 1.0


def _last_output(data: RunData) -> str | None:
    """Return the module that is called last: rows stand in the order of the first call."""
    table = data.tables.get("activation/rms")
    return table.layers[-1] if table is not None and table.layers else None


def _seen_dead(data: RunData, known: Loss) -> str | None:
    return say_largest(data, "activation/saturated", "{:.0%}")


def _seen_zero(data: RunData, known: Loss) -> str | None:
    return say_largest(data, "activation/zero", "{:.0%} zero")


def _seen_smallest(data: RunData, known: Loss) -> str | None:
    columns = [(v[-1] / np.median(v), name) for name, _, v in layer_columns(data, "activation/rms") if np.median(v) > 0]
    return f"at least {min(columns)[0]:.2g} of its median at the end, {min(columns)[1]}" if columns else None


def _seen_nonfinite(data: RunData, known: Loss) -> str | None:
    table = data.tables.get("activation/rms")
    if table is None or not len(table):
        return None
    return f"{int((~np.isfinite(table.values[-1])).sum())} of {len(table.layers or ())} outputs not finite at the end"


def _seen_outliers(data: RunData, known: Loss) -> str | None:
    return say_largest(data, "activation/kurtosis", "kurtosis {:.3g}")


def _seen_residual(data: RunData, known: Loss) -> str | None:
    blocks = max(_streams(data), key=len, default=())
    if not blocks or not len(data.tables["activation/residual"]):
        return None
    first, last = (last_of(data, "activation/residual", name) for name in (blocks[0], blocks[-1]))
    return f"from {first:.3g} after {blocks[0]} to {last:.3g} after {blocks[-1]}"


def _seen_vanished(data: RunData, known: Loss) -> str | None:
    columns = [(float(np.median(v[-FEW:])), name) for name, _, v in layer_columns(data, "activation/gradient")]
    largest = max(columns)[0] if columns else 0.0
    return f"least {min(columns)[0] / largest:.2g} of the largest, {min(columns)[1]}" if largest > 0 else None


RULES = (
    Rule(
        dead_units,
        _seen_dead,
        "units of activation functions are alive",
        f"{DEAD_UNITS:.0%} dead or saturated on the whole probe, {STAYING}",
        "activation/saturated",
        names=("activation/dead",),
    ),
    Rule(
        died_at_once,
        _seen_zero,
        "no output dies at once",
        f"what lives falls to {STILL_ALIVE:g} of the least of the {CONSECUTIVE} readings before, for {FEW} readings",
        "activation/zero and activation/saturated",
        names=("activation/died",),
    ),
    Rule(
        faded_outputs,
        _seen_smallest,
        "outputs keep their size",
        f"fallen to {1 / JUMP:g} of the least of the {CONSECUTIVE} readings before, for {FEW} readings",
        "activation/rms",
        names=("activation/faded",),
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
        f"kurtosis without zeros above {OUTLIER_KURTOSIS:g} and {JUMP:g} times the first, or above "
        f"{JUMP * OUTLIER_KURTOSIS:g}, {STAYING}",
        "activation/kurtosis, activation/max and activation/rms",
        names=("activation/outliers",),
    ),
    Rule(
        residual_stream,
        _seen_residual,
        "the signal keeps its size with depth",
        f"{BLOCK_FACTOR:g} times a block and {RESIDUAL_FACTOR:g} times in all, or as much less, {STAYING}",
        f"activation/residual of a list of {LEAST_BLOCKS} blocks",
        names=("activation/residual",),
    ),
    Rule(
        vanished_gradients,
        _seen_vanished,
        "gradients reach every output",
        f"below {VANISHED_GRADIENT:g} of the largest, {STAYING}",
        "activation/gradient",
        names=("activation/vanished",),
    ),
)
