"""Under a budget the first process decides for all when to measure."""

from typing import TYPE_CHECKING

from dynamon.monitoring.cadence import NEVER

if TYPE_CHECKING:
    from dynamon.monitoring.run_context import RunContext

_AFTER_FAILURE = 100  # steps after which the first process tries again, where it could not decide


def review(run: "RunContext") -> None:
    """Plan the readings to come, the same on all processes.

    The clock and the costs of the first process count. Every process calls this at the end of the same steps: of those
    that were measured, and of those at which the last plan says so.

    Cost: one broadcast of a few numbers where there are several processes.
    """
    if not run.ranks.is_distributed:
        run.planner.take(run.planner.review(run.step, run.steps_seen))
        return
    with run.charge("decision", waits=True):
        run.planner.take(run.ranks.broadcast_from_rank0(_proposal(run)))


def _proposal(run: "RunContext") -> list[float]:
    """Return what this process has to say. The others wait for the first one, so it must say something."""
    nothing = [*(NEVER for _ in run.planner.plans), run.step + float(_AFTER_FAILURE)]
    if run.ranks.rank:
        return nothing
    try:
        return run.planner.review(run.step, run.steps_seen)
    except Exception as error:  # the others wait for what the first process says
        own = [plan.name for plan in run.planner.plans if plan.budget is run.budget]
        if own:
            run.unsettled.setdefault(own[0], error)
        return nothing
