"""Ready-made panels for TensorBoard's Custom Scalars tab. A panel computes nothing: it names tags."""

import re
from collections.abc import Iterable

Layout = dict[str, dict[str, list[object]]]


def lines(*tags: str) -> list[object]:
    """A chart with one line for each tag."""
    return ["Multiline", [re.escape(tag) for tag in tags]]


def band(prefix: str) -> list[object]:
    """The median across layers, with the 10 % and 90 % quantiles as a band."""
    return ["Margin", [f"{prefix}_median", f"{prefix}_p10", f"{prefix}_p90"]]


SHARPNESS: Layout = {
    "1 Stability": {
        "stability ratio (1: the largest stable step)": lines(
            "sharpness/stability_ratio",
            "sharpness/stability_ratio_upper",
            "sharpness/stability_ratio_unconverged",
        ),
        "top Hessian eigenvalue and where plain SGD becomes unstable": lines(
            "sharpness/hessian_max",
            "sharpness/hessian_max_upper",
            "sharpness/hessian_max_bracket",
            "sharpness/hessian_max_unconverged",
            "sharpness/threshold",
        ),
        "smallest Ritz value": lines("sharpness/hessian_min"),
        "share of gradient and update in the top eigenspace": lines(
            "sharpness/gradient_share", "sharpness/update_share", "sharpness/eigenspace_overlap"
        ),
    }
}
STEPS: Layout = {
    "1 Stability": {
        "how far the last step could go (1: as far as it went)": lines(
            "sharpness/critical_multiple", "sharpness/greedy_multiple"
        ),
        "sharpness along the step and on the batch": lines(
            "sharpness/directional", "sharpness/critical", "sharpness/batch"
        ),
    }
}
GRADIENTS: Layout = {
    "2 Gradients": {
        "global norm, before and after clipping": lines("gradient/norm", "gradient/norm_clipped"),
        "what clipping leaves, and the share of steps it acts at": lines(
            "gradient/clip_coefficient", "gradient/clip_share"
        ),
        "cosine of successive gradients": lines("gradient/cosine"),
        "dual norm across layers": band("gradient/dual"),
        "noise in the dual norm across layers": band("noise/dual"),
        "gradient noise scale, in multiples of the batch": lines("noise/scale"),
        "signal to noise across layers": band("noise/snr"),
        "change of the gradient over the step, across layers": band("gradient/local_smoothness"),
    }
}
RATES: Layout = {
    "3 Rates": {
        "rate ratio across layers": band("lr/ratio"),
        "base rate": lines("lr/base", "lr/base_min"),
    }
}
WEIGHTS: Layout = {
    "4 Weights": {
        "operator norm across layers": band("weight/operator"),
        "update / weight across layers": band("update/ratio"),
        "cosine of successive updates": lines("update/cosine"),
        "cosine of successive updates across layers": band("update/layer_cosine"),
        "what decay has left of the initial weights, across layers": band("weight/memory"),
        "largest singular value across layers": band("spectrum/sigma_max"),
        "stable rank across layers": band("spectrum/stable_rank"),
        "deviation from the spectral condition across layers, log2": band("spectrum/deviation"),
    }
}
OVERHEAD: Layout = {
    "5 dynamon": {"share of training time": lines("dynamon/overhead"), "failures": lines("dynamon/failures")}
}


def combined(layouts: Iterable[Layout]) -> Layout:
    """One layout of several, categories in the order of their names."""
    merged: Layout = {}
    for layout in layouts:
        for category, charts in layout.items():
            merged.setdefault(category, {}).update(charts)
    return dict(sorted(merged.items()))


def shown(layout: Layout, tags: Iterable[str]) -> Layout:
    """The part of a layout of lines whose tags will be written; charts without any are left out."""
    known = {re.escape(tag) for tag in tags}
    kept: Layout = {}
    for category, charts in layout.items():
        for title, (kind, patterns) in charts.items():
            present = [pattern for pattern in patterns if pattern in known]  # type: ignore[attr-defined]
            if present:
                kept.setdefault(category, {})[title] = [kind, present]
    return kept
