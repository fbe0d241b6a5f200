"""Gradient noise: by layer in the dual norm, against the signal, and as a batch size."""

from functools import partial

from dynamon.quantities.registry import Condition, Quantity, Scope

_per_layer = partial(Quantity, cadence="gradient", scope=Scope.PER_LAYER, scale="log")

NOISE = (
    _per_layer(
        "noise/dual",
        "noise sqrt(H) in the dual norm; NaN for a layer without gradients",
        "loss / norm",
        words="gradient noise, dual norm",
        chart="noise in the dual norm across layers",
        extremes=True,
    ),
    Quantity(
        "noise/scale",
        "gradient noise scale: the batch at which noise equals signal, in multiples of yours",
        "batches",
        scale="log",
        cadence="gradient",
        condition=Condition.SIGNAL,
        chart="gradient noise scale, in multiples of the batch",
        row="noise scale",
    ),
    _per_layer(
        "noise/independent",
        "the noise from the processes of a DDP run, or the two halves of accumulation windows; what ``noise/dual`` has "
        "above it is curvature",
        "loss / norm",
        condition=Condition.INDEPENDENT_GRADIENTS,
        words="gradient noise without curvature, dual norm",
    ),
    _per_layer(
        "noise/snr",
        "squared length of the mean gradient over its variance",
        "none",
        condition=Condition.COMPARABLE,
        words="signal to noise",
        chart="signal to noise across layers",
    ),
)
