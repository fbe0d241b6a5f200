"""Write findings as JSON lines beside the event files of a run."""

import json
import math
import os
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dynamon.health import Finding

NAME = "findings.jsonl"
VERSION = 1  # of the format


class FindingFile:
    """One line a finding, in strict JSON: a number that is not finite is null.

    ====================  ===========================================================================================
    ``version``           1, the version of this format
    ``time``              when it was found, ISO 8601 in UTC
    ``found_at``          the last step whose readings the rule saw
    ``step``              where it began
    ``rule``              the rule
    ``severity``          ``"fault"``, ``"warning"`` or ``"note"``
    ``layers``            names of the layers concerned
    ``message``           what was seen
    ``advice``            the usual remedy
    ``numbers``           the numbers in the message, by name
    ``tags``              tags and per-layer quantities that show it
    ====================  ===========================================================================================

    Args:
        folder: The folder of the run. It is made with the first line.
    """

    def __init__(self, folder: Path) -> None:
        """Start with nothing written."""
        self.path = folder / NAME

    def append(self, found: Iterable[Finding], found_at: int) -> None:
        """Write lines at the end. They are in the operating system's hands when this returns.

        Args:
            found: The findings.
            found_at: The last step whose readings the rules saw.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(f"{json_line(one, found_at)}\n" for one in found)
        with self.path.open("ab+") as file:
            if file.tell() and not self._ends_a_line(file):  # what a crash has cut stays a line of its own
                text = "\n" + text
            file.write(text.encode())

    def purge(self, step: int) -> None:
        """Remove what was found at a step or later, and lines that are cut; the file is replaced at once or not at all.

        Args:
            step: The step that training goes on from.
        """
        if not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        kept = [line for line in lines if _found_before(line, step)]
        if len(kept) < len(lines):
            new = self.path.with_name(f"{NAME}.{os.getpid()}")
            new.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
            new.replace(self.path)

    @staticmethod
    def _ends_a_line(file: Any) -> bool:
        file.seek(-1, os.SEEK_END)
        return bool(file.read(1) == b"\n")


def json_line(finding: Finding, found_at: int) -> str:
    """Return a finding as one line of strict JSON, in ASCII."""
    line = {
        "version": VERSION,
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "found_at": found_at,
        "step": finding.step,
        "rule": finding.rule,
        "severity": finding.severity,
        "layers": list(finding.layers),
        "message": finding.message,
        "advice": finding.advice,
        "numbers": {name: float(value) if math.isfinite(value) else None for name, value in finding.numbers.items()},
        "tags": list(finding.tags),
    }
    return json.dumps(line, allow_nan=False)


def _found_before(line: str, step: int) -> bool:
    """Return whether a line was found before a step; one that is cut was not."""
    try:
        found = json.loads(line)
    except ValueError:
        return False
    at = found.get("found_at") if isinstance(found, dict) else None
    return not isinstance(at, int) or at < step
