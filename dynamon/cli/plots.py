"""Plots of the commands: a run of the demo, and a refined schedule. They need matplotlib, the ``demo`` extra."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynamon.runs.history import Series
from dynamon.schedule import linear_decay, smoothed_norms

_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#666666"  # distinct for colour-blind readers
_DPI = 110


def draw_run(
    path: Path,
    title: str,
    loss: tuple[NDArray[Any], NDArray[Any]],
    validation: tuple[NDArray[Any], NDArray[Any]],
    monitor: Mapping[str, Series],
    steering: Mapping[str, Series] | None,
    strip: str = "",
) -> None:
    """Draw loss, stability ratio, and maps over layers and steps: noise, rate ratio, decrease of the loss.

    Args:
        path: The PNG to write.
        title: Title of the figure.
        loss: Steps and training loss.
        validation: Steps and validation loss.
        monitor: History of the monitor.
        steering: History of the steering callback, or None.
        strip: Prefix to leave out of layer names.
    """
    from matplotlib import colors

    maps: list[tuple[str, str, Mapping[str, Series], Any, str]] = [
        ("noise/dual", "gradient noise sqrt(H), dual norm", monitor, colors.LogNorm(), "viridis")
    ]
    if steering is not None:
        maps.append(("lr/ratio", "learning-rate ratio", steering, colors.Normalize(0, 1), "cividis"))
    drawn = [(label, history[tag], norm, palette) for tag, label, history, norm, palette in maps if tag in history]
    decrease = monitor.get("progress/decrease")
    if decrease is not None and np.isfinite(decrease.values).any():
        label = "decrease of the loss in a step: blue lowers it, red raises it"
        drawn.append((label, decrease, _signed_roots(float(np.nanmax(np.abs(decrease.values)))), "RdBu"))
    rows = -(-len(drawn) // 2)
    figure = _figure(13, 4.2 + 4.4 * rows)
    figure.suptitle(title, fontsize=12)
    grid = figure.add_gridspec(1 + rows, 2, height_ratios=[1, *[1.25] * rows])
    _draw_loss(figure.add_subplot(grid[0, 0]), loss, validation)
    _draw_stability(figure.add_subplot(grid[0, 1]), monitor, len(loss[0]))
    for place, (label, series, norm, palette) in enumerate(drawn):
        is_alone = place == len(drawn) - 1 and place % 2 == 0
        where = grid[1 + place // 2, :] if is_alone else grid[1 + place // 2, place % 2]
        _draw_map(figure, figure.add_subplot(where), series, label, norm, palette, strip, len(loss[0]))
    figure.savefig(path, dpi=_DPI)


def _signed_roots(most: float) -> Any:
    """Colours by signed square roots: small layers are seen beside large ones."""
    from matplotlib import colors

    roots = lambda v: np.sign(v) * np.sqrt(np.abs(v)), lambda r: np.sign(r) * np.square(r)  # noqa: E731
    return colors.FuncNorm(roots, -most or -1.0, most or 1.0)


def draw_schedule(path: Path, schedule: NDArray[Any], readings: Series, norm: str, tag: str) -> None:
    """Draw a refined schedule beside the gradient norms that it was computed from.

    Args:
        path: The PNG to write.
        schedule: A factor for each step.
        readings: The norms.
        norm: Which norm they are.
        tag: Their tag.
    """
    figure = _figure(11, 4)
    left, right = figure.subplots(1, 2)
    total = len(schedule)
    left.plot(readings.steps, readings.values, ".", color=_GREY, ms=2.5, label=tag)
    left.plot(smoothed_norms(readings.values, readings.steps, total), color=_BLUE, label="running median")
    left.set(title=f"{norm} norm of the gradient", xlabel="step", yscale="log")
    right.plot(schedule, color=_BLUE, label="refined")
    right.plot(linear_decay(total), color=_ORANGE, ls="--", lw=1, label="linear decay")
    right.set(title="factor on the learning rate", xlabel="step", ylim=(0, 1.05))
    for axes in (left, right):
        axes.legend(frameon=False)
    figure.savefig(path, dpi=_DPI)


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _draw_loss(
    axes: Any, loss: tuple[NDArray[Any], NDArray[Any]], validation: tuple[NDArray[Any], NDArray[Any]]
) -> None:
    axes.plot(*loss, color=_BLUE, lw=0.8, label="training")
    if len(validation[0]):
        axes.plot(*validation, "o-", color=_ORANGE, ms=4, lw=1.2, label="validation")
    axes.set(title="loss", xlabel="step", ylabel="nats per byte")
    axes.legend(frameon=False)


def _draw_stability(axes: Any, history: Mapping[str, Series], steps: int) -> None:
    axes.axhline(1, color=_GREY, ls="--", lw=1, label="largest stable step")
    for tag, style, label in (
        (
            "sharpness/stability_ratio",
            {"marker": "o", "ms": 3.5, "lw": 1.2, "color": _BLUE},
            "ratio (lower bound)",
        ),
        ("sharpness/stability_ratio_upper", {"marker": "v", "ls": "", "color": _ORANGE}, "99 % upper bound"),
        (
            "sharpness/stability_ratio_unconverged",
            {"marker": "o", "ls": "", "mfc": "none", "color": _GREY},
            "not converged",
        ),
    ):
        if tag in history:
            series = history[tag]
            axes.plot(series.steps, series.values, label=label, **style)
    axes.set(title="stability ratio", xlabel="step")
    axes.set_ylim(0, 1.25 * axes.get_ylim()[1])  # room for the legend
    axes.set_xlim(0, max(steps, 1))
    axes.legend(frameon=False)


def _draw_map(
    figure: Any, axes: Any, series: Series, label: str, norm: Any, palette: str, strip: str, steps: int
) -> None:
    names = [name.removeprefix(strip).removesuffix(".weight") for name in series.layers or ()]
    # A cell reaches half way to the readings beside it, the first and the last to the ends of the run.
    between = (series.steps[1:] + series.steps[:-1]) / 2
    edges = np.concatenate([[0], between, [max(steps, series.steps[-1] + 1)]])
    mesh = axes.pcolormesh(edges, np.arange(len(names) + 1), series.values.T, norm=norm, cmap=palette, rasterized=True)
    axes.set_yticks(np.arange(len(names)) + 0.5, names, fontsize=7)
    axes.invert_yaxis()
    axes.set(title=label, xlabel="step")
    figure.colorbar(mesh, ax=axes, pad=0.01)
