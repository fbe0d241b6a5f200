"""What monitoring costs, measured from outside: monitored and unmonitored trainers in turn, in one process.

Run ``python -m benchmarks.overhead``; the table is printed and goes to ``benchmarks/results/overhead.json``. Each arm
is a Trainer in a thread of its own; a baton lets one of them take a short block of steps, then the next, so that a
slow minute of the machine meets all. The first block holds the start-up. Two statements are checked for each model:

- with the default budget of 2 %, monitoring takes no more, and every default quantity is read in each 500 steps;
- with the budget off, where it costs 10 % or more, what the monitor states is within 25 % of what is measured.
"""

import random
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.environment import environment, parser, write
from benchmarks.turns import Baton
from dynamon.callbacks import DynamicsMonitor
from dynamon.cli.demo_data import standard_library_text, training_batches
from dynamon.cli.language_model import GPT, LanguageModel

WINDOW = 500  # steps in which every default quantity is to be read
BUDGET = 0.02
# One tag of each quantity that the default preset shows; a stability ratio may also be marked as not converged.
READ = {
    "gradients": ("gradient/norm",),
    "noise": ("noise/dual",),
    "weights": ("weight/operator",),
    "spectra": ("spectrum/sigma_max",),
    "full spectra": ("spectrum/effective_rank",),
    "along the step": ("sharpness/directional",),
    "critical": ("sharpness/critical_multiple",),
    "stability ratio": ("sharpness/stability_ratio", "sharpness/stability_ratio_unconverged"),
}
EVERY_TENTH = {"full spectra"}  # by design at every tenth reading of its meter: shown, not asked for in each window
ARMS: dict[str, Callable[[], DynamicsMonitor | None]] = {
    "unmonitored": lambda: None,
    "budget 2 %": lambda: DynamicsMonitor(budget=BUDGET),
    "budget off": lambda: DynamicsMonitor(budget=None),
}


@dataclass
class Shape:
    """A model and its batches."""

    width: int
    depth: int
    heads: int
    context: int
    batch: int
    steps: int = 1000
    vocabulary: int = 256


SHAPES = {
    "demo GPT": Shape(144, 4, 4, 128, 16),
    "GPT 10M": Shape(360, 6, 6, 128, 8, steps=500),
    "GPT-2 124M": Shape(768, 12, 12, 1024, 8, vocabulary=50_257),
}


class Model(LanguageModel):
    """The demo's module around a GPT of another size."""

    def __init__(self, shape: Shape, steps: int) -> None:
        """Make the network."""
        super().__init__(steps, rate=6e-4, context=shape.context)
        self.network = GPT(shape.width, shape.depth, shape.heads, shape.context)
        if shape.vocabulary != 256:
            self.network.embedding = nn.Embedding(shape.vocabulary, shape.width)
            nn.init.normal_(self.network.embedding.weight, std=0.02)
            self.network.head = nn.Linear(shape.width, shape.vocabulary, bias=False)
            self.network.head.weight = self.network.embedding.weight


class Clock:
    """Two callbacks around all others: seconds of each block, waiting not counted."""

    def __init__(self, baton: Baton, arm: int, block: int, monitor: DynamicsMonitor | None) -> None:
        """Nothing timed yet."""
        self.baton, self.arm, self.monitor = baton, arm, monitor
        self.seconds: list[float] = []
        clock = self

        class First(pl.Callback):
            def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
                clock.open()

            def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
                if trainer.global_step and trainer.global_step % block == 0:
                    clock.open()

        class Last(pl.Callback):
            def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
                if trainer.global_step % block == 0:
                    clock.close()

        self.first, self.last = First(), Last()

    def open(self) -> None:
        """A block begins."""
        self.baton.take(self.arm)
        self.begin = now()

    def close(self) -> None:
        """A block is over."""
        self.seconds.append(now() - self.begin)
        if self.monitor is not None:
            self.monitor._budget.stop()  # waiting is no training; its clock goes on with the next batch
        self.baton.pass_on()


def now() -> float:
    """Seconds, when the device has done what it was given."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def batches(shape: Shape, steps: int, text: Tensor) -> Any:
    """The same batches for every arm."""
    if shape.vocabulary == 256:
        return training_batches(text, shape.batch, shape.context, steps, 0)
    rows = torch.randint(shape.vocabulary, (256, shape.context + 1), generator=torch.Generator().manual_seed(0))
    return DataLoader(rows, shape.batch)


def run_in_turn(shape: Shape, steps: int, block: int, device: str, text: Tensor) -> dict[str, tuple[list[float], Any]]:
    """Seconds of each block and the monitor, by arm."""
    monitors = {name: make() for name, make in ARMS.items()}
    baton = Baton(len(monitors))
    clocks = {name: Clock(baton, place, block, monitors[name]) for place, name in enumerate(monitors)}

    def train(name: str, folder: str) -> None:
        clock, monitor = clocks[name], monitors[name]
        torch.manual_seed(0)
        trainer = pl.Trainer(
            accelerator="gpu" if device == "cuda" else "cpu",
            devices=1,
            precision="bf16-mixed" if device == "cuda" else "32-true",
            max_steps=steps,
            max_epochs=-1,
            logger=TensorBoardLogger(folder, name=None, version=name.replace(" ", "_")),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            callbacks=[clock.first, *([] if monitor is None else [monitor]), clock.last],
        )
        trainer.fit(Model(shape, steps), batches(shape, steps, text))

    baton.run(list(monitors), train)
    return {name: (clocks[name].seconds, monitors[name]) for name in monitors}


def overhead(own: list[float], plain: list[float]) -> tuple[float, float]:
    """Time above that of the unmonitored arm, as a share of it, and its standard error by drawing blocks anew."""
    pairs = list(zip(own, plain, strict=True))
    draw = random.Random(0)
    again = [_excess([draw.choice(pairs) for _ in pairs]) for _ in range(500)]
    return _excess(pairs), float(np.std(again))


def _excess(pairs: list[tuple[float, float]]) -> float:
    return sum(own for own, _ in pairs) / sum(plain for _, plain in pairs) - 1


def windows(monitor: DynamicsMonitor, steps: int) -> dict[str, list[int]]:
    """How often each default quantity was read in each whole window."""
    found = {}
    for quantity, tags in READ.items():
        at = np.concatenate([monitor.history[t].steps for t in tags if t in monitor.history] or [np.zeros(0)])
        begins = range(0, max(steps // WINDOW, 1) * WINDOW, WINDOW)
        found[quantity] = [int(((at >= b) & (at < b + WINDOW)).sum()) for b in begins]
    return found


def summary(runs: dict[str, tuple[list[float], Any]], steps: int, block: int, shape: Shape) -> dict[str, Any]:
    """Everything about one model."""
    plain = runs["unmonitored"][0]
    model = Model(shape, steps)
    result: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "batch": [shape.batch, shape.context],
        "steps": steps,
        "steps a block": block,
        "ms a step": round(1000 * median(plain) / block, 2),
    }
    for name, (seconds, monitor) in runs.items():
        if monitor is None:
            continue
        measured, error = overhead(seconds, plain)
        arm = {"measured": round(measured, 4), "standard error": round(error, 4), "stated": round(monitor.overhead, 4)}
        spent = {quantity: round(s, 3) for quantity, s in monitor._budget.spent_on.items()}
        arm |= {"seconds": spent, "readings by window": windows(monitor, steps), "failures": monitor.failures}
        result[name] = arm
    result["checks"] = checks(result, steps)
    return result


def checks(result: dict[str, Any], steps: int) -> dict[str, bool | None]:
    """The two statements; None where a run is too short to say, or the cost too small to compare."""
    kept, off = result["budget 2 %"], result["budget off"]
    asked = {q: counts for q, counts in kept["readings by window"].items() if q not in EVERY_TENTH}
    return {
        "budget kept as stated": kept["stated"] <= BUDGET,
        "budget kept as measured (within two standard errors)": kept["measured"] <= BUDGET + 2 * kept["standard error"],
        "every quantity in each window": all(min(c) > 0 for c in asked.values()) if steps >= WINDOW else None,
        "stated within 25 % of measured": abs(off["stated"] / off["measured"] - 1) <= 0.25
        if off["measured"] >= 0.1
        else None,
    }


def show(name: str, result: dict[str, Any]) -> None:
    """Print one model's table."""
    print(f"\n{name}: {result['parameters']:,} parameters, {result['ms a step']} ms a step, {result['steps']} steps")
    print(f"{'':12}{'measured':>18}{'stated':>9}  least readings in {WINDOW} steps")
    for arm in ("budget 2 %", "budget off"):
        row = result[arm]
        least = ", ".join(f"{q} {min(counts)}" for q, counts in row["readings by window"].items())
        measured = f"{row['measured']:.2%} +- {row['standard error']:.2%}"
        print(f"{arm:12}{measured:>18}{row['stated']:>9.2%}  {least}")
    for check, holds in result["checks"].items():
        print(f"  {'-' if holds is None else 'yes' if holds else 'NO'}  {check}")


def main() -> None:
    """Measure the models and write the result."""
    command = parser("overhead", __doc__)
    command.add_argument("--steps", type=int, help="1000, and 500 of the GPT with 10M parameters")
    command.add_argument("--block", type=int, default=10, help="steps an arm takes before the next one's turn")
    command.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    command.add_argument("--gpt2", action="store_true", help="the shape of GPT-2 124M too (bf16 on a GPU)")
    options = command.parse_args()
    warnings.simplefilter("ignore")
    text, _ = standard_library_text()
    results: dict[str, Any] = {}
    shapes = {"tiny GPT": Shape(16, 1, 2, 8, 2, steps=30)} if options.smallest else SHAPES
    for name, shape in shapes.items():
        if name == "GPT-2 124M" and not options.gpt2:
            continue
        steps = (options.steps or shape.steps) // options.block * options.block
        run_in_turn(shape, 2 * options.block, options.block, options.device, text)  # warm up
        runs = run_in_turn(shape, steps, options.block, options.device, text)
        results[name] = summary(runs, steps, options.block, shape)
        show(name, results[name])
        # After each model, since they take long.
        write(options, "overhead", {"environment": environment("overhead", options.device), "results": results})


if __name__ == "__main__":
    main()
