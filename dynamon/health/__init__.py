"""What looks wrong in a run, in plain words: rules over what was measured, while it goes on or afterwards.

A rule speaks when several readings in a row say the same, and compares medians, so that noise alone raises nothing.
Sharpness at the threshold is normal training and no finding.
"""

from collections.abc import Callable, Iterator, Mapping

from dynamon.health.finding import SEVERITIES, Finding
from dynamon.health.gradients import dead_gradients, growing_gradients, nonfinite_gradients, vanished_by_clipping
from dynamon.health.loss import Loss, broken_loss, diverging, loss_tag, unstable
from dynamon.health.measuring import failed_measurements, missing_readings, steering_at_bounds
from dynamon.health.weights import collapsed_ranks, exploding_weights, stopped_layers
from dynamon.history import RunData, Series

__all__ = ["SEVERITIES", "Finding", "findings", "loss_tag"]

RULES: tuple[Callable[[RunData, Loss], Iterator[Finding]], ...] = (
    broken_loss,
    diverging,
    unstable,
    nonfinite_gradients,
    vanished_by_clipping,
    growing_gradients,
    stopped_layers,
    dead_gradients,
    exploding_weights,
    collapsed_ranks,
    steering_at_bounds,
    failed_measurements,
    missing_readings,
)


def findings(run: RunData | Mapping[str, Series], loss: str | None = None) -> list[Finding]:
    """Apply all rules.

    Args:
        run: What is known of a run: :func:`dynamon.runs.read_run_data`, or a monitor's ``history`` while it trains.
        loss: Tag of the training loss; None looks for one, and takes the loss on the probe where there is none.

    Returns:
        The findings, the worst first and of those the earliest.
    """
    data = run if isinstance(run, RunData) else RunData.of(run)
    known = Loss(data.scalars, loss or loss_tag(data.scalars))
    found = [finding for rule in RULES for finding in rule(data, known)]
    return sorted(found, key=lambda finding: (SEVERITIES.index(finding.severity), finding.step))
