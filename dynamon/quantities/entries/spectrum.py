"""Singular values of the weights: the largest with its bounds, ranks, and convolutions as maps of whole inputs."""

from functools import partial

from dynamon.quantities.registry import Condition, Quantity, Scope

_per_layer = partial(Quantity, cadence="weight", scope=Scope.PER_LAYER, scale="log")
_every_tenth = partial(_per_layer, every=10)  # what needs all singular values

SPECTRUM = (
    _per_layer(
        "spectrum/sigma_max",
        "largest singular value",
        "weight",
        words="largest singular value",
        chart="largest singular value across layers",
        field="sigma_max",
    ),
    _per_layer(
        "spectrum/sigma_lower",
        "certified lower bound on it",
        "weight",
        words="largest singular value, lower bound",
        field="sigma_lower",
    ),
    _per_layer(
        "spectrum/sigma_upper",
        "certified upper bound on it",
        "weight",
        words="largest singular value, upper bound",
        field="sigma_upper",
    ),
    _per_layer(
        "spectrum/stable_rank",
        "squared Frobenius norm over squared sigma_max",
        "directions",
        words="stable rank",
        chart="stable rank across layers",
        extremes=True,
        field="stable_rank",
    ),
    _per_layer(
        "spectrum/log2_spectral_condition",
        "log2 of the RMS->RMS norm: 0 where the spectral condition (arXiv 2310.17813) holds with a constant of one",
        "octaves",
        scale="linear",
        words="deviation from the spectral condition, log2",
        chart="deviation from the spectral condition across layers, log2",
        field="log2_spectral_condition",
    ),
    _every_tenth(
        "spectrum/effective_rank",
        "exp of the entropy of the singular values",
        "directions",
        words="effective rank",
        field="effective_rank",
    ),
    _every_tenth(
        "spectrum/participation_ratio",
        "singular values that carry the energy",
        "directions",
        words="participation ratio",
        field="participation_ratio",
    ),
    _every_tenth("spectrum/nuclear", "sum of the singular values", "weight", words="nuclear norm", field="nuclear"),
    _every_tenth(
        "spectrum/condition",
        "largest over smallest singular value",
        "none",
        condition=Condition.RESOLVED,
        words="condition number",
        field="condition",
    ),
    _every_tenth(
        "spectrum/tail_exponent",
        "power-law exponent of the Gram eigenvalues",
        "none",
        condition=Condition.POWER_LAW,
        words="exponent of the spectrum's tail",
        field="tail_exponent",
    ),
    _every_tenth(
        "spectrum/convolution_lower",
        "lower bound on the convolution's norm as a map of inputs of any size",
        "none",
        condition=Condition.CONVOLUTIONS,
        words="norm of the convolution as a map of inputs, lower bound",
    ),
    _every_tenth(
        "spectrum/convolution_upper",
        "upper bound on it",
        "none",
        condition=Condition.CONVOLUTIONS,
        words="norm of the convolution as a map of inputs, upper bound",
    ),
)
