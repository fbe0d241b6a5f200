"""Progress: what a step did to the loss of a batch that it has not seen, layer by layer."""

from functools import partial

from dynamon.quantities.registry import ALWAYS, Condition, Quantity, Scope

_LOSS = "loss / step"
_PARTS = "decrease of the loss in a step, on the next batch"

_scalar = partial(Quantity, cadence="progress", choice="progress")


def _per_layer(tag: str, meaning: str, unit: str, words: str, chart: str, condition: Condition = ALWAYS) -> Quantity:
    chart = f"{chart} across layers"
    return _scalar(tag, meaning, unit, Scope.PER_LAYER, words=words, chart=chart, condition=condition)


PROGRESS = (
    _per_layer(
        "progress/decrease",
        "what the optimizer's step of the layer took off the loss of the next batch; below 0 it added to it",
        _LOSS,
        "decrease of the loss",
        "decrease of the loss in a step",
    ),
    _per_layer(
        "progress/first_order",
        "what it would have taken off at the slope where it began",
        _LOSS,
        "first-order decrease",
        "first-order decrease of the loss",
    ),
    _per_layer(
        "progress/curvature_cost",
        "how much that slope has risen along the step of all layers",
        _LOSS,
        "curvature cost",
        "curvature cost of a step",
    ),
    _per_layer(
        "progress/overshoot",
        "curvature cost over first-order decrease; to be compared between layers",
        "none",
        "overshoot",
        "overshoot",
        Condition.DESCENDS,
    ),
    _per_layer(
        "progress/decay_decrease",
        "what decoupled weight decay took off that loss, mostly below 0",
        _LOSS,
        "decrease by weight decay",
        "decrease of the loss by weight decay",
        Condition.DECOUPLED_DECAY,
    ),
    _scalar(
        "progress/total_decrease",
        "the decrease of all layers together",
        _LOSS,
        chart=_PARTS,
        row="decrease per step",
    ),
    _scalar(
        "progress/total_decay_decrease",
        "that of decoupled weight decay in all layers",
        _LOSS,
        chart=_PARTS,
        condition=Condition.DECOUPLED_DECAY,
    ),
    _scalar(
        "progress/total_overshoot",
        "the overshoot of the whole step: 1 is at the lowest loss along it, 2 where the loss is that of before",
        "none",
        chart="overshoot of the step (1: lowest loss along it, 2: no lower than before)",
        row="overshoot",
        condition=Condition.DESCENDS,
    ),
    _scalar(
        "progress/discrepancy",
        "by how much the decreases of all layers, decay included, miss the decrease of that loss",
        _LOSS,
    ),
    _scalar(
        "progress/probe_samples",
        "samples in that batch, of all processes",
        "samples",
        condition=Condition.KNOWN_SAMPLES,
    ),
)
