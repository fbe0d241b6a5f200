"""Two detectors to compare with: Lightning's SpikeDetection, and three standard deviations of the gradient norm."""

import math
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.spike import TrainingSpikeException
from lightning.pytorch.callbacks import SpikeDetection

WINDOW = 100  # gradient norms that the next one is compared with
LEAST = 20  # of them
SIGMAS = 3.0
_SMOOTH = 5  # losses of a running median


def spike_alarms(losses: Sequence[float]) -> list[int]:
    """The steps at which Lightning's callback, with its defaults, would end training.

    It is the callback itself. Where it raises, the benchmark goes on as a run would that is started again without
    these batches.

    Args:
        losses: Of each step.
    """
    alarms = []
    strategy = SimpleNamespace(
        root_device=torch.device("cpu"), barrier=lambda: None, reduce_boolean_decision=lambda said, all: said
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer: Any = SimpleNamespace(strategy=strategy, global_rank=0, default_root_dir=folder)
        callback = SpikeDetection(exclude_batches_path=Path(folder) / "skipped.json")
        for step, loss in enumerate(losses):
            try:
                callback.on_train_batch_end(trainer, None, torch.tensor(loss), None, step)  # type: ignore[arg-type]
            except TrainingSpikeException:
                alarms.append(step)
    return alarms


def sigma_alarms(norms: Sequence[float]) -> list[int]:
    """The steps at which the norm is more than three standard deviations above the mean of the last hundred.

    Args:
        norms: Of each step's gradient. One that is not finite is an alarm, and no part of the mean.
    """
    past: list[float] = []
    alarms = []
    for step, norm in enumerate(norms):
        if not math.isfinite(norm):
            alarms.append(step)
            continue
        if len(past) >= LEAST and norm > statistics.fmean(past) + SIGMAS * statistics.stdev(past):
            alarms.append(step)
        past = [*past, norm][-WINDOW:]
    return alarms


def step_of_the_loss(losses: Sequence[float], onset: int) -> int | None:
    """The first step from a fault on at which the smoothed loss is away from its level; None if it never is.

    A running median of five, against the hundred steps before the fault: away by three standard deviations of such
    medians, up or down. One that is not finite is away at once.

    Args:
        losses: Of each step.
        onset: Of the fault.
    """
    before = np.array(losses[max(0, onset - WINDOW) : onset])
    medians = np.median(np.lib.stride_tricks.sliding_window_view(before, _SMOOTH), axis=1)
    center, spread = medians.mean(), medians.std()
    for step in range(onset, len(losses)):
        now = np.median(losses[max(0, step - _SMOOTH + 1) : step + 1])
        if not abs(now - center) <= SIGMAS * spread:
            return step
    return None
