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
        "top Hessian eigenvalue": lines(
            "sharpness/hessian_max", "sharpness/hessian_max_upper", "sharpness/hessian_max_unconverged"
        ),
        "smallest Ritz value": lines("sharpness/hessian_min"),
    }
}
GRADIENTS: Layout = {
    "2 Gradients": {
        "global norm, before and after clipping": lines("gradient/norm", "gradient/norm_clipped"),
        "dual norm across layers": band("gradient/dual"),
        "noise in the dual norm across layers": band("noise/dual"),
    }
}
RATES: Layout = {"3 Rates": {"rate ratio across layers": band("lr/ratio"), "base rate": lines("lr/base")}}
WEIGHTS: Layout = {
    "4 Weights": {
        "operator norm across layers": band("weight/operator"),
        "update / weight across layers": band("update/ratio"),
        "largest singular value across layers": band("spectrum/sigma_max"),
        "stable rank across layers": band("spectrum/stable_rank"),
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
