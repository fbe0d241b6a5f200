"""``dynamon advise``: learning rates for groups of layers, from what RateAdvisor or a monitor has logged."""

import argparse
from typing import Any

import numpy as np

from dynamon.cli.refusal import refusing
from dynamon.cli.run_argument import RUN_HELP, read_run_argument, run_folder, selection_line
from dynamon.optim.lanton import RADII
from dynamon.rates.advice_text import advice_lines
from dynamon.rates.allocation import BOUNDS, advise, even_out
from dynamon.rates.balanced import balance, check_bounds
from dynamon.rates.groups import kind_of
from dynamon.runs import RunData, read_run_data
from dynamon.runs.folders import printable


def add_parser(commands: Any) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "advise",
        help="advise on learning rates by group of layers, from the readings of RateAdvisor",
        description="Say which groups of layers deserve larger or smaller steps, how certain that is, and what to "
        "paste, from the readings that RateAdvisor logged to TensorBoard or CSVLogger. From those of DynamicsMonitor "
        "alone it tells directions.",
    )
    parser.add_argument("folder", type=run_folder, metavar="RUN", help=RUN_HELP)
    parser.add_argument("--low", type=float, default=BOUNDS[0], help="smallest ratio, at most 1 (default: %(default)s)")
    parser.add_argument(
        "--high", type=float, default=BOUNDS[1], help="largest ratio, at least 1 (default: %(default)s)"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Read a run, compute the advice and print it.

    Args:
        options: The parsed options.

    Returns:
        0, also where the readings do not support an advice, which is then said.

    Raises:
        RefusalError: If the run cannot be read or has no readings of a step.
    """
    with refusing():
        check_bounds(options.low, options.high)
        folder, data = read_run_argument("advise", options.folder, read_run_data)
        lines = _advice(data, options.low, options.high) or _directions(data)
        if lines is None:
            raise ValueError(
                f"{printable(folder)} holds no readings of RateAdvisor. Add RateAdvisor() to the Trainer's callbacks "
                "and train for a few hundred steps."
            )
    selected = selection_line(options.folder, folder)
    for line in [*([selected] if selected else []), *lines]:
        print(line)
    return 0


def _advice(data: RunData, low: float, high: float) -> list[str] | None:
    """Say what the readings of RateAdvisor say; None where there are none."""
    progress, coupling = data.tables.get("advice/progress"), data.tables.get("advice/coupling")
    if progress is None or coupling is None or progress.layers is None:
        return None
    count = len(progress.layers)
    advice = advise(progress.values, coupling.values.reshape(-1, count, count), low=low, high=high)
    steps = f"readings      steps {progress.steps[0]} to {progress.steps[-1]}"
    return [steps, *advice_lines(advice, progress.layers, RADII)]


def _directions(data: RunData) -> list[str] | None:
    """Say in which direction rates should move, by the progress and the curvature cost of layers; None without them."""
    progress, cost = data.tables.get("progress/first_order"), data.tables.get("progress/curvature_cost")
    if progress is None or cost is None or progress.layers is None or progress.values.shape != cost.values.shape:
        return None
    kinds = [kind_of(name) for name in progress.layers]
    groups = list(dict.fromkeys(kinds))
    places = [np.array([kind == group for kind in kinds]) for group in groups]
    p, c = (np.stack([np.nansum(table.values[:, place], 1) for place in places], 1) for table in (progress, cost))
    first, second = even_out(c.sum(1))
    p, c = p / first[:, None], c / second[:, None]
    directions = balance(p, c)
    quotients = (c.mean(0) / p.mean(0)) / (c.sum() / p.sum())
    sure = int(np.count_nonzero(directions))
    lines = [
        f"readings      steps {progress.steps[0]} to {progress.steps[-1]}: {len(p)} of layers, none of RateAdvisor",
        f"advice        directions only: {sure} of {len(groups)} are certain"
        + ("" if sure else ", so all rates stay as they are"),
        "",
        "  curvature per progress   rate        group of layers",
    ]
    for group, direction, quotient, climbs in zip(groups, directions, quotients, p.mean(0) <= 0, strict=True):
        told = {0: "not certain", 1: "raise it", -1: "lower it"}[int(np.sign(direction))]
        shown = "climbs" if climbs else f"{quotient:6.2f}"
        lines.append(f"  {shown:>22}   {told:11} {group}")
    return [
        *lines,
        "  Curvature per progress is relative to that of the whole step: 1 is balanced, more pays too much.",
        "",
        "for ratios    add RateAdvisor() to the Trainer's callbacks: it measures how far to go.",
    ]
