"""Write rows of readings: the protocol, and event files for TensorBoard."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_TENSOR, Summary, SummaryMetadata
from tensorboard.util.tensor_util import make_tensor_proto

from dynamon.board.custom_scalars import Layout
from dynamon.monitoring.alerts_thread import Recipient
from dynamon.quantities.histograms import Histogram


class Writer:
    """Writes rows of numbers; a subclass knows to what.

    Args:
        target: What is written to. Users choose it by (part of) its class name, its class, or itself.

    Attributes:
        folder: The folder of the run, where files may be put beside those of the target; None without one.
    """

    folder: Path | None = None

    def __init__(self, target: Any) -> None:
        """Remember it."""
        self.target = target

    @property
    def name(self) -> str:
        """Class name of the target, for messages."""
        return type(self.target).__name__

    def is_called(self, wanted: Any) -> bool:
        """Return whether a user means this writer by a class, (part of) a class name, or an object."""
        if isinstance(wanted, type):
            return isinstance(self.target, wanted)
        return wanted.lower() in self.name.lower() if isinstance(wanted, str) else self.target is wanted

    def write(self, row: Mapping[str, float], step: int) -> None:
        """Write numbers by tag."""

    def write_table(self, quantity: str, values: NDArray[Any], names: Sequence[str], step: int) -> None:
        """Write one number a layer; for writers that have a place for it."""

    def write_histogram(self, tag: str, histogram: Histogram, step: int) -> None:
        """Write a histogram; for writers that have a place for it."""

    def write_layout(self, layout: Layout) -> None:
        """Write which charts there are; for writers that have a place for it."""

    def close_row(self) -> None:
        """End what is still open of the row."""

    def recipient(self) -> Recipient | None:
        """Return who sends alerts; None for writers that cannot."""
        return None


class EventWriter(Writer):
    """Writes event files through a ``SummaryWriter``: scalars, one tensor per quantity for all layers, histograms."""

    @property
    def events(self) -> Any:
        """The ``SummaryWriter``."""
        return self.target

    def write(self, row: Mapping[str, float], step: int) -> None:
        """Write numbers by tag."""
        for tag, value in row.items():
            self.events.add_scalar(tag, value, step)

    def write_table(self, quantity: str, values: NDArray[Any], names: Sequence[str], step: int) -> None:
        """Write all layers of a quantity as one tensor summary, their names in its metadata."""
        content = json.dumps({"layers": list(names)}).encode()
        metadata = SummaryMetadata(
            plugin_data=SummaryMetadata.PluginData(plugin_name="dynamon", content=content),
            data_class=DATA_CLASS_TENSOR,
        )
        proto = make_tensor_proto(values.astype(np.float32))
        summary = Summary(value=[Summary.Value(tag=f"{quantity}/layers", tensor=proto, metadata=metadata)])
        self.events._get_file_writer().add_summary(summary, step)

    def write_histogram(self, tag: str, histogram: Histogram, step: int) -> None:
        """Write the bins."""
        limits, counts = histogram.buckets()
        self.events.add_histogram_raw(
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

    def write_layout(self, layout: Layout) -> None:
        """Write the charts of the Custom Scalars tab."""
        self.events.add_custom_scalars(layout)


class FolderWriter(EventWriter):
    """Writes event files into a folder, for loops that have no logger.

    Args:
        folder: Where; made with the first row.
    """

    def __init__(self, folder: str | Path) -> None:
        """Start with nothing written."""
        super().__init__(self)
        self.folder = Path(folder)
        self._events: Any = None

    @property
    def events(self) -> Any:
        """The ``SummaryWriter``."""
        if self._events is None:
            from torch.utils.tensorboard import SummaryWriter  # takes long to import

            self._events = SummaryWriter(str(self.folder), flush_secs=10)
        return self._events

    def close(self) -> None:
        """Write what is still in memory."""
        if self._events is not None:
            self._events.close()
