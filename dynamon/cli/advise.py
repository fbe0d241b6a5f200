"""``dynamon advise``: learning rates for groups of layers, from what RateAdvisor has logged."""

import argparse
from pathlib import Path
from typing import Any

from dynamon.cli.refusal import refusing
from dynamon.cli.run_argument import RUN_HELP, read_run_argument, selection_line
from dynamon.optim.lanton import RADII
from dynamon.rates.advice_text import advice_lines
from dynamon.rates.allocation import BOUNDS, advise
from dynamon.rates.balanced import check_bounds
from dynamon.runs import read_run_data
from dynamon.runs.folders import printable


def add_parser(commands: Any) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "advise",
        help="advise on learning rates by group of layers, from the readings of RateAdvisor",
        description="Say which groups of layers deserve larger or smaller steps, how certain that is, and what to "
        "paste, from the readings that RateAdvisor logged to TensorBoard or CSVLogger.",
    )
    parser.add_argument("folder", type=Path, metavar="RUN", help=RUN_HELP)
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
        RefusalError: If the run cannot be read or has no readings of RateAdvisor.
    """
    with refusing():
        check_bounds(options.low, options.high)
        folder, data = read_run_argument("advise", options.folder, read_run_data)
        progress, coupling = data.tables.get("advice/progress"), data.tables.get("advice/coupling")
        if progress is None or coupling is None or progress.layers is None:
            raise ValueError(
                f"{printable(folder)} holds no readings of RateAdvisor. Add RateAdvisor() to the Trainer's callbacks "
                "and train for a few hundred steps."
            )
        names, count = progress.layers, len(progress.layers)
        advice = advise(progress.values, coupling.values.reshape(-1, count, count), low=options.low, high=options.high)
    selected = selection_line(options.folder, folder)
    steps = f"readings      steps {progress.steps[0]} to {progress.steps[-1]}"
    for line in [*([selected] if selected else []), steps, *advice_lines(advice, names, RADII)]:
        print(line)
    return 0
