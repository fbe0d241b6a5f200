"""``dynamon demo``: monitor and steer a real training run whose length is chosen to take about 90 seconds."""

import argparse
import importlib.util
import logging
import math
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from numpy.typing import NDArray
from torch import Tensor

from dynamon.callbacks import DynamicsMonitor, NoiseAdaptiveLR
from dynamon.cli import plots
from dynamon.cli.demo_data import standard_library_text, training_batches, validation_batches
from dynamon.cli.demo_options import SECONDS
from dynamon.cli.demo_plan import SIZES, VALIDATION_BATCHES, VALIDATIONS, Plan, Size, make_plan, thread_counts
from dynamon.cli.demo_summary import Outcome, shortfalls, summary
from dynamon.cli.language_model import LanguageModel
from dynamon.cli.refusal import refusing
from dynamon.monitoring.planner import GRACE

_RESERVED = 8.0  # of them for imports, before the clock starts, and for the picture
_TRIAL_SECONDS, _FEWEST_TRIAL_STEPS, _MOST_TRIAL_STEPS = 1.5, 3, 20  # the first step of a trial is not counted
_FIRST_STEP = 3.0  # a first step may take so many times as long as those after it


def run(options: argparse.Namespace) -> int:
    """Time a step, train, draw, print a summary.

    Args:
        options: The parsed options.

    Returns:
        0, or 1 with the reasons printed if the results are not what the demo promises. A slow machine is no reason.

    Raises:
        RefusalError: If matplotlib, the text, the accelerator or the folder cannot be used.
    """
    begin = time.perf_counter()
    with refusing():
        if importlib.util.find_spec("matplotlib") is None:
            raise ValueError("the picture needs matplotlib: pip install 'lightning-dynamon[demo]'")
        text = standard_library_text()
        options.logdir.mkdir(parents=True, exist_ok=True)
    with _quiet(), _threads_restored():
        plan = _plan(options, text[0], begin)
        print(_announcement(options, plan, text[0]), flush=True)
        outcome, logger, interrupted = _train(options, plan, text, begin)
    path = Path(logger.log_dir) / "dynamon.png"
    rates = "uniform" if outcome.steering is None else "noise-adaptive"
    title = f"dynamon demo: {outcome.steps} steps, {rates} rates, seed {options.seed}"
    histories = outcome.monitor.history, None if outcome.steering is None else outcome.steering.history
    plots.draw_run(path, title, outcome.training, outcome.validation, *histories, strip="network.")
    print("", *summary(outcome), "", sep="\n")
    print(f"picture       {path}\npanels        tensorboard --logdir {options.logdir}")
    if interrupted:
        print("stopped early by Ctrl-C; everything above is what there was until then.")
        return 0
    print(f"again         {_command(options, plan)}")
    problems = list(shortfalls(outcome))
    for problem in problems:
        print(f"dynamon demo fell short: {problem}", file=sys.stderr)
    return 1 if problems else 0


def _plan(options: argparse.Namespace, text: Tensor, begin: float) -> Plan:
    """Take size, threads and steps from the options; time a step for what they leave open."""
    own = torch.get_num_threads()
    if options.steps is not None:
        return Plan(options.size or "full", options.threads or own, options.steps)
    if options.threads is not None:
        threads = [options.threads]
    else:
        threads = thread_counts(own) if options.accelerator == "cpu" else [own]

    def step_seconds(size: str, count: int, too_slow: float) -> float:
        print(f"timing a step of the {size} model, {_threads(count)} ...", flush=True)
        return _step_seconds(options, text, SIZES[size], count, too_slow)

    def seconds_left() -> float:
        return SECONDS - _RESERVED - GRACE - (time.perf_counter() - begin)

    sizes = list(SIZES) if options.size is None else [options.size]
    return make_plan(step_seconds, sizes, threads, seconds_left, options.budget)


def _step_seconds(options: argparse.Namespace, text: Tensor, size: Size, threads: int, too_slow: float) -> float:
    """Train a throw-away model as the run does, without the monitor; return the mean time of a step."""
    torch.set_num_threads(threads)
    pl.seed_everything(options.seed, verbose=False)
    clock = _Clock(too_slow)
    trainer = _trainer(
        options, _MOST_TRIAL_STEPS, [*_steering(options), _Losses(), clock], logger=False, enable_progress_bar=False
    )
    batches = training_batches(text, size.batch, size.context, _MOST_TRIAL_STEPS, options.seed)
    with _stop_on_interrupt(trainer) as interrupts:
        trainer.fit(_module(size, _MOST_TRIAL_STEPS), batches)
    if interrupts:
        raise KeyboardInterrupt
    return clock.seconds


def _train(
    options: argparse.Namespace, plan: Plan, text: tuple[Tensor, Tensor], begin: float
) -> tuple[Outcome, TensorBoardLogger, bool]:
    """Train with monitor and steering on."""
    torch.set_num_threads(plan.threads)
    pl.seed_everything(options.seed, verbose=False)
    size = SIZES[plan.size]
    module = _module(size, plan.steps)
    monitor = DynamicsMonitor(preset=options.preset, budget=options.budget, grace=GRACE)
    steering = _steering(options)
    losses, logger = _Losses(), TensorBoardLogger(options.logdir, name=None)
    trainer = _trainer(
        options,
        plan.steps,
        [monitor, *steering, _Progress(monitor), losses],
        logger=logger,
        val_check_interval=max(plan.steps // VALIDATIONS, 1),
    )
    batches = training_batches(text[0], size.batch, size.context, plan.steps, options.seed)
    held_out = validation_batches(text[1], size.batch, size.context, VALIDATION_BATCHES)
    fit_begin = time.perf_counter()
    with _stop_on_interrupt(trainer) as interrupts:
        trainer.fit(module, batches, held_out)
    now = time.perf_counter()
    outcome = Outcome(
        module=module,
        monitor=monitor,
        steering=steering[0] if steering else None,
        training=losses.training,
        validation=losses.validation,
        steps=trainer.global_step,
        seconds=now - begin,
        fit_seconds=now - fit_begin,
        budget=options.budget,
        grace=GRACE,
    )
    return outcome, logger, bool(interrupts)


def _trainer(options: argparse.Namespace, steps: int, callbacks: Sequence[Callback], **more: Any) -> pl.Trainer:
    with refusing(MisconfigurationException):
        return pl.Trainer(
            accelerator=options.accelerator,
            devices=1,
            max_steps=steps,
            log_every_n_steps=min(5, steps),
            gradient_clip_val=1.0,
            num_sanity_val_steps=0,
            enable_checkpointing=False,
            enable_model_summary=False,
            callbacks=list(callbacks),
            **more,
        )


def _steering(options: argparse.Namespace) -> list[NoiseAdaptiveLR]:
    return [] if options.no_adaptive else [NoiseAdaptiveLR()]


def _module(size: Size, steps: int) -> LanguageModel:
    return LanguageModel(steps, context=size.context, width=size.width, depth=size.depth)


def _announcement(options: argparse.Namespace, plan: Plan, text: Tensor) -> str:
    size = SIZES[plan.size]
    line = (
        f"training the {plan.size} model on {len(text) / 1e6:.1f} MB of Python source: {plan.steps} steps of "
        f"{size.batch} x {size.context} bytes, {_threads(plan.threads)}; Ctrl-C stops early"
    )
    if plan.step_seconds is None:
        return line
    seconds = plan.steps * plan.step_seconds * (1 + options.budget) + GRACE
    return f"a step takes {plan.step_seconds:.2g} s: {plan.steps} of them and monitoring, about {seconds:.0f} s\n{line}"


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _command(options: argparse.Namespace, plan: Plan) -> str:
    """The command that trains the same again."""
    extra = (" --no-adaptive" * options.no_adaptive) + (
        f" --accelerator {options.accelerator}" if options.accelerator != "cpu" else ""
    )
    return f"dynamon demo --steps {plan.steps} --size {plan.size} --threads {plan.threads} --seed {options.seed}{extra}"


class _Clock(Callback):
    """Measure the mean time of all steps but the first, and end the trial after enough of them."""

    def __init__(self, too_slow: float) -> None:
        self._too_slow = too_slow
        self._times: list[float] = []  # when the first step began, and when each ended

    @property
    def seconds(self) -> float:
        if len(self._times) == 2:
            return self._times[1] - self._times[0]
        return (self._times[-1] - self._times[1]) / (len(self._times) - 2)

    def on_train_batch_start(self, *_: Any) -> None:
        self._times = self._times or [time.perf_counter()]

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._times.append(time.perf_counter())
        steps, counted = len(self._times) - 1, self._times[-1] - self._times[1]
        hopeless = steps == 1 and self.seconds > _FIRST_STEP * self._too_slow
        if hopeless or (steps >= _FEWEST_TRIAL_STEPS and counted >= _TRIAL_SECONDS):
            trainer.should_stop = True


class _Progress(TQDMProgressBar):
    """Progress bar with loss, stability ratio and overhead."""

    def __init__(self, monitor: DynamicsMonitor) -> None:
        super().__init__(refresh_rate=10)
        self._monitor = monitor

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any:
        metrics = trainer.callback_metrics
        shown: dict[str, int | str | float] = {}
        for label, tag in (("loss", "train/loss"), ("stability", "sharpness/stability_ratio")):
            if tag in metrics:
                shown[label] = f"{float(metrics[tag]):.3f}"
        return {**shown, "overhead": f"{self._monitor.overhead:.1%}"}


class _Losses(Callback):
    """Record every training and validation loss."""

    def __init__(self) -> None:
        self._training: list[tuple[int, float]] = []
        self._validation: list[tuple[int, float]] = []

    @property
    def training(self) -> tuple[NDArray[Any], NDArray[Any]]:
        return _columns(self._training)

    @property
    def validation(self) -> tuple[NDArray[Any], NDArray[Any]]:
        return _columns(self._validation)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._training.append((trainer.global_step - 1, float(outputs["loss"])))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        value = float(trainer.callback_metrics.get("validation/loss", math.nan))
        self._validation.append((trainer.global_step, value))


def _columns(rows: list[tuple[int, float]]) -> tuple[NDArray[Any], NDArray[Any]]:
    return np.array([r[0] for r in rows]), np.array([r[1] for r in rows])


@contextmanager
def _stop_on_interrupt(trainer: pl.Trainer) -> Iterator[list[int]]:
    """Stop training after the current step on Ctrl-C, and at once on a second one."""
    seen: list[int] = []

    def stop(signum: int, frame: Any) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(signum)
        trainer.should_stop = True

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _threads_restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide Lightning's advice on workers and hardware; our warnings stay."""
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")
            warnings.filterwarnings("ignore", message=".*GPU available but not used.*")
            warnings.filterwarnings("ignore", message=".*`validation_step` but have no `val_dataloader`.*")
            yield
    finally:
        log.setLevel(level)
