"""Do noise-adaptive layerwise rates help? Each arm at its own best base rate, with the controls that tell why.

Run ``python -m benchmarks.adaptive --quick`` (a few minutes, the main arms on digits and on bytes, one seed) or
``python -m benchmarks.adaptive`` (about an hour on two cores). Runs go to ``benchmarks/results/adaptive.json`` as they
end; what is there already is not run again (``--fresh`` begins anew). ``docs/evidence.md`` discusses the result,
``python -m benchmarks.adaptive_plot`` draws it.

Main arms and controls are tuned on seeds 100 and 101, the rest on seed 100, on a grid of factors of two that grows
until the best rate is inside, then refined by half an octave; figures are of other seeds at that rate, five and three.
All arms see the same initial weights and batches for the same seed, so they are compared seed by seed.
"""

import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.controls import (
    ShapeOnly,
    SignalRates,
    Transformed,
    inverted,
    layer_only,
    permuted,
    time_and_group,
    time_only,
)
from benchmarks.environment import RESULTS, environment, parser
from benchmarks.study_tasks import TASKS, TINY, Task, available
from dynamon.curvature import HessianOperator, top_eigenvalues
from dynamon.layers import describe_layers
from dynamon.optim import Lanton, LayerwiseRates
from dynamon.quantities.weights import weight_readings
from dynamon.rates import NoiseAdaptiveRates, Rule, SpectralTailRates

TUNING, REPORTED = (100, 101), (0, 1, 2, 3, 4)
_FEW = REPORTED[:3]
_EVERY = 20  # steps between two validations
_WARMUP = 0.05  # of the run


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        optimizer: From a model and a base rate.
        rule: Makes the rule that steers it, or None.
        guess: Where the grid of base rates begins.
        parts: Parts in which a batch is taken; two give independent gradients.
    """

    optimizer: Callable[[nn.Module, float], Optimizer]
    rule: Callable[[], Rule] | None = None
    guess: float = 0.02
    parts: int = 1


def _adamw(model: nn.Module, rate: float) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.95), weight_decay=0.1)


def _lmo(model: nn.Module, rate: float, **options: Any) -> Optimizer:
    return Lanton(model, rate, noise_adaptive=False, **options)


def _control(transform: Callable[..., Any]) -> Callable[[], Rule]:
    return lambda: Transformed(NoiseAdaptiveRates(), transform)


ARMS = {
    "AdamW": Arm(_adamw, guess=0.004),
    "AdamW + noise": Arm(_adamw, NoiseAdaptiveRates, guess=0.004),
    "LMO": Arm(_lmo),
    "Lanton": Arm(Lanton),
}
CONTROLS = {
    "time only": Arm(_lmo, _control(time_only)),
    "time and group": Arm(_lmo, _control(time_and_group)),
    "layer only": Arm(_lmo, _control(layer_only)),
    "permuted": Arm(_lmo, _control(permuted)),
    "inverted": Arm(_lmo, _control(inverted)),
    "shape only": Arm(_lmo, ShapeOnly),
    "spectral tails": Arm(_lmo, partial(SpectralTailRates, 0.5, 1.5)),
    "signal to noise": Arm(_lmo, SignalRates),
    "independent noise": Arm(_lmo, partial(NoiseAdaptiveRates, source="independent"), parts=2),
}
SETTINGS = {
    "alpha 1": Arm(_lmo, partial(NoiseAdaptiveRates, alpha=1.0)),
    "not by shape": Arm(_lmo, partial(NoiseAdaptiveRates, normalize_shape=False)),
    "one group": Arm(_lmo, partial(NoiseAdaptiveRates, group_by="all")),
    "exponent 1/2": Arm(_lmo, partial(NoiseAdaptiveRates, exponent=0.5)),
}
RADII = {
    "LMO, head 8": Arm(partial(_lmo, radii={"head": 8.0})),
    "LMO, head 128": Arm(partial(_lmo, radii={"head": 128.0})),
    "LMO, embedding 1/4": Arm(partial(_lmo, radii={"embedding": 0.25})),
    "LMO, embedding 4": Arm(partial(_lmo, radii={"embedding": 4.0})),
    "Lanton, head 8": Arm(partial(Lanton, radii={"head": 8.0})),
}
EVERY_ARM = ARMS | CONTROLS | SETTINGS | RADII


@dataclass(frozen=True)
class Job:
    """What one run is: the key under which its result is kept."""

    task: str
    arm: str
    rate: float
    seed: int
    batch: int
    steps: int
    decay: str = "cosine"

    @property
    def key(self) -> str:
        """As text."""
        return f"{self.task}|{self.arm}|{self.rate:.4g}|{self.seed}|{self.batch}|{self.steps}|{self.decay}"


@cache
def _task(name: str) -> Task:
    return (TASKS | TINY)[name]()


def train(job: Job) -> dict[str, Any]:
    """One run: validation losses by step, seconds of training, and for reported seeds the state it ends in."""
    task, arm = _task(job.task), EVERY_ARM[job.arm]
    model = task.model(job.seed)
    optimizer = arm.optimizer(model, job.rate)
    rates = getattr(optimizer, "rates", None)
    if arm.rule:  # as published: every layer has its own ratio to the bit
        rates = LayerwiseRates(optimizer, arm.rule(), model, max_groups=None)
    schedule = LambdaLR(optimizer, partial(_factor, steps=job.steps, decay=job.decay))
    seconds, losses, means = 0.0, [[0, task.validation(model)]], []
    for step, batch in enumerate(task.batches(job.seed, job.steps, job.batch)):
        begin = time.perf_counter()
        _step(task, model, optimizer, rates, batch, arm.parts)
        schedule.step()
        seconds += time.perf_counter() - begin
        if (step + 1) % _EVERY == 0 or step + 1 == job.steps:
            losses.append([step + 1, task.validation(model)])
            means.append(1.0 if rates is None else _geometric(rates.ratios.values()))
            if losses[-1][1] > 2 * losses[0][1] + 1:
                break  # lost
    final = losses[-1][1] if losses[-1][0] == job.steps else math.inf
    found = {"final": final, "losses": losses, "seconds": seconds, "mean_ratio": means}
    if job.seed in REPORTED and math.isfinite(final):
        found |= _state(task, model, rates)
    return found


def _step(
    task: Task, model: nn.Module, optimizer: Optimizer, rates: LayerwiseRates | None, batch: Any, parts: int
) -> None:
    optimizer.zero_grad()
    inputs, targets = batch
    pieces = list(zip(inputs.chunk(parts), targets.chunk(parts), strict=True))
    for number, piece in enumerate(pieces):
        (task.loss(model, piece) / parts).backward()
        if number + 1 < parts and rates is not None:
            rates.reader.store_part((number + 1) / parts)
    optimizer.step()


def _factor(step: int, steps: int, decay: str) -> float:
    warmup = max(1, round(_WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    progress = min((step - warmup) / max(steps - warmup, 1), 1.0)
    return 1 - progress if decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))


def _state(task: Task, model: nn.Module, rates: LayerwiseRates | None) -> dict[str, Any]:
    """Where a run ended: sharpness, norms, ratios."""
    layers = describe_layers(model)
    inputs, targets = task.held_out()
    hessian = HessianOperator(lambda: task.loss(model, (inputs[:32], targets[:32])), list(model.parameters()))
    readings = weight_readings(layers)
    hidden = torch.tensor([layer.role in ("hidden", "conv") for layer in layers])
    return {
        "sharpness": float(top_eigenvalues(hessian).values[0]),
        "operator_norm": float(readings.operator[hidden].median()),
        "stable_rank": float(readings.stable_rank[hidden].median()),
        "ratios": None if rates is None else {name: round(ratio, 4) for name, ratio in rates.ratios.items()},
    }


def _geometric(values: Iterable[float]) -> float:
    return math.exp(statistics.fmean(math.log(v) for v in values))


def load(path: Path) -> dict[str, Any]:
    """The runs in a file of results; a loss of null is one that was lost."""
    runs: dict[str, Any] = json.loads(path.read_text())["runs"]
    for found in runs.values():
        found["final"] = math.inf if found["final"] is None else found["final"]
        found["losses"] = [[step, math.inf if loss is None else loss] for step, loss in found["losses"]]
    return runs


def _or_null(loss: float) -> float | None:
    return round(loss, 5) if math.isfinite(loss) else None


class Book:
    """Results by job, in a file; runs what is missing."""

    def __init__(self, path: Path | None, fresh: bool, pool: ProcessPoolExecutor) -> None:
        """Read what is there; with no path nothing is kept."""
        self.runs: dict[str, Any] = load(path) if path is not None and path.exists() and not fresh else {}
        self.best: dict[str, float] = {}
        self._path, self._pool = path, pool

    def run(self, jobs: Iterable[Job]) -> list[dict[str, Any]]:
        """The results of some jobs, side by side."""
        jobs = list(jobs)
        missing = {job.key: job for job in jobs if job.key not in self.runs}
        for number, (key, found) in enumerate(zip(missing, self._pool.map(train, missing.values()), strict=True), 1):
            self.runs[key] = found
            print(f"  {key:60s} {found['final']:.4f} {found['seconds']:6.1f} s", flush=True)
            if number % 10 == 0 or number == len(missing):
                self.save()
        return [self.runs[job.key] for job in jobs]

    def save(self) -> None:
        """Write the file."""
        if self._path is None:
            return
        runs = {key: {**r, "final": _or_null(r["final"]), "losses": [[s, _or_null(v)] for s, v in r["losses"]]}
                for key, r in self.runs.items()}  # fmt: skip
        content = {"environment": environment("adaptive"), "best_rates": self.best, "runs": runs}
        text = json.dumps(content, separators=(",", ":"), default=str, allow_nan=False)
        self._path.write_text(text.replace('},"', '},\n"') + "\n")

    def tune(
        self,
        task: str,
        arms: Iterable[str],
        batch: int,
        steps: int,
        decay: str = "cosine",
        seeds: Sequence[int] = TUNING,
    ) -> dict[str, float]:
        """The best base rate of each arm on the tuning seeds, never at the edge of what was tried."""
        job = partial(Job, task, batch=batch, steps=steps, decay=decay)
        tried = {arm: {EVERY_ARM[arm].guess * 2.0**k for k in (-1, 0, 1)} for arm in arms}
        while True:
            points = [(arm, rate) for arm, rates in tried.items() for rate in sorted(rates)]
            found = dict.fromkeys(points, 0.0)
            jobs = [job(arm, rate=rate, seed=seed) for arm, rate in points for seed in seeds]
            for one, run in zip(jobs, self.run(jobs), strict=True):
                found[one.arm, one.rate] += run["final"] / len(seeds)
            best = {arm: min(rates, key=lambda r, arm=arm: found[arm, r]) for arm, rates in tried.items()}
            grown = False
            for arm, rates in tried.items():
                wanted = _neighbours(best[arm], rates) - rates
                grown |= bool(wanted)
                rates |= wanted
            if not grown:
                break
        self.best |= {f"{task}|{arm}|{batch}|{steps}|{decay}": rate for arm, rate in best.items()}
        return best

    def report(
        self, task: str, best: dict[str, float], batch: int, steps: int, decay: str = "cosine", seeds: Any = _FEW
    ) -> dict[str, list[dict[str, Any]]]:
        """Each arm at its best rate on the seeds that are reported."""
        jobs = [Job(task, arm, rate, seed, batch, steps, decay) for arm, rate in best.items() for seed in seeds]
        found = self.run(jobs)
        return {arm: [r for j, r in zip(jobs, found, strict=True) if j.arm == arm] for arm in best}


def _neighbours(best: float, rates: set[float]) -> set[float]:
    """What must have been tried around the best rate: an octave to each side, then half an octave."""
    octave = {r for r in (best / 2, best * 2) if not any(math.isclose(r, have, rel_tol=0.1) for have in rates)}
    if octave:
        return octave
    half = {best / math.sqrt(2), best * math.sqrt(2)}
    return {r for r in half if not any(math.isclose(r, have, rel_tol=0.1) for have in rates)}


def steps_to(losses: list[list[float]], target: float) -> float:
    """The first step at which the validation loss is down to the target, between validations by interpolation."""
    for (before, above), (after, below) in zip(losses, losses[1:], strict=False):
        if below <= target:
            return after if above <= below else before + (after - before) * (above - target) / (above - below)
    return math.inf


def interval(values: list[float]) -> str:
    """Mean and half of a 95 % interval of a few values (Student)."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return f"{statistics.fmean(values):.4f}"
    width = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}.get(len(values), 2.0)
    return f"{statistics.fmean(values):.4f} ± {width * statistics.stdev(values) / math.sqrt(len(values)):.4f}"


def table(title: str, best: dict[str, float], found: dict[str, list[dict[str, Any]]], baseline: str = "LMO") -> str:
    """Final loss by arm, its difference from the baseline seed by seed, and steps to the baseline's final loss."""
    base = [r["final"] for r in found[baseline]]
    target = statistics.fmean(base)
    columns = f"{'final loss':>17s} {'less ' + baseline:>18s} {'steps':>6s} {'a step':>8s} {'sharpness':>9s}"
    header = f"{'arm':20s} {'rate':>8s} {columns}"
    lines = [f"\n{title}", header]
    for arm, runs in found.items():
        finals = [r["final"] for r in runs]
        apart = "" if arm == baseline else interval([x - y for x, y in zip(finals, base, strict=False)])
        reached = statistics.median(steps_to(r["losses"], target) for r in runs)
        pace = statistics.median(1000 * r["seconds"] / r["losses"][-1][0] for r in runs)
        sharpness = statistics.median(r.get("sharpness", math.nan) for r in runs)
        losses = f"{best[arm]:8.4f} {interval(finals):>17s} {apart:>18s}"
        lines.append(f"{arm:20s} {losses} {reached:6.0f} {pace:6.1f}ms {sharpness:9.1f}")
    lines.append(f"± is half of a 95 % interval; steps: to {baseline}'s mean final loss of {target:.4f}, median")
    return "\n".join(lines)


def width_of_good_rates(runs: dict[str, Any], task: str, arm: str, batch: int, steps: int) -> tuple[float, float]:
    """Smallest and largest base rate tried whose final loss is within 2 % of the arm's best, on one tuning seed."""
    prefix, tail = f"{task}|{arm}|", f"|{TUNING[0]}|{batch}|{steps}|cosine"
    own = [key for key in runs if key.startswith(prefix) and key.endswith(tail)]
    found = {float(key[len(prefix) : -len(tail)]): runs[key]["final"] for key in own}
    good = [rate for rate, final in found.items() if final <= 1.02 * min(found.values())]
    return min(good), max(good)


def smallest(book: Book) -> None:
    """A few steps of each arm, and of tuning and reporting two of them."""
    for name in available(TINY):
        batch, steps = 4, 4
        best = book.tune(name, ["LMO", "Lanton"], batch, steps, seeds=TUNING[:1])
        print(table(f"{name}, {steps} steps, batch {batch}", best, book.report(name, best, batch, steps, seeds=[0])))
        book.run(Job(name, arm, EVERY_ARM[arm].guess, TUNING[0], batch, steps) for arm in EVERY_ARM)


def quick(book: Book) -> None:
    """The main arms, one reported seed, half the steps."""
    for name in available(TASKS):
        task = _task(name)
        best = book.tune(name, ARMS, task.batch, task.steps // 2)
        found = book.report(name, best, task.batch, task.steps // 2, seeds=REPORTED[:1])
        print(table(f"{task.name}, {task.steps // 2} steps, batch {task.batch}", best, found))


def full(book: Book) -> None:
    """Everything that docs/evidence.md rests on."""
    for name in available(TASKS):
        task = _task(name)
        steps, batch = task.steps, task.batch
        best = book.tune(name, ARMS | CONTROLS, batch, steps)
        print(
            table(
                f"{task.name}, {steps} steps, batch {batch}",
                best,
                book.report(name, best, batch, steps, seeds=REPORTED),
            )
        )
        if name == "bytes":
            _settings(book, name, batch, steps)
        _compare(book, name, [*ARMS, "one group", "time only"], batch // 4, steps * 2)
        _compare(book, name, ["LMO", "Lanton"], batch * 4, steps // 2)
        if name == "bytes":
            _compare(book, name, ["LMO", "Lanton"], batch, steps, "linear")
            _compare(book, name, ["LMO", "Lanton"], batch, round(steps / 1.5))  # what LANTON is said to save
        _ranges(book, name, best, batch, steps)


def _settings(book: Book, name: str, batch: int, steps: int) -> None:
    """Arguments of the rule, and radii of the baseline by role."""
    for arms in (SETTINGS, RADII):
        _compare(book, name, ["LMO", "Lanton", *arms], batch, steps)


def _compare(book: Book, name: str, arms: Iterable[str], batch: int, steps: int, decay: str = "cosine") -> None:
    """Some arms, each tuned for this batch, length and decay on one seed."""
    best = book.tune(name, arms, batch, steps, decay, TUNING[:1])
    print(table(f"{name}, {steps} steps, batch {batch}, {decay}", best, book.report(name, best, batch, steps, decay)))


def _ranges(book: Book, name: str, best: dict[str, float], batch: int, steps: int) -> None:
    """Base rates within 2 % of the best loss, half an octave apart."""
    for arm in ("LMO", "Lanton", "time only", "AdamW", "AdamW + noise"):
        grid = [best[arm] * 2 ** (k / 2) for k in range(-7, 8)]
        book.run(Job(name, arm, rate, TUNING[0], batch, steps) for rate in grid)
        low, high = width_of_good_rates(book.runs, name, arm, batch, steps)
        print(f"{name}, {arm}: within 2 % of the best loss from {low:.4g} to {high:.4g}, a factor of {high / low:.1f}")


def main() -> None:
    """Run, print, write."""
    command = parser("adaptive", __doc__)
    command.add_argument("--quick", action="store_true", help="the main arms only, shorter; to adaptive_quick.json")
    command.add_argument("--fresh", action="store_true", help="run again what is in the results")
    command.add_argument("--workers", type=int, default=os.cpu_count(), help="runs side by side, one thread each")
    options = command.parse_args()
    path = options.output or RESULTS / ("adaptive_quick.json" if options.quick else "adaptive.json")
    if options.smallest and options.output is None:
        path = None
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(options.workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        book = Book(path, options.fresh, pool)
        (smallest if options.smallest else quick if options.quick else full)(book)
        book.save()


if __name__ == "__main__":
    main()
