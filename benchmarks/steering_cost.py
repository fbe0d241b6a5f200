"""What BalancedRates costs a step on the model of the demo, from outside: trainers with and without it, in turn.

Run ``python -m benchmarks.steering_cost`` (some minutes); the result goes to ``benchmarks/results/steering_cost.json``.
All arms train in one process, a block of steps each in turn, and processor time is what is compared, block by block, so
that other work on the machine counts little. A block holds one reading, so that this shows; by default one step in 150
is read, which costs so much less.
"""

import time
import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

from benchmarks.environment import environment, parser, write
from benchmarks.overhead import SHAPES, Model, Shape, overhead
from benchmarks.turns import Baton
from dynamon.callbacks import LayerwiseLR
from dynamon.cli.demo_data import standard_library_text, training_batches
from dynamon.rates import BalancedRates, FixedRates

BLOCK = 10  # steps
ARMS: dict[str, Callable[[], LayerwiseLR | None]] = {
    "none": lambda: None,
    "ratios held": lambda: LayerwiseLR(FixedRates({"role:vector": 0.5})),
    "following": lambda: LayerwiseLR(BalancedRates(every=BLOCK)),
}


class Clock(pl.Callback):
    """Processor seconds of each block but the first; it stands before all other callbacks."""

    def __init__(self, baton: Baton, arm: int, block: int) -> None:
        """Nothing timed yet."""
        self.seconds: list[float] = []
        self._baton, self._arm, self._block = baton, arm, block
        self._steps, self._since = 0, 0.0

    def on_train_start(self, *_: Any) -> None:
        """Wait for the first turn."""
        self._begin()

    def on_train_batch_start(self, *_: Any) -> None:
        """Begin a block where one has ended: what the callbacks do with its first batch belongs to it."""
        if self._steps and self._steps % self._block == 0:
            self.seconds.append(time.process_time() - self._since)
            self._baton.pass_on()
            self._begin()
        self._steps += 1

    def on_train_end(self, *_: Any) -> None:
        """Let the next arm go, which waits for its last turn."""
        self._baton.pass_on()

    def _begin(self) -> None:
        self._baton.take(self._arm)
        self._since = time.process_time()


def run_in_turn(shape: Shape, blocks: int, block: int) -> dict[str, tuple[list[float], LayerwiseLR | None]]:
    """Seconds of each block and the steering, by arm."""
    callbacks = {name: make() for name, make in ARMS.items()}
    baton = Baton(len(ARMS))
    clocks = {name: Clock(baton, place, block) for place, name in enumerate(ARMS)}
    text, _ = standard_library_text()
    steps = (blocks + 1) * block + 1  # the first block is start-up

    def train(name: str, folder: str) -> None:
        torch.manual_seed(0)
        steering = callbacks[name]
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=steps,
            max_epochs=-1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[clocks[name], *([] if steering is None else [steering])],
        )
        trainer.fit(Model(shape, steps), training_batches(text, shape.batch, shape.context, steps, 0))

    baton.run(list(ARMS), train)
    return {name: (clocks[name].seconds[1:], callbacks[name]) for name in ARMS}


def main() -> None:
    """Measure and write."""
    command = parser("steering_cost", __doc__)
    command.add_argument("--blocks", type=int, default=20)
    options = command.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    shape, blocks = (Shape(16, 1, 2, 8, 2), 2) if options.smallest else (SHAPES["demo GPT"], options.blocks)
    runs = run_in_turn(shape, blocks, BLOCK)
    plain = runs["none"][0]
    results: dict[str, Any] = {"CPU ms a step": round(1000 * float(np.median(plain)) / BLOCK, 2), "blocks": blocks}
    for name in ("ratios held", "following"):
        share, error = overhead(runs[name][0], plain)
        results[name] = {"share of a step": round(share, 4), "standard error": round(error, 4)}
    following = results["following"]
    usual = BLOCK / BalancedRates().interval
    results["steps a reading"] = round(following["share of a step"] * BLOCK, 2)
    results["share of a step at the usual interval"] = round(following["share of a step"] * usual, 4)
    results["its standard error"] = round(following["standard error"] * usual, 4)
    print(results)
    write(options, "steering_cost", {"environment": environment("steering_cost"), "results": results})


if __name__ == "__main__":
    main()
