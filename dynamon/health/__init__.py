"""Find out what looks wrong in a run: rules over its readings, during the run or afterwards.

A rule reports only what several consecutive readings show, and compares medians, so that noise alone raises nothing. It
detects what was wrong from the first reading on, and what is wrong in all layers. Its thresholds are in
:mod:`dynamon.health.limits`. Sharpness at the threshold is normal training and not a finding, and neither is what was
chosen: a frozen layer, a rate or a ratio of 0.

Rules use the loss that ``training_step`` returned. If only logged tags are known, :func:`judged_loss` returns which one
is used, and why.
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
        run: A run: :func:`dynamon.runs.read_run_data`, or a monitor's ``history``, also during training.
        loss: Tag of the training loss; None leaves it to :func:`judged_loss`.

    Returns:
        The findings, the most severe first, and of equal ones the earliest.

    Raises:
        TypeError: If ``run`` is neither.

    Example:
        >>> import numpy as np
        >>> from dynamon.health import findings
        >>> from dynamon.runs import Series
        >>> values = np.where(np.arange(20) < 12, 1.0, np.nan)
        >>> found, *_ = findings({"train/loss": Series(np.arange(0, 200, 10), values)})
        >>> found.rule, found.severity, found.step
        ('loss/nonfinite', 'fault', 120)
    """
    if not isinstance(run, RunData | Mapping):
        raise TypeError(f"run must be RunData or a mapping of tags to series, got {type(run).__name__}.")
    data = run if isinstance(run, RunData) else RunData.of(run)
    known = Loss(data.scalars, judged_loss(data.scalars, loss))
    found = [finding for rule in RULES for finding in rule(data, known)]
    return sorted(found, key=lambda finding: (SEVERITIES.index(finding.severity), finding.step))
