"""Runs of the study and the file that holds them; what is in the file is not run again."""

import fcntl
import json
import math
import os
import statistics
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

from benchmarks.environment import environment
from benchmarks.rates_study.tasks import REPORTED, TUNING, Task
from benchmarks.rates_study.train import train

HALF_OCTAVE = math.sqrt(2)


def key_of(task: str, arm: str, rate: float, seed: int, ratios: Iterable[float] = ()) -> str:
    """The key under which the result of a run is kept.

    Args:
        task: Its name.
        arm: ``"fixed"``, or one of :data:`benchmarks.rates_study.arms.RULES`.
        rate: Base rate.
        seed: Of the weights and the batches.
        ratios: Of the groups of the task, in their order; empty for all 1.
    """
    return f"{task}|{arm}|{rate:.4g}|{seed}|{','.join(f'{r:.4g}' for r in ratios)}"


class Book:
    """Results by job. Several processes may write the same file, each its own tasks.

    Args:
        path: The file; None keeps nothing.
        tasks: By name.
        seeds: Tuning and reported seeds.
    """

    def __init__(
        self,
        path: Path | None,
        tasks: dict[str, Task],
        seeds: tuple[Sequence[int], Sequence[int]] = (TUNING, REPORTED),
    ) -> None:
        """Read what is there."""
        self._path, self.tasks, (self.tuning, self.reported) = path, tasks, seeds
        found = json.loads(path.read_text()) if path is not None and path.exists() else {}
        self.runs: dict[str, Any] = found.get("runs", {})
        self.chosen: dict[str, Any] = found.get("chosen", {})

    def run(self, task: str, arm: str, rate: float, seed: int, ratios: tuple[float, ...] = ()) -> dict[str, Any]:
        """The result of a run."""
        key = key_of(task, arm, rate, seed, ratios)
        if key not in self.runs:
            begin = time.perf_counter()
            found = train(self.tasks[task], arm, rate, seed, ratios, seed in self.reported)
            found["seconds"] = round(time.perf_counter() - begin, 1)
            self.runs[key] = found
            print(f"{time.strftime('%H:%M:%S')} {key:70s} {found['final']} {found['seconds']} s", flush=True)
            self._save({"runs": {key: found}})
        return cast(dict[str, Any], self.runs[key])

    def finals(self, task: str, arm: str, rate: float, ratios: tuple[float, ...], seeds: Iterable[int]) -> list[float]:
        """The final losses of some seeds; that of a lost run is infinite."""
        found = [self.run(task, arm, rate, seed, ratios)["final"] for seed in seeds]
        return [math.inf if final is None else final for final in found]

    def mean(self, task: str, arm: str, rate: float, ratios: tuple[float, ...], seeds: Sequence[int] = ()) -> float:
        """The mean final loss of the tuning seeds."""
        return statistics.fmean(self.finals(task, arm, rate, ratios, seeds or self.tuning))

    def tune(self, task: str, arm: str, ratios: tuple[float, ...], start: float, seeds: Sequence[int] = ()) -> float:
        """The best base rate on the tuning seeds, on a grid of half octaves, never at the edge of what was tried."""
        tried: dict[int, float] = {}
        best = 0
        while not {best - 1, best, best + 1} <= set(tried):
            for k in (best - 1, best, best + 1):
                if k not in tried:
                    tried[k] = self.mean(task, arm, start * HALF_OCTAVE**k, ratios, seeds)
            best = min(tried, key=lambda k: tried[k])
        return float(f"{start * HALF_OCTAVE**best:.4g}")

    def arm(
        self,
        task: str,
        name: str,
        start: float,
        arm: str = "fixed",
        ratios: tuple[float, ...] = (),
        seeds: Sequence[int] = (),
    ) -> float:
        """Tune an arm on some seeds, run its reported seeds, note it under its name, and return its rate."""
        ratios = () if all(ratio == 1 for ratio in ratios) else ratios
        rate = self.tune(task, arm, ratios, start, seeds)
        self.finals(task, arm, rate, ratios, self.reported)
        noted = {"arm": arm, "rate": rate, "ratios": list(ratios)}
        self.chosen.setdefault(task, {})[name] = noted
        self._save({"chosen": {task: {name: noted}}})
        return rate

    def _save(self, more: dict[str, Any]) -> None:
        """Add to the file, which another process may have written since."""
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            there = json.loads(self._path.read_text()) if self._path.exists() else {}
            there["environment"] = environment("adaptive") | {"command": "python -m benchmarks.adaptive"}
            there.setdefault("runs", {}).update(more.get("runs", {}))
            for task, arms in more.get("chosen", {}).items():
                there.setdefault("chosen", {}).setdefault(task, {}).update(arms)
            text = json.dumps(there, separators=(",", ":"), default=str, allow_nan=False).replace('},"', '},\n"')
            new = self._path.with_suffix(".new")
            new.write_text(text + "\n")
            os.replace(new, self._path)
        finally:
            os.close(folder)
