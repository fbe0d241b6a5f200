"""Attention: logits of a few heads and rows of the probe, computed again since fused attention hides them."""

from functools import partial

from dynamon.quantities.registry import Condition, Quantity, Scope

_per_head = partial(Quantity, cadence="activation", scope=Scope.PER_LAYER, condition=Condition.ATTENTION, rows="head")

ATTENTION = (
    _per_head(
        "attention/max_logit",
        "largest logit of a head, over some rows of the probe",
        "logit",
        words="attention, largest logit",
        chart="largest attention logits across heads",
        row="largest attention logit",
        extremes=True,
    ),
    _per_head(
        "attention/entropy",
        "mean entropy of a head's attention, over that of equal weights: 0 on a single key, 1 spread evenly",
        "0 to 1",
        words="attention, entropy",
        chart="entropy of attention across heads",
        row="attention entropy",
        extremes=True,
    ),
)
