"""``dynamon report``: show a run as one HTML file or as text, or print its health findings as JSON."""

import argparse
import json
import sys
from collections.abc import Iterator
from itertools import chain, count
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from dynamon.board.page import page
from dynamon.board.payload import payload
from dynamon.board.progress import progress_lines
from dynamon.board.summary import summarise
from dynamon.cli.refusal import refusing
from dynamon.cli.run_argument import RUN_HELP, read_run_argument, run_folder, selection_line
from dynamon.health import Finding, examine, findings, judged_loss, loss_tag
from dynamon.quantities import REGISTRY, Scope
from dynamon.runs import read_run_data
from dynamon.runs.folders import printable
from dynamon.runs.history import RunData, Series

_WIDTH = 48  # columns of a sparkline
_BLOCKS, _PLAIN = "▁▂▃▄▅▆▇█", "_.-~+=*#"
_ROWS = [
    (one.row, f"{one.tag}_median" if one.scope is Scope.PER_LAYER else one.tag) for one in REGISTRY.values() if one.row
]
_TABLES = [one.tag for one in REGISTRY.values() if one.extremes]


def add_parser(commands: Any) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "report",
        help="show a run, or several: stability, layers, rates and health, as one HTML file or as text",
        description="Show what dynamon's callbacks logged to TensorBoard or CSVLogger: as an HTML file that needs no "
        "network, as a summary for the terminal, or what looks wrong as JSON. Several runs make one table and one "
        "picture of how they ended: final loss, highest stability ratio, health. A run that was restarted in its "
        "folder is shown as TensorBoard shows it, without the points that the restart made invalid.",
    )
    parser.add_argument("folders", type=run_folder, nargs="+", metavar="RUN", help=f"{RUN_HELP}; several are compared")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="write the page to FILE, replacing it (default: report.html, or report-1.html and so on if it exists)",
    )
    parser.add_argument(
        "--loss", metavar="TAG", help="tag of the training loss; by default it is found by its name, and printed"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--text", action="store_true", help="print a summary instead")
    form.add_argument("--json", action="store_true", help="print what looks wrong as JSON instead")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Read runs, check their health, show them.

    Args:
        options: The parsed options.

    Returns:
        0 whatever the health of the run.

    Raises:
        RefusalError: If a run cannot be read or holds no readings of dynamon, or the page cannot be written.
    """
    with refusing():
        _check(options)
        found = [_read(folder, options.loss) for folder in options.folders]
        runs = list(zip(_names([folder for folder, _ in found]), [data for _, data in found], strict=True))
        _require_readings(runs)
        pairs = zip(options.folders, found, strict=True)
        selected = [line for folder, (run, _) in pairs if (line := selection_line(folder, run))]
        if options.json:
            _print(iter(selected), sys.stderr)
            print(json.dumps(_health(runs, options.loss), indent=2, allow_nan=False))
        elif options.text:
            _print(iter(selected))
            _print(iter(_sweep(runs, options.loss)))
            _print(line for name, data in runs for line in summary(data, name, options.loss))
        else:
            packs = [payload(data, name, options.loss, len(runs)) for name, data in runs]
            written = _write(page(packs), options.output)
            told = (_told(pack, data, options.loss) for pack, (_, data) in zip(packs, runs, strict=True))
            _print(chain(selected, [written], *told))
    return 0


def summary(run: RunData, name: str, loss: str | None = None) -> Iterator[str]:
    """Describe a run in lines for a terminal: sparklines over its steps, extreme layers, progress, health findings.

    Args:
        run: Its scalars and per-layer tables.
        name: Its name in the first line.
        loss: Tag of the training loss; None looks for one.

    Yields:
        The lines.
    """
    yield f"{name}: {run.last_step + 1} steps, {len(run.scalars)} scalars, {len(run.tables)} per-layer quantities"
    judged = judged_loss(run.scalars, loss)
    yield f"  loss: {_loss_source(run, loss)}"
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
        yield f"  {quantity:20}  {_extremes(table)}"
    lines = list(progress_lines(run))
    if lines:
        yield from ["", *lines]
    yield ""
    examined = examine(run, loss)
    if not examined.findings:
        yield "  health: nothing looks wrong"
    for finding in examined.findings:
        yield from _lines(finding)
    checks = [check for check in examined.checks if check.value is not None]
    yield ""
    yield f"  checked, {len(checks)} of {len(examined.checks)} (the others lack readings)"
    for check in checks:
        yield f"  {check.severity or 'fine':8} {check.words}: {check.value}"


def sparkline(series: Series, last_step: int, width: int = _WIDTH) -> str:
    """Draw a series over steps 0 to ``last_step`` with blocks of eight heights.

    A column shows the median of its readings, a blank without any, and ``x`` if one of them is not finite.
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


def _extremes(table: Series) -> str:
    """Name the layers with the highest and the lowest value at the end."""
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
    """Write the page and say where; only a file that ``--output`` names is replaced."""
    if output is None:
        path, kept = _write_new(content)
        note = f"; {kept} was kept, -o {kept} replaces it" if kept else ""
    else:
        output.write_text(content, encoding="utf-8")
        path, note = output, ""
    return f"report        {printable(path)} ({path.stat().st_size / 1e6:.1f} MB, opens in any browser{note})"


def _write_new(content: str) -> tuple[Path, Path | None]:
    """Write to the first of report.html, report-1.html, ... that does not exist; return it and the first that did."""
    first = path = Path("report.html")
    for number in count(1):
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(content)
        except FileExistsError:
            path = first.with_stem(f"{first.stem}-{number}")
        else:
            break
    return path, None if path == first else first


def _loss_source(run: RunData, loss: str | None) -> str:
    """Say which series is taken for the training loss, and why."""
    judged = judged_loss(run.scalars, loss)
    if judged is None:
        return "no tag looks like the training loss; name it with --loss TAG"
    return judged.reason if judged.source in ("returned", "stated") else f"{judged.reason}; --loss TAG takes another"


def _told(pack: dict[str, Any], data: RunData, loss: str | None) -> Iterator[str]:
    """Say how healthy a run is, and by which loss."""
    yield f"health        {pack['name']}: {_counted(pack['summary']['counts'])}"
    yield f"loss          {pack['name']}: {_loss_source(data, loss)}"


def _counted(counts: dict[str, int]) -> str:
    """Describe numbers of findings by severity."""
    parts = [f"{number} {kind}{'s' * (number > 1)}" for kind, number in counts.items() if number]
    return ", ".join(parts) or "nothing looks wrong"


def _health(runs: list[tuple[str, RunData]], loss: str | None) -> list[dict[str, Any]]:
    examined = [(name, data, examine(data, loss)) for name, data in runs]
    return [
        {
            "run": name,
            "loss": loss or loss_tag(data.scalars),
            "findings": [one.as_dict() for one in found.findings],
            "checks": [one.as_dict() for one in found.checks],
            "summary": summarise(data, found),
        }
        for name, data, found in examined
    ]


def _check(options: argparse.Namespace) -> None:
    if options.output is not None and (options.text or options.json):
        raise ValueError("--output names the file of the page; --text and --json print, so leave it out.")


def _read(folder: Path, loss: str | None) -> tuple[Path, RunData]:
    run, data = read_run_argument("report", folder, read_run_data)
    if not data.scalars and not data.tables:
        raise ValueError(
            f"{printable(run)} holds a run without a single value: nothing was logged, or training has just begun."
        )
    if loss is not None and loss not in data.scalars:
        tags = ", ".join(sorted(tag for tag in data.scalars if "loss" in tag.lower())[:12])
        raise ValueError(f"{printable(run)} holds no {loss}; tags with 'loss' in their name: {tags or 'none'}.")
    return run, data


def _require_readings(runs: list[tuple[str, RunData]]) -> None:
    """Refuse if no run holds readings of dynamon; some of several may hold none, as a baseline."""
    missing = [[one for one in findings(data) if one.rule == "dynamon/nothing"] for _, data in runs]
    if all(missing):
        finding = missing[0][0]
        names = " and ".join(name for name, _ in runs)
        raise ValueError(f"{names}: {finding.message} {finding.advice}")


def _names(folders: list[Path]) -> list[str]:
    """Name each by the last two parts of its path, since the last is often ``version_0``, or by as many as differ."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(2, max(map(len, parts)) + 1):
        names = ["/".join(one[-length:]).lstrip("/") for one in parts]
        if len(set(names)) == len(set(parts)):
            break
    return [printable(name) for name in names]


def _sweep(runs: list[tuple[str, RunData]], loss: str | None) -> Iterator[str]:
    """Print a table of several runs, one row for each."""
    if len(runs) < 2:
        return
    rows = [{"name": name, **summarise(data, examine(data, loss))} for name, data in runs]
    width = max(len(row["name"]) for row in rows)
    columns = {"rate": "highest rate", "final": "final loss", "lowest": "lowest loss", "ratio": "highest ratio"}
    yield f"  {'':{width}}  {'steps':>8}" + "".join(f"  {title:>13}" for title in columns.values()) + "  health"
    for row in rows:
        cells = "".join(f"  {'-' if row[key] is None else format(float(row[key]), '.4g'):>13}" for key in columns)
        yield f"  {row['name']:{width}}  {row['steps']:>8}{cells}  {_counted(row['counts'])}"
    yield ""


def _print(lines: Iterator[str], stream: TextIO | None = None) -> None:
    """Print lines; characters of tag and layer names that the terminal cannot show are replaced."""
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
