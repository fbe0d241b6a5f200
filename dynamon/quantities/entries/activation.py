"""Activations: sizes of what modules return on the probe, outliers, dead units, and the gradients that come back."""

from functools import partial

from dynamon.quantities.registry import ALWAYS, Condition, Quantity, Scope

_SIZES = "root mean square of outputs across modules"


def _per_module(
    tag: str, meaning: str, unit: str, words: str, chart: str = "", scale: str = "log", condition: Condition = ALWAYS
) -> Quantity:
    every = partial(Quantity, cadence="activation", scope=Scope.PER_LAYER, rows="module")
    return every(f"activation/{tag}", meaning, unit, scale=scale, words=words, chart=chart, condition=condition)


ACTIVATION = (
    _per_module("rms", "root mean square of the output", "activation", "output, root mean square", _SIZES),
    _per_module("max", "largest entry of the output by size", "activation", "output, largest entry"),
    _per_module(
        "kurtosis",
        "mean fourth power of its entries over their squared mean square: 3 for normal ones, large with outliers",
        "none",
        "output, kurtosis of the entries",
        "kurtosis of outputs across modules",
    ),
    _per_module("zero", "share of entries that are exactly zero", "0 to 1", "output, share of zeros", scale="linear"),
    _per_module(
        "saturated",
        "share of units of an activation function that are on its flat part on the whole probe (ReLU: dead units)",
        "0 to 1",
        "dead and saturated units",
        "dead and saturated units across activation functions",
        "linear",
        Condition.ACTIVATION_FUNCTIONS,
    ),
    _per_module(
        "gradient",
        "root mean square of the gradient of a sample's loss with respect to the output",
        "loss / activation",
        "gradient of the output, root mean square",
        "root mean square of the outputs' gradients across modules",
    ),
    _per_module(
        "residual",
        "root mean square of the residual stream after the block",
        "activation",
        "residual stream, root mean square",
        "root mean square of the residual stream across blocks",
        condition=Condition.BLOCKS,
    ),
    Quantity(
        "activation/probe_samples",
        "samples in the probe, of all processes",
        "samples",
        cadence="activation",
        condition=Condition.KNOWN_SAMPLES,
    ),
)
