"""What looks wrong in a run, in plain words: rules over what was measured, while it goes on or afterwards.

A rule speaks when several readings in a row say the same, and compares medians, so that noise alone raises nothing. It
sees what was wrong from the first reading on, and what is wrong everywhere. What it compares with stands in
:mod:`dynamon.health.limits`. Sharpness at the threshold is normal training and no finding, and so is what was chosen: a
layer that is frozen, a rate or a ratio of 0.

Rules rest on the loss that ``training_step`` returned; where only logged tags are known, :func:`judged_loss` says which
one was taken, and why.
"""

from collections.abc import Callable, Iterator, Mapping

from dynamon.health.finding import SEVERITIES, Finding
from dynamon.health.gradients import (
    dead_gradients,
    growing_gradients,
    hard_clipping,
    no_gradients,
    nonfinite_gradients,
    unused_layers,
    vanished_by_clipping,
)
from dynamon.health.loss import (
    LOSS_TAG,
    JudgedLoss,
    Loss,
    broken_loss,
    constant_loss,
    diverging,
    judged_loss,
    loss_tag,
    unstable,
)
from dynamon.health.monitoring import failed_measurements, missing_readings, steering_at_bounds
from dynamon.health.weights import collapsed_ranks, exploding_weights, large_updates, no_updates, stopped_layers
from dynamon.runs.history import RunData, Series

__all__ = ["LOSS_TAG", "SEVERITIES", "Finding", "JudgedLoss", "findings", "judged_loss", "loss_tag"]

RULES: tuple[Callable[[RunData, Loss], Iterator[Finding]], ...] = (
    broken_loss,
    diverging,
    constant_loss,
    unstable,
    nonfinite_gradients,
    no_gradients,
    vanished_by_clipping,
    growing_gradients,
    hard_clipping,
    no_updates,
    stopped_layers,
    large_updates,
    dead_gradients,
    unused_layers,
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
        loss: Tag of the training loss; None leaves it to :func:`judged_loss`.

    Returns:
        The findings, the worst first and of those the earliest.
    """
    data = run if isinstance(run, RunData) else RunData.of(run)
    known = Loss(data.scalars, judged_loss(data.scalars, loss))
    found = [finding for rule in RULES for finding in rule(data, known)]
    return sorted(found, key=lambda finding: (SEVERITIES.index(finding.severity), finding.step))
