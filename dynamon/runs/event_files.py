"""Read the records of TensorBoard's event files as they grow."""

import json
import math
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.types_pb2 import DT_FLOAT
from tensorboard.util import tensor_util

from dynamon.runs.renamed import current_tag

_EVENTS = "*tfevents*"
_PLUGIN = "dynamon"  # of the tensor summaries that hold all layers of a quantity
_LAYERS = "/layers"  # how their tags end
_HEADER, _FRAME = 12, 16  # bytes: length and its checksum; with the checksum of the data
_HEAD = 256  # bytes that identify a file: they hold the time at which it was begun
_CHUNK = 1 << 20
_LIKELY = re.compile(rb"(?=([\s\S]{3}\x00{5}[\s\S]{4}))")  # the header of a record below 16 MB
Row = tuple[tuple[str, ...], NDArray[Any]]  # names of layers, and a value of each
Point = tuple[str, int, float | Row]  # tag or quantity, step, what was read


class SessionStart(NamedTuple):
    """A writer continues from here: points of earlier writers at this step or later are void."""

    step: int


class EventFile:
    """Reads the records of one event file as it grows; nothing is read twice.

    Read are scalars as torch writes them (a number) and as TensorFlow does (a tensor whose kind is stated the first
    time), and rows of tables, whose names may also be stated the first time only.

    Args:
        path: The file, which may still grow.

    Attributes:
        path: The file.
        offset: Where the next record begins, in bytes.
        size: The size of the file when it was last read, in bytes.
        ended: When the latest record read was written, in seconds; -inf before the first.
    """

    def __init__(self, path: Path) -> None:
        """Start at the beginning."""
        self.path = path
        self.offset = self.size = 0
        self.ended = -math.inf
        self._order: tuple[int, float, list[tuple[int, str]]] | None = None
        self._head = b""
        self._damaged: list[tuple[int, int]] = []  # bytes, from and to
        self._tail: tuple[int, int] | None = None  # bytes at the end, in which no record was found yet
        self._trouble = ""
        self._scalars: set[str] = set()
        self._layers: dict[str, tuple[bytes, tuple[str, ...]]] = {}

    @property
    def order(self) -> tuple[int, float, list[tuple[int, str]]]:
        """Sort key of files by when they were begun.

        The second in the name comes first, then the time of the first record, then the name, where a process that
        begins several files within a second counts them.
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
        """Whether the file is still the same one, not shorter, with the same beginning.

        Raises:
            OSError: If the file is gone or cannot be read.
        """
        if self.path.stat().st_size < self.offset:
            return False
        with self.path.open("rb") as file:
            return file.read(len(self._head)) == self._head

    @property
    def damage(self) -> list[str]:
        """What could not be read, one sentence each."""
        lost = [*self._damaged, *([self._tail] if self._tail else [])]
        said = [f"{self.path} is damaged: bytes {start} to {stop} were skipped." for start, stop in lost]
        return [*said, *([self._trouble] if self._trouble else [])]

    def records(self) -> Iterator[list[Point | SessionStart]]:
        """Yield the contents of each complete record after ``offset``, which moves along.

        A truncated record is read later, when it is complete. A damaged one is skipped up to the next complete one, see
        ``damage``. A file that cannot be read counts as damaged.
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
        """Yield offset and data of the records of a TFRecord file: length, its checksum, data, their checksum.

        The checksum of the length is verified, since everything after it depends on it. That of the data is not: in
        Python it would take 70 % of the time, and TensorBoard's data server skips it as well.
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
                if len(record) < length + 4:  # the file has just been truncated
                    return
                self.offset = stop
                yield start, record[:length]

    def _skip(self, file: Any, size: int) -> bool:
        """Move to the next header after a damaged one; return False if there is none yet."""
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
        """Return when the first record was written; None if there is no complete one yet."""
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
            except (TypeError, ValueError):  # not the tensor stated by its metadata
                continue


def event_files(folder: Path) -> list[EventFile]:
    """List the event files of a run in the order in which they were begun; none if the folder cannot be read."""
    return sorted((EventFile(path) for path in event_paths(folder)), key=lambda file: file.order)


def event_paths(folder: Path) -> list[Path]:
    """List the paths of the event files of a run, in no order."""
    return [path for path in folder.glob(_EVENTS) if path.is_file()]


def natural_key(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts ``blocks.2`` before ``blocks.10``."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _layer_names(content: bytes) -> tuple[str, ...]:
    """Return the names in a table's metadata; none if the recorder did not write it."""
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
    """Compute the table of CRC-32C, whose polynomial is 0x1EDC6F41, with reversed bits."""
    table = list(range(256))
    for _ in range(8):
        table = [value >> 1 ^ (0x82F63B78 if value & 1 else 0) for value in table]
    return table


_TABLE = _crc_table()


@lru_cache(maxsize=4096)
def _length(header: bytes) -> int | None:
    """Return the length of a record from its eight bytes and their checksum; None if those do not match.

    The checksum is CRC-32C, rotated by 15 bits, plus a constant.
    """
    crc = 0xFFFFFFFF
    for byte in header[:8]:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    return int.from_bytes(header[:8], "little") if masked == int.from_bytes(header[8:12], "little") else None
