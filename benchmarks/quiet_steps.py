"""What callbacks cost at steps at which nothing is measured: microseconds a step, measured from outside.

Run ``python -m benchmarks.quiet_steps``; the table is printed and goes to ``benchmarks/results/quiet_steps.json``. Each
arm is a Trainer in a thread of its own on a network of 50 small tensors. In turn they take short blocks of steps, and
of each block the CPU time of its thread is noted; an arm is compared with the one without callbacks round by round.
"""

import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from statistics import mean, stdev
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.environment import environment, parser, write
from dynamon.callbacks import DynamicsMonitor, GradientMonitor, LayerwiseLR, SharpnessMonitor, WeightMonitor
from dynamon.rates import FixedRates

MOST = 30.0  # microseconds a step for all monitors together
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

    def __init__(self, shared: "Shared", place: int) -> None:
        """Note nothing yet."""
        self.shared, self.place = shared, place
        self.seconds: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Begin a block, or end the one before."""
        if trainer.fit_loop.epoch_loop.batch_idx % self.shared.block:
            return
        if trainer.fit_loop.epoch_loop.batch_idx:
            self.seconds.append(time.thread_time() - self.begin)
            self.shared.pass_on()
        self.shared.wait(self.place)
        self.begin = time.thread_time()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the others end."""
        self.shared.pass_on()


class Shared:
    """Whose turn it is."""

    def __init__(self, arms: int, block: int) -> None:
        """Begin with the first."""
        self.arms, self.block, self.turn = arms, block, 0
        self.failed: list[BaseException] = []
        self.condition = threading.Condition()

    def wait(self, place: int) -> None:
        """Wait for an arm's turn."""
        with self.condition:
            self.condition.wait_for(lambda: self.turn == place or self.failed)
            if self.failed:
                raise RuntimeError("another arm failed")

    def pass_on(self) -> None:
        """Let the next one go."""
        with self.condition:
            self.turn = (self.turn + 1) % self.arms
            self.condition.notify_all()


def run_in_turn(rounds: int, block: int) -> dict[str, list[float]]:
    """CPU seconds of each block by arm; the first, with start-up and readings, is left out."""
    shared = Shared(len(ARMS), block)
    turns = {name: Turns(shared, place) for place, name in enumerate(ARMS)}
    batches = DataLoader(torch.randn(4 * block * (rounds + 1) + 4, 8), 4)

    def train(name: str, folder: str) -> None:
        try:
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
        except BaseException as error:
            with shared.condition:
                shared.failed.append(error)
                shared.condition.notify_all()

    with tempfile.TemporaryDirectory() as folder:
        threads = [threading.Thread(target=train, args=(name, folder)) for name in ARMS]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if shared.failed:
        raise shared.failed[0]
    return {name: one.seconds[1:] for name, one in turns.items()}


def summary(seconds: dict[str, list[float]], block: int) -> dict[str, Any]:
    """Microseconds a step above the arm without callbacks, with the half width of the 95 % interval."""
    plain = seconds["no callback"]
    results: dict[str, Any] = {"microseconds a step without callbacks": round(1e6 * mean(plain) / block, 1)}
    for name, own in seconds.items():
        if name == "no callback":
            continue
        excess = [1e6 * (a - b) / block for a, b in zip(own, plain, strict=True)]
        results[name] = {
            "microseconds a step": round(mean(excess), 2),
            "half width of the 95 % interval": round(1.96 * stdev(excess) / len(excess) ** 0.5, 2),
            "rounds": len(excess),
        }
    for name in ("DynamicsMonitor", "three monitors"):
        results[name]["within the limit"] = results[name]["microseconds a step"] <= MOST
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
