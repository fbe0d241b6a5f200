"""What the sentinel costs a step, from outside: one run in which it is switched on and off from step to step.

Run ``python -m benchmarks.sentinel_cost`` (some ten minutes); the result goes to
``benchmarks/results/sentinel_cost.json``. The model is a transformer of a million parameters under AdamW, at two
lengths of its sequences. A coin decides for each step whether the sentinel sees it, and its processor time is compared
with the median of the steps around it that the sentinel does not see, so that other work on the machine counts little.
Steps are of three kinds, those that it passes, checks and looks at: the share of a step is the median of what each kind
takes more, weighted by how often it comes. Under a budget the steps that it does not see count as well, since what they
leave is spent at the others.
Nothing else is measured after the first steps.
"""

import random
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.environment import environment, parser, write
from dynamon.callbacks import DynamicsMonitor

START_UP = 200  # steps
LENGTHS = 36, 80
# Without a grace, for which it would look at every step of so short a run.
ARMS: dict[str, dict[str, Any]] = {
    "by default": {"grace": 0.0},
    "at every step": {"every_n_steps": 10**9},
}
AROUND = 10  # steps before one and after it
KINDS = "off", "passed", "checked", "looked at"


class Model(pl.LightningModule):
    """Five layers of width 128 over bytes."""

    def __init__(self, width: int, layers: int) -> None:
        """Make them."""
        super().__init__()
        self.bytes = nn.Embedding(256, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True) for _ in range(layers)
        )
        self.head = nn.Linear(width, 256)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        hidden = self.bytes(batch[0])
        for layer in self.layers:
            hidden = layer(hidden)
        return cross_entropy(self.head(hidden).flatten(0, 1), batch[1].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=3e-4)


class Coin(pl.Callback):
    """Switches the sentinel on and off, and notes the processor time of each step. It stands before the monitor."""

    def __init__(self, monitor: DynamicsMonitor) -> None:
        """Nothing noted yet."""
        self._monitor: Any = monitor
        self._sentinel: Any = None
        self._random = random.Random(0)
        self._step, self._is_on, self._since = 0, True, 0.0
        self.steps: list[tuple[str, float]] = []

    def on_train_batch_start(self, *_: Any) -> None:
        """End a step and begin the next."""
        now = time.thread_time()
        if self._step > START_UP:
            self.steps.append((self._kind(), now - self._since))
        self._sentinel = self._sentinel or self._monitor._sentinel
        if self._sentinel is not None:
            self._toss()
        self._step += 1
        self._since = time.thread_time()

    def _kind(self) -> str:
        """What the sentinel did at the step that is over."""
        check, look = self._sentinel._pace._due[:2]
        return "off" if not self._is_on else "looked at" if look else "checked" if check else "passed"

    def _toss(self) -> None:
        self._is_on, followers = self._random.random() < 0.5, self._monitor._run.steps.followers
        self._monitor._sentinel = self._sentinel if self._is_on else None
        if self._is_on and self._sentinel not in followers:
            followers.append(self._sentinel)
        if not self._is_on and self._sentinel in followers:
            followers.remove(self._sentinel)


def train(width: int, layers: int, length: int, steps: int, how: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Kind and seconds of each step."""
    monitor = DynamicsMonitor(quantities=["critical"], **how)
    coin = Coin(monitor)
    tokens = torch.randint(256, (512, length + 1), generator=torch.Generator().manual_seed(0))
    data = TensorDataset(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    torch.manual_seed(0)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=START_UP + steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[coin, monitor],
    )
    trainer.fit(Model(width, layers), DataLoader(data, batch_size=8))
    return coin.steps


def differences(steps: Sequence[tuple[str, float]]) -> dict[str, list[float]]:
    """What the steps that the sentinel sees take more than those around them that it does not see, by kind."""
    found: dict[str, list[float]] = {kind: [] for kind in KINDS[1:]}
    for at, (kind, seconds) in enumerate(steps):
        around = [own for other, own in steps[max(at - AROUND, 0) : at + AROUND + 1] if other == "off"]
        if kind != "off" and around:
            found[kind].append(seconds - statistics.median(around))
    return {kind: own for kind, own in found.items() if own}


def share(more: Mapping[str, Sequence[float]], plain: float, steps: int) -> float:
    """What share of so many steps the sentinel takes."""
    return sum(len(own) * statistics.median(own) for own in more.values()) / steps / plain


def interval(more: Mapping[str, Sequence[float]], plain: float, steps: int, draws: int = 500) -> list[float]:
    """A 95 % interval of it, from drawing steps anew."""
    rng = np.random.default_rng(0)
    drawn = [
        share({kind: rng.choice(own, len(own)).tolist() for kind, own in more.items()}, plain, steps)
        for _ in range(draws)
    ]
    return [round(float(one), 5) for one in np.quantile(drawn, (0.025, 0.975))]


def main() -> None:
    """Measure and write."""
    command = parser("sentinel_cost", __doc__)
    command.add_argument("--steps", type=int, default=2500)
    options = command.parse_args()
    torch.set_num_threads(1)
    width, layers, steps = (16, 1, 60) if options.smallest else (128, 5, options.steps)
    results = []
    for length in LENGTHS[:1] if options.smallest else LENGTHS:
        for name, how in ARMS.items():
            found = train(width, layers, length, steps, how)
            plain = statistics.median(seconds for kind, seconds in found if kind == "off")
            more = differences(found)
            count = len(found) if "grace" in how else sum(map(len, more.values()))
            row = {
                "CPU ms a step": round(1000 * plain, 2),
                "sentinel": name,
                "share of a step": round(share(more, plain, count), 5),
                "95 %": interval(more, plain, count),
                "steps": {kind: len(own) for kind, own in more.items()},
                "ms more": {kind: round(1000 * statistics.median(own), 3) for kind, own in more.items()},
            }
            results.append(row)
            print(row)
    write(options, "sentinel_cost", {"environment": environment("sentinel_cost"), "results": results})


if __name__ == "__main__":
    main()
