"""What the curvature of the whole loss is called: the tags of each quantity, and what a solve writes under them."""

from dynamon.curvature import Eigenpairs

SUBSPACE = 5  # eigenvectors in the top eigenspace


def _solved(tag: str, meaning: str) -> dict[str, str]:
    """The tags of one solve."""
    return {
        f"sharpness/{tag}": meaning,
        f"sharpness/{tag}_upper": "99 % upper bound on it, now and then",
        f"sharpness/{tag}_residual": "residual of its eigenpair",
        f"sharpness/{tag}_unconverged": "the value where it did not converge: a lower bound only",
    }


TAGS: dict[str, dict[str, str]] = {
    "stability_ratio": {
        **_solved("stability_ratio", "largest eigenvalue of the update's own Hessian; 1 is the largest stable step"),
        "sharpness/left_out": "coordinates left out because the optimizer has never seen them move",
    },
    "hessian": {
        **_solved("hessian_max", "largest eigenvalue of the Hessian"),
        "sharpness/hessian_min": "smallest Ritz value: an upper bound on the smallest eigenvalue",
        "sharpness/threshold": "the eigenvalue at which plain gradient descent becomes unstable (SGD)",
    },
    "preconditioned": _solved("preconditioned_max", "largest eigenvalue of the Hessian between P^-1/2 (Adam's P)"),
    "ggn": _solved("ggn_max", "largest eigenvalue of the Gauss-Newton matrix"),
    "bracket": {
        "sharpness/hessian_max_bracket": "the probe's top direction on other samples: below the full loss's eigenvalue",
        "sharpness/stability_ratio_bracket": "the same for the stability ratio",
    },
    "subspace": {
        "sharpness/gradient_share": f"share of the gradient in the top eigenspace of {SUBSPACE} vectors",
        "sharpness/update_share": "share of the last update in it",
        "sharpness/eigenspace_overlap": "overlap with the eigenspace of the measurement before",
    },
    "trace": {"sharpness/trace": "trace of the Hessian", "sharpness/trace_error": "its standard error"},
    "density": {
        "sharpness/outliers": "eigenvalues that stand apart above the bulk of the Hessian's spectrum",
        "sharpness/bulk_edge": "where that bulk ends",
    },
    "blocks": {},
}
BLOCKS = "sharpness/block"
COMMON = {
    "sharpness/products": "Hessian products this measurement took",
    "sharpness/probe_loss": "training loss on the probe",
    "sharpness/probe_samples": "samples in the probe",
}
TRACKED = frozenset({"stability_ratio", "hessian", "preconditioned", "ggn"})  # with a warm start of their own


def readings_of(quantity: str, found: Eigenpairs) -> dict[str, float]:
    """The tags of one solve; a value that did not converge goes under a tag of its own."""
    return found.readings(f"sharpness/{quantity}")
