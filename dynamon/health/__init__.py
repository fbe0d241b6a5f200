"""Find out what looks wrong in a run: rules over its readings, during the run or afterwards.

A rule reports only what several consecutive readings show, and compares medians, so that noise alone raises nothing. It
detects what was wrong from the first reading on, and what is wrong in all layers. Its thresholds are in
:mod:`dynamon.health.limits`. Sharpness at the threshold is normal training and not a finding, and neither is what was
chosen: a frozen layer, a rate or a ratio of 0.

Rules use the loss that ``training_step`` returned. If only logged tags are known, :func:`judged_loss` returns which one
is used, and why.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dynamon.health.checks import NAMES, RULES
from dynamon.health.finding import SEVERITIES, Finding
from dynamon.health.loss import LOSS_TAG, JudgedLoss, Loss, judged_loss, loss_tag
from dynamon.health.rule import Check
from dynamon.runs.history import RunData, Series

__all__ = [
    "LOSS_TAG",
    "NAMES",
    "SEVERITIES",
    "Check",
    "Examination",
    "Finding",
    "JudgedLoss",
    "examine",
    "findings",
    "judged_loss",
    "loss_tag",
]


@dataclass(frozen=True)
class Examination:
    """Hold what :func:`examine` returns.

    Attributes:
        findings: What looks wrong, the most severe first, and of equal ones the earliest.
        checks: What each rule checked, with the value that it saw.
        loss: The training loss as the rules see it.
    """

    findings: list[Finding]
    checks: list[Check]
    loss: Loss


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
    data, known = _known(run, loss)
    return _sorted(finding for rule in RULES for finding in rule.find(data, known))


def examine(run: RunData | Mapping[str, Series], loss: str | None = None) -> Examination:
    """Apply all rules, and list what each of them saw.

    Args:
        run: As for :func:`findings`.
        loss: Likewise.

    Raises:
        TypeError: Likewise.

    Cost: twice that of :func:`findings` at most.

    Example:
        >>> import numpy as np
        >>> from dynamon.health import examine
        >>> from dynamon.runs import Series
        >>> examined = examine({"train/loss": Series(np.arange(20), 1 / np.arange(1, 21))})
        >>> examined.checks[0].words, examined.checks[0].value
        ('loss is finite', '0 of 20 readings not finite')
    """
    data, known = _known(run, loss)
    found = [list(rule.find(data, known)) for rule in RULES]
    checks = [
        Check(rule.words, rule.seen(data, known), rule.limit, rule.needs, _worst(own))
        for rule, own in zip(RULES, found, strict=True)
    ]
    return Examination(_sorted(finding for own in found for finding in own), checks, known)


def _known(run: RunData | Mapping[str, Series], loss: str | None) -> tuple[RunData, Loss]:
    if not isinstance(run, RunData | Mapping):
        raise TypeError(f"run must be RunData or a mapping of tags to series, got {type(run).__name__}.")
    data = run if isinstance(run, RunData) else RunData.of(run)
    return data, Loss(data.scalars, judged_loss(data.scalars, loss))


def _sorted(found: Iterable[Finding]) -> list[Finding]:
    return sorted(found, key=lambda finding: (SEVERITIES.index(finding.severity), finding.step))


def _worst(found: list[Finding]) -> str | None:
    return min((finding.severity for finding in found), key=SEVERITIES.index, default=None)
