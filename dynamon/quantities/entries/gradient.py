"""Gradients: norms before and after clipping, what clipping does, and how quickly gradients turn."""

from functools import partial

from dynamon.quantities.registry import Condition, Quantity, Scope

_gradient = partial(Quantity, cadence="gradient")
_per_layer = partial(_gradient, scope=Scope.PER_LAYER, scale="log")

_NORMS, _CLIPPING = "global norm, before and after clipping", "what clipping leaves, and the share of steps it acts at"
GRADIENT = (
    _gradient(
        "gradient/norm",
        "l2 norm of all gradients before clipping",
        "loss / weight",
        scale="log",
        chart=_NORMS,
        row="gradient norm",
    ),
    _gradient(
        "gradient/norm_clipped",
        "the same after clipping",
        "loss / weight",
        scale="log",
        condition=Condition.AUTOMATIC,
        chart=_NORMS,
    ),
    _gradient(
        "gradient/clip_coefficient",
        "after over before; 1 where nothing was clipped",
        "0 to 1",
        condition=Condition.AUTOMATIC,
        chart=_CLIPPING,
    ),
    _gradient(
        "gradient/clip_share",
        "share of the steps measured so far at which clipping changed the norm",
        "0 to 1",
        condition=Condition.AUTOMATIC,
        chart=_CLIPPING,
    ),
    _gradient("gradient/norm_dual", "sum of the layers' dual norms", "loss", scale="log"),
    _gradient("gradient/norm_l1", "l1 norm of all gradients before clipping", "loss / weight", scale="log"),
    _gradient(
        "gradient/cosine",
        "cosine between this gradient and the one a step before",
        "-1 to 1",
        chart="cosine of successive gradients",
    ),
    _gradient("gradient/nonfinite", "entries that are NaN or infinite", "entries"),
    _per_layer("gradient/l2", "l2 norm of the gradient", "loss / weight", words="gradient, l2 norm"),
    _per_layer(
        "gradient/dual",
        "its dual norm, in the norm that fits optimizer and role",
        "loss / norm",
        words="gradient, dual norm",
        chart="dual norm across layers",
        extremes=True,
    ),
    _per_layer(
        "gradient/local_smoothness",
        "dual norm of the gradient's change over the norm of the step in between",
        "loss / norm²",
        words="change of the gradient over the step",
        chart="change of the gradient over the step, across layers",
    ),
    _gradient(
        "gradient/histogram",
        "the gradient before clipping",
        "",
        scope=Scope.HISTOGRAMS,
        every=10,
        condition=Condition.HISTOGRAMS,
    ),
)
