"""Three faults: what the alert says, which number names the cause, and the run without the fault.

A small network learns to predict the next byte of the source of Python's standard library. Three runs have a fault: one
batch of bytes that are no text, a learning rate that is four times too high from the middle on, and weights in bfloat16
that hardly move. Each is compared with the run without its fault. A function given as ``on_finding`` takes the alerts.
The script checks that each fault is told, from which step on, that the number that names its cause says so, and that
nothing is told of the runs without a fault.

Takes about a minute; run ``python examples/run_gone_wrong.py``. The picture goes to ``run_gone_wrong.png``, or where
``--out`` says; ``--logs FOLDER`` keeps event files for TensorBoard.
"""

import argparse
import logging
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from dynamon.callbacks import DynamicsMonitor
from dynamon.cli.demo_data import standard_library_text, training_batches
from dynamon.health import Finding
from dynamon.monitoring.fingerprint import fingerprint

BATCH, CONTEXT, EVERY, WARMUP = 64, 8, 8, 20
COLORS = {"with the fault": "#D55E00", "without": "#0072B2"}


class Model(pl.LightningModule):
    """Predicts a byte from the eight before it: an embedding and two hidden layers.

    Args:
        adam: The rate of AdamW; None for SGD with momentum at a rate of 0.2.
        jump_at: The step from which on the rate is four times too high; None for never.
    """

    def __init__(self, adam: float | None = None, jump_at: int | None = None) -> None:
        super().__init__()
        self.adam, self.jump_at = adam, jump_at
        self.embedding = nn.Embedding(256, 16)
        self.hidden = nn.Sequential(nn.Linear(16 * CONTEXT, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU())
        self.head = nn.Linear(64, 256)
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        logits = self.head(self.hidden(self.embedding(batch[:, :-1]).flatten(1)))
        loss = nn.functional.cross_entropy(logits, batch[:, -1])
        self.log("train/loss", loss)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))

    def configure_optimizers(self) -> Any:
        if self.adam is None:
            optimizer: Any = torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.9)
        else:
            optimizer = torch.optim.AdamW(self.parameters(), lr=self.adam, weight_decay=0.1)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": LambdaLR(optimizer, self.factor), "interval": "step"},
        }

    def factor(self, step: int) -> float:
        """Warm-up, and the jump."""
        return min((step + 1) / WARMUP, 1.0) * (4.0 if self.jump_at is not None and step >= self.jump_at else 1.0)


@dataclass
class Run:
    """A run, what was measured, and what its alerts said."""

    model: Model
    monitor: DynamicsMonitor
    alerts: list[Finding] = field(default_factory=list)

    def of(self, rule: str) -> Finding:
        """The first alert of a rule."""
        found = next((alert for alert in self.alerts if alert.rule == rule), None)
        if found is None:
            raise SystemExit(f"nothing was told of {rule}; told was: {[alert.rule for alert in self.alerts]}.")
        return found

    def median(self, quantity: str, begin: int, end: int) -> float:
        """The median over layers and the readings of some steps."""
        series = self.monitor.history[quantity]
        return float(np.nanmedian(series.values[(series.steps >= begin) & (series.steps < end)]))


def train(name: str, logs: Path | None, batches: list[Tensor], precision: Any = "32-true", **given: Any) -> Run:
    """Train on the batches, in their order, from the same weights."""
    pl.seed_everything(0, verbose=False)
    alerts: list[Finding] = []

    def take(finding: Finding) -> None:
        if finding.severity != "note":
            alerts.append(finding)

    monitor = DynamicsMonitor(every_n_steps=EVERY, quantities=["directional"], on_finding=take)
    run = Run(Model(**given), monitor, alerts)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        precision=precision,
        callbacks=[monitor],
        logger=False if logs is None else TensorBoardLogger(logs, name=name, version=""),
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():  # the monitor warns of what it finds; here the alerts are printed
        warnings.simplefilter("ignore")
        trainer.fit(run.model, DataLoader(batches, batch_size=None))
    return run


def text_batches(steps: int) -> list[Tensor]:
    """Batches of text, the same for every run."""
    return list(training_batches(standard_library_text()[0], BATCH, CONTEXT, steps, 0))


def with_a_bad_one(batches: list[Tensor]) -> list[Tensor]:
    """The same with one batch of a single byte that no text has, as from a file that was cut off and filled up."""
    bad = torch.full_like(batches[0], 200)
    return [bad if index == _bad_index(batches) else batch for index, batch in enumerate(batches)]


def _bad_index(batches: list[Tensor]) -> int:
    return 3 * len(batches) // 4


def say(name: str, run: Run) -> None:
    """Print what was told, and the loss at the end."""
    print(f"{name}: loss {np.mean(run.model.losses[-20:]):.2f} at the end")
    for alert in run.alerts:
        print(f"  {alert.severity}  {alert.rule}, from step {alert.step}: {alert.message}")


def explain_batch(run: Run, batches: list[Tensor]) -> None:
    """The spike names the batch: find it in the data."""
    spike, at = run.of("spike/deviation"), _bad_index(batches)
    code = int(run.monitor.history["spike/fingerprint"].values[0])
    found = [index for index, batch in enumerate(batches) if fingerprint(batch) == code]
    print(f"the batch with fingerprint {code:06x} is number {found}: bytes from {batches[found[0]].min()} on")
    if spike.step != at or found != [at]:
        raise SystemExit(f"the bad batch is number {at}; the spike is at step {spike.step}, its batch is {found}.")


def explain_rate(run: Run, mended: Run, half: int) -> None:
    """Steps become four times as large at once, in all layers, before anything else is seen."""
    around = (half, half + 5 * EVERY), (half - 5 * EVERY, half)
    now, before = (run.median("update/ratio", *steps) for steps in around)
    usual = mended.median("update/ratio", *around[0]) / mended.median("update/ratio", *around[1])
    told = run.alerts[0].step if run.alerts else half
    print(f"update/ratio grows {now / before:.1f} times at step {half}, and {usual:.1f} times without the fault")
    print(f"the first alert is of step {told}, {told - half} steps later")
    if not now / before > 2 > usual or told <= half:
        raise SystemExit("no number shows the rate that is too high.")


def explain_dtype(run: Run, mended: Run, steps: int) -> None:
    """Most entries stay where they are, though the optimizer makes a step."""
    lost = [one.median("precision/update_lost", WARMUP, steps) for one in (run, mended)]
    print(f"share of entries that a step leaves where they are: {lost[0]:.0%}, and {lost[1]:.0%} with float32 weights")
    run.of("precision/swallowed")
    if not lost[0] > 0.7 > 0.1 > lost[1]:
        raise SystemExit("the weights in bfloat16 do move.")


def draw(path: Path, stories: dict[str, tuple[Run, Run, str, str]]) -> None:
    """The loss and the number that names the cause, of each fault and of the run without it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print('no picture: matplotlib is not installed (pip install "lightning-dynamon[demo]")')
        return
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    panels = figure.subplots(2, len(stories), sharex=True)
    for (title, (bad, mended, tag, label)), (loss, number) in zip(stories.items(), panels.T, strict=True):
        for (name, color), run in zip(COLORS.items(), (bad, mended), strict=True):
            loss.plot(run.model.losses, color=color, linewidth=0.8, label=name)
            if tag in run.monitor.history:
                series = run.monitor.history[tag]
                values = series.values if series.values.ndim == 1 else np.nanmedian(series.values, axis=1)
                number.plot(series.steps, values, ".-", color=color, markersize=3, linewidth=0.8)
        for axes in (loss, number):
            axes.axvline(bad.alerts[0].step, color="#444444", linestyle="--", linewidth=0.8)
        loss.set(title=title, ylabel="training loss")
        number.set(ylabel=label, xlabel="step")
    panels[0, 0].legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=110)
    print(f"picture: {path}")


def main(steps: int = 160, out: str | Path = "run_gone_wrong.png", logs: str | Path | None = None) -> None:
    """Train with and without each fault, say what was told, draw, then check."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("dynamon").setLevel(logging.WARNING)
    folder, half, batches = None if logs is None else Path(logs), steps // 2, text_batches(steps)
    good = train("without_a_fault", folder, batches)
    bad_batch = train("bad_batch", folder, with_a_bad_one(batches))
    high_rate = train("high_rate", folder, batches, jump_at=half)
    stuck = train("bfloat16_weights", folder, batches, "bf16-true", adam=5e-5)
    mixed = train("float32_weights", folder, batches, "bf16-mixed", adam=5e-5)
    say("a bad batch", bad_batch)
    explain_batch(bad_batch, with_a_bad_one(batches))
    say("four times the rate", high_rate)
    explain_rate(high_rate, good, half)
    say("weights in bfloat16", stuck)
    explain_dtype(stuck, mixed, steps)
    for name, run in (("without a fault", good), ("float32 weights, bf16-mixed", mixed)):
        say(name, run)
        if run.alerts:
            raise SystemExit(f"the run {name} is said to have {[alert.rule for alert in run.alerts]}.")
    stories = {
        "a bad batch": (bad_batch, good, "spike/gradient", "largest deviation of the gradient"),
        "four times the rate": (high_rate, good, "update/ratio", "step over weight, median layer"),
        "weights in bfloat16": (stuck, mixed, "precision/update_lost", "share of updates lost"),
    }
    draw(Path(out), stories)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("run_gone_wrong.png"), help="where the picture goes")
    parser.add_argument("--logs", type=Path, help="folder for event files")
    options = parser.parse_args()
    main(out=options.out, logs=options.logs)
