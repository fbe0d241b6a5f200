"""What the sentinel costs a step, from outside: trainers with and without it, a block of steps each in turn.

Run ``python -m benchmarks.sentinel_cost`` (about ten minutes); the result goes to
``benchmarks/results/sentinel_cost.json``. The model is a transformer of a million parameters under AdamW, at two
lengths of its sequences. All arms train in one process, and processor time is what is compared, block by block, so that
other work on the machine counts little. Nothing else is measured after the first steps.
"""

import statistics
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.environment import environment, parser, write
from benchmarks.steering_cost import Clock
from benchmarks.turns import Baton
from dynamon.callbacks import DynamicsMonitor

BLOCK = 20  # steps
START_UP = 5  # blocks
LENGTHS = 36, 80
# Without a grace: it would look at every step of so short a run.
ARMS: dict[str, dict[str, Any]] = {
    "without": {"sentinel": False, "grace": 0.0},
    "by default": {"grace": 0.0},
    "at every step": {"every_n_steps": 10**9},
}


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


def run_in_turn(width: int, layers: int, length: int, blocks: int) -> dict[str, tuple[list[float], DynamicsMonitor]]:
    """Seconds of each block and the monitor, by arm."""
    monitors = {name: DynamicsMonitor(quantities=["critical"], **how) for name, how in ARMS.items()}
    baton = Baton(len(ARMS))
    clocks = {name: Clock(baton, place, BLOCK) for place, name in enumerate(ARMS)}
    tokens = torch.randint(256, (512, length + 1), generator=torch.Generator().manual_seed(0))
    data = TensorDataset(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())

    def train(name: str, folder: str) -> None:
        torch.manual_seed(0)
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=(blocks + START_UP) * BLOCK + 1,
            max_epochs=-1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[clocks[name], monitors[name]],
        )
        trainer.fit(Model(width, layers), DataLoader(data, batch_size=8))

    baton.run(list(ARMS), train)
    return {name: (clocks[name].seconds[START_UP:], monitors[name]) for name in ARMS}


def share(own: list[float], plain: list[float], seed: int = 0) -> dict[str, float]:
    """By what share blocks take longer: the median over pairs, with a 95 % interval from drawing pairs anew."""
    pairs = np.array(own) / np.array(plain) - 1
    draws = np.random.default_rng(seed).choice(pairs, (2000, len(pairs)))
    low, high = np.quantile(np.median(draws, axis=1), (0.025, 0.975))
    return {"median": round(float(np.median(pairs)), 5), "low": round(float(low), 5), "high": round(float(high), 5)}


def _paces(monitor: DynamicsMonitor) -> list[int]:
    """Every how many steps it checks, and looks at batch, gradients and updates."""
    sentinel: Any = monitor._sentinel
    return list(sentinel._pace.every)


def main() -> None:
    """Measure and write."""
    command = parser("sentinel_cost", __doc__)
    command.add_argument("--blocks", type=int, default=60)
    options = command.parse_args()
    torch.set_num_threads(1)
    width, layers, blocks = (16, 1, 3) if options.smallest else (128, 5, options.blocks)
    results = []
    for length in LENGTHS[:1] if options.smallest else LENGTHS:
        runs = run_in_turn(width, layers, length, blocks)
        plain = runs["without"][0]
        row: dict[str, Any] = {"CPU ms a step": round(1000 * statistics.median(plain) / BLOCK, 1), "blocks": blocks}
        for name in [*ARMS][1:]:
            seconds, monitor = runs[name]
            row[name] = {
                "share of a step": share(seconds, plain),
                "every": _paces(monitor),
            }
        results.append(row)
        print(row)
    write(options, "sentinel_cost", {"environment": environment("sentinel_cost"), "results": results})


if __name__ == "__main__":
    main()
