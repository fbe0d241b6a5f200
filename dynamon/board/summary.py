"""Summarise a run in one row of a table of runs."""

import math
from typing import Any

import numpy as np

from dynamon.health import SEVERITIES, Examination
from dynamon.runs.history import RunData

_MONITORED = "lr-"  # what Lightning's LearningRateMonitor writes


def summarise(run: RunData, examined: Examination) -> dict[str, Any]:
    """Summarise a run.

    Args:
        run: The run.
        examined: What :func:`dynamon.health.examine` returned for it.

    Returns:
        For JSON, None where a value is not known and text where it is not finite: ``steps``; ``rate``, the highest
        base learning rate; ``loss``, the tag of the training loss; ``final`` and ``lowest``, of its running
        median; ``ratio``, the highest converged stability ratio; ``counts`` of findings by severity; ``share`` of its
        files that was read, 1.
    """
    loss = examined.loss
    level = loss.level
    return {
        "steps": run.last_step + 1,
        "rate": _highest(run, "lr/base") or _highest(run, *(tag for tag in run.scalars if tag.startswith(_MONITORED))),
        "loss": loss.tags[0] if loss.tags else None,
        "final": "nan" if loss.is_broken else _plain(float(level[-1])) if len(level) else None,
        "lowest": _plain(float(level.min())) if len(level) else None,
        "ratio": _highest(run, "sharpness/stability_ratio"),
        "counts": {kind: sum(one.severity == kind for one in examined.findings) for kind in SEVERITIES},
        "share": 1,
    }


def _highest(run: RunData, *tags: str) -> float | str | None:
    """Return the highest value of some tags that is not NaN."""
    values = [run.scalars[tag].values for tag in tags if tag in run.scalars]
    known = np.concatenate(values) if values else np.zeros(0)
    known = known[~np.isnan(known)]
    return _plain(float(known.max())) if len(known) else None


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
