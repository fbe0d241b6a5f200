"""``dynamon report``: a run as one HTML file, as text, or what looks wrong in it as JSON."""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from dynamon.board.page import page
from dynamon.board.payload import payload
from dynamon.cli.run_argument import RUN_HELP, choice, read
from dynamon.health import Finding, findings, judged_loss, loss_tag
from dynamon.quantities import REGISTRY, Scope
from dynamon.runs import read_run_data
from dynamon.runs.folders import printable
from dynamon.runs.history import RunData, Series

_WIDTH = 48  # columns of a row of blocks
_BLOCKS, _PLAIN = "▁▂▃▄▅▆▇█", "_.-~+=*#"
_ROWS = [
    (one.row, f"{one.tag}_median" if one.scope is Scope.PER_LAYER else one.tag) for one in REGISTRY.values() if one.row
]
_TABLES = [one.tag for one in REGISTRY.values() if one.extremes]


def add_parser(commands: Any) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "report",
        help="show a run: stability, layers, rates and health, as one HTML file or as text",
        description="Show what DynamicsMonitor and its like logged to TensorBoard or CSVLogger: an HTML file that "
        "needs no network, a summary for the terminal, or what looks wrong as JSON. A run that was restarted in its "
        "folder is shown as TensorBoard shows it: without what the newer writer made void.",
    )
    parser.add_argument("folders", type=Path, nargs="+", metavar="RUN", help=f"{RUN_HELP}; two are compared")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="where the page goes (report.html, in the place of the report before it)",
    )
    parser.add_argument(
        "--loss", metavar="TAG", help="tag of the training loss; found by its name by default, and named"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--text", action="store_true", help="print a summary instead")
    form.add_argument("--json", action="store_true", help="print what looks wrong as JSON instead")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Read, check, show.

    Args:
        options: The parsed options.

    Returns:
        0 whatever the health of the run, or 2 with the reason printed where it cannot be read or written, or holds
        nothing of dynamon.
    """
    try:
        _check(options)
        read_runs = [_read(folder, options.loss) for folder in options.folders]
        runs = [(_name(folder), data) for folder, data in read_runs]
        _require_readings(runs)
        pairs = zip(options.folders, read_runs, strict=True)
        chosen = [said for folder, (run, _) in pairs if (said := choice(folder, run))]
        if options.json:
            _print(iter(chosen), sys.stderr)
            print(json.dumps(_health(runs, options.loss), indent=2, allow_nan=False))
        elif options.text:
            _print(iter(chosen))
            _print(line for name, data in runs for line in summary(data, name, options.loss))
        else:
            content = page([payload(data, name, options.loss) for name, data in runs])
            written = _write(content, options.output)
            _print(iter([*chosen, written, *_told(runs, options.loss)]))
    except (ValueError, OSError) as error:
        print(f"dynamon report: {error}", file=sys.stderr)
        return 2
    return 0


def summary(run: RunData, name: str, loss: str | None = None) -> Iterator[str]:
    """A run in lines for a terminal: rows of blocks over its steps, layers that stand out, what looks wrong.

    Args:
        run: What is known of it.
        name: What to call it.
        loss: Tag of the training loss; None looks for one.
    """
    yield f"{name}: {run.last_step + 1} steps, {len(run.scalars)} scalars, {len(run.tables)} per-layer quantities"
    judged = judged_loss(run.scalars, loss)
    yield f"  loss: {_judged(run, loss)}"
    rows = [*([("loss", judged.tag)] if judged else []), *_ROWS]
    known = [(label, run.scalars[key]) for label, key in rows if key in run.scalars]
    if known:
        yield ""
        yield f"  {'':16}  {'first':>9}  {'last':>9}  {'lowest':>9}  {'highest':>9}  steps 0 to {run.last_step}"
    for label, series in known:
        finite = series.values[np.isfinite(series.values)]
        ends = (series.values[0], series.values[-1], *((finite.min(), finite.max()) if len(finite) else (np.nan,) * 2))
        yield f"  {label:16}" + "".join(f"  {value:9.3g}" for value in ends) + f"  {sparkline(series, run.last_step)}"
    tables = [(quantity, run.tables[quantity]) for quantity in _TABLES if quantity in run.tables]
    if tables:
        yield ""
        yield "  layers, median of the last readings"
    for quantity, table in tables:
        yield f"  {quantity:20}  {_outstanding(table)}"
    yield ""
    found = findings(run, loss)
    if not found:
        yield "  health: nothing looks wrong"
    for finding in found:
        yield from _lines(finding)


def sparkline(series: Series, last_step: int, width: int = _WIDTH) -> str:
    """The series over steps 0 to ``last_step`` in blocks of eight heights; a blank where there is no reading.

    A column shows the median of its readings, ``x`` where one of them is not finite.
    """
    column = np.minimum(series.steps * width // (last_step + 1), width - 1)
    finite = np.isfinite(series.values)
    middle = {int(c): float(np.median(series.values[finite & (column == c)])) for c in np.unique(column[finite])}
    broken = set(column[~finite].tolist())
    low, high = min(middle.values(), default=0.0), max(middle.values(), default=0.0)

    def block(c: int) -> str:
        if c in broken:
            return "x"
        if c not in middle:
            return " "
        return _BLOCKS[round(7 * (middle[c] - low) / (high - low))] if high > low else _BLOCKS[3]

    return "".join(map(block, range(width)))


def _outstanding(table: Series) -> str:
    """The layers with the highest and the lowest value at the end."""
    recent = table.values[-5:]
    known = np.isfinite(recent).any(0)
    if not known.any():
        return "no finite value"
    names = np.array(table.layers, dtype=object)[known]
    level = np.array([np.median(column[np.isfinite(column)]) for column in recent[:, known].T])
    top, low = int(np.argmax(level)), int(np.argmin(level))
    middle: NDArray[Any] = np.median(level)
    return f"median {middle:.3g}, highest {level[top]:.3g} in {names[top]}, lowest {level[low]:.3g} in {names[low]}"


def _lines(finding: Finding) -> Iterator[str]:
    yield f"  {finding.severity} from step {finding.step}: {finding.message}"
    if len(finding.layers) > 1:
        more = f", and {len(finding.layers) - 5} more" if len(finding.layers) > 5 else ""
        yield f"      layers: {', '.join(finding.layers[:5])}{more}"
    yield f"      {finding.advice}"


def _write(content: str, output: Path | None) -> str:
    """Write the page and say where; without ``--output`` nothing but a report is replaced."""
    path = output or Path("report.html")
    replaces = output is None and path.exists()
    if replaces and b"<title>dynamon: " not in path.read_bytes()[:4096]:
        raise ValueError(f"{path} is there and no report of dynamon: give --output FILE, or move it away.")
    path.write_text(content, encoding="utf-8")
    place = ", in the place of the one before" if replaces else ""
    return f"report        {printable(path)} ({path.stat().st_size / 1e6:.1f} MB, opens in any browser{place})"


def _judged(run: RunData, loss: str | None) -> str:
    """Which series was taken for the training loss, and why."""
    judged = judged_loss(run.scalars, loss)
    if judged is None:
        return "no tag looks like the training loss; name it with --loss TAG"
    return judged.reason if judged.source in ("returned", "stated") else f"{judged.reason}; --loss TAG takes another"


def _told(runs: list[tuple[str, RunData]], loss: str | None) -> Iterator[str]:
    for name, data in runs:
        found = findings(data, loss)
        counts = [
            (kind, sum(one.severity == kind for one in found)) for kind in dict.fromkeys(f.severity for f in found)
        ]
        health = ", ".join(f"{count} {kind}{'s' * (count > 1)}" for kind, count in counts) or "nothing looks wrong"
        yield f"health        {name}: {health}"
        yield f"loss          {name}: {_judged(data, loss)}"


def _health(runs: list[tuple[str, RunData]], loss: str | None) -> list[dict[str, Any]]:
    return [
        {
            "run": name,
            "loss": loss or loss_tag(data.scalars),
            "findings": [one.as_dict() for one in findings(data, loss)],
        }
        for name, data in runs
    ]


def _check(options: argparse.Namespace) -> None:
    if len(options.folders) > 2:
        raise ValueError(f"one run, or two to compare; got {len(options.folders)}.")
    if options.output is not None and (options.text or options.json):
        raise ValueError("--output is where the page goes; --text and --json print, so leave it out.")


def _read(folder: Path, loss: str | None) -> tuple[Path, RunData]:
    run, data = read("report", folder, read_run_data)
    if not data.scalars and not data.tables:
        raise ValueError(
            f"{printable(run)} holds a run without a single value: it logged nothing, or has only just begun."
        )
    if loss is not None and loss not in data.scalars:
        there = ", ".join(sorted(tag for tag in data.scalars if "loss" in tag.lower())[:12])
        raise ValueError(f"{printable(run)} holds no {loss}; tags with 'loss' in their name: {there or 'none'}.")
    return run, data


def _require_readings(runs: list[tuple[str, RunData]]) -> None:
    """Refuse runs that all are without dynamon; one of two may be, as a baseline."""
    nothing = [[one for one in findings(data) if one.rule == "dynamon/nothing"] for _, data in runs]
    if all(nothing):
        what = nothing[0][0]
        names = " and ".join(name for name, _ in runs)
        raise ValueError(f"{names}: {what.message} {what.advice}")


def _name(folder: Path) -> str:
    """The last two parts: the last alone is often ``version_0``."""
    return printable("/".join(folder.resolve().parts[-2:]).lstrip("/"))


def _print(lines: Iterator[str], stream: TextIO | None = None) -> None:
    """Names of tags and layers may hold anything: what is not printable, or not in the terminal's set, is replaced."""
    stream = stream or sys.stdout
    encoding = stream.encoding or "utf-8"
    for line in lines:
        text = "".join(c if c.isprintable() else "?" for c in line)
        try:
            text.encode(encoding)
        except UnicodeEncodeError:
            plain = text.translate(str.maketrans(_BLOCKS, _PLAIN))
            text = plain.encode(encoding, "replace").decode(encoding)
        print(text, file=stream)
