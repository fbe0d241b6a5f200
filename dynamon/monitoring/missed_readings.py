"""Say what a budget did not pay for, and what would have it measured."""

import math
from collections.abc import Iterable

from dynamon.monitoring.budget import Budget
from dynamon.monitoring.messages import rank_zero_info
from dynamon.monitoring.meter import Meter
from dynamon.monitoring.run_context import RunContext


def say_late(monitor: str, run: RunContext, grace: float) -> None:
    """Say which first readings the grace does not pay for, and when they come.

    Args:
        monitor: Who speaks.
        run: The run.
        grace: Seconds of grace at the start.
    """
    for plan, seconds, step in run.planner.late():
        when = "none is planned so far" if math.isinf(step) else f"the first is planned at step {step:.0f}"
        rank_zero_info(
            f"{monitor}: one {plan.name} reading takes about {seconds:.2g} s, more than grace={grace:.3g} has left: "
            f"{when}. Raise grace or budget to have it sooner."
        )


def say_missed(monitor: str, run: RunContext, missed: Iterable[Meter], grace: float) -> None:
    """Say which meters had no reading in a run that is over, and what one takes.

    Args:
        monitor: Who speaks.
        run: The run.
        missed: The meters.
        grace: Seconds of grace at the start.
    """
    fraction = run.budget.fraction or 0.0
    for meter in missed:
        seconds = meter.expected(run)
        takes = "is not known to fit" if seconds is None else f"takes about {seconds:.2g} s"
        rank_zero_info(
            f"{monitor}: no {meter.name} reading in this run: one {takes}, and a budget of {fraction:.3g} with a grace "
            f"of {grace:.3g} s gave all of them {fraction * run.budget.training + grace:.2g} s"
            f"{_bookkeeping(run.budget)}. Raise budget or grace, or set every_n_steps."
        )


def _bookkeeping(budget: Budget) -> str:
    """Say how much of a budget went into per-step bookkeeping, where that is much: where steps are short."""
    spent, given = budget.spent_on.get("hooks", 0.0), (budget.fraction or 0) * budget.training
    took = f", of which per-step bookkeeping took {spent:.2g} s (steps are very short)"
    return took if spent > given / 4 else ""
