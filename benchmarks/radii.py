"""Which default radii of Lanton hold over tasks, widths and lengths? A coordinate search, relative to hidden layers.

``python -m benchmarks.radii`` takes about half an hour on one core. Its text, widths and lengths are not those of
``benchmarks.adaptive``. Every run goes to ``benchmarks/results/radii.json`` as it ends and is not run again.
"""

import json
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import RESULTS, environment, parser
from benchmarks.rates_study.corpus import RADII as TEXT
from benchmarks.rates_study.tasks import FORMER_RADII, TUNING, Digits, GPTBytes, LSTMBytes, Task
from benchmarks.rates_study.train import steps
from dynamon.optim import Lanton

START = {"hidden": 1.0, "conv": 1.0, "embedding": 0.5, "head": 16.0, "vector": 0.125}  # as a first trial had suggested
PASSES = 5
ABSENT = {"GPT": ("conv",), "LSTM": ("conv",), "CNN": ("hidden", "embedding")}  # roles that a model does not have
SEARCHED = {
    "GPT, width 32, 300 steps": GPTBytes("LMO", 32, 300, 16, 0.035, TEXT),
    "GPT, width 64, 500 steps": GPTBytes("LMO", 64, 500, 8, 0.035, TEXT),
    "LSTM, width 48, 300 steps": LSTMBytes("LMO", 48, 300, 16, 0.07, TEXT),
    "CNN, width 8, 200 steps": Digits("LMO", 8, 200, guess=0.07),
}
CHECKED = {
    "GPT, width 96, 250 steps": GPTBytes("LMO", 96, 250, 16, 0.035, TEXT),
    "CNN, width 16, 400 steps": Digits("LMO", 16, 400, guess=0.07),
}


class Search:
    """Runs by task, radii, rate and seed, and what they say.

    Args:
        path: Of the results; None keeps nothing.
        tasks: By name.
        seeds: Of the weights and the batches.
    """

    def __init__(self, path: Path | None, tasks: Mapping[str, Task], seeds: tuple[int, ...] = TUNING) -> None:
        """Read what is there."""
        self._path, self._tasks, self._seeds = path, tasks, seeds
        self.runs: dict[str, float] = {}
        self.found: dict[str, Any] = {}
        if path is not None and path.exists():
            self.runs = json.loads(path.read_text())["runs"]

    def save(self) -> None:
        """Write the file."""
        if self._path is not None:
            content = {"environment": environment("radii"), "found": self.found, "runs": self.runs}
            self._path.write_text(json.dumps(content, indent=0) + "\n")

    def loss(self, task: str, radii: Mapping[str, float], octaves: float) -> float:
        """The mean validation loss at a base rate so many octaves above the guess."""
        own = {role: radius for role, radius in radii.items() if role not in ABSENT[task.split(",")[0]]}
        words = " ".join(f"{role} {radius:g}" for role, radius in own.items())
        keys = [f"{task}|{words}|{octaves:g}|{seed}" for seed in self._seeds]
        made, rate = self._tasks[task], self._tasks[task].guess * 2**octaves
        for key, seed in zip(keys, self._seeds, strict=True):
            if key not in self.runs:
                model = made.model(seed)
                kept = steps(made, model, Lanton(model, rate, noise_adaptive=False, radii=own), seed)
                self.runs[key] = round(made.validation(model, False), 5) if kept else 1e9
                print(f"{key:90s} {self.runs[key]}", flush=True)
                self.save()
        return statistics.fmean(self.runs[key] for key in keys)

    def tune(self, task: str, radii: Mapping[str, float], start: float = 0.0) -> tuple[float, float]:
        """The best base rate, in octaves above the guess, and its loss; never at the edge of what was tried."""
        tried: dict[float, float] = {}
        best = start
        while not {best - 0.5, best, best + 0.5} <= set(tried):
            for octaves in (best - 0.5, best, best + 0.5):
                if octaves not in tried:
                    tried[octaves] = self.loss(task, radii, octaves)
            best = min(tried, key=lambda octaves: tried[octaves])
        return best, tried[best]

    def run(self, names: list[str], passes: int = PASSES) -> dict[str, float]:
        """Half and double each radius in turn; keep what lowers the mean logarithm of the losses of its tasks."""
        radii, moved = dict(START), True
        while moved and passes:
            moved, passes = False, passes - 1
            best = {name: self.tune(name, radii) for name in names}
            for role in ("vector", "head", "embedding", "conv"):
                own = [name for name in names if role not in ABSENT[name.split(",")[0]]]
                for factor in (0.5, 2.0) if own else ():
                    tried = {**radii, role: factor * radii[role]}
                    losses = {name: self.loss(name, tried, best[name][0]) for name in own}
                    change = statistics.fmean(math.log(losses[name] / best[name][1]) for name in own)
                    print(f"{role} {tried[role]:g}: {change:+.4f}", flush=True)
                    if change < 0:
                        radii, moved = tried, True
                        best |= {name: (best[name][0], loss) for name, loss in losses.items()}
        return radii


def main() -> None:
    """Search, compare with the former radii, print and write."""
    options = parser("radii", __doc__).parse_args()
    torch.set_num_threads(1)
    if options.smallest:
        tiny = {"GPT": GPTBytes("LMO", 16, 4, 2, windows=20)}
        search, names, passes = Search(options.output, tiny, (100,)), [*tiny], 1
    else:
        path = options.output or RESULTS / "radii.json"
        search, names, passes = Search(path, SEARCHED | CHECKED), [*SEARCHED], PASSES
    radii = search.run(names, passes)
    search.found["radii"] = radii
    for task in search._tasks:
        before, after = search.tune(task, FORMER_RADII), search.tune(task, radii)
        search.found[task] = {"former radii": before[1], "these": after[1]}
        print(f"{task:30s} {before[1]:.4f} -> {after[1]:.4f}")
    print(radii)
    search.save()


if __name__ == "__main__":
    main()
