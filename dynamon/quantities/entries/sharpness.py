"""Curvature of the loss: eigenvalues on the probe, the step in it, and how far the step could go."""

from collections.abc import Iterator
from functools import partial

from dynamon.quantities.registry import ALWAYS, Condition, Quantity, Scope

SUBSPACE = 5  # eigenvectors in the top eigenspace

_LOSS = "loss / weight²"
_RATIO = "stability ratio (1: the largest stable step)"
_TOP = "top Hessian eigenvalue and where plain SGD becomes unstable"
_SHARES = "share of gradient and update in the top eigenspace"
_ALONG = "sharpness along the step and on the batch"
_FAR = "how far the last step could go (1: as far as it went)"
_solved_for = partial(Quantity, cadence="sharpness")
_along_step = partial(Quantity, cadence="steps")


def _solve(
    tag: str, meaning: str, unit: str, choice: str, condition: Condition = ALWAYS, chart: str = "", row: str = ""
) -> Iterator[Quantity]:
    """The quantities of one eigenvalue: a value that did not converge has a tag of its own."""
    one = partial(_solved_for, choice=choice)
    yield one(f"sharpness/{tag}", meaning, unit, condition=condition | Condition.CONVERGED, chart=chart, row=row)
    yield one(f"sharpness/{tag}_upper", "99 % upper bound on it", unit, every=10, condition=condition, chart=chart)
    yield one(
        f"sharpness/{tag}_residual", "residual of its eigenpair, relative to the value", "none", condition=condition
    )
    yield one(
        f"sharpness/{tag}_unconverged",
        "its value then, a lower bound only",
        unit,
        condition=condition | Condition.UNCONVERGED,
        chart=chart,
    )


SHARPNESS = (
    *_solve(
        "stability_ratio",
        "largest eigenvalue of the update's own Hessian; 1 is the largest stable step",
        "none",
        "stability_ratio",
        Condition.STABILITY_FORMULA,
        _RATIO,
        "stability ratio",
    ),
    _solved_for(
        "sharpness/excluded_coordinates",
        "coordinates left out because the optimizer has never seen them move",
        "coordinates",
        choice="stability_ratio",
        condition=Condition.STABILITY_FORMULA,
    ),
    *_solve(
        "stability_ratio_next",
        "the ratio of the step that would be taken on the probe: Adam's second moment has seen its gradient",
        "none",
        "next",
        Condition.STABILITY_FORMULA | Condition.SECOND_MOMENT,
        _RATIO,
    ),
    *_solve("hessian_max", "largest eigenvalue of the Hessian", _LOSS, "hessian", ALWAYS, _TOP, "top eigenvalue"),
    _solved_for(
        "sharpness/hessian_min",
        "smallest Ritz value: an upper bound on the smallest eigenvalue",
        _LOSS,
        choice="hessian",
        chart="smallest Ritz value",
    ),
    _solved_for(
        "sharpness/threshold",
        "the eigenvalue at which plain gradient descent becomes unstable",
        _LOSS,
        choice="hessian",
        condition=Condition.ONE_THRESHOLD,
        chart=_TOP,
    ),
    *_solve(
        "preconditioned_max",
        "largest eigenvalue of the Hessian between P^-1/2 (Adam's P)",
        "1 / rate",
        "preconditioned",
        Condition.SECOND_MOMENT,
    ),
    *_solve("ggn_max", "largest eigenvalue of the Gauss-Newton matrix", _LOSS, "ggn"),
    _solved_for(
        "sharpness/hessian_max_bracket",
        "the probe's top direction on other samples: below the full loss's eigenvalue",
        _LOSS,
        every=10,
        choice="bracket",
        condition=Condition.OTHER_SAMPLES,
        chart=_TOP,
    ),
    _solved_for(
        "sharpness/stability_ratio_bracket",
        "the same for the stability ratio",
        "none",
        every=10,
        choice="bracket",
        condition=Condition.STABILITY_FORMULA | Condition.OTHER_SAMPLES,
    ),
    _solved_for(
        "sharpness/gradient_share",
        f"share of the gradient in the top eigenspace of {SUBSPACE} vectors",
        "0 to 1",
        choice="subspace",
        chart=_SHARES,
    ),
    _solved_for("sharpness/update_share", "share of the last update in it", "0 to 1", choice="subspace", chart=_SHARES),
    _solved_for(
        "sharpness/eigenspace_overlap",
        "overlap with the eigenspace of the measurement before",
        "0 to 1",
        choice="subspace",
        chart=_SHARES,
    ),
    _solved_for("sharpness/trace", "trace of the Hessian", _LOSS, choice="trace"),
    _solved_for("sharpness/trace_error", "its standard error", _LOSS, choice="trace"),
    _solved_for(
        "sharpness/outliers",
        "eigenvalues that stand apart above the bulk of the Hessian's spectrum",
        "eigenvalues",
        choice="density",
    ),
    _solved_for("sharpness/bulk_edge", "where that bulk ends", _LOSS, choice="density"),
    _solved_for(
        "sharpness/block",
        "largest eigenvalue of the layer's own block",
        _LOSS,
        scope=Scope.PER_LAYER,
        scale="log",
        choice="blocks",
        words="sharpness of the layer's block",
    ),
    _along_step(
        "sharpness/directional",
        "curvature along the last update, over its squared length",
        _LOSS,
        scale="log",
        choice="directional",
        chart=_ALONG,
    ),
    _along_step(
        "sharpness/directional_norm",
        "the same over its squared norm in the optimizer's own geometry",
        "loss / norm²",
        scale="log",
        choice="directional",
    ),
    _along_step(
        "sharpness/best_multiple",
        "multiple of the last update that would have been best; the loss rises below 1/2",
        "steps",
        choice="directional",
        condition=Condition.POSITIVE_CURVATURE,
        chart=_FAR,
    ),
    _along_step(
        "sharpness/critical_multiple",
        "multiple of the last update at which the loss is back where it was",
        "steps",
        choice="critical",
        condition=Condition.TRUSTED_LOSS,
        chart=_FAR,
    ),
    _along_step(
        "sharpness/critical",
        "2 over the critical learning rate",
        "1 / rate",
        scale="log",
        choice="critical",
        condition=Condition.ONE_RATE | Condition.TRUSTED_LOSS | Condition.DESCENDS,
        chart=_ALONG,
    ),
    _along_step(
        "sharpness/batch",
        "curvature of a training batch's own loss along its own gradient",
        _LOSS,
        scale="log",
        choice="batch",
        chart=_ALONG,
    ),
    _solved_for("sharpness/matvecs", "Hessian-vector products this measurement took", "matvecs"),
    _solved_for("sharpness/probe_loss", "training loss on the probe", "loss"),
    _solved_for("sharpness/probe_samples", "samples in the probe", "samples", condition=Condition.KNOWN_SAMPLES),
)
