"""What following the largest eigenvalue through training costs, and whether it stays right.

Run ``python -m benchmarks.tracking`` from the repository root; the result goes to ``benchmarks/results/tracking.json``.

Each model is trained once per optimizer. At 30 points, 1, 10 and 100 steps apart, :class:`EigenTracker` measures the
Hessian of a fixed probe loss, and under AdamW also the operator whose largest eigenvalue is the stability ratio; a
cold run with the same tolerance counts what it would have taken without tracking. The truth is ARPACK's, in float64
on a float64 copy of the model. Then the weights jump: a tracker that has followed one training measures the model
that has been trained from another seed, once from every point.

``--demo`` measures instead what a reading of the stability ratio costs on the model of ``dynamon demo`` with a quarter
of a batch, in training steps (processor time), and adds it to the result as ``demo``.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, eigsh
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim import SGD, AdamW

from benchmarks.environment import RESULTS, environment, parser, write
from benchmarks.models import Problem, cnn, gpt, mlp
from dynamon.cli.demo_data import standard_library_text, training_batches
from dynamon.cli.demo_plan import SIZES
from dynamon.cli.language_model import LanguageModel
from dynamon.curvature import EigenTracker, HessianOperator, LinearOperator, top_eigenvalues
from dynamon.stability import StabilityScaling, stability_operator, stability_scaling

TOLERANCE = 1e-2  # of tracker and cold run, and the error that counts as wrong
MAX_MATVECS = 60  # enough for every cold run to finish
POINTS = 30
SPACINGS = (1, 10, 100)
JUMP_AFTER = 100  # steps that the model from another seed has been trained for
MOVEMENT, PRODUCTS, SHARE = 2.0, 8, 0.5  # the bars: largest/smallest at least, products at most, share of cold


@dataclass(frozen=True)
class Course:
    """A training to follow, and the step where each spacing begins: where sharpness moves."""

    make: Callable[..., Problem]
    optimizer: str
    starts: tuple[int, int, int]
    probe: int  # samples of the fixed probe batch
    rate: float | None = None  # None: the problem's own


COURSES = (
    Course(mlp, "AdamW", (5, 5, 100), probe=256),
    Course(mlp, "SGD", (5, 5, 100), probe=256, rate=0.05),
    Course(cnn, "AdamW", (110, 5, 100), probe=64),
    Course(cnn, "SGD", (145, 5, 100), probe=64, rate=0.05),
    Course(gpt, "AdamW", (5, 5, 100), probe=16),
    Course(gpt, "SGD", (2, 5, 100), probe=16, rate=0.1),
)
SMALLEST = Course(partial(mlp, width=8), "AdamW", (5, 5, 100), probe=16)


@dataclass(frozen=True)
class Snapshot:
    """The weights after some steps, flat, and the scaling that their optimizer had then."""

    weights: torch.Tensor
    scaling: StabilityScaling


@dataclass(frozen=True)
class Point:
    """One measurement of a tracker, next to what a cold run and the truth say."""

    value: float
    truth: float
    products: int
    converged: bool
    cold: bool  # this one of the tracker's runs began from nothing
    cold_products: int = 0
    cold_error: float = 0.0

    @property
    def error(self) -> float:
        return abs(self.value - self.truth) / abs(self.truth)

    @property
    def silently_wrong(self) -> bool:
        return self.converged and self.error > TOLERANCE


# ---- training


def train(course: Course, steps: list[int], seed: int) -> tuple[Problem, dict[int, Snapshot]]:
    """Train as long as needed and keep what the measurements at these steps read."""
    problem = replace(course.make(seed), probe_size=course.probe)
    rate = course.rate or problem.rate
    optimizers: list[torch.optim.Optimizer] = []

    def make_optimizer(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        sgd = course.optimizer == "SGD"
        optimizers.append(SGD(params, lr=rate, momentum=0.9) if sgd else AdamW(params, lr=rate))
        return optimizers[0]

    wanted, kept = set(steps), {}
    for step in problem.train(max(steps), make_optimizer, seed=seed):
        if step in wanted:
            weights = parameters_to_vector(problem.params).detach().clone()
            kept[step] = Snapshot(weights, stability_scaling(optimizers[0], problem.params))
    return problem, kept


def operator_at(problem: Problem, snapshot: Snapshot, kind: str) -> LinearOperator:
    """The Hessian or the preconditioned operator at a snapshot, in the dtype of the problem."""
    dtype = problem.params[0].dtype
    vector_to_parameters(snapshot.weights.to(dtype), problem.params)
    hessian = HessianOperator(problem.loss_fn, problem.params)
    if kind == "Hessian":
        return hessian
    return stability_operator(hessian, replace(snapshot.scaling, scale=snapshot.scaling.scale.to(dtype)))


# ---- measuring


def truth_of(exact: Problem, snapshot: Snapshot, kind: str) -> float:
    """The largest eigenvalue by ARPACK in float64, from a start that owes nothing to what is tested."""
    operator = operator_at(exact, snapshot, kind)
    start = np.random.default_rng(12345).standard_normal(operator.shape[0])
    try:
        found = eigsh(operator.to_scipy(), 1, which="LA", tol=1e-6, ncv=12, v0=start, return_eigenvectors=False)
        return float(found[0])
    except ArpackNoConvergence as error:
        raise RuntimeError(f"ARPACK found no truth for {exact.name}, {kind}.") from error


def measure(tracker: EigenTracker, operator: LinearOperator, truth: float, seed: int | None = None) -> Point:
    """One update of the tracker; with a seed a cold run next to it."""
    cold = tracker.next_is_cold
    found = tracker.update(operator)
    point = Point(float(found.values[0]), truth, found.matvecs, found.converged, cold)
    if seed is None:
        return point
    fresh = top_eigenvalues(operator, tol=TOLERANCE, max_matvecs=MAX_MATVECS, seed=seed)
    error = abs(float(fresh.values[0]) - truth) / abs(truth)
    return replace(point, cold_products=fresh.matvecs, cold_error=error)


def follow(
    problem: Problem, path: list[Snapshot], truths: list[float], other: LinearOperator, other_truth: float, kind: str
) -> tuple[list[Point], list[Point]]:
    """Points along a path, and from each of them the jump to the other model (where the tracker would start warm)."""
    tracker = EigenTracker(tol=TOLERANCE, max_matvecs=MAX_MATVECS)
    points, jumps = [], []
    for place, (snapshot, truth) in enumerate(zip(path, truths, strict=True)):
        points.append(measure(tracker, operator_at(problem, snapshot, kind), truth, seed=10_000 + place))
        if not tracker.next_is_cold:
            jumps.append(measure(copy.copy(tracker), other, other_truth))
    return points, jumps


# ---- the report


def summary(points: list[Point]) -> dict[str, Any]:
    """What the bars are about."""
    cold = statistics.median(p.cold_products for p in points)
    truths = [p.truth for p in points]
    result = {
        "movement": max(truths) / min(truths) if min(truths) > 0 else float("inf"),
        "warm products": statistics.median(p.products for p in points if not p.cold),
        "all products": statistics.median(p.products for p in points),
        "mean products": statistics.mean(p.products for p in points),
        "cold products": cold,
        "worst error": max(p.error for p in points),
        "worst converged": max((p.error for p in points if p.converged), default=None),
        "wrong": sum(p.silently_wrong for p in points),
        "unconverged": sum(not p.converged for p in points),
        "cold wrong": sum(p.cold_error > TOLERANCE for p in points),
    }
    result["share"] = result["all products"] / cold
    bars = {
        "movement": result["movement"] >= MOVEMENT,
        "error": result["worst error"] <= TOLERANCE,
        "products": result["all products"] <= PRODUCTS,
        "half of cold": result["share"] <= SHARE,
    }
    result["missed"] = [name for name, met in bars.items() if not met]
    return result


def jump_summary(jumps: list[Point]) -> dict[str, Any]:
    """How many jumps ended at the right eigenvalue, and what they took."""
    return {
        "jumps": len(jumps),
        "right": sum(p.error <= TOLERANCE for p in jumps),
        "marked unconverged": sum(p.error > TOLERANCE and not p.converged for p in jumps),
        "wrong": sum(p.silently_wrong for p in jumps),
        "median products": statistics.median(p.products for p in jumps),
        "most products": max(p.products for p in jumps),
        "worst error": max(p.error for p in jumps),
    }


LINE = "{:<5}{:<7}{:<16}{:>8}{:>9}{:>7}{:>6}{:>6}{:>7}{:>11}{:>7}{:>7}   {}"
JUMP_LINE = "{:<5}{:<7}{:<16}{:>8}{:>7}{:>7}{:>13}{:>7}{:>9}{:>6}{:>13}"


def print_row(row: dict[str, Any]) -> None:
    """One line of the first table."""
    s = row["tracking"]
    numbers = [f"{s[key]:g}" for key in ("warm products", "all products", "cold products")]
    worst = "-" if s["worst converged"] is None else f"{s['worst converged']:.1e}"
    verdict = "MISS " + ", ".join(s["missed"]) if s["missed"] else "PASS"
    where = (row["model"], row["optimizer"], row["operator"], row["spacing"], f"{s['movement']:.1f}x")
    print(LINE.format(*where, *numbers, f"{s['share']:.2f}", worst, s["wrong"], s["unconverged"], verdict), flush=True)


def print_header() -> None:
    """The names of the columns; products are medians."""
    names = ("model", "", "operator", "spacing", "moves", "warm", "all", "cold", "share")
    print(LINE.format(*names, "worst err", "wrong", "open", ""))


def print_jumps(rows: list[dict[str, Any]]) -> None:
    """The second table."""
    names = ("jumps", "right", "marked open", "wrong", "products", "most", "worst error")
    print("\nAfter a jump to the weights from another seed:")
    print(JUMP_LINE.format("model", "", "operator", "spacing", *names))
    for row in rows:
        where = (row["model"], row["optimizer"], row["operator"], row["spacing"])
        s = row["jump"]
        counts = (s["jumps"], s["right"], s["marked unconverged"], s["wrong"], f"{s['median products']:g}")
        print(JUMP_LINE.format(*where, *counts, s["most products"], f"{s['worst error']:.1e}"))


# ---- the demo


def demo_cost(steps: int, every: int) -> dict[str, Any]:
    """Training steps that tracked readings take on the demo's model; the first reading starts from nothing."""
    size = SIZES["full"]
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = LanguageModel(steps, context=size.context, width=size.width, depth=size.depth)
    optimizer = model.configure_optimizers()["optimizer"]
    named, tracker = dict(model.network.named_parameters()), EigenTracker(tol=TOLERANCE)
    probe, readings, trained = None, [], []

    def loss(batch: torch.Tensor) -> torch.Tensor:
        logits = model.network(batch[:, :-1])
        return cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    text, _ = standard_library_text()
    for step, batch in enumerate(training_batches(text, size.batch, size.context, steps, 0), start=1):
        probe = batch[: size.batch // 4] if probe is None else probe
        begin = time.process_time()
        optimizer.zero_grad()
        loss(batch).backward()
        optimizer.step()
        trained.append(time.process_time() - begin)
        if step % every == 0:
            cold, begin = tracker.next_is_cold, time.process_time()
            backend, error = tracker.backend, tracker.difference_error
            hessian = HessianOperator(lambda probe=probe: loss(probe), named, backend=backend, error=error)
            operator = stability_operator(hessian, stability_scaling(optimizer, named))
            found = tracker.update(operator)
            tracker.compare(operator)
            readings.append((cold, found.matvecs, time.process_time() - begin))
    one = statistics.median(trained)
    tracked = [(products, seconds / one) for cold, products, seconds in readings if not cold]
    return {
        "step seconds": float(f"{one:.4g}"),
        "median steps per tracked reading": round(statistics.median(cost for _, cost in tracked), 2),
        "median products": statistics.median(products for products, _ in tracked),
        "tracked": [[products, round(cost, 2)] for products, cost in tracked],
    }


# ---- the runs


def record(points: list[Point]) -> list[dict[str, Any]]:
    """The points as they go into the JSON file."""
    keys = ("truth", "error", "products", "converged", "cold", "cold_products", "cold_error")
    rounded = lambda value: float(f"{value:.4g}") if isinstance(value, float) else value  # noqa: E731
    return [{key: rounded(getattr(point, key)) for key in keys} for point in points]


def run(course: Course, spacings: list[int], points: int) -> list[dict[str, Any]]:
    """All spacings and operators of one training."""
    begins = dict(zip(SPACINGS, course.starts, strict=True))
    steps = {spacing: [begins[spacing] + spacing * i for i in range(points)] for spacing in spacings}
    problem, kept = train(course, sorted({step for each in steps.values() for step in each}), seed=0)
    _, others = train(course, [JUMP_AFTER], seed=1)
    exact, other = problem.copy(torch.float64), others[JUMP_AFTER]
    rows = []
    for kind in ("Hessian", "preconditioned") if course.optimizer == "AdamW" else ("Hessian",):
        other_truth = truth_of(exact, other, kind)
        other_operator = operator_at(problem.copy(), other, kind)
        for spacing in spacings:
            path = [kept[step] for step in steps[spacing]]
            truths = [truth_of(exact, snapshot, kind) for snapshot in path]
            found, jumps = follow(problem, path, truths, other_operator, other_truth, kind)
            row = {"model": problem.name, "optimizer": course.optimizer, "operator": kind, "spacing": spacing}
            row |= {"first step": steps[spacing][0], "tracking": summary(found), "jump": jump_summary(jumps)}
            print_row(row)
            rows.append(row | {"points": record(found), "jumps": record(jumps)})
    return rows


def parse() -> argparse.Namespace:
    """The command line."""
    command = parser("tracking", __doc__)
    command.add_argument("--models", nargs="+", default=["mlp", "cnn", "gpt"], choices=["mlp", "cnn", "gpt"])
    command.add_argument("--demo", action="store_true", help="the cost of a reading on the demo's model only")
    command.add_argument("--spacings", nargs="+", type=int, default=list(SPACINGS), choices=SPACINGS)
    options = command.parse_args()
    if options.smallest:
        options.spacings = [1]
    return options


def main() -> None:
    """Measure, print, and write the result after every training."""
    options = parse()
    if options.demo:
        path = options.output or RESULTS / "tracking.json"
        before = json.loads(path.read_text()) if path.exists() else {}
        steps, every = (4, 2) if options.smallest else (310, 10)
        cost = demo_cost(steps, every) | {"environment": environment("tracking")}
        print(cost)
        write(options, "tracking", before | {"demo": cost})
        return
    result: dict[str, Any] = {"environment": environment("tracking"), "rows": []}
    begin = time.perf_counter()
    print_header()
    chosen = [course for course in COURSES if course.make.__name__ in options.models]
    for course in [SMALLEST] if options.smallest else chosen:
        result["rows"] += run(course, options.spacings, 3 if options.smallest else POINTS)
        result["environment"]["seconds in all"] = round(time.perf_counter() - begin)
        write(options, "tracking", result)
    print_jumps(result["rows"])
    print(f"\n{time.perf_counter() - begin:.0f} s in all")


if __name__ == "__main__":
    main()
