"""The largest Hessian eigenvalue by dynamon and by its peers: error, products, time and memory, side by side.

Run ``python -m benchmarks.sharpness``; the result goes to ``benchmarks/results/sharpness.json``. Times include
making the operator; on a CPU they are this process's processor time, which other programs do not lengthen. Errors are
against ARPACK in float64. The bars on time compare with each peer at its cheapest setting whose error is at most 1 % in
that cell, which a user, who does not know the truth, would have to guess. The peers come with
``pip install -c constraints.txt -e ".[bench]"``; one that is missing is skipped. That brings a torchvision which fits
torch from PyPI; with another build of torch it breaks Lightning's import, and as no peer imports it here,
``pip uninstall torchvision`` mends that. ``--gpt2`` takes the shape of GPT-2 124M in float32 and bfloat16 instead,
with errors against a tight run of dynamon in float32.
"""

import argparse
import ctypes
import gc
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import eigsh
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.environment import environment, parser, write
from benchmarks.models import Problem, cnn, gpt, gpt2, mlp
from benchmarks.peers import COLD, METHODS, PACKAGES, SETTINGS, TRACKING, Reading, hessian_of, installed, reading
from dynamon.curvature import EigenTracker, top_eigenvalues

SPEED_BARS = {"curvlinops eigsh": 3.0, "curvlinops eigsh ncv=8": 3.0, "PyHessian": 2.0, "eigenthings Lanczos 20": 1.0}
SPACING, MEASUREMENTS = 10, 11  # of the tracker: one cold start, then a full cycle of ten with its one cold run


@dataclass
class Row:
    """All readings of one method on one model at one stage."""

    errors: list[float] = field(default_factory=list)
    products: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    upper: list[float] = field(default_factory=list)
    extra_megabytes: float | None = None
    failed: str | None = None

    def add(self, reading: Reading, seconds: float, truth: float) -> None:
        self.errors.append((reading.value - truth) / abs(truth))
        self.products.append(reading.products)
        self.seconds.append(seconds)
        if reading.upper is not None:
            self.upper.append((reading.upper - truth) / abs(truth))


# ---- truth


def exact(problem: Problem) -> tuple[float, float]:
    """Largest and (to 1 %) smallest eigenvalue by ARPACK on a float64 copy of the model."""
    operator = hessian_of(problem.copy(torch.float64)).to_scipy()
    start = np.random.default_rng(1234).standard_normal(operator.shape[0])
    largest = eigsh(operator, k=1, which="LA", tol=1e-10, v0=start, return_eigenvectors=False)
    smallest = eigsh(operator, k=1, which="SA", tol=1e-2, v0=start, return_eigenvectors=False)
    return float(largest[0]), float(smallest[0])


def tight(problem: Problem) -> tuple[float, float]:
    """The same to a relative residual of 1e-4 in float32, where float64 costs too much."""
    found = top_eigenvalues(hessian_of(problem.copy(torch.float32)), tol=1e-4, max_matvecs=300, seed=1234)
    if not found.converged:
        print(f"  the reference stopped at {found.matvecs} products with a residual of {found.residuals.tolist()}.")
    return float(found.values[0]), found.smallest


# ---- measuring


def timed(problem: Problem, call: Callable[[], Any]) -> tuple[Any, float]:
    """What a call returns, and its seconds; attention runs through the kernel that has second derivatives."""
    gc.collect()
    on_gpu = problem.inputs.is_cuda
    wait, clock = (torch.cuda.synchronize, time.perf_counter) if on_gpu else ((lambda: None), time.process_time)
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyHessian warns of its own reference cycle
        wait()
        begin = clock()
        result = call()
        wait()
        return result, clock() - begin


def extra_memory(problem: Problem, call: Callable[[], Any]) -> float | None:
    """Megabytes that a call takes at its peak on top of what was there, or None where that is not known.

    On CUDA this is what PyTorch's allocator counts, without what a peer keeps on the host. On the CPU it is the
    kernel's high-water mark of resident memory in a forked child, so NumPy's arrays count as well as tensors, and
    nothing that an earlier method freed is reused.
    """
    if problem.inputs.is_cuda:
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        timed(problem, call)
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    if not Path("/proc/self/clear_refs").exists():
        timed(problem, call)
        return None
    receiver, sender = multiprocessing.Pipe(duplex=False)
    context = multiprocessing.get_context("fork")
    child = context.Process(target=_memory_in_child, args=(sender, problem, call), daemon=True)
    child.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(300) else None
    except EOFError:
        return None
    finally:
        child.kill()
        child.join()


def _memory_in_child(sender: Any, problem: Problem, call: Callable[[], Any]) -> None:
    torch.set_num_threads(1)  # the parent's threads did not come through the fork
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: freed tensors go back to the kernel at once
    timed(problem, call)  # what stays after a first call (code pages, caches) is not the method's
    gc.collect()
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status("VmRSS")
    timed(problem, call)
    sender.send((_status("VmHWM") - before) / 1e3)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def guarded(row: Row, call: Callable[..., Any], *args: Any) -> Any:
    """Call, or note in the row why that failed: out of memory, or an error of the peer."""
    try:
        return call(*args)
    except Exception as error:
        row.failed = "out of memory" if "memory" in str(error).lower() else f"{type(error).__name__}: {error}"[:120]
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return None


def compare(problem: Problem, names: list[str], seeds: int, rounds: int, truth: float) -> dict[str, Row]:
    """All methods, interleaved: a slow minute of the machine meets each of them."""
    rows = {name: Row() for name in names}
    for name, row in rows.items():  # two calls to warm up, for peers import lazily; the second measures memory
        call = partial(METHODS[name], problem, 0)
        if guarded(row, timed, problem, call) is not None:
            row.extra_megabytes = guarded(row, extra_memory, problem, call)
    for seed in [*range(seeds)] * rounds:
        for name, row in rows.items():
            done = None if row.failed else guarded(row, timed, problem, partial(METHODS[name], problem, seed))
            if done is not None:
                row.add(*done, truth)
    return rows


def track(problem: Problem, seeds: int, reference: Callable[[Problem], tuple[float, float]]) -> Row:
    """Trackers along a stretch of training: their error at its end, their mean products and seconds on the way."""
    twin = problem.copy()
    trackers = [EigenTracker(tol=1e-2, seed=1000 * seed) for seed in range(seeds)]
    readings: list[list[tuple[Reading, float]]] = [[] for _ in trackers]
    training = twin.train(SPACING * (MEASUREMENTS - 1))
    for step in range(SPACING * (MEASUREMENTS - 1) + 1):
        if step % SPACING == 0:
            for tracker, taken in zip(trackers, readings, strict=True):
                found, seconds = timed(twin, lambda tracker=tracker: tracker.update(hessian_of(twin)))
                taken.append((reading(found), seconds))
        next(training, None)
    truth, _ = reference(twin)
    row = Row()
    for taken in readings:
        following = taken[1:]  # the first one starts from nothing
        products = statistics.mean(one.products for one, _ in following)
        row.add(Reading(taken[-1][0].value, products), statistics.mean(s for _, s in following), truth)
    return row


# ---- the report


def summary(rows: dict[str, Row]) -> dict[str, dict[str, Any]]:
    """The rows as they go into the JSON file."""
    seconds = {name: statistics.median(row.seconds) for name, row in rows.items() if row.seconds}
    result: dict[str, dict[str, Any]] = {}
    for name, row in rows.items():
        result[name] = {"failed": row.failed} if row.failed else {}
        if not row.seconds:
            continue
        result[name] |= {
            "relative errors": [float(f"{error:.3g}") for error in row.errors],
            "products": row.products,
            "median seconds": float(f"{seconds[name]:.4g}"),
            "times dynamon cold": round(seconds[name] / seconds[COLD], 2) if COLD in seconds else None,
            "seconds": [float(f"{each:.4g}") for each in row.seconds],
            "extra MB": None if row.extra_megabytes is None else round(row.extra_megabytes, 1),
        }
        if row.upper:
            result[name]["relative upper bounds"] = [float(f"{upper:.3g}") for upper in row.upper]
    return result


def span(values: list[float], style: str) -> str:
    """The least and the largest value, once where they agree."""
    low, high = format(min(values), style), format(max(values), style)
    return low if low == high else f"{low}..{high}"


def print_cell(cell: dict[str, Any]) -> None:
    """The table of one model at one stage."""
    print(
        f"\n{cell['model']}, {cell['stage']}: {cell['parameters']} parameters, loss {cell['loss']:.4g}, "
        f"eigenvalues from {cell['smallest']:.6g} to {cell['largest']:.6g}"
    )
    line = "  {:<24}{:>22}{:>14}{:>11}{:>9}{:>11}{:>20}"
    print(line.format("", "error", "products", "seconds", "ratio", "extra MB", "upper bound"))
    for name, row in cell["methods"].items():
        if "median seconds" not in row:
            print(f"  {name:<24}  failed: {row.get('failed')}")
            continue
        megabytes, ratio = row["extra MB"], row["times dynamon cold"]
        print(
            line.format(
                name,
                span(row["relative errors"], "+.1e"),
                span(row["products"], ".3g"),
                f"{row['median seconds']:.3f}",
                "-" if ratio is None else f"{ratio:.2f}",
                "-" if megabytes is None else f"{megabytes:.1f}",
                span(row.get("relative upper bounds", []), "+.1e") if "relative upper bounds" in row else "-",
            )
        )


def worst(row: dict[str, Any]) -> float:
    return max(abs(error) for error in row["relative errors"])


def bars(cells: list[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """For each bar and each cell, whether dynamon cold met it and how far; none where no setting is right."""
    result: dict[str, dict[str, str]] = {}
    for cell in cells:
        where, methods = f"{cell['model']} {cell['stage']}", cell["methods"]
        own = methods.get(COLD, {})
        if "median seconds" not in own:
            continue
        checks = {"error at most 1 %": (worst(own) <= 0.01, f"{worst(own):.1e}")}
        for name, factor in SPEED_BARS.items():
            rows = [methods.get(one, {}) for one in (name, *SETTINGS[name])]
            times = [row["median seconds"] for row in rows if "median seconds" in row and worst(row) <= 0.01]
            if times:  # else no setting has an error of at most 1 %
                ratio = min(times) / own["median seconds"]
                checks[f"time x {factor:g}: {name}"] = (ratio >= factor, f"{ratio:.2f}x")
        for bar, (met, figure) in checks.items():
            result.setdefault(bar, {})[where] = f"{'PASS' if met else 'MISS'} {figure}"
    return dict(sorted(result.items(), reverse=True))


def print_bars(table: dict[str, dict[str, str]]) -> None:
    """One line a bar, one column a cell; errors are the worst over the seeds."""
    columns = list(dict.fromkeys(where for row in table.values() for where in row))
    print("\n" + " " * 34 + "".join(f"{column:>19}" for column in columns) + f"{'met':>8}")
    for bar, row in table.items():
        met = sum(verdict.startswith("PASS") for verdict in row.values())
        print(f"{bar:<34}" + "".join(f"{row.get(c, '-'):>19}" for c in columns) + f"{met:>5}/{len(row)}")


def package_versions() -> dict[str, str | None]:
    """Of the peers and of what all stand on; None for what is not installed."""
    versions: dict[str, str | None] = {}
    for package in ("torch", "numpy", "scipy", "lightning", *PACKAGES.values()):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions


# ---- the runs


def measure(problem: Problem, stage: str, names: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """One model at one stage by all methods."""
    reference = tight if options.gpt2 else exact
    largest, smallest = reference(problem)
    rows = compare(problem, names, options.seeds, options.rounds, largest)
    if TRACKING in options.methods and problem.params[0].dtype == torch.float32:  # bfloat16 weights do not train
        rows[TRACKING] = Row()
        rows[TRACKING] = guarded(rows[TRACKING], track, problem, options.seeds, reference) or rows[TRACKING]
    cell = {
        "model": problem.name,
        "stage": stage,
        "parameters": sum(p.numel() for p in problem.params),
        "loss": float(problem.loss_fn().detach()),
        "largest": largest,
        "smallest": smallest,
        "methods": summary(rows),
    }
    print_cell(cell)
    return cell


def cases(options: argparse.Namespace) -> Iterator[tuple[Problem, str]]:
    """The models at initialisation and in training, on the device."""
    makers: list[Callable[[], Problem]] = [mlp, cnn, gpt]
    if options.smallest:
        makers = [lambda: replace(mlp(width=8), probe_size=16)]
    if options.gpt2:
        makers = [lambda: gpt2(tiny=options.smallest, batch=options.batch, context=options.context)]
    for make in makers:
        problem = make().copy(device=options.device)
        for stage, steps in (("init", 0), ("mid", options.steps)):
            for _ in problem.train(steps):
                pass
            yield problem, stage
            if options.gpt2:
                yield problem.copy(torch.bfloat16), f"{stage} bf16"


def parse() -> argparse.Namespace:
    """The command line."""
    command = parser("sharpness", __doc__)
    command.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    command.add_argument("--seeds", type=int, default=3)
    command.add_argument("--rounds", type=int, default=2, help="how often every seed is timed")
    command.add_argument("--steps", type=int, help="of training before the second stage, default 250 (GPT-2: 60)")
    command.add_argument("--methods", nargs="+", default=[*METHODS, TRACKING], choices=[*METHODS, TRACKING])
    command.add_argument("--gpt2", action="store_true", help="the shape of GPT-2 124M, float32 and bfloat16")
    command.add_argument("--batch", type=int, default=4, help="with --gpt2")
    command.add_argument("--context", type=int, default=256, help="with --gpt2")
    options = command.parse_args()
    if options.smallest:
        options.seeds = options.rounds = 1
        options.batch, options.context = 2, 8
    options.steps = options.steps or (2 if options.smallest else 60 if options.gpt2 else 250)
    return options


def main() -> None:
    """Measure, print, check the bars, and write the result after every cell."""
    options = parse()
    gc.freeze()  # what is imported stays: collecting before each timing need not look at it
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # TensorFloat-32 would hide the errors compared here
    names = installed([name for name in options.methods if name in METHODS])
    place = environment("sharpness", options.device, packages=package_versions())
    result: dict[str, Any] = {"environment": place, "cells": []}
    begin = time.perf_counter()
    for problem, stage in cases(options):
        result["cells"].append(measure(problem, stage, names, options))
        result["bars"] = bars(result["cells"])
        result["environment"]["seconds in all"] = round(time.perf_counter() - begin)
        write(options, "sharpness_gpt2" if options.gpt2 else "sharpness", result)
    print_bars(result["bars"])
    print(f"\n{time.perf_counter() - begin:.0f} s in all")


if __name__ == "__main__":
    main()
