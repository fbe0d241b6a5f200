"""Collect the readings of a step for the history, the loop's own metrics, and the row that is written."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynamon.monitoring.budget import Budget
from dynamon.monitoring.failures import first_line
from dynamon.monitoring.loop import Loop
from dynamon.monitoring.messages import rank_zero_warn
from dynamon.monitoring.writers import Writer
from dynamon.quantities import REGISTRY
from dynamon.quantities.histograms import Histogram
from dynamon.runs.history import History

MAX_LAYER_TAGS = 400  # scalars of single rows that a callback writes; TensorBoard slows down beyond a few hundred
_QUANTILES = {"p10": 0.1, "median": 0.5, "p90": 0.9}


class Recorder:
    """Collects the readings of one step, and hands them on together: one row per step for each logger.

    What is collected belongs to one measurement, until :meth:`keep` says that it came to its end or :meth:`forget`
    that it did not. :meth:`flush` writes what was kept to the history and to the metrics of the loop, and adds it to
    the row that all monitors of the loop send together, see :class:`dynamon.monitoring.row.Row`.

    Args:
        loggers: Names of loggers to write to (``"tensorboard"``, ``"csv"``, a class name or a part of it), classes or
            the loggers themselves; None for all.
        quantities: Tags of the per-layer quantities that will come. How many have the same rows (layers, modules,
            heads) decides whether each row gets scalars of its own or only the quantiles and the tensor summary.
        strict: Raise what a logger raises, instead of warning once and going on.

    Attributes:
        history: Everything handed on so far.
        failures: Calls of loggers that failed so far.
    """

    def __init__(self, loggers: Sequence[Any] | None, quantities: Iterable[str], strict: bool = False) -> None:
        """Start with nothing collected."""
        self.history = History()
        self.failures = 0
        self.strict, self._told = strict, set[str]()
        self._wanted = loggers
        self._quantities = Counter(map(_rows_of, quantities))
        self._collected, self._kept = Readings(), Readings()

    def check(self, loop: Loop) -> None:
        """Say which logger was asked for that the loop does not have.

        Raises:
            ValueError: Naming it and those there are.
        """
        for wanted in self._wanted or ():
            if not any(writer.is_called(wanted) for writer in loop.writers):
                there = ", ".join(writer.name for writer in loop.writers) or "none"
                raise ValueError(f"loggers={wanted!r} matches no logger of {loop.name}, which has: {there}.")

    def scalars(self, values: Mapping[str, float], headline: bool = False) -> None:
        """Add scalars by tag; headlines also enter the metrics of the loop."""
        self._collected.scalars.update(values)
        if headline:
            self._collected.headlines.update(values)

    def layers(self, quantity: str, values: NDArray[Any], names: Sequence[str]) -> None:
        """Add one number a layer of a quantity like ``"gradient/dual"``; NaN where a layer has none."""
        self._collected.tables[quantity] = (np.asarray(values, dtype=np.float64), tuple(names))

    def histograms(self, quantity: str, values: Sequence[Histogram], names: Sequence[str]) -> None:
        """Add one histogram a layer, for TensorBoard only; a tensor without a finite entry has none."""
        own = zip(names, values, strict=True)
        self._collected.histograms |= {f"{quantity}/{name}": histogram for name, histogram in own if histogram.count}

    def keep(self) -> None:
        """Keep what was collected: it is complete."""
        self._kept.add(self._collected)
        self._collected = Readings()

    def forget(self) -> None:
        """Drop what was collected: the measurement did not come to its end."""
        self._collected = Readings()

    def forget_step(self) -> None:
        """Drop what was kept as well: the step did not come to its end, or is undone."""
        self._collected, self._kept = Readings(), Readings()

    def flush(self, loop: Loop, step: int, budget: Budget) -> None:
        """Write what was kept to the history and the metrics, and add it to the row of this step.

        Args:
            loop: The training loop.
            step: The step.
            budget: Books what the loggers take.
        """
        self.keep()
        kept, self._kept = self._kept, Readings()
        self._hand_on(loop, step, budget, kept)

    def hand_on(
        self,
        loop: Loop,
        step: int,
        budget: Budget,
        scalars: dict[str, float],
        tables: dict[str, tuple[NDArray[Any], tuple[str, ...]]],
        headlines: Sequence[str] = (),
    ) -> None:
        """Write readings that are complete, beside those that are being collected; see :meth:`flush`.

        Args:
            loop: The training loop.
            step: The step that they are of, which may have passed.
            budget: Books what the loggers take.
            scalars: Numbers by tag.
            tables: Numbers by layer and the layers' names, by quantity.
            headlines: Tags that also enter the metrics of the loop.
        """
        top = {tag: scalars[tag] for tag in headlines if tag in scalars}
        self._hand_on(loop, step, budget, Readings(scalars, top, tables))

    def _hand_on(self, loop: Loop, step: int, budget: Budget, kept: "Readings") -> None:
        for quantity, (values, names) in kept.tables.items():
            self.history.add(quantity, step, values, names)
            known = values[np.isfinite(values)]
            if len(known):
                kept.scalars |= {f"{quantity}_{name}": float(np.quantile(known, q)) for name, q in _QUANTILES.items()}
        kept.tables = {q: row for q, row in kept.tables.items() if np.isfinite(row[0]).any()}
        for tag, value in kept.scalars.items():
            self.history.add(tag, step, value)
        if not kept.scalars and not kept.tables:
            return
        loop.publish(kept.headlines)
        loop.row.add(self, step, self._with_layers(kept), kept, budget)

    def _with_layers(self, kept: "Readings") -> dict[str, float]:
        """The scalars, and those of single layers where they are not too many."""
        found = dict(kept.scalars)
        for quantity, (values, names) in kept.tables.items():
            if len(names) * max(self._quantities[_rows_of(quantity)], 1) <= MAX_LAYER_TAGS:
                pairs = zip(names, values.tolist(), strict=True)
                found |= {layer_tag(quantity, name): v for name, v in pairs if np.isfinite(v)}
        return found

    @property
    def writes_to_all(self) -> bool:
        """Return whether nobody asked for certain loggers."""
        return self._wanted is None

    def writes_to(self, writer: Writer) -> bool:
        """Return whether a writer is one of those that were asked for."""
        return self._wanted is None or any(writer.is_called(wanted) for wanted in self._wanted)

    def failed(self, writer: Writer, error: Exception) -> None:
        """Count a logger that failed, and say so once; what it should have written is lost to it."""
        self.failures += 1
        if writer.name not in self._told:
            self._told.add(writer.name)
            rank_zero_warn(
                f"{writer.name} failed to write dynamon's readings: {first_line(error)} Training goes on, and so do "
                "other loggers; every reading is in .history."
            )


@dataclass
class Readings:
    """Hold what was read at one step."""

    scalars: dict[str, float] = field(default_factory=dict)
    headlines: dict[str, float] = field(default_factory=dict)
    tables: dict[str, tuple[NDArray[Any], tuple[str, ...]]] = field(default_factory=dict)
    histograms: dict[str, Histogram] = field(default_factory=dict)

    def add(self, other: "Readings") -> None:
        """Join the readings of another measurement."""
        self.scalars |= other.scalars
        self.headlines |= other.headlines
        self.tables |= other.tables
        self.histograms |= other.histograms

    def write_layers(self, writer: Writer, step: int) -> None:
        """Write tables and histograms, for which not every writer has a place."""
        for quantity, (values, names) in self.tables.items():
            writer.write_table(quantity, values, names, step)
        for tag, histogram in self.histograms.items():
            writer.write_histogram(tag, histogram, step)


def _rows_of(quantity: str) -> str:
    """Return what the rows of a quantity are."""
    return REGISTRY[quantity].rows if quantity in REGISTRY else "layer"


def layer_tag(quantity: str, layer: str) -> str:
    """The scalar tag of one layer: ``gradient/dual`` of ``head.weight`` is ``gradient.dual/head.weight``."""
    return f"{quantity.replace('/', '.')}/{layer}"
