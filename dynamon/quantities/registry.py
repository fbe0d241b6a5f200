"""What is known of a quantity: its tag, its meaning, where it is shown, when it is measured. Needs no torch."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, Flag, auto
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

SCALES = ("linear", "log")
CADENCES = ("gradient", "weight", "sharpness", "steps", "steering", "monitor")


class Scope(Enum):
    """What a reading is of."""

    SCALAR = "scalar"
    PER_LAYER = "per layer"
    HISTOGRAMS = "histograms"


class Condition(Flag):
    """What must hold for a quantity to be there; several are joined by ``|``, and ``ALWAYS`` is none."""

    AUTOMATIC = auto()
    RETURNED_LOSS = auto()
    INDEPENDENT_GRADIENTS = auto()
    SIGNAL = auto()
    COMPARABLE = auto()
    DECOUPLED_DECAY = auto()
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

    @property
    def words(self) -> str:
        """The condition for a reader, nothing where there is none."""
        return ", ".join(_WORDS[one] for one in Condition if one in self)


ALWAYS = Condition(0)
_WORDS = {
    Condition.AUTOMATIC: "under automatic optimisation",
    Condition.RETURNED_LOSS: "where there is one",
    Condition.INDEPENDENT_GRADIENTS: "in DDP runs and with accumulation windows whose halves are alike",
    Condition.SIGNAL: "where a signal stands out of the noise",
    Condition.COMPARABLE: "where two gradients can be compared",
    Condition.DECOUPLED_DECAY: "with decoupled weight decay",
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
}


@dataclass(frozen=True)
class Entrywise:
    """How a quantity of a weight follows from sums over its entries, which several processes can share.

    Attributes:
        count: K, how many sums there are.
        sums: From T tensors on one device to K rows of sums ``[T]``, those of parts of a weight to be added up. A CPU
            hands over a piece at a time, in float64; elsewhere all weights come at once, in float32 at least, and a
            call a tensor would take a GPU's host longer than the sums take the GPU: use ``torch._foreach_*``.
        finish: From the numbers of entries ``[L]`` and K rows of sums ``[L]`` to readings ``[L]``.
    """

    count: int
    sums: "Callable[[Sequence[Tensor]], tuple[Tensor, ...]]"
    finish: "Callable[..., Tensor]"


@dataclass(frozen=True)
class Quantity:
    """One quantity, as everything that shows or checks it takes it from here.

    Attributes:
        tag: Its name; the first segment is its group.
        meaning: What it is, in a sentence that follows its tag in tables.
        unit: What it is measured in.
        scope: What a reading is of.
        scale: Axis or colours it is best seen on, ``"linear"`` or ``"log"``.
        cadence: The meter that takes it, one of ``CADENCES``; ``"monitor"``: at each reading of any of them.
        every: It comes with every so many-th reading of that meter.
        condition: What must hold for it to be there.
        words: A few words for lists of per-layer quantities.
        chart: Title of its chart among the Custom Scalars; none without.
        row: Label of its row in ``dynamon report --text``, for a per-layer quantity of its median's; none without.
        extremes: Whether that report names its highest and lowest layer.
        choice: The entry of ``SharpnessMonitor(quantities=...)`` that asks for it.
        field: The attribute of the readings of weights that holds it, where one does.
        entrywise: How it follows from sums over the entries of a weight; nothing else is then needed to measure it.

    Raises:
        ValueError: Where an entry says something that does not exist, or leaves out what its scope needs.
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

    def __post_init__(self) -> None:
        """Check the entry."""
        if self.scale not in SCALES:
            raise ValueError(f"{self.tag}: scale must be one of {', '.join(SCALES)}, got {self.scale!r}.")
        if self.cadence not in CADENCES:
            raise ValueError(f"{self.tag}: cadence must be one of {', '.join(CADENCES)}, got {self.cadence!r}.")
        if self.scope is Scope.PER_LAYER and not self.words:
            raise ValueError(f"{self.tag}: a quantity per layer needs words for the list it is chosen from.")

    @property
    def group(self) -> str:
        """The first segment of the tag."""
        return self.tag.split("/")[0]

    @property
    def sentence(self) -> str:
        """Meaning, scope, cadence and condition, as a docstring has them beside the tag."""
        begin = "" if self.scope is Scope.SCALAR else "per layer: "
        tenth = "" if self.every == 1 else f"; every {_ORDINALS[self.every]} reading"
        return f"{begin}{self.meaning}{tenth}{f' ({self.condition.words})' if self.condition else ''}"


_ORDINALS = {10: "tenth"}


def meanings(quantities: Iterable[Quantity]) -> dict[str, str]:
    """Tags with their meanings, as a meter declares them."""
    return {quantity.tag: quantity.meaning for quantity in quantities}


def by_tag(*groups: Iterable[Quantity]) -> dict[str, Quantity]:
    """Put the entries of several files together.

    Raises:
        ValueError: Where a tag has two entries.
    """
    found: dict[str, Quantity] = {}
    for quantity in (one for group in groups for one in group):
        if quantity.tag in found:
            raise ValueError(f"{quantity.tag} has two entries.")
        found[quantity.tag] = quantity
    return found
