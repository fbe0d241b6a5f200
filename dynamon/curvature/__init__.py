"""Curvature of a loss: products with its Hessian or Gauss-Newton matrix, and what they tell."""

from dynamon.curvature.backends import NoSecondDerivativeError
from dynamon.curvature.blocks import BlockOperator, blockwise_sharpness
from dynamon.curvature.critical import CriticalSharpness, critical_sharpness
from dynamon.curvature.density import SpectralDensity, spectral_density
from dynamon.curvature.directional import (
    DirectionalSharpness,
    NormSharpness,
    batch_sharpness,
    directional_sharpness,
    norm_sharpness,
)
from dynamon.curvature.distributed import MeanOverRanks
from dynamon.curvature.eigenpairs import Eigenpairs
from dynamon.curvature.eigenvalues import top_eigenvalues
from dynamon.curvature.fsdp import unsharded
from dynamon.curvature.ggn import GGNOperator
from dynamon.curvature.hessian import HessianOperator
from dynamon.curvature.operators import Diagonal, LinearOperator
from dynamon.curvature.outputs import OutputsOfLoss
from dynamon.curvature.sharded import ShardedHessian, ShardedParameters
from dynamon.curvature.subspace import eigenspace_overlap, eigenspace_share
from dynamon.curvature.trace import TraceEstimate, trace
from dynamon.curvature.tracker import EigenTracker

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
