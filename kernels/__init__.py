"""Numerical kernels: tensors in, tensors out.

Nothing here knows ``nn.Module``, an optimizer or Lightning.
"""

from dynamon.kernels.conv_gram import conv_gram_iteration
from dynamon.kernels.devices import decomposable, in_double, waiter, widened, widest_dtype
from dynamon.kernels.gradient_stats import GradientStats, gradient_stats, warm_up
from dynamon.kernels.gram import gram_iteration
from dynamon.kernels.lengths import l2_along, l2_norms
from dynamon.kernels.nuclear import nuclear_norm
from dynamon.kernels.polar import polar_error, polar_factor, step_polar_factor
from dynamon.kernels.power import top_singular

__all__ = [
    "GradientStats",
    "conv_gram_iteration",
    "decomposable",
    "gradient_stats",
    "gram_iteration",
    "in_double",
    "l2_along",
    "l2_norms",
    "nuclear_norm",
    "polar_error",
    "polar_factor",
    "step_polar_factor",
    "top_singular",
    "waiter",
    "warm_up",
    "widened",
    "widest_dtype",
]
