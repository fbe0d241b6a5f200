"""What a reading of activations costs from outside: runs with and without the monitor take turns.

Run ``python -m benchmarks.activations``; a table is printed and the result goes to
``benchmarks/results/activations.json``. Compared is the CPU time of the process, by the median over pairs.
"""

import warnings
from statistics import mean, median, stdev
from typing import Any

import torch

from benchmarks.environment import environment, parser, write
from benchmarks.readings import CASES, train
from dynamon.callbacks import ActivationMonitor

EVERY = 5  # steps


def compare(name: str, steps: int, pairs: int, fraction: float) -> dict[str, Any]:
    """CPU seconds that a reading adds, and what it takes by the monitor's own clock, in training steps too."""
    added, stated, plain = [], [], []
    for pair in range(pairs + 1):
        times = {}
        for is_watched in (False, True) if pair % 2 else (True, False):  # who is first changes
            monitor = ActivationMonitor(every_n_steps=EVERY, probe_fraction=fraction) if is_watched else None
            times[is_watched] = train(CASES[name], steps, monitor)[1]  # type: ignore[arg-type]
            if monitor is not None:
                readings = len(monitor.history["activation/rms"])
                spent = monitor._budget.spent
                rows = len(monitor.history["activation/rms"].layers or ())
        if pair:  # the first one warms up
            added.append((times[True] - times[False]) / readings)
            plain.append(times[False] / steps)
            stated.append(spent / readings)
    step = median(plain)
    return {
        "pairs": pairs,
        "steps": steps,
        "rows": rows,
        "CPU ms a step without": round(1000 * step, 2),
        "CPU ms a reading": round(1000 * median(added), 2),
        "mean": round(1000 * mean(added), 2),
        "half width of the 95 % interval": round(1000 * 1.96 * stdev(added) / len(added) ** 0.5, 2),
        "training steps a reading": round(median(added) / step, 2),
        "ms stated": round(1000 * median(stated), 2),
    }


def main() -> None:
    """Measure and write the result."""
    command = parser("activations", __doc__)
    command.add_argument("--cases", nargs="+", choices=CASES, default=["MLP", "demo GPT"])
    command.add_argument("--fractions", type=float, nargs="+", default=[0.25, 1.0], help="of a batch in the probe")
    command.add_argument("--steps", type=int, default=40)
    command.add_argument("--pairs", type=int, default=10)
    options = command.parse_args()
    if options.smallest:
        options.cases, options.steps, options.pairs = ["small MLP"], 10, 2
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for name in options.cases:
        for fraction in options.fractions:
            results[f"{name}, {fraction:g} of a batch"] = found = compare(name, options.steps, options.pairs, fraction)
            print(f"{name}, {fraction:g} of a batch: {found}", flush=True)
        write(options, "activations", {"environment": environment("activations"), "results": results})


if __name__ == "__main__":
    main()
