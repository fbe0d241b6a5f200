"""Updates: their sizes in the norm of each layer's role, against the weights, and how they turn."""

from functools import partial

from dynamon.quantities.registry import Quantity, Scope

_per_layer = partial(Quantity, cadence="weight", scope=Scope.PER_LAYER, scale="log")

UPDATE = (
    _per_layer(
        "update/operator", "the step in the norm by role", "none", words="update, operator norm", field="update"
    ),
    _per_layer(
        "update/ratio",
        "step over weight, both in that norm",
        "none",
        words="update / weight",
        chart="update / weight across layers",
        extremes=True,
        field="ratio",
    ),
    _per_layer(
        "update/rotation",
        "angle between the weight before and after the step",
        "radians",
        words="rotation per step",
        field="rotation",
    ),
    Quantity(
        "update/cosine",
        "cosine between the last update and the one before, over the layers measured",
        "-1 to 1",
        cadence="weight",
        chart="cosine of successive updates",
    ),
    _per_layer(
        "update/layer_cosine",
        "cosine between the last update and the one before",
        "-1 to 1",
        scale="linear",
        words="cosine of successive updates",
        chart="cosine of successive updates across layers",
    ),
)
