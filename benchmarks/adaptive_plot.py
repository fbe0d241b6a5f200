"""Pictures of the study of adaptive rates, from its results: ``python -m benchmarks.adaptive_plot``."""

import io
import math
import statistics
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from benchmarks.adaptive import ARMS, CONTROLS, REPORTED, TUNING, load
from benchmarks.environment import RESULTS, parser, skip

PICTURE = Path(__file__).parents[1] / "docs" / "adaptive.png"
_COLOURS = {"AdamW": "#4477aa", "AdamW + noise": "#66ccee", "LMO": "#cc6677", "Lanton": "#882255"}
Run = tuple[str, str, float, int, int, int, str]  # task, arm, rate, seed, batch, steps, decay


def draw(results: dict[str, Any], path: Path | IO[bytes]) -> None:
    """Final loss against the base rate, the course of the best runs, and the controls, for the main task."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    runs = {_parsed(key): found for key, found in results.items()}
    batch, steps = max(((k[4], k[5]) for k in runs if k[0] == "bytes" and k[1] in CONTROLS), default=(16, 400))
    own = {k: r for k, r in runs.items() if (k[0], k[4], k[5], k[6]) == ("bytes", batch, steps, "cosine")}
    figure, (sweep, course, controls) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for arm, colour in _COLOURS.items():
        points = sorted((k[2], r["final"]) for k, r in own.items() if k[1] == arm and k[3] == TUNING[0])
        sweep.plot(*zip(*points, strict=True), "o-", color=colour, label=arm, markersize=3)
        best = _best(own, arm)
        curves = [r["losses"] for k, r in own.items() if k[1] == arm and k[2] == best and k[3] in REPORTED]
        mean = [(points[0][0], statistics.fmean(p[1] for p in points)) for points in zip(*curves, strict=True)]
        course.plot(*zip(*mean[2:], strict=True), color=colour, label=arm)
    least = min(r["final"] for r in own.values())
    sweep.set(xscale="log", xlabel="base rate", ylabel="final validation loss", ylim=(least - 0.02, least + 0.8))
    sweep.set_title("one seed, every rate tried", fontsize=10)
    course.set(xlabel="step", ylabel="validation loss", title="each at its best rate, mean of its reported seeds")
    course.set_ylim(least - 0.05, least + 1.2)
    course.title.set_fontsize(10)
    course.legend(frameon=False, fontsize=8)
    names = [name for name in ("LMO", "Lanton", *CONTROLS) if _finals(own, name)]
    finals = [_finals(own, name) for name in names]
    for row, values in enumerate(finals):
        colour = _COLOURS.get(names[row], "#777777")
        controls.plot(values, [row] * len(values), "o", color=colour, markersize=4, alpha=0.6)
        controls.plot([statistics.fmean(values)], [row], "|", color=colour, markersize=16)
    controls.set_yticks(range(len(names)), names)
    controls.invert_yaxis()
    controls.set_title("controls on LMO, each at its best rate", fontsize=10)
    controls.set_xlabel("final validation loss, by seed")
    figure.savefig(path, dpi=130)


def _parsed(key: str) -> Run:
    task, arm, rate, seed, batch, steps, decay = key.split("|")
    return task, arm, float(rate), int(seed), int(batch), int(steps), decay


def _best(runs: dict[Run, Any], arm: str) -> float:
    tuned: dict[float, list[float]] = {}
    for key, run in runs.items():
        if key[1] == arm and key[3] in TUNING:
            tuned.setdefault(key[2], []).append(run["final"])
    means = {rate: statistics.fmean(finals) for rate, finals in tuned.items() if len(finals) == len(TUNING)}
    return min(means, key=lambda rate: means[rate]) if means else math.nan


def _finals(runs: dict[Run, Any], arm: str) -> list[float]:
    best = _best(runs, arm)
    return [r["final"] for k, r in runs.items() if k[1] == arm and k[2] == best and k[3] in REPORTED]


def main() -> None:
    """Draw them."""
    options = parser("adaptive_plot", __doc__, default="docs/adaptive.png").parse_args()
    if find_spec("matplotlib") is None:
        skip('the pictures need matplotlib: pip install -c constraints.txt -e ".[demo]".')
    if not set(_COLOURS) <= set(ARMS):
        raise ValueError("a colour for an arm that does not exist.")
    path = options.output or (None if options.smallest else PICTURE)
    draw(load(RESULTS / "adaptive.json"), path or io.BytesIO())
    print(f"drew {path}")


if __name__ == "__main__":
    main()
