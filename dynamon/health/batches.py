"""A rule on data that come again: nearly the same gradient step after step."""

from collections.abc import Iterator

import numpy as np

from dynamon.health.finding import Finding
from dynamon.health.limits import ALIKE_GRADIENTS, CONSECUTIVE, LONG, UNLIKE_GRADIENTS
from dynamon.health.loss import Loss
from dynamon.health.series import find_stretches
from dynamon.runs.history import RunData


def repeated_batches(data: RunData, loss: Loss) -> Iterator[Finding]:
    """Find successive gradients that were unlike each other, as those of batches are, and from some step on are alike.

    Descent on all samples at once has such gradients from its first step on, and so may the first steps of any run.
    """
    series = data.scalars.get("gradient/cosine")
    if series is None:
        return
    known = np.isfinite(series.values)
    steps, cosines = series.steps[known], series.values[known]
    for begin, stop in find_stretches(cosines >= ALIKE_GRADIENTS, CONSECUTIVE):
        past = np.sort(cosines[max(begin - LONG, 0) : begin])
        if len(past) < LONG or np.median(past) > UNLIKE_GRADIENTS:
            continue
        step, before, now = int(steps[begin]), float(np.median(past)), float(np.median(cosines[begin:stop]))
        yield Finding(
            "gradient/repeated",
            "warning",
            step,
            f"Each step's gradient has been that of the step before since step {step}: their cosine, {before:.2f} "
            f"until then, was {now:.2f} in the median of {stop - begin} readings.",
            "Look whether the data loader gives the same batch again and again: an iterator that is made anew at each "
            "step, a cached batch, a sampler with one index.",
            numbers={"before": before, "now": now, "readings": stop - begin},
            tags=("gradient/cosine", "noise/dual"),
        )
        return
