"""The file of results: what is in it is not run again, and several processes may add to it."""

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.environment import environment

SECTIONS = ("rates", "strengths", "faults", "healthy")


class Book:
    """Results by section and key.

    Args:
        path: The file; None keeps nothing.
    """

    def __init__(self, path: Path | None) -> None:
        """Read what is there."""
        self._path = path
        found = json.loads(path.read_text()) if path is not None and path.exists() else {}
        self.sections: dict[str, dict[str, Any]] = {name: found.get(name, {}) for name in SECTIONS}

    def get(self, section: str, key: str, make: Callable[[], Any]) -> Any:
        """Return an entry, and make it first where it is missing."""
        entries = self.sections[section]
        if key not in entries:
            begin = time.perf_counter()
            entries[key] = make()
            took = time.perf_counter() - begin
            print(
                f"{time.strftime('%H:%M:%S')} {section:9s} {key:60s} {took:5.1f} s  {_brief(entries[key])}", flush=True
            )
            self._save({section: {key: entries[key]}})
        return entries[key]

    def _save(self, more: dict[str, Any], without: Iterable[str] = ()) -> None:
        """Add to the file, which another process may have written since."""
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            there = json.loads(self._path.read_text()) if self._path.exists() else {}
            there["environment"] = environment("faults") | {"command": "python -m benchmarks.faults"}
            for section, entries in more.items():
                kept = {} if section in without else there.get(section, {})
                there[section] = dict(sorted((kept | entries).items()))
            text = json.dumps(there, separators=(",", ":"), allow_nan=False).replace('},"', '},\n"')
            new = self._path.with_suffix(".new")
            new.write_text(text + "\n")
            os.replace(new, self._path)
        finally:
            os.close(folder)

    def forget(self, *sections: str) -> None:
        """Empty some sections."""
        self.sections |= {name: {} for name in sections}
        self._save({name: {} for name in sections}, without=sections)


def _brief(entry: Any) -> str:
    if isinstance(entry, dict) and "findings" in entry:
        found = [f"{one['rule']}@{one['step']}({one['known']})" for one in entry["findings"]]
        return f"loss {entry['loss']} {', '.join(found[:6])}"
    return str(entry)[:110]
