"""What a finished run logged, from TensorBoard's event files or from CSVLogger's ``metrics.csv``."""

import csv
import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.types_pb2 import DT_FLOAT
from tensorboard.util import tensor_util

from dynamon.arrays import Array
from dynamon.history import RunData, Series

_EVENTS = "*tfevents*"
_TABLE = "metrics.csv"
_PLUGIN = "dynamon"  # of the tensor summaries that hold all layers of a quantity
_LAYERS = "/layers"  # how their tags end
Row = tuple[tuple[str, ...], Array]  # names of layers, and a value of each
Point = tuple[str, int, float | Row]  # tag or quantity, step, what was read
_Points = Iterator[Point]


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
    return _read(Path(folder))[0]


def read_run_data(folder: Path | str) -> RunData:
    """Read scalars and the per-layer tables of a run, at full resolution.

    A table comes from the tensor summaries ``gradient/dual/layers`` of the event files, in model order and to the
    precision of float32; where there are none, as with CSVLogger, from the scalars ``gradient.dual/<layer>``, in
    alphabetical order with numbers by their size, since that logger sorts its columns. Scalars that a table holds are
    not among the scalars.

    Args:
        folder: As for :func:`read_run`. Of several event files the later one counts where both have a step. The
            columns are the layers of the last row, then those that only earlier rows had.

    Raises:
        FileNotFoundError: As :func:`read_run`.
        ValueError: Likewise.
    """
    scalars, rows = _read(Path(folder))
    return assembled(scalars, {quantity: stacked(points) for quantity, points in rows.items()})


def assembled(scalars: dict[str, Series], tables: dict[str, Series]) -> RunData:
    """Sort the scalars of single layers out: a table holds them, or becomes of them where there is none.

    Args:
        scalars: Every scalar series by its tag.
        tables: What tensor summaries hold, by quantity.
    """
    scalars = dict(scalars)
    owners = {_layer_prefix(quantity): quantity for quantity in tables}
    for tag in scalars:  # the quantiles that come with each table
        if tag.endswith("_median") and "/" in tag:
            owners.setdefault(_layer_prefix(tag.removesuffix("_median")), tag.removesuffix("_median"))
    single: dict[str, dict[str, Series]] = {}
    for tag in list(scalars):
        prefix, _, layer = tag.partition("/")
        if prefix in owners:
            single.setdefault(owners[prefix], {})[layer] = scalars.pop(tag)
    joined = {quantity: _joined(columns) for quantity, columns in single.items() if quantity not in tables}
    return RunData(scalars, {**tables, **joined})


def _read(path: Path) -> tuple[dict[str, Series], dict[str, dict[int, Row]]]:
    """Scalars by tag, and rows of tables by quantity and step."""
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a folder.")
    events, table = event_files(path), path / _TABLE
    if not events and not table.exists():
        raise FileNotFoundError(_no_run(path))
    scalars: dict[str, dict[int, float]] = {}
    rows: dict[str, dict[int, Row]] = {}
    for points in [*map(_events, events), *([_rows(table)] if table.exists() else [])]:
        for tag, step, value in points:
            if isinstance(value, tuple):
                rows.setdefault(tag, {})[step] = value
            else:
                scalars.setdefault(tag, {})[step] = value
    return {tag: _series(points) for tag, points in scalars.items()}, rows


def _layer_prefix(quantity: str) -> str:
    return quantity.replace("/", ".")


def stacked(rows: dict[int, Row]) -> Series:
    """Rows of one step each as a table ``[T, L]``; NaN where a row lacks a layer."""
    steps = sorted(rows)
    kinds = dict.fromkeys(rows[step][0] for step in reversed(steps))
    names = tuple(dict.fromkeys(name for kind in kinds for name in kind))
    column = {name: index for index, name in enumerate(names)}
    places = {kind: [column[name] for name in kind] for kind in kinds}
    values = np.full((len(steps), len(names)), np.nan)
    for index, step in enumerate(steps):
        kind, row = rows[step]
        values[index, places[kind]] = row
    return Series(np.array(steps, dtype=np.int64), values, names)


def _joined(columns: dict[str, Series]) -> Series:
    """Series of single layers as a table, NaN where one of them has no value."""
    names = sorted(columns, key=_natural)
    steps = np.unique(np.concatenate([series.steps for series in columns.values()]))
    values = np.full((len(steps), len(names)), np.nan)
    for index, name in enumerate(names):
        values[np.searchsorted(steps, columns[name].steps), index] = columns[name].values
    return Series(steps, values, tuple(names))


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts ``blocks.2`` before ``blocks.10``."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def last_step(run: dict[str, Series]) -> int:
    """Give the last step of a run at which anything was logged."""
    return max(int(series.steps[-1]) for series in run.values())


def event_files(folder: Path) -> list[Path]:
    """The event files of a run in the order in which they were begun.

    Their names hold the time, and a count within a process.
    """
    files = [path for path in folder.glob(_EVENTS) if path.is_file()]
    return sorted(files, key=lambda path: [int(number) for number in re.findall(r"\d+", path.name)])


def _no_run(folder: Path) -> str:
    below = sorted({path.parent for name in (_EVENTS, _TABLE) for path in folder.rglob(name)})
    message = f"{folder} holds neither event files nor {_TABLE}."
    return f"{message} Runs below it: {', '.join(str(path) for path in below[:10])}." if below else message


def _series(points: dict[int, float]) -> Series:
    steps = np.array(sorted(points), dtype=np.int64)
    return Series(steps, np.array([points[step] for step in steps.tolist()], dtype=np.float64))


class EventFile:
    """The points of one event file as they come: what was read once is not read again.

    Scalars as torch writes them (a number) and as TensorFlow does (a tensor, its kind named the first time), and rows
    of tables, whose names may come the first time only, too.

    Args:
        path: The file, which may still grow.

    Attributes:
        path: The file.
        offset: Where the next record begins, in bytes.
    """

    def __init__(self, path: Path) -> None:
        """Nothing is read yet."""
        self.path = path
        self.offset = 0
        self._is_damaged = False
        self._scalars: set[str] = set()
        self._layers: dict[str, tuple[bytes, tuple[str, ...]]] = {}

    def records(self) -> Iterator[list[Point]]:
        """Yield the points of each whole record behind ``offset``, which moves along.

        A record that is cut off is read another time, when it is whole; what follows a damaged one is lost.

        Raises:
            OSError: If the file cannot be read.
        """
        if self._is_damaged or self.path.stat().st_size <= self.offset:
            return
        for record in self._raw():
            try:
                event = Event.FromString(record)
            except DecodeError:
                self._is_damaged = True
                return
            yield list(self._points(event))

    def _raw(self) -> Iterator[bytes]:
        """The records of a TFRecord file: length, its checksum, data, their checksum.

        TensorBoard's own reader takes the checksums in Python, which is seven tenths of its time.
        """
        left = self.path.stat().st_size - self.offset
        with self.path.open("rb") as file:
            file.seek(self.offset)
            while len(header := file.read(12)) == 12:
                (length,) = struct.unpack("<Q", header[:8])
                left -= length + 16
                if left < 0:
                    return
                record = file.read(length + 4)[:length]
                self.offset += length + 16
                yield record

    def _points(self, event: Event) -> Iterator[Point]:
        for value in event.summary.value:
            if value.HasField("simple_value"):
                yield value.tag, event.step, value.simple_value
                continue
            plugin = value.metadata.plugin_data
            if plugin.plugin_name == "scalars":
                self._scalars.add(value.tag)
            elif plugin.plugin_name == _PLUGIN and self._layers.get(value.tag, (b"",))[0] != plugin.content:
                self._layers[value.tag] = plugin.content, _layer_names(plugin.content)
            try:
                if value.tag in self._scalars:
                    yield value.tag, event.step, float(tensor_util.make_ndarray(value.tensor))
                elif value.tag in self._layers:
                    names, row = self._layers[value.tag][1], _row(value.tensor)
                    if len(names) == len(row):
                        yield value.tag.removesuffix(_LAYERS), event.step, (names, row)
            except (TypeError, ValueError):  # not the tensor that its metadata promise
                continue


def _layer_names(content: bytes) -> tuple[str, ...]:
    """The names in a table's metadata; none where it is not as the recorder writes it."""
    try:
        return tuple(map(str, json.loads(content)["layers"]))
    except (ValueError, KeyError, TypeError):
        return ()


def _row(tensor: Any) -> Array:
    content = tensor.tensor_content
    if content and tensor.dtype == DT_FLOAT:  # as it is written; several times faster than make_ndarray
        return np.frombuffer(content, dtype="<f4")
    return np.ravel(tensor_util.make_ndarray(tensor)).astype(np.float64)


def _events(path: Path) -> _Points:
    for points in EventFile(path).records():
        yield from points


def _rows(path: Path) -> _Points:
    with path.open(newline="") as file:
        rows = csv.reader(file)
        header = next(rows, [])
        if "step" not in header:
            raise ValueError(f"{path} has no column 'step', so it is not what CSVLogger writes.")
        where = header.index("step")
        for row in rows:
            step = _number(row[where]) if len(row) > where else None  # cut off where the run was killed
            if step is None or not abs(step) < 2**63:  # not a number, or none of a step
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
