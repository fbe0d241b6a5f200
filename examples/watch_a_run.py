"""Full-batch gradient descent climbs to the edge of stability, as the monitor sees it.

A small tanh network is trained by plain SGD on one batch. The stability ratio (sharpness times learning rate over
two) starts far below 1, rises as training sharpens the loss, and then stays around 1 (Cohen et al.,
arXiv 2103.00065). Takes a few seconds; run ``python examples/watch_a_run.py``.
"""

import logging

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dynamon.callbacks import SharpnessMonitor


class Regression(pl.LightningModule):
    """Fit a smooth function of 16 inputs with two tanh layers."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.network = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        return nn.functional.mse_loss(self.network(inputs), targets)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.rate)


def main(steps: int = 1500, rate: float = 0.1) -> None:
    """Train, then check that the run went where the theory says."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    pl.seed_everything(0, verbose=False)
    inputs = torch.randn(256, 16)
    targets = torch.sin(2 * inputs[:, :1]) + inputs[:, 1:2] * inputs[:, 2:3]
    data = DataLoader(TensorDataset(inputs, targets), batch_size=256)

    monitor = SharpnessMonitor(every_n_steps=20, probe_fraction=1.0)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        callbacks=[monitor],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Regression(rate), data)

    ratio = monitor.history["sharpness/stability_ratio"].values
    for step in range(0, len(ratio), max(len(ratio) // 15, 1)):
        print(f"step {20 * step:5d}  stability ratio {ratio[step]:.3f}  {'#' * round(40 * ratio[step])}")
    last = float(np.median(ratio[-len(ratio) // 5 :]))
    print(f"start {ratio[0]:.3f}, median over the last fifth {last:.3f}; plain SGD is stable up to 1")
    if not (ratio[0] < 0.5 and 0.9 < last < 1.15):
        raise SystemExit("the run did not go to the edge of stability")


if __name__ == "__main__":
    main()
