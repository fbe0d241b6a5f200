"""A picture of the study of rates, from its results: ``python -m benchmarks.adaptive_plot``."""

import io
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from benchmarks.environment import RESULTS, parser, skip
from benchmarks.rates_study.tables import Results, interval, read
from benchmarks.rates_study.tasks import tasks

PICTURE = Path(__file__).parents[1] / "docs" / "adaptive.png"
_COLOURS = {"uniform": "#4477aa", "oracle": "#228833", "committed": "#cc6677"}


def draw(results: Results, path: Path | IO[bytes]) -> None:
    """For each task the loss by base rate, and what each arm gains over one rate for all layers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = [name for name in tasks() if "uniform" in results.chosen.get(name, {})]
    figure, axes = plt.subplots(2, len(names), figsize=(3.6 * len(names), 6.6), layout="constrained", squeeze=False)
    for (sweep, arms), task in zip(axes.T, names, strict=True):
        _draw_sweep(sweep, results, task)
        _draw_arms(arms, results, task)
    axes[0, 0].set_ylabel("validation loss, tuning seeds")
    axes[0, -1].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def _draw_sweep(axes, results: Results, task: str) -> None:
    least = float("inf")
    for name, colour in _COLOURS.items():
        if name in results.chosen[task]:
            points = results.sweep(task, name)
            least = min(least, *points.values())
            axes.plot(list(points), list(points.values()), "o-", color=colour, label=name, markersize=3)
    axes.set(xscale="log", xlabel="base rate", ylim=(0.995 * least, 1.12 * least))
    rates = sorted({rate for line in axes.lines for rate in line.get_xdata()})
    axes.set_xticks(rates[:: max(1, len(rates) // 4)], [f"{r:.2g}" for r in rates[:: max(1, len(rates) // 4)]])
    axes.minorticks_off()
    axes.set_title(task, fontsize=10)


def _draw_arms(axes, results: Results, task: str) -> None:
    names = [name for name in results.chosen[task] if name != "uniform"]
    for row, name in enumerate(names):
        colour = _COLOURS.get(name, "#777777")
        apart = results.apart(task, name, "uniform")
        mean, half = interval(apart)
        axes.plot(apart, [row] * len(apart), ".", color=colour, alpha=0.4, markersize=4)
        axes.errorbar([mean], [row], xerr=[[half], [half]], fmt="o", color=colour, markersize=4, capsize=2)
    axes.axvline(0, color=_COLOURS["uniform"], linewidth=1)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("final loss less that of uniform")
    axes.locator_params(axis="x", nbins=5)


def main() -> None:
    """Draw it."""
    options = parser("adaptive_plot", __doc__, default="docs/adaptive.png").parse_args()
    if find_spec("matplotlib") is None:
        skip('the pictures need matplotlib: pip install -c constraints.txt -e ".[demo]".')
    path = options.output or (None if options.smallest else PICTURE)
    draw(read(RESULTS / "adaptive.json"), path or io.BytesIO())
    print(f"drew {path}")


if __name__ == "__main__":
    main()
