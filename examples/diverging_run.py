"""A learning rate that is too high: which panel sees it first, and how long before the loss is gone.

A small tanh network learns a regression by SGD with momentum, twice from the same weights on the same batches. The
learning rate rises all the time, to a good value in one run, to four times that in the other. Sharpness rises until
the steps are as long as the curvature allows, a stability ratio of 1, which is normal. In the second run the rate goes
on rising faster than the network can become flatter: the ratio passes 2, and from there on every step makes the loss
larger. After each reading the script asks for the health list, ``monitor.findings``, as the monitor does by itself when
it warns. It checks that the list names the fault before the loss stops being a number, that the stability ratio had
passed 1 before the loss showed anything, and that the list of the good run stays empty.

Takes about ten seconds; run ``python examples/diverging_run.py``. The picture goes to ``diverging_run.png``, or where
``--out`` says.
"""

import argparse
import logging
import math
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dynamon.callbacks import DynamicsMonitor
from dynamon.health import Finding

Batch = tuple[Tensor, Tensor]
EVERY = 2  # steps between readings
RATES = {"good rate": 0.1, "rate too high": 0.4}
COLORS = {"good rate": "#0072B2", "rate too high": "#D55E00"}
RATIO = "sharpness/stability_ratio"
SHOWN = {RATIO: "stability ratio", "gradient/norm": "gradient norm"}


class Regression(pl.LightningModule):
    """Two tanh layers, mean squared error, SGD with momentum at a rate that rises to its peak."""

    def __init__(self, peak: float, steps: int) -> None:
        super().__init__()
        self.peak, self.steps = peak, steps
        self.network = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        inputs, targets = batch
        return nn.functional.mse_loss(self.network(inputs), targets)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.peak, momentum=0.9)
        warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) / self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warmup, "interval": "step"}}


@dataclass
class Watch(pl.Callback):
    """Asks for the health list after every reading, and ends the run when the loss is no longer a number."""

    monitor: DynamicsMonitor
    losses: list[float] = field(default_factory=list)
    first_seen: dict[str, tuple[int, Finding]] = field(default_factory=dict)  # by rule: when, and what it said
    lost_at: int | None = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(float(outputs["loss"]))
        if batch_idx % EVERY == 0:
            for finding in self.monitor.findings:
                self.first_seen.setdefault(finding.rule, (batch_idx, finding))
        if not math.isfinite(self.losses[-1]):
            self.lost_at, trainer.should_stop = batch_idx, True


def batches(steps: int, size: int = 64) -> list[Batch]:
    """Fresh samples of a smooth function."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(steps, size, 16, generator=generator)
    targets = torch.sin(2 * inputs[..., :1]) + inputs[..., 1:2] * inputs[..., 2:3]
    return list(zip(inputs, targets, strict=True))


def train(peak: float, steps: int) -> Watch:
    """One run, with what was measured and found."""
    pl.seed_everything(1, verbose=False)  # the same weights for each rate
    watch = Watch(DynamicsMonitor(every_n_steps=EVERY))
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[watch.monitor, watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():  # the monitor warns of what it finds; here that is printed below
        warnings.simplefilter("ignore")
        trainer.fit(Regression(peak, steps), DataLoader(batches(steps), batch_size=None))
    return watch


def panel_of(monitor: DynamicsMonitor, tag: str) -> str:
    """The chart of TensorBoard's Custom Scalars tab that shows a tag."""
    for category, charts in monitor.panels.items():
        for title, (_, patterns) in charts.items():
            if re.escape(tag) in patterns:
                return f"{category}: {title}"
    raise LookupError(tag)


def print_run(name: str, watch: Watch) -> None:
    """What the list said, and when."""
    ratio = watch.monitor.history[RATIO]
    end = f"the loss is {watch.losses[-1]} at step {watch.lost_at}" if watch.lost_at else f"loss {watch.losses[-1]:.3g}"
    print(f"{name}: {len(watch.losses)} steps, {end}, largest stability ratio {ratio.values.max():.3g}")
    for step, finding in watch.first_seen.values():
        print(f"  step {step:3d}  {finding.severity:7s}  {finding.rule}: {finding.message}")
    if not watch.first_seen:
        print("  the health list is empty")


def first_above(watch: Watch, tag: str, line: float) -> int | None:
    """The first step at which a reading lies above a line."""
    series = watch.monitor.history[tag]
    return next((int(step) for step, value in zip(series.steps, series.values, strict=True) if value > line), None)


def left_at(losses: list[float]) -> int:
    """The step from which on the loss lies above all of its first fifty."""
    return max(step for step, loss in enumerate(losses) if loss <= max(losses[:50])) + 1


def check(good: Watch, bad: Watch) -> None:
    """The list must be empty for one run and early for the other, and the stability ratio earlier still."""
    if good.first_seen or good.lost_at is not None:
        raise SystemExit(f"the good run is said to have: {', '.join(good.first_seen) or 'lost its loss'}.")
    if bad.lost_at is None:
        raise SystemExit("the run whose rate is too high did not diverge.")
    faults = [step for step, finding in bad.first_seen.values() if finding.severity == "fault"]
    if not faults or faults[0] >= bad.lost_at:
        raise SystemExit("the health list named no fault before the loss was gone.")
    passed, left = first_above(bad, RATIO, 1), left_at(bad.losses)
    if passed is None or passed >= left or first_above(good, RATIO, 1) is not None:
        raise SystemExit(f"the stability ratio passed 1 at {passed}, and the loss left its range at {left}.")
    print(f"seen first in the panel '{panel_of(bad.monitor, RATIO)}'")
    print(f"  step {passed}: {RATIO} passes 1, which it never does at the good rate")
    print(f"  step {left}: the loss leaves the range of its first fifty steps, for good")
    print(f"  step {faults[0]}: the health list names it ({', '.join(rules_at(bad, faults[0]))})")
    print(f"  step {bad.lost_at}: the loss is no longer a number, {bad.lost_at - faults[0]} steps after the list spoke")


def rules_at(watch: Watch, step: int) -> list[str]:
    """The rules that spoke first at a step."""
    return [rule for rule, (seen, _) in watch.first_seen.items() if seen == step]


def draw(path: Path, runs: dict[str, Watch]) -> None:
    """Loss, stability ratio and gradient norm of both runs; lines where the list spoke and where the loss was gone."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print('no picture: matplotlib is not installed (pip install "lightning-dynamon[demo]")')
        return
    figure = Figure(figsize=(8, 7.5), layout="constrained")
    panels = figure.subplots(1 + len(SHOWN), 1, sharex=True)
    for name, watch in runs.items():
        panels[0].plot(watch.losses, color=COLORS[name], linewidth=1, label=name)
        for axes, (tag, label) in zip(panels[1:], SHOWN.items(), strict=True):
            series = watch.monitor.history[tag]
            axes.plot(series.steps, series.values, ".-", color=COLORS[name], markersize=3, linewidth=1)
            axes.set(ylabel=label, yscale="log")
    bad = runs["rate too high"]
    named = next((step for step, finding in bad.first_seen.values() if finding.severity == "fault"), None)
    for axes in panels:
        for step, style, label in ((named, "--", "named by the health list"), (bad.lost_at, ":", "loss gone")):
            if step is not None:
                axes.axvline(step, color="#444444", linestyle=style, linewidth=1, label=f"{label}, step {step}")
    panels[1].axhline(1, color="#444444", linewidth=0.6)
    panels[0].set(ylabel="training loss", yscale="log", ylim=(1e-2, 1e6), title="A learning rate that is too high")
    panels[1].set_ylim(1e-3, 1e4)
    panels[2].set_ylim(1e-2, 1e6)
    panels[-1].set_xlabel("step")
    panels[0].legend(frameon=False, loc="upper left", fontsize="small")
    figure.savefig(path, dpi=110)
    print(f"picture: {path}")


def main(steps: int = 300, out: str | Path = "diverging_run.png") -> None:
    """Train at both rates, say what was found, draw, then check."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    runs = {name: train(peak, steps) for name, peak in RATES.items()}
    for name, watch in runs.items():
        print_run(name, watch)
    draw(Path(out), runs)
    check(*runs.values())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("diverging_run.png"), help="where the picture goes")
    main(out=parser.parse_args().out)
