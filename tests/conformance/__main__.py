"""Run every cell and write what held to docs/conformance.md."""

import argparse
import os
import platform
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch

from tests.conformance.subjects import MODELS
from tests.conformance.tables import (
    CALLBACKS,
    EVERY_CELL,
    IMPOSSIBLE,
    KNOWN,
    SAME,
    SETUPS,
    Cell,
    all_cells,
    cells,
    covering,
    every_row,
    seconds_of,
)

TARGET = Path(__file__).parents[2] / "docs" / "conformance.md"
_HOLDS = """In every cell that is counted below

- weights, buffers, optimizer state, the random streams of torch, numpy and python, the order of the data,
  torchmetrics, and everything the user logs are bitwise those of the run without dynamon (the row marked * steers: of
  it the rest holds);
- every documented tag that applies has at least five finite readings (tags of every tenth reading: one; tags that
  depend on what is found, a power law or a value that did not converge, are not counted), and no measurement failed;
  under `barebones` there are none at all;
- loggers and history hold documented keys only, and the same ones;
- the state survives a file loaded with `weights_only=True`, and is saved again as it was;
- a second fit with the same callback objects does all of this again, with the same readings."""


class Table:
    """A pytest plugin that notes how each cell ends."""

    def __init__(self, minutes: float | None) -> None:
        self.outcomes: dict[Cell, tuple[str, float]] = {}
        self._begin, self._minutes = time.monotonic(), minutes

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._begin

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Quick cells first, so that a run that is cut short has seen most."""
        items.sort(key=lambda item: seconds_of(cell) if (cell := _cell_of(item)) else 0.0)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: Any, call: Any) -> Iterator[Any]:
        report = yield
        cell = _cell_of(item)
        if cell and (report.when == "call" or report.failed):
            expected = report.outcome == "skipped" and hasattr(report, "wasxfail")
            self.outcomes[cell] = ("known" if expected else report.outcome, call.duration)
        return report

    def pytest_runtest_teardown(self, item: Any) -> None:
        if self._minutes is not None and self.seconds > 60 * self._minutes:
            item.session.shouldstop = f"{self._minutes:g} minutes are over"

    def text(self) -> str:
        """The page."""
        counts = Counter(outcome for outcome, _ in self.outcomes.values())
        every, possible = all_cells(), cells()
        lines = [
            "# Conformance",
            "",
            f"{len(MODELS)} models x {len(SETUPS)} set-ups x {len(CALLBACKS)} callbacks are {len(every)} cells; "
            f"{len(possible)} of them exist, and {len(self.outcomes)} were run in {self.seconds / 60:.0f} minutes on "
            f"one thread: {counts['passed']} passed, {counts['skipped']} cannot run here without dynamon either, "
            f"{counts['known']} have a known fault, {counts['failed']} failed. "
            f"`make conformance` writes this page; `make test` runs {len(every_row(possible))} cells that hold every "
            f"row, `make slow` the {len(covering(possible))} that hold every pair of rows.",
            "",
            f"torch {torch.__version__}, lightning {lightning.__version__}, Python {platform.python_version()}, CPU.",
            "",
            _HOLDS,
            "",
            "## Set-ups and models",
            "",
            "Callbacks for which all of it holds, of those that were run. A dash: cannot exist, or is another cell.",
            "",
            *_grid(self.outcomes),
            "",
            "## Callbacks",
            "",
            *self._callbacks(),
            "",
            "## Left out",
            "",
            *_left_out(),
            "",
            "## Known faults",
            "",
            *([f"- {_where(rule)}: {rule.reason}" for rule in KNOWN] or ["None."]),
            "",
        ]
        failed = [f"- {cell}" for cell, (outcome, _) in self.outcomes.items() if outcome == "failed"]
        return "\n".join([*lines, *(["## Failed", "", *failed, ""] if failed else [])])

    def _callbacks(self) -> Iterator[str]:
        yield "| callbacks | holds | seconds a cell, median |"
        yield "| --- | --- | --- |"
        by_name = defaultdict(list)
        for cell, found in self.outcomes.items():
            by_name[cell.callback].append(found)
        for name, row in CALLBACKS.items():
            found = by_name[name]
            times = sorted(seconds for _, seconds in found)
            passed = sum(outcome == "passed" for outcome, _ in found)
            median = f"{times[len(times) // 2]:.2g}" if times else ""
            yield f"| {name}{'' if row.neutral else ' *'} | {passed} of {len(found)} | {median} |"


def _cell_of(item: Any) -> Cell | None:
    return item.callspec.params.get("cell") if hasattr(item, "callspec") else None


def _grid(outcomes: dict[Cell, tuple[str, float]]) -> Iterator[str]:
    possible = {cell[:2] for cell in cells()}
    by_pair = defaultdict(list)
    for cell, (outcome, _) in outcomes.items():
        by_pair[cell[:2]].append(outcome)
    yield f"| | {' | '.join(MODELS)} |"
    yield "| --- |" + " --- |" * len(MODELS)
    for setup in SETUPS:
        found = [by_pair[model, setup] if (model, setup) in possible else None for model in MODELS]
        entries = ["-" if f is None else f"{f.count('passed')}/{len(f)}" if f else "not run" for f in found]
        yield f"| {setup} | {' | '.join(entries)} |"


def _left_out() -> Iterator[str]:
    yield from (f"- {name}: {setup.skipped}" for name, setup in SETUPS.items() if setup.skipped)
    yield from (f"- {_where(rule)}: {rule.reason}" for rule in (*IMPOSSIBLE, *SAME))


def _where(rule: Any) -> str:
    return " x ".join(", ".join(names) for names in rule[1:] if names is not None)


def main() -> int:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, help="stop after so many; the page says how many cells were run")
    own, others = parser.parse_known_args()
    table = Table(own.minutes)
    folder = str(Path(__file__).parent)
    os.environ[EVERY_CELL] = "1"
    code = pytest.main([folder, "-m", "", "-q", "--tb", "short", "-p", "no:cacheprovider", *others], plugins=[table])
    TARGET.write_text(table.text())
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
