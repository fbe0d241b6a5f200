"""Spikes: how far single steps are above the usual level of gradients, updates and loss."""

from functools import partial

from dynamon.quantities.registry import Condition, Quantity, Scope

_spike = partial(Quantity, cadence="sentinel", unit="deviations")
_found = partial(Quantity, cadence="sentinel", condition=Condition.SPIKED)

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
    _found("spike/lasted", "steps after which the last spike was over, written when it was", "steps"),
)
