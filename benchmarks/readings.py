"""What short and long runs show under the default budget, and what that costs from outside.

Run ``python -m benchmarks.readings``; tables are printed and the result goes to ``benchmarks/results/readings.json``.
For each model and length: readings of each default quantity in each fifth of the run, the first of them, and what was
spent of what is allowed. With ``--pairs`` runs with and without the monitor take turns, and the CPU time of the process
is compared: what the monitor adds, with its 95 % interval, beside what it states.
"""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean, median, stdev
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.environment import environment, parser, write
from benchmarks.overhead import READ
from dynamon.callbacks import DynamicsMonitor
from dynamon.cli.demo_data import standard_library_text, training_batches
from dynamon.cli.language_model import LanguageModel

PARTS = 5
SOON = 50  # steps within which everything is to be read once
STEPS = (50, 200, 1000, 5000)


class Classifier(pl.LightningModule):
    """A multilayer perceptron.

    Args:
        sizes: Widths, from input to output.
    """

    def __init__(self, *sizes: int) -> None:
        """Make the layers."""
        super().__init__()
        inner = [layer for a, b in zip(sizes, sizes[1:-1], strict=False) for layer in (nn.Linear(a, b), nn.Tanh())]
        self.network = nn.Sequential(*inner, nn.Linear(sizes[-2], sizes[-1]))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """Cross-entropy."""
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


@dataclass(frozen=True)
class Case:
    """A model and its batches; ``steps`` are the lengths of its runs."""

    make: Callable[[int], pl.LightningModule]
    batches: Callable[[int], Any]
    steps: tuple[int, ...] = STEPS


def _classes(steps: int, batch: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    inputs, labels = (
        torch.randn(50 * batch, 64, generator=generator),
        torch.randint(10, (50 * batch,), generator=generator),
    )
    return DataLoader(TensorDataset(inputs, labels), batch)


def _text(steps: int) -> DataLoader[Any]:
    return training_batches(standard_library_text()[0], 16, 128, steps, 0)


CASES = {
    "small MLP": Case(lambda steps: Classifier(64, 32, 10), lambda steps: _classes(steps, 32)),
    "MLP": Case(lambda steps: Classifier(64, 256, 256, 10), lambda steps: _classes(steps, 128)),
    "MLP, 2 million parameters": Case(
        lambda steps: Classifier(64, 1400, 1400, 10), lambda steps: _classes(steps, 256), (320,)
    ),
    "demo GPT": Case(LanguageModel, _text, (50, 200, 600)),
}


def train(case: Case, steps: int, monitor: DynamicsMonitor | None) -> tuple[float, float]:
    """Seconds of a run by the clock, and of the CPU, from the first step on."""

    class Clock(pl.Callback):
        begin = end = (0.0, 0.0)

        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.begin = time.perf_counter(), time.process_time()

        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.end = time.perf_counter(), time.process_time()

    clock = Clock()
    torch.manual_seed(0)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[clock, *([] if monitor is None else [monitor])],
    )
    trainer.fit(case.make(steps), case.batches(steps))
    return clock.end[0] - clock.begin[0], clock.end[1] - clock.begin[1]


def readings(monitor: DynamicsMonitor, steps: int) -> dict[str, dict[str, Any]]:
    """Readings of each default quantity: the first, and how many in each part of the run."""
    found = {}
    for quantity, tags in READ.items():
        at = np.sort(np.concatenate([monitor.history[t].steps for t in tags if t in monitor.history] or [np.zeros(0)]))
        parts = np.bincount((at * PARTS // steps).astype(int), minlength=PARTS)
        found[quantity] = {"first": int(at[0]) if len(at) else None, "by part": parts.tolist()}
    return found


def show_run(case: Case, steps: int) -> dict[str, Any]:
    """Readings and cost of one run under the default budget."""
    monitor = DynamicsMonitor()
    seconds, _ = train(case, steps, monitor)
    budget = monitor._budget
    assert budget.fraction is not None
    found = readings(monitor, steps)
    allowed = budget.fraction * budget.training + budget.grace
    return {
        "ms a step without the monitor": round(1000 * budget.training / steps, 2),
        "seconds": round(seconds, 2),
        "seconds spent": round(budget.spent, 3),
        "seconds allowed": round(allowed, 3),
        "readings": found,
        "every quantity soon": all(one["first"] is not None and one["first"] < SOON for one in found.values()),
        "within what is allowed": budget.spent <= 1.1 * allowed,
    }


def compare(case: Case, steps: int, pairs: int) -> dict[str, Any]:
    """CPU seconds that the monitor adds, from outside and as it states it."""
    added, stated, plain = [], [], []
    for pair in range(pairs + 1):
        times = {}
        for is_watched in (False, True) if pair % 2 else (True, False):  # who is first changes
            monitor = DynamicsMonitor() if is_watched else None
            times[is_watched] = train(case, steps, monitor)[1]
            if monitor is not None:
                spent = monitor._budget.spent
        if pair:  # the first one warms up
            added.append(times[True] - times[False])
            plain.append(times[False])
            stated.append(spent)
    half = 1.96 * stdev(added) / len(added) ** 0.5
    return {
        "pairs": pairs,
        "steps": steps,
        "CPU seconds without": round(mean(plain), 3),
        "CPU seconds added": round(mean(added), 3),
        "half width of the 95 % interval": round(half, 3),
        "median CPU seconds added": round(median(added), 3),
        "seconds stated": round(mean(stated), 3),
    }


def main() -> None:
    """Measure all models and write the result."""
    command = parser("readings", __doc__)
    command.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    command.add_argument("--steps", type=int, nargs="+", help="instead of the lengths of each model")
    command.add_argument("--pairs", type=int, default=0, help="runs with and without, of the shortest length but one")
    options = command.parse_args()
    if options.smallest:
        options.cases, options.steps, options.pairs = ["small MLP"], [20], 2
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for name in options.cases:
        case, lengths = CASES[name], options.steps or CASES[name].steps
        train(case, 10, DynamicsMonitor(every_n_steps=5))  # loads what is loaded once
        results[name] = {"runs": {str(steps): show_run(case, steps) for steps in lengths}}
        for steps, run in results[name]["runs"].items():
            print(f"{name}, {steps} steps: {run['seconds spent']} s of {run['seconds allowed']} s")
            for quantity, found in run["readings"].items():
                print(f"    {quantity:16} first {found['first']!s:>5}  by part {found['by part']}")
        if options.pairs:
            results[name]["from outside"] = compare(case, sorted(lengths)[:2][-1], options.pairs)
            print(f"    {results[name]['from outside']}")
        # After each model, since they take long.
        write(options, "readings", {"environment": environment("readings"), "results": results})


if __name__ == "__main__":
    main()
