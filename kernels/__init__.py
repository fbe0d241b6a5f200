"""Tensors in, tensors out: the numerical kernels under dynamon.

Nothing here knows ``nn.Module``, an optimizer or Lightning.
"""

from dynamon.kernels.gradient_stats import GradientStats, gradient_stats
from dynamon.kernels.gram import gram_iteration
from dynamon.kernels.nuclear import nuclear_norm

__all__ = ["GradientStats", "gradient_stats", "gram_iteration", "nuclear_norm"]
