"""What a finished run logged, from TensorBoard's event files or from CSVLogger's ``metrics.csv``."""

import csv
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.util import tensor_util

from dynamon.history import Series

_EVENTS = "*tfevents*"
_TABLE = "metrics.csv"
_Points = Iterator[tuple[str, int, float]]


def read_run(folder: Path | str) -> dict[str, Series]:
    """Read all scalars that a run logged, at full resolution.

    Args:
        folder: The run's own folder, which holds event files, ``metrics.csv`` or both. Of several event files, as a
            resumed run leaves them, the later one counts where both have a step; ``metrics.csv``, which is not rounded
            to float32, counts before event files.

    Returns:
        The series of each tag, its steps increasing; values may be NaN.

    Raises:
        FileNotFoundError: If there is no such folder, or no run in it; the message names runs further down.
        ValueError: If ``metrics.csv`` has no column ``step``.

    Cost: a pass over the files in Python, some hundred thousand values a second.
    """
    path = Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a folder.")
    events, table = _event_files(path), path / _TABLE
    if not events and not table.exists():
        raise FileNotFoundError(_no_run(path))
    found: dict[str, dict[int, float]] = {}
    for file in events:
        _collect(found, _events(file))
    if table.exists():
        _collect(found, _rows(table))
    return {tag: _series(points) for tag, points in found.items()}


def last_step(run: dict[str, Series]) -> int:
    """Give the last step of a run at which anything was logged."""
    return max(int(series.steps[-1]) for series in run.values())


def _event_files(folder: Path) -> list[Path]:
    """In the order in which they were begun: their names hold the time, and a count within a process."""
    files = [path for path in folder.glob(_EVENTS) if path.is_file()]
    return sorted(files, key=lambda path: [int(number) for number in re.findall(r"\d+", path.name)])


def _no_run(folder: Path) -> str:
    below = sorted({path.parent for name in (_EVENTS, _TABLE) for path in folder.rglob(name)})
    message = f"{folder} holds neither event files nor {_TABLE}."
    return f"{message} Runs below it: {', '.join(str(path) for path in below[:10])}." if below else message


def _collect(found: dict[str, dict[int, float]], points: _Points) -> None:
    for tag, step, value in points:
        found.setdefault(tag, {})[step] = value


def _series(points: dict[int, float]) -> Series:
    steps = np.array(sorted(points), dtype=np.int64)
    return Series(steps, np.array([points[step] for step in steps.tolist()], dtype=np.float64))


def _events(path: Path) -> _Points:
    """Scalars as torch writes them (a number) and as TensorFlow does (a tensor, its kind named the first time)."""
    scalars: set[str] = set()
    for record in _records(path):
        try:
            event = Event.FromString(record)
        except DecodeError:  # damaged, and whatever follows with it
            return
        for value in event.summary.value:
            if value.HasField("simple_value"):
                yield value.tag, event.step, value.simple_value
                continue
            if value.metadata.plugin_data.plugin_name == "scalars":
                scalars.add(value.tag)
            if value.tag in scalars:
                yield value.tag, event.step, float(tensor_util.make_ndarray(value.tensor))


def _records(path: Path) -> Iterator[bytes]:
    """The records of a TFRecord file: length, its checksum, data, their checksum; up to where it was cut off.

    TensorBoard's own reader takes the checksums in Python, which is seven tenths of its time.
    """
    left = path.stat().st_size
    with path.open("rb") as file:
        while len(header := file.read(12)) == 12:
            (length,) = struct.unpack("<Q", header[:8])
            left -= length + 16
            if left < 0:
                return
            yield file.read(length + 4)[:length]


def _rows(path: Path) -> _Points:
    with path.open(newline="") as file:
        rows = csv.reader(file)
        header = next(rows, [])
        if "step" not in header:
            raise ValueError(f"{path} has no column 'step', so it is not what CSVLogger writes.")
        where = header.index("step")
        for row in rows:
            step = _number(row[where]) if len(row) > where else None  # cut off where the run was killed
            if step is None or not np.isfinite(step):
                continue
            for tag, cell in zip(header, row, strict=False):
                value = None if tag == "step" else _number(cell)
                if value is not None:
                    yield tag, int(step), value


def _number(cell: str) -> float | None:
    """None for an empty cell and for text."""
    try:
        return float(cell) if cell else None
    except ValueError:
        return None
