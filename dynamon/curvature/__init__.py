"""Curvature of a loss: its Hessian and Gauss-Newton matrix as operators, their eigenvalues, trace and density.

What solvers read on the host is returned as ``float``, arrays of it as ``numpy.ndarray``. Tensors are what stays on the
device (vectors, products) and ``Eigenpairs.values``, ``.residuals`` and ``.errors``, which are float64 on the host.
"""

from dynamon.curvature.along.critical import CriticalSharpness, critical_sharpness
from dynamon.curvature.along.directional import (
    DirectionalSharpness,
    NormSharpness,
    batch_sharpness,
    directional_sharpness,
    norm_sharpness,
)
from dynamon.curvature.along.subspace import eigenspace_overlap, eigenspace_share
from dynamon.curvature.distributed.fsdp import unsharded
from dynamon.curvature.distributed.mean_over_ranks import MeanOverRanks
from dynamon.curvature.distributed.sharded import ShardedHessian, ShardedParameters
from dynamon.curvature.operators.backends import NoSecondDerivativeError
from dynamon.curvature.operators.base import Diagonal, LinearOperator
from dynamon.curvature.operators.blocks import BlockOperator, blockwise_sharpness
from dynamon.curvature.operators.ggn import GGNOperator
from dynamon.curvature.operators.hessian import HessianOperator
from dynamon.curvature.operators.outputs import OutputsOfLoss
from dynamon.curvature.solvers.density import SpectralDensity, spectral_density
from dynamon.curvature.solvers.eigenpairs import Eigenpairs
from dynamon.curvature.solvers.top import top_eigenvalues
from dynamon.curvature.solvers.trace import TraceEstimate, trace
from dynamon.curvature.solvers.tracker import EigenTracker

__all__ = [
    "BlockOperator",
    "CriticalSharpness",
    "Diagonal",
    "DirectionalSharpness",
    "EigenTracker",
    "Eigenpairs",
    "GGNOperator",
    "HessianOperator",
    "LinearOperator",
    "MeanOverRanks",
    "NoSecondDerivativeError",
    "NormSharpness",
    "OutputsOfLoss",
    "ShardedHessian",
    "ShardedParameters",
    "SpectralDensity",
    "TraceEstimate",
    "batch_sharpness",
    "blockwise_sharpness",
    "critical_sharpness",
    "directional_sharpness",
    "eigenspace_overlap",
    "eigenspace_share",
    "norm_sharpness",
    "spectral_density",
    "top_eigenvalues",
    "trace",
    "unsharded",
]
