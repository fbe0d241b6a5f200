"""The pictures of ``docs/quantities.md`` and ``docs/activations.md``, from one real run: ``python docs/pictures.py``.

It takes about three minutes. With names it draws only those: ``python docs/pictures.py activations``.

A GPT of 180,000 parameters learns the source of Python's standard library, byte by byte, with AdamW, warm-up and
cosine decay, under all four monitors and with the noise rule as a dry run.
"""

import logging
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynamon.callbacks import ActivationMonitor, GradientMonitor, NoiseAdaptiveLR, SharpnessMonitor, WeightMonitor
from dynamon.cli.demo_data import standard_library_text, training_batches
from dynamon.cli.language_model import GPT, LanguageModel
from dynamon.health import findings
from dynamon.runs.history import RunData, Series

FOLDER = Path(__file__).parent / "pictures"
STEPS, BATCH, CONTEXT = 600, 16, 64
Readings = Mapping[str, Series]
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # told apart by colour-blind readers


class Losses(pl.Callback):
    """Keeps every training loss."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.values.append(float(outputs["loss"]))


def train() -> tuple[list[float], Readings]:
    """Losses and readings of the run."""
    pl.seed_everything(0, verbose=False)
    module = LanguageModel(STEPS, rate=4e-3, context=CONTEXT)
    module.network = GPT(width=64, depth=3, context=CONTEXT)
    sharpness = SharpnessMonitor(20, quantities=["stability_ratio", "directional", "critical", "subspace"])
    monitors = [GradientMonitor(5), WeightMonitor(10), ActivationMonitor(10), sharpness]
    steering, losses = NoiseAdaptiveLR(apply=False), Losses()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        gradient_clip_val=1.0,
        callbacks=[*monitors, steering, losses],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=5,
    )
    trainer.fit(module, training_batches(standard_library_text()[0], BATCH, CONTEXT, STEPS, 0))
    run = RunData.of(*(monitor.history for monitor in monitors), steering.history)
    print("health:", [finding.message for finding in findings(run)] or "nothing")
    return losses.values, run.scalars | run.tables


def lines(axes: Axes, history: Readings, **tags: str) -> None:
    """One line a tag, by its label."""
    for (label, tag), color in zip(tags.items(), COLORS, strict=False):
        if tag in history:
            series = history[tag]
            axes.plot(series.steps, series.values, ".-", markersize=3, linewidth=1, color=color, label=_spaced(label))
    axes.legend(frameon=False, fontsize="small")


def band(axes: Axes, history: Readings, **quantities: str) -> None:
    """The median across layers, with the 10 % and 90 % quantiles."""
    for (label, quantity), color in zip(quantities.items(), COLORS, strict=False):
        series = history[quantity]
        low, middle, high = np.nanquantile(series.values, (0.1, 0.5, 0.9), axis=1)
        axes.plot(series.steps, middle, color=color, linewidth=1.2, label=_spaced(label))
        axes.fill_between(series.steps, low, high, color=color, alpha=0.2, linewidth=0)
    axes.legend(frameon=False, fontsize="small")


def heat(axes: Axes, history: Readings, quantity: str, title: str, is_log: bool = True) -> None:
    """Layers over steps."""
    series = history[quantity]
    names = [name.removeprefix("network.").removesuffix(".weight") for name in series.layers or ()]
    picture = axes.imshow(
        np.log10(series.values.T) if is_log else series.values.T,
        aspect="auto",
        extent=(0, STEPS, len(names) - 0.5, -0.5),
        interpolation="nearest",
    )
    axes.set_yticks(range(len(names)), names, fontsize=6)
    axes.set(title=title, xlabel="step")
    axes.figure.colorbar(picture, ax=axes, label="log10" if is_log else None)


def sharpness(losses: list[float], history: Readings) -> Figure:
    """Loss, stability ratio, what the last step could have been, and where the gradient points."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    (loss, ratio), (step, space) = figure.subplots(2, 2, sharex=True)
    loss.plot(losses, color=COLORS[0], linewidth=0.7)
    loss.set(title="training loss, nats a byte")
    lines(ratio, history, on_the_probe="sharpness/stability_ratio")
    bound = history["sharpness/stability_ratio_upper"]
    ratio.plot(bound.steps, bound.values, "v", markersize=4, color=COLORS[1], label="99 % upper bound, now and then")
    ratio.legend(frameon=False, fontsize="small")
    ratio.axhline(1, color="#444444", linewidth=0.8)
    ratio.set(title="stability ratio: 1 is the largest stable step", ylim=(0, 2))
    lines(step, history, loss_is_back_at="sharpness/critical_multiple", best_at="sharpness/best_multiple")
    step.axhline(1, color="#444444", linewidth=0.8)
    step.set(title="how far the last step could go (1: as far as it went)", xlabel="step", ylim=(0, 10))
    lines(
        space,
        history,
        of_the_gradient="sharpness/gradient_share",
        of_the_update="sharpness/update_share",
        overlap_with_the_reading_before="sharpness/eigenspace_overlap",
    )
    space.set(title="share in the top eigenspace (5 vectors)", xlabel="step", ylim=(0, 1.05))
    return figure


def gradients(history: Readings) -> Figure:
    """Norms and clipping, cosine, noise scale, noise by layer."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    (norm, scale), (noise, ratio) = figure.subplots(2, 2)
    lines(norm, history, before_clipping="gradient/norm", after="gradient/norm_clipped")
    norm.set(title="gradient norm", yscale="log")
    lines(scale, history, noise_scale="noise/scale")
    scale.axhline(1, color="#444444", linewidth=0.8)
    scale.set(title="noise scale, in batches", yscale="log")
    heat(noise, history, "noise/snr", "signal to noise by layer")
    band(ratio, history, rate_ratio_across_layers="lr/ratio")
    ratio.set(title="what the noise rule would do (dry run)", xlabel="step", ylim=(0, 1.05))
    return figure


def weights(history: Readings) -> Figure:
    """Operator norms, update over weight, spectra."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    (norm, update), (rank, sigma) = figure.subplots(2, 2)
    band(norm, history, operator_norm_by_role="weight/operator")
    norm.set(title="weights across layers")
    band(update, history, update_over_weight="update/ratio")
    update.set(title="update / weight across layers", yscale="log")
    band(rank, history, stable_rank="spectrum/stable_rank", effective_rank="spectrum/effective_rank")
    rank.set(title="ranks across matrices", xlabel="step")
    heat(sigma, history, "spectrum/sigma_max", "largest singular value by layer")
    return figure


def activations(history: Readings) -> Figure:
    """Sizes of outputs, logits and entropy by head, the residual stream by block."""
    figure = Figure(figsize=(10, 8), layout="constrained")
    (sizes, grads), (logits, entropy), (stream, outliers) = figure.subplots(3, 2, height_ratios=[2, 1.2, 1.2])
    heat(sizes, history, "activation/rms", "root mean square of the output")
    heat(grads, history, "activation/gradient", "root mean square of its gradient")
    heat(logits, history, "attention/max_logit", "largest attention logit by head", is_log=False)
    heat(entropy, history, "attention/entropy", "entropy of attention by head", is_log=False)
    residual = history["activation/residual"]
    for name, column, color in zip(residual.layers or (), residual.values.T, COLORS, strict=False):
        stream.plot(residual.steps, column, color=color, linewidth=1.2, label=name.removeprefix("network."))
    stream.legend(frameon=False, fontsize="small")
    stream.set(title="residual stream after each block", xlabel="step")
    band(outliers, history, kurtosis_across_modules="activation/kurtosis")
    outliers.axhline(3, color="#444444", linewidth=0.8)
    outliers.set(title="kurtosis of outputs (3: normal)", xlabel="step", yscale="log")
    return figure


def _spaced(label: str) -> str:
    return label.replace("_", " ")


def main(names: list[str]) -> None:
    """Train and draw all pictures, or those named."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    losses, history = train()
    FOLDER.mkdir(exist_ok=True)
    for name, figure in (
        ("sharpness", sharpness(losses, history)),
        ("gradients", gradients(history)),
        ("weights", weights(history)),
        ("activations", activations(history)),
    ):
        if names and name not in names:
            continue
        figure.savefig(FOLDER / f"{name}.png", dpi=90)
        print(f"picture: {FOLDER / name}.png")


if __name__ == "__main__":
    main(sys.argv[1:])
