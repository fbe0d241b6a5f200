"""Runs below a folder while they are being written: what was read is kept, and only what is new is sent."""

import os
import threading
import time
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dynamon.board.payload import SCALAR_POINTS, TABLE_POINTS, packed_scalar, packed_table
from dynamon.health import findings, loss_tag
from dynamon.history import RunData, Series
from dynamon.runs import EventFile, Row, assembled, event_files, stacked

_KEPT = 8  # runs held in memory: those asked for last
_SEARCH_EVERY = 4.0  # seconds between searches for runs
_READ_FOR = 0.5  # seconds of reading an answer may wait for; the rest comes with the next one


class LiveFolder:
    """The runs below a folder, named as TensorBoard names them.

    Links to folders are followed, as TensorBoard does. A run is only ever looked up by its name among those that were
    found, so no name leads out of the folder. Safe to use from several threads.

    Args:
        folder: What ``tensorboard --logdir`` was given.
    """

    def __init__(self, folder: Path | str) -> None:
        """Nothing is searched yet."""
        self._folder = Path(folder).expanduser()
        self._lock = threading.Lock()
        self._found: dict[str, Path] = {}
        self._searched_at = -_SEARCH_EVERY
        self._open: dict[str, LiveRun] = {}

    def names(self) -> list[str]:
        """The names of all runs there are, ``"."`` for the folder itself, the one written to last first.

        Cost: a walk, at most every four seconds.
        """
        with self._lock:
            if time.monotonic() - self._searched_at >= _SEARCH_EVERY:
                runs = sorted(_runs_below(self._folder), reverse=True)
                self._found = {name: path for _, name, path in runs}
                self._searched_at = time.monotonic()
                for name in self._open.keys() - self._found.keys():
                    del self._open[name]
            return list(self._found)

    def run(self, name: str) -> "LiveRun":
        """Give a run, the one that was kept where there is one.

        Raises:
            KeyError: If there is no such run.
        """
        self.names()
        with self._lock:
            if name not in self._found:
                raise KeyError(name)
            run = self._open.pop(name, None) or LiveRun(self._found[name])
            self._open[name] = run  # last, so that the ones not asked for come first
            while len(self._open) > _KEPT:
                del self._open[next(iter(self._open))]
            return run


class LiveRun:
    """One run, read piece by piece.

    Answers hold what came after ``since``, a count of values read, where it can be appended; and all of a series where
    it cannot, because steps were written anew or the series is thinned. ``epoch`` changes when a file was replaced or
    vanished, and then everything before it is void.

    Args:
        folder: The run's own folder.
    """

    def __init__(self, folder: Path) -> None:
        """Nothing is read yet."""
        self._folder = folder
        self._lock = threading.Lock()
        self._epoch = time.time_ns() // 1_000_000  # exact in the numbers of a browser, below 2**53
        self._start_anew()

    def _start_anew(self) -> None:
        self._epoch += 1
        self._files: dict[Path, tuple[int, EventFile]] = {}
        self._scalars: dict[str, _Column] = {}
        self._tables: dict[str, _Rows] = {}
        self._count = 0
        self._health: tuple[int, list[dict[str, Any]]] | None = None

    def news(self, epoch: int, since: int, read_for: float = _READ_FOR) -> dict[str, Any]:
        """Read on, and say what is new in the scalars.

        Args:
            epoch: That of the answer before, 0 the first time.
            since: Its ``count``.
            read_for: Seconds to read for.

        Returns:
            ``epoch`` and ``count``, for the next time; ``share`` of the files' bytes that is read; and where anything
            is new ``scalars`` as in :func:`dynamon.board.payload.payload`, those to be appended with the index
            ``from`` which they begin; ``quantities``, ``last_step`` and ``loss``.
        """
        with self._lock:
            share = self._read(read_for)
            answer: dict[str, Any] = {"epoch": self._epoch, "count": self._count, "share": share}
            if epoch == self._epoch and since == self._count:
                return answer
            since = since if epoch == self._epoch else 0
            data = self._data(with_rows=False)
            scalars = {
                tag: self._scalars[tag].news(since) if tag in self._scalars else packed_scalar(series)
                for tag, series in data.scalars.items()
            }
            return answer | {
                "scalars": {tag: news for tag, news in scalars.items() if news},
                "quantities": [tag for tag in data.tables if tag not in self._tables or self._tables[tag].has_values],
                "last_step": data.last_step,
                "loss": loss_tag(data.scalars),
            }

    def table(self, quantity: str, epoch: int, since: int) -> dict[str, Any]:
        """What is new in a table, of what was read so far: its rows, or nothing but ``epoch`` and ``count``.

        Raises:
            KeyError: If there is no such quantity.
        """
        with self._lock:
            answer = {"epoch": self._epoch, "count": self._count}
            if quantity in self._tables:
                news = self._tables[quantity].news(since if epoch == self._epoch else 0)
            else:
                news = packed_table(self._data(with_rows=False).tables[quantity])
            return answer | (news or {})

    def findings(self) -> list[dict[str, Any]]:
        """What looks wrong in what was read so far, see :mod:`dynamon.health`."""
        with self._lock:
            count, data = self._count, self._data()
            if self._health is not None and self._health[0] == count:
                return self._health[1]
        found = [finding.as_dict() for finding in findings(data)]  # longer than others should wait
        with self._lock:
            self._health = count, found
        return found

    def _data(self, with_rows: bool = True) -> RunData:
        """What was read so far; tables of tensor summaries without their rows where those are not needed."""
        scalars = {tag: column.series() for tag, column in self._scalars.items()}
        tables = {quantity: rows.series() if with_rows else rows.bare() for quantity, rows in self._tables.items()}
        return assembled(scalars, tables)

    def _read(self, read_for: float) -> float:
        """Read for so many seconds; give the share of all bytes that is read, 1 where there is nothing more to read."""
        paths = event_files(self._folder)
        numbers = {path: path.stat().st_ino for path in paths}
        for path, (number, file) in self._files.items():
            if numbers.get(path) != number or path.stat().st_size < file.offset:  # gone, replaced or cut
                self._start_anew()
                break
        until = time.monotonic() + read_for
        for path in paths:
            _, file = self._files.setdefault(path, (numbers[path], EventFile(path)))
            for points in file.records():
                for tag, step, value in points:
                    self._add(tag, step, value)
                if time.monotonic() > until:
                    read = sum(file.offset for _, file in self._files.values())
                    return read / sum(path.stat().st_size for path in paths)
        return 1.0

    def _add(self, tag: str, step: int, value: float | Row) -> None:
        self._count += 1
        if isinstance(value, tuple):
            (self._tables.get(tag) or self._tables.setdefault(tag, _Rows())).add(self._count, step, value)
        else:
            (self._scalars.get(tag) or self._scalars.setdefault(tag, _Column())).add(self._count, step, value)


class _Column:
    """A scalar as it came: the count at which each value was read, its step, and the value."""

    def __init__(self) -> None:
        self._counts, self._steps, self._values = array("q"), array("q"), array("d")
        self._increases = True
        self._series: Series | None = None

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, count: int, step: int, value: float) -> None:
        self._increases = self._increases and (not self._steps or step > self._steps[-1])
        self._counts.append(count)
        self._steps.append(step)
        self._values.append(value)
        self._series = None

    def series(self) -> Series:
        """By increasing steps; of several values at a step the last."""
        if self._series is None:
            steps, values = np.array(self._steps), np.array(self._values)
            if not self._increases:
                steps, last = np.unique(steps[::-1], return_index=True)
                values = values[::-1][last]
            self._series = Series(steps, values)
        return self._series

    def news(self, since: int) -> dict[str, Any] | None:
        first = int(np.searchsorted(np.array(self._counts), since, side="right"))
        if first == len(self):
            return None
        series = self.series()
        if not first or not self._increases or len(self) > SCALAR_POINTS:
            return packed_scalar(series)
        return {**packed_scalar(Series(series.steps[first:], series.values[first:])), "from": first, "total": len(self)}


class _Rows:
    """The same for a table."""

    def __init__(self) -> None:
        self._counts = array("q")
        self._rows: dict[int, Row] = {}
        self._appends = True  # every row so far came after the one before, with the same layers
        self.has_values = False

    def add(self, count: int, step: int, row: Row) -> None:
        if self._rows:
            last = next(reversed(self._rows))
            self._appends = self._appends and step > last and row[0] == self._rows[last][0]
        self._counts.append(count)
        self._rows[step] = row[0], row[1]
        self.has_values = self.has_values or not np.isnan(row[1]).all()

    def bare(self) -> Series:
        """Steps without values."""
        return Series(np.array(sorted(self._rows), dtype=np.int64), np.empty((len(self._rows), 0)))

    def series(self) -> Series:
        return stacked(self._rows)

    def news(self, since: int) -> dict[str, Any] | None:
        first = int(np.searchsorted(np.array(self._counts), since, side="right"))
        if first == len(self._counts):
            return None
        series = self.series()
        if not first or not self._appends or len(series) > TABLE_POINTS:
            return packed_table(series)
        new = Series(series.steps[first:], series.values[first:], series.layers)
        return {**packed_table(new), "from": first, "total": len(series)}


def _runs_below(folder: Path) -> Iterator[tuple[float, str, Path]]:
    """Folders that hold event files: when one of those was written to, the name of the run, the folder.

    A folder that links lead to a second time is passed over.
    """
    seen: set[tuple[int, int]] = set()
    for place, below, _ in os.walk(folder, followlinks=True):
        path = Path(place)
        try:
            status = path.stat()
            written = [file.stat().st_mtime for file in event_files(path)]
        except OSError:  # gone in the meantime
            continue
        if (status.st_dev, status.st_ino) in seen:
            below.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        if written:
            yield max(written), path.relative_to(folder).as_posix(), path
