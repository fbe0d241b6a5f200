"""Full-batch gradient descent climbs to the edge of stability, at two learning rates.

A small tanh network is trained by plain SGD on one batch, from the same weights with two learning rates. Its
sharpness, the largest eigenvalue of the Hessian, rises until it reaches 2/lr and stays there: twice as high where the
rate is half as large. The stability ratio that the monitor logs is sharpness over 2/lr, so it ends around 1 both
times. The loss spikes each time that sharpness overshoots, recovers, and falls in the long run (Cohen et al.,
arXiv 2103.00065).

Takes about ten seconds; run ``python examples/edge_of_stability.py``. The picture goes to
``edge_of_stability.png``, or where ``--out`` says.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dynamon.callbacks import SharpnessMonitor
from dynamon.runs.history import Series

Batch = tuple[Tensor, Tensor]
COLORS = ("#0072B2", "#D55E00", "#009E73", "#666666")  # told apart by colour-blind readers


class Regression(pl.LightningModule):
    """Two tanh layers, mean squared error, plain SGD."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.losses: list[Tensor] = []
        self.network = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        inputs, targets = batch
        return nn.functional.mse_loss(self.network(inputs), targets)

    def on_train_batch_end(self, outputs: dict[str, Tensor], batch: Batch, batch_idx: int) -> None:
        self.losses.append(outputs["loss"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.rate)


def smooth_function(samples: int = 256) -> Batch:
    """One batch that holds all the data."""
    inputs = torch.randn(samples, 16, generator=torch.Generator().manual_seed(0))
    return inputs, torch.sin(2 * inputs[:, :1]) + inputs[:, 1:2] * inputs[:, 2:3]


def train(rate: float, steps: int) -> tuple[np.ndarray, SharpnessMonitor]:
    """Losses at each step, and the monitor with what it measured every 20 steps."""
    pl.seed_everything(1, verbose=False)  # the same weights for each rate
    module = Regression(rate)
    monitor = SharpnessMonitor(every_n_steps=20, probe_fraction=1.0)  # the probe is all the data
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[monitor],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader([smooth_function()] * steps, batch_size=None))
    return torch.stack(module.losses).numpy(), monitor


def print_table(rates: Sequence[float], histories: Sequence[Series], rows: int = 10) -> None:
    """The stability ratio of each rate, at some of the steps."""
    print("stability ratio: sharpness / (2 / lr)")
    print("  step" + "".join(f"{f'lr {rate:g}':>10}" for rate in rates))
    steps = histories[0].steps
    for row in range(0, len(steps), max(len(steps) // rows, 1)):
        print(f"{steps[row]:6d}" + "".join(f"{history.values[row]:10.3f}" for history in histories))


def check(rate: float, ratio: np.ndarray) -> None:
    """Compare the stability ratio of one run with what the theory says."""
    last = float(np.median(ratio[-max(len(ratio) // 5, 1) :]))
    print(f"lr {rate:g}: the ratio starts at {ratio[0]:.3f}, its median over the last fifth is {last:.3f}")
    if not ratio[0] < 0.5:
        raise SystemExit(f"lr {rate:g}: the ratio starts at {ratio[0]:.3f} and not below 0.5.")
    if not 0.95 <= last <= 1.10:
        raise SystemExit(f"lr {rate:g}: the ratio ends at {last:.3f} and not at the edge, between 0.95 and 1.10.")


def draw(path: Path, rates: Sequence[float], losses: Sequence[np.ndarray], sharpness: Sequence[Series]) -> None:
    """Loss above, sharpness with the lines 2/lr below."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print('no picture: matplotlib is not installed (pip install "lightning-dynamon[demo]")')
        return
    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for rate, loss, series, color in zip(rates, losses, sharpness, COLORS, strict=False):
        above.plot(loss, color=color, linewidth=0.8, label=f"lr {rate:g}")
        below.plot(series.steps, series.values, "o-", color=color, markersize=2.5, linewidth=1, label=f"lr {rate:g}")
        below.axhline(2 / rate, color=color, linestyle="--", linewidth=1, label=f"2/lr = {2 / rate:g}")
    above.set(ylabel="training loss", yscale="log", title="Full-batch gradient descent at the edge of stability")
    below.set(ylabel="sharpness", xlabel="step", ylim=(0, None))
    above.legend(frameon=False)
    below.legend(frameon=False, ncols=2)
    figure.savefig(path, dpi=110)
    print(f"picture: {path}")


def main(steps: int = 2000, rates: Sequence[float] = (0.1, 0.05), out: str | Path = "edge_of_stability.png") -> None:
    """Train at two rates, draw, then check that both runs went where the theory says."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    losses, monitors = zip(*(train(rate, steps) for rate in rates), strict=True)
    ratios = [monitor.history["sharpness/stability_ratio"] for monitor in monitors]
    print_table(rates, ratios)
    draw(Path(out), rates, losses, [monitor.history["sharpness/hessian_max"] for monitor in monitors])
    for rate, ratio in zip(rates, ratios, strict=True):
        check(rate, ratio.values)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("edge_of_stability.png"), help="where the picture goes")
    main(out=parser.parse_args().out)
