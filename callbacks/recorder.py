"""Where readings go: every logger, the history, and Lightning's own metrics."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_TENSOR, Summary, SummaryMetadata
from tensorboard.util.tensor_util import make_tensor_proto

from dynamon.arrays import Array
from dynamon.histograms import Histogram
from dynamon.history import History

MAX_LAYER_TAGS = 400  # per-layer scalars a callback writes; TensorBoard slows down beyond a few hundred
_QUANTILES = {"p10": 0.1, "median": 0.5, "p90": 0.9}


class Recorder:
    """Collects the readings of one step and hands them on in one call to each logger.

    Args:
        loggers: Names of loggers to write to (``"tensorboard"``, ``"csv"``, a class name or a part of it), or
            None for all.
        quantities: Number of per-layer quantities that will come, which decides whether each layer gets
            scalars of its own or only the quantiles and the tensor summary.
        strict: Raise what a logger raises, instead of warning once and going on.

    Attributes:
        history: Everything handed on so far.
        failures: Calls of loggers that failed so far.
    """

    def __init__(self, loggers: Sequence[str] | None, quantities: int, strict: bool = False) -> None:
        """Start with nothing collected."""
        self.history = History()
        self.failures = 0
        self._strict, self._told = strict, set[str]()
        self._wanted = loggers
        self._quantities = max(quantities, 1)
        self._scalars: dict[str, float] = {}
        self._headlines: dict[str, float] = {}
        self._tables: dict[str, tuple[Array, tuple[str, ...]]] = {}
        self._histograms: dict[str, Histogram] = {}

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
        self._scalars.update(values)
        if headline:
            self._headlines.update(values)

    def layers(self, quantity: str, values: Array, names: Sequence[str]) -> None:
        """Add one number a layer of a quantity like ``"gradient/dual"``; NaN where a layer has none."""
        self._tables[quantity] = (np.asarray(values, dtype=np.float64), tuple(names))

    def histograms(self, quantity: str, values: Sequence[Histogram], names: Sequence[str]) -> None:
        """Add one histogram a layer, for TensorBoard only; a tensor without a finite entry has none."""
        own = zip(names, values, strict=True)
        self._histograms |= {f"{quantity}/{name}": histogram for name, histogram in own if histogram.count}

    def forget(self) -> None:
        """Drop what was collected: the measurement did not come to its end."""
        self._scalars, self._headlines, self._tables, self._histograms = {}, {}, {}, {}

    def flush(self, trainer: pl.Trainer, step: int) -> None:
        """Write what was collected to the history, the metrics and the loggers."""
        scalars, headlines, tables = self._scalars, self._headlines, self._tables
        histograms, self._histograms = self._histograms, {}
        self._scalars, self._headlines, self._tables = {}, {}, {}
        for quantity, (values, names) in tables.items():
            self.history.add(quantity, step, values, names)
            known = values[np.isfinite(values)]
            if len(known):
                scalars |= {f"{quantity}_{name}": float(np.quantile(known, q)) for name, q in _QUANTILES.items()}
        tables = {q: (values, names) for q, (values, names) in tables.items() if np.isfinite(values).any()}
        for tag, value in scalars.items():
            self.history.add(tag, step, value)
        if not scalars and not tables:
            return
        trainer.callback_metrics.update({tag: torch.tensor(value) for tag, value in headlines.items()})
        per_layer = dict(scalars)
        for quantity, (values, names) in tables.items():
            if len(names) * self._quantities <= MAX_LAYER_TAGS:
                pairs = zip(names, values.tolist(), strict=True)
                per_layer |= {layer_tag(quantity, name): v for name, v in pairs if np.isfinite(v)}
        for logger in self._loggers(trainer):
            with self._guarded(logger):
                logger.log_metrics(per_layer, step=step)
                if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                    for quantity, (values, names) in tables.items():
                        _add_table(logger, quantity, values, names, step)
                    for tag, histogram in histograms.items():
                        _add_histogram(logger, tag, histogram, step)

    @contextmanager
    def _guarded(self, logger: Logger) -> Iterator[None]:
        """A logger that fails costs a count, one warning, and what it should have written."""
        try:
            yield
        except Exception as error:
            if self._strict:
                raise
            self.failures += 1
            name = type(logger).__name__
            if name not in self._told:
                self._told.add(name)
                line = (str(error).strip() or type(error).__name__).splitlines()[0]
                rank_zero_warn(
                    f"{name} failed to write dynamon's readings: {line} Training goes on, and so do other loggers; "
                    "every reading is in .history."
                )

    def _loggers(self, trainer: pl.Trainer) -> list[Logger]:
        if self._wanted is None:
            return list(trainer.loggers)
        return [logger for logger in trainer.loggers if any(_is_called(logger, name) for name in self._wanted)]


def layer_tag(quantity: str, layer: str) -> str:
    """The scalar tag of one layer: ``gradient/dual`` of ``head.weight`` is ``gradient.dual/head.weight``."""
    return f"{quantity.replace('/', '.')}/{layer}"


def _is_called(logger: Logger, name: str) -> bool:
    return name.lower() in type(logger).__name__.lower()


def _add_table(logger: TensorBoardLogger, quantity: str, values: Array, names: Sequence[str], step: int) -> None:
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
