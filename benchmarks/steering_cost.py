"""What steering costs a step on the model of the demo, from outside: trainers with and without it, in turn.

Run ``python -m benchmarks.steering_cost`` (some ten minutes); the result goes to
``benchmarks/results/steering_cost.json``. All arms train in one process, a block of steps each in turn, and processor
time is what is compared, block by block, so that other work on the machine counts little. A block has as many steps as
lie between two readings of :class:`dynamon.rates.BalancedRates`.
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
from dynamon.callbacks import LayerwiseLR, NoiseAdaptiveLR
from dynamon.cli.demo_data import standard_library_text, training_batches
from dynamon.rates import BalancedRates, FixedRates

ARMS: dict[str, Callable[[], LayerwiseLR | None]] = {
    "none": lambda: None,
    "fixed ratios": lambda: LayerwiseLR(FixedRates({"role:vector": 0.5})),
    "balanced, following": lambda: LayerwiseLR(BalancedRates()),
    "noise": lambda: NoiseAdaptiveLR(),
    "noise, every 10th step": lambda: NoiseAdaptiveLR(read_every=10),
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
    command.add_argument("--blocks", type=int, default=5)
    options = command.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    block = BalancedRates().interval
    shape, blocks = SHAPES["demo GPT"], options.blocks
    if options.smallest:
        shape, blocks, block = Shape(16, 1, 2, 8, 2), 2, 3
    runs = run_in_turn(shape, blocks, block)
    plain = runs["none"][0]
    results: dict[str, Any] = {"ms a step": round(1000 * float(np.median(plain)) / block, 2), "steps a block": block}
    for name, (seconds, steering) in runs.items():
        if steering is not None:
            measured, error = overhead(seconds, plain)
            results[name] = {"measured": round(measured, 4), "standard error": round(error, 4)}
            results[name]["stated"] = round(steering.overhead, 4)
            print(f"{name:24s} {measured:8.2%} ± {error:.2%}, stated {steering.overhead:.2%}")
    write(options, "steering_cost", {"environment": environment("steering_cost"), "results": results})


if __name__ == "__main__":
    main()
