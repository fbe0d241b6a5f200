"""Spikes: how far single steps are above the usual level of gradients, updates and loss."""

from functools import partial

from dynamon.quantities.registry import Condition, Quantity, Scope

_spike = partial(Quantity, cadence="sentinel", unit="deviations")
_found = partial(Quantity, cadence="sentinel", condition=Condition.SPIKED)
_shifted = partial(Quantity, cadence="sentinel", condition=Condition.SHIFTED)

_CHART = "largest deviation from the usual level, of single steps"
SPIKE = (
    _spike(
        "spike/deviation",
        "how far a step was above its usual level, in robust standard deviations; the largest since the reading before",
        row="largest deviation of a step",
    ),
    _spike("spike/gradient", "the same of the layers' and the whole gradient norm alone", chart=_CHART),
    _spike("spike/update", "the same of the size of updates", condition=Condition.KEEPS_STATE, chart=_CHART),
    _spike("spike/loss", "the same of the loss", condition=Condition.RETURNED_LOSS, chart=_CHART),
    _spike(
        "spike/inputs",
        "the same of the batch: of the size of its entries, and of how much its samples are alike",
        condition=Condition.NUMERIC_BATCH,
        chart=_CHART,
    ),
    _spike(
        "spike/layer_deviation",
        "the larger of both for its gradient and its update",
        scope=Scope.PER_LAYER,
        words="deviation of single steps",
    ),
    Quantity("spike/count", "spikes so far", "spikes", cadence="sentinel", chart="spikes so far"),
    _found("spike/batch", "index in its epoch of the batch with a spike", "batches"),
    _found(
        "spike/fingerprint", "hash of its tensors, see :func:`dynamon.monitoring.fingerprint.fingerprint`", "24 bits"
    ),
    _found("spike/input", "which tensor of that batch is unusual, counted from 0", "tensors"),
    _found("spike/input_size", "its root mean square over the usual one", "times"),
    _found("spike/input_spread", "how much its samples, or the entries of each, vary, over the usual", "times"),
    _found("spike/lasted", "steps after which the last spike was over, written when it was", "steps"),
    _shifted("spike/shift", "how far the loss has been above its level since a shift, in the mean", "deviations"),
    _shifted("spike/shift_size", "how large it has been, over that level", "times"),
    _shifted("spike/shift_age", "steps since the one where the shift began", "steps"),
    _shifted("spike/shift_lasted", "steps after which the loss was back, written when it was", "steps"),
)
