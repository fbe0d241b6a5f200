"""One learning rate at every width, or rates that scale with it: what operator norms tell.

A small network is trained by Adam at several widths, from the same kind of start: hidden weights of variance 1/fan-in,
an output layer of zeros. Only the rates differ. Adam moves every entry of a matrix by about the rate, in directions
that agree, so one rate for all widths makes the steps of hidden and output layer longer the wider the network is, as
measured in the norms that say how far a step moves activations (RMS to RMS) and outputs (RMS to infinity). With
rates proportional to 1/fan-in both are the same at every width, and so are the norms of the weights, which is what the
spectral condition asks for (Yang et al., arXiv 2310.17813). The norm that the output layer ends with is the invariant
of norm transfer: the best learning rates of models of different sizes lead to the same one (Filatov et al., arXiv
2510.03871). This script shows what keeps it equal; it does not search for the best rates.

Takes about ten seconds; run ``python examples/norm_transfer.py``. The picture goes to ``norm_transfer.png``, or
where ``--out`` says.
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

from dynamon.callbacks import WeightMonitor
from dynamon.runs.history import History

Batch = tuple[Tensor, Tensor]
Grid = dict[tuple[bool, int], History]  # by whether rates scale, and width
INPUTS, CLASSES = 32, 10
RATES = {False: "one rate", True: "rates as 1/fan-in"}
SHOWN = {  # what is the same at every width where rates scale
    "hidden steps": ("update/operator", "hidden.weight"),
    "hidden weights": ("weight/operator", "hidden.weight"),
    "output steps": ("update/operator", "head.weight"),
    "output weights": ("weight/operator", "head.weight"),
}
COLORS = ("#0072B2", "#D55E00", "#009E73", "#666666")  # told apart by colour-blind readers


class Classifier(pl.LightningModule):
    """Three layers without biases, trained by Adam with one rate a layer."""

    def __init__(self, width: int, rates: Sequence[float]) -> None:
        super().__init__()
        self.rates = rates
        self.first = nn.Linear(INPUTS, width, bias=False)
        self.hidden = nn.Linear(width, width, bias=False)
        self.head = nn.Linear(width, CLASSES, bias=False)
        for layer in (self.first, self.hidden):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        nn.init.zeros_(self.head.weight)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        inputs, labels = batch
        logits = self.head(self.hidden(self.first(inputs).relu()).relu())
        return nn.functional.cross_entropy(logits, labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        layers = (self.first, self.hidden, self.head)
        groups = [{"params": layer.parameters(), "lr": lr} for layer, lr in zip(layers, self.rates, strict=True)]
        return torch.optim.Adam(groups)


def gaussian_mixture(batches: int, size: int = 256) -> list[Batch]:
    """Points around the centre of their class, never seen twice; the clouds overlap."""
    generator = torch.Generator().manual_seed(0)
    centres = 2 * nn.functional.normalize(torch.randn(CLASSES, INPUTS, generator=generator), dim=1)
    labels = torch.randint(CLASSES, (batches, size), generator=generator)
    points = centres[labels] + torch.randn(batches, size, INPUTS, generator=generator)
    return list(zip(points, labels, strict=True))


def train(width: int, rates: Sequence[float], steps: int) -> History:
    """What the monitor measured during the run."""
    pl.seed_everything(1, verbose=False)
    monitor = WeightMonitor(every_n_steps=max(steps // 25, 1), budget=None)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[monitor],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(width, rates), DataLoader(gaussian_mixture(steps), batch_size=None))
    return monitor.history


def curve(history: History, shown: str) -> np.ndarray:
    """One of the quantities shown, over the run."""
    quantity, layer = SHOWN[shown]
    series = history[quantity]
    return series.values[:, (series.layers or ()).index(layer)]


def size(history: History, shown: str) -> float:
    """Median over the run of a step, norm of a weight at its end."""
    values = curve(history, shown)
    return float(np.median(values) if shown.endswith("steps") else values[-1])


def print_table(histories: Grid) -> None:
    """One line a network."""
    print("median norm of the steps, and norm of the weights at the end; hidden RMS->RMS, output RMS->inf")
    print(f"{'learning rates':>18} {'width':>6}" + "".join(f"{shown:>16}" for shown in SHOWN))
    for (scaled, width), history in histories.items():
        print(f"{RATES[scaled]:>18} {width:6d}" + "".join(f"{size(history, shown):16.4f}" for shown in SHOWN))


def check(histories: Grid, widths: Sequence[int]) -> None:
    """Compare the widest network with the narrowest."""
    wider = widths[-1] / widths[0]
    least = wider**0.25  # well clear of what chance does; where all steps agree it is the width itself
    for shown in SHOWN:
        one, scaled = (
            size(histories[key, widths[-1]], shown) / size(histories[key, widths[0]], shown) for key in RATES
        )
        print(f"{shown}, {wider:g} times as wide: norm {one:.2f} times with one rate, {scaled:.2f} with scaled rates")
        if not one > least:
            raise SystemExit(f"{shown}: with one rate the norm grows {one:.2f} times, and not over {least:.2f}.")
        if not 0.8 < scaled < 1.25:
            raise SystemExit(f"{shown}: with scaled rates the norm grows {scaled:.2f} times, and not 0.8 to 1.25.")


def draw(path: Path, histories: Grid, widths: Sequence[int]) -> None:
    """A row for each way to set the rates, a column for each quantity, a line for each width."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print('no picture: matplotlib is not installed (pip install "lightning-dynamon[demo]")')
        return
    figure = Figure(figsize=(13, 6), layout="constrained")
    panels = figure.subplots(2, len(SHOWN), sharex=True, sharey="col")
    for row, (scaled, rates) in enumerate(RATES.items()):
        for axes, (shown, (quantity, _)) in zip(panels[row], SHOWN.items(), strict=True):
            for width, color in zip(widths, COLORS, strict=False):
                history = histories[scaled, width]
                steps, values = history[quantity].steps, curve(history, shown)
                axes.plot(steps[1:], values[1:], color=color, linewidth=1.5, label=f"width {width}")
            norm = "RMS->RMS" if shown.startswith("hidden") else "RMS->inf"
            axes.set_title(f"{shown}, {rates}", fontsize="medium")
            axes.set(yscale="log", xlabel="step" if row else "", ylabel=f"{norm} norm")
    panels[1, 0].legend(frameon=False)
    figure.suptitle("With rates as 1/fan-in, norms of steps and weights do not depend on the width")
    figure.savefig(path, dpi=110)
    print(f"picture: {path}")


def main(
    widths: Sequence[int] = (64, 128, 256, 512),
    steps: int = 200,
    rate: float = 0.004,
    out: str | Path = "norm_transfer.png",
) -> None:
    """Train each width with one rate and with scaled ones, draw, then compare norms; widths go up."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    histories = {}
    for scaled in RATES:
        for width in widths:
            wide = rate * widths[0] / width if scaled else rate  # the fan-in of the first layer is always the same
            histories[scaled, width] = train(width, (rate, wide, wide), steps)
    print_table(histories)
    draw(Path(out), histories, widths)
    check(histories, widths)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("norm_transfer.png"), help="where the picture goes")
    main(out=parser.parse_args().out)
