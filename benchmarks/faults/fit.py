"""One fit with the Trainer, and what is noted of it: findings as they become known, losses, gradient norms."""

import logging
import math
import warnings
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, IterableDataset

from benchmarks.faults.injected import Batch, Fault, stream
from benchmarks.faults.reference import sigma_alarms, spike_alarms, step_of_the_loss
from benchmarks.faults.subjects import OPTIMIZERS, SCHEDULES, Subject
from benchmarks.rates_study.tasks import Task
from dynamon.callbacks import DynamicsMonitor

# Runs of seconds give a budget little to spend. The second row has the shortest intervals of the default, as steps have
# that are long beside a reading. Rows without a budget are without eigenvalues, which would take most of the time.
ROWS: dict[str, dict[str, Any]] = {
    "default": {},
    "no budget": {"budget": None, "quantities": ["directional"]},
    "every 10 steps": {"every_n_steps": 10, "quantities": ["directional"]},
    "standard": {"preset": "standard", "every_n_steps": 10, "quantities": ["directional"]},
}
EVERY = 10  # steps between two looks at monitor.findings
MOST = 100  # findings noted
_CHUNK = 250  # samples of an evaluation


class Stream(IterableDataset[Batch]):
    """The batches of a run."""

    def __init__(self, task: Task, fault: Fault | None, seed: int, steps: int) -> None:
        """Remember what to yield."""
        self._made = lambda: stream(task.batches(seed), fault, steps)

    def __iter__(self) -> Iterator[Batch]:
        """Begin anew."""
        return self._made()


class Module(pl.LightningModule):
    """A task, with the fault where a user's code would have it."""

    def __init__(self, task: Task, fault: Fault | None, optimizer: str, schedule: str, rate: float, steps: int) -> None:
        """Make the network."""
        super().__init__()
        network = task.network()
        self.network = network if fault is None else fault.network(network)
        self._fault, self._settings = fault, (optimizer, schedule, rate, steps)

    def training_step(self, batch: Batch, index: int) -> torch.Tensor:
        """Return the weighted cross-entropy."""
        inputs, targets, weights = batch
        logits = self.network(inputs).float().flatten(0, -2)
        losses = F.cross_entropy(logits, targets.flatten(), reduction="none")
        return (losses.view(len(weights), -1).mean(1) * weights).mean()

    def on_train_batch_start(self, batch: Batch, index: int) -> None:
        """Inject what is no matter of data."""
        if self._fault is not None:
            limit = self._fault.clip(index, self.trainer.gradient_clip_val)
            self.trainer.gradient_clip_val = limit
            self._fault.before(index, self.network, self.optimizers().optimizer)

    def on_after_backward(self) -> None:
        """Inject what is a matter of gradients."""
        if self._fault is not None:
            self._fault.after_backward(self.trainer.fit_loop.epoch_loop.batch_idx, self.network)

    def configure_optimizers(self) -> Any:
        """Make the optimizer and its schedule."""
        optimizer, schedule, rate, steps = self._settings
        made = OPTIMIZERS[optimizer][0](self.network, rate)

        def factor(step: int) -> float:
            return SCHEDULES[schedule](step, steps) * (1 if self._fault is None else self._fault.rate(step))

        return {"optimizer": made, "lr_scheduler": {"scheduler": LambdaLR(made, factor), "interval": "step"}}


class Noted(pl.Callback):
    """Notes losses, gradient norms, and the findings of a monitor with the step at which each was first there.

    Args:
        monitor: The monitor; None where there is none.
    """

    def __init__(self, monitor: DynamicsMonitor | None) -> None:
        """Nothing yet."""
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.known: dict[tuple[str, int], dict[str, Any]] = {}
        self._monitor = monitor

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Optimizer) -> None:
        """Take the norm before clipping."""
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        self.norms.append(float(torch.nn.utils.get_total_norm(gradients)))

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """Take the loss, and look at the findings now and then."""
        self.losses.append(float(outputs["loss"]))
        if index % EVERY == EVERY - 1:
            self._look(index)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Look for the last time."""
        self._look(len(self.losses) - 1)

    def _look(self, step: int) -> None:
        for one in self._monitor.findings if self._monitor is not None else ():
            if not one.rule.startswith("dynamon/") and len(self.known) < MOST:  # those are about measurements
                first = {"rule": one.rule, "severity": one.severity, "step": one.step, "known": step}
                self.known.setdefault((one.rule, one.step), first | {"layers": list(one.layers[:3])})


def fit(
    subject: Subject,
    rate: float,
    seed: int,
    steps: int,
    *,
    fault: Fault | None = None,
    row: str | None = None,
    optimizer: str = "",
    schedule: str = "warm-up and cosine",
    batch: int = 0,
    reported: bool = False,
) -> dict[str, Any]:
    """Train once.

    Args:
        subject: What.
        rate: Base rate.
        seed: Of weights and batches.
        steps: How many.
        fault: What goes wrong.
        row: One of :data:`ROWS`, or None for no monitor.
        optimizer: Another one than the subject's.
        schedule: One of :data:`~benchmarks.faults.subjects.SCHEDULES`.
        batch: Another number of samples.
        reported: Which samples the final loss is of.

    Returns:
        The final loss on held-out samples (None if it is not finite), where the training loss left its level after the
        fault, what the two reference detectors say, and, with a monitor, its findings.
    """
    _hush()
    torch.manual_seed(seed)
    task = subject.make(batch or subject.batches[0])
    optimizer = optimizer or subject.optimizer
    module = Module(task, fault, optimizer, schedule, rate, steps)
    monitor = None if row is None else DynamicsMonitor(**ROWS[row])
    noted = Noted(monitor)
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        # Lanton takes steps of a given length: clipping would change nothing but be refused nowhere.
        gradient_clip_val=None if optimizer == "Lanton" else subject.clip,
        callbacks=[noted] if monitor is None else [monitor, noted],
    )
    trainer.fit(module, DataLoader(Stream(task, fault, seed, steps), batch_size=None))
    final = _final(module, task, reported)
    found = {
        "final": round(final, 5) if math.isfinite(final) else None,
        "loss": step_of_the_loss(noted.losses, fault.onset) if fault is not None and fault.onset else None,
        "SpikeDetection": spike_alarms(noted.losses),
        "three sigma": sigma_alarms(noted.norms),
    }
    return found if monitor is None else found | {"findings": list(noted.known.values())}


@torch.no_grad()
def _final(module: Module, task: Task, reported: bool) -> float:
    module.eval()
    inputs, targets = task.held_out(reported)
    if inputs.is_floating_point():
        inputs = inputs.to(next(module.parameters()).dtype)
    pieces = zip(inputs.split(_CHUNK), targets.split(_CHUNK), strict=True)
    ones = [(x, y, torch.ones(len(x))) for x, y in pieces]
    return sum(float(module.training_step(one, 0)) * len(one[0]) for one in ones) / len(inputs)


def _hush() -> None:
    """Leave out what Lightning says of every fit."""
    for name in ("lightning.pytorch", "lightning.fabric", "dynamon"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
