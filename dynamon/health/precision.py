"""Rules on weights whose dtype cannot hold the steps and the decay that they are given."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynamon.health.finding import Finding, name_layers
from dynamon.health.limits import (
    CONSECUTIVE,
    ENDING_RATE,
    FEW,
    HALF_PRECISION_BITS,
    LONG,
    MOST_LOST,
    RISING_RATE,
    ROUNDING_GRADIENT,
)
from dynamon.health.loss import Loss
from dynamon.health.series import column_at, final_stretch, median_at, running_median
from dynamon.runs.history import RunData

_DTYPES = {8.0: "bfloat16", 11.0: "float16", 24.0: "float32", 53.0: "float64"}  # by their significant bits
_ADVICE = (
    'Keep the weights in float32 (precision="bf16-mixed" or "16-mixed"), use an optimizer that rounds stochastically '
    "or by Kahan summation, or raise the learning rate."
)
_SMALL = (
    "These are gains or biases: one that begins at 1 needs steps of 0.002 to move in bfloat16. Where the other layers "
    'learn this may stay; else keep these in float32 (precision="bf16-mixed") or give them a higher learning rate.'
)
_RAISE = "Raise the learning rate: it is too small for any step to be seen."


def swallowed_updates(data: RunData, loss: Loss) -> Iterator[Finding]:
    """Find layers that lose nearly all of their updates in rounding, to the end.

    A fault where these are more than half of the matrices, a warning where matrices are among them, and a note where
    all are gains and biases. In half precision at any time; in float32 only from the first reading on and in more than
    half of the matrices, since a run that has converged, a token that was not seen for long, or the bias before a
    BatchNorm has steps of any size. Readings at a small part of the largest rate so far do not count, and nothing is
    said while the rate rises: a warm-up begins with steps that are lost.
    """
    hits = []
    for index, name in enumerate(_layers(data)):
        known, rates = _judged(data, "precision/update_lost", index, name)
        lost, steps = _column(data, "precision/update_lost", index)[known], _steps(data)[known]
        if len(lost) < FEW or _is_rising(rates[known]):
            continue
        start = final_stretch(running_median(lost, FEW) > MOST_LOST)
        bits = column_at(data, "precision/bits", name, steps)
        if len(lost) - start < (LONG if start else FEW) or start and bits[-1] > HALF_PRECISION_BITS:
            continue
        if _is_noise(data, name, steps[start:]):
            continue
        size = _median(column_at(data, "precision/update_size", name, steps[start:]))
        hits.append((int(steps[start]), name, float(np.median(lost[start:])), size, float(bits[-1])))
    matrices = _matrices(data)
    among = [hit for hit in hits if hit[1] in matrices]
    are_most = len(among) > len(matrices) / 2
    if not are_most:
        hits = [hit for hit in hits if hit[4] <= HALF_PRECISION_BITS]
    if not hits:
        return
    hits.sort(key=lambda hit: (hit[1] not in matrices, -hit[2], hit[0]))
    layers, step = tuple(hit[1] for hit in hits), min(hit[0] for hit in hits)
    share, size = float(np.median([hit[2] for hit in hits])), _median(np.array([hit[3] for hit in hits]))
    dtype = _DTYPES.get(int(hits[0][4]), "its dtype")
    cause = (
        f"a step is {size:.2g} times half the distance to the next {dtype} number, and rounding loses steps below 1"
        if np.isfinite(size)
        else f"steps are mostly below half the distance to the next {dtype} number"
    )
    yield Finding(
        "precision/swallowed",
        "fault" if are_most else "warning" if hits[0][1] in matrices else "note",
        step,
        f"{name_layers(layers)} in {dtype} cannot hold most of the updates: {1 - share:.1%} of the entries move in a "
        f"step, since {cause}.",
        _RAISE if hits[0][4] > HALF_PRECISION_BITS else _ADVICE if hits[0][1] in matrices else _SMALL,
        layers,
        {"moved": 1 - share, "size": size, "layers": len(layers)},
        ("precision/update_lost", "precision/update_size", "update/ratio"),
    )


def lost_decay(data: RunData, loss: Loss) -> Iterator[Finding]:
    """Find weight decay that rounding takes away in most layers that have it, in half precision and to the end."""
    table = data.tables.get("precision/decay_lost")
    if table is None or len(table) < CONSECUTIVE:
        return
    names, shares = [], []
    decaying = 0
    for index, name in enumerate(table.layers or ()):
        known, rates = _judged(data, "precision/decay_lost", index, name)
        lost = table.values[known, index]
        decaying += bool(len(lost))
        bits = column_at(data, "precision/bits", name, table.steps[-1:])[0]
        if len(lost) < CONSECUTIVE or bits > HALF_PRECISION_BITS or _is_rising(rates[known]):
            continue
        if (share := float(np.median(lost[-LONG:]))) > MOST_LOST:
            names.append(name)
            shares.append(share)
    if names and len(names) >= decaying / 2:
        yield Finding(
            "precision/decay",
            "note",
            int(table.steps[0]),
            f"Weight decay hardly acts on {name_layers(tuple(names))}: rounding to half precision takes "
            f"{np.median(shares):.0%} of it, since rate x decay is below half the distance to the next number.",
            "Keep the weights in float32, or decay them every k-th step by k times as much.",
            tuple(names),
            {"lost": float(np.median(shares))},
            ("precision/decay_lost", "weight/initial_fraction"),
        )


def losing_layers(data: RunData) -> set[str]:
    """Return the layers that lost nearly all of their last updates in rounding: why they do not move is then known."""
    found = set()
    for index, name in enumerate(_layers(data)):
        lost = _column(data, "precision/update_lost", index)
        lost = lost[np.isfinite(lost)][-FEW:]
        if len(lost) == FEW and np.median(lost) > MOST_LOST:
            found.add(name)
    return found


def _matrices(data: RunData) -> set[str]:
    """Return the layers that are matrices, whose singular values are known; all where none is."""
    layers = _layers(data)
    sizes = [column_at(data, "spectrum/sigma_max", name, _steps(data)) for name in layers]
    return {name for name, size in zip(layers, sizes, strict=True) if np.isfinite(size).any()} or set(layers)


def _layers(data: RunData) -> tuple[str, ...]:
    table = data.tables.get("precision/update_lost")
    return () if table is None else table.layers or ()


def _steps(data: RunData) -> NDArray[Any]:
    return data.tables["precision/update_lost"].steps


def _column(data: RunData, quantity: str, index: int) -> NDArray[Any]:
    return np.asarray(data.tables[quantity].values[:, index])


def _judged(data: RunData, quantity: str, index: int, name: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return which readings of a layer count, and its learning rate at all of them, NaN where that is not known."""
    table = data.tables[quantity]
    known = np.isfinite(table.values[:, index])
    sizes = column_at(data, "weight/frobenius", name, table.steps)
    with np.errstate(invalid="ignore", over="ignore"):
        rates = column_at(data, "weight/effective_rate", name, table.steps) * np.square(sizes)
        if np.isfinite(rates).any():
            known &= ~(rates < ENDING_RATE * np.fmax.accumulate(rates)) & ~(rates == 0)
    return known, rates


def _is_rising(rates: NDArray[Any]) -> bool:
    """Return whether the rate has grown within the last readings."""
    last = rates[-CONSECUTIVE:]
    return bool(len(last) > 1 and last[-1] > RISING_RATE * last[0])


def _is_noise(data: RunData, name: str, steps: NDArray[Any]) -> bool:
    """Return whether a layer's gradient is what rounding leaves of a gradient that is zero in theory."""
    gradient, others = column_at(data, "gradient/l2", name, steps), median_at(data, "gradient/l2", steps)
    return bool((gradient < ROUNDING_GRADIENT * others).any())


def _median(values: NDArray[Any]) -> float:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else float("nan")
