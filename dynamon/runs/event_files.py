"""TensorBoard's event files: their records as they come, and what remains of them once a run was restarted.

The rule is TensorBoard's own. A session start (``SessionLog.START``, which ``SummaryWriter(purge_step=...)`` writes)
removes all earlier points from its step on. Without one, as ``TensorBoardLogger`` leaves it, a point removes the
earlier points of its own tag from its step on: TensorBoard's data server does that, and its ``event_accumulator`` for
files without a version. Files count in the order in which they were begun.
"""

import json
import math
import re
from array import array
from bisect import bisect_left
from collections.abc import Iterator, MutableSequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.types_pb2 import DT_FLOAT
from tensorboard.util import tensor_util

from dynamon.runs.history import Series
from dynamon.runs.renamed import current_tag

_EVENTS = "*tfevents*"
_PLUGIN = "dynamon"  # of the tensor summaries that hold all layers of a quantity
_LAYERS = "/layers"  # how their tags end
_HEADER, _FRAME = 12, 16  # bytes: length and its checksum; with the checksum of the data
_HEAD = 256  # bytes that tell a file from another of the same name: they hold the time it was begun at
_CHUNK = 1 << 20
_LIKELY = re.compile(rb"(?=([\s\S]{3}\x00{5}[\s\S]{4}))")  # the header of a record below 16 MB
Row = tuple[tuple[str, ...], NDArray[Any]]  # names of layers, and a value of each
Point = tuple[str, int, float | Row]  # tag or quantity, step, what was read


class SessionStart(NamedTuple):
    """A writer goes on from here: what earlier ones wrote at this step or later is void."""

    step: int


class EventFile:
    """The records of one event file as they come: what was read once is not read again.

    Scalars as torch writes them (a number) and as TensorFlow does (a tensor, its kind named the first time), and rows
    of tables, whose names may come the first time only, too.

    Args:
        path: The file, which may still grow.

    Attributes:
        path: The file.
        offset: Where the next record begins, in bytes.
        size: How large the file was when it was last looked at, in bytes.
        ended: When the latest record that was read was written, in seconds; -inf before the first.
    """

    def __init__(self, path: Path) -> None:
        """Nothing is read yet."""
        self.path = path
        self.offset = self.size = 0
        self.ended = -math.inf
        self._order: tuple[int, float, list[tuple[int, str]]] | None = None
        self._head = b""
        self._damaged: list[tuple[int, int]] = []  # bytes, from and to
        self._tail: tuple[int, int] | None = None  # the same at the end, where no record was found yet
        self._trouble = ""
        self._scalars: set[str] = set()
        self._layers: dict[str, tuple[bytes, tuple[str, ...]]] = {}

    @property
    def order(self) -> tuple[int, float, list[tuple[int, str]]]:
        """What sorts files as they were begun.

        The second in the name comes first, then the time of the first record, then the name, in which a process that
        begins several within a second counts them.
        """
        if self._order is None:
            second, began = re.search(r"tfevents\.(\d+)", self.path.name), self._first_time()
            order = int(second[1]) if second else 0, math.inf if began is None else began, natural_key(self.path.name)
            if began is None:
                return order
            self._order = order
        return self._order

    @property
    def is_continued(self) -> bool:
        """Whether the file is still the one that was read, not shorter, with the same beginning.

        Raises:
            OSError: If the file is gone, or cannot be read.
        """
        if self.path.stat().st_size < self.offset:
            return False
        with self.path.open("rb") as file:
            return file.read(len(self._head)) == self._head

    @property
    def damage(self) -> list[str]:
        """What could not be read, a sentence each."""
        lost = [*self._damaged, *([self._tail] if self._tail else [])]
        said = [f"{self.path} is damaged: bytes {start} to {stop} were passed over." for start, stop in lost]
        return [*said, *([self._trouble] if self._trouble else [])]

    def records(self) -> Iterator[list[Point | SessionStart]]:
        """Yield what each whole record behind ``offset`` holds; ``offset`` moves along.

        A record that is cut off is read another time, when it is whole. A damaged one is passed over, see ``damage``,
        and so is what follows up to the next that is whole. A file that cannot be read counts as damaged.
        """
        self._trouble = ""
        try:
            for start, record in self._raw():
                try:
                    event = Event.FromString(record)
                except DecodeError:
                    self._damaged.append((start, self.offset))
                    continue
                if event.wall_time > self.ended:
                    self.ended = event.wall_time
                yield list(self._items(event))
        except OSError as error:
            self._trouble = f"{self.path} cannot be read ({error.strerror})."

    def _raw(self) -> Iterator[tuple[int, bytes]]:
        """Place and data of the records of a TFRecord file: length, its checksum, data, their checksum.

        The length's checksum is looked at, since all that follows hangs on it. That of the data is not: in Python it
        would take seven tenths of the time, and TensorBoard's data server leaves it out as well.
        """
        size = self.size = self.path.stat().st_size
        if size <= self.offset:
            return
        with self.path.open("rb") as file:
            if len(self._head) < _HEAD:
                self._head = file.read(_HEAD)
            file.seek(self.offset)
            read = file.read
            while len(header := read(_HEADER)) == _HEADER:
                length = _length(header)
                if length is None:
                    if not self._skip(file, size):
                        return
                    continue
                self._tail = None
                start, stop = self.offset, self.offset + length + _FRAME
                if stop > size:
                    return
                record = read(length + 4)
                if len(record) < length + 4:  # the file has just been cut
                    return
                self.offset = stop
                yield start, record[:length]

    def _skip(self, file: Any, size: int) -> bool:
        """Go on to the next header behind a damaged one; False where there is none yet."""
        place = self._tail[1] - _HEADER + 1 if self._tail else 0
        place = max(place, self.offset + 1)
        while place + _HEADER <= size:
            file.seek(place)
            chunk = file.read(_CHUNK + _HEADER - 1)
            for found in _LIKELY.finditer(chunk):
                if _length(found[1]) is not None:
                    start, self.offset, self._tail = self.offset, place + found.start(), None
                    self._damaged.append((start, self.offset))
                    file.seek(self.offset)
                    return True
            place += _CHUNK
        self._tail = self.offset, size
        return False

    def _first_time(self) -> float | None:
        """When the first record was written; None where there is no whole one yet."""
        try:
            with self.path.open("rb") as file:
                header = file.read(_HEADER)
                length = _length(header) if len(header) == _HEADER else None
                if length is None:
                    return None
                record = file.read(length)
            return float(Event.FromString(record).wall_time) if len(record) == length else None
        except (OSError, DecodeError):
            return None

    def _items(self, event: Event) -> Iterator[Point | SessionStart]:
        step = event.step
        if event.HasField("session_log") and event.session_log.status == SessionLog.START:
            yield SessionStart(step)
        for value in event.summary.value:
            if value.HasField("simple_value"):
                yield current_tag(value.tag), step, value.simple_value
                continue
            plugin = value.metadata.plugin_data
            if plugin.plugin_name == "scalars":
                self._scalars.add(value.tag)
            elif plugin.plugin_name == _PLUGIN and self._layers.get(value.tag, (b"",))[0] != plugin.content:
                self._layers[value.tag] = plugin.content, _layer_names(plugin.content)
            try:
                if value.tag in self._scalars:
                    yield current_tag(value.tag), step, float(tensor_util.make_ndarray(value.tensor))
                elif value.tag in self._layers:
                    names, row = self._layers[value.tag][1], _row(value.tensor)
                    if len(names) == len(row):
                        yield current_tag(value.tag.removesuffix(_LAYERS)), step, (names, row)
            except (TypeError, ValueError):  # not the tensor that its metadata promise
                continue


class EventLog:
    """What remains of the points of several files by TensorBoard's rule, in whatever order they are read.

    Attributes:
        count: How many points and session starts were added.
        purged: The count at which a session start last removed a point; 0 where none did.
        scalars: Curves by tag, those without a point included.
        tables: Curves of rows by quantity, likewise.
    """

    def __init__(self) -> None:
        """Nothing is added yet."""
        self.count = 0
        self.purged = 0
        self.scalars: dict[str, Curve] = {}
        self.tables: dict[str, RowCurve] = {}
        self._starts: dict[EventFile | None, int] = {}

    def add(self, file: EventFile | None, items: list[Point | SessionStart]) -> None:
        """Add what a record holds; ``file`` is None where all points come from one source."""
        for item in items:
            self.count += 1
            if isinstance(item, SessionStart):
                self._start(file, item.step)
                continue
            tag, step, value = item
            is_row = isinstance(value, tuple)
            curve: Curve | None = self.tables.get(tag) if is_row else self.scalars.get(tag)
            if curve is None:
                curve = self._new_curve(tag, is_row)
            curve.add(file, self.count, step, value)

    def _new_curve(self, tag: str, is_of_rows: bool) -> "Curve":
        if is_of_rows:
            return self.tables.setdefault(tag, RowCurve(self._starts))
        return self.scalars.setdefault(tag, Curve(self._starts))

    def _start(self, file: EventFile | None, step: int) -> None:
        curves = (*self.scalars.values(), *self.tables.values())
        sizes = [len(curve) for curve in curves]
        self._starts[file] = min(step, self._starts.get(file, step))
        for curve, size in zip(curves, sizes, strict=True):
            curve.cut(file, step)
            if len(curve) < size:
                curve.rewritten = self.purged = self.count


class Curve:
    """The points of a tag, by files; what remains is a function of the files, not of the order of reading.

    Attributes:
        rewritten: The count at which something other than a point at the end changed.
    """

    def __init__(self, starts: dict["EventFile | None", int]) -> None:
        """No points; ``starts`` holds the lowest session start of each file, for all curves."""
        self.rewritten = 0
        self._starts = starts
        self._parts: dict[EventFile | None, _Part] = {}
        self._growing: _Part | None = None  # the part whose next point, where it is later, comes last of all
        self._whole: _Part | None = None  # what remains of all parts
        self._series: Series | None = None

    def __len__(self) -> int:
        """Number of points that remain."""
        return len(self._remaining().steps)

    def added_after(self, count: int) -> int:
        """Give how many of the points that remain were added after a count."""
        return int(np.count_nonzero(np.array(self._remaining().counts) > count))

    def add(self, file: EventFile | None, count: int, step: int, value: Any) -> None:
        """Add a point behind those of its file."""
        part = self._growing
        if part is not None and part.file is file and part.takes(step, value):
            part.append(count, step, value)
            if self._whole is not None and self._whole is not part:
                self._whole.append(count, step, value)
        else:
            self._insert(file, count, step, value)
        self._series = None

    def cut(self, file: EventFile | None, step: int) -> None:
        """Apply a session start that ``file`` holds, and that is among the starts already."""
        if file in self._parts:
            self._parts[file].cut(step)
        self._growing = self._whole = self._series = None

    def series(self) -> Series:
        """What remains, by increasing steps."""
        if self._series is None:
            whole = self._remaining()
            self._series = Series(np.array(whole.steps, dtype=np.int64), np.array(whole.values, dtype=np.float64))
        return self._series

    def _insert(self, file: EventFile | None, count: int, step: int, value: Any) -> None:
        part = self._parts.get(file) or self._parts.setdefault(file, self._new_part(file))
        part.low = min(part.low, step)
        part.cut(step)
        part.append(count, step, value)
        last = max(self._parts.keys() | self._starts.keys(), key=_order)
        self._growing = part if file is last else None
        self._whole = None
        self.rewritten = count

    def _remaining(self) -> "_Part":
        """Each file removes what earlier ones have from its lowest step on, of points or of session starts."""
        if self._whole is None:
            self._whole = self._new_part()
            if self._parts.keys() >= self._starts.keys() and len(self._parts) == 1:
                (self._whole,) = self._parts.values()
                return self._whole
            for file in sorted(self._parts.keys() | self._starts.keys(), key=_order):
                part = self._parts.get(file)
                self._whole.cut(min(part.low if part else math.inf, self._starts.get(file, math.inf)))
                if part:
                    self._whole.extend(part)
        return self._whole

    def _new_part(self, file: EventFile | None = None) -> "_Part":
        return _Part(file, array("d"))


class RowCurve(Curve):
    """The rows of a table."""

    @property
    def has_values(self) -> bool:
        """Whether any number of it is not NaN."""
        return any(not np.isnan(row).all() for _, row in reversed(self._remaining().values))

    def bare(self) -> Series:
        """Steps without values."""
        return Series(np.array(self._remaining().steps, dtype=np.int64), np.empty((len(self), 0)))

    def series(self) -> Series:
        """A table ``[T, L]``: the layers of the last row, then those that only earlier rows had; NaN for none."""
        if self._series is None:
            whole = self._remaining()
            self._series = _stacked(whole.steps, whole.values)
        return self._series

    def _new_part(self, file: EventFile | None = None) -> "_Part":
        return _RowPart(file, [])


class _Part:
    """Points by increasing steps: the count at which each was added, its step, and the value."""

    def __init__(self, file: EventFile | None, values: MutableSequence[Any]) -> None:
        self.file = file
        self.counts, self.steps, self.values = array("q"), array("q"), values
        self.low: float = math.inf  # the lowest step there ever was

    def takes(self, step: int, value: Any) -> bool:
        """Whether a point comes behind the last, and is of its kind."""
        return bool(self.steps) and step > self.steps[-1]

    def append(self, count: int, step: int, value: Any) -> None:
        self.counts.append(count)
        self.steps.append(step)
        self.values.append(value)

    def extend(self, other: "_Part") -> None:
        self.counts.extend(other.counts)
        self.steps.extend(other.steps)
        self.values.extend(other.values)

    def cut(self, step: float) -> None:
        """Remove what is at this step or later."""
        first = bisect_left(self.steps, step)
        if first < len(self.steps):
            del self.counts[first:], self.steps[first:], self.values[first:]


class _RowPart(_Part):
    """Rows, which are of one kind where they have the same layers."""

    def takes(self, step: int, value: Row) -> bool:
        return super().takes(step, value) and self.values[-1][0] == value[0]


def event_files(folder: Path) -> list[EventFile]:
    """The event files of a run in the order in which they were begun; none where the folder cannot be read."""
    return sorted((EventFile(path) for path in event_paths(folder)), key=_order)


def event_paths(folder: Path) -> list[Path]:
    """The same, as paths in no order."""
    return [path for path in folder.glob(_EVENTS) if path.is_file()]


def natural_key(name: str) -> list[tuple[int, str]]:
    """A key that sorts ``blocks.2`` before ``blocks.10``."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _order(file: EventFile | None) -> Any:
    return () if file is None else file.order


def _stacked(steps: Any, rows: Any) -> Series:
    kinds = dict.fromkeys(names for names, _ in reversed(rows))
    names = tuple(dict.fromkeys(name for kind in kinds for name in kind))
    column = {name: index for index, name in enumerate(names)}
    places = {kind: [column[name] for name in kind] for kind in kinds}
    values = np.full((len(steps), len(names)), np.nan)
    for index, (kind, row) in enumerate(rows):
        values[index, places[kind]] = row
    return Series(np.array(steps, dtype=np.int64), values, names)


def _layer_names(content: bytes) -> tuple[str, ...]:
    """The names in a table's metadata; none where it is not as the recorder writes it."""
    try:
        return tuple(map(str, json.loads(content)["layers"]))
    except (ValueError, KeyError, TypeError):
        return ()


def _row(tensor: Any) -> NDArray[Any]:
    content = tensor.tensor_content
    if content and tensor.dtype == DT_FLOAT:  # as it is written; several times faster than make_ndarray
        return np.frombuffer(content, dtype="<f4")
    return np.ravel(tensor_util.make_ndarray(tensor)).astype(np.float64)


def _crc_table() -> list[int]:
    """Of CRC-32C, whose polynomial is 0x1EDC6F41, bits reversed."""
    table = list(range(256))
    for _ in range(8):
        table = [value >> 1 ^ (0x82F63B78 if value & 1 else 0) for value in table]
    return table


_TABLE = _crc_table()


@lru_cache(maxsize=4096)
def _length(header: bytes) -> int | None:
    """The length of a record, from its eight bytes and their checksum; None where those do not agree.

    The checksum is CRC-32C, rotated by 15 bits, plus a constant.
    """
    crc = 0xFFFFFFFF
    for byte in header[:8]:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    return int.from_bytes(header[:8], "little") if masked == int.from_bytes(header[8:12], "little") else None
