"""The registry: one entry per quantity, one file per group, which is the first segment of the tag.

What a monitor declares, the tables of tags in docstrings and docs, the charts among TensorBoard's Custom Scalars, the
words and scales of the tab, the rows of ``dynamon report --text`` and what tests expect of a run are derived from it.
"""

from dynamon.quantities.entries.activation import ACTIVATION
from dynamon.quantities.entries.advice import ADVICE
from dynamon.quantities.entries.attention import ATTENTION
from dynamon.quantities.entries.gradient import GRADIENT
from dynamon.quantities.entries.guard import GUARD
from dynamon.quantities.entries.lr import LR
from dynamon.quantities.entries.noise import NOISE
from dynamon.quantities.entries.own import DYNAMON
from dynamon.quantities.entries.precision import PRECISION
from dynamon.quantities.entries.progress import PROGRESS
from dynamon.quantities.entries.sharpness import SHARPNESS
from dynamon.quantities.entries.spectrum import SPECTRUM
from dynamon.quantities.entries.spike import SPIKE
from dynamon.quantities.entries.update import UPDATE
from dynamon.quantities.entries.weight import WEIGHT
from dynamon.quantities.registry import ALWAYS, Condition, Quantity, Scope, by_tag, meanings
from dynamon.quantities.tables import tag_table, with_tag_table

__all__ = [
    "ALWAYS",
    "REGISTRY",
    "Condition",
    "Quantity",
    "Scope",
    "choices",
    "meanings",
    "quantities_of",
    "tag_table",
    "with_tag_table",
]

REGISTRY: dict[str, Quantity] = by_tag(
    SHARPNESS,
    PROGRESS,
    GRADIENT,
    NOISE,
    WEIGHT,
    UPDATE,
    PRECISION,
    SPECTRUM,
    ACTIVATION,
    ATTENTION,
    LR,
    GUARD,
    ADVICE,
    SPIKE,
    DYNAMON,
)


def quantities_of(*cadences: str, scope: Scope | None = None, choice: str | None = None) -> list[Quantity]:
    """Select entries, in the order of the registry.

    Args:
        cadences: Meters that take them; none for all.
        scope: What a reading is of; None for any.
        choice: The entry of ``SharpnessMonitor(quantities=...)`` that asks for them; None for any.
    """
    return [
        one
        for one in REGISTRY.values()
        if (not cadences or one.cadence in cadences)
        and (scope is None or one.scope is scope)
        and (choice is None or one.choice == choice)
    ]


def choices(cadence: str) -> list[str]:
    """What can be asked for of the quantities that a meter takes."""
    return list(dict.fromkeys(one.choice for one in quantities_of(cadence) if one.choice))
