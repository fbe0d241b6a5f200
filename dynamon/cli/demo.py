"""``dynamon demo``: watch and steer a real training run, in about two minutes on two cores."""

import argparse
import importlib.util
import logging
import math
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from numpy.typing import NDArray

from dynamon.callbacks import DynamicsMonitor, NoiseAdaptiveLR
from dynamon.callbacks.dynamics import PRESETS
from dynamon.cli import plots
from dynamon.cli.demo_data import standard_library_text, training_batches, validation_batches
from dynamon.cli.language_model import LanguageModel
from dynamon.layers import describe_layers
from dynamon.norms import iid_dual_norm, update_norm

_STEPS, _BUDGET, _BATCH, _CONTEXT = 750, 0.35, 16, 128
# A picture worth looking at; how many more there are is up to the machine.
_SHARPNESS_POINTS, _NOISE_POINTS = 5, 20
_SETTLED = 300  # steps after which a budget must hold, start-up included
_TOLERANCE = 1.1  # of the budget: the reading under way when it is used up, and clocks on a busy machine


def add_parser(commands: Any) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "demo",
        help="train a small language model with everything on, and draw what was seen",
        description="Train a byte-level GPT of about one million parameters on the source of the Python standard "
        "library, with DynamicsMonitor and NoiseAdaptiveLR on. Nothing is downloaded.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--no-adaptive", action="store_true", help="monitor only: leave the learning rates alone")
    parser.add_argument("--steps", type=_positive_int, default=_STEPS, help="optimizer steps")
    parser.add_argument("--preset", choices=list(PRESETS), default="economy", help="what is measured how often")
    parser.add_argument("--budget", type=_positive_float, default=_BUDGET, help="share of training time for monitoring")
    parser.add_argument("--logdir", type=Path, default=Path("dynamon_demo"), help="folder for event files and picture")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and data order")
    parser.add_argument("--accelerator", default="cpu", help="what Lightning trains on: cpu, gpu, auto")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Train, draw, sum up.

    Args:
        options: The parsed options.

    Returns:
        0, or 1 with the reason printed where the run fell short of what the demo promises.
    """
    if importlib.util.find_spec("matplotlib") is None:
        print(
            "dynamon demo draws a picture and needs matplotlib: pip install 'lightning-dynamon[demo]'",
            file=sys.stderr,
        )
        return 1
    begin = time.perf_counter()
    pl.seed_everything(options.seed, verbose=False)
    training, validation = standard_library_text()
    module = LanguageModel(options.steps, context=_CONTEXT)
    monitor = DynamicsMonitor(preset=options.preset, budget=options.budget)
    steering = None if options.no_adaptive else NoiseAdaptiveLR()
    progress, losses = _Progress(monitor), _Losses()
    logger = TensorBoardLogger(options.logdir, name=None)
    print(
        f"training {sum(p.numel() for p in module.parameters()):,} parameters on {len(training) / 1e6:.1f} MB of "
        f"Python source, {options.steps} steps of {_BATCH} x {_CONTEXT} bytes; Ctrl-C stops early",
        flush=True,
    )
    with _quiet():
        trainer = pl.Trainer(
            accelerator=options.accelerator,
            devices=1,
            max_steps=options.steps,
            val_check_interval=max(options.steps // 5, 1),
            log_every_n_steps=min(5, options.steps),
            gradient_clip_val=1.0,
            num_sanity_val_steps=0,
            logger=logger,
            enable_checkpointing=False,
            enable_model_summary=False,
            callbacks=[monitor, *([] if steering is None else [steering]), progress, losses],
        )
        with _stop_on_interrupt(trainer) as interrupted:
            trainer.fit(
                module,
                training_batches(training, _BATCH, _CONTEXT, options.steps, options.seed),
                validation_batches(validation, _BATCH, _CONTEXT, batches=8),
            )
    steps = trainer.global_step
    path = Path(logger.log_dir) / "dynamon.png"
    title = (
        f"dynamon demo: {steps} steps, {'uniform' if steering is None else 'noise-adaptive'} rates, seed {options.seed}"
    )
    histories = (monitor.history, None if steering is None else steering.history)
    plots.draw(path, title, losses.training, losses.validation, *histories, strip="network.")
    seconds = time.perf_counter() - begin
    print()
    for line in summary(module, monitor, steering, losses, seconds, steps):
        print(line)
    print(f"\npicture       {path}\npanels        tensorboard --logdir {options.logdir}")
    if interrupted:
        print("stopped early by Ctrl-C; everything above is what there was until then.")
        return 0
    problems = shortfalls(options, monitor)
    for problem in problems:
        print(f"dynamon demo fell short: {problem}", file=sys.stderr)
    return 1 if problems else 0


def summary(
    module: pl.LightningModule,
    monitor: DynamicsMonitor,
    steering: NoiseAdaptiveLR | None,
    losses: "_Losses",
    seconds: float,
    steps: int,
) -> list[str]:
    """What the run showed, in plain sentences.

    Args:
        module: The trained module.
        monitor: The monitor.
        steering: The steering callback, or None.
        losses: The recorded losses.
        seconds: Wall time.
        steps: Optimizer steps taken.
    """
    lines = [f"{steps} steps in {seconds:.0f} s"]
    if len(losses.training[1]):
        validation = f", validation {losses.validation[1][-1]:.3f}" if len(losses.validation[1]) else ""
        tail = np.mean(losses.training[1][-20:])
        lines.append(f"loss          {losses.training[1][0]:.3f} -> {tail:.3f} (mean of the last steps){validation}")
    history = monitor.history
    lines += _stability_lines(monitor)
    if "noise/dual" in history:
        lines += _noise_lines(module, monitor, steering)
    if "spectrum/sigma_max" in history:
        sigma, rank = history["spectrum/sigma_max"], history["spectrum/stable_rank"]
        names = _short(sigma.layers or ())
        top, low = int(np.nanargmax(sigma.values[-1])), int(np.nanargmin(rank.values[-1]))
        gap = np.nanmax(history["spectrum/sigma_upper"].values[-1] / history["spectrum/sigma_lower"].values[-1]) - 1
        lines.append(
            f"spectra       largest singular value {sigma.values[-1][top]:.3g} in {names[top]} "
            f"(certified to {gap:.1%}), lowest stable rank {rank.values[-1][low]:.3g} in {names[low]}"
        )
    cost = (
        f"cost          monitoring took {monitor.overhead:.2%} of training time (budget {monitor._budget.fraction:.0%})"
    )
    lines.append(cost + ("" if steering is None else f", steering {steering.overhead:.1%}"))
    if monitor.failures:
        lines.append(f"failures      {monitor.failures} measurements failed; the warnings above say why")
    return lines


def _stability_lines(monitor: DynamicsMonitor) -> list[str]:
    history = monitor.history
    if "sharpness/stability_ratio" not in history:
        return ["stability     no converged reading yet: the budget or the number of steps was too small"]
    ratio = history["sharpness/stability_ratio"].values
    if ratio.max() < 1:
        verdict = "below 1 all the time: steps were smaller than the curvature allows"
    elif ratio[-1] < 1:
        verdict = "at or above 1 for a while, below it at the end"
    else:
        verdict = "at or above 1: at the edge of stability, where training often settles"
    products = history["sharpness/matvecs"].values
    return [
        f"stability     ratio {ratio.min():.2f} to {ratio.max():.2f}, last {ratio[-1]:.2f} "
        "(1 is the largest stable step)",
        f"              {verdict}",
        f"              {len(ratio)} readings on {history['sharpness/probe_samples'].values[-1]:.0f} sequences, "
        f"{np.median(products):.0f} Hessian products each in the median; a small probe reads high",
    ]


def _noise_lines(module: pl.LightningModule, monitor: DynamicsMonitor, steering: NoiseAdaptiveLR | None) -> list[str]:
    series = monitor.history["noise/dual"]
    by_name = {layer.name: layer for layer in describe_layers(module)}
    layers = [by_name[name] for name in series.layers or ()]
    # Relative to what the shape alone would give: raw dual norms grow with the number of entries.
    factor = np.array([iid_dual_norm(update_norm(layer, "sign"), layer) for layer in layers])
    order = np.argsort(series.values[-1] / factor)
    names = _short(series.layers or ())
    ratios = {} if steering is None else steering.ratios

    def shown(indices: NDArray[Any]) -> str:
        rate = {i: f" (rate x {ratios[layers[i].name]:.2f})" if ratios else "" for i in indices}
        return ", ".join(f"{names[i]}{rate[i]}" for i in indices)

    return [
        f"noisiest      {shown(order[::-1][:3])}",
        f"quietest      {shown(order[:3])}",
        f"              noise for the layer's size, {len(series)} readings",
    ]


def shortfalls(options: argparse.Namespace, monitor: DynamicsMonitor) -> list[str]:
    """List the results that a run did not reach; a slow machine is none of them.

    A run of the default length and budget or more must give enough points for a picture; any run must read every
    quantity once and keep its budget.
    """
    history = monitor.history
    found = []
    full = options.steps >= _STEPS and options.budget >= _BUDGET
    sharpness = len(history.get("sharpness/stability_ratio", ()))
    noise = history.get("noise/dual")
    points = 0 if noise is None else int(np.isfinite(noise.values).sum(0).min())
    if sharpness < (_SHARPNESS_POINTS if full else 1):
        found.append(f"{sharpness} sharpness points, {_SHARPNESS_POINTS if full else 1} were expected.")
    if points < (_NOISE_POINTS if full else 1):
        found.append(f"a noise series has {points} points, {_NOISE_POINTS if full else 1} were expected.")
    if "spectrum/sigma_max" not in history:
        found.append("no reading of the weights.")
    if options.steps >= _SETTLED and monitor.overhead > _TOLERANCE * options.budget:
        found.append(f"monitoring took {monitor.overhead:.2%}, above the budget of {options.budget:.0%}.")
    return found


class _Progress(TQDMProgressBar):
    """A bar with loss, stability ratio and overhead."""

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
    """Keeps every training loss and each validation loss."""

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


def _short(names: tuple[str, ...]) -> list[str]:
    return [name.removeprefix("network.").removesuffix(".weight") for name in names]


@contextmanager
def _stop_on_interrupt(trainer: pl.Trainer) -> Iterator[list[int]]:
    """Ctrl-C ends training after the running step; a second one ends at once."""
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
def _quiet() -> Iterator[None]:
    """Hide Lightning's advice on workers and hardware; warnings of ours stay."""
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")
            warnings.filterwarnings("ignore", message=".*GPU available but not used.*")
            yield
    finally:
        log.setLevel(level)


def _positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {value}")
    return value


def _positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be positive, got {value}")
    return value
