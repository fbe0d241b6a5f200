"""Read runs below a folder while they are being written, and send only what is new."""

import threading
import time
from pathlib import Path
from typing import Any

from dynamon.board.payload import SCALAR_POINTS, TABLE_POINTS, display_hints, pack_scalar, pack_table
from dynamon.board.progress import packed_progress
from dynamon.board.summary import summarise
from dynamon.health import examine, loss_tag
from dynamon.runs import assemble_run
from dynamon.runs.event_files import EventFile, event_paths
from dynamon.runs.event_log import Curve, EventLog, RowCurve
from dynamon.runs.folders import RunContents, find_runs, printable, select_runs
from dynamon.runs.history import RunData, Series

_KEPT = 8  # runs held in memory: the last ones requested
_SEARCH_EVERY = 4.0  # seconds between searches for runs
_LOOK_FOR = 0.5  # seconds per walk to search for readings in files that had none
_READ_FOR = 0.5  # seconds of reading per answer; the rest follows with the next one
_AGAIN = 15.0  # seconds for which the summary of a run that goes on is kept


class LiveFolder:
    """The runs below a folder, named as TensorBoard names them; bytes that are not UTF-8 are written as such.

    Links to folders are followed, as TensorBoard does. A run is only looked up by its name among those found, so that
    no name leads out of the folder. Safe to use from several threads.

    Args:
        folder: What ``tensorboard --logdir`` was given.

    Attributes:
        skipped: Number of folders with event files in the last search that are not among the names.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from torch.utils.tensorboard import SummaryWriter
        >>> from dynamon.board.live import LiveFolder
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with SummaryWriter(Path(folder, "run 1")) as writer:
        ...         writer.add_scalar("train/loss", 1.0, 0)
        ...     LiveFolder(folder).names()
        ['run 1']
    """

    def __init__(self, folder: Path | str) -> None:
        """Defer the search."""
        self.skipped = 0
        self._folder = Path(folder).expanduser()
        self._lock = threading.Lock()
        self._found: dict[str, Path] = {}
        self._written: dict[str, float] = {}
        self._searched_at = -_SEARCH_EVERY
        self._known: dict[Path, RunContents] = {}
        self._open: dict[str, LoggedRun] = {}
        self._rows: dict[str, tuple[float, float, dict[str, Any]]] = {}  # when written, when summarised, the row
        self._pending: tuple[str, LoggedRun] | None = None

    def names(self) -> list[str]:
        """List the names of the runs, ``"."`` for the folder itself.

        Runs with readings of dynamon come first, the one last written to before the others. Then those that have
        scalars only, to compare with. Folders without a scalar are not runs, nor are folders inside a run that hold no
        reading, as ``add_scalars`` and ``add_hparams`` write them.

        Cost: a walk, at most every four seconds; files of runs without readings are searched for them once, 0.5 s per
        walk.
        """
        with self._lock:
            if time.monotonic() - self._searched_at >= _SEARCH_EVERY:
                there = [run for run in find_runs(self._folder) if event_paths(run.path)]
                runs = select_runs(there, self._known, time.monotonic() + _LOOK_FOR)
                self.skipped = len(there) - len(runs)
                self._found = {run.name: run.path for run in runs}
                self._written = {run.name: run.written for run in runs}
                self._searched_at = time.monotonic()
                for name in self._open.keys() - self._found.keys():
                    del self._open[name]
            return list(self._found)

    def run(self, name: str) -> "LoggedRun":
        """Return a run, the same object while it is kept.

        Raises:
            KeyError: If there is no such run.
        """
        self.names()
        with self._lock:
            if name not in self._found:
                raise KeyError(name)
            run = self._open.pop(name, None) or LoggedRun(self._found[name])
            self._open[name] = run  # moved to the end: the least recently requested come first
            while len(self._open) > _KEPT:
                del self._open[next(iter(self._open))]
            return run

    def rows(self, read_for: float = _READ_FOR) -> list[dict[str, Any]]:
        """Summarise all runs, in the order of :meth:`names`; those not read yet hold ``name`` and ``share`` only.

        Cost: reads and checks runs for about ``read_for`` seconds, at least one of them; the others follow with later
        calls. A run is read again once it was written to, at most every 15 seconds.
        """
        until = time.monotonic() + read_for
        names = self.names()
        for name in names:
            if self._is_outdated(name):
                self._read_row(name, until)
                if time.monotonic() > until:
                    break
        return [self._rows[name][2] if name in self._rows else {"name": name, "share": 0} for name in names]

    def _is_outdated(self, name: str) -> bool:
        written, at, _ = self._rows.get(name, (-1.0, -_AGAIN, {}))
        return written != self._written.get(name) and time.monotonic() - at >= _AGAIN

    def _read_row(self, name: str, until: float) -> None:
        """Read a run on, and summarise it once it is read; between calls only one that is not open is held."""
        with self._lock:
            path, written = self._found.get(name), self._written.get(name, 0.0)
            if path is None:
                return
            pending = self._pending[1] if self._pending and self._pending[0] == name else None
            run = self._open.get(name) or pending or LoggedRun(path)
            self._pending = name, run
        share = 0.0
        while share < 1 and (share == 0 or time.monotonic() < until):
            share = run.read(max(until - time.monotonic(), 0.0))
        if share < 1:
            return
        row = {"name": name, **run.health()["summary"]}
        with self._lock:
            self._rows[name], self._pending = (written, time.monotonic(), row), None


class LoggedRun:
    """One run, read piece by piece by the rule of :mod:`dynamon.runs.event_log`.

    Answers hold what came after ``since``, a count of values read, if it can be appended; otherwise the complete
    series, because steps were rewritten or the series is thinned. ``epoch`` changes when a file was replaced or
    vanished, or a writer that continues from an earlier step voided points; then everything before it is void.

    Args:
        folder: The run's own folder.
    """

    def __init__(self, folder: Path) -> None:
        """Defer reading."""
        self._folder = folder
        self._lock = threading.Lock()
        self._epoch = time.time_ns() // 1_000_000  # exact in the numbers of a browser, below 2**53
        self._start_anew()

    def _start_anew(self) -> None:
        self._epoch += 1
        self._files: dict[Path, EventFile] = {}
        self._log = EventLog()
        self._health: tuple[int, dict[str, Any]] | None = None

    def updates(self, epoch: int, since: int, read_for: float = _READ_FOR) -> dict[str, Any]:
        """Read on, and return what is new in the scalars.

        Args:
            epoch: That of the previous answer, 0 the first time.
            since: Its ``count``.
            read_for: Seconds to read for.

        Returns:
            ``epoch`` and ``count``, for the next call; ``share`` of the files' bytes that is read; ``damage``, what
            could not be read; and if anything is new ``scalars`` as in :func:`dynamon.board.payload.payload`, those to
            be appended with the index ``from`` at which they begin; ``quantities``, ``shown``, ``last_step`` and
            ``loss``.
        """
        with self._lock:
            share = self._read(read_for)
            answer: dict[str, Any] = {"epoch": self._epoch, "count": self._log.count, "share": share}
            damage = [printable(said) for file in self._files.values() for said in file.damage]
            if damage:
                answer["damage"] = damage
            if epoch == self._epoch and since == self._log.count:
                return answer
            since = since if epoch == self._epoch else 0
            data = self._data(with_rows=False)
            scalars = {
                tag: _updates(self._log.scalars[tag], since, SCALAR_POINTS)
                if tag in self._log.scalars
                else pack_scalar(series)
                for tag, series in data.scalars.items()
            }
            tables = self._log.tables
            quantities = [tag for tag in data.tables if tag not in tables or tables[tag].has_values]
            return answer | {
                "scalars": {tag: news for tag, news in scalars.items() if news},
                "quantities": quantities,
                "shown": display_hints(quantities),
                "last_step": data.last_step,
                "loss": loss_tag(data.scalars),
            }

    def read(self, read_for: float) -> float:
        """Read for some seconds, and return the share of all bytes that is read."""
        with self._lock:
            return self._read(read_for)

    news = updates  # its earlier name, which scripts call

    def table(self, quantity: str, epoch: int, since: int) -> dict[str, Any]:
        """Return what is new in a table, as far as it is read: its rows, or only ``epoch`` and ``count``.

        Raises:
            KeyError: If there is no such quantity.
        """
        with self._lock:
            answer = {"epoch": self._epoch, "count": self._log.count}
            if self._log.tables.get(quantity):
                news = _updates(self._log.tables[quantity], since if epoch == self._epoch else 0, TABLE_POINTS)
            else:
                news = pack_table(self._data(with_rows=False).tables[quantity])
            return answer | (news or {})

    def health(self) -> dict[str, Any]:
        """Return what :mod:`dynamon.health` finds in what was read so far.

        Returns:
            ``findings``, ``checks``, and ``summary``, see :func:`dynamon.board.summary.summarise`.
        """
        with self._lock:
            count, data = self._log.count, self._data()
            if self._health is not None and self._health[0] == count:
                return self._health[1]
        examined = examine(data)  # without the lock, since it takes long
        found = {
            "findings": [finding.as_dict() for finding in examined.findings],
            "checks": [check.as_dict() for check in examined.checks],
            "summary": summarise(data, examined),
        }
        with self._lock:
            self._health = count, found
        return found

    def findings(self) -> list[dict[str, Any]]:
        """Return the findings in what was read so far."""
        found: list[dict[str, Any]] = self.health()["findings"]
        return found

    def progress(self) -> dict[str, Any] | None:
        """Return the summary of :func:`dynamon.board.progress.packed_progress` of what was read so far."""
        with self._lock:
            data = self._data()
        return packed_progress(data)

    def _data(self, with_rows: bool = True) -> RunData:
        """Return what was read so far; tables of tensor summaries without their rows if those are not needed."""
        scalars = {tag: curve.series() for tag, curve in self._log.scalars.items() if curve}
        tables = {tag: rows.series() if with_rows else rows.bare() for tag, rows in self._log.tables.items() if rows}
        return assemble_run(scalars, tables)

    def _read(self, read_for: float) -> float:
        """Read for some seconds, and return the share of all bytes that is read, 1 if nothing is left."""
        paths = event_paths(self._folder)
        if not all(path in paths and _is_continued(file) for path, file in self._files.items()):
            self._start_anew()
        for path in paths:
            self._files.setdefault(path, EventFile(path))
        purged, until = self._log.purged, time.monotonic() + read_for
        share = self._read_on(until)
        if self._log.purged != purged:  # tags may have vanished
            self._epoch += 1
        return share

    def _read_on(self, until: float) -> float:
        files = sorted(self._files.values(), key=lambda file: file.order)
        for file in files:
            for items in file.records():
                self._log.add(file, items)
                if time.monotonic() > until:
                    return sum(file.offset for file in files) / max(sum(file.size for file in files), 1)
        return 1.0


def _is_continued(file: EventFile) -> bool:
    try:
        return file.is_continued
    except OSError:  # gone
        return False


def _updates(curve: Curve | RowCurve, since: int, limit: int) -> dict[str, Any] | None:
    """Pack what came after ``since``; the complete series if it cannot be appended or is thinned."""
    new = curve.added_after(since)
    if not new and curve.rewritten <= since:
        return None
    series, packed = curve.series(), pack_table if isinstance(curve, RowCurve) else pack_scalar
    first = len(series) - new
    if not first or curve.rewritten > since or len(series) > limit:
        return packed(series)
    added = Series(series.steps[first:], series.values[first:], series.layers)
    return {**packed(added), "from": first, "total": len(series)}
