"""Rules on steering at its bounds, measurements that failed, and those that were never taken."""

from collections.abc import Iterator

import numpy as np

from dynamon.health.finding import Finding
from dynamon.health.limits import LONG
from dynamon.health.loss import Loss
from dynamon.health.series import final_stretch
from dynamon.runs.history import RunData

_RAISE = "raise budget, set every_n_steps, or measure fewer quantities; a run of some hundred steps needs more."
_EIGENVALUES = ("stability_ratio", "hessian_max", "preconditioned_max", "ggn_max")


def steering_at_bounds(data: RunData, loss: Loss) -> Iterator[Finding]:
    """Find steering that holds half of the layers at a bound of the rule for long."""
    bounded, table = data.scalars.get("lr/bounded"), data.tables.get("lr/ratio")
    if bounded is None or table is None or not len(bounded):
        return
    layers = len(table.layers or ())
    most = bounded.values >= max(layers / 2, 1)
    start = final_stretch(most)
    if len(most) - start < max(LONG, len(most) / 4):
        return
    count, low = float(np.median(bounded.values[start:])), float(np.nanmin(table.values))
    last = table.values[-1]
    at_bound = [i for i in range(layers) if last[i] <= low * 1.001 or last[i] >= float(np.nanmax(table.values)) > 1]
    yield Finding(
        "lr/bounded",
        "warning",
        int(bounded.steps[start]),
        f"Steering holds {count:.0f} of {layers} layers at a bound of the rule, for {len(most) - start} readings.",
        "The rule asks for more than its bounds allow: lower the base rate, or raise alpha for milder ratios, "
        "before you widen the bounds.",
        tuple((table.layers or ())[i] for i in at_bound),
        {"layers": count, "ratio": low},
        ("lr/bounded", "lr/ratio"),
    )


def failed_measurements(data: RunData, loss: Loss) -> Iterator[Finding]:
    """Find measurements that failed."""
    series = data.scalars.get("dynamon/failures")
    if series is not None and len(series) and series.values.max() > 0:
        first, count = int(np.argmax(series.values > 0)), float(series.values.max())
        yield Finding(
            "dynamon/failures",
            "warning",
            int(series.steps[first]),
            f"{count:.0f} measurements of dynamon failed; training was not affected.",
            "The run's log gives each cause once; with strict=True it is raised instead. After three consecutive "
            "failures a measurement pauses.",
            numbers={"failures": count},
            tags=("dynamon/failures",),
        )


def solves(data: RunData) -> tuple[int, int]:
    """Count the eigenvalue solves that converged, and those that did not."""

    def count(ending: str) -> int:
        return sum(len(data.scalars.get(f"sharpness/{name}{ending}", ())) for name in _EIGENVALUES)

    return count(""), count("_unconverged")


def missing_readings(data: RunData, loss: Loss) -> Iterator[Finding]:
    """Find readings that the budget did not allow, only if related ones exist: else they were not requested."""
    scalars, overhead = data.scalars, data.scalars.get("dynamon/overhead")
    if not data.has_readings:
        yield Finding(
            "dynamon/nothing",
            "note",
            max(data.last_step, 0),
            "This run holds no readings of dynamon.",
            "Add DynamicsMonitor() from dynamon.callbacks to the Trainer's callbacks."
            if overhead is None
            else "A monitor was present. Where the log says that something is off, do as it says there. Else, if "
            "optimizers took steps: " + _RAISE,
        )
        return
    converged, unsolved = solves(data)
    along = any(f"sharpness/{name}" in scalars for name in ("directional", "critical", "critical_multiple"))
    everything = "gradient/norm" in scalars and "weight/operator" in data.tables
    failed = "dynamon/failures" in scalars and scalars["dynamon/failures"].values[-1] > 0  # which gives the reason
    if overhead is not None and not converged and not unsolved and (along or everything) and not failed:
        share = float(overhead.values[-1])
        yield Finding(
            "dynamon/no_sharpness",
            "note",
            max(data.last_step, 0),
            f"There is no eigenvalue of the curvature in this run; monitoring took {share:.2%} of training time.",
            "If a monitor was to measure it: where the log says that it is off, do as it says there; else its budget "
            "was too small: " + _RAISE,
            numbers={"overhead": share},
            tags=("dynamon/overhead",),
        )
    if unsolved >= 4 and unsolved > converged:
        yield Finding(
            "sharpness/unconverged",
            "note",
            max(data.last_step, 0),
            f"{unsolved} of {converged + unsolved} eigenvalue solves did not converge: their values are lower bounds, "
            "up to the error of products where these are differences of gradients.",
            "Raise max_matvecs or tol of SharpnessMonitor.",
            numbers={"unconverged": unsolved, "converged": converged},
            tags=("sharpness/stability_ratio_unconverged",),
        )
