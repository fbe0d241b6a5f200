"""Rules on the logits and the entropy of attention."""

from collections.abc import Iterator
from functools import partial

import numpy as np

from dynamon.health.finding import Finding, name_layers
from dynamon.health.limits import FEW, FLAT_ENTROPY, LARGE_LOGIT, SHARP_ENTROPY
from dynamon.health.loss import Loss
from dynamon.health.rule import Rule
from dynamon.health.series import STAYING, last_of, lasting, layer_columns, running_median, say_largest
from dynamon.runs.history import RunData

_named = partial(name_layers, word="head")


def growing_logits(data: RunData, loss: Loss) -> Iterator[Finding]:
    """Find attention logits beyond what a softmax in half precision resolves, to the end, that do not shrink."""
    hits = []
    for name, steps, values in layer_columns(data, "attention/max_logit"):
        level = running_median(values, FEW)
        start = lasting(level > LARGE_LOGIT)
        if start is not None and level[-1] >= level[start:].max() / 2:
            first = float(level[min(FEW, len(level)) - 1])
            hits.append((float(level[-1]), int(steps[start]), name, first))
    if hits:
        hits.sort(reverse=True)
        last, _, _, before = hits[0]
        layers = tuple(hit[2] for hit in hits)
        entropy = last_of(data, "attention/entropy", layers[0])
        sharp = f" Its attention has {entropy:.2g} of the entropy of equal weights." if np.isfinite(entropy) else ""
        yield Finding(
            "attention/logits",
            "warning",
            min(hit[1] for hit in hits),
            f"The largest attention logit of {_named(layers)} is {last:.3g}, {before:.3g} at the first readings: "
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
        start = lasting(level < SHARP_ENTROPY)
        if start and level[min(FEW, len(level)) - 1] > FLAT_ENTROPY:
            hits.append((float(level[-1]), int(steps[start]), name))
    if hits and len(hits) >= known / 2:
        hits.sort()
        layers = tuple(hit[2] for hit in hits)
        yield Finding(
            "attention/entropy",
            "warning",
            min(hit[1] for hit in hits),
            f"The attention of {len(hits)} of {known} heads ({_named(layers)}) has collapsed to single keys: its "
            f"entropy is below {SHARP_ENTROPY:g} of that of equal weights, and was above {FLAT_ENTROPY:g}.",
            "Lower the learning rate or lengthen the warm-up; normalising queries and keys keeps logits small.",
            layers,
            {"heads": float(len(hits)), "entropy": hits[0][0]},
            ("attention/entropy", "attention/max_logit"),
        )


def _seen_logits(data: RunData, known: Loss) -> str | None:
    return say_largest(data, "attention/max_logit", "logit {:.3g}")


def _seen_attention(data: RunData, known: Loss) -> str | None:
    columns = [values for _, _, values in layer_columns(data, "attention/entropy")]
    sharp = sum(bool(running_median(values, FEW)[-1] < SHARP_ENTROPY) for values in columns)
    return f"{sharp} of {len(columns)} heads on single keys" if columns else None


RULES = (
    Rule(
        growing_logits,
        _seen_logits,
        "attention logits stay small",
        f"above {LARGE_LOGIT:g}, {STAYING}",
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
)
