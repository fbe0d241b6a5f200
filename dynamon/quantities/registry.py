"""The records of quantities: tag, meaning, where each is shown, when it is measured. Needs no torch."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, Flag, auto
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

SCALES = ("linear", "log")
ROWS = ("layer", "module", "head")
CADENCES = (
    "gradient",
    "weight",
    "sharpness",
    "steps",
    "progress",
    "activation",
    "advice",
    "steering",
    "guard",
    "sentinel",
    "monitor",
)


class Scope(Enum):
    """What a reading is of."""

    SCALAR = "scalar"
    PER_LAYER = "per layer"
    HISTOGRAMS = "histograms"


class Condition(Flag):
    """What a quantity requires to be available; combine with ``|``, ``ALWAYS`` requires nothing."""

    AUTOMATIC = auto()
    RETURNED_LOSS = auto()
    INDEPENDENT_GRADIENTS = auto()
    SIGNAL = auto()
    COMPARABLE = auto()
    DECOUPLED_DECAY = auto()
    COMPUTED_STEP = auto()
    SEVERAL_RATES = auto()
    HISTOGRAMS = auto()
    CONVOLUTIONS = auto()
    RESOLVED = auto()
    POWER_LAW = auto()
    STABILITY_FORMULA = auto()
    SECOND_MOMENT = auto()
    ONE_THRESHOLD = auto()
    CONVERGED = auto()
    UNCONVERGED = auto()
    OTHER_SAMPLES = auto()
    KNOWN_SAMPLES = auto()
    TRUSTED_LOSS = auto()
    ONE_RATE = auto()
    POSITIVE_CURVATURE = auto()
    DESCENDS = auto()
    SPIKED = auto()
    RATE_JUMPED = auto()
    NUMERIC_BATCH = auto()
    SHIFTED = auto()
    KEEPS_STATE = auto()
    ACTIVATION_FUNCTIONS = auto()
    BLOCKS = auto()
    ATTENTION = auto()

    @property
    def words(self) -> str:
        """The condition in words, empty for none."""
        return ", ".join(_WORDS[one] for one in Condition if one in self)


ALWAYS = Condition(0)
_WORDS = {
    Condition.AUTOMATIC: "under automatic optimisation",
    Condition.RETURNED_LOSS: "where there is one",
    Condition.INDEPENDENT_GRADIENTS: "in DDP runs and with accumulation windows whose halves are alike",
    Condition.SIGNAL: "where a signal stands out of the noise",
    Condition.COMPARABLE: "where two gradients can be compared",
    Condition.DECOUPLED_DECAY: "with decoupled weight decay",
    Condition.COMPUTED_STEP: "for SGD, Adam and AdamW",
    Condition.SEVERAL_RATES: "where groups or optimizers have different rates",
    Condition.HISTOGRAMS: "with ``histograms=True``",
    Condition.CONVOLUTIONS: "with ``convolutions=True``, for convolutions",
    Condition.RESOLVED: "where the smallest one is resolved",
    Condition.POWER_LAW: "where there is a power law",
    Condition.STABILITY_FORMULA: "for one SGD, Adam, AdamW or RMSprop",
    Condition.SECOND_MOMENT: "for one optimizer with a second moment",
    Condition.ONE_THRESHOLD: "for SGD without coupled decay, where all groups agree",
    Condition.CONVERGED: "where the solver converged",
    Condition.UNCONVERGED: "where the solver did not converge",
    Condition.OTHER_SAMPLES: "where the second set of samples is there",
    Condition.KNOWN_SAMPLES: "where their number is known",
    Condition.TRUSTED_LOSS: "where differences of the loss stand out of its rounding",
    Condition.ONE_RATE: "where there is one learning rate only",
    Condition.POSITIVE_CURVATURE: "where the loss curves upwards along the update",
    Condition.DESCENDS: "where the update begins by lowering the loss on the probe",
    Condition.SPIKED: "after a spike",
    Condition.RATE_JUMPED: "where it more than doubled",
    Condition.SHIFTED: "after a shift of the loss",
    Condition.NUMERIC_BATCH: "where batches hold numbers that vary",
    Condition.KEEPS_STATE: "where an optimizer keeps averages",
    Condition.ACTIVATION_FUNCTIONS: "for activation functions",
    Condition.BLOCKS: "where blocks of one class follow each other",
    Condition.ATTENTION: "where there is attention",
}


@dataclass(frozen=True)
class Entrywise:
    """How a quantity of a weight follows from sums over its entries, which can be sharded.

    Attributes:
        count: K, the number of sums.
        sums: From T tensors on one device to K rows of sums ``[T]``, which are added over shards. On a CPU it gets one
            piece at a time, in float64; elsewhere all weights at once, in at least float32. There use
            ``torch._foreach_*``: a call per tensor would take the host longer than the sums take the GPU.
        finish: From the numbers of entries ``[L]`` and K rows of sums ``[L]`` to readings ``[L]``.
    """

    count: int
    sums: "Callable[[Sequence[Tensor]], tuple[Tensor, ...]]"
    finish: "Callable[..., Tensor]"


@dataclass(frozen=True)
class Quantity:
    """The record of one quantity, from which everything that shows or checks it is derived.

    Attributes:
        tag: Its name; the first segment is its group.
        meaning: What it is, in a phrase that follows its tag in tables.
        unit: Its unit.
        scope: What a reading covers.
        rows: What its rows are where it has several: ``"layer"`` (weights), ``"module"`` or ``"head"`` (of attention).
        scale: The scale of its axis or colours, ``"linear"`` or ``"log"``.
        cadence: The meter that measures it, one of ``CADENCES``; ``"monitor"``: at each reading of any meter.
        every: It is measured at every k-th reading of that meter.
        condition: What must hold for it to be available.
        words: A short name for lists of per-layer quantities.
        chart: Title of its chart in TensorBoard's Custom Scalars; empty for none.
        row: Label of its row in ``dynamon report --text`` (of the median if per layer); empty for none.
        extremes: Whether that report names its highest and lowest layer.
        choice: The entry of ``SharpnessMonitor(quantities=...)`` that selects it.
        field: The attribute of the weight readings that holds it, if any.
        entrywise: How it follows from sums over a weight's entries; nothing else is then needed to measure it.

    Raises:
        ValueError: If a field is invalid, or one that the scope needs is missing.
    """

    tag: str
    meaning: str
    unit: str
    scope: Scope = Scope.SCALAR
    scale: str = "linear"
    cadence: str = "monitor"
    every: int = 1
    condition: Condition = ALWAYS
    words: str = ""
    chart: str = ""
    row: str = ""
    extremes: bool = False
    choice: str = ""
    field: str = ""
    entrywise: Entrywise | None = None
    rows: str = "layer"

    def __post_init__(self) -> None:
        """Check the record."""
        if self.scale not in SCALES:
            raise ValueError(f"{self.tag}: scale must be one of {', '.join(SCALES)}, got {self.scale!r}.")
        if self.cadence not in CADENCES:
            raise ValueError(f"{self.tag}: cadence must be one of {', '.join(CADENCES)}, got {self.cadence!r}.")
        if self.rows not in ROWS:
            raise ValueError(f"{self.tag}: rows must be one of {', '.join(ROWS)}, got {self.rows!r}.")
        if self.scope is Scope.PER_LAYER and not self.words:
            raise ValueError(f"{self.tag}: a per-layer quantity needs words for the list of quantities.")

    @property
    def group(self) -> str:
        """The first segment of the tag."""
        return self.tag.split("/")[0]

    @property
    def sentence(self) -> str:
        """Meaning, scope, cadence and condition, as docstrings show them beside the tag."""
        begin = "" if self.scope is Scope.SCALAR else f"per {self.rows}: "
        tenth = "" if self.every == 1 else f"; every {_ORDINALS[self.every]} reading"
        return f"{begin}{self.meaning}{tenth}{f' ({self.condition.words})' if self.condition else ''}"


_ORDINALS = {10: "tenth"}


def meanings(quantities: Iterable[Quantity]) -> dict[str, str]:
    """Map tags to their meanings, as a meter declares them."""
    return {quantity.tag: quantity.meaning for quantity in quantities}


def by_tag(*groups: Iterable[Quantity]) -> dict[str, Quantity]:
    """Join the records of several files, by tag.

    Raises:
        ValueError: If a tag has two records.
    """
    found: dict[str, Quantity] = {}
    for quantity in (one for group in groups for one in group):
        if quantity.tag in found:
            raise ValueError(f"{quantity.tag} has two records.")
        found[quantity.tag] = quantity
    return found
