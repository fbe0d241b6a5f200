"""Where readings go: every logger, the history, and Lightning's own metrics."""

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_TENSOR, Summary, SummaryMetadata
from tensorboard.util.tensor_util import make_tensor_proto

from dynamon.monitoring.budget import Budget
from dynamon.monitoring.writers import Writer, writer_for
from dynamon.quantities.histograms import Histogram
from dynamon.runs.history import History

MAX_LAYER_TAGS = 400  # per-layer scalars a callback writes; TensorBoard slows down beyond a few hundred
_QUANTILES = {"p10": 0.1, "median": 0.5, "p90": 0.9}


class Recorder:
    """Collects the readings of one step, and hands them on together: one row a step for each logger.

    What is collected belongs to one measurement, until :meth:`keep` says that it came to its end or :meth:`forget`
    that it did not. :meth:`flush` writes what was kept to the history and to Lightning's metrics, and adds it to the
    row that the callbacks of a Trainer send to its loggers together, see :class:`Row`.

    Args:
        loggers: Names of loggers to write to (``"tensorboard"``, ``"csv"``, a class name or a part of it), classes or
            the loggers themselves; None for all.
        quantities: Number of per-layer quantities that will come, which decides whether each layer gets
            scalars of its own or only the quantiles and the tensor summary.
        strict: Raise what a logger raises, instead of warning once and going on.

    Attributes:
        history: Everything handed on so far.
        failures: Calls of loggers that failed so far.
    """

    def __init__(self, loggers: Sequence[Any] | None, quantities: int, strict: bool = False) -> None:
        """Start with nothing collected."""
        self.history = History()
        self.failures = 0
        self.strict, self._told = strict, set[str]()
        self._wanted = loggers
        self._quantities = max(quantities, 1)
        self._collected, self._kept = _Readings(), _Readings()

    def check(self, trainer: pl.Trainer) -> None:
        """Say which asked-for logger the Trainer does not have.

        Raises:
            ValueError: Naming it and those there are.
        """
        for wanted in self._wanted or ():
            if not any(_is_called(logger, wanted) for logger in trainer.loggers):
                there = ", ".join(type(logger).__name__ for logger in trainer.loggers) or "none"
                raise ValueError(f"loggers={wanted!r} matches no logger of the Trainer, which has: {there}.")

    def scalars(self, values: Mapping[str, float], headline: bool = False) -> None:
        """Add scalars by tag; headlines also enter ``trainer.callback_metrics``."""
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
        """What was collected is complete."""
        self._kept.add(self._collected)
        self._collected = _Readings()

    def forget(self) -> None:
        """Drop what was collected: the measurement did not come to its end."""
        self._collected = _Readings()

    def forget_step(self) -> None:
        """Drop what was kept as well: the step did not come to its end, or is undone."""
        self._collected, self._kept = _Readings(), _Readings()

    def flush(self, trainer: pl.Trainer, step: int, budget: Budget) -> None:
        """Write what was kept to the history and the metrics, and add it to the row of this step.

        Args:
            trainer: The Trainer.
            step: The step.
            budget: Books what the loggers take.
        """
        self.keep()
        kept, self._kept = self._kept, _Readings()
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
        trainer.callback_metrics.update({tag: torch.tensor(value) for tag, value in kept.headlines.items()})
        Row.of(trainer).add(self, step, self._with_layers(kept), kept, budget)

    def _with_layers(self, kept: "_Readings") -> dict[str, float]:
        """The scalars, and those of single layers where they are not too many."""
        found = dict(kept.scalars)
        for quantity, (values, names) in kept.tables.items():
            if len(names) * self._quantities <= MAX_LAYER_TAGS:
                pairs = zip(names, values.tolist(), strict=True)
                found |= {layer_tag(quantity, name): v for name, v in pairs if np.isfinite(v)}
        return found

    def writes_to(self, logger: Logger) -> bool:
        """Whether a logger is one of those that were asked for."""
        return self._wanted is None or any(_is_called(logger, wanted) for wanted in self._wanted)

    def failed(self, logger: Logger, error: Exception) -> None:
        """A logger that fails costs a count, one warning, and what it should have written."""
        self.failures += 1
        name = type(logger).__name__
        if name not in self._told:
            self._told.add(name)
            line = (str(error).strip() or type(error).__name__).splitlines()[0]
            rank_zero_warn(
                f"{name} failed to write dynamon's readings: {line} Training goes on, and so do other loggers; "
                "every reading is in .history."
            )


@dataclass
class _Readings:
    """What was read at one step."""

    scalars: dict[str, float] = field(default_factory=dict)
    headlines: dict[str, float] = field(default_factory=dict)
    tables: dict[str, tuple[NDArray[Any], tuple[str, ...]]] = field(default_factory=dict)
    histograms: dict[str, Histogram] = field(default_factory=dict)

    def add(self, other: "_Readings") -> None:
        self.scalars |= other.scalars
        self.headlines |= other.headlines
        self.tables |= other.tables
        self.histograms |= other.histograms


@dataclass
class _Part:
    """What one callback adds to a row."""

    recorder: Recorder
    scalars: dict[str, float]  # those of single layers included
    readings: _Readings
    budget: Budget


class Row:
    """What all dynamon callbacks of a Trainer have measured at a step, on its way to the loggers.

    Trackers that count rows (W&B) and tables with a row a call (CSV) get one for a step, whoever measured.
    """

    def __init__(self) -> None:
        """Nothing yet."""
        self._step = 0
        self._parts: list[_Part] = []
        self._writers: WeakKeyDictionary[Logger, Writer] = WeakKeyDictionary()

    @staticmethod
    def of(trainer: pl.Trainer) -> "Row":
        """The one of a Trainer."""
        if trainer not in _rows:
            _rows[trainer] = Row()
        return _rows[trainer]

    @property
    def is_empty(self) -> bool:
        """Whether nothing waits to be sent."""
        return not self._parts

    def add(
        self, recorder: Recorder, step: int, scalars: dict[str, float], readings: _Readings, budget: Budget
    ) -> None:
        """Add what a callback has measured; a later one at the same step joins it."""
        self._step = step
        self._parts.append(_Part(recorder, scalars, readings, budget))

    def send(self, trainer: pl.Trainer) -> None:
        """Write to every logger; each callback's budget is charged by how much of the row is its own.

        Raises:
            Exception: What a logger raised, where one of the callbacks is strict.
        """
        parts, self._parts = self._parts, []
        if not parts:
            return
        begin = time.perf_counter()
        try:
            for logger in trainer.loggers:
                self._send_to(logger, [part for part in parts if part.recorder.writes_to(logger)], trainer)
        finally:
            seconds, everything = time.perf_counter() - begin, sum(len(part.scalars) for part in parts)
            for part in parts:
                part.budget.book("loggers", seconds * len(part.scalars) / max(everything, 1))

    def _send_to(self, logger: Logger, parts: Sequence[_Part], trainer: pl.Trainer) -> None:
        if not parts:
            return
        try:
            writer = self._writers.setdefault(logger, writer_for(logger))
            writer.write({tag: value for part in parts for tag, value in part.scalars.items()}, self._step)
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                for part in parts:
                    _add_to_tensorboard(logger, part.readings, self._step)
        except Exception as error:
            if any(part.recorder.strict for part in parts):
                raise
            parts[0].recorder.failed(logger, error)

    def close(self) -> None:
        """The step is over: what a tracker still holds open ends here, before the user writes the next row."""
        for writer in list(self._writers.values()):
            with suppress(Exception):  # the row itself was written
                writer.close()


_rows: "WeakKeyDictionary[pl.Trainer, Row]" = WeakKeyDictionary()


def layer_tag(quantity: str, layer: str) -> str:
    """The scalar tag of one layer: ``gradient/dual`` of ``head.weight`` is ``gradient.dual/head.weight``."""
    return f"{quantity.replace('/', '.')}/{layer}"


def _is_called(logger: Logger, wanted: Any) -> bool:
    if isinstance(wanted, type):
        return isinstance(logger, wanted)
    return wanted.lower() in type(logger).__name__.lower() if isinstance(wanted, str) else logger is wanted


def _add_to_tensorboard(logger: TensorBoardLogger, readings: _Readings, step: int) -> None:
    """Tables and histograms, which other loggers cannot take."""
    for quantity, (values, names) in readings.tables.items():
        _add_table(logger, quantity, values, names, step)
    for tag, histogram in readings.histograms.items():
        _add_histogram(logger, tag, histogram, step)


def _add_table(logger: TensorBoardLogger, quantity: str, values: NDArray[Any], names: Sequence[str], step: int) -> None:
    """All layers of a quantity as one tensor summary, their names in its metadata."""
    metadata = SummaryMetadata(
        plugin_data=SummaryMetadata.PluginData(
            plugin_name="dynamon", content=json.dumps({"layers": list(names)}).encode()
        ),
        data_class=DATA_CLASS_TENSOR,
    )
    proto = make_tensor_proto(values.astype(np.float32))
    summary = Summary(value=[Summary.Value(tag=f"{quantity}/layers", tensor=proto, metadata=metadata)])
    writer: Any = logger.experiment
    writer._get_file_writer().add_summary(summary, step)


def _add_histogram(logger: TensorBoardLogger, tag: str, histogram: Histogram, step: int) -> None:
    limits, counts = histogram.buckets()
    logger.experiment.add_histogram_raw(
        tag,
        min=histogram.minimum,
        max=histogram.maximum,
        num=histogram.count,
        sum=histogram.total,
        sum_squares=histogram.squares,
        bucket_limits=limits.tolist(),
        bucket_counts=counts.tolist(),
        global_step=step,
    )
