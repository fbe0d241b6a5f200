"""Read what a finished run logged, from TensorBoard's event files or CSVLogger's ``metrics.csv``."""

import csv
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dynamon.runs.event_files import Point, event_files, natural_key
from dynamon.runs.event_log import EventLog
from dynamon.runs.folders import TABLE, find_runs, printable
from dynamon.runs.history import RunData, Series
from dynamon.runs.history import last_step as last_step  # it stays part of this module
from dynamon.runs.renamed import TagDict, current_tag


def read_run(folder: Path | str) -> dict[str, Series]:
    """Read all scalars that a run logged, at full resolution.

    A run that was restarted in the same folder is read as TensorBoard reads it. ``SummaryWriter(purge_step=...)``, also
    through ``TensorBoardLogger(..., purge_step=...)``, marks where a writer continues: all earlier points from that
    step on are void, whatever their tag. Without it, a point voids the earlier points of its own tag from its step on;
    a tag that the new writer has not reached yet keeps its points. Event files count in the order in which they were
    begun.

    Args:
        folder: The run's own folder, which holds event files, ``metrics.csv`` or both. A row of ``metrics.csv`` voids
            the points of its tags from its step on in earlier rows. Where table and event files agree, the table's
            values are used, which are not rounded to float32, and each fills gaps of the other. From the step on at
            which they differ they are of two sessions, and the later one counts.

    Returns:
        The series of each tag, by increasing steps; values may be NaN.

    Raises:
        FileNotFoundError: If there is no such folder, or no run in it; the message names runs below it.
        ValueError: If ``metrics.csv`` has no column ``step``.

    Warns:
        UserWarning: For each damaged part of a file: it is skipped, and the rest is read.

    Cost: a pass over the files in Python, some hundred thousand values per second.

    Example:
        >>> import tempfile
        >>> from torch.utils.tensorboard import SummaryWriter
        >>> from dynamon.runs import read_run
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with SummaryWriter(folder) as writer:
        ...         for step in range(3):
        ...             writer.add_scalar("train/loss", 1.0 / (1 + step), step)
        ...     run = read_run(folder)
        >>> run
        {'train/loss': Series(3 points, steps 0 to 2, last 0.333333)}
        >>> run["train/loss"].values
        array([1.        , 0.5       , 0.33333334])
    """
    return TagDict(_read(Path(folder)).scalars)


def read_run_data(folder: Path | str) -> RunData:
    """Read scalars and per-layer tables of a run, at full resolution.

    A table comes from the tensor summaries ``gradient/dual/layers`` of the event files, in model order and float32
    precision. If there are none, as with CSVLogger, it comes from the scalars ``gradient.dual/<layer>``, in natural
    alphabetical order, since that logger sorts its columns. Scalars that a table holds are not among the scalars.

    Args:
        folder: As for :func:`read_run`, restarts included. The columns are the layers of the last row, then those that
            only earlier rows had.

    Raises:
        FileNotFoundError: As :func:`read_run`.
        ValueError: Likewise.
    """
    read = _read(Path(folder))
    return assemble_run(read.scalars, read.tables)


def assemble_run(scalars: dict[str, Series], tables: dict[str, Series]) -> RunData:
    """Separate the scalars of single layers: they are part of a table, or become one.

    Args:
        scalars: Every scalar series by its tag.
        tables: The contents of tensor summaries, by quantity.
    """
    scalars = TagDict(scalars)
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
    return RunData(scalars, TagDict({**tables, **joined}))


def _read(path: Path) -> RunData:
    """Read every scalar, including those of single layers, and the tables of tensor summaries."""
    if not path.is_dir():
        raise FileNotFoundError(f"{printable(path)} is not a folder.")
    files, table = event_files(path), path / TABLE
    if not files and not table.is_file():
        raise FileNotFoundError(_no_run(path))
    log = EventLog()
    for file in files:
        for items in file.records():
            log.add(file, items)
    data = remaining(log)
    damage = [said for file in files for said in file.damage]
    if table.is_file():
        rows, trouble = _rows(table)
        damage += trouble
        is_later = table.stat().st_mtime > max((file.ended for file in files), default=-np.inf)
        data = _merged(data, rows, is_later)
    for said in damage:
        warnings.warn(printable(said), stacklevel=3)
    return data


def remaining(log: EventLog) -> RunData:
    """Convert a log to series."""
    return RunData(
        {tag: curve.series() for tag, curve in log.scalars.items() if len(curve)},
        {quantity: rows.series() for quantity, rows in log.tables.items() if len(rows)},
    )


def _merged(events: RunData, rows: dict[str, Series], rows_are_later: bool) -> RunData:
    """Merge event files and the rows of a table: one session in two places, or from some step on two sessions."""
    parted = {
        tag: step
        for tag in events.scalars.keys() & rows.keys()
        if (step := _parting(events.scalars[tag], rows[tag])) is not None
    }
    scalars, tables = events.scalars, events.tables
    if parted:  # tags may have other axes: each has its own step, the rest the median one
        usual = sorted(parted.values())[len(parted) // 2]
        if rows_are_later:
            scalars, tables = _before(scalars, parted, usual), _before(tables, {}, usual)
        else:
            rows = _before(rows, parted, usual)
    joined = {tag: _filled(rows[tag], scalars[tag]) for tag in rows.keys() & scalars.keys()}
    return RunData({**scalars, **rows, **joined}, tables)


def _parting(event: Series, row: Series) -> int | None:
    """Return the first step at which both have a value and the event file's is not the rounded one."""
    steps, first, second = np.intersect1d(event.steps, row.steps, assume_unique=True, return_indices=True)
    with np.errstate(over="ignore"):
        rounded = row.values[second].astype(np.float32)
    values = event.values[first].astype(np.float32)
    differ = (values != rounded) & ~(np.isnan(values) & np.isnan(rounded))
    return int(steps[differ][0]) if differ.any() else None


def _before(series: dict[str, Series], parted: dict[str, int], usual: int) -> dict[str, Series]:
    """Keep the points before the step of each tag; a tag without points is dropped."""
    kept = {}
    for tag, one in series.items():
        stop = int(np.searchsorted(one.steps, parted.get(tag, usual)))
        if stop:
            kept[tag] = Series(one.steps[:stop], one.values[:stop], one.layers)
    return kept


def _filled(first: Series, second: Series) -> Series:
    """Join the points of both; at a step of both the first counts."""
    others = ~np.isin(second.steps, first.steps)
    steps = np.concatenate([first.steps, second.steps[others]])
    order = np.argsort(steps)
    return Series(steps[order], np.concatenate([first.values, second.values[others]])[order])


def _layer_prefix(quantity: str) -> str:
    return quantity.replace("/", ".")


def _joined(columns: dict[str, Series]) -> Series:
    """Join series of single layers to a table, NaN where one has no value."""
    names = sorted(columns, key=natural_key)
    steps = np.unique(np.concatenate([series.steps for series in columns.values()]))
    values = np.full((len(steps), len(names)), np.nan)
    for index, name in enumerate(names):
        values[np.searchsorted(steps, columns[name].steps), index] = columns[name].values
    return Series(steps, values, tuple(names))


def _no_run(folder: Path) -> str:
    below = find_runs(folder)
    message = f"{printable(folder)} holds neither event files nor {TABLE}."
    more = f", and {len(below) - 10} more" if len(below) > 10 else ""
    names = ", ".join(printable(run.path) for run in below[:10])
    return f"{message} Runs below it, the newest first: {names}{more}." if below else message


def _rows(path: Path) -> tuple[dict[str, Series], list[str]]:
    """Read the series of a table, and list what could not be read."""
    log, trouble = EventLog(), []
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        rows = csv.reader(file)
        try:
            header = next(rows, [])
            if "step" not in header:
                raise ValueError(f"{printable(path)} has no column 'step', so it is not what CSVLogger writes.")
            for row in rows:
                log.add(None, list(_points(header, row)))
        except csv.Error as error:
            trouble.append(f"{path} is damaged: line {rows.line_num} and what follows were skipped ({error}).")
    return remaining(log).scalars, trouble


def _points(header: list[str], row: list[str]) -> Iterator[Point]:
    where = header.index("step")
    step = _number(row[where]) if len(row) > where else None  # truncated where the run was killed
    if step is None or not abs(step) < 2**63:  # not a number, or none of a step
        return
    for tag, cell in zip(header, row, strict=False):
        value = None if tag == "step" else _number(cell)
        if value is not None:
            yield current_tag(tag), int(step), value


def _number(cell: str) -> float | None:
    """Convert a cell to a number; None if it is empty or text."""
    try:
        return float(cell) if cell else None
    except ValueError:
        return None
