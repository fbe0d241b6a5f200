"""Which form of the stability ratio tells best whether a run will fail: area under the ROC curve.

Run ``python -m benchmarks.headline`` from the repository root; the result goes to ``benchmarks/results/headline.json``.

Decided before the first run: three tasks, eight rates and four seeds. A run fails if its final smoothed loss is above
1.05 times its minimum, or not finite. The score of a form is the median of its readings in the third quarter of the
run, infinite where the loss was not finite. The form is chosen on the first two seeds and reported on the other two,
with a bootstrap interval over runs. The area is taken within each task and averaged over tasks, so that differences
between tasks do not count.

The forms: ``ratio`` is the stability ratio; ``next`` that with the preconditioner of the step that would be taken on
the probe; ``answered`` with the larger one of the second moment and the probe's squared gradient; ``rate`` is the
learning rate alone, which any reading has to beat.
"""

import argparse
import math
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from benchmarks.environment import environment, parser, write
from benchmarks.models import FlatGPT, Problem, clusters, markov_chain
from dynamon.curvature import HessianOperator, top_eigenvalues
from dynamon.stability import StabilityScaling, stability_operator, stability_scaling

FORMS = ("ratio", "next", "answered", "rate")
STEPS, READINGS = 160, 5
RATES = tuple(1e-3 * 10 ** (i * 3 / 7) for i in range(8))  # 1e-3 to 1
CHOSEN_ON, REPORTED_ON = (0, 1), (2, 3)
FAILED = 1.05
SMOOTHED_OVER = 40  # steps: over fewer, the noise of batches decides
DRAWS = 2000


def small_mlp(seed: int) -> Problem:
    """Three linear layers of width 32 with tanh, on noisy clusters."""
    torch.manual_seed(seed)
    layers = [nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10)]
    return Problem("MLP", nn.Sequential(*layers), *clusters((32,), noise=2.0), probe_size=16)


def small_cnn(seed: int) -> Problem:
    """Two convolutions with ReLU, on noisy pictures of 8 x 8."""
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    return Problem("CNN", model, *clusters((3, 8, 8), noise=2.0), probe_size=16)


def small_gpt(seed: int) -> Problem:
    """One block of width 16 with 16 tokens of context, on a random Markov chain."""
    torch.manual_seed(seed)
    model = FlatGPT(width=16, depth=1, heads=2, context=16)
    return Problem("GPT", model, *markov_chain(256, 16), probe_size=4, batch_size=16)


TASKS: tuple[Callable[[int], Problem], ...] = (small_mlp, small_cnn, small_gpt)


def answered(optimizer: AdamW, params: list[nn.Parameter], gradient: Tensor, now: StabilityScaling) -> StabilityScaling:
    """The scaling with the second moment raised to the squared gradient, where that is larger."""
    group = optimizer.param_groups[0]
    step = float(optimizer.state[params[0]]["step"])
    moment = torch.cat([optimizer.state[p]["exp_avg_sq"].reshape(-1) for p in params]) / (1 - group["betas"][1] ** step)
    lower = (moment.sqrt() + group["eps"]) / (torch.maximum(moment, gradient**2).sqrt() + group["eps"])
    return replace(now, scale=now.scale * lower.sqrt())


def read(problem: Problem, optimizer: AdamW, rate: float) -> dict[str, float]:
    """All forms at the present weights, from one graph."""
    hessian = HessianOperator(problem.loss_fn, problem.params)
    now = stability_scaling(optimizer, problem.params)
    forms = {
        "ratio": now,
        "next": stability_scaling(optimizer, problem.params, gradient=hessian.gradient),
        "answered": answered(optimizer, problem.params, hessian.gradient, now),
    }
    found, vectors = {"rate": rate}, None
    for name, scaling in forms.items():
        solve = top_eigenvalues(stability_operator(hessian, scaling), tol=2e-2, max_matvecs=30, warm_start=vectors)
        found[name], vectors = float(solve.values[0]), solve.vectors
    return found


def train(make: Callable[[int], Problem], rate: float, seed: int, steps: int) -> dict[str, Any]:
    """One run: whether it failed, and the score of every form."""
    torch.set_num_threads(1)
    problem, losses, readings = make(seed), [], []
    optimizer = AdamW(problem.params, lr=rate, betas=(0.9, 0.95))
    due = {steps // 2 + i * (steps // 4) // READINGS for i in range(READINGS)}
    for step, (inputs, targets) in zip(range(steps), problem.batches(seed), strict=False):
        optimizer.zero_grad(set_to_none=True)
        loss = problem.criterion(problem.model(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            break
        if step in due:
            try:
                readings.append(read(problem, optimizer, rate))
            except FloatingPointError:
                readings.append(dict.fromkeys(FORMS, math.inf))
    smoothed = np.convolve(losses, np.full(SMOOTHED_OVER, 1 / SMOOTHED_OVER), "valid")
    failed = len(losses) < steps or not smoothed[-1] <= FAILED * smoothed.min()
    scores = {form: float(np.median([one[form] for one in readings])) if readings else math.inf for form in FORMS}
    if len(losses) < steps:
        scores |= {form: math.inf for form in FORMS if form != "rate"} | {"rate": rate}
    curves = {form: [float(f"{one[form]:.4g}") for one in readings] for form in FORMS[:-1]}
    return {
        "task": problem.name,
        "rate": rate,
        "seed": seed,
        "failed": bool(failed),
        "final": losses[-1],
        "scores": scores,
        "readings": curves,
    }


def area(failed: np.ndarray, scores: np.ndarray) -> float:
    """Probability that a failed run scores above one that did not, ties counted half; NaN without both."""
    bad, good = scores[failed], scores[~failed]
    if not len(bad) or not len(good):
        return math.nan
    return float(np.mean((bad[:, None] > good) + 0.5 * (bad[:, None] == good)))


def mean_area(runs: list[dict[str, Any]], form: str) -> float:
    """Mean of the areas of the tasks."""
    tasks = {run["task"] for run in runs}
    found = [
        area(
            np.array([run["failed"] for run in runs if run["task"] == task]),
            np.array([run["scores"][form] for run in runs if run["task"] == task]),
        )
        for task in sorted(tasks)
    ]
    return float(np.nanmean(found)) if not np.isnan(found).all() else math.nan


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Areas by form on either half of the seeds, with 95 % bootstrap intervals, and the form that was chosen."""
    generator = np.random.default_rng(0)
    halves = {"chosen on": CHOSEN_ON, "reported on": REPORTED_ON}
    result: dict[str, Any] = {}
    for name, seeds in halves.items():
        part = [run for run in runs if run["seed"] in seeds]
        draws = [[part[i] for i in generator.integers(len(part), size=len(part))] for _ in range(DRAWS if part else 0)]
        areas = {form: [mean_area(draw, form) for draw in draws] for form in FORMS}
        result[name] = {
            form: {
                "area": round(mean_area(part, form), 4),
                "interval": np.nanpercentile(areas[form], [2.5, 97.5]).round(4).tolist(),
                "above ratio": np.nanpercentile(np.subtract(areas[form], areas["ratio"]), [2.5, 97.5])
                .round(4)
                .tolist(),
            }
            for form in FORMS
            if part
        }
    readable = {form: one["area"] for form, one in result["chosen on"].items() if form != "rate"}
    result["chosen"] = max(readable, key=readable.__getitem__) if readable else None
    result["failed"] = f"{sum(run['failed'] for run in runs)} of {len(runs)}"
    return result


def print_summary(found: dict[str, Any]) -> None:
    """The table of areas."""
    print(f"\n{found['failed']} runs failed; chosen on seeds {CHOSEN_ON}: {found['chosen']}")
    for name in ("chosen on", "reported on"):
        for form, one in found[name].items():
            print(f"{name:<12}{form:<10}area {one['area']:.3f} {one['interval']}, above ratio {one['above ratio']}")


def parse() -> argparse.Namespace:
    """The command line."""
    command = parser("headline", __doc__)
    command.add_argument("--processes", type=int, default=1)
    return command.parse_args()


def main() -> None:
    """Train all runs, print the areas, and write the result."""
    options = parse()
    rates, steps = (RATES[::7], 16) if options.smallest else (RATES, STEPS)
    result: dict[str, Any] = {"environment": environment("headline"), "runs": []}
    begin = time.perf_counter()
    seeds = (*CHOSEN_ON, *REPORTED_ON)
    cells = [(make, rate, seed, steps) for make in TASKS for seed in seeds for rate in rates]
    with ExitStack() as stack:
        each: Any = map
        if options.processes > 1:
            spawn = multiprocessing.get_context("spawn")
            each = stack.enter_context(ProcessPoolExecutor(options.processes, spawn)).map
        for run in each(train, *zip(*cells, strict=True)):
            scores = "  ".join(f"{form} {score:.3g}" for form, score in run["scores"].items())
            print(f"{run['task']} {run['seed']} {'failed' if run['failed'] else 'fine':<7}{scores}", flush=True)
            result["runs"].append(run)
    result["summary"] = summary(result["runs"])
    result["environment"]["seconds in all"] = round(time.perf_counter() - begin)
    write(options, "headline", result)
    print_summary(result["summary"])


if __name__ == "__main__":
    main()
