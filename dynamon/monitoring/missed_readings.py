"""Say what a budget did not pay for, and what would have it measured."""

import math
from collections.abc import Iterable

from dynamon.monitoring.budget import Budget
from dynamon.monitoring.messages import rank_zero_info
from dynamon.monitoring.meter import Meter
from dynamon.monitoring.run_context import RunContext

_FIRST_DUE = 2  # steps before the first planned reading


def say_late(monitor: object, run: RunContext) -> None:
    """Say which first readings the grace does not pay for, and when they come.

    Args:
        monitor: Who speaks.
        run: The run.
    """
    unknown: dict[str, float] = {}
    who, grace = type(monitor).__name__, run.budget.ledger.grace
    for plan, seconds, step in run.planner.late(monitor):
        if not seconds or plan.name == "probe":  # which tells what sharpness costs
            name = "sharpness" if plan.name in ("probe", "steps") else plan.name
            unknown[name] = min(step, unknown.get(name, math.inf))
        elif seconds > run.budget.left:
            takes = f"one {_known_as(plan.name)} reading takes about {seconds:.2g} s"
            rank_zero_info(
                f"{who}: {takes}, more than grace={grace:.3g} has left: {_when(step)}. Raise grace or budget to "
                "have it sooner."
            )
    for name, step in unknown.items():
        rank_zero_info(
            f"{who}: no {name} reading so far, and what one takes is not known yet: {_when(step)}. Raise grace or "
            "budget to have it sooner."
        )


def _known_as(name: str) -> str:
    """Return what users call a group of quantities."""
    return {"probe": "sharpness", "steps": "step sharpness"}.get(name, name)


def _when(step: float) -> str:
    return "none is planned so far" if math.isinf(step) else f"the first is planned at step {step:.0f}"


def say_missed(monitor: str, run: RunContext, missed: Iterable[Meter]) -> None:
    """Say which meters had no reading in a run that is over, and what one takes.

    Args:
        monitor: Who speaks.
        run: The run.
        missed: The meters.
    """
    ledger = run.budget.ledger
    too_short: list[str] = []
    for meter in missed:
        seconds, name = meter.expected(run), _known_as(meter.name)
        if (reason := meter.missed_reason()) is not None:
            rank_zero_info(f"{monitor}: no {name} reading in this run: {reason}")
            continue
        if run.steps_seen <= _FIRST_DUE and (seconds is None or seconds <= run.budget.left):
            too_short.append(name)
            continue
        takes = "what one takes is not known" if seconds is None else f"one takes about {seconds:.2g} s"
        rank_zero_info(
            f"{monitor}: no {name} reading in this run: {takes}, and a budget of {ledger.fraction:.3g} with a grace "
            f"of {ledger.grace:.3g} s gave all of them {ledger.allowed:.2g} s"
            f"{_bookkeeping(run.budget)}. Raise budget or grace, or set every_n_steps."
        )
    if too_short:
        steps = f"{run.steps_seen} step{'s' * (run.steps_seen != 1)}"
        rank_zero_info(
            f"{monitor}: no reading of {', '.join(too_short)} in this run: it ended after {steps}, before the first "
            "was due. every_n_steps=1 reads from the first step on."
        )


def _bookkeeping(budget: Budget) -> str:
    """Say how much of a budget went into per-step bookkeeping, where that is much: where steps are short."""
    spent, given = budget.spent_on.get("hooks", 0.0), (budget.fraction or 0) * budget.training
    took = f"; per-step bookkeeping alone took {spent:.2g} s (steps are very short)"
    return took if spent > given / 4 else ""
