"""``dynamon schedule``: the learning-rate schedule that the gradients of a finished run call for."""

import argparse
import csv
import importlib.util
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynamon.cli.run_argument import RUN_HELP, choice, read
from dynamon.runs import last_step, read_run
from dynamon.runs.folders import printable
from dynamon.runs.history import Series
from dynamon.schedule import (
    FEWEST_READINGS,
    linear_decay,
    refined_schedule,
    smoothed_norms,
    usable_readings,
    warmup_end,
)

_TAGS = {"l2": "gradient/norm", "l1": "gradient/norm_l1"}
_LOADERS = {
    ".npy": ("import numpy as np", "np.load({!r})"),
    ".json": ("import json, pathlib", "json.loads(pathlib.Path({!r}).read_text())"),
    ".csv": ("import numpy as np", 'np.loadtxt({!r}, delimiter=",", skiprows=1)[:, 1]'),
}
_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#666666"


def add_parser(commands: Any) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "schedule",
        help="make a learning-rate schedule from the gradient norms of a finished run",
        description="Make the refined schedule of Defazio et al. (arXiv 2310.07831) from the gradient norms that "
        "GradientMonitor or DynamicsMonitor logged to TensorBoard or CSVLogger.",
    )
    parser.add_argument("folder", type=Path, metavar="RUN", help=RUN_HELP)
    parser.add_argument(
        "--norm",
        choices=["auto", *_TAGS],
        default="auto",
        help="norm of the gradients: l1 for Adam and its like, l2 for SGD; auto tells by what was logged",
    )
    parser.add_argument("-o", "--output", type=_output, metavar="FILE", help="write the factors: .npy, .csv or .json")
    parser.add_argument("--plot", type=_picture, metavar="FILE.png", help="draw schedule and norms (needs matplotlib)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Read, refine, print, write.

    Args:
        options: The parsed options.

    Returns:
        0, or 2 with the reason printed.
    """
    try:
        if options.plot is not None and importlib.util.find_spec("matplotlib") is None:
            raise ValueError("--plot draws a picture and needs matplotlib: pip install 'lightning-dynamon[demo]'")
        found = _find(options.folder, options.norm)
        _write(options.output, found.schedule)
        if options.plot is not None:
            _draw(options.plot, found)
    except (ValueError, OSError) as error:
        print(f"dynamon schedule: {error}", file=sys.stderr)
        return 2
    for line in _summary(found, options):
        print(line)
    return 0


@dataclass(frozen=True)
class _Found:
    """The schedule and what it rests on."""

    run: Path
    norm: str
    reason: str
    readings: Series  # those that can be used
    left_out: int
    total: int
    schedule: NDArray[Any]


def _find(folder: Path, asked: str) -> _Found:
    run, logged = read("schedule", folder, read_run)
    norm, reason = _choose(logged, asked)
    tag = _TAGS[norm]
    if tag not in logged:
        raise ValueError(_missing(run, logged, tag))
    series, total = logged[tag], last_step(logged) + 1
    usable = usable_readings(series.values)
    if usable.sum() < FEWEST_READINGS:
        raise ValueError(
            f"{printable(run)} holds {usable.sum()} readings of {tag} that are finite and not zero, and it takes "
            f"{FEWEST_READINGS}. Log more of them with GradientMonitor(every_n_steps=...) or a larger budget; without "
            "any, linear decay is what to use."
        )
    series = Series(series.steps[usable], series.values[usable])
    schedule = refined_schedule(series.values, norm=norm, steps=series.steps, total=total)
    return _Found(run, norm, reason, series, int((~usable).sum()), total, schedule)


def _choose(logged: dict[str, Series], asked: str) -> tuple[str, str]:
    """The norm and why; under Adam and its like the dual norms that were logged are l1 norms."""
    if asked != "auto":
        return asked, "as asked"
    dual, l1 = logged.get("gradient/norm_dual"), logged.get(_TAGS["l1"])
    if dual is None or l1 is None:
        return "l2", f"{_TAGS['l1']} was not logged"
    if dual.values.shape == l1.values.shape and np.allclose(dual.values, l1.values, rtol=1e-4, equal_nan=True):
        return "l1", "the optimizer's dual norm is the l1 norm, as Adam's is"
    return "l2", "the optimizer's dual norm is not the l1 norm, as Adam's is"


def _missing(folder: Path, logged: dict[str, Series], tag: str) -> str:
    there = sorted(t for t in logged if "/" not in t or t.startswith(("gradient/", "train")))
    shown = ", ".join(there[:12]) + (", ..." if len(there) > 12 or len(there) < len(logged) else "")
    return (
        f"{printable(folder)} holds no {tag}. It holds: {shown or 'no scalars'}. Add GradientMonitor() or "
        "DynamicsMonitor() to the Trainer's callbacks and train again."
    )


def _summary(found: _Found, options: argparse.Namespace) -> list[str]:
    peak = warmup_end(found.schedule)
    left_out = f", {found.left_out} more were zero or not finite" if found.left_out else ""
    chosen = choice(options.folder, found.run)
    lines = [
        *([chosen] if chosen else []),
        f"schedule      {found.total} steps, from {len(found.readings)} readings of {_TAGS[found.norm]}{left_out}",
        f"norm          {found.norm}: {found.reason}",
        *_held(found),
        f"warm-up       ends at step {peak} ({peak / found.total:.0%} of the run)",
        "",
        "  of the run   factor   linear decay",
    ]
    decay = linear_decay(found.total)
    for share in np.linspace(0, 1, 11):
        step = round(float(share) * (found.total - 1))
        lines.append(f"  {share:10.0%}   {found.schedule[step]:6.3f}   {decay[step]:12.3f}")
    written = [f"{what:<13} {path}" for what, path in (("factors", options.output), ("picture", options.plot)) if path]
    return [*lines, "", *written, *_usage(options.output, found.total)]


def _held(found: _Found) -> list[str]:
    """Say so where the readings end long before the run does."""
    last = int(found.readings.steps[-1])
    if found.total <= 1.5 * last + 100:
        return []
    return [
        f"beware        the readings end at step {last}, other tags at step {found.total - 1}: the last norm is held",
        "              from there on. If those tags have another x axis, as of samples, the schedule is wrong.",
    ]


def _usage(output: Path | None, total: int) -> list[str]:
    if output is None:
        return ["to use it     give --output schedule.npy; the factors multiply the peak learning rate of your own"]
    module, loader = _LOADERS[output.suffix]
    return [
        "to use it     in a run of any length:",
        "",
        f"    {module}",
        "    from torch.optim.lr_scheduler import LambdaLR",
        "    from dynamon.schedule import schedule_factor",
        "",
        f"    factors = {loader.format(str(output))}",
        f"    scheduler = LambdaLR(optimizer, schedule_factor(factors, steps={total}))",
        "",
        'Step it after every optimizer step; in Lightning that is "interval": "step".',
    ]


def _write(path: Path | None, schedule: NDArray[Any]) -> None:
    if path is None:
        return
    if path.suffix == ".npy":
        np.save(path, schedule)
    elif path.suffix == ".json":
        path.write_text(json.dumps(schedule.tolist()))
    else:
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["step", "factor"])
            writer.writerows(enumerate(schedule.tolist()))


def _draw(path: Path, found: _Found) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    steps, norms = found.readings.steps, found.readings.values
    left.plot(steps, norms, ".", color=_GREY, ms=2.5, label=_TAGS[found.norm])
    left.plot(smoothed_norms(norms, steps, found.total), color=_BLUE, label="running median")
    left.set(title=f"{found.norm} norm of the gradient", xlabel="step", yscale="log")
    right.plot(found.schedule, color=_BLUE, label="refined")
    right.plot(linear_decay(found.total), color=_ORANGE, ls="--", lw=1, label="linear decay")
    right.set(title="factor on the learning rate", xlabel="step", ylim=(0, 1.05))
    for axes in (left, right):
        axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def _output(text: str) -> Path:
    path = Path(text)
    if path.suffix not in _LOADERS:
        raise argparse.ArgumentTypeError(f"must end in {', '.join(_LOADERS)}, got {text!r}")
    return path


def _picture(text: str) -> Path:
    path = Path(text)
    if path.suffix != ".png":
        raise argparse.ArgumentTypeError(f"must end in .png, got {text!r}")
    return path
