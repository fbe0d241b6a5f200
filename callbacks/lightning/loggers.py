"""Write rows of readings to Lightning's loggers, where trackers have ways of their own."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from dynamon.monitoring.alerts_thread import Recipient
from dynamon.monitoring.alerts_trackers import recipient_of
from dynamon.monitoring.writers import EventWriter, Writer

_X_AXIS = "trainer/global_step"  # what Lightning writes beside the metrics of a row
_FORBIDDEN = re.compile(r"[^a-zA-Z0-9_/. -]")  # in MLflow's names
_LONGEST = 250  # of MLflow's names


class LoggerWriter(Writer):
    """Writes rows to any logger."""

    def write(self, row: Mapping[str, float], step: int) -> None:
        """Write numbers by tag."""
        self.target.log_metrics(row, step=step)

    def recipient(self) -> Recipient | None:
        """Return who sends alerts, where the experiment is a run of W&B or Trackio."""
        return recipient_of(getattr(self.target, "experiment", None))


class _InFolder(LoggerWriter):
    """Writes files into a folder of the run."""

    @property
    def folder(self) -> Path | None:  # type: ignore[override]
        """The folder, where it is on a local disk."""
        folder = str(self.target.log_dir)
        return None if "://" in folder else Path(folder)

    def recipient(self) -> Recipient | None:
        """Return None: files tell nobody."""
        return None


class TensorBoardWriter(_InFolder, EventWriter):
    """Writes to TensorBoard, on the first process: on others its ``experiment`` takes nothing."""

    @property
    def events(self) -> Any:
        """The ``SummaryWriter``."""
        return self.target.experiment


class CSVWriter(_InFolder):
    """Saves at once: a new column makes the table be written anew, which belongs to what monitoring costs."""

    def write(self, row: Mapping[str, float], step: int) -> None:
        """Write numbers by tag."""
        super().write(row, step)
        self.target.save()


class MLflowWriter(LoggerWriter):
    """Writes names that MLflow takes as they are, so that two layers never become one metric.

    A character that MLflow removes is written as its code: ``a->b`` is ``a-_x3e_b``. A file store keeps a metric in a
    file and a group in a folder, so that ``lr/base`` and a metric ``lr`` of the user's exclude each other: there the
    group is divided by a dot, ``lr.base``. The end of a name that MLflow finds too long, and refuses the whole row for,
    is replaced by a code of that name.
    """

    def write(self, row: Mapping[str, float], step: int) -> None:
        """Write numbers by tag."""
        in_files, longest = _is_file_store(self.target), _LONGEST - len(_prefix(self.target))
        super().write({mlflow_name(tag, in_files, longest): value for tag, value in row.items()}, step)


class WandbWriter(LoggerWriter):
    """Joins the row that is open, and ends it before the next step, unless somebody else has.

    W&B counts rows, and drops points of the user's whose ``step=`` lies behind that count. A row of our own beside
    those of Lightning and the user would let it run ahead.
    """

    def __init__(self, target: Any) -> None:
        """Start with nothing open."""
        super().__init__(target)
        self._open_at: int | None = None

    def write(self, row: Mapping[str, float], step: int) -> None:
        """Write numbers by tag."""
        run = self.target.experiment
        count = _row_count(run)
        if count is None:
            return super().write(row, step)
        given = {f"{_prefix(self.target)}{tag}": value for tag, value in row.items()}
        run.log({**given, _X_AXIS: step}, commit=False)
        self._open_at = count

    def close_row(self) -> None:
        """End the row, if it is still open."""
        if self._open_at is None:
            return
        run, open_at, self._open_at = self.target.experiment, self._open_at, None
        if _row_count(run) == open_at:
            run.log({}, commit=True)


_WRITERS: dict[type[Logger], type[LoggerWriter]] = {
    CSVLogger: CSVWriter,
    MLFlowLogger: MLflowWriter,
    TensorBoardLogger: TensorBoardWriter,
    WandbLogger: WandbWriter,
}


def writer_for(logger: Logger) -> Writer:
    """Make what writes to a logger."""
    kind = next((writer for cls, writer in _WRITERS.items() if isinstance(logger, cls)), LoggerWriter)
    return kind(logger)


def mlflow_name(tag: str, in_files: bool = False, longest: int = _LONGEST) -> str:
    """A tag as MLflow takes it; different ones for different tags.

    Args:
        tag: The tag.
        in_files: Whether the store keeps metrics in files.
        longest: Characters that a name may have.
    """
    group, _, name = tag.partition("/")
    name = name.replace("/", "_x2f_")  # a name inside a group is no group
    name = _FORBIDDEN.sub(lambda found: f"_x{ord(found[0]):x}_", f"{group}{'.' if in_files else '/'}{name}")
    code = f"_{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    return name if len(name) <= longest else f"{name[: longest - len(code)]}{code}"


def _prefix(logger: Any) -> str:
    """Return what Lightning puts before each name."""
    prefix = getattr(logger, "_prefix", "")
    return f"{prefix}{logger.LOGGER_JOIN_CHAR}" if prefix else ""


def _is_file_store(logger: Any) -> bool:
    uri = str(getattr(logger, "_tracking_uri", "") or "")
    return "://" not in uri or uri.startswith("file:")


def _row_count(run: Any) -> int | None:
    """Return how many rows there are; None where W&B does not say: shared, disabled, or synced from TensorBoard."""
    try:
        import wandb

        count = run.step
    except Exception:  # W&B raises errors of its own kinds, or is not installed
        return None
    return count if isinstance(count, int) and not wandb.patched["tensorboard"] else None
