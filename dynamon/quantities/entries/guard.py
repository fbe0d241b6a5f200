"""What a guard does against spikes: layers clipped by their own level, steps skipped."""

from functools import partial

from dynamon.quantities.registry import Quantity, Scope

_guard = partial(Quantity, cadence="guard")

GUARD = (
    _guard(
        "guard/clipped",
        "share of the steps since the last reading at which a layer was clipped",
        "0 to 1",
        chart="share of steps clipped by the guard",
        row="steps clipped by the guard",
    ),
    _guard(
        "guard/smallest",
        "smallest factor on the gradient of any layer since the last reading",
        "0 to 1",
        scale="log",
        chart="smallest factor on a gradient",
        row="smallest factor of the guard",
    ),
    _guard("guard/skipped", "steps skipped so far", "steps", chart="steps skipped", row="steps skipped"),
    _guard(
        "guard/factor",
        "smallest factor on the layer's gradient since the last reading",
        "0 to 1",
        scope=Scope.PER_LAYER,
        scale="log",
        words="factor of the guard on the gradient",
        extremes=True,
    ),
)
