"""Find folders that hold runs, when each was last written to, and what it holds."""

import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dynamon.runs.event_files import event_paths, natural_key
from dynamon.runs.history import READINGS

TABLE = "metrics.csv"
_CHUNK = 1 << 20
_LONGEST = 256  # bytes of a tag with what follows it
_MEASURED = re.compile(rb"\n([\x01-\x7f])(?:%s)|\n\x07dynamon" % b"|".join(re.escape(tag.encode()) for tag in READINGS))
_SCALAR = re.compile(rb"\n([\x01-\x7f])[^\x00-\x1f]{1,127}?(?=\x15)|\n\x07scalars")
_NUMBER = 0x15  # what follows the tag of a scalar


@dataclass(frozen=True)
class RunFolder:
    """A folder that holds event files or a table.

    Attributes:
        name: Its path below the folder that was searched, ``"."`` for that folder itself.
        path: Its path.
        written: When one of its files was last written to.
    """

    name: str
    path: Path
    written: float


class RunContents:
    """Finds out what a run's files hold without reading them completely; nothing is searched twice.

    Attributes:
        has_readings: Whether anything is a reading of dynamon.
        has_values: Whether anything is a scalar.
    """

    def __init__(self) -> None:
        """Start without knowledge."""
        self.has_readings = self.has_values = False
        self._looked: dict[Path, int] = {}

    def look(self, folder: Path, until: float = float("inf")) -> None:
        """Search on, until ``time.monotonic()`` reaches ``until`` or a reading is found."""
        if self.has_readings:
            return
        try:
            if (folder / TABLE).is_file():
                self._look_at_header(folder / TABLE)
            for path in event_paths(folder):
                if self.has_readings or time.monotonic() > until:
                    return
                self._look_at_events(path, until)
        except OSError:  # it cannot be read, or is gone
            return

    def _look_at_header(self, path: Path) -> None:
        with path.open(encoding="utf-8", errors="replace") as file:
            tags = [tag for tag in file.readline(_CHUNK).strip().split(",") if tag not in ("step", "epoch")]
            if file.readline(2):
                self.has_readings = self.has_readings or any(tag.strip('"').startswith(READINGS) for tag in tags)
                self.has_values = self.has_values or bool(tags)

    def _look_at_events(self, path: Path, until: float) -> None:
        begin = self._looked.get(path, 0)
        if path.stat().st_size < begin:
            begin = 0
        with path.open("rb") as file:
            while time.monotonic() <= until:
                file.seek(begin)
                chunk = file.read(_CHUNK)
                self.has_readings = self.has_readings or _holds(chunk, _MEASURED)
                self.has_values = self.has_values or self.has_readings or _holds(chunk, _SCALAR)
                if self.has_readings or len(chunk) <= _LONGEST:
                    break
                begin += len(chunk) - _LONGEST
        self._looked[path] = begin


def find_runs(folder: Path) -> list[RunFolder]:
    """List all runs below a folder, including its own, the one last written to first.

    Links to folders are followed, as TensorBoard does. A folder that links reach a second time is skipped, and so is
    one that cannot be read.
    """
    return sorted(_walked(folder), key=lambda run: (run.written, natural_key(run.name)), reverse=True)


def select_runs(runs: list[RunFolder], known: dict[Path, RunContents], until: float = float("inf")) -> list[RunFolder]:
    """Select the runs to show: those with readings of dynamon first, then those to compare with.

    A run without readings can be compared with if it holds scalars and is not inside another run, unlike the folders
    that ``add_scalars`` and ``add_hparams`` write.

    Args:
        runs: From :func:`find_runs`.
        known: What was found before, which is updated.
        until: ``time.monotonic()`` until which to search.
    """
    for gone in known.keys() - {run.path for run in runs}:
        del known[gone]
    for run in runs:
        known.setdefault(run.path, RunContents()).look(run.path, until)
    holding = {run.path for run in runs if known[run.path].has_values}
    measured = [run for run in runs if known[run.path].has_readings]
    others = [run for run in runs if run.path in holding and not known[run.path].has_readings]
    return measured + [run for run in others if holding.isdisjoint(run.path.parents)]


def newest_run(folder: Path) -> Path:
    """Return the run that a folder stands for: itself if it holds values, else the newest one below it.

    A run with readings of dynamon precedes one without. If there is no run at all, the folder itself is returned.

    Raises:
        ValueError: If there are runs, and none holds a value.
    """
    own = RunContents()
    own.look(folder)
    runs = [] if own.has_values else find_runs(folder)
    if not runs:
        return folder
    below = select_runs(runs, {})
    if not below:
        held = f"{len(runs)} runs" if len(runs) > 1 else "a run"
        raise ValueError(
            f"{printable(folder)} holds {held} without a single value: nothing was logged, or training has just begun."
        )
    return below[0].path


def printable(text: Path | str) -> str:
    r"""A path as text that can be encoded: bytes that are not UTF-8 become ``\xff``."""
    return str(text).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _walked(folder: Path) -> Iterator[RunFolder]:
    seen: set[tuple[int, int]] = set()
    for place, below, names in os.walk(folder, followlinks=True):
        path = Path(place)
        try:
            status = path.stat()
            files = [*event_paths(path), *([path / TABLE] if TABLE in names else [])]
            written = [file.stat().st_mtime for file in files]
        except OSError:  # gone in the meantime, or not to be read
            continue
        if (status.st_dev, status.st_ino) in seen:
            below.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        if written:
            yield RunFolder(printable(path.relative_to(folder).as_posix()), path, max(written))


def _holds(chunk: bytes, pattern: re.Pattern[bytes]) -> bool:
    """Whether the tag of a number matches, whose length is the byte before it; or the name of a plugin does."""
    for found in pattern.finditer(chunk):
        if found[1] is None:
            return True
        after = found.start() + 2 + found[1][0]
        if after < len(chunk) and chunk[after] == _NUMBER:
            return True
    return False
