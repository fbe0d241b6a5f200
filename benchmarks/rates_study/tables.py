"""What the runs of the study say: losses by arm, paired differences with intervals, verdicts, ranges of good rates."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t

from benchmarks.rates_study.arms import progress_by_cost
from benchmarks.rates_study.book import key_of
from benchmarks.rates_study.tasks import REPORTED, TUNING, tasks

GOOD = 1.02  # times the best loss
# In the order of tables.
ARMS = """uniform, oracle, committed, advised, advised within 2, inside, following, by norm, short search, balanced,
averaged, trials, permuted, inverted, mean only, noise, LLR, blockwise, former radii""".replace("\n", " ").split(", ")
GROUPS = {name: list(task.groups) for name, task in tasks().items()}


class Interval(NamedTuple):
    """A mean and half of its 95 % interval (Student)."""

    mean: float
    half: float

    @property
    def upper(self) -> float:
        """The upper end."""
        return self.mean + self.half

    def __str__(self) -> str:
        """As tables show it."""
        return f"{self.mean:.4f} ± {self.half:.4f}" if math.isfinite(self.mean) else "lost"


def interval(values: Sequence[float]) -> Interval:
    """Of the mean of some values; infinite for one, and where a run was lost."""
    mean = statistics.fmean(values)
    if len(values) < 2 or not math.isfinite(mean):
        return Interval(mean, math.inf)
    return Interval(mean, float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values)))


def _loss(run: Mapping[str, Any]) -> float:
    """The final loss of a run, infinite where it was lost."""
    return math.inf if run["final"] is None else float(run["final"])


class Results:
    """The runs of a file of results.

    Args:
        runs: By key.
        chosen: By task and arm: the base rate and the ratios that are reported.
        reported: Seeds.
        tuning: Seeds.
    """

    def __init__(
        self,
        runs: Mapping[str, Any],
        chosen: Mapping[str, Any],
        reported: Sequence[int] = REPORTED,
        tuning: Sequence[int] = TUNING,
    ) -> None:
        """Remember them, in the order of tables."""
        self.runs, self.reported, self.tuning = runs, reported, tuning
        names = [name for name in GROUPS if name in chosen] + [name for name in chosen if name not in GROUPS]
        self.chosen = {task: dict(sorted(chosen[task].items(), key=lambda item: ARMS.index(item[0]))) for task in names}

    def finals(self, task: str, name: str) -> dict[int, float]:
        """Final losses of an arm by reported seed; some arms were run on fewer than all."""
        arm = self.chosen[task][name]
        keys = {seed: key_of(task, arm["arm"], arm["rate"], seed, arm["ratios"]) for seed in self.reported}
        return {seed: _loss(self.runs[key]) for seed, key in keys.items() if key in self.runs}

    def apart(self, task: str, name: str, other: str) -> list[float]:
        """Final loss of one arm less that of another, on each seed that both were run on."""
        own, its = self.finals(task, name), self.finals(task, other)
        return [loss - its[seed] for seed, loss in own.items() if seed in its]

    def difference(self, task: str, name: str, other: str) -> Interval:
        """Final loss of one arm less that of another, paired by seed."""
        return interval(self.apart(task, name, other))

    def sweep(self, task: str, name: str) -> dict[float, float]:
        """The mean loss by base rate, of the tuning seeds that every rate was tried with where the arm was tuned."""
        arm = self.chosen[task][name]
        start, end = f"{task}|{arm['arm']}|", "|" + key_of("", "", 1, 0, arm["ratios"]).rsplit("|", 1)[1]
        rates = sorted({float(k.split("|")[2]) for k in self.runs if k.startswith(start) and k.endswith(end)})

        def seen(rate: float, seeds: Sequence[int]) -> bool:
            return {key_of(task, arm["arm"], rate, seed, arm["ratios"]) for seed in seeds} <= set(self.runs)

        seeds = self.tuning if seen(arm["rate"], self.tuning) else self.tuning[:1]
        return {
            rate: statistics.fmean(
                _loss(self.runs[key_of(task, arm["arm"], rate, seed, arm["ratios"])]) for seed in seeds
            )
            for rate in rates
            if seen(rate, seeds)
        }

    def good_rates(self, task: str, name: str) -> tuple[float, float, bool]:
        """The lowest and highest rate whose loss is within 2 % of the arm's best, and whether both ends were seen."""
        found = self.sweep(task, name)
        good = [rate for rate, loss in found.items() if loss <= GOOD * min(found.values())]
        return min(good), max(good), min(found) < min(good) and max(good) < max(found)

    def gap(self, task: str) -> Interval:
        """What the oracle gains over one rate for all layers."""
        return self.difference(task, "uniform", "oracle")

    def counts(self, task: str) -> bool:
        """Whether the oracle gains anything beyond the interval, so that there is something to find."""
        gap = self.gap(task)
        return gap.mean > gap.half

    def passes(self, task: str, name: str = "committed") -> bool:
        """Whether the upper limit of what an arm loses to the oracle is at most a quarter of the oracle's gain."""
        return self.difference(task, name, "oracle").upper <= self.gap(task).mean / 4

    def judged(self) -> list[str]:
        """The tasks whose three main arms were run."""
        return [task for task, arms in self.chosen.items() if {"uniform", "oracle", "committed"} <= set(arms)]

    def verdict(self, task: str) -> str:
        """What the bar says of a task, in a sentence."""
        gap, rest = self.gap(task), self.difference(task, "committed", "oracle")
        if not self.counts(task):
            return f"the oracle gains {gap}, which is within the interval: the task does not count."
        words = "passed" if self.passes(task) else "missed"
        arms = [name for name in self.chosen[task] if name not in ("uniform", "oracle") and self.passes(task, name)]
        others = f" Arms that pass: {', '.join(arms)}." if arms else ""
        return f"the oracle gains {gap}, committed - oracle is {rest}: the bar is {words}.{others}"

    def summary(self) -> str:
        """What the bar says of all tasks, and which arms are worse than one rate for all layers."""
        counted = [task for task in self.judged() if task in GROUPS and self.counts(task)]
        passed = [task for task in counted if self.passes(task)]
        worse = [
            f"{name} on {task} ({apart})"
            for task, arms in self.chosen.items()
            for name in arms
            if task in GROUPS and name != "uniform" and "uniform" in arms
            if (apart := self.difference(task, name, "uniform")).mean > apart.half
        ]
        named = f"Worse than uniform beyond the interval: {'; '.join(worse) or 'none'}."
        bar = f"The bar is passed on {len(passed)} of {len(counted)} core tasks on which the oracle gains."
        return " ".join([bar, named, *self.pilots()])

    def pilots(self) -> list[str]:
        """In how many runs with a pilot some ratio was certain, in a sentence; nothing where there are none."""
        runs = [run["committed"] for key, run in self.runs.items() if "|inside|" in key and "committed" in run]
        found = sum(any(ratio != 1 for ratio in committed) for committed in runs)
        return [f"Of {len(runs)} pilots inside of runs {found} found a ratio that is certain."] if runs else []

    def rows(self, task: str) -> list[tuple[str, ...]]:
        """Arm, base rate, final loss, difference to uniform, and the range of good rates where it was looked for."""
        rows = []
        for name, arm in self.chosen[task].items():
            low, high, seen = self.good_rates(task, name)
            width = f"{low:.3g} to {high:.3g}, {high / low:.1f} times" if seen else ""
            apart = "" if name == "uniform" else str(self.difference(task, name, "uniform"))
            finals = self.finals(task, name)
            words = name if len(finals) == len(self.reported) else f"{name} ({len(finals)} seeds)"
            rows.append((words, f"{arm['rate']:.3g}", str(interval([*finals.values()])), apart, width))
        return rows

    def ratios(self, task: str) -> tuple[list[str], list[tuple[str, ...]]]:
        """The arms that hold ratios, and a row for each group of layers: its name, and its ratio in each arm.

        Only the ratios between groups mean something, since every arm has its own base rate: their geometric mean is 1.
        The last column is :meth:`balance`, where it was measured.
        """
        held = {name: arm["ratios"] for name, arm in self.chosen[task].items() if any(r != 1 for r in arm["ratios"])}
        columns = {name: np.array(own) / math.exp(statistics.fmean(map(math.log, own))) for name, own in held.items()}
        found = self.balance(task)
        if found is not None:
            columns["progress by curvature"] = found
        rows = [(group, *(f"{c[place]:.2g}" for c in columns.values())) for place, group in enumerate(GROUPS[task])]
        return list(columns), rows

    def balance(self, task: str) -> NDArray[Any] | None:
        """Progress by curvature of each group at one rate, where it was measured."""
        ones, rate = [1.0] * len(GROUPS[task]), self.chosen[task]["uniform"]["rate"]
        keys = [key_of(task, "observed", rate, seed, ones) for seed in self.tuning]
        return progress_by_cost([self.runs[key] for key in keys]) if set(keys) <= set(self.runs) else None

    def text(self) -> str:
        """Everything, for a terminal."""
        lines = []
        for task in self.chosen:
            lines.append(f"\n{task}")
            lines += [f"{a:14s} {r:>8s} {loss:>18s} {apart:>20s}  {w}" for a, r, loss, apart, w in self.rows(task)]
            if task in self.judged():
                lines.append(self.verdict(task))
        return "\n".join([*lines, "", self.summary()])


def read(path: Path) -> Results:
    """Read a file of results."""
    found = json.loads(path.read_text())
    return Results(found["runs"], found["chosen"])
