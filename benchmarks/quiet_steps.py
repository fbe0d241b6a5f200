"""What callbacks cost at steps at which nothing is measured: microseconds a step, measured from outside.

Run ``python -m benchmarks.quiet_steps``; the table is printed and goes to ``benchmarks/results/quiet_steps.json``. Each
arm is a Trainer in a thread of its own on a network of 50 small tensors. In turn they take short blocks of steps, and
of each block the CPU time of its thread is noted; the lower quartiles of the blocks are compared, with an interval from
drawing rounds anew. Beside it, the hooks of each arm are called many times in a row between two steps.
"""

import math
import random
import time
import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.environment import environment, parser, write
from benchmarks.turns import Baton
from dynamon.callbacks import DynamicsMonitor, GradientMonitor, LayerwiseLR, SharpnessMonitor, WeightMonitor
from dynamon.rates import FixedRates

MOST = 30.0  # microseconds a step for all monitors together
_QUIET_FROM = 40  # steps, after which nothing is measured
_NEVER = 10**9  # steps between two readings: there is one at the first step
ARMS: dict[str, Callable[[], list[pl.Callback]]] = {
    "no callback": list,
    "an empty callback": lambda: [pl.Callback()],
    "DynamicsMonitor": lambda: [DynamicsMonitor(every_n_steps=_NEVER)],
    "three monitors": lambda: [monitor(every_n_steps=_NEVER) for monitor in _THREE],
    "fixed rates": lambda: [LayerwiseLR(FixedRates({"*": 0.5}))],
}
_THREE = (GradientMonitor, WeightMonitor, SharpnessMonitor)


class Network(pl.LightningModule):
    """Twenty-five linear maps, trained by AdamW with decay."""

    def __init__(self) -> None:
        """Make the layers."""
        super().__init__()
        inner = [layer for _ in range(24) for layer in (nn.Linear(8, 8), nn.Tanh())]
        self.network = nn.Sequential(*inner, nn.Linear(8, 3))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """A mean of squares."""
        return self.network(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-4, weight_decay=0.1)


class Turns(pl.Callback):
    """Lets arms take their blocks in turn, and notes the CPU time of each block."""

    def __init__(self, baton: Baton, place: int, block: int) -> None:
        """Note nothing yet."""
        self.baton, self.place, self.block = baton, place, block
        self.seconds: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Begin a block, or end the one before."""
        if trainer.fit_loop.epoch_loop.batch_idx % self.block:
            return
        if trainer.fit_loop.epoch_loop.batch_idx:
            self.seconds.append(time.thread_time() - self.begin)
            self.baton.pass_on()
        self.baton.take(self.place)
        self.begin = time.thread_time()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the others end."""
        self.baton.pass_on()


def run_in_turn(rounds: int, block: int) -> dict[str, list[float]]:
    """CPU seconds of each block by arm; the first, with start-up and readings, is left out."""
    baton = Baton(len(ARMS))
    turns = {name: Turns(baton, place, block) for place, name in enumerate(ARMS)}
    batches = DataLoader(torch.randn(4 * block * (rounds + 1) + 4, 8), 4)

    def train(name: str, folder: str) -> None:
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=1,
            logger=TensorBoardLogger(folder, name=None, version=name.replace(" ", "_")),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[turns[name], *ARMS[name]()],
        )
        trainer.fit(Network(), batches)

    baton.run(list(ARMS), train)
    return {name: one.seconds[1:] for name, one in turns.items()}


class InARow(pl.Callback):
    """Calls the hooks of all other callbacks, and of the optimizer, many times between two steps.

    Args:
        times: How often.
    """

    def __init__(self, times: int) -> None:
        """Note nothing yet."""
        self.times, self.microseconds = times, math.inf

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
        """Take the quickest of several rows of calls, at a step long after the first reading."""
        if trainer.global_step != _QUIET_FROM:
            return
        (optimizer,) = trainer.optimizers
        others = [callback for callback in trainer.callbacks if callback is not self]
        before = list(optimizer._optimizer_step_pre_hooks.values())
        after = list(optimizer._optimizer_step_post_hooks.values())
        for _ in range(5):
            begin = time.thread_time()
            for _ in range(self.times):
                for callback in others:
                    callback.on_train_batch_start(trainer, module, batch, index)
                    callback.on_before_backward(trainer, module, outputs["loss"])
                    callback.on_after_backward(trainer, module)
                    callback.on_before_optimizer_step(trainer, module, optimizer)
                for hook in before:
                    hook(optimizer, (), {})
                for hook in after:
                    hook(optimizer, (), {})
                for callback in others:
                    callback.on_train_batch_end(trainer, module, outputs, batch, index)
            self.microseconds = min(self.microseconds, 1e6 * (time.thread_time() - begin) / self.times)


def hooks_in_a_row(make: Callable[[], list[pl.Callback]], times: int = 500) -> float:
    """Microseconds of all hooks of a step."""
    row = InARow(times)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=_QUIET_FROM + 2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*make(), row],
    )
    trainer.fit(Network(), DataLoader(torch.randn(4 * (_QUIET_FROM + 2), 8), 4))
    return row.microseconds


def excess(own: list[float], plain: list[float], block: int) -> float:
    """Microseconds a step by which the lower quartile of some blocks is above that of others."""
    return 1e6 * float(np.quantile(own, 0.25) - np.quantile(plain, 0.25)) / block


def summary(seconds: dict[str, list[float]], block: int) -> dict[str, Any]:
    """Microseconds a step above the arm without callbacks, with its 95 % interval."""
    plain, draw = seconds["no callback"], random.Random(0)
    quick = 1e6 * float(np.quantile(plain, 0.25)) / block
    results: dict[str, Any] = {"microseconds a step without callbacks": round(quick, 1)}
    for name, own in seconds.items():
        if name == "no callback":
            continue
        again = []
        for _ in range(500):
            rounds = [draw.randrange(len(own)) for _ in own]
            again.append(excess([own[i] for i in rounds], [plain[i] for i in rounds], block))
        results[name] = {
            "microseconds a step, from outside": round(excess(own, plain, block), 1),
            "95 % interval": [round(float(np.quantile(again, q)), 1) for q in (0.025, 0.975)],
            "rounds": len(own),
        }
        if name != "fixed rates":  # their hooks change what a step does
            results[name]["microseconds of its hooks"] = round(hooks_in_a_row(ARMS[name]), 1)
    for name in ("DynamicsMonitor", "three monitors"):
        results[name]["within the limit"] = results[name]["microseconds of its hooks"] <= MOST
    return results


def main() -> None:
    """Measure all arms and write the result."""
    command = parser("quiet_steps", __doc__)
    command.add_argument("--rounds", type=int, default=60)
    command.add_argument("--block", type=int, default=100, help="steps that an arm takes before the next one's turn")
    options = command.parse_args()
    if options.smallest:
        options.rounds, options.block = 2, 5
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    results = summary(run_in_turn(options.rounds, options.block), options.block)
    for name, found in results.items():
        print(f"{name:40} {found}")
    write(options, "quiet_steps", {"environment": environment("quiet_steps"), "results": results})


if __name__ == "__main__":
    main()
