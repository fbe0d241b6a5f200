"""What monitoring and steering launch at a step, and how often they make the host wait."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from benchmarks.gpu import counted, profiler
from dynamon.callbacks import DynamicsMonitor, NoiseAdaptiveLR
from tests.gpu.report import Check, Report, Skip, add
from tests.gpu.subjects import DEVICE, ON_GPU, OPTIMIZERS, TEXT, fit, gpt

DEPTH = 12 if ON_GPU else 1  # twelve blocks are 148 tensors
FROM, TO = (6, 22) if ON_GPU else (3, 5)
LAUNCHED, GROUPS = 60, 16  # most that steering adds to a step beside the optimizer's own, and most groups of rates
NEVER = 10**6
SETUPS = {("fused", "bf16-mixed"): 16, ("adamw", "bf16-mixed"): 17, ("fused", "16-mixed"): 18, ("adamw", "32-true"): 60}


class Profile(pl.Callback):
    """Counts from one step to another; it stands before all other callbacks."""

    def __init__(self) -> None:
        self.found: dict[str, float] = {}
        self._running: Any = None

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == FROM:
            self._running = profiler(DEVICE)
            self._running.__enter__()
        elif trainer.global_step == TO:
            self._running.__exit__(None, None, None)
            counts, busy = counted(self._running, DEVICE)
            counts["device ms"] = busy  # type: ignore[assignment]
            self.found = {name: round(value / (TO - FROM), 2) for name, value in counts.items()}


def split(groups: int) -> Any:
    """An optimizer's maker whose parameters stand in so many groups."""

    def make(name: str) -> Any:
        def optimizer(module: nn.Module) -> torch.optim.Optimizer:
            made = OPTIMIZERS[name](module)
            (group,) = made.param_groups
            parts = [group["params"][place::groups] for place in range(groups)]
            made.param_groups[:] = [{**group, "params": part} for part in parts if part]
            return made

        return optimizer

    return make


def count(optimizer: str, precision: str, *callbacks: pl.Callback) -> dict[str, float]:
    """What a step of training asks of the device."""
    profile = Profile()
    arguments = {"max_steps": TO + 1, "precision": precision, "optimizer": optimizer, "batch": 8}  # within an epoch
    fit(lambda: gpt(depth=DEPTH), TEXT, [profile, *callbacks], **arguments)
    return profile.found


class Groups(pl.Callback):
    """How many learning rates were in force at once."""

    def __init__(self, steering: NoiseAdaptiveLR) -> None:
        self.steering, self.most, self.worst = steering, 1, 1.0

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        rates = self.steering.rates_for(trainer.optimizers[0])
        if rates is not None:
            self.most = max(self.most, len(set(rates.applied.values())))


def judge(report: Report, optimizer: str, precision: str) -> None:
    """A plain step, one with a monitor that measures nothing, one with a default monitor, one that is steered."""
    report.note("tensors", len(list(gpt(depth=DEPTH).parameters())))
    plain = count(optimizer, precision)
    report.note("plain", plain)
    if not plain["launches"]:
        raise Skip("the profiler sees no launches: this machine may not let it")
    idle = count(optimizer, precision, DynamicsMonitor(budget=None, every_n_steps=NEVER))
    report.note("a monitor that measures nothing", idle)
    report.bar("nothing measured: more launches a step", idle["launches"] - plain["launches"], most=0.5)
    report.bar("nothing measured: more waits a step", _waits(idle) - _waits(plain), most=0.1)
    steering = NoiseAdaptiveLR(warmup=2)
    groups = Groups(steering)
    steered = count(optimizer, precision, steering, groups)
    report.note("steered", steered)
    report.bar("steering: groups of rates", groups.most, most=GROUPS)
    OPTIMIZERS["split"] = split(groups.most)(optimizer)
    own = count("split", precision)
    report.note(f"plain, in {groups.most} groups", own)
    report.bar("steering: more launches a step", steered["launches"] - own["launches"], most=LAUNCHED)
    # The pending readings of the step before are asked for, by an event that has long passed.
    report.bar("steering: more waits for the device a step", steered["waits"] - own["waits"], most=0.1)
    report.bar("steering: more waits for an event a step", steered["event waits"] - own["event waits"], most=1.1)


def _waits(found: dict[str, float]) -> float:
    return found["waits"] + found["event waits"]


for (_optimizer, _precision), _rank in SETUPS.items():
    add(
        Check(
            f"launches and waits a step: {_optimizer}, {_precision}",
            "launches",
            lambda report, optimizer=_optimizer, precision=_precision: judge(report, optimizer, precision),
            9.0,
            on_cpu="" if _rank == 16 else "on a CPU one of them is run",
            rank=_rank,
        )
    )
