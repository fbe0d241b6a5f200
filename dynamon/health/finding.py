"""The result of a rule."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

SEVERITIES = ("fault", "warning", "note")  # the most severe first


@dataclass(frozen=True)
class Finding:
    """One thing that looks wrong.

    Attributes:
        rule: The rule that found it.
        severity: ``"fault"``: training is broken or about to be; ``"warning"``: worth a look; ``"note"``: good to know.
        step: Where it began.
        layers: The layers concerned, the earliest or the worst first; none if it is about the whole run.
        message: What was seen, in a sentence with its numbers.
        advice: The usual remedy.
        numbers: The numbers in the message, by name.
        tags: Tags and per-layer quantities that show it.
    """

    rule: str
    severity: str
    step: int
    message: str
    advice: str
    layers: tuple[str, ...] = ()
    numbers: dict[str, float] = field(default_factory=dict)
    tags: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Convert for JSON: numbers that are not finite become text."""
        numbers = {name: value if math.isfinite(value) else str(value) for name, value in self.numbers.items()}
        return {**asdict(self), "numbers": numbers}


def name_layers(layers: tuple[str, ...], word: str = "layer") -> str:
    """Name one layer, or the first and how many more."""
    more = len(layers) - 1
    return f"{layers[0]} and {more} more {word}{'s' if more > 1 else ''}" if more else layers[0]
