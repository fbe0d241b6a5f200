"""Which injected faults does ``DynamicsMonitor`` name, how soon, and how often is it wrong on healthy runs?

Run ``python -m benchmarks.faults`` from the repository root (an hour or two on one core), or ``--stages`` and
``--subjects`` for a part, also in several processes. Every run goes to ``benchmarks/results/faults.json`` as it ends,
and what is there is not run again. ``docs/evidence_faults.md`` discusses the result.

Rates are searched, and strengths of faults set, on the tuning seeds: the weakest strength that raises the final loss
by 2 %. Thresholds of the rules are chosen by what the models of ``TUNING`` do; figures are of the models of
``REPORTED``, on other seeds. A finding counts if the run without the fault, with the same weights, batches and monitor,
has none like it.
"""

import argparse
from collections.abc import Sequence
from importlib.util import find_spec

import torch

from benchmarks.environment import RESULTS, parser
from benchmarks.faults.book import Book
from benchmarks.faults.fit import ROWS
from benchmarks.faults.plan import FULL, SMALLEST, Plan, run_faults, run_healthy, set_strengths
from benchmarks.faults.subjects import REPORTED, SUBJECTS, TUNING

STAGES = {"strengths": set_strengths, "faults": run_faults, "healthy": run_healthy}


def parse() -> argparse.Namespace:
    """The command line."""
    command = parser("faults", __doc__)
    command.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES), help="default: all")
    command.add_argument("--subjects", nargs="+", choices=list(SUBJECTS), help="default: those that are reported")
    command.add_argument("--tuning", action="store_true", help="the models and seeds that thresholds are tuned on")
    command.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), help="settings of the monitor")
    command.add_argument("--again", action="store_true", help="forget what the file holds of these stages first")
    return command.parse_args()


def runnable(subjects: Sequence[str]) -> list[str]:
    """Those whose data are there."""
    if find_spec("sklearn") is not None:
        return list(subjects)
    print('skipped: models of digits, since scikit-learn is missing: pip install -c constraints.txt -e ".[bench]".')
    return [name for name in subjects if name not in ("CNN", "MLP")]


def main() -> None:
    """Run what is missing."""
    options = parse()
    torch.set_num_threads(1)
    plan: Plan = SMALLEST if options.smallest else FULL
    path = options.output or (None if options.smallest else RESULTS / "faults.json")
    book = Book(path)
    if options.again:
        book.forget(*options.stages)
    subjects = options.subjects or (TUNING if options.tuning else plan.subjects or REPORTED)
    for stage in options.stages:
        for name in runnable(list(subjects)):
            STAGES[stage](book, SUBJECTS[name], plan, options.rows)


if __name__ == "__main__":
    main()
