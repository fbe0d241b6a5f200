"""Describe what a run of the demo showed, and check that it showed what the demo promises."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from textwrap import wrap
from typing import Any

import lightning.pytorch as pl
import numpy as np
from numpy.typing import NDArray

from dynamon.board.progress import LayerProgress, layer_progress, sentence
from dynamon.callbacks import DynamicsMonitor, NoiseAdaptiveLR
from dynamon.layers import describe_layers
from dynamon.monitoring.dynamics_monitor import PRESETS
from dynamon.norms import iid_dual_norm, update_norm
from dynamon.runs.history import RunData

_PROMISED = {
    "sharpness/stability_ratio": "sharpness",
    "noise/dual": "gradient noise",
    "progress/decrease": "decrease by layer",
    "spectrum/sigma_max": "weights",
}
_TOLERANCE = 1.1  # of what the budget allows: what a reading costs varies on a busy machine
_READING_STEPS = 20  # time of a reading that turns out to cost more than is left, in steps
_FALLING_STEPS = 20  # steps from which on the loss must have fallen


@dataclass(frozen=True)
class Outcome:
    """A finished run.

    Attributes:
        module: The trained module.
        monitor: The monitor.
        steering: The steering callback, or None.
        training: Steps and training losses.
        validation: Steps and validation losses.
        steps: Optimizer steps taken.
        seconds: Wall time of the whole command.
        fit_seconds: Wall time of ``Trainer.fit``.
        budget: Share of training time that monitoring may take.
        grace: Seconds that monitoring may take beyond that.
    """

    module: pl.LightningModule
    monitor: DynamicsMonitor
    steering: NoiseAdaptiveLR | None
    training: tuple[NDArray[Any], NDArray[Any]]
    validation: tuple[NDArray[Any], NDArray[Any]]
    steps: int
    seconds: float
    fit_seconds: float
    budget: float
    grace: float


def summary(run: Outcome) -> list[str]:
    """Describe what the run showed, in sentences for a terminal.

    Args:
        run: The run.

    Returns:
        The lines.
    """
    lines = [f"{run.steps} steps in {run.seconds:.0f} s"]
    losses = run.training[1]
    if len(losses):
        validation = f", validation {run.validation[1][-1]:.3f}" if len(run.validation[1]) else ""
        lines.append(f"loss          {losses[0]:.3f} -> {losses[-20:].mean():.3f} (mean of the last steps){validation}")
    history, overhead = run.monitor.history, run.monitor.overhead
    lines += _stability_lines(run)
    if "noise/dual" in history:
        lines += _noise_lines(run)
    if "spectrum/sigma_max" in history:
        lines.append(_spectrum_line(run))
    learned = layer_progress(RunData.of(history))
    if learned is not None:
        lines += _progress_lines(learned)
    cost = (
        f"cost          monitoring took {overhead:.2%} of training time (budget {run.budget:.0%} and {run.grace:.0f} s)"
    )
    lines.append(cost + ("" if run.steering is None else f", steering {run.steering.overhead:.1%}"))
    if run.monitor.failures:
        lines.append(f"failures      {run.monitor.failures} measurements failed; the warnings above say why")
    return lines


def shortfalls(run: Outcome) -> Iterator[str]:
    """List where the results are not what the demo promises, whatever the speed of the machine.

    Every quantity must have been read, the loss must be finite and fall, and monitoring must keep its budget.

    Args:
        run: The run.

    Yields:
        A sentence for each.
    """
    for tag, words in _PROMISED.items():
        series = run.monitor.history.get(tag)
        if series is None or not np.isfinite(series.values).any():
            yield f"no reading of {words} ({tag}): give more --steps or a larger --budget."
    steps, losses = run.training
    broken = ~np.isfinite(losses)
    if broken.any():
        yield f"the training loss is not finite at step {steps[broken][0]}."
    elif len(losses) >= _FALLING_STEPS:
        tenth = len(losses) // 10
        first, last = losses[:tenth].mean(), losses[-tenth:].mean()
        if last >= first:
            yield f"the training loss did not fall: {first:.3f} at the beginning, {last:.3f} at the end."
    training = run.fit_seconds / (1 + run.monitor.overhead)
    spent, allowed = run.monitor.overhead * training, run.budget * training + run.grace
    if spent > _TOLERANCE * allowed + _READING_STEPS * training / max(run.steps, 1):
        budget = f"{run.budget:.0%} of training and {run.grace:.0f} s"
        yield f"monitoring took {spent:.1f} s; {budget} allow {allowed:.1f} s."


def _stability_lines(run: Outcome) -> list[str]:
    history = run.monitor.history
    if "sharpness/stability_ratio" not in history:
        return ["stability     no converged reading: give more --steps or a larger --budget"]
    ratio = history["sharpness/stability_ratio"].values
    if ratio.max() < 1:
        verdict = "below 1 all the time: steps were smaller than the curvature allows"
    elif ratio[-1] < 1:
        verdict = "at or above 1 for a while, below it at the end"
    else:
        verdict = "at or above 1: at the edge of stability, where training often settles"
    products = history["sharpness/matvecs"].values
    interval = PRESETS[run.monitor.preset].sharpness
    return [
        f"stability     ratio {ratio.min():.2f} to {ratio.max():.2f}, last {ratio[-1]:.2f} "
        "(1 is the largest stable step)",
        f"              {verdict}",
        f"              {len(ratio)} readings where the preset takes {max(run.steps // interval, 1)} if the budget "
        "pays for them,",
        f"              each on {history['sharpness/probe_samples'].values[-1]:.0f} sequences with "
        f"{np.median(products):.0f} Hessian products (median); a small probe reads high",
    ]


def _noise_lines(run: Outcome) -> list[str]:
    series = run.monitor.history["noise/dual"]
    by_name = {layer.name: layer for layer in describe_layers(run.module)}
    layers = [by_name[name] for name in series.layers or ()]
    # Relative to what the shape alone would give: raw dual norms grow with the number of entries.
    factor = np.array([iid_dual_norm(update_norm(layer, "sign"), layer) for layer in layers])
    order = np.argsort(series.values[-1] / factor)
    names = _short(series.layers or ())
    ratios = {} if run.steering is None else run.steering.ratios

    def named(indices: NDArray[Any]) -> str:
        rate = {i: f" (rate x {ratios[layers[i].name]:.2f})" if ratios else "" for i in indices}
        return ", ".join(f"{names[i]}{rate[i]}" for i in indices)

    return [
        f"noisiest      {named(order[::-1][:3])}",
        f"quietest      {named(order[:3])}",
        f"              gradient noise relative to the layer's size, {len(series)} readings",
    ]


def _spectrum_line(run: Outcome) -> str:
    history = run.monitor.history
    sigma, rank = history["spectrum/sigma_max"], history["spectrum/stable_rank"]
    names = _short(sigma.layers or ())
    top, low = int(np.nanargmax(sigma.values[-1])), int(np.nanargmin(rank.values[-1]))
    gap = np.nanmax(history["spectrum/sigma_upper"].values[-1] / history["spectrum/sigma_lower"].values[-1]) - 1
    return (
        f"spectra       largest singular value {sigma.values[-1][top]:.3g} in {names[top]} "
        f"(certified to {gap:.1%}), lowest stable rank {rank.values[-1][low]:.3g} in {names[low]}"
    )


def _progress_lines(learned: LayerProgress) -> list[str]:
    said = sentence(replace(learned, layers=tuple(_short(learned.layers))))
    return wrap(said, 115, initial_indent="progress      ", subsequent_indent=" " * 14)


def _short(names: Sequence[str]) -> list[str]:
    return [name.removeprefix("network.").removesuffix(".weight") for name in names]
