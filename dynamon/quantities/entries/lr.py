"""Learning rates: those of the groups, and what steering makes of them layer by layer."""

from functools import partial

from dynamon.quantities.registry import Condition, Quantity, Scope

_steering = partial(Quantity, cadence="steering")
_per_layer = partial(_steering, scope=Scope.PER_LAYER)

LR = (
    _steering(
        "lr/base",
        "largest learning rate of any layer, before the ratio",
        "rate",
        chart="base rate",
        row="base rate",
    ),
    _steering(
        "lr/base_min",
        "the smallest",
        "rate",
        condition=Condition.SEVERAL_RATES,
        chart="base rate",
        row="smallest rate",
    ),
    _per_layer(
        "lr/ratio",
        "factor on the learning rate",
        "none",
        words="rate ratio",
        chart="rate ratio across layers",
        row="median ratio",
        extremes=True,
    ),
    _per_layer("lr/effective", "learning rate times ratio", "rate", scale="log", words="effective rate"),
    Quantity(
        "lr/rise",
        "factor by which the learning rate of a parameter group rose from one step to the next, beyond all before",
        "none",
        cadence="sentinel",
        condition=Condition.RATE_JUMPED,
    ),
    _steering("lr/bounded", "layers whose ratio sits at a bound of the rule", "layers", row="layers at bounds"),
)
