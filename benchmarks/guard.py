"""What do guards save: final loss with one bad batch in a hundred, and at rates up to the one that diverges?

Run ``python -m benchmarks.guard`` (about half an hour on one core). Every run goes to ``benchmarks/results/guard.json``
as it ends, and what is there is not run again. ``docs/guard.md`` shows the table.

Base rates and the value of global clipping are tuned on seed 100, for each set-up by itself; ZClip and SpikeClipper
have their defaults. Figures are of seeds 0 to 4, on other held-out data. All arms see the same initial
weights, batches and bad batches for the same seed, so they are compared seed by seed.
"""

import json
import math
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.environment import RESULTS, environment, parser
from benchmarks.models import clusters
from benchmarks.rates_study.tasks import REPORTED, Batch, GPTBytes, LSTMBytes, Task
from dynamon.optim import SpikeClipper

SHARE = 0.01  # of batches that are bad
SCALE = 10.0  # on the inputs of a bad batch
KINDS = {"GPT": "token", "LSTM": "labels", "CNN": "scale"}
CLIPS = (0.03, 0.1, 0.3, 1.0, 3.0)  # times the median gradient norm of a tuning run
TIMES = (16, 4, 1)  # the tuned rate
ARMS = ("none", "global", "ZClip", "SpikeClipper")
_LOST = 2.0  # times the first loss


class Pictures(Task):
    """Noisy pictures, and convolutions alone: normalisation would take the scale out of scaled inputs."""

    groups: ClassVar[Mapping[str, str]] = {}

    def network(self) -> nn.Module:
        """Three convolutions and a head."""
        sides, layers = (3, self.width, 2 * self.width, 3 * self.width), list[nn.Module]()
        for inside, outside in zip(sides, sides[1:], strict=False):
            layers += [nn.Conv2d(inside, outside, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3 * self.width, 10))

    def batches(self, seed: int) -> Iterator[Batch]:
        """Random pictures."""
        generator = torch.Generator().manual_seed(1000 + seed)
        inputs, targets = (part[:1024] for part in _pictures())
        while True:
            chosen = torch.randint(len(targets), (self.batch,), generator=generator)
            yield inputs[chosen], targets[chosen]

    def held_out(self, reported: bool) -> Batch:
        """Five hundred and twelve pictures."""
        inputs, targets = (part[1024 + 512 * reported :][:512] for part in _pictures())
        return inputs, targets


@cache
def _pictures() -> Batch:
    return clusters((3, 16, 16), noise=1.0)


class ZClip:
    """Clips the total norm by its exponential mean and variance (arXiv 2504.02507), with the paper's constants."""

    def __init__(self, model: nn.Module, decay: float = 0.97, threshold: float = 2.5, warmup: int = 25) -> None:
        """Begin to observe."""
        self._model, self._decay, self._threshold, self._warmup = model, decay, threshold, warmup
        self._norms: list[float] = []
        self._mean = self._variance = 0.0

    def clip(self) -> None:
        """Clip the gradients of a step."""
        norm = float(norm_of(self._model))
        if len(self._norms) < self._warmup:
            self._norms.append(norm)
            self._mean, self._variance = float(np.mean(self._norms)), float(np.var(self._norms))
            return
        z = (norm - self._mean) / (math.sqrt(self._variance) + 1e-6)
        if z > self._threshold:
            norm = self._mean + self._threshold**2 / z * math.sqrt(self._variance)
            nn.utils.clip_grad_norm_(self._model.parameters(), norm)
        self._mean = self._decay * self._mean + (1 - self._decay) * norm
        self._variance = self._decay * self._variance + (1 - self._decay) * (norm - self._mean) ** 2


def norm_of(model: nn.Module) -> Tensor:
    """The total norm of the gradients."""
    return torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])


def spoiled(batch: Batch, kind: str, generator: torch.Generator) -> Batch:
    """A bad batch: shuffled labels, inputs times ten, or one token again and again, which the text may never have."""
    inputs, targets = batch
    if kind == "labels":
        order = torch.randperm(targets.numel(), generator=generator)
        return inputs, targets.flatten()[order].view_as(targets)
    if kind == "scale":
        return inputs * SCALE, targets
    token = torch.randint(256, (1,), generator=generator)
    return token.expand_as(inputs).clone(), token.expand_as(targets).clone()


def train(
    task: Task, kind: str, arm: str, value: float, rate: float, seed: int, norms: list[float] | None = None
) -> float:
    """Train once, and return the validation loss; infinite if the run was lost."""
    model = task.model(seed)
    optimizer = task.optimizer(model, rate)
    schedule = LambdaLR(optimizer, task.factor)
    zclip = ZClip(model) if arm == "ZClip" else None
    if arm == "SpikeClipper":
        SpikeClipper(optimizer, model)
    generator, first = torch.Generator().manual_seed(7000 + seed), math.inf
    possible = torch.randperm(task.steps - task.steps // 10, generator=generator) + task.steps // 10
    bad = set(possible[: math.ceil(SHARE * task.steps)].tolist()) if kind else set[int]()
    for step, batch in zip(range(task.steps), task.batches(seed), strict=False):
        if step in bad:
            batch = spoiled(batch, kind, generator)
        loss = task.loss(model, batch)
        if step % 25 == 0 and step not in bad:
            first = min(first, loss.item())
            if not loss.item() < _LOST * first:
                return math.inf
        optimizer.zero_grad()
        loss.backward()
        if arm == "global":
            nn.utils.clip_grad_norm_(model.parameters(), value)
        if zclip is not None:
            zclip.clip()
        if norms is not None:
            norms.append(float(norm_of(model)))
        optimizer.step()
        schedule.step()
    return task.validation(model, seed in REPORTED)


class Study:
    """Runs by key, kept in a file.

    Args:
        path: The file; None keeps nothing.
        tasks: By name.
        seeds: Tuning and reported ones.
        clips: Values of global clipping that are tried, times the median norm.
    """

    def __init__(
        self, path: Path | None, tasks: dict[str, Task], seeds: tuple[tuple[int, ...], ...], clips: tuple[float, ...]
    ) -> None:
        """Read what is there."""
        self._path, self.tasks, (self._tuning, self._reported), self._clips = path, tasks, seeds, clips
        found = json.loads(path.read_text()) if path is not None and path.exists() else {}
        self.runs: dict[str, float | None] = found.get("runs", {})
        self.chosen: dict[str, dict[str, float]] = found.get("chosen", {})
        self._place = environment("guard") | {"command": "python -m benchmarks.guard"}

    def run(self, name: str, kind: str, arm: str, value: float, rate: float, seed: int) -> float:
        """The final loss of a run."""
        key = key_of(name, kind, arm, value, rate, seed)
        if key not in self.runs:
            begin = time.perf_counter()
            found = train(self.tasks[name], kind, arm, value, rate, seed)
            self.runs[key] = round(found, 5) if math.isfinite(found) else None
            print(f"{time.strftime('%H:%M:%S')} {key:60s} {found:.4f} {time.perf_counter() - begin:.1f} s", flush=True)
            self._save()
        return _loss(self.runs[key])

    def best(self, tried: Iterable[float], loss: Any) -> float:
        """The value of those tried with the smallest mean loss on the tuning seeds."""
        return min(tried, key=lambda value: statistics.fmean(loss(value, seed) for seed in self._tuning))

    def base(self, name: str) -> None:
        """Tune the rate without guard or bad batches, and note the median gradient norm there."""
        guess, norms = self.tasks[name].guess, list[float]()
        rates = [guess * factor for factor in (0.5, 1.0, 2.0)]
        rate = self.best(rates, lambda value, seed: self.run(name, "", "none", 0.0, value, seed))
        if name not in self.chosen:
            train(self.tasks[name], "", "none", 0.0, rate, self._tuning[0], norms)
            self.chosen[name] = {"rate": rate, "norm": float(f"{statistics.median(norms):.3g}")}

    def setup(self, name: str, kind: str, times: float) -> None:
        """All arms of a set-up: bad batches of a kind, or the rate so many times the tuned one."""
        rate, norm = self.chosen[name]["rate"] * times, self.chosen[name]["norm"]
        tried = [clip * norm for clip in self._clips]
        value = self.best(tried, lambda clip, seed: self.run(name, kind, "global", clip, rate, seed))
        self.chosen[name][f"clip {kind} {times:g}"] = value
        for arm in ARMS:
            for seed in self._reported:
                self.run(name, kind, arm, value, rate, seed)

    def _save(self) -> None:
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            found = {"environment": self._place, "chosen": self.chosen, "runs": self.runs}
            self._path.write_text(json.dumps(found, indent=1) + "\n")

    def finish(self) -> None:
        """Write what was chosen."""
        self._save()


def setups(name: str) -> list[tuple[str, float]]:
    """Set-ups of a task: kind of bad batches, and times the tuned rate."""
    return [(KINDS[name.partition(",")[0]], 1.0), *(("", float(times)) for times in TIMES)]


def rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """The table: a row for each set-up, a column for each arm."""
    lines = []
    for name, chosen in found["chosen"].items():
        for kind, times in setups(name):
            value = chosen.get(f"clip {kind} {times:g}")
            keys = {
                arm: [key_of(name, kind, arm, value or 0.0, chosen["rate"] * times, seed) for seed in REPORTED]
                for arm in ARMS
            }
            if not all(key in found["runs"] for own in keys.values() for key in own):
                continue
            losses = {arm: [_loss(found["runs"][key]) for key in own] for arm, own in keys.items()}
            what = f"bad batches: {kind}" if kind else f"rate times {times:g}"
            differences = (compared(losses[arm], losses["SpikeClipper"]) for arm in ("none", "global", "ZClip"))
            lines.append((name, what, *(mean_of(losses[arm]) for arm in ARMS), *differences))
    return lines


def key_of(name: str, kind: str, arm: str, value: float, rate: float, seed: int) -> str:
    """The key under which the result of a run is kept; ``value`` is that of global clipping."""
    return f"{name}|{kind}|{arm}|{value if arm == 'global' else 0:.4g}|{rate:.4g}|{seed}"


def _loss(kept: float | None) -> float:
    return math.inf if kept is None else kept


def mean_of(losses: list[float]) -> str:
    """The mean of the runs that were not lost, and how many were."""
    there = [loss for loss in losses if math.isfinite(loss)]
    lost = f", {len(losses) - len(there)} lost" if len(there) < len(losses) else ""
    return f"{statistics.fmean(there):.4f}{lost}" if there else "all lost"


def compared(others: list[float], own: list[float]) -> str:
    """By how much the second losses are lower, in percent of the first, with a 95 % interval; pairs with both only."""
    pairs = [(a, b) for a, b in zip(others, own, strict=True) if math.isfinite(a) and math.isfinite(b)]
    if len(pairs) < 3:
        return ""
    gains = [100 * (a - b) / a for a, b in pairs]
    half = stats.t.ppf(0.975, len(gains) - 1) * statistics.stdev(gains) / math.sqrt(len(gains))
    return f"{statistics.fmean(gains):+.2f} ± {half:.2f} %"


def tasks() -> dict[str, Task]:
    """The tasks by name."""
    return {
        "GPT, AdamW": GPTBytes("AdamW", width=32, steps=200, batch=8, windows=500, guess=0.003),
        "LSTM, AdamW": LSTMBytes("AdamW", width=32, steps=200, batch=8, windows=500, guess=0.3),
        "CNN, SGD": Pictures("SGD", width=8, steps=200, batch=32, guess=0.1),
    }


def main() -> None:
    """Run and print."""
    options = parser("guard", __doc__).parse_args()
    torch.set_num_threads(1)
    if options.smallest:
        tiny = GPTBytes("AdamW", width=16, steps=24, batch=2, windows=20, guess=0.01)
        study = Study(options.output, {"GPT, tiny": tiny}, ((100,), REPORTED), CLIPS[:1])
    else:
        study = Study(options.output or RESULTS / "guard.json", tasks(), ((100,), REPORTED), CLIPS)
    for name in study.tasks:
        study.base(name)
    for number in range(1 + len(TIMES)):
        for name in study.tasks:
            study.setup(name, *setups(name)[number])
            study.finish()
    for row in rows({"chosen": study.chosen, "runs": study.runs}):
        print(" | ".join(row))


if __name__ == "__main__":
    main()
