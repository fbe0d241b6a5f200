"""Precision: what the weights' dtype loses of updates and decay, and what copies in fewer bits would lose."""

from functools import partial

from dynamon.quantities.registry import Condition, Quantity, Scope

_per_layer = partial(Quantity, cadence="weight", scope=Scope.PER_LAYER)
_FORMATS = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "e4m3": "float8 e4m3fn, scaled by the largest magnitude,",
    "e5m2": "float8 e5m2, scaled by the largest magnitude,",
}
_ENTRIES = {"weight": "weights", "gradient": "gradient's entries, clipped ones"}


def _range(kind: str, fate: str, name: str) -> Quantity:
    """Return the record of a share of entries that a copy would lose."""
    result = {"underflow": "zero", "overflow": "infinity"}[fate]
    return _per_layer(
        f"precision/{kind}_{fate}_{name}",
        f"share of the {_ENTRIES[kind]} that a copy in {_FORMATS[name]} would turn into {result}",
        "0 to 1",
        every=10,
        words=f"{kind}, share that would become {result} in {name}",
    )


PRECISION = (
    _per_layer(
        "precision/update_lost",
        "share of the entries that the weight's dtype left where they were although the optimizer's step was not zero",
        "0 to 1",
        words="share of the updates lost in rounding",
        chart="share of the updates lost in rounding, across layers",
        extremes=True,
    ),
    _per_layer(
        "precision/decay_lost",
        "share of the entries whose decay the weight's dtype rounded away",
        "0 to 1",
        condition=Condition.DECOUPLED_DECAY,
        words="share of the decay lost in rounding",
    ),
    _per_layer(
        "precision/update_size",
        "computed step over half the distance between neighbouring numbers of the weight's dtype, geometric mean over "
        "entries: rounding loses most steps below 1",
        "none",
        scale="log",
        condition=Condition.COMPUTED_STEP,
        words="step over half the distance to the next number",
        chart="step over half the distance to the next number, across layers",
    ),
    _per_layer(
        "precision/bits",
        "significant bits of the weight's dtype: 8 of bfloat16, 11 of float16, 24 of float32",
        "bits",
        words="significant bits of the weight",
    ),
    *(
        _range(kind, fate, name)
        for kind in _ENTRIES
        for fate, names in (("underflow", tuple(_FORMATS)), ("overflow", ("bf16", "fp16")))
        for name in names
    ),
)
