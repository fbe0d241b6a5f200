"""``dynamon schedule``: compute a learning-rate schedule from the gradient norms of a finished run."""

import argparse
import csv
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynamon.cli.plots import draw_schedule
from dynamon.cli.refusal import refusing
from dynamon.cli.run_argument import RUN_HELP, read_run_argument, run_folder, selection_line
from dynamon.runs import last_step, read_run
from dynamon.runs.folders import printable
from dynamon.runs.history import Series
from dynamon.schedule import (
    FEWEST_READINGS,
    linear_decay,
    refined_schedule,
    usable_readings,
    warmup_end,
)

_TAGS = {"l2": "gradient/norm", "l1": "gradient/norm_l1"}
_LOADERS = {
    ".npy": ("import numpy as np", "np.load({!r})"),
    ".json": ("import json, pathlib", "json.loads(pathlib.Path({!r}).read_text())"),
    ".csv": ("import numpy as np", 'np.loadtxt({!r}, delimiter=",", skiprows=1)[:, 1]'),
}


def add_parser(commands: Any) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "schedule",
        help="make a learning-rate schedule from the gradient norms of a finished run",
        description="Make the refined schedule of Defazio et al. (arXiv 2310.07831) from the gradient norms that "
        "GradientMonitor or DynamicsMonitor logged to TensorBoard or CSVLogger.",
    )
    parser.add_argument("folder", type=run_folder, metavar="RUN", help=RUN_HELP)
    parser.add_argument(
        "--norm",
        choices=["auto", *_TAGS],
        default="auto",
        help="norm of the gradients: l1 for Adam and its variants, l2 for SGD; auto decides by what was logged",
    )
    parser.add_argument(
        "-o", "--output", type=_output, metavar="FILE", help="write the factors to FILE: .npy, .csv or .json"
    )
    parser.add_argument("--plot", type=_png, metavar="FILE.png", help="draw schedule and norms (needs matplotlib)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Read a run, refine the schedule, write and print it.

    Args:
        options: The parsed options.

    Returns:
        0.

    Raises:
        RefusalError: If the run cannot be read or has too few readings, or a file cannot be written.
    """
    with refusing():
        if options.plot is not None and importlib.util.find_spec("matplotlib") is None:
            raise ValueError("--plot needs matplotlib: pip install 'lightning-dynamon[demo]'")
        refined = _refine(options.folder, options.norm)
        if options.output is not None:
            _write(options.output, refined.schedule)
        if options.plot is not None:
            tag = _TAGS[refined.norm]
            draw_schedule(options.plot, refined.schedule, refined.readings, refined.norm, tag)
    for line in _summary(refined, options):
        print(line)
    return 0


@dataclass(frozen=True)
class _Refined:
    """A refined schedule and the readings that it was computed from."""

    run: Path
    norm: str
    reason: str  # for the norm
    readings: Series  # finite and not zero
    excluded: int
    total: int
    schedule: NDArray[Any]


def _refine(folder: Path, requested: str) -> _Refined:
    run, logged = read_run_argument("schedule", folder, read_run)
    norm, reason = _choose_norm(logged, requested)
    tag = _TAGS[norm]
    if tag not in logged:
        raise ValueError(_missing(run, logged, tag))
    series, total = logged[tag], last_step(logged) + 1
    usable = usable_readings(series.values)
    if usable.sum() < FEWEST_READINGS:
        raise ValueError(
            f"{printable(run)} holds {usable.sum()} readings of {tag} that are finite and not zero, and it takes "
            f"{FEWEST_READINGS}. Log more with GradientMonitor(every_n_steps=...) or a larger budget; linear decay "
            "needs none."
        )
    series = Series(series.steps[usable], series.values[usable])
    schedule = refined_schedule(series.values, norm=norm, steps=series.steps, total=total)
    return _Refined(run, norm, reason, series, int((~usable).sum()), total, schedule)


def _choose_norm(logged: dict[str, Series], requested: str) -> tuple[str, str]:
    """Return the norm and the reason; for Adam and its variants the logged dual norms are l1 norms."""
    if requested != "auto":
        return requested, "given by --norm"
    dual, l1 = logged.get("gradient/norm_dual"), logged.get(_TAGS["l1"])
    if dual is None or l1 is None:
        return "l2", f"{_TAGS['l1']} was not logged"
    if dual.values.shape == l1.values.shape and np.allclose(dual.values, l1.values, rtol=1e-4, equal_nan=True):
        return "l1", "the optimizer's dual norm is the l1 norm, as for Adam"
    return "l2", "the optimizer's dual norm is not the l1 norm"


def _missing(folder: Path, logged: dict[str, Series], tag: str) -> str:
    tags = sorted(t for t in logged if "/" not in t or t.startswith(("gradient/", "train")))
    shown = ", ".join(tags[:12]) + (", ..." if len(tags) > 12 or len(tags) < len(logged) else "")
    return (
        f"{printable(folder)} holds no {tag}. It holds: {shown or 'no scalars'}. Add GradientMonitor() or "
        "DynamicsMonitor() to the Trainer's callbacks and train again."
    )


def _summary(refined: _Refined, options: argparse.Namespace) -> list[str]:
    peak = warmup_end(refined.schedule)
    excluded = f", {refined.excluded} more were zero or not finite" if refined.excluded else ""
    selected = selection_line(options.folder, refined.run)
    readings = f"{len(refined.readings)} readings of {_TAGS[refined.norm]}{excluded}"
    lines = [
        *([selected] if selected else []),
        f"schedule      {refined.total} steps, from {readings}",
        f"norm          {refined.norm}: {refined.reason}",
        *_extrapolation_lines(refined),
        f"warm-up       ends at step {peak} ({peak / refined.total:.0%} of the run)",
        "",
        "  of the run   factor   linear decay",
    ]
    decay = linear_decay(refined.total)
    for share in np.linspace(0, 1, 11):
        step = round(float(share) * (refined.total - 1))
        lines.append(f"  {share:10.0%}   {refined.schedule[step]:6.3f}   {decay[step]:12.3f}")
    written = [f"{what:<13} {path}" for what, path in (("factors", options.output), ("picture", options.plot)) if path]
    return [*lines, "", *written, *_usage(options.output, refined.total)]


def _extrapolation_lines(refined: _Refined) -> list[str]:
    """Warn if the readings end long before the run does."""
    last = int(refined.readings.steps[-1])
    if refined.total <= 1.5 * last + 100:
        return []
    return [
        f"warning       the readings end at step {last}, other tags at step {refined.total - 1}: the last norm is used",
        "              from there on. If those tags count something else than steps, the schedule is wrong.",
    ]


def _usage(output: Path | None, total: int) -> list[str]:
    if output is None:
        return ["to use it     give --output schedule.npy; the factors multiply your own peak learning rate"]
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


def _output(text: str) -> Path:
    path = Path(text)
    if path.suffix not in _LOADERS:
        raise argparse.ArgumentTypeError(f"must end in {', '.join(_LOADERS)}, got {text!r}")
    return path


def _png(text: str) -> Path:
    path = Path(text)
    if path.suffix != ".png":
        raise argparse.ArgumentTypeError(f"must end in .png, got {text!r}")
    return path
